"""The device of a run: which one, its name, and the threads of the CPU."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import psutil
import torch

from edgepeft.errors import DeviceUnusable

_PACKAGES = ("edgepeft", "torch", "transformers", "bitsandbytes", "accelerate", "safetensors", "tokenizers")


def training_device(planned: str, offered: torch.device) -> torch.device:
    """The torch device of a plan.

    Args:
        planned: `cpu`, or the UUID of the one card that this process may see.
        offered: what accelerate chose.

    Raises:
        DeviceUnusable: a card was planned and torch sees none.
    """
    if planned == "cpu":
        return torch.device("cpu")
    if offered.type != "cuda":
        raise DeviceUnusable(
            f"the card {planned} cannot be used by torch {torch.__version__}",
            hint="See what is wrong with `edgepeft doctor`, or use --gpu cpu",
        )
    return offered


def be_deterministic(device: torch.device) -> None:
    """Lets a card use only kernels that give the same bits each time; an operation that has none then raises.

    `warn_only` would not do: the memory-efficient attention then keeps its faster backward, which adds in any order.
    The CPU is left as it is: its products give the same bits for the same number of threads.
    """
    if device.type != "cuda":
        return
    torch.use_deterministic_algorithms(True, warn_only=False)
    # Filling memory that is written afterwards anyway would only take time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def device_name(device: torch.device) -> str:
    """The card's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"


def use_physical_cores() -> None:
    """One thread for each physical core that this process may use: hyper-threads share the units that products need.

    OMP_NUM_THREADS, where it is set, has been obeyed by torch already and stays.
    """
    if os.environ.get("OMP_NUM_THREADS"):
        return
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, min(psutil.cpu_count(logical=False) or allowed, allowed)))


def package_versions() -> dict[str, str]:
    """What decides the numbers, package → version."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
