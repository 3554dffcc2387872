"""What is decided and checked before an adapter is merged or exported, and where the result goes; no torch."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from adapter_files import make_card, write_peft_folder
from edgepeft.chat.comparison import BUILT_IN, MOST_TOKENS, choose_prompts
from edgepeft.chat.setup import ChosenAdapter, other_template
from edgepeft.cli.app import app
from edgepeft.data.tokens import Tokenizer
from edgepeft.errors import BadInput, DiskProblem, EdgepeftError, UsageError
from edgepeft.library import merge_client, merging
from edgepeft.library.card import TemplateRecord
from edgepeft.library.merging import Drift, Exported, ExportRequest, Merged, MergeRequest
from edgepeft.library.store import AdapterFolder, open_adapter, write_card
from edgepeft.library.target_path import check_target, put_in_place, work_folder
from edgepeft.models.store import ModelEntry, add_model
from tiny import CHATML, write_alpaca, write_tiny_model

DRIFT = Drift(prompts=2, tokens=30, mean_kl=0.001, max_kl=0.02, top1_agreement=0.99)


@pytest.fixture
def entry(tiny_model: Path) -> ModelEntry:
    return add_model(tiny_model, "tiny")


@pytest.fixture
def folder(entry: ModelEntry, tmp_path: Path) -> Path:
    made = write_peft_folder(tmp_path / "made", entry.shape)
    write_card(made, make_card(base_fingerprint=entry.fingerprint))
    return made


def adapter_with(folder: Path, card: Any) -> AdapterFolder:
    return msgspec.structs.replace(open_adapter(folder), card=card)


# --- decisions ---


@pytest.mark.parametrize(
    ("precision", "into", "word"),
    [("nf4", "dequantized", "nf4"), ("int8", "dequantized", "int8"), ("bf16", "original", "unquantized")],
)
def test_what_is_merged_into_follows_the_training(folder: Path, precision: str, into: str, word: str) -> None:
    adapter = adapter_with(folder, make_card(precision=precision))
    choice = merging.choose_into(adapter, None)
    assert choice.into == into
    assert word in choice.why
    for wanted in ("original", "dequantized"):
        assert merging.choose_into(adapter, wanted).into == wanted


def test_without_a_card_it_is_the_bases_own_weights(folder: Path) -> None:
    adapter = adapter_with(folder, None)
    assert merging.choose_into(adapter, None).into == "original"
    with pytest.raises(BadInput, match="no card"):
        merging.choose_into(adapter, "dequantized")
    with pytest.raises(UsageError, match="Known: original, dequantized"):
        merging.choose_into(adapter, "nf4")


def test_the_dtype_is_the_bases_or_that_of_trainings_products() -> None:
    choose = merging.choose_dtype
    assert choose(None, "safetensors", "original", "fp32", "bf16") == "fp32"
    assert choose(None, "safetensors", "original", "fp16", "bf16") == "fp16"
    assert choose(None, "safetensors", "original", "bnb-4bit", "bf16") == "bf16"
    assert choose(None, "safetensors", "original", "fp8", "fp32") == "bf16"
    assert choose(None, "safetensors", "dequantized", "fp32", "bf16") == "bf16"
    assert choose(None, "safetensors", "dequantized", "fp32", "fp32") == "fp32"
    assert choose("fp16", "safetensors", "dequantized", "bf16", "bf16") == "fp16"
    with pytest.raises(UsageError, match="Known: fp32, bf16, fp16"):
        choose("nf4", "safetensors", "original", "bf16", "bf16")
    with pytest.raises(UsageError, match="gguf-q8_0 says its own dtype"):
        choose("fp16", "gguf-q8_0", "original", "bf16", "bf16")


def test_too_much_drift_is_refused_unless_forced() -> None:
    far = msgspec.structs.replace(DRIFT, mean_kl=0.3)
    merging.check_drift(DRIFT, 0.02, "original", force=False)
    merging.check_drift(far, 0.02, "original", force=True)
    merging.check_drift(far, 0.5, "original", force=False)
    with pytest.raises(BadInput, match=r"0\.3 nats.*limit is 0\.02\. Nothing was kept\. Use --into dequantized"):
        merging.check_drift(far, 0.02, "original", force=False)
    with pytest.raises(BadInput, match="--force"):
        merging.check_drift(far, 0.02, "dequantized", force=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "method prefix cannot become part of the weights: it adds trained keys and"),
        ({"peft_type": "PROMPT_TUNING"}, r"prompt cannot .*: it adds trained embeddings .*Use it beside its base"),
        ({"peft_type": "EDGEPEFT_BOTTLENECK"}, "bottleneck cannot .*: it adds a small network behind"),
        ({"peft_type": "EDGEPEFT_COMPACTER"}, "compacter cannot become part of the weights"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "biases"),
    ],
)
def test_other_adapters_are_refused(entry: ModelEntry, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    made = write_peft_folder(tmp_path / "other", entry.shape, **changes)
    with pytest.raises(BadInput, match=message):
        merging.check_mergeable(open_adapter(made))


@pytest.mark.parametrize(
    "changes",
    [{}, {"use_dora": True}]
    + [{"peft_type": kind} for kind in ("IA3", "LN_TUNING", "BEFT", "SHIRA", "EDGEPEFT_SPARSE", "EDGEPEFT_FULL")],
)
def test_what_becomes_part_of_the_weights_is_taken(entry: ModelEntry, tmp_path: Path, changes: dict[str, Any]) -> None:
    merging.check_mergeable(open_adapter(write_peft_folder(tmp_path / "other", entry.shape, **changes)))


@pytest.mark.parametrize(
    ("changes", "gguf", "peft"),
    [
        ({}, None, None),
        ({"use_dora": True}, "reads plain LoRA, and this adapter is DoRA.*adapters merge", None),
        ({"peft_type": "IA3"}, "is of the method ia3.*adapters merge", None),
        ({"peft_type": "PREFIX_TUNING"}, "is of the method prefix.*Use it with edgepeft chat", None),
        ({"peft_type": "EDGEPEFT_SPARSE"}, "is of the method sparse", "PEFT has no place .* sparse.*adapters merge"),
        ({"peft_type": "EDGEPEFT_COMPACTER"}, "of the method compacter", "PEFT has no place.*edgepeft chat"),
    ],
)
def test_exports_are_what_the_other_program_reads(
    entry: ModelEntry, tmp_path: Path, changes: dict[str, Any], gguf: str | None, peft: str | None
) -> None:
    adapter = open_adapter(write_peft_folder(tmp_path / "other", entry.shape, **changes))
    for format, message in (("gguf", gguf), ("peft", peft)):
        kind: Any = format
        if message is None:
            merging.check_exportable(adapter, kind)
        else:
            with pytest.raises(BadInput, match=message):
                merging.check_exportable(adapter, kind)


def test_the_list_of_methods_tells_which_merge() -> None:
    found = CliRunner().invoke(app, ["methods", "list", "--json"], catch_exceptions=False)
    merges = {method["id"] for method in json.loads(found.stdout) if method["merges"]}
    assert merges == {"lora", "ia3", "norm", "bias", "full", "sparse"}


# --- where it goes ---


def test_a_free_place_is_taken(entry: ModelEntry, tmp_path: Path) -> None:
    assert check_target(tmp_path / "new", "model", replace=False, base=entry) == tmp_path / "new"
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty", "model", replace=False, base=entry)
    check_target(tmp_path / "model.gguf", "gguf", replace=False, base=entry)
    with pytest.raises(BadInput, match="no such folder"):
        check_target(tmp_path / "gone" / "new", "model", replace=False, base=entry)


def test_what_is_there_is_replaced_only_when_it_is_alike(entry: ModelEntry, tmp_path: Path) -> None:
    place = tmp_path / "there"
    place.mkdir()
    (place / "thesis.txt").write_text("years of work")
    for replace, message in ((False, "not empty"), (True, "something else than a model that a merge wrote")):
        with pytest.raises(BadInput, match=message):
            check_target(place, "model", replace=replace, base=entry)
    (place / "config.json").write_text("{}")
    with pytest.raises(BadInput, match="something else"):
        check_target(place, "model", replace=True, base=entry)
    (place / "edgepeft_merge.json").write_text("{}")
    check_target(place, "model", replace=True, base=entry)
    with pytest.raises(BadInput, match="something else than an adapter"):
        check_target(place, "adapter", replace=True, base=entry)
    (place / "inner").mkdir()
    with pytest.raises(BadInput, match="something else"):
        check_target(place, "model", replace=True, base=entry)
    with pytest.raises(BadInput, match="is a file"):
        check_target(place / "thesis.txt", "model", replace=True, base=entry)


def test_a_gguf_file_has_its_ending_and_is_no_folder(entry: ModelEntry, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"merged\.gguf"):
        check_target(tmp_path / "merged", "gguf", replace=False, base=entry)
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(BadInput, match="is a folder"):
        check_target(tmp_path / "folder.gguf", "gguf", replace=True, base=entry)
    (tmp_path / "there.gguf").write_bytes(b"GGUF")
    with pytest.raises(BadInput, match="there already"):
        check_target(tmp_path / "there.gguf", "gguf", replace=False, base=entry)
    check_target(tmp_path / "there.gguf", "gguf", replace=True, base=entry)


def test_a_folder_is_not_named_like_a_gguf_file(entry: ModelEntry, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Add --format gguf-f16"):
        check_target(tmp_path / "merged.gguf", "model", replace=False, base=entry)
    with pytest.raises(UsageError, match=r"Add --format gguf,"):
        check_target(tmp_path / "lora.gguf", "adapter", replace=False, base=entry)


def test_the_adapter_itself_is_left_alone(entry: ModelEntry, tmp_path: Path) -> None:
    folder = write_peft_folder(tmp_path / "mine", entry.shape)
    check_target(folder, "adapter", replace=True, base=entry)
    with pytest.raises(BadInput, match="holds the adapter itself"):
        check_target(folder, "adapter", replace=True, base=entry, adapter=folder)


def test_our_own_folders_and_the_base_are_left_alone(
    entry: ModelEntry, tiny_model: Path, edgepeft_home: Path, tmp_path: Path
) -> None:
    for place in (edgepeft_home / "models" / "x", edgepeft_home / "adapters" / "x"):
        with pytest.raises(BadInput, match="its own things"):
            check_target(place, "model", replace=True, base=entry)
    (tmp_path / "alias").symlink_to(tiny_model)
    for place in (tiny_model, tmp_path / "alias"):
        with pytest.raises(BadInput, match="base's own files"):
            check_target(place, "model", replace=True, base=entry)


def test_it_takes_its_place_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with work_folder(target) as work:
        assert work.parent == tmp_path
        (work / "made").mkdir()
        (work / "made" / "new").write_text("new")
        (work / "rest").write_text("gone afterwards")
        put_in_place(work / "made", target)
    assert [path.name for path in target.iterdir()] == ["new"]
    assert target.stat().st_mode & 0o777 == 0o755
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupt_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    rename = Path.rename

    def interrupt(self: Path, other: Path) -> Path:
        if self.name == "made":
            raise KeyboardInterrupt
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", interrupt)
    with work_folder(target) as work:
        (work / "made").mkdir()
        with pytest.raises(KeyboardInterrupt):
            put_in_place(work / "made", target)
    assert (target / "old").read_text() == "old"


def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    rename = Path.rename

    def fail(self: Path, other: Path) -> Path:
        if self.name == "made":
            raise OSError(errno.ENOSPC, "full")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", fail)
    with work_folder(target) as work:
        (work / "made").mkdir()
        with pytest.raises(DiskProblem, match="disk is full"):
            put_in_place(work / "made", target)
    assert [path.name for path in target.iterdir()] == ["old"]
    with pytest.raises(KeyboardInterrupt), work_folder(target):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_place_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> str:
        raise PermissionError(errno.EACCES, "denied")

    monkeypatch.setattr("edgepeft.paths.tempfile.mkdtemp", refuse)
    with pytest.raises(DiskProblem, match=r"no permission.*name another --out"), work_folder(tmp_path / "out"):
        pass


# --- texts to compare on ---


def test_built_in_prompts_follow_the_template(entry: ModelEntry, folder: Path) -> None:
    chosen = ChosenAdapter(adapter_with(folder, None))
    found = choose_prompts(entry, chosen, None)
    assert found.source == f"{len(BUILT_IN)} built-in prompts"
    tokenizer = Tokenizer.load(Path(entry.folder))
    text = tokenizer.decode(list(found.ids[0]))
    assert text.startswith("<|im_start|>user\nName three rivers")
    assert all(0 < len(ids) <= MOST_TOKENS for ids in found.ids)


def test_the_adapters_own_data_comes_first(entry: ModelEntry, folder: Path, tmp_path: Path) -> None:
    data, held_out = write_alpaca(tmp_path / "train.jsonl"), write_alpaca(tmp_path / "held.jsonl", count=3)
    card = make_card(base_fingerprint=entry.fingerprint, template=TemplateRecord(CHATML, "sha256:t", (258,)))

    def prompts(**paths: str) -> Any:
        recipe = msgspec.structs.replace(
            card.recipe, data=msgspec.structs.replace(card.recipe.data, **{"path": "/gone.jsonl", **paths})
        )
        return choose_prompts(
            entry, ChosenAdapter(adapter_with(folder, msgspec.structs.replace(card, recipe=recipe))), None
        )

    assert prompts(path=str(data)).source == "8 records of its training data"
    found = prompts(path=str(data), eval_path=str(held_out))
    assert found.source == "3 records of its held-out data"
    text = Tokenizer.load(Path(entry.folder)).decode(list(found.ids[1]))
    assert text == "<|im_start|>user\nRepeat the number 1.<|im_end|>\n<|im_start|>assistant\n1 1<|im_end|>\n"
    assert "built-in" in prompts().source
    data.write_text("{")
    assert "built-in" in prompts(path=str(data)).source


def test_a_file_of_prompts(entry: ModelEntry, folder: Path, tmp_path: Path) -> None:
    chosen = ChosenAdapter(adapter_with(folder, None))
    (tmp_path / "p.txt").write_text("One.\n\nTwo.\n")
    assert choose_prompts(entry, chosen, tmp_path / "p.txt").source == "2 texts of p.txt"
    assert choose_prompts(entry, chosen, write_alpaca(tmp_path / "p.jsonl")).source == "8 texts of p.jsonl"
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe")
    for name, message in (("gone.txt", "no such file"), ("empty.txt", "no usable text"), ("latin.txt", "as text")):
        with pytest.raises(BadInput, match=message):
            choose_prompts(entry, chosen, tmp_path / name)


def test_a_base_without_a_template_is_compared_on_plain_text(tmp_path: Path) -> None:
    entry = add_model(write_tiny_model(tmp_path / "plain", template=None), "plain")
    made = write_peft_folder(tmp_path / "made", entry.shape)
    found = choose_prompts(entry, ChosenAdapter(open_adapter(made)), None)
    assert Tokenizer.load(Path(entry.folder)).decode(list(found.ids[0])).startswith("Name three")


def test_the_template_is_written_where_it_is_another(entry: ModelEntry) -> None:
    assert other_template(entry, make_card(template=None)) is None
    assert other_template(entry, make_card(template=TemplateRecord(CHATML, "sha256:t", (258,)))) is None
    assert other_template(entry, make_card(template=TemplateRecord("{{ x }}", "sha256:t", (258,)))) == "{{ x }}"


# --- the command line ---


def told(*arguments: str) -> str:
    """What `edgepeft adapters ARGUMENTS` prints; its error is raised."""
    result = CliRunner().invoke(app, ["adapters", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["merge", "nobody", "--out", "{tmp}/o"], BadInput, "no adapter is called 'nobody'"),
        (["merge", "{made}", "--out", "{tmp}/o", "--format", "gguf-q4"], UsageError, "Known: safetensors, gguf-f16"),
        (["merge", "{made}", "--out", "{tmp}/o", "--dtype", "nf4"], UsageError, "unknown dtype 'nf4'"),
        (["merge", "{made}", "--out", "{tmp}/o", "--into", "nf4"], UsageError, "unknown 'nf4'"),
        (["merge", "{made}", "--out", "{tmp}/o", "--format", "gguf-f16"], UsageError, "no name of a GGUF file"),
        (
            ["merge", "{made}", "--out", "{tmp}/o.gguf", "--format", "gguf-f16", "--dtype", "bf16"],
            UsageError,
            "own dtype",
        ),
        (["merge", "{made}", "--out", "{made}"], BadInput, "not empty"),
        (["merge", "{made}", "--out", "{made}", "--force"], BadInput, "something else than a model"),
        (["merge", "{made}", "--out", "{tmp}/o", "--base", "other"], BadInput, r"was trained on tiny .*not on other"),
        (["merge", "{made}", "--out", "{tmp}/o", "--base", "gone"], BadInput, "gone"),
        (["merge", "{made}", "--out", "{tmp}/o", "--prompts", "{tmp}/none.txt"], BadInput, "no such file"),
        (["merge", "{prefix}", "--out", "{tmp}/o"], BadInput, "prefix cannot become part of the weights"),
        (["export", "{made}", "--out", "{tmp}/o", "--format", "onnx"], UsageError, "Known: peft, gguf"),
        (["export", "{made}", "--out", "{tmp}/o", "--format", "gguf"], UsageError, "no name of a GGUF file"),
        (["export", "{dora}", "--out", "{tmp}/o.gguf", "--format", "gguf"], BadInput, "this adapter is DoRA"),
        (["export", "{sparse}", "--out", "{tmp}/o", "--format", "peft"], BadInput, "PEFT has no place"),
        (["export", "nobody", "--out", "{tmp}/o", "--format", "peft"], BadInput, "no adapter is called"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    entry: ModelEntry, folder: Path, tmp_path: Path, arguments: list[str], error: type[EdgepeftError], message: str
) -> None:
    add_model(write_tiny_model(tmp_path / "other", seed=1), "other")
    kinds = {"prefix": "PREFIX_TUNING", "sparse": "EDGEPEFT_SPARSE"}
    made = {name: write_peft_folder(tmp_path / name, entry.shape, peft_type=kind) for name, kind in kinds.items()}
    made["dora"] = write_peft_folder(tmp_path / "dora", entry.shape, use_dora=True)
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(error, match=message) as caught:
        told(*(text.format(tmp=tmp_path, made=folder, **made) for text in arguments))
    assert "\n" not in str(caught.value)
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_a_merge_tells_what_it_did(
    entry: ModelEntry, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[MergeRequest, Path, float, bool]] = []

    def merge(request: MergeRequest, target: Path, limit_nats: float, *, force: bool, progress: Any) -> Merged:
        asked.append((request, target, limit_nats, force))
        progress("merging", 0.5)
        return Merged(size_bytes=1 << 20, changed=14, tensors=20, drift=DRIFT, notes=("mind this",))

    monkeypatch.setattr(merge_client, "merge", merge)
    shown = told("merge", str(folder), "--out", str(tmp_path / "o"))
    assert "merged into the dequantized weights: it was trained on nf4 weights" in shown
    assert "KL 0.001 nats a token on average and 0.02 at most, 99.0 % the same likeliest token" in shown
    assert "14 of 20 tensors changed" in shown
    request, target, limit, force = asked.pop()
    assert (target, limit, force) == (tmp_path / "o", merging.DEFAULT_LIMIT_NATS, False)
    assert (request.into, request.dtype, request.precision, request.compute_dtype) == (
        "dequantized",
        "bf16",
        "nf4",
        "bf16",
    )
    assert (request.template, request.stop_ids) == ("{{ messages }}", (258,))
    assert len(request.prompts) == len(BUILT_IN)
    arguments = ("--into", "original", "--limit", "0.5", "--force", "--json")
    result = json.loads(told("merge", str(folder), "--out", str(tmp_path / "o"), *arguments))
    assert (result["into"], result["dtype"], result["why"]) == ("original", "fp32", "as asked for")
    assert result["drift"]["mean_kl"] == 0.001
    assert result["warnings"] == ["mind this"]
    assert asked.pop()[2:] == (0.5, True)


def test_an_export_tells_what_it_did(
    entry: ModelEntry, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(request: ExportRequest, target: Path, progress: Any) -> Exported:
        assert (request.base, request.adapter, request.format) == ("tiny", str(folder), "gguf")
        return Exported(size_bytes=1 << 20, method="lora", modules=14, rank=8, alpha=16.0)

    monkeypatch.setattr(merge_client, "export", export)
    arguments = ("export", str(folder), "--format", "gguf", "--out", str(tmp_path / "a.gguf"))
    assert "rank 8, alpha 16, on 14 linears of tiny" in told(*arguments)
    result = json.loads(told(*arguments, "--json"))
    assert (result["rank"], result["alpha"], result["modules"]) == (8, 16.0, 14)


def test_an_export_of_another_method_tells_its_name(
    entry: ModelEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = write_peft_folder(tmp_path / "made", entry.shape, peft_type="IA3")
    exported = Exported(size_bytes=1 << 10, method="ia3", modules=6)
    monkeypatch.setattr(merge_client, "export", lambda *_: exported)
    arguments = ("export", str(made), "--format", "peft", "--out", str(tmp_path / "o"), "--base", "tiny")
    assert "ia3, in 6 places of tiny" in told(*arguments)
    result = json.loads(told(*arguments, "--json"))
    assert (result["method"], result["rank"], result["alpha"]) == ("ia3", None, None)
