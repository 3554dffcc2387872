"""Described models: the shipped ones are exact, a user's own override them, and a wrong file is named with its key."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgepeft.errors import BadInput, UsageError
from edgepeft.models.described import (
    describe_model,
    described_model,
    find_model_profile,
    find_tokenizer_profile,
    load_models,
    load_tokenizers,
    near_models,
)
from edgepeft.models.families import FAMILIES
from edgepeft.paths import builtin_profiles, home

SHIPPED = load_models()
PUBLISHED = {
    "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b-v0.3": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400,
    "mistral-small-24b": 23_572_403_200,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-8b": 8_190_735_360,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-1b": 999_885_952,
    "phi-3.5-mini": 3_821_079_552,
    "phi-4": 14_659_507_200,
    "smollm2-135m": 134_515_008,
    "smollm3-3b": 3_075_098_624,
    "olmo-2-7b": 7_298_617_344,
    "olmo-2-13b": 13_716_198_400,
}
"""Sums over the weights, as the models' pages name them."""


def write_model(name: str, base: str = "llama-3.2-1b", **changes: str) -> Path:
    text = (builtin_profiles() / f"models/{base}.toml").read_text(encoding="utf-8")
    text = text.replace(f'id = "{base}"', f'id = "{name}"').replace("meta-llama/", f"{name}/")
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    folder = home().profiles / "models"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shape_adds_up_to_the_published_count(name: str) -> None:
    assert SHIPPED[name].shape.parameters == SHIPPED[name].parameters == PUBLISHED[name]


@pytest.mark.parametrize("model", SHIPPED.values(), ids=SHIPPED.keys())
def test_each_model_says_where_its_figures_come_from(model: object) -> None:
    profile = SHIPPED[model.id]  # type: ignore[attr-defined]
    assert profile.config["architectures"] == [FAMILIES[profile.shape.model_type].architecture]
    assert profile.licence
    assert all("/" in alias for alias in profile.aliases)
    assert all(profile.sources.values())


def test_the_usual_families_and_sizes_are_there() -> None:
    assert len(SHIPPED) >= 18
    kinds = {model.shape.model_type for model in SHIPPED.values()}
    assert kinds >= {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3", "olmo2"}


def test_a_model_is_found_by_id_and_by_its_names_on_the_hub() -> None:
    for name in ("llama-3.1-70b", "Llama-3.1-70B", "meta-llama/Llama-3.1-70B", "META-LLAMA/llama-3.3-70b-instruct"):
        found = described_model(name)
        assert found is not None
        assert found.id == "llama-3.1-70b"
    assert described_model("meta-llama/Llama-4-Scout") is None


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"llama-3\.1-8b or llama-3\.1-70b"):
        find_model_profile("llama-3.1")
    assert near_models("Meta-Llama-3.1-8B-Instrukt")[0] == "llama-3.1-8b"
    assert near_models("xyz") == []
    with pytest.raises(UsageError, match="edgepeft profiles list tokenizers"):
        find_tokenizer_profile("sentencepieces")


def test_a_described_model_has_what_plans_read_of_one_in_the_store() -> None:
    model = describe_model(SHIPPED["qwen2.5-7b"])
    assert (model.name, model.stored_as, model.fingerprint) == ("qwen2.5-7b", "bf16", "")
    assert model.weights_bytes == 2 * PUBLISHED["qwen2.5-7b"]


def test_a_users_model_is_added_and_overrides_by_id() -> None:
    write_model("my-model")
    write_model("llama-3.2-1b", **{"max_position_embeddings = 131072": "max_position_embeddings = 4096"})
    models = load_models()
    assert models["my-model"].shape == SHIPPED["llama-3.2-1b"].shape
    assert models["llama-3.2-1b"].shape.context_length == 4096


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("num_hidden_layers = 16", "num_hidden_layers = 17", "key `parameters`: 1,235,814,400, but the weights"),
        ("num_hidden_layers = 16", "num_hidden_layers = -1", "num_hidden_layers is -1"),
        ("hidden_size = 2048", 'hidden_size = "2048"', "[config]: hidden_size is '2048'"),
        ("num_key_value_heads = 8", "num_key_value_heads = 5", "no multiple of num_key_value_heads 5"),
        ('model_type = "llama"', 'model_type = "lama"', "model_type 'lama'"),
        ('tokenizer = "llama-3"', 'tokenizer = "llama-9"', "key `tokenizer`: 'llama-9' is not known"),
        ("parameters = 1_235_814_400", "", "parameters"),
        ("sample_tokens = 26", "sample_tokens = 26\nwindow = 3", "window"),
        ('config = "config.json', 'configs = "config.json', "key `config`: has no entry under [sources]"),
        ("[sources]\n", '[sources]\nhidden = "x"\n', "key `sources.hidden`"),
        ("wrong/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-1B", "already means llama-3.2-1b"),
    ],
)
def test_a_wrong_file_is_named_with_its_key(old: str, new: str, complaint: str) -> None:
    write_model("wrong", **{old: new})
    with pytest.raises(BadInput, match=r"wrong\.toml") as caught:
        load_models()
    assert complaint in str(caught.value)


def test_every_tokenizer_is_measured_or_says_that_it_is_not() -> None:
    tokenizers = load_tokenizers()
    assert {model.tokenizer for model in SHIPPED.values()} == set(tokenizers)
    for tokenizer in tokenizers.values():
        assert 3 < tokenizer.chars_per_token < 6
        assert all(text.startswith(("measured", "estimated:")) for text in tokenizer.sources.values())
