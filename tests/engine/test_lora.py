"""Our LoRA against peft's: the same weights give the same logits and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM

from edgepeft.engine.methods import AttachedAdapter, attach, detach, set_active
from edgepeft.engine.methods.dropout import dropout_context
from edgepeft.engine.model.load import LoadedModel, load_model
from edgepeft.errors import BadInput, UsageError
from edgepeft.methods import LoraConfig, count_parameters
from edgepeft.models.store import ensure_model
from tiny import write_tiny_model

CPU = torch.device("cpu")
IDS = torch.randint(0, 250, (2, 19), generator=torch.Generator().manual_seed(5))


def load(folder: Path, precision: Any = "fp32", compute: Any = "fp32") -> LoadedModel:
    return load_model(ensure_model(str(folder)), precision=precision, compute_dtype=compute, device=CPU)


def fill(adapter: AttachedAdapter, seed: int = 1) -> None:
    """Random values in B too, so that the update is not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.named_parameters().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def loss_of(model: Any) -> Tensor:
    logits: Tensor = model(IDS).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), IDS[:, 1:].flatten())


def gradients(adapter: AttachedAdapter) -> dict[str, Tensor]:
    found = {}
    for name, parameter in adapter.named_parameters().items():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        found[name] = parameter.grad.clone()
        parameter.grad = None
    return found


def peft_twin(folder: Path, adapter: AttachedAdapter, config: LoraConfig, model: Any = None) -> Any:
    """peft's model with our adapter's values."""
    base = model or AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    modules = sorted({path.rsplit(".", 1)[-1] for path in adapter.updates})
    settings = PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=modules,
        use_rslora=config.rank_stabilised,
        task_type="CAUSAL_LM",
    )
    twin = get_peft_model(base, settings)
    own = dict(twin.named_parameters())
    with torch.no_grad():
        for name, value in adapter.state_dict().items():
            own["base_model.model." + name.replace(".weight", ".default.weight")].copy_(value)
    return twin


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.detach() - expected.detach()).norm() / expected.detach().norm())


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(rank=4),
        LoraConfig(rank=8, alpha=8, targets=("q_proj", "v_proj")),
        LoraConfig(rank=4, alpha=16, rank_stabilised=True),
    ],
)
def test_logits_and_gradients_are_pefts(tiny_model: Path, config: LoraConfig) -> None:
    loaded = load(tiny_model)
    adapter = attach(loaded, "a", config, seed=0)
    fill(adapter)
    set_active(loaded, [("a", 1.0)])
    twin = peft_twin(tiny_model, adapter, config)
    torch.testing.assert_close(loaded.model(IDS).logits, twin(IDS).logits, rtol=1e-5, atol=1e-5)
    loss_of(loaded.model).backward()
    loss_of(twin).backward()
    own = {name: p.grad for name, p in twin.named_parameters() if p.requires_grad}
    assert len(own) == len(adapter.named_parameters())
    for name, grad in gradients(adapter).items():
        expected = own["base_model.model." + name.replace(".weight", ".default.weight")]
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5)
        assert relative(grad, expected) < 1e-5


def test_with_nf4_and_bf16_it_is_pefts_within_bf16_rounding(tiny_model: Path) -> None:
    loaded = load(tiny_model, "nf4", "bf16")
    adapter = attach(loaded, "a", LoraConfig(rank=4), seed=0)
    fill(adapter)
    set_active(loaded, [("a", 1.0)])
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        for path, linear in loaded.linears().items():
            linear.weight_source.materialize(base.get_submodule(path).weight)
    twin = peft_twin(tiny_model, adapter, LoraConfig(rank=4), base)
    assert relative(loaded.model(IDS).logits.float(), twin(IDS).logits) < 0.02
    loss_of(loaded.model).backward()
    loss_of(twin).backward()
    own = dict(twin.named_parameters())
    for name, grad in gradients(adapter).items():
        assert relative(grad, own["base_model.model." + name.replace(".weight", ".default.weight")].grad) < 0.05


