"""Methods with operations of their own on a card: DoRA, sparse entries and biases give there what they give here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from edgepeft.engine.methods import attach, set_active
from edgepeft.engine.model.load import load_model
from edgepeft.methods import LoraConfig
from edgepeft.methods.bias import BiasConfig
from edgepeft.methods.sparse import SparseConfig
from edgepeft.models.store import ensure_model
from tiny import write_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

IDS = torch.randint(0, 250, (2, 19), generator=torch.Generator().manual_seed(5))


def gradients(folder: Path, config: Any, device: torch.device, precision: Any, compute: Any) -> dict[str, Tensor]:
    loaded = load_model(ensure_model(str(folder)), precision=precision, compute_dtype=compute, device=device)
    adapter = attach(loaded, "a", config, seed=1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.named_parameters().values():
            parameter += (torch.randn(parameter.shape, generator=generator) * 0.1).to(device)
    set_active(loaded, [("a", 1.0)])
    ids = IDS.to(device)
    out = loaded.model(ids).logits
    F.cross_entropy(out[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
    found = {name: value.grad.cpu() for name, value in adapter.named_parameters().items() if value.grad is not None}
    return found | {name: value.cpu() for name, value in adapter.named_places().items()}


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(rank=4, dora=True),
        SparseConfig(density=0.05),
        SparseConfig(rank=2, choose="random"),
        BiasConfig(),
    ],
    ids=["dora", "sparse", "sparse as PEFT has it", "bias"],
)
@pytest.mark.parametrize(("precision", "compute", "tolerance"), [("fp32", "fp32", 1e-4), ("nf4", "bf16", 0.08)])
def test_gradients_are_those_of_the_cpu(
    tmp_path: Path, config: Any, precision: Any, compute: Any, tolerance: float
) -> None:
    folder = write_tiny_model(tmp_path / "model", biased=True)
    there, here = (gradients(folder, config, torch.device(kind), precision, compute) for kind in ("cuda", "cpu"))
    assert there.keys() == here.keys()
    for name, value in here.items():
        if not value.is_floating_point():
            assert torch.equal(there[name], value), name
        else:
            assert float((there[name] - value).norm()) < tolerance * float(value.norm()), name
