"""The inference process on a tiny model, through both clients and the command line."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapter_files import make_card, write_peft_folder
from edgepeft.chat.client import InferenceClient, SyncInference
from edgepeft.chat.evaluation import EvaluationProgress, evaluate
from edgepeft.chat.protocol import AdapterUse, Answer, Sampling, Token
from edgepeft.chat.setup import choose_prompting, choose_setup, parse_adapter
from edgepeft.cli.chat_loop import ChatLoop
from edgepeft.errors import BadInput, DoesNotFit, EdgepeftError
from edgepeft.library.store import publish
from edgepeft.models.store import ModelEntry, add_model
from tiny import write_alpaca, write_tiny_model

PROMPT = [256, 257, 40, 41, 42]
GREEDY = Sampling(temperature=0.0, max_new_tokens=12)
LONG = Sampling(temperature=0.0, max_new_tokens=100_000)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One home for the whole module: a process is started once."""
    home = tmp_path_factory.mktemp("infer-home")
    before = os.environ.get("EDGEPEFT_HOME")
    os.environ["EDGEPEFT_HOME"] = str(home)
    yield home
    if before is None:
        del os.environ["EDGEPEFT_HOME"]
    else:
        os.environ["EDGEPEFT_HOME"] = before


@pytest.fixture(autouse=True)
def _same_home(place: Path, edgepeft_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPEFT_HOME", str(place))


@pytest.fixture(scope="module")
def entry(place: Path) -> ModelEntry:
    # A long context, so that an answer can be stopped in its middle.
    return add_model(write_tiny_model(place / "src", max_position_embeddings=200_000), "tiny", copy=True)


@pytest.fixture(scope="module")
def inference(entry: ModelEntry) -> Iterator[SyncInference]:
    with SyncInference.start(entry, "fp32", "fp32") as client:
        yield client


@pytest.fixture
def adapter(entry: ModelEntry, tmp_path: Path) -> Path:
    return write_peft_folder(tmp_path / "adapter", entry.shape)


def answer_of(client: SyncInference, *adapters: AdapterUse) -> list[int]:
    *tokens, answer = client.generate(PROMPT, [], GREEDY, adapters)
    assert isinstance(answer, Answer)
    assert [token for reply in tokens for token in reply.ids] == answer.ids
    return answer.ids


def test_ready_tells_about_the_base(inference: SyncInference) -> None:
    assert inference.ready is not None
    assert inference.ready.device == "cpu"
    assert inference.ready.live_bytes > 90_000 * 4


def test_streams_swaps_batches_and_scores(inference: SyncInference, adapter: Path) -> None:
    base = answer_of(inference)
    use = AdapterUse(str(adapter))
    adapted = answer_of(inference, use)
    assert adapted != base
    assert answer_of(inference) == base
    answers = {answer.index: answer.ids for answer in inference.generate_batch([PROMPT, PROMPT[1:]], [], GREEDY, [use])}
    assert answers[0] == adapted
    assert set(answers) == {0, 1}
    scored = inference.score_loss([(PROMPT, [True] * 5), ([1, 2, 3], [False, False, True]), ([4], [True])])
    assert scored.trained_tokens == 5
    assert scored.mean_loss == pytest.approx((scored.losses[0] * 4 + scored.losses[1]) / 5)


def test_cancel_ends_the_answer_and_not_the_process(inference: SyncInference) -> None:
    stream = inference.generate(PROMPT, [], LONG)
    for _ in range(3):
        assert isinstance(next(stream), Token)
    stream.cancel()
    *_, answer = stream
    assert isinstance(answer, Answer)
    assert answer.stopped_by == "cancelled"
    assert 3 <= len(answer.ids) < 100_000
    assert answer.ids[:3] == answer_of(inference)[:3]
    batch = inference.generate_batch([PROMPT, PROMPT[1:]], [answer.ids[1]], LONG, batch_size=1)
    assert next(batch).stopped_by == "stop"
    # Leaving a batch early stops what is left of it.
    batch.close()
    assert len(answer_of(inference)) == 12


def test_trouble_is_an_error_and_the_process_goes_on(inference: SyncInference, adapter: Path) -> None:
    with pytest.raises(BadInput, match="does not know"):
        list(inference.generate([999], [], GREEDY))
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(BadInput, match="adapter"):
        list(inference.generate(PROMPT, [], GREEDY, [AdapterUse(str(adapter))]))
    assert inference.alive
    assert len(answer_of(inference)) == 12


def test_evaluation_scores_a_file(inference: SyncInference, entry: ModelEntry, adapter: Path, tmp_path: Path) -> None:
    path = write_alpaca(tmp_path / "data.jsonl", 9)
    with path.open("a") as file:
        file.write('{"instruction": "half"\n')
        file.write(json.dumps({"instruction": "Say", "output": '{"a": 1}'}) + "\n")
    told: list[EvaluationProgress] = []
    result = evaluate(
        inference, entry, path, [AdapterUse(str(adapter))], max_new_tokens=4, batch_size=4, progress=told.append
    )
    assert result.records == 10
    assert [row.line for row in result.rows] == [*range(1, 10), 11]
    assert result.loss is not None
    assert result.loss == pytest.approx(
        sum(row.loss * weight for row, weight in zip(result.rows, _trained(path, entry), strict=True) if row.loss)
        / result.trained_tokens
    )
    assert result.scores is not None
    assert (result.scores.valid_json, result.scores.field_accuracy) == (0.0, 0.0)
    assert any("line 10" in note for note in result.notes)
    assert [state.done for state in told if state.what == "answers"] == list(range(1, 11))
    limited = evaluate(inference, entry, path, max_new_tokens=1, limit=2)
    assert limited.records == 2
    assert limited.scores is not None
    assert limited.scores.valid_json is None
    (tmp_path / "bad.jsonl").write_text('{"instruction": "x"\n')
    with pytest.raises(BadInput):
        evaluate(inference, entry, tmp_path / "bad.jsonl")


def _trained(path: Path, entry: ModelEntry) -> list[int]:
    from edgepeft.data.encode import encode_record
    from edgepeft.data.records import Record, read_records
    from edgepeft.data.template import ChatTemplate
    from edgepeft.data.tokens import Tokenizer

    tokenizer, template = Tokenizer.load(Path(entry.folder)), ChatTemplate.load(Path(entry.folder))
    return [
        sum(sum(sample.mask[1:]) for sample in encode_record(record, tokenizer, template))
        for record in read_records(path)
        if isinstance(record, Record)
    ]


def test_a_dead_process_is_told_with_its_log(entry: ModelEntry) -> None:
    client = SyncInference.start(entry, "fp32", "fp32")
    stream = client.generate(PROMPT, [], LONG)
    next(stream)
    client._connection._process.kill()
    with pytest.raises(EdgepeftError, match=r"infer-.*\.log"):
        list(stream)
    with pytest.raises(EdgepeftError):
        list(client.generate(PROMPT, [], GREEDY))
    assert not client.alive
    client.close()


def test_a_base_that_cannot_be_loaded_tells_why(entry: ModelEntry) -> None:
    with pytest.raises(DoesNotFit):
        SyncInference.start(entry, "fp32", "fp32", budget_bytes=1000)


def test_an_adapter_that_does_not_fit_leaves_the_chat_as_it_was(
    inference: SyncInference, entry: ModelEntry, adapter: Path, tmp_path: Path
) -> None:
    assert inference.ready is not None
    budget = inference.ready.live_bytes + 600_000
    large = write_peft_folder(tmp_path / "large", entry.shape, rank=48)
    setup = choose_setup("tiny", [parse_adapter(str(adapter))], "fp32", "cpu")
    with SyncInference.start(entry, "fp32", "fp32", budget_bytes=budget) as client:
        loop = ChatLoop(
            client, setup, choose_prompting(entry, setup.adapters, fall_back=True), GREEDY, None, None, styled=False
        )
        with_small = answer_of(client, *(chosen.use for chosen in loop._adapters))
        with pytest.raises(DoesNotFit, match=r"with large .* are needed beside the base"):
            loop._run_command("adapter", str(large))
        assert loop._adapters == setup.adapters
        assert answer_of(client, *(chosen.use for chosen in loop._adapters)) == with_small
        loop._run_command("adapter", "off")
        assert loop._adapters == ()
    options = ("--precision", "fp32", "--gpu", "cpu", "--prompt", "Hi", "--max-new-tokens", "3")
    refused = edgepeft("chat", "tiny", "-a", str(large), *options, "--budget", f"{budget}B")
    assert (refused.returncode, refused.stdout) == (4, "")
    assert "the memory budget leaves" in " ".join(refused.stderr.split())
    done = edgepeft("chat", "tiny", "-a", str(adapter), *options, "--budget", f"{budget}B")
    assert done.returncode == 0, done.stderr


def test_async_client_streams_and_stops(entry: ModelEntry) -> None:
    async def talk() -> None:
        async with await InferenceClient.start(entry, "fp32", "fp32") as client:
            replies = [reply async for reply in client.generate(PROMPT, [], GREEDY)]
            assert isinstance(replies[-1], Answer)
            assert len(replies[-1].ids) == 12

            async def endless() -> None:
                async for _ in client.generate(PROMPT, [], LONG):
                    pass

            task = asyncio.create_task(endless())
            await asyncio.sleep(0.3)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            answers = [answer async for answer in client.generate_batch([PROMPT, PROMPT], [], GREEDY)]
            assert [answer.ids for answer in answers] == [replies[-1].ids] * 2
            await client.activate([])
            assert (await client.score_loss([(PROMPT, [True] * 5)])).trained_tokens == 4
            client._connection._process.kill()
            with pytest.raises(EdgepeftError):
                await client.score_loss([(PROMPT, [True] * 5)])

    asyncio.run(talk())


def test_the_process_ends_with_its_stdin(entry: ModelEntry) -> None:
    from edgepeft.processes import start_worker

    worker = start_worker(
        "infer",
        ["--model", "tiny", "--precision", "fp32", "--compute", "fp32"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    while b'"ready"' not in worker.stdout.readline():
        pass
    worker.stdin.write(b"not json\n")
    worker.stdin.flush()
    assert b"not a request" in worker.stdout.readline()
    begun = time.monotonic()
    worker.stdin.close()
    assert worker.wait(timeout=60) == 0
    assert time.monotonic() - begun < 30
    worker.stdout.close()


def edgepeft(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edgepeft", *arguments],
        input=stdin,
        stdin=None if stdin is not None else subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=240,
        check=False,
    )


def test_one_shot_chat_prints_the_answer_alone(entry: ModelEntry, adapter: Path) -> None:
    publish(adapter, "made", make_card(base_fingerprint=entry.fingerprint, precision="fp32", template=None))
    told = edgepeft(
        "chat",
        "tiny",
        "--prompt",
        "-",
        "--max-new-tokens",
        "5",
        "--temperature",
        "0",
        "--gpu",
        "cpu",
        "--json",
        stdin="Hi\n",
    )
    assert told.returncode == 0, told.stderr
    answer = json.loads(told.stdout)
    assert (answer["model"], answer["adapters"], answer["precision"]) == ("tiny", [], "bf16")
    assert answer["answer_tokens"] <= 5
    plain = edgepeft("chat", "-a", "made=0.5", "--prompt", "Hi", "--max-new-tokens", "5", "--gpu", "cpu")
    assert plain.returncode == 0, plain.stderr
    assert "tiny" not in plain.stdout


def test_a_chat_stores_what_it_quantized_and_says_where_it_could_not(entry: ModelEntry) -> None:
    words = ("chat", "tiny", "--precision", "nf4", "--prompt", "Hi", "--max-new-tokens", "5", "--temperature", "0")
    in_the_way = Path(entry.folder) / "quantized"
    in_the_way.write_text("a file")
    told = edgepeft(*words, "--gpu", "cpu")
    in_the_way.unlink()
    assert told.returncode == 0, told.stderr
    assert "Note: the nf4 copy of tiny is not stored, so the next load quantizes again" in " ".join(told.stderr.split())
    for _ in range(2):
        again = edgepeft(*words, "--gpu", "cpu")
        assert (again.returncode, again.stdout) == (0, told.stdout), again.stderr
        assert "copy" not in again.stderr
        assert (in_the_way / "nf4" / "cpu.safetensors").is_file()


def test_eval_command_prints_scores_and_rows(entry: ModelEntry, tmp_path: Path) -> None:
    path = write_alpaca(tmp_path / "data.jsonl", 3)
    told = edgepeft("eval", "tiny", "--data", str(path), "--max-new-tokens", "3", "--gpu", "cpu", "--json")
    assert told.returncode == 0, told.stderr
    result = json.loads(told.stdout)
    assert (result["records"], len(result["rows"]), result["valid_json"]) == (3, 3, None)
    words = ("eval", "tiny", "--data", str(path), "--max-new-tokens", "3", "--gpu", "cpu", "--json")
    guided = json.loads(edgepeft(*words, "--system", "Answer with one digit.").stdout)
    assert guided["loss"] != result["loss"]
    assert edgepeft("eval", "tiny", "--data", str(tmp_path / "none.jsonl")).returncode == 3
