"""Every method on a tiny model: gradients of a float64 reference, exact disabling, files, packing, checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

from edgepeft.chat.protocol import AdapterUse
from edgepeft.engine.inference.session import Session
from edgepeft.engine.methods import ENGINE_METHODS, AttachedAdapter, attach, detach, set_active
from edgepeft.engine.methods.files import read_adapter, save_adapter
from edgepeft.engine.model.load import LoadedModel, load_model
from edgepeft.engine.training.batches import Sample
from edgepeft.engine.training.memory import MemoryGauge
from edgepeft.engine.training.step import StepRunner
from edgepeft.methods import METHODS, LoraConfig, count_parameters, id_of
from edgepeft.methods.bias import BiasConfig
from edgepeft.methods.bottleneck import BottleneckConfig
from edgepeft.methods.compacter import CompacterConfig
from edgepeft.methods.full import FullConfig
from edgepeft.methods.ia3 import Ia3Config
from edgepeft.methods.norm import NormConfig
from edgepeft.methods.prefix import PrefixConfig
from edgepeft.methods.prompt import PromptConfig
from edgepeft.methods.sparse import SparseConfig
from edgepeft.models.store import ensure_model
from edgepeft.spec import Layout
from tiny import write_tiny_model
from training_runs import tiny_plan

CPU = torch.device("cpu")
IDS = torch.randint(0, 250, (2, 19), generator=torch.Generator().manual_seed(5))

CONFIGS: dict[str, Any] = {
    "lora": LoraConfig(rank=4, alpha=6.0),
    "lora of several ranks": LoraConfig(rank=4, alpha=6.0, ranks={"q_proj": 2, "self_attn.o_proj": 8, "down_proj": 3}),
    "dora": LoraConfig(rank=4, alpha=6.0, dora=True),
    "lora of everything": LoraConfig(rank=4, alpha=6.0, targets=("all-linear", "embed_tokens", "lm_head")),
    "lora of the head": LoraConfig(rank=4, alpha=6.0, targets=("lm_head",), ranks={"lm_head": 3}),
    "lora of the embedding": LoraConfig(rank=4, alpha=6.0, targets=("embed_tokens",), rank_stabilised=True),
    "houlsby": BottleneckConfig(reduction=8),
    "houlsby of relu": BottleneckConfig(reduction=8, activation="relu"),
    "pfeiffer": BottleneckConfig("pfeiffer", reduction=8, activation="silu"),
    "parallel": BottleneckConfig("parallel", reduction=8, scale=4.0),
    "compacter": CompacterConfig(reduction=4, products=4, rank=2, scale=0.5),
    "ia3": Ia3Config(),
    "ia3 of results": Ia3Config(outputs=("q_proj", "gate_proj", "down_proj"), inputs=("o_proj", "up_proj")),
    "norm": NormConfig(),
    "bias": BiasConfig(),
    "sparse": SparseConfig(density=0.05),
    "sparse by magnitude": SparseConfig(density=0.02, choose="magnitude", targets=("v_proj", "up_proj")),
    "sparse as PEFT has it": SparseConfig(rank=2, choose="random", targets=("q_proj", "o_proj", "down_proj")),
    "every entry": SparseConfig(density=1, targets=("k_proj",)),
    "some biases": BiasConfig(("v_proj", "o_proj")),
    "prefix": PrefixConfig(5),
    "reparameterised prefix": PrefixConfig(5, reparameterised=True, width=24),
    "full": FullConfig(),
    "prompt": PromptConfig(5),
    "prompt of a text": PromptConfig(5, "text", "Repeat"),
    "random prompt": PromptConfig(5, "random"),
}
STARTS_ELSEWHERE = {"prefix", "prompt"}
"""What stands before a sample draws attention whatever its values are: a fresh one is not the base."""

SMOOTH = {name: config for name, config in CONFIGS.items() if getattr(config, "activation", "") != "relu"}
"""Without those that have a kink, across which rounding moves values."""

each_method = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    """With biases, which one of the methods needs."""
    return write_tiny_model(tmp_path / "tiny-model", biased=True)


def load(folder: Path, precision: Any = "fp32", compute: Any = "fp32") -> LoadedModel:
    return load_model(ensure_model(str(folder)), precision=precision, compute_dtype=compute, device=CPU)


def fill(adapter: AttachedAdapter, seed: int = 1) -> None:
    """Values that change something everywhere, around those that the adapter starts with."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.named_parameters().values():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.1


def loss_of(model: Any, **options: Any) -> Tensor:
    logits: Tensor = model(IDS, **options).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def logits_of(loaded: LoadedModel, *active: tuple[str, float]) -> Tensor:
    set_active(loaded, active)
    with torch.no_grad():
        out: Tensor = loaded.model(IDS).logits
    return out