@pytest.mark.parametrize("precision", ["fp32", "int8", "nf4"])
def test_checkpointing_gives_the_same_gradients(tiny_model: Path, precision: Any) -> None:
    loaded = load(tiny_model, precision)
    adapter = attach(loaded, "a", LoraConfig(rank=4), seed=0)
    fill(adapter)
    set_active(loaded, [("a", 1.0)])
    loss_of(loaded.model).backward()
    plain = gradients(adapter)
    loaded.model.activation_checkpointing_enable({"use_reentrant": False})
    loaded.model.train()
    loss_of(loaded.model).backward()
    for name, grad in gradients(adapter).items():
        assert torch.equal(grad, plain[name])


@pytest.mark.parametrize("precision", ["bf16", "int8", "nf4"])
@pytest.mark.parametrize("active", [True, False])
def test_a_linear_keeps_its_input_and_nothing_dense(tiny_model: Path, precision: Any, active: bool) -> None:
    loaded = load(tiny_model, precision, "bf16")
    linear = loaded.linears()["model.layers.0.mlp.up_proj"]
    attach(loaded, "a", LoraConfig(rank=4), seed=0)
    set_active(loaded, [("a", 1.0)] if active else [])
    x = torch.randn(2, 5, 64, dtype=torch.bfloat16, requires_grad=True)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        linear(x).sum().backward()
    expected = [(2, 5, 64), (10, 4), (4, 64), (128, 4)] if active else []
    assert sorted(tuple(tensor.shape) for tensor in kept) == sorted(expected)
    assert x.grad is not None


def test_no_gradient_is_formed_where_none_is_asked_for(tiny_model: Path) -> None:
    loaded = load(tiny_model, "nf4")
    linear = loaded.linears()["model.layers.0.mlp.up_proj"]
    adapter = attach(loaded, "a", LoraConfig(rank=4), seed=0)
    set_active(loaded, [("a", 1.0)])
    asked: list[bool] = []
    source = linear.weight_source
    original = source.matmul_transposed
    source.matmul_transposed = lambda g: asked.append(True) or original(g)  # type: ignore[method-assign]
    linear(torch.randn(3, 64)).sum().backward()
    assert not asked
    assert adapter.updates["model.layers.0.mlp.up_proj"].B.grad is not None
    x = torch.randn(3, 64, requires_grad=True)
    for parameter in adapter.named_parameters().values():
        parameter.requires_grad_(False)
    linear(x).sum().backward()
    assert asked == [True]
    assert x.grad is not None


