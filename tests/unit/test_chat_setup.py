"""Which base, precision and template a chat begins with."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapter_files import make_card, write_peft_folder
from edgepeft.chat.setup import choose_prompting, choose_setup, encode_conversation, parse_adapter
from edgepeft.errors import BadInput, UsageError
from edgepeft.library.card import TemplateRecord
from edgepeft.library.store import publish
from edgepeft.models.store import ModelEntry, add_model
from tiny import CHATML, write_tiny_model


@pytest.fixture
def entry(tiny_model: Path) -> ModelEntry:
    return add_model(tiny_model, "tiny")


@pytest.fixture
def folder(entry: ModelEntry, tmp_path: Path) -> Path:
    return write_peft_folder(tmp_path / "made=1", entry.shape)


def test_adapters_are_named_with_their_strength(folder: Path) -> None:
    publish(folder, "a", make_card())
    half = parse_adapter("a=0.5")
    assert (half.label, half.use.scale) == ("a@v1=0.5", 0.5)
    assert parse_adapter("a@v1").label == "a@v1"
    assert parse_adapter(str(folder)).adapter.path == folder
    for bad in ("a=much", "a=", "a=nan", "a=1e9"):
        with pytest.raises(UsageError, match="strength"):
            parse_adapter(bad)


def test_the_adapter_decides_base_and_precision(entry: ModelEntry, folder: Path) -> None:
    publish(folder, "a", make_card(base_fingerprint=entry.fingerprint, base="renamed-since", precision="nf4"))
    setup = choose_setup(None, [parse_adapter("a")], gpu="cpu")
    assert (setup.entry.name, setup.precision, setup.device, setup.warnings) == ("tiny", "nf4", "cpu", ())
    other = choose_setup("tiny", [parse_adapter("a")], "bf16", gpu="cpu")
    assert other.precision == "bf16"
    assert any("nf4" in warning for warning in other.warnings)
    assert choose_setup("tiny", [], gpu="cpu").precision == "bf16"
    assert choose_setup("tiny", [], "fp32", gpu="cpu").compute_dtype == "fp32"


def test_a_plain_peft_folder_is_warned_about(entry: ModelEntry, folder: Path, tmp_path: Path) -> None:
    setup = choose_setup(None, [parse_adapter(str(folder))], gpu="cpu")
    assert setup.entry.name == "tiny"
    assert any("unverified" in warning for warning in setup.warnings)
    lost = write_peft_folder(tmp_path / "lost", entry.shape, base_model_name_or_path="who/knows")
    with pytest.raises(BadInput, match="who/knows"):
        choose_setup(None, [parse_adapter(str(lost))], gpu="cpu")
    other_kind = write_peft_folder(tmp_path / "vera", entry.shape, peft_type="VERA")
    with pytest.raises(BadInput, match="type VERA, which cannot be loaded"):
        choose_setup(None, [parse_adapter(str(other_kind))], gpu="cpu")
    nameless = write_peft_folder(tmp_path / "nameless", entry.shape, base_model_name_or_path=None)
    with pytest.raises(BadInput, match="which base"):
        choose_setup(None, [parse_adapter(str(nameless))], gpu="cpu")


def test_wrong_choices_are_refused(entry: ModelEntry, folder: Path) -> None:
    publish(folder, "a", make_card())
    with pytest.raises(BadInput, match="was trained on"):
        choose_setup("tiny", [parse_adapter("a")], gpu="cpu")
    with pytest.raises(UsageError, match="int3"):
        choose_setup("tiny", [], "int3", gpu="cpu")
    with pytest.raises(BadInput, match="no-such-model"):
        choose_setup("no-such-model", [], gpu="cpu")
    with pytest.raises(UsageError, match="4090"):
        choose_setup("tiny", [], gpu="rtx-4090-24gb")


def test_the_trained_template_system_and_stops_are_used(entry: ModelEntry, folder: Path) -> None:
    own = TemplateRecord(CHATML, "sha256:x", (258,))
    publish(folder, "same", make_card(base_fingerprint=entry.fingerprint, template=own, system="Be brief."))
    prompting = choose_prompting(entry, [parse_adapter("same")])
    assert (prompting.warnings, prompting.system) == ((), "Be brief.")
    assert 258 in prompting.stop_ids
    other = TemplateRecord("{% for m in messages %}[{{ m['content'] }}]{% endfor %}", "sha256:y", (259,))
    publish(folder, "other", make_card(base_fingerprint=entry.fingerprint, template=other))
    prompting = choose_prompting(entry, [parse_adapter("other")])
    assert any("template" in warning for warning in prompting.warnings)
    assert prompting.stop_ids[0] == 259
    ids = encode_conversation([{"role": "user", "content": "hi"}], prompting)
    assert prompting.tokenizer.decode(ids) == "[hi]"
    overridden = choose_prompting(entry, [parse_adapter("other")], "chatml")
    assert any("another chat template than the one given" in warning for warning in overridden.warnings)


def test_a_base_without_template_falls_back_visibly(tmp_path: Path) -> None:
    entry = add_model(write_tiny_model(tmp_path / "bare", template=None), "bare")
    with pytest.raises(BadInput, match="no chat template"):
        choose_prompting(entry, [])
    prompting = choose_prompting(entry, [], fall_back=True)
    assert any("chatml" in warning for warning in prompting.warnings)
    assert encode_conversation([{"role": "user", "content": "hi"}], prompting)[0] == 257


def test_a_template_that_refuses_is_one_line(entry: ModelEntry, tmp_path: Path) -> None:
    (tmp_path / "strict.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    prompting = choose_prompting(entry, [], str(tmp_path / "strict.jinja"))
    with pytest.raises(BadInput, match="roles must alternate"):
        encode_conversation([{"role": "user", "content": "hi"}], prompting)