# The reference: transformers' model in float64, with each method's formula written down plainly in hooks or a cache ---


def reference(folder: Path, adapter: AttachedAdapter, strength: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the values that it depends on."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    model.requires_grad_(False)
    values = {name: value.double().requires_grad_() for name, value in adapter.state_dict().items()}
    if id_of(adapter.config) == "prefix":
        return loss_of(model, past_key_values=_cache(adapter, values, strength)), values
    if id_of(adapter.config) == "prompt":
        rows = (strength * values["prompt.rows"]).expand(len(IDS), -1, -1)
        logits = model(inputs_embeds=torch.cat([rows, model.get_input_embeddings()(IDS)], dim=1)).logits
        return F.cross_entropy(logits[:, 5:-1].flatten(0, 1), IDS[:, 1:].flatten()), values
    modules = dict(model.named_modules())
    if isinstance(adapter.config, FullConfig):
        for name, own in list(model.named_parameters(remove_duplicate=False)):
            parent, _, leaf = name.rpartition(".")
            # A tied head is the embedding.
            trained = values.get(name, values["model.embed_tokens.weight"])
            delattr(modules[parent], leaf)
            setattr(modules[parent], leaf, own.detach() + strength * (trained - own.detach()))
        return loss_of(model), values
    for site in adapter.updates:
        own = {name.removeprefix(f"{site}."): value for name, value in values.items() if name.startswith(f"{site}.")}
        _hook(modules[site], adapter.config, own, values, site, strength)
    return loss_of(model), values


def _cache(adapter: AttachedAdapter, values: dict[str, Tensor], strength: float) -> DynamicCache:
    cache = DynamicCache()
    for layer, site in enumerate(adapter.updates):
        if adapter.config.reparameterised:
            hidden = values["prefix.embedding"] @ values["prefix.down.weight"].t() + values["prefix.down.bias"]
            made = torch.tanh(hidden) @ values[f"{site}.up.weight"].t() + values[f"{site}.up.bias"]
            pair = made.view(5, 2, 2, 16).unbind(1)
        else:
            pair = values[f"{site}.keys"], values[f"{site}.values"]
        keys, of_values = (x.transpose(0, 1).expand(len(IDS), -1, -1, -1) for x in pair)
        cache.update(keys, strength * of_values, layer)
    return cache


def _hook(
    module: nn.Module, config: Any, own: dict[str, Tensor], values: dict[str, Tensor], site: str, strength: float
) -> None:
    def change_output(made: Callable[[Tensor, Tensor], Tensor]) -> None:
        def hook(module: nn.Module, arguments: Any, options: Any, out: Any) -> Any:
            x = arguments[0] if arguments else options["hidden_states"]
            return (made(x, out[0]), *out[1:]) if isinstance(out, tuple) else made(x, out)

        module.register_forward_hook(hook, with_kwargs=True)

    kind = id_of(config)
    if kind == "lora" and isinstance(module, nn.Embedding):
        added = own["lora_embedding_A"].t() @ own["lora_embedding_B"].t()
        change_output(lambda x, y: y + strength * config.scale_of(config.rank_of(site)) * added[x])
    elif kind == "lora":
        change = strength * config.scale_of(config.rank_of(site)) * own["lora_B.weight"] @ own["lora_A.weight"]
        if config.dora:
            weight = module.weight + change
            lengths = torch.lerp(module.weight.norm(dim=1), own["lora_magnitude_vector"], strength)
            factors = lengths / weight.norm(dim=1).detach()
            bias = 0 if module.bias is None else module.bias
            change_output(lambda x, y: x @ weight.t() * factors + bias)
        else:
            change_output(lambda x, y: y + x @ change.t())
    elif kind == "ia3":
        factors = 1 + strength * (own["ia3_l"].flatten() - 1)
        if any(site.endswith(name) for name in config.inputs):
            module.register_forward_pre_hook(lambda module, arguments: (arguments[0] * factors,))
        else:
            change_output(lambda x, y: y * factors)
    elif kind == "sparse":
        places = own["sparse_places"].long()

        def changed(x: Tensor, y: Tensor) -> Tensor:
            change = torch.zeros(module.weight.numel(), dtype=torch.float64).index_add(0, places, own["sparse_values"])
            return y + strength * x @ change.view_as(module.weight).t()

        change_output(changed)
    elif kind == "bias":
        change_output(lambda x, y: y + strength * own["beft_bias"])
    elif kind == "norm":
        weight = module.weight
        mixed = weight + strength * (own["ln_tuning_layers.weight"] - weight)
        change_output(lambda x, y: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * mixed)
    else:
        act = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}[config.activation]
        if kind == "compacter":
            rules = values["compacter_rules"]

            def matrix(name: str) -> Tensor:
                factors = own[f"{name}.s"] @ own[f"{name}.t"]
                return sum(torch.kron(rule, factor) for rule, factor in zip(rules, factors, strict=True)).t()
        else:

            def matrix(name: str) -> Tensor:
                return own[f"{name}.weight"]

        beside = kind == "bottleneck" and config.placement == "parallel"

        def made(x: Tensor, y: Tensor) -> Tensor:
            inner = act((x if beside else y) @ matrix("adapter_down").t() + own["adapter_down.bias"])
            added = inner @ matrix("adapter_up").t() + own["adapter_up.bias"]
            return y + strength * config.scale * added

        change_output(made)