def test_adapters_swap_combine_and_leave_the_base_as_it_was(tiny_model: Path) -> None:
    loaded = load(tiny_model)
    with torch.no_grad():
        base = loaded.model(IDS).logits
        first, second = (attach(loaded, name, LoraConfig(rank=4), seed=0) for name in ("n@v1", "b"))
        fill(first, 1)
        fill(second, 2)
        assert torch.equal(loaded.model(IDS).logits, base)
        set_active(loaded, [("n@v1", 1.0)])
        one = loaded.model(IDS).logits
        set_active(loaded, [("b", 1.0)])
        other = loaded.model(IDS).logits
        set_active(loaded, [("n@v1", 0.5), ("b", 2.0)])
        both = loaded.model(IDS).logits
        assert not torch.allclose(one, other)
        assert not torch.allclose(one, base)
        for linear in loaded.linears().values():
            x = torch.randn(3, linear.in_features)
            update = 0.5 * first.updates[linear.name].factor * (
                first.updates[linear.name].B @ first.updates[linear.name].A
            ) + 2.0 * second.updates[linear.name].factor * (
                second.updates[linear.name].B @ second.updates[linear.name].A
            )
            torch.testing.assert_close(linear(x), linear.weight_source.matmul(x) + x @ update.t(), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(both, one)
        set_active(loaded, [("n@v1", 1.0), ("b", 0.0)])
        assert torch.equal(loaded.model(IDS).logits, one)
        set_active(loaded, [])
        assert torch.equal(loaded.model(IDS).logits, base)
        set_active(loaded, [("n@v1", 1.0), ("b", 1.0)])
        detach(loaded, "b")
        assert torch.equal(loaded.model(IDS).logits, one)


def test_the_model_itself_stays_frozen(tiny_model: Path) -> None:
    loaded = load(tiny_model)
    adapter = attach(loaded, "a", LoraConfig(rank=4), seed=0)
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert all(parameter.requires_grad for parameter in adapter.named_parameters().values())


def test_initial_values_depend_on_seed_and_module_alone(tiny_model: Path) -> None:
    loaded = load(tiny_model)
    whole = attach(loaded, "a", LoraConfig(rank=4), seed=3).state_dict()
    part = attach(loaded, "b", LoraConfig(rank=4, targets=("down_proj", "q_proj")), seed=3).state_dict()
    other = attach(loaded, "c", LoraConfig(rank=4), seed=4).state_dict()
    assert part
    for name, value in part.items():
        assert torch.equal(value, whole[name])
    name = "model.layers.0.mlp.down_proj.lora_A.weight"
    assert not torch.equal(whole[name], other[name])
    assert not torch.equal(whole[name], whole[name.replace("layers.0", "layers.1")])
    assert whole[name].abs().max() <= 128**-0.5
    assert not whole[name.replace("lora_A", "lora_B")].any()


def test_targets_are_all_decoder_linears_or_endings(tiny_model: Path) -> None:
    loaded = load(tiny_model)
    assert len(attach(loaded, "a", LoraConfig(rank=4), seed=0).updates) == 14
    chosen = attach(loaded, "b", LoraConfig(rank=4, targets=("self_attn.q_proj", "up_proj")), seed=0)
    assert [path.rsplit(".", 1)[-1] for path in chosen.updates] == ["q_proj", "up_proj"] * 2
    with pytest.raises(UsageError, match=r"'wo' matches no linear layer.*down_proj, gate_proj"):
        attach(loaded, "c", LoraConfig(rank=4, targets=("wo",)), seed=0)
    with pytest.raises(UsageError, match="rank 33 exceeds"):
        attach(loaded, "c", LoraConfig(rank=33), seed=0)


def test_names_are_checked(tiny_model: Path) -> None:
    loaded = load(tiny_model)
    attach(loaded, "a", LoraConfig(rank=4), seed=0)
    with pytest.raises(UsageError, match="attached already"):
        attach(loaded, "a", LoraConfig(rank=4), seed=0)
    with pytest.raises(UsageError, match=r"no adapter named 'b' is attached. Attached: a"):
        set_active(loaded, [("b", 1.0)])
    with pytest.raises(UsageError, match="named twice"):
        set_active(loaded, [("a", 1.0), ("a", 1.0)])
    with pytest.raises(UsageError, match="no adapter named 'b'"):
        detach(loaded, "b")


def test_loading_a_state_checks_every_tensor_first(tiny_model: Path) -> None:
    loaded = load(tiny_model)
    adapter = attach(loaded, "a", LoraConfig(rank=4), seed=0)
    state = {name: torch.ones_like(value) for name, value in adapter.state_dict().items()}
    name = "model.layers.1.mlp.down_proj.lora_B.weight"
    for wrong, message in (
        ({k: v for k, v in state.items() if k != name}, "is missing"),
        (state | {name: torch.ones(3, 4)}, "is 3×4, this model needs 64×4"),
        (state | {name: state[name] * float("nan")}, "not finite"),
        (state | {"model.other": torch.ones(1)}, "fits no layer"),
    ):
        with pytest.raises(BadInput, match=message):
            adapter.load_state_dict(wrong)
        assert not adapter.state_dict()[name].any()
    adapter.load_state_dict(state)
    assert bool((adapter.state_dict()[name] == 1).all())


def dropout_gradients(
    loaded: LoadedModel, adapter: AttachedAdapter, order: list[int], step: int = 0
) -> dict[str, Tensor]:
    """Gradients of samples of unequal length, summed over micro-batches of one sample in this order."""
    x = {sample: torch.randn(3 + sample, 64, generator=torch.Generator().manual_seed(sample)) for sample in order}
    linear = loaded.linears()["model.layers.0.mlp.up_proj"]
    for sample in order:
        with dropout_context(7, step, [sample], [3 + sample]):
            linear(x[sample]).square().sum().backward()
    update = adapter.updates["model.layers.0.mlp.up_proj"]
    found = {}
    for key, parameter in update.named_tensors().items():
        assert parameter.grad is not None
        found[key], parameter.grad = parameter.grad, None
    return found


def test_dropout_is_a_function_of_seed_step_sample_and_module(tiny_model: Path) -> None:
    loaded = load(tiny_model)
    adapter = attach(loaded, "a", LoraConfig(rank=4, dropout=0.5), seed=0)
    fill(adapter)
    set_active(loaded, [("a", 1.0)])
    forward = dropout_gradients(loaded, adapter, [0, 1, 2])
    backward = dropout_gradients(loaded, adapter, [2, 1, 0])
    later = dropout_gradients(loaded, adapter, [0, 1, 2], step=1)
    linear = loaded.linears()["model.layers.0.mlp.up_proj"]
    x = torch.cat([torch.randn(3 + s, 64, generator=torch.Generator().manual_seed(s)) for s in (0, 1, 2)])
    with dropout_context(7, 0, [0, 1, 2], [3, 4, 5]):
        linear(x).square().sum().backward()
    for key, parameter in adapter.updates["model.layers.0.mlp.up_proj"].named_tensors().items():
        assert parameter.grad is not None
        torch.testing.assert_close(forward[key], backward[key])
        # One product over all samples and a sum over products of each: float32 rounds differently, by processor.
        torch.testing.assert_close(parameter.grad, forward[key], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(later[key], forward[key])
    with dropout_context(7, 0, [0], [4]), pytest.raises(ValueError, match="names 4 tokens"):
        linear(x)
    assert torch.equal(linear(x), linear(x))


def test_dropout_gradients_are_those_of_the_masked_product(tiny_model: Path) -> None:
    loaded = load(tiny_model)
    adapter = attach(loaded, "a", LoraConfig(rank=4, dropout=0.3), seed=0)
    fill(adapter)
    set_active(loaded, [("a", 1.0)])
    path = "model.layers.1.self_attn.q_proj"
    update, linear = adapter.updates[path], loaded.linears()[path]
    x = torch.randn(9, 64, requires_grad=True)
    with dropout_context(1, 2, [5, 6], [4, 5]):
        linear(x).square().sum().backward()
        mask = update.mask(current(), x)
    assert sorted(mask.unique().tolist()) == pytest.approx([0, 1 / 0.7])
    grads = [x.grad, update.A.grad, update.B.grad]
    x.grad = update.A.grad = update.B.grad = None
    weight = linear.weight_source.materialize(torch.empty(linear.weight_source.shape))
    y = x @ weight.t() + update.factor * ((x * mask) @ update.A.t()) @ update.B.t()
    y.square().sum().backward()
    for found, expected in zip(grads, (x.grad, update.A.grad, update.B.grad), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def current() -> Any:
    from edgepeft.engine.methods.dropout import current_samples

    return current_samples()


def test_trainable_entries_are_those_that_the_light_half_counts(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m", num_key_value_heads=1, intermediate_size=192)
    loaded = load(folder)
    for config in (LoraConfig(rank=4), LoraConfig(rank=2, targets=("k_proj", "down_proj"))):
        adapter = attach(loaded, f"r{config.rank}", config, seed=0)
        entries = sum(parameter.numel() for parameter in adapter.named_parameters().values())
        assert entries == count_parameters(config, loaded.shape)
        assert sum(s.shape[0] * s.shape[1] for s in adapter.changed()) == entries
