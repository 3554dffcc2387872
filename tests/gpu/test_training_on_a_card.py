"""On a CUDA card: the frozen weights, the packed attention and a whole run against its prediction."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from edgepeft.engine.model.frozen import freeze
from edgepeft.engine.training.attention import packed, packed_attention
from edgepeft.spec import Precision

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.mark.parametrize("precision", ["bf16", "int8", "nf4"])
def test_a_frozen_weight_multiplies_on_the_card_as_its_dense_values_do(precision: Precision) -> None:
    device = torch.device("cuda")
    torch.manual_seed(0)
    dense = torch.randn(256, 128, dtype=torch.bfloat16)
    weight = freeze(dense, precision, "bf16", device)
    values = weight.materialize(torch.empty(256, 128, dtype=torch.bfloat16, device=device)).clone()
    x = torch.randn(7, 128, dtype=torch.bfloat16, device=device)
    torch.testing.assert_close(weight.matmul(x), x @ values.t(), rtol=2e-2, atol=2e-1)


def test_packed_attention_on_the_card_equals_the_cpu() -> None:
    lengths = [5, 17, 42]
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, sum(lengths), 32) for heads in (4, 2, 2))
    module = torch.nn.Identity()
    with packed(lengths):
        expected, _ = packed_attention(module, query, key, value)
    with packed(lengths):
        found, _ = packed_attention(module, *(part.cuda().bfloat16() for part in (query, key, value)))
    torch.testing.assert_close(found.float().cpu(), expected, rtol=3e-2, atol=3e-2)


def test_a_run_keeps_its_predicted_peak(alpaca_file: Path) -> None:
    arguments = ["train", "smollm2-135m", str(alpaca_file), "--name", "gpu", "--gpu", "0", "--max-steps", "4", "--json"]
    done = subprocess.run([sys.executable, "-m", "edgepeft", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    finished = json.loads(done.stdout.splitlines()[-1])
    predicted, measured = finished["predicted_peak_bytes"], finished["measured_peak_bytes"]
    print(
        f"predicted {predicted / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB ({measured / predicted - 1:+.1%})"
    )
    assert measured <= 1.05 * predicted