def close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return float((found.double() - expected).abs().max()) <= tolerance * max(1e-6, float(expected.abs().max()))


@each_method
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_gradients_are_those_of_a_plain_float64_model(tmp_path: Path, config: Any, strength: float) -> None:
    folder = write_tiny_model(tmp_path / "model", seed=3, biased=True)
    loaded = load(folder)
    adapter = attach(loaded, "a", config, seed=1)
    fill(adapter)
    expected, values = reference(folder, adapter, strength)
    expected.backward()
    set_active(loaded, [("a", strength)])
    loss = loss_of(loaded.model)
    loss.backward()
    assert close(loss.detach(), expected.detach(), 1e-6)
    for name, parameter in adapter.named_parameters().items():
        wanted = values[name].grad
        assert parameter.grad is not None, name
        assert wanted is not None, name
        assert close(parameter.grad, wanted, 2e-5), name


@pytest.mark.parametrize("config", SMOOTH.values(), ids=SMOOTH.keys())
@pytest.mark.parametrize(("precision", "compute"), [("bf16", "bf16"), ("nf4", "bf16"), ("int8", "fp32")])
def test_gradients_on_every_base_are_near_those_of_the_dense_one(
    tmp_path: Path, config: Any, precision: Any, compute: Any
) -> None:
    """The frozen values of the quantized base, held densely in float32, are the reference."""
    if METHODS[id_of(config)].needs_dense_base and precision != compute:
        pytest.skip("a quantized base is refused")
    folder = write_tiny_model(tmp_path / "model", seed=3, biased=True)
    entry = ensure_model(str(folder))
    found: list[dict[str, Tensor]] = []
    for loaded in (
        load_model(entry, precision=precision, compute_dtype=compute, device=CPU),
        load_model(entry, precision=precision, compute_dtype="fp32", device=CPU, dense_values=True),
    ):
        adapter = attach(loaded, "a", config, seed=1)
        fill(adapter)
        set_active(loaded, [("a", 1.0)])
        loss_of(loaded.model).backward()
        found.append({name: value.grad for name, value in adapter.named_parameters().items() if value.grad is not None})
    own, dense = found
    assert own.keys() == dense.keys() == adapter.named_parameters().keys()
    for name, gradient in own.items():
        assert gradient.dtype == torch.float32
        assert float((gradient - dense[name]).norm() / dense[name].norm()) < 0.08, name


@each_method
def test_disabling_restores_the_bases_logits_to_the_bit(tiny_model: Path, config: Any) -> None:
    dense = METHODS[id_of(config)].needs_dense_base
    loaded = load(tiny_model, "bf16" if dense else "nf4", "bf16")
    base = logits_of(loaded)
    adapter = attach(loaded, "a", config, seed=1)
    started = logits_of(loaded, ("a", 1.0))
    assert float((started - base).abs().max()) < 0.05 or id_of(config) in STARTS_ELSEWHERE
    fill(adapter)
    assert not torch.equal(logits_of(loaded, ("a", 1.0)), base)
    assert torch.equal(logits_of(loaded, ("a", 0.0)), base)
    assert torch.equal(logits_of(loaded), base)
    detach(loaded, "a")
    assert torch.equal(logits_of(loaded), base)


@each_method
def test_a_fresh_adapter_is_the_base(tiny_model: Path, config: Any) -> None:
    if id_of(config) in STARTS_ELSEWHERE:
        pytest.skip("it starts with tokens of its own")
    loaded = load(tiny_model)
    base = logits_of(loaded)
    attach(loaded, "a", config, seed=1)
    assert torch.equal(logits_of(loaded, ("a", 1.0)), base)


