"""Loading: the model is transformers' own, its decoder linears are ours, and nothing else is in memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig

from edgepeft.engine.ledger import LiveBytes
from edgepeft.engine.methods import attach, set_active
from edgepeft.engine.model.checkpoint import open_checkpoint
from edgepeft.engine.model.frozen import DTYPES, DenseWeight, Int8Weight, Nf4Weight
from edgepeft.engine.model.linear import AdaptedLinear
from edgepeft.engine.model.load import LoadedModel, load_model
from edgepeft.errors import BadInput
from edgepeft.methods import LoraConfig
from edgepeft.models.store import ensure_model
from measured_load import measure_load, write_wide_model
from tiny import write_tiny_model, write_tokenizer

CPU = torch.device("cpu")
IDS = torch.randint(0, 250, (2, 13), generator=torch.Generator().manual_seed(5))


def load(folder: Path, precision: Any = "fp32", compute: Any = "fp32", **options: Any) -> LoadedModel:
    return load_model(ensure_model(str(folder)), precision=precision, compute_dtype=compute, device=CPU, **options)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found.float()


def reference(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def rewrite(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("tied", [True, False])
def test_in_float32_it_is_transformers_own_model(tmp_path: Path, tied: bool) -> None:
    folder = write_tiny_model(tmp_path / "m", tie_word_embeddings=tied, attention_bias=False)
    loaded = load(folder)
    assert torch.equal(logits(loaded.model), logits(reference(folder)))
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert not loaded.model.training
    assert loaded.head_weight.shape == (260, 64)
    assert (loaded.head_weight is loaded.model.get_input_embeddings().weight) == tied
    assert len(loaded.layers) == 2
    assert loaded.decoder(IDS).last_hidden_state.shape == (2, 13, 64)


@pytest.mark.parametrize(
    ("precision", "kind", "most"), [("bf16", DenseWeight, 0.02), ("int8", Int8Weight, 0.02), ("nf4", Nf4Weight, 0.2)]
)
@pytest.mark.parametrize("compute", ["fp32", "bf16", "fp16"])
def test_every_decoder_linear_is_held_in_the_precision(
    tiny_model: Path, precision: Any, kind: type, most: float, compute: Any
) -> None:
    loaded = load(tiny_model, precision, compute)
    linears = loaded.linears()
    assert len(linears) == 14
    assert next(iter(linears)) == "model.layers.0.self_attn.q_proj"
    for path, linear in linears.items():
        assert type(linear.weight_source) is kind
        assert loaded.model.get_submodule(path) is linear
        assert linear.name == path
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {DTYPES[compute]}
    assert not any(isinstance(m, nn.Linear) for layer in loaded.layers for m in layer.modules())
    expected = logits(reference(tiny_model))
    assert (logits(loaded.model) - expected).norm() < most * expected.norm()


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_dense_values_are_the_same_numbers(tiny_model: Path, precision: Any) -> None:
    dense = load(tiny_model, precision, "bf16", dense_values=True)
    assert all(type(linear.weight_source) is DenseWeight for linear in dense.linears().values())
    assert torch.equal(logits(dense.model), logits(load(tiny_model, precision, "bf16").model))
    assert dense.bytes_by_category()["workspace"] == 0


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16])
def test_sources_in_16_bit_keep_their_values(tiny_model: Path, source: torch.dtype) -> None:
    rewrite(tiny_model, lambda t: t.update({name: value.to(source) for name, value in t.items()}))
    stored = load_file(tiny_model / "model.safetensors")
    for path, linear in load(tiny_model).linears().items():
        dense = linear.weight_source.materialize(torch.empty(linear.weight_source.shape))
        assert torch.equal(dense, stored[f"{path}.weight"].float())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "nf4"])
def test_the_ledger_counts_every_live_byte_once(tiny_model: Path, precision: Any) -> None:
    loaded = load(tiny_model, precision, "bf16")
    logits(loaded.model)
    storages: dict[int, int] = {}

    def count(value: object) -> None:
        if isinstance(value, Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()

    for tensor in (*loaded.model.parameters(), *loaded.model.buffers()):
        count(tensor)
    for linear in loaded.linears().values():
        for value in vars(linear.weight_source).values():
            count(value)
            if isinstance(value, tuple):
                for part in value:
                    count(part)
    shared_map = 256 * 4 if precision == "nf4" else 0
    assert sum(loaded.bytes_by_category().values()) == sum(storages.values()) - shared_map + loaded.workspace.nbytes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_mapped_files_count_nothing_while_loading(tmp_path: Path, precision: Any) -> None:
    folder = write_tiny_model(tmp_path / "wide", vocab_size=20_000)
    with LiveBytes(CPU, others=False) as ledger:
        loaded = load(folder, precision, "bf16")
    assert ledger.live_bytes == sum(loaded.bytes_by_category().values())
    assert ledger.peak_bytes <= 1.01 * ledger.live_bytes


def test_nothing_refers_to_the_source_files(tiny_model: Path) -> None:
    loaded = load(tiny_model, "bf16", "bf16")
    before = logits(loaded.model)
    (tiny_model / "model.safetensors").write_bytes(b"\0" * (tiny_model / "model.safetensors").stat().st_size)
    assert torch.equal(logits(loaded.model), before)


def test_progress_rises_to_the_end(tiny_model: Path) -> None:
    told: list[float | None] = []
    load(tiny_model, "nf4", progress=lambda what, fraction: told.append(fraction))
    shares = [share for share in told if share is not None]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_loading_prints_nothing(tiny_model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(tiny_model, "nf4", "bf16")
    assert capfd.readouterr() == ("", "")


def test_biases_are_kept(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m", attention_bias=True)
    rewrite(
        folder,
        lambda t: t.update(
            {
                f"model.layers.{layer}.self_attn.{name}_proj.bias": torch.randn(size)
                for layer in range(2)
                for name, size in (("q", 64), ("k", 32), ("v", 32), ("o", 64))
            }
        ),
    )
    loaded = load(folder)
    assert torch.equal(logits(loaded.model), logits(reference(folder)))
    assert loaded.linears()["model.layers.0.self_attn.q_proj"].bias is not None
    attach(loaded, "a", LoraConfig(rank=4), seed=0)
    set_active(loaded, [("a", 1.0)])
    assert torch.equal(logits(loaded.model), logits(reference(folder)))


# --- damaged sources ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            r"tensor model\.layers\.1\.mlp\.up_proj\.weight is in none",
        ),
        (lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.ones(3, 3)}), "another shape"),
        (lambda t: [t.pop(name) for name in list(t) if "layers.0" in name], r"layers\.0\..* and 8 more is in none"),
    ],
)
def test_incomplete_weights_are_refused_by_name(tiny_model: Path, change: Any, message: str) -> None:
    entry = ensure_model(str(tiny_model))
    rewrite(tiny_model, change)
    with pytest.raises(BadInput, match=message) as caught:
        load_model(entry, precision="nf4", compute_dtype="fp32", device=CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "gone", "config", "heads"])
def test_unreadable_files_are_one_line(tiny_model: Path, damage: str) -> None:
    entry = ensure_model(str(tiny_model))
    weights = tiny_model / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "gone":
        weights.unlink()
    elif damage == "heads":
        config = Path(entry.folder) / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"num_attention_heads": 3}))
    else:
        (Path(entry.folder) / "config.json").write_text("{")
    with pytest.raises(BadInput) as caught:
        load_model(entry, precision="nf4", compute_dtype="fp32", device=CPU)
    assert "\n" not in str(caught.value)


# --- sources that were quantized elsewhere ---


def write_bnb(folder: Path, source: Path, **settings: Any) -> Path:
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=BitsAndBytesConfig(**settings), device_map={"": "cpu"}, dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("double", [True, False])
def test_bitsandbytes_4_bit_data_is_taken_over_as_it_is(tiny_model: Path, tmp_path: Path, double: bool) -> None:
    folder = write_bnb(
        tmp_path / "bnb", tiny_model, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double
    )
    stored = load_file(folder / "model.safetensors")
    loaded = load(folder, "nf4", "fp32")
    dense = load(folder, "fp32", "fp32").linears()
    import bitsandbytes.functional as bnb

    for path, linear in loaded.linears().items():
        weight = linear.weight_source
        assert isinstance(weight, Nf4Weight)
        assert torch.equal(weight.packed, stored[f"{path}.weight"].reshape(-1))
        parts = {k.removeprefix(f"{path}.weight."): v for k, v in stored.items() if k.startswith(f"{path}.weight.")}
        state = bnb.QuantState.from_dict(parts, CPU)
        state.dtype = torch.float32
        expected = bnb.dequantize_4bit(stored[f"{path}.weight"], state)
        assert torch.equal(weight.materialize(torch.empty(weight.shape)), expected)
        assert torch.equal(dense[path].weight_source.materialize(torch.empty(weight.shape)), expected)


def test_bitsandbytes_8_bit_data_is_taken_over_or_dequantized(tiny_model: Path, tmp_path: Path) -> None:
    folder = write_bnb(tmp_path / "bnb", tiny_model, load_in_8bit=True)
    stored = load_file(folder / "model.safetensors")
    as_it_is, dense = load(folder, "int8").linears(), load(folder, "fp32").linears()
    for path, linear in as_it_is.items():
        weight = linear.weight_source
        assert isinstance(weight, Int8Weight)
        assert torch.equal(weight.codes, stored[f"{path}.weight"])
        expected = stored[f"{path}.weight"].float() * (stored[f"{path}.SCB"].float() / 127).unsqueeze(1)
        assert torch.equal(dense[path].weight_source.materialize(torch.empty(weight.shape)), expected)
    assert all(type(linear.weight_source) is Nf4Weight for linear in load(folder, "nf4").linears().values())


def test_fp8_blocks_are_dequantized(tiny_model: Path) -> None:
    expected: dict[str, Tensor] = {}

    def to_fp8(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "_proj" in name]:
            rows, columns = tensors[name].shape
            blocks = tensors[name].view(rows // 32, 32, columns // 32, 32)
            scale = blocks.abs().amax((1, 3)) / 448
            codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
            expected[name] = (codes.float() * scale[:, None, :, None]).reshape(rows, columns)
            tensors[name], tensors[f"{name}_scale_inv"] = codes.reshape(rows, columns), scale

    rewrite(tiny_model, to_fp8)
    settings = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
    add_to_config(tiny_model, quantization_config=settings)
    for path, linear in load(tiny_model).linears().items():
        dense = linear.weight_source.materialize(torch.empty(linear.weight_source.shape))
        torch.testing.assert_close(dense, expected[f"{path}.weight"], rtol=1e-6, atol=1e-7)


def add_to_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def test_other_quantizations_are_refused(tiny_model: Path) -> None:
    entry = ensure_model(str(tiny_model))
    for folder in {entry.folder, str(tiny_model)}:
        add_to_config(Path(folder), quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(BadInput, match="quantized by gptq"):
        open_checkpoint(entry, torch.float32)


# --- other architectures ---

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 260,
    "max_position_embeddings": 512,
}
EYES = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}


def vision_config(kind: str) -> Any:
    if kind == "llava":
        return transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(hidden_size=32, **EYES),
            text_config=transformers.LlamaConfig(**TEXT),
            image_token_index=259,
        )
    if kind == "qwen2_vl":
        rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
        return transformers.Qwen2VLConfig(
            text_config=TEXT | {"rope_parameters": rope},
            vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 14},
            image_token_id=259,
            video_token_id=258,
        )
    return transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**TEXT),
        vision_config={"hidden_size": 32, **EYES},
        mm_tokens_per_image=4,
        image_token_index=259,
        boi_token_index=257,
        eoi_token_index=258,
    )


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "gemma3"])
def test_of_a_vision_language_model_the_language_tower_is_kept(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    made = AutoModelForImageTextToText.from_config(vision_config(kind))
    made.save_pretrained(tmp_path / kind)
    write_tokenizer(tmp_path / kind)
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / kind, dtype=torch.float32)
    loaded = load(tmp_path / kind)
    assert torch.equal(logits(loaded.model), logits(whole))
    assert len(loaded.linears()) == 14
    assert sum(parameter.numel() for parameter in loaded.model.parameters()) + sum(
        linear.in_features * linear.out_features for linear in loaded.linears().values()
    ) == (loaded.shape.parameters)
    attach(loaded, "a", LoraConfig(rank=4), seed=0)


def test_experts_and_routers_stay_in_16_bit(tmp_path: Path) -> None:
    config = transformers.Qwen2MoeConfig(
        **TEXT, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, shared_expert_intermediate_size=64
    )
    torch.manual_seed(0)
    transformers.Qwen2MoeForCausalLM(config).save_pretrained(tmp_path / "moe")
    write_tokenizer(tmp_path / "moe")
    expected = logits(reference(tmp_path / "moe"))
    assert torch.allclose(logits(load(tmp_path / "moe").model), expected, atol=1e-5)
    loaded = load(tmp_path / "moe", "nf4", "bf16")
    per_layer = {path.split("layers.0.")[1] for path in loaded.linears() if "layers.0." in path}
    assert per_layer == {linear.name for linear in loaded.shape.linears} - {"mlp.shared_expert_gate"}
    experts = [p for name, p in loaded.model.named_parameters() if "experts" in name and "shared" not in name]
    assert experts
    assert all(parameter.dtype == torch.bfloat16 for parameter in experts)


def test_mxfp4_experts_are_dequantized(tmp_path: Path) -> None:
    config = transformers.GptOssConfig(
        **TEXT, num_local_experts=2, num_experts_per_tok=1, layer_types=["full_attention", "full_attention"]
    )
    torch.manual_seed(0)
    folder = tmp_path / "oss"
    transformers.GptOssForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    expected: dict[str, Tensor] = {}

    def to_mxfp4(tensors: dict[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(3)
        for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            count, inner, outer = tensors.pop(name).shape
            blocks = torch.randint(0, 256, (count, outer, inner // 32, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(118, 124, (count, outer, inner // 32), generator=generator, dtype=torch.uint8)
            codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).long()
            dense = values[codes] * torch.exp2(scales.float() - 127).unsqueeze(-1)
            expected[name] = dense.flatten(-2).transpose(1, 2)
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales

    rewrite(folder, to_mxfp4)
    add_to_config(folder, quantization_config={"quant_method": "mxfp4"})
    loaded = load(folder, "nf4", "bf16")
    found = dict(loaded.model.named_parameters())
    assert len(expected) == 4
    for name, dense in expected.items():
        assert torch.equal(found[name].float(), dense)
    assert all(isinstance(linear, AdaptedLinear) for linear in loaded.linears().values())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is read from /proc")
def test_loading_needs_little_more_than_the_frozen_model(tmp_path: Path, tiny_model: Path) -> None:
    folder = write_wide_model(tmp_path / "m")
    found, source = measure_load(folder, tiny_model), (folder / "model.safetensors").stat().st_size
    print(f"{found}, source {source}")
    assert source > 4 * found.held
    assert found.peak < found.held + 48 * 2**20
    assert found.after < found.held + 16 * 2**20
