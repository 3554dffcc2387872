"""Norms, gates and projections in one operation each give what transformers' own code gives."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgepeft.engine.methods import attach, set_active
from edgepeft.engine.model import fused
from edgepeft.engine.model.fused import ATTENTIONS, ENDS_WITH_MLP, GATED_MLPS, NORMS, fuse
from edgepeft.engine.model.linear import AdaptedLinear, recomputing
from edgepeft.engine.model.load import LoadedModel, load_model
from edgepeft.methods import LoraConfig
from edgepeft.models.store import ensure_model

CPU = torch.device("cpu")


def transformers_class(name: str) -> type[nn.Module]:
    """`Qwen3MoeRMSNorm` from transformers.models.qwen3_moe.modeling_qwen3_moe."""
    family = re.sub(r"(RMSNorm|MLP|Attention|DecoderLayer)$", "", name)
    folder = re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])", "_", family).lower() if "Moe" in family else family.lower()
    found: type[nn.Module] = getattr(importlib.import_module(f"transformers.models.{folder}.modeling_{folder}"), name)
    return found


@pytest.mark.parametrize("name", sorted(GATED_MLPS | ATTENTIONS | ENDS_WITH_MLP | set(NORMS)))
def test_every_class_that_is_changed_exists(name: str) -> None:
    assert issubclass(transformers_class(name), nn.Module)


@pytest.mark.parametrize("shape", [(1, 700, 96), (1, 4, 300, 96)], ids=["tokens", "heads in front"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", sorted(NORMS))
def test_a_norm_is_transformers(name: str, dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: Any) -> None:
    # Several pieces, the last one shorter.
    monkeypatch.setattr(fused, "ELEMENTWISE_CHUNK", 96 * 256)
    torch.manual_seed(0)
    norm = transformers_class(name)(96).requires_grad_(False)
    norm.weight.copy_(torch.rand(96) + 0.5)
    norm = norm.to(dtype)
    x = torch.randn(shape).to(dtype)
    if len(shape) == 4:
        # As attention sees it: a view whose tokens lie apart.
        x = torch.randn(1, shape[2], shape[1], 96).to(dtype).transpose(1, 2)
    g = torch.randn(shape).to(dtype)
    theirs = through(norm, x, g)
    fuse(nn.ModuleList([norm]))
    ours = through(norm, x, g)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, **tolerance)
    if dtype == torch.bfloat16:
        torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=0)


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_gate_is_transformers(activation: str, dtype: torch.dtype, monkeypatch: Any) -> None:
    from transformers import LlamaConfig

    monkeypatch.setattr(fused, "ELEMENTWISE_CHUNK", 1000)
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=48, hidden_act=activation)
    mlp = transformers_class("LlamaMLP")(config).to(dtype).requires_grad_(False)
    x, g = torch.randn(1, 50, 32).to(dtype), torch.randn(1, 50, 32).to(dtype)
    theirs = through(mlp, x, g)
    fuse(nn.ModuleList([mlp]))
    ours = through(mlp, x, g)
    assert ("forward" in mlp.__dict__) == (activation != "gelu")
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.02}
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def through(module: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The module's result, and the gradient of its input."""
    x = x.detach().requires_grad_()
    out = module(x)
    out.backward(g)
    assert x.grad is not None
    return out.detach(), x.grad


@pytest.fixture
def loaded(tiny_model: Path) -> LoadedModel:
    return load_model(ensure_model(str(tiny_model)), precision="nf4", compute_dtype="fp32", device=CPU)


def adapted(loaded: LoadedModel, *, seed: int = 0, **config: Any) -> dict[str, AdaptedLinear]:
    """The linears of the first layer, with an adapter that does something."""
    adapter = attach(loaded, "a", LoraConfig(rank=4, **config), seed)
    for parameter in adapter.named_parameters().values():
        parameter.data.normal_(generator=torch.Generator().manual_seed(1), std=0.1)
    set_active(loaded, [("a", 0.5)])
    return {path.rsplit(".", 1)[-1]: linear for path, linear in loaded.linears().items() if ".layers.0." in path}


@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "v_proj"), ("down_proj",)])
def test_projections_of_one_input_are_those_of_each_by_itself(loaded: LoadedModel, targets: tuple[str, ...]) -> None:
    linears = adapted(loaded, targets=targets)
    names = ["q_proj", "k_proj", "v_proj"]
    x = torch.randn(1, 7, linears["q_proj"].in_features)
    g = [torch.randn(1, 7, linears[name].out_features) for name in names]
    found = []
    for together in (True, False):
        if not together:
            for name in names:
                linears[name].shares_input = None
        own = x.clone().requires_grad_()
        outs = [linears[name](own) for name in names]
        torch.autograd.backward(outs, g)
        tensors = [
            tensor for name in names for update in linears[name].adapters.values() for tensor in update.tensors()
        ]
        found.append([*outs, own.grad, *(tensor.grad for tensor in tensors)])
        for tensor in tensors:
            tensor.grad = None
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_another_input_is_not_answered_with_what_was_computed_for_the_last_one(loaded: LoadedModel) -> None:
    linears = adapted(loaded)
    one, other = torch.randn(2, 1, 5, linears["q_proj"].in_features)
    linears["q_proj"](one)
    alone = linears["k_proj"](other)
    torch.testing.assert_close(alone, linears["k_proj"](other))
    assert not torch.allclose(alone, linears["k_proj"](one))
    linears["q_proj"](one)
    shared = linears["q_proj"].shares_input
    assert shared is not None
    assert shared._waiting
    loaded.forget_unfinished()
    assert not shared._waiting


def test_a_layer_that_runs_again_leaves_out_its_last_product(loaded: LoadedModel, monkeypatch: Any) -> None:
    linears = adapted(loaded)
    down = linears["down_proj"]
    asked = []
    weight = type(down.weight_source)
    product = weight.matmul
    monkeypatch.setattr(weight, "matmul", lambda self, x: asked.append(self) or product(self, x))
    x = torch.randn(1, 5, down.in_features)
    for again in (False, True):
        with recomputing(again):
            assert down(x).shape == (1, 5, down.out_features)
            linears["o_proj"](torch.randn(1, 5, linears["o_proj"].in_features))
    assert [one is down.weight_source for one in asked] == [True, False, False]