@each_method
def test_several_adapters_act_one_after_another(tiny_model: Path, config: Any) -> None:
    loaded = load(tiny_model)
    for name, kind in (("a", config), ("b", LoraConfig(rank=2))):
        fill(attach(loaded, name, kind, seed=1), seed=len(name))
    alone = [logits_of(loaded, use) for use in (("a", 1.0), ("b", 1.0))]
    both = logits_of(loaded, ("a", 1.0), ("b", 1.0))
    assert not any(torch.equal(both, one) for one in alone)
    detach(loaded, "b")
    assert torch.equal(logits_of(loaded, ("a", 1.0)), alone[0])


@each_method
def test_saving_and_loading_keeps_every_bit(tiny_model: Path, tmp_path: Path, config: Any) -> None:
    loaded = load(tiny_model)
    adapter = attach(loaded, "a", config, seed=1)
    fill(adapter)
    expected = logits_of(loaded, ("a", 1.0))
    save_adapter(tmp_path / "saved", adapter, "tiny")
    read = read_adapter(tmp_path / "saved", loaded, "b")
    assert type(read.config) is type(config)
    state = adapter.file_tensors()
    assert state.keys() == read.file_tensors().keys()
    assert all(torch.equal(value, state[name]) for name, value in read.file_tensors().items())
    assert torch.equal(logits_of(loaded, ("b", 1.0)), expected)


@each_method
def test_a_chat_gets_what_was_saved(tiny_model: Path, tmp_path: Path, config: Any) -> None:
    precision = "bf16" if METHODS[id_of(config)].needs_dense_base else "nf4"
    loaded = load(tiny_model, precision, "bf16")
    adapter = attach(loaded, "a", config, seed=1)
    fill(adapter)
    base, expected = logits_of(loaded), logits_of(loaded, ("a", 0.7))
    save_adapter(tmp_path / "saved", adapter, "tiny")
    session, use = Session(loaded), AdapterUse(folder=str(tmp_path / "saved"), scale=0.7)
    for _ in range(2):
        session.activate([use])
        with torch.inference_mode():
            found = loaded.model(IDS).logits
        # The chat rounds matrices to bfloat16, as products do.
        assert float((found - expected).norm()) < 0.03 * float((expected - base).norm())
        session.activate([])
        assert torch.equal(logits_of(loaded), base)


@each_method
def test_trainable_entries_are_those_that_the_light_half_counts(tmp_path: Path, config: Any) -> None:
    loaded = load(write_tiny_model(tmp_path / "model", biased=True))
    named = attach(loaded, "a", config, seed=1).named_parameters()
    assert sum(value.numel() for value in named.values()) == count_parameters(config, loaded.shape)
    trained = METHODS[id_of(config)].trained(config, loaded.shape)
    assert sorted(trained.sizes(loaded.shape.layers)) == sorted(value.numel() for value in named.values())


def _step_gradients(loaded: LoadedModel, adapter: AttachedAdapter, layout: Layout, recipe: Any) -> list[Tensor]:
    runner = StepRunner(loaded, recipe, backward=lambda loss: loss.backward(), gauge=MemoryGauge(CPU))
    random = torch.Generator().manual_seed(2)
    samples = []
    for number, length in enumerate((23, 9, 31, 5)):
        ids = torch.randint(0, 250, (length + 1,), generator=random).numpy()
        rows = torch.arange(2, length).numpy()
        lead, targets = loaded.prompt.tokens, ids[rows + 1].astype("int64")
        samples.append(Sample(number, np.pad(ids[:-1].astype("int32"), (lead, 0)), rows + lead, targets))
    for parameter in adapter.named_parameters().values():
        parameter.grad = None
    runner.train(samples, layout, 0)
    return [value.grad for value in adapter.named_parameters().values() if value.grad is not None]


@each_method
def test_packing_checkpointing_and_accumulation_change_nothing(tmp_path: Path, config: Any) -> None:
    entry = ensure_model(str(write_tiny_model(tmp_path / "model", biased=True)))
    recipe = tiny_plan(tmp_path, entry).spec.recipe
    loaded = load_model(entry, precision="fp32", compute_dtype="fp32", device=CPU)
    adapter = attach(loaded, "a", config, seed=1)
    fill(adapter)
    set_active(loaded, [("a", 1.0)])
    one = _step_gradients(loaded, adapter, Layout(512, "none", 64), recipe)
    assert len(one) == len(adapter.named_parameters())
    for layout in (Layout(512, "layer", 16), Layout(32, "none", 16), Layout(40, "layer", 64)):
        found = _step_gradients(loaded, adapter, layout, recipe)
        for first, second in zip(one, found, strict=True):
            assert float((first - second).norm()) <= 1e-5 * float(first.norm())


def test_every_config_is_of_a_method_and_every_method_is_tried() -> None:
    assert {id_of(config) for config in CONFIGS.values()} == set(METHODS) == set(ENGINE_METHODS)
