"""A sound machine, recorded: tests change one thing of it and look what is said."""

from __future__ import annotations

from edgepeft.hardware.packages import Packages
from edgepeft.hardware.snapshot import CpuFlags, GpuSnapshot, HostSnapshot, PcieLink
from edgepeft.units import GIB, MIB

HOST = HostSnapshot(
    system="Linux 6.8",
    machine="x86_64",
    cpu="AMD Ryzen 7 7800X3D 8-Core Processor",
    physical_cores=8,
    logical_cores=16,
    flags=CpuFlags(avx2=True, avx512=True, avx512_bf16=True, amx_bf16=False),
    ram_total_bytes=62 * GIB,
    ram_available_bytes=50 * GIB,
    ram_limit_bytes=None,
    swap_total_bytes=8 * GIB,
    swap_used_bytes=0,
    disk_path="/home/ada",
    disk_free_bytes=400 * GIB,
    nvidia_device=True,
)
CARD = GpuSnapshot(
    index=0,
    uuid="GPU-5f3c2a1e-9b7d-4c1a-8e02-77f1d0a9b3c4",
    name="NVIDIA GeForce RTX 4090",
    total_bytes=24564 * MIB,
    used_bytes=100 * MIB,
    free_bytes=24464 * MIB,
    driver="580.82.07",
    cuda_driver=(13, 0),
    capability=(8, 9),
    pcie=PcieLink(1, 4, 16, 16),
    display_active=False,
)
PACKAGES = Packages(
    python="3.12.3",
    torch="2.13.0",
    torch_cuda="13.0",
    transformers="5.23.0",
    bitsandbytes="0.50.2",
    bitsandbytes_cuda=((11, 8), (12, 6), (12, 8), (13, 0)),
)
