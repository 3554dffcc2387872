"""LoRA files of other programs: read as what they are, and refused in one line where they are something else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from edgepeft.engine.combine import jobs
from edgepeft.engine.combine.lora_import import import_lora
from edgepeft.errors import BadInput, EdgepeftError
from edgepeft.library import import_client
from edgepeft.library.audit import read_audit
from edgepeft.library.lora_file import Imported, ImportRequest, find_lora_file
from edgepeft.library.lora_pairs import read_lora_pairs
from edgepeft.library.merging import ADAPTER_FILE, ExportRequest
from edgepeft.library.parent import find_parent
from edgepeft.library.store import AdapterFolder, check_base
from edgepeft.methods import LoraConfig
from edgepeft.models.store import ModelEntry
from merging import IDS, adapted_logits, entry_of, write_adapter, write_base

Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def entry(tiny_model: Path) -> ModelEntry:
    return entry_of(tiny_model)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(task: Any, outcome: type[Imported], progress: Any = None) -> Imported:
        import msgspec

        return import_lora(msgspec.json.decode(task.question, type=ImportRequest), lambda *_: None)

    monkeypatch.setattr(import_client, "run_task", run)


def bring_in(path: Path, entry: ModelEntry, alpha: float | None = None, name: str = "taken") -> AdapterFolder:
    file = find_lora_file(path)
    assert file is not None
    return import_client.import_lora(file, name, entry, alpha)[0]


def pairs_of(entry: ModelEntry, folder: Path, config: LoraConfig | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """Of a random adapter that is written to `folder`: path → A [rank, in], B [out, rank]."""
    write_adapter(folder, entry, config)
    tensors = load_file(folder / "adapter_model.safetensors")
    return {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): (
            value,
            tensors[key.replace("lora_A", "lora_B")],
        )
        for key, value in tensors.items()
        if "lora_A" in key
    }


def peft_logits(entry: ModelEntry, folder: Path) -> Tensor:
    base = AutoModelForCausalLM.from_pretrained(entry.weights, dtype=torch.float32)
    with torch.no_grad():
        found: Tensor = PeftModel.from_pretrained(base, folder).eval()(IDS).logits
    return found


def spelled(pairs: dict[str, tuple[Tensor, Tensor]], prefix: str, a: str, b: str) -> dict[str, Tensor]:
    named = {}
    for path, (A, B) in pairs.items():
        named |= {f"{prefix}{path}.{a}": A.clone(), f"{prefix}{path}.{b}": B.clone()}
    return named


def with_alphas(tensors: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    paths = {key.partition(".lora_")[0] for key in tensors}
    return tensors | {f"{path}.alpha": torch.tensor(alpha) for path in paths}


SPELLINGS: dict[str, Callable[[dict[str, tuple[Tensor, Tensor]]], tuple[dict[str, Tensor], dict[str, str] | None]]] = {
    "peft": lambda pairs: (spelled(pairs, "base_model.model.", "lora_A.weight", "lora_B.weight"), {"lora_alpha": "32"}),
    "default": lambda pairs: (
        spelled(pairs, "base_model.model.", "lora_A.default.weight", "lora_B.default.weight"),
        {"alpha": "32.0"},
    ),
    "bare": lambda pairs: (spelled(pairs, "", "lora_A.weight", "lora_B.weight"), {"ss_network_alpha": "32"}),
    "no model.": lambda pairs: (
        spelled({path.removeprefix("model."): pair for path, pair in pairs.items()}, "", "lora_A", "lora_B"),
        {"lora_alpha": "32"},
    ),
    "kohya": lambda pairs: (with_alphas(spelled(pairs, "", "lora_down.weight", "lora_up.weight"), 32.0), None),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_the_same_adapter(entry: ModelEntry, tmp_path: Path, spelling: str) -> None:
    pairs = pairs_of(entry, tmp_path / "a")
    tensors, metadata = SPELLINGS[spelling](pairs)
    save_file(tensors, tmp_path / "lora.safetensors", metadata=metadata)
    taken = bring_in(tmp_path / "lora.safetensors", entry)
    kept = load_file(taken.weights)
    assert {key: value.tolist() for key, value in kept.items()} == {
        key: value.tolist() for key, value in load_file(tmp_path / "a" / "adapter_model.safetensors").items()
    }
    assert (taken.config["r"], taken.config["lora_alpha"]) == (4, 32)
    assert torch.equal(adapted_logits(entry, taken.path), adapted_logits(entry, tmp_path / "a"))


def test_what_is_taken_over_is_an_adapter_like_any_other(entry: ModelEntry, tmp_path: Path) -> None:
    tensors, metadata = SPELLINGS["peft"](pairs_of(entry, tmp_path / "a"))
    folder = tmp_path / "theirs"
    folder.mkdir()
    save_file(tensors, folder / "my-lora.safetensors", metadata=metadata)
    taken = bring_in(folder, entry)
    card = taken.card
    assert card is not None
    assert card.imported is not None
    assert (card.base, card.base_fingerprint, card.recipe) == (entry.name, entry.fingerprint, None)
    assert (card.imported.path, card.imported.format) == (str(folder / "my-lora.safetensors"), "safetensors")
    assert "the file does not tell" in card.notes[0]
    assert check_base(taken, entry) == []
    assert read_audit("taken")[0].action == "imported"
    assert {pair.scale for pair in read_lora_pairs(taken).values()} == {8.0}
    torch.testing.assert_close(peft_logits(entry, taken.path), adapted_logits(entry, taken.path), rtol=1e-5, atol=1e-5)
    method = find_parent("taken", entry).method
    assert method == LoraConfig(rank=4, alpha=32.0, targets=("all-linear",), dropout=0.0)
    with pytest.raises(BadInput, match="another base"):
        bring_in(folder, entry_of(write_base(tmp_path / "other", "qwen2")))


def test_mlx_files_are_turned_and_scaled_by_their_config(entry: ModelEntry, tmp_path: Path) -> None:
    pairs = pairs_of(entry, tmp_path / "a")
    turned = {path: (A.T.contiguous(), B.T.contiguous()) for path, (A, B) in pairs.items()}
    folder = tmp_path / "mlx"
    folder.mkdir()
    for name in ("adapters.safetensors", "0000100_adapters.safetensors"):
        save_file(spelled(turned, "", "lora_a", "lora_b"), folder / name)
    settings = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 8.0, "dropout": 0.0}}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    taken = bring_in(folder, entry)
    assert taken.config["lora_alpha"] == 32
    assert torch.equal(adapted_logits(entry, taken.path), adapted_logits(entry, tmp_path / "a"))
    settings["lora_parameters"]["alpha"] = 16  # type: ignore[index]
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(BadInput, match=r"does not say the alpha of .* Add --alpha"):
        bring_in(folder, entry)
    (folder / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "dora"}))
    with pytest.raises(BadInput, match="of the type dora, and only plain LoRA"):
        bring_in(folder, entry)


def test_ranks_alphas_and_layers_of_their_own_are_kept(entry: ModelEntry, tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(3)
    tensors: dict[str, Tensor] = {}
    for path, (rank, inner, outer, alpha) in {
        Q0: (2, 64, 64, 3.5),
        "model.layers.0.mlp.up_proj": (4, 64, 128, 8.0),
        "model.layers.1.mlp.up_proj": (4, 64, 128, 8.0),
    }.items():
        tensors[f"{path}.lora_down.weight"] = (torch.randn(rank, inner, generator=random) * 0.1).half()
        tensors[f"{path}.lora_up.weight"] = (torch.randn(outer, rank, generator=random) * 0.1).bfloat16()
        tensors[f"{path}.alpha"] = torch.tensor([alpha])
    save_file(tensors, tmp_path / "lora.safetensors")
    taken = bring_in(tmp_path / "lora.safetensors", entry)
    found = read_lora_pairs(taken)
    assert {path: (pair.rank, pair.scale) for path, pair in found.items()} == {
        Q0: (2, 1.75),
        "model.layers.0.mlp.up_proj": (4, 2.0),
        "model.layers.1.mlp.up_proj": (4, 2.0),
    }
    kept = load_file(taken.weights)
    assert torch.equal(kept[f"base_model.model.{Q0}.lora_B.weight"], tensors[f"{Q0}.lora_up.weight"].float())
    torch.testing.assert_close(peft_logits(entry, taken.path), adapted_logits(entry, taken.path), rtol=1e-5, atol=1e-5)


def test_an_alpha_that_is_said_wins_and_is_told(entry: ModelEntry, tmp_path: Path) -> None:
    tensors, metadata = SPELLINGS["peft"](pairs_of(entry, tmp_path / "a"))
    save_file(tensors, tmp_path / "silent.safetensors")
    with pytest.raises(BadInput, match=r"does not say the alpha of .*\. Add --alpha with what it was trained with"):
        bring_in(tmp_path / "silent.safetensors", entry)
    taken = bring_in(tmp_path / "silent.safetensors", entry, alpha=32.0)
    assert torch.equal(adapted_logits(entry, taken.path), adapted_logits(entry, tmp_path / "a"))
    save_file(tensors, tmp_path / "other.safetensors", metadata=metadata)
    card = bring_in(tmp_path / "other.safetensors", entry, alpha=8.0).card
    assert card is not None
    assert card.notes[1] == "the file says alpha 32; --alpha 8 was taken instead"
    save_file(tensors, tmp_path / "zero.safetensors", metadata={"alpha": "0"})
    with pytest.raises(BadInput, match=r"says alpha 0 .* no number above 0"):
        bring_in(tmp_path / "zero.safetensors", entry)


def _without(ending: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{Q0}.{ending}"]

    return change


def _put(key: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("lora_B.weight"), f"{Q0} has {Q0}.lora_A.weight without its B: half of a pair is missing"),
        (_without("lora_A.weight"), f"{Q0} has {Q0}.lora_B.weight without its A: half of a pair is missing"),
        (_put(f"{Q0}.lora_A.weight", torch.ones(4, 63)), "maps 63 to 64 features, .*'s linear maps 64 to 64"),
        (_put(f"{Q0}.lora_A.weight", torch.ones(3, 64)), "its A of .* has rank 3 and its B rank 4"),
        (_put(f"{Q0}.lora_A.weight", torch.ones(4)), "is 4 of float32, not a matrix of floats"),
        (_put(f"{Q0}.lora_A.weight", torch.ones(4, 64, dtype=torch.int8)), "4×64 of int8, not a matrix of floats"),
        (_put(f"{Q0}.lora_A.weight", torch.full((4, 64), torch.nan)), "values that are not finite numbers"),
        (_put(f"{Q0}.lora_B.weight", torch.full((64, 4), torch.inf)), "values that are not finite numbers"),
        (_put(f"base_model.model.{Q0}.lora_A.weight", torch.ones(4, 64)), "has both .* and"),
        (_put(f"{Q0}.lora_down.weight", torch.ones(4, 64)), "has both .* and"),
        (_put(f"{Q0.removeprefix('model.')}.lora_A.weight", torch.ones(4, 64)), "without its B"),
        (
            lambda tensors: tensors.update(
                {f"{Q0.removeprefix('model.')}.lora_{side}.weight": torch.ones(64, 64) for side in "AB"}
            ),
            f"changes {Q0} twice",
        ),
        (_put(f"{Q0}.lora_B.bias", torch.ones(64)), r"lora_B\.bias belongs to no pair"),
        (_put(f"{Q0}.lora_magnitude_vector", torch.ones(64)), "is a DoRA"),
        (_put("model.embed_tokens.lora_embedding_A", torch.ones(4, 260)), "changes embeddings"),
        (_put("lora_unet_down.lora_down.weight", torch.ones(4, 4)), "is a LoRA of an image model"),
        (_put(f"{Q0}.alpha", torch.ones(3)), "has 3 entries, not one"),
        (
            lambda tensors: tensors.update(
                {f"model.layers.7.self_attn.q_proj.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}
            ),
            "layers.7.self_attn.q_proj.lora_A.weight fits no linear of .*'s layers",
        ),
        (
            lambda tensors: tensors.update({f"lm_head.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}),
            "lm_head.lora_A.weight fits no linear",
        ),
    ],
)
def test_a_damaged_file_is_refused(
    entry: ModelEntry, tmp_path: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    pairs = pairs_of(entry, tmp_path / "a")
    tensors = spelled(pairs, "", "lora_A.weight", "lora_B.weight")
    change(tensors)
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path, metadata={"lora_alpha": "8"})
    with pytest.raises(BadInput, match=message) as caught:
        bring_in(path, entry)
    assert caught.value.where == str(path)
    assert read_audit("taken") == []


def test_files_that_are_no_lora_are_told_what_they_are(entry: ModelEntry, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"is a whole model, not a LoRA.*edgepeft models add"):
        bring_in(tiny_model / "model.safetensors", entry)
    with pytest.raises(BadInput, match=r"is a whole model, not a LoRA.*edgepeft models add"):
        bring_in(tiny_model, entry)
    save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(BadInput, match="holds no LoRA"):
        bring_in(tmp_path / "x.safetensors", entry)
    whole = (tiny_model / "model.safetensors").read_bytes()
    for name, content, message in (
        ("cut.safetensors", whole[:-9], "cut short: 9 bytes are missing"),
        ("text.safetensors", b"hello, this is no tensor", "not a safetensors file"),
        ("lora.bin", b"\x80\x04", "can run code and is never read"),
        ("lora.txt", b"", r"no \.safetensors and no \.gguf"),
        ("text.gguf", b"hello, this is no model", "not a complete GGUF file"),
        ("cut.gguf", b"GGUF\x03\x00\x00\x00", "not a complete GGUF file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadInput, match=message):
            bring_in(tmp_path / name, entry)
    with pytest.raises(BadInput, match=r"holds several LoRA files.*Name one"):
        bring_in(tmp_path, entry)
    with pytest.raises(BadInput, match="no such file or folder"):
        bring_in(tmp_path / "nothing", entry)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"has no adapter_config\.json, and no"):
        bring_in(tmp_path / "empty", entry)
    folder = write_adapter(tmp_path / "made", entry)
    assert find_lora_file(folder) is find_lora_file(folder / "adapter_model.safetensors") is None


def export(entry: ModelEntry, adapter: Path, work: Path) -> Path:
    work.mkdir(parents=True)
    jobs.export(
        ExportRequest(base=entry.name, adapter=str(adapter), title="a", work=str(work), format="gguf"), lambda *_: None
    )
    return work / ADAPTER_FILE


@pytest.mark.parametrize("kind", ["llama", "llama3", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_what_was_written_as_gguf_comes_back(tmp_path: Path, kind: str) -> None:
    entry = entry_of(write_base(tmp_path / "base", kind))
    pairs = pairs_of(entry, tmp_path / "a")
    path = export(entry, tmp_path / "a", tmp_path / "out")
    taken = bring_in(path, entry)
    kept = load_file(taken.weights)
    for module, (A, B) in pairs.items():
        assert torch.equal(kept[f"base_model.model.{module}.lora_A.weight"], A), module
        assert torch.equal(kept[f"base_model.model.{module}.lora_B.weight"], B), module
    assert len(kept) == 2 * len(pairs)
    assert torch.equal(adapted_logits(entry, taken.path), adapted_logits(entry, tmp_path / "a"))
    assert taken.card is not None
    assert taken.card.imported is not None
    assert taken.card.imported.format == "gguf"


def write_gguf(path: Path, tensors: dict[str, Any], arch: str = "llama", **values: Any) -> Path:
    """A file as llama.cpp's converter lays it out; an array is written in its own type, a pair as (type, array)."""
    settings = {"type": "adapter", "adapter_type": "lora", "alpha": 8.0} | values
    writer = gguf.GGUFWriter(str(path), arch)
    if settings["type"] is not None:
        writer.add_type(settings["type"])
    if settings["adapter_type"] is not None:
        writer.add_string("adapter.type", settings["adapter_type"])
    if settings["alpha"] is not None:
        writer.add_float32("adapter.lora.alpha", settings["alpha"])
    if "alora" in settings:
        writer.add_array("adapter.alora.invocation_tokens", settings["alora"])
    for name, value in tensors.items():
        if isinstance(value, tuple):
            writer.add_tensor(name, gguf.quantize(value[1], value[0]), raw_dtype=value[0])
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's converters permute Llama's queries and keys: pairs (i, i + d/2) of a head side by side."""
    width = len(rows) // heads
    order = [
        head * width + half * width // 2 + i for head in range(heads) for i in range(width // 2) for half in (0, 1)
    ]
    return rows[order]


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_a_file_of_llama_cpps_converter_is_read(entry: ModelEntry, tmp_path: Path, kind: str) -> None:
    random = np.random.default_rng(0)
    # 64 × 32: blocks of q8_0 are 32 wide, and the rank is the width of B.
    A, B = (random.standard_normal(shape).astype(np.float32) * 0.1 for shape in ((32, 64), (64, 32)))
    kept: dict[str, np.ndarray] = {}

    def stored(value: np.ndarray) -> Any:
        if kind == "q8_0":
            packed = gguf.GGMLQuantizationType.Q8_0
            kept[str(len(kept))] = gguf.dequantize(gguf.quantize(value, packed), packed)
            return packed, value
        kept[str(len(kept))] = value.astype(np.float16).astype(np.float32) if kind == "f16" else value
        return value.astype(np.float16) if kind == "f16" else value

    path = write_gguf(
        tmp_path / "lora.gguf",
        {"blk.1.attn_q.weight.lora_a": stored(A), "blk.1.attn_q.weight.lora_b": stored(interleaved(B, 4))},
    )
    taken = bring_in(path, entry)
    found = load_file(taken.weights)
    prefix = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
    assert np.array_equal(found[f"{prefix}A.weight"].numpy(), kept["0"])
    assert np.array_equal(interleaved(found[f"{prefix}B.weight"].numpy(), 4), kept["1"])
    assert np.abs(found[f"{prefix}B.weight"].numpy() - B).max() < 0.005
    assert (taken.config["r"], taken.config["lora_alpha"], taken.config["target_modules"]) == (
        32,
        8,
        ["model.layers.1.self_attn.q_proj"],
    )


def test_an_alpha_of_zero_means_to_llama_cpp_that_nothing_is_scaled(entry: ModelEntry, tmp_path: Path) -> None:
    ones = {"blk.0.attn_v.weight.lora_a": np.ones((2, 64), np.float32)}
    ones["blk.0.attn_v.weight.lora_b"] = np.ones((32, 2), np.float32)
    assert bring_in(write_gguf(tmp_path / "a.gguf", ones, alpha=0.0), entry).config["lora_alpha"] == 2
    with pytest.raises(BadInput, match="does not say the alpha"):
        bring_in(write_gguf(tmp_path / "b.gguf", ones, alpha=None), entry)
    assert bring_in(tmp_path / "b.gguf", entry, alpha=4.0).config["lora_alpha"] == 4


_V0 = {
    "blk.0.attn_v.weight.lora_a": np.ones((2, 64), np.float32),
    "blk.0.attn_v.weight.lora_b": np.ones((32, 2), np.float32),
}


@pytest.mark.parametrize(
    ("changes", "values", "message"),
    [
        ({}, {"type": "model", "adapter_type": None}, "is a whole model, not a LoRA.*models add"),
        ({}, {"type": None, "adapter_type": None}, "is a whole model, not a LoRA.*models add"),
        ({}, {"type": "mmproj", "adapter_type": None}, "is of the type 'mmproj', and only LoRA"),
        ({}, {"adapter_type": "control"}, "adapter of the type 'control', and only LoRA"),
        ({}, {"arch": "qwen2"}, "is of the architecture 'qwen2', and .* is a llama"),
        ({}, {"alora": [1, 2]}, "activated LoRA"),
        ({"blk.0.attn_v.weight.lora_b": None}, {}, "attn_v.weight.lora_a is there without its lora_b"),
        ({"token_embd.weight.lora_a": np.ones((2, 64), np.float32)}, {}, "changes embeddings"),
        ({"output.weight.lora_a": np.ones((2, 64), np.float32)}, {}, "changes the output head"),
        ({"blk.0.attn_norm.weight": np.ones(64, np.float32)}, {}, "attn_norm.weight fits no linear"),
        ({"blk.5.attn_v.weight.lora_a": np.ones((2, 64), np.float32)}, {}, "blk.5.attn_v.weight.lora_a fits no linear"),
        ({"blk.0.attn_v.weight.lora_a": np.ones((2, 32), np.float32)}, {}, "maps 32 to 32 features, .* maps 64 to 32"),
        ({"blk.0.attn_v.weight.lora_a": np.ones((3, 64), np.float32)}, {}, "has rank 3 and its B rank 2"),
        ({"blk.0.attn_v.weight.lora_a": np.full((2, 64), np.nan, np.float32)}, {}, "not finite numbers"),
        ({"blk.0.attn_v.weight.lora_a": np.ones((2, 64), np.int32)}, {}, "of the type I32 and cannot be read"),
    ],
)
def test_a_gguf_that_does_not_fit_is_refused(
    entry: ModelEntry, tmp_path: Path, changes: dict[str, Any], values: dict[str, Any], message: str
) -> None:
    tensors = {name: value for name, value in (_V0 | changes).items() if value is not None}
    path = write_gguf(tmp_path / "lora.gguf", tensors, **values)
    with pytest.raises(BadInput, match=message):
        bring_in(path, entry)
    assert read_audit("taken") == []


def test_a_gguf_cut_anywhere_is_one_line(entry: ModelEntry, tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf", _V0).read_bytes()
    path = tmp_path / "cut.gguf"
    for end in range(0, len(whole) - 256, 37):
        path.write_bytes(whole[:end])
        with pytest.raises(EdgepeftError):
            bring_in(path, entry)


def test_queries_that_are_no_heads_are_refused(entry: ModelEntry, tmp_path: Path) -> None:
    tensors = {
        "blk.0.attn_q.weight.lora_a": np.ones((2, 64), np.float32),
        "blk.0.attn_q.weight.lora_b": np.ones((63, 2), np.float32),
    }
    with pytest.raises(BadInput, match="63 rows, which are no 4 heads"):
        bring_in(write_gguf(tmp_path / "lora.gguf", tensors), entry)


def test_peft_loads_what_came_from_a_gguf(tmp_path: Path) -> None:
    entry = entry_of(write_base(tmp_path / "base", "llama"))
    write_adapter(tmp_path / "a", entry, LoraConfig(rank=4, targets=("q_proj", "k_proj")))
    taken = bring_in(export(entry, tmp_path / "a", tmp_path / "out"), entry)
    theirs = peft_logits(entry, taken.path)
    torch.testing.assert_close(adapted_logits(entry, tmp_path / "a"), theirs, rtol=1e-5, atol=1e-5)
