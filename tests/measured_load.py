"""What a process holds while it loads a base in NF4, measured in one of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tiny import write_tiny_model

_MEASURE = """
import json, sys
from pathlib import Path
import torch
from edgepeft.engine.model.load import load_model
from edgepeft.models.store import ensure_model

def held(*names):
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(names)) * 1024

def anonymous():
    return held("RssAnon", "RssShmem")

def load(entry, **options):
    return load_model(entry, precision="nf4", compute_dtype="bf16", device=torch.device("cpu"), **options)

entry = ensure_model(sys.argv[1])
# Libraries and kernels that a first load brings are there before the one that is measured.
load(ensure_model(sys.argv[2]))
before, mapped, peak, peak_mapped = anonymous(), held("RssFile"), 0, 0
def watch(what, fraction):
    global peak, peak_mapped
    peak, peak_mapped = max(peak, anonymous()), max(peak_mapped, held("RssFile"))
loaded = load(entry, progress=watch)
print(json.dumps([sum(loaded.bytes_by_category().values()), peak - before, anonymous() - before, peak_mapped - mapped]))
"""


class MeasuredLoad(NamedTuple):
    """Bytes; what is measured is counted from before the load."""

    held: int
    """Of the loaded base's tensors."""
    peak: int
    """Of anonymous memory while it loads."""
    after: int
    """Of anonymous memory when it is loaded."""
    peak_mapped: int
    """Of mapped files while it loads."""


def write_wide_model(folder: Path) -> Path:
    """A base that is nearly all linears, large enough to tell its memory from the process's."""
    return write_tiny_model(
        folder,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=6,
        num_attention_heads=16,
        head_dim=64,
    )


def measure_load(model: Path, warm_up: Path) -> MeasuredLoad:
    """Loads `model` in a fresh process that has loaded `warm_up` before."""
    command = [sys.executable, "-c", _MEASURE, str(model), str(warm_up)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return MeasuredLoad(*json.loads(done.stdout))
