"""Shapes from configs, against the parameter counts that the models' publishers name."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from edgepeft.errors import BadInput
from edgepeft.models.config import is_vision_language, read_shape
from edgepeft.models.generic import shape_from_headers
from edgepeft.models.headers import read_header, read_headers, weight_files
from edgepeft.models.quantized import stored_form
from edgepeft.models.sizes import size_by_precision
from tiny import tiny_config, write_tiny_model


def _config(model_type: str, **values: Any) -> dict[str, Any]:
    names = {
        "h": "hidden_size",
        "i": "intermediate_size",
        "n": "num_hidden_layers",
        "a": "num_attention_heads",
        "kv": "num_key_value_heads",
        "v": "vocab_size",
        "d": "head_dim",
        "tied": "tie_word_embeddings",
    }
    return {"model_type": model_type, "max_position_embeddings": 4096} | {names.get(k, k): v for k, v in values.items()}


PUBLISHED = {
    "Llama-3.1-8B": (_config("llama", h=4096, i=14336, n=32, a=32, kv=8, v=128256), 8_030_261_248),
    "Llama-3.2-1B": (_config("llama", h=2048, i=8192, n=16, a=32, kv=8, v=128256, tied=True), 1_235_814_400),
    "Mistral-7B-v0.3": (_config("mistral", h=4096, i=14336, n=32, a=32, kv=8, v=32768), 7_248_023_552),
    "Qwen2.5-7B": (_config("qwen2", h=3584, i=18944, n=28, a=28, kv=4, v=152064), 7_615_616_512),
    "Qwen2.5-0.5B": (_config("qwen2", h=896, i=4864, n=24, a=14, kv=2, v=151936, tied=True), 494_032_768),
    "Qwen3-8B": (_config("qwen3", h=4096, i=12288, n=36, a=32, kv=8, v=151936, d=128), 8_190_735_360),
    "gemma-2-2b": (_config("gemma2", h=2304, i=9216, n=26, a=8, kv=4, v=256000), 2_614_341_888),
    "Phi-3-mini": (_config("phi3", h=3072, i=8192, n=32, a=32, kv=32, v=32064), 3_821_079_552),
    "Mixtral-8x7B": (_config("mixtral", h=4096, i=14336, n=32, a=32, kv=8, v=32000), 46_702_792_704),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_equal_the_published_ones(name: str) -> None:
    config, parameters = PUBLISHED[name]
    assert read_shape(config).parameters == parameters


def test_a_vision_language_config_gives_its_language_tower() -> None:
    config = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "vision_config": {"hidden_size": 1152},
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 34,
            "sliding_window": 1024,
        },
    }
    shape = read_shape(config)
    assert is_vision_language(config)
    assert (shape.architecture, shape.heads, shape.kv_heads, shape.head_dim) == ("Gemma3ForCausalLM", 8, 4, 256)
    assert (shape.tied_embeddings, shape.sliding_window, shape.vocab) == (True, 1024, 262208)


def test_an_unknown_architecture_is_named_with_the_known_ones() -> None:
    with pytest.raises(BadInput, match=r"rwkv.*RwkvForCausalLM.*Known model types: llama"):
        read_shape({"model_type": "rwkv", "architectures": ["RwkvForCausalLM"]})


@pytest.mark.parametrize("change", [{"hidden_size": None}, {"num_hidden_layers": 0}, {"vocab_size": "many"}])
def test_impossible_numbers_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=next(iter(change))):
        read_shape(tiny_config(**change))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1,000,000,000, more than any model has"),
        ({"num_hidden_layers": -3}, "num_hidden_layers is -3, not a positive whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"hidden_size": "4096"}, "hidden_size is '4096'"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"vocab_size": 10**12}, "vocab_size is 1,000,000,000,000"),
        ({"intermediate_size": [1, 2]}, "intermediate_size is [1, 2]"),
        ({"max_position_embeddings": -1}, "max_position_embeddings is -1"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"hidden_size": 65, "head_dim": None}, "hidden_size 65 cannot be divided among num_attention_heads 4"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({"num_key_value_heads": 8}, "num_attention_heads 4 is no multiple of num_key_value_heads 8"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', neither true nor false"),
        ({"attention_bias": "no"}, "attention_bias is 'no'"),
        ({"sliding_window": "4k"}, "sliding_window is '4k'"),
        ({"final_logit_softcapping": float("nan")}, "final_logit_softcapping is nan"),
        ({"attn_logit_softcapping": "50"}, "attn_logit_softcapping is '50'"),
        ({"model_type": None}, "model_type 'missing'"),
        ({"model_type": ["llama"]}, "model_type is ['llama'], not a name"),
        ({"model_type": "qwen3_moe", "num_experts": "many"}, "num_experts is 'many'"),
        ({"model_type": "qwen2_moe", "moe_intermediate_size": -1}, "moe_intermediate_size is -1"),
    ],
)
def test_a_damaged_config_is_one_line_that_names_the_key(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(BadInput) as caught:
        read_shape(tiny_config(**change))
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("missing", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_a_missing_field_is_named(missing: str) -> None:
    config = {key: value for key, value in tiny_config().items() if key != missing}
    with pytest.raises(BadInput, match=f"{missing} is missing"):
        read_shape(config)


def test_a_config_without_a_list_of_classes_is_refused_all_the_same() -> None:
    with pytest.raises(BadInput, match="model_type 'mamba', no architecture"):
        read_shape({"model_type": "mamba", "architectures": "MambaForCausalLM"})


def test_layers_that_differ_are_refused() -> None:
    config, _ = PUBLISHED["Mixtral-8x7B"]
    with pytest.raises(BadInput, match="alike"):
        read_shape(config | {"model_type": "qwen3_moe", "mlp_only_layers": [0]})


def test_the_generic_shape_equals_the_one_by_family(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m", tie_word_embeddings=False)
    config = json.loads((folder / "config.json").read_text())
    known, derived = read_shape(config), shape_from_headers(config, read_headers(weight_files(folder)))
    assert derived.parameters == known.parameters
    assert set(derived.linears) == set(known.linears)
    assert (derived.heads, derived.kv_heads, derived.tied_embeddings) == (4, 2, False)


def test_the_generic_shape_refuses_what_is_no_causal_model(tmp_path: Path) -> None:
    tensors = read_headers(weight_files(write_tiny_model(tmp_path / "m")))
    with pytest.raises(BadInput, match="WhisperForConditionalGeneration is not known"):
        shape_from_headers({"architectures": ["WhisperForConditionalGeneration"]}, tensors)
    uneven = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up_proj" not in name}
    with pytest.raises(BadInput, match="differ in shape"):
        shape_from_headers({"architectures": ["NewForCausalLM"]}, uneven)


def test_nf4_size_is_4127_thousandths_of_a_bit_per_packed_weight() -> None:
    shape = read_shape(PUBLISHED["Llama-3.1-8B"][0])
    sizes = size_by_precision(shape)
    packed = shape.layers * shape.linear_parameters_per_layer
    assert (sizes["nf4"] - 2 * (shape.parameters - packed)) * 8 / packed == pytest.approx(4.127, abs=5e-4)
    assert sizes["bf16"] == 2 * 8_030_261_248
    assert sizes["nf4"] < sizes["int8"] < sizes["bf16"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bnb-4bit"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bnb-8bit"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
    ],
)
def test_known_quantizations(settings: dict[str, Any], expected: str) -> None:
    assert stored_form({"quantization_config": settings}, [], where="here") == expected


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "something-new"])
def test_other_quantizations_are_refused_with_what_to_do(method: str) -> None:
    with pytest.raises(BadInput, match=r"cannot be trained on: .*original 16-bit folder"):
        stored_form({"quantization_config": {"quant_method": method}}, [], where="here")


def test_headers_of_damaged_files_are_refused(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    assert sum(tensor.size_bytes for tensor in read_header(path)) < len(whole)
    path.write_bytes(whole[:-100])
    with pytest.raises(BadInput, match="cut short: 100 bytes"):
        read_header(path)
    for content in (b"", whole[:20], b"not a model at all", struct.pack("<Q", 4) + b"{{{{"):
        path.write_bytes(content)
        with pytest.raises(BadInput, match=r"safetensors|damaged"):
            read_header(path)
