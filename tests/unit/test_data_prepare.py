"""Tokens on disk: masks, cache, split, limits and refusals; templates without torch."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepeft.data.prepare import describe_data, prepare
from edgepeft.data.statistics import Bin, draw_histogram, survey
from edgepeft.data.template import ChatTemplate
from edgepeft.data.tokens import Tokenizer, untrained_tokens
from edgepeft.errors import BadInput
from edgepeft.paths import home
from tiny import CHATML, write_alpaca, write_tiny_model


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def alpaca(question: str, answer: str) -> dict[str, str]:
    return {"instruction": question, "input": "", "output": answer}


def test_samples_come_back_as_they_went_in(tiny_model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [alpaca(f"question {n}", "é" * n) for n in range(1, 41)])
    prepared = prepare(describe_data(path, eval_fraction=0.1), tiny_model)
    tokenizer = Tokenizer.load(tiny_model)
    assert (len(prepared.train), len(prepared.held_out)) == (36, 4)
    seen = set()
    for table in (prepared.train, prepared.held_out):
        for index in range(len(table)):
            ids, mask = table.sample(index)
            number = table.line(index)
            seen.add(number)
            question, answer = f"question {number}", "é" * number
            assert tokenizer.decode(ids.tolist()) == (
                f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
            )
            assert tokenizer.decode(ids[mask].tolist()) == f"{answer}<|im_end|>"
            assert (ids.dtype, mask.dtype) == (np.int32, np.bool_)
            assert (table.lengths[index], table.trained[index]) == (len(ids), mask.sum())
            assert table.trained[index] == 2 * number + 1
    assert seen == set(range(1, 41))
    assert prepared.notes == ()


def test_text_is_trained_whole_and_needs_no_template(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "base", template=None)
    prepared = prepare(describe_data(write(tmp_path / "t.jsonl", [{"text": "ab"}]), eval_fraction=0), model)
    ids, mask = prepared.train.sample(0)
    assert Tokenizer.load(model).decode(ids.tolist()) == "ab<|im_end|>"
    assert mask.all()


def test_all_tokens_and_a_system_message(tiny_model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [alpaca("q", "a")])
    prepared = prepare(describe_data(path, train_on="all", system="S", eval_fraction=0), tiny_model)
    ids, mask = prepared.train.sample(0)
    assert mask.all()
    assert Tokenizer.load(tiny_model).decode(ids.tolist()).startswith("<|im_start|>system\nS<|im_end|>")


def test_the_cache_is_used_and_made_anew_when_damaged(
    tiny_model: Path, alpaca_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = describe_data(alpaca_file)
    told: list[tuple[int, int]] = []
    first = prepare(data, tiny_model, progress=lambda done, total: told.append((done, total)))
    size = alpaca_file.stat().st_size
    assert told[-1] == (size, size)
    told.clear()
    again = prepare(data, tiny_model, progress=lambda done, total: told.append((done, total)))
    assert told == []
    assert again.train.sample(3)[0].tolist() == first.train.sample(3)[0].tolist()
    (arrow,) = (home().cache / "tokens").glob("*.arrow")
    damaged = arrow.with_name("damaged")
    damaged.write_bytes(arrow.read_bytes()[:100])
    damaged.replace(arrow)
    prepare(data, tiny_model, progress=lambda done, total: told.append((done, total)))
    assert told
    prepare(describe_data(alpaca_file, system="other"), tiny_model)
    assert len(list((home().cache / "tokens").glob("*.arrow"))) == 2


def test_nothing_half_written_stays_when_the_file_breaks_off(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text('[{"text": "a"},\n{"text": "b')
    with pytest.raises(BadInput, match=r"d\.json:2: the file ends inside this record"):
        prepare(describe_data(path), tiny_model)
    assert list((home().cache / "tokens").iterdir()) == []


def test_a_file_that_changed_is_refused(tiny_model: Path, alpaca_file: Path) -> None:
    data = describe_data(alpaca_file)
    write_alpaca(alpaca_file, 3)
    with pytest.raises(BadInput, match="has changed since the plan"):
        prepare(data, tiny_model)


def test_skipped_records_are_noted(tiny_model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [alpaca("q", "a"), alpaca("q", ""), alpaca("r", "a")])
    prepared = prepare(describe_data(path, eval_fraction=0), tiny_model)
    assert prepared.counts.records == 2
    assert prepared.notes == (
        "1 of 3 records of d.jsonl are skipped; the first, line 2, 'output' is empty: there is nothing to learn",
    )


def test_no_usable_record_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [alpaca("q", "")])
    with pytest.raises(BadInput, match=r"d\.jsonl:1: no usable record"):
        prepare(describe_data(path), tiny_model)


def test_an_end_that_is_never_trained_is_refused(tmp_path: Path) -> None:
    endless = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    model = write_tiny_model(tmp_path / "m", template=endless)
    path = write(tmp_path / "d.jsonl", [alpaca("q", "a")])
    with pytest.raises(BadInput, match="would never be trained"):
        prepare(describe_data(path), model)
    prepared = prepare(describe_data(path, template="chatml", eval_fraction=0), model)
    assert "using the chatml template instead of the model's own" in prepared.notes


def test_an_empty_mask_is_refused(tmp_path: Path) -> None:
    silent = (
        "{% for message in messages %}{% if message['role'] == 'user' %}{{ message['content'] }}{% endif %}{% endfor %}"
    )
    model = write_tiny_model(tmp_path / "m", template=silent)
    with pytest.raises(BadInput, match="the loss mask is empty"):
        prepare(describe_data(write(tmp_path / "d.jsonl", [alpaca("q", "a")])), model)


def test_equal_samples_are_held_out_together(tiny_model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [alpaca(f"question {n % 20}", "a") for n in range(200)])
    prepared = prepare(describe_data(path, eval_fraction=0.25), tiny_model)
    tables = [
        {table.sample(index)[0].tobytes() for index in range(len(table))}
        for table in (prepared.train, prepared.held_out)
    ]
    assert (len(tables[0]), len(tables[1])) == (15, 5)
    assert not tables[0] & tables[1]


def test_a_held_out_file_of_its_own(tiny_model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [alpaca("q", "a"), alpaca("r", "b")])
    other = write(tmp_path / "e.jsonl", [alpaca("s", "c")])
    prepared = prepare(describe_data(path, eval_path=other), tiny_model)
    assert (len(prepared.train), len(prepared.held_out)) == (2, 1)


def test_limits_cut_or_drop(tiny_model: Path, tmp_path: Path) -> None:
    rows = [alpaca("q", "a" * 50), alpaca("q" * 200, "a"), alpaca("q", "a")]
    table = prepare(describe_data(write(tmp_path / "d.jsonl", rows), eval_fraction=0), tiny_model).train
    cut = table.limited(60, "truncate")
    assert (len(cut), cut.truncated, cut.dropped) == (2, 1, 1)
    assert [cut.line(index) for index in range(2)] == [1, 3]
    ids, mask = cut.sample(0)
    assert len(ids) == cut.lengths[0] == 60
    assert mask.sum() == cut.trained[0] < table.trained[0]
    dropped = table.limited(60, "drop")
    assert (len(dropped), dropped.truncated, dropped.dropped) == (1, 0, 2)
    assert table.lengths[0] > 60
    with pytest.raises(IndexError):
        cut.sample(2)


def test_many_batches_are_found_again(tiny_model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [{"text": f"{n}"} for n in range(3000)])
    table = prepare(describe_data(path, eval_fraction=0), tiny_model).train
    tokenizer = Tokenizer.load(tiny_model)
    for index in (0, 1023, 1024, 2047, 2048, 2999):
        assert tokenizer.decode(table.sample(index)[0].tolist()) == f"{index}<|im_end|>"


def test_templates_are_found_where_models_keep_them(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "m", template=None)
    with pytest.raises(BadInput, match="--template FILE"):
        ChatTemplate.load(model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": named}))
    template = ChatTemplate.load(model)
    assert template.render([], tools=[{}]) == "T"
    assert template.render([]) == template.text == "D"
    (model / "chat_template.jinja").write_text("J {{ eos_token }}")
    assert ChatTemplate.load(model).render([]) == "J <|im_end|>"
    (tmp_path / "own.jinja").write_text("O")
    assert ChatTemplate.load(model, str(tmp_path / "own.jinja")).render([]) == "O"
    (tmp_path / "own.jinja").write_text("{% if %}")
    with pytest.raises(BadInput, match="not valid Jinja"):
        ChatTemplate.load(model, str(tmp_path / "own.jinja"))


def test_built_in_templates_train_answers_and_their_end(tiny_model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [alpaca("q", "a")])
    tokenizer = Tokenizer.load(tiny_model)
    for name in ("chatml", "plain"):
        ids, mask = prepare(describe_data(path, template=name, eval_fraction=0), tiny_model).train.sample(0)
        assert tokenizer.decode(ids[mask].tolist()) == "a<|im_end|>"


def test_a_date_is_frozen_and_noted(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "m", template="{{ strftime_now('%d %b %Y') }}\n" + CHATML)
    path = write(tmp_path / "d.jsonl", [alpaca("q", "a")])
    data = describe_data(path, eval_fraction=0, day=datetime.date(2026, 2, 3))
    prepared = prepare(data, model)
    assert Tokenizer.load(model).decode(prepared.train.sample(0)[0].tolist()).startswith("03 Feb 2026\n")
    assert prepared.notes == ("the chat template inserts today's date: it is frozen to 2026-02-03",)


def test_control_tokens_that_the_model_lacks_are_told(tmp_path: Path) -> None:
    foreign = CHATML.replace("<|im_start|>", "<|header|>")
    model = write_tiny_model(tmp_path / "m", template=foreign, vocab_size=258)
    found = untrained_tokens(Tokenizer.load(model), ChatTemplate.load(model))
    assert found[0].startswith("the template writes <|header|>, which is no token of this model")
    assert any("only 258 embeddings" in problem for problem in found)
    good = write_tiny_model(tmp_path / "good")
    assert untrained_tokens(Tokenizer.load(good), ChatTemplate.load(good)) == []


def test_a_template_cannot_reach_out_of_its_sandbox(tiny_model: Path, tmp_path: Path) -> None:
    from edgepeft.data.conversation import RecordError

    (tmp_path / "evil.jinja").write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(RecordError, match="unsafe"):
        ChatTemplate.load(tiny_model, str(tmp_path / "evil.jinja")).render([])


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(BadInput, match=r"no tokenizer\.json, only tokenizer\.model"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInput, match="not a readable tokenizer"):
        Tokenizer.load(tmp_path)


def test_stop_tokens_come_from_all_three_places(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "m", template=CHATML.replace("<|im_end|>", "<|pad|>"))
    (model / "generation_config.json").write_text('{"eos_token_id": [256]}')
    tokenizer = Tokenizer.load(model)
    assert tokenizer.stop_token_ids() == (256, 258)
    assert tokenizer.stop_token_ids(ChatTemplate.load(model)) == (256, 258, 259)


def test_a_survey_counts_repeats_conflicts_and_lengths(tiny_model: Path, tmp_path: Path) -> None:
    rows = [alpaca("q", "a"), alpaca("q", "a"), alpaca("q", "b"), alpaca("r", ""), alpaca("s", "<|pad|>")]
    data = describe_data(write(tmp_path / "d.jsonl", rows))
    found = survey(data, Tokenizer.load(tiny_model), ChatTemplate.load(tiny_model))
    assert (found.records, found.usable, len(found.bad), found.empty) == (5, 4, 1, 1)
    assert (found.duplicates, found.conflicts, found.control_tokens) == (1, 1, 1)
    assert (found.duplicate_pairs[0].line, found.duplicate_pairs[0].earlier) == (2, 1)
    assert found.conflict_pairs[0].line == 3
    assert found.lengths is not None
    assert sum(item.samples for item in found.lengths.histogram) == found.samples == 4
    assert found.trained_tokens == 8
    assert found.with_end == 4


def test_histograms_keep_to_their_width_and_pass_over_long_gaps() -> None:
    bins = [Bin(1, 2, 1000), Bin(3, 4, 0), Bin(5, 8, 0), Bin(9, 16, 0), Bin(17, 32, 1)]
    lines = draw_histogram(bins, 40)
    assert len(lines) == 3
    assert max(map(len, lines)) == 40
    assert lines[0].endswith(" 1,000")
    assert lines[1].strip() == "⋮"
    assert "▏" in lines[2]
