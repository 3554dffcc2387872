"""Probes: a recorded NVML, recorded system files, and the sampler thread."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from edgepeft.hardware import nvml
from edgepeft.hardware.accelerators import read_accelerators
from edgepeft.hardware.host import existing_parent, flags_from_cpuinfo, has_nvidia_device, read_cgroup_memory, read_host
from edgepeft.hardware.packages import cuda_libraries, read_assignments, read_packages
from edgepeft.hardware.process_names import name_from_command, process_name
from edgepeft.hardware.sampler import Sampler
from edgepeft.units import GIB, MIB


@pytest.fixture
def recorded_nvml(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """NVML answers as a driver does for a card with a desktop; a test may replace an answer by an error."""
    answers: dict[str, Any] = {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlDeviceGetCount": 1,
        "nvmlSystemGetDriverVersion": "580.82.07",
        "nvmlSystemGetCudaDriverVersion_v2": 13000,
        "nvmlDeviceGetHandleByIndex": "handle",
        "nvmlDeviceGetUUID": "GPU-5f3c",
        "nvmlDeviceGetName": "NVIDIA GeForce RTX 4090",
        "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=24564 * MIB, used=2000 * MIB, free=22564 * MIB),
        "nvmlDeviceGetPowerUsage": 61400,
        "nvmlDeviceGetEnforcedPowerLimit": 450000,
        "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=12, memory=3),
        "nvmlDeviceGetCudaComputeCapability": (8, 9),
        "nvmlDeviceGetTemperature": 48,
        "nvmlDeviceGetCurrPcieLinkGeneration": 1,
        "nvmlDeviceGetMaxPcieLinkGeneration": 4,
        "nvmlDeviceGetCurrPcieLinkWidth": 16,
        "nvmlDeviceGetMaxPcieLinkWidth": 16,
        "nvmlDeviceGetDisplayActive": 1,
        "nvmlDeviceGetComputeRunningProcesses": [SimpleNamespace(pid=999999991, usedGpuMemory=900 * MIB)],
        "nvmlDeviceGetGraphicsRunningProcesses": [
            SimpleNamespace(pid=999999991, usedGpuMemory=None),
            SimpleNamespace(pid=999999992, usedGpuMemory=500 * MIB),
        ],
    }

    def install(name: str) -> None:
        def answer(*_: Any) -> Any:
            value = answers[name]
            if isinstance(value, pynvml.NVMLError):
                raise value
            return value

        monkeypatch.setattr(pynvml, name, answer)

    for name in answers:
        install(name)
    return answers


def test_a_card_is_read_whole(recorded_nvml: dict[str, Any]) -> None:
    cards, reason = nvml.probe_gpus()
    assert reason == ""
    (card,) = cards
    assert (card.name, card.capability, card.driver, card.cuda_driver) == (
        "NVIDIA GeForce RTX 4090",
        (8, 9),
        "580.82.07",
        (13, 0),
    )
    assert card.total_bytes == 24564 * MIB
    assert (card.power_w, card.power_limit_w, card.busy_fraction) == (61.4, 450.0, 0.12)
    assert (card.pcie.generation, card.pcie.max_generation) == (1, 4)
    assert card.display_active is True
    assert card.bf16 is True
    assert [(process.kind, process.used_bytes) for process in card.processes] == [
        ("both", 900 * MIB),
        ("graphics", 500 * MIB),
    ]


def test_a_missing_sensor_is_none_and_not_an_error(recorded_nvml: dict[str, Any]) -> None:
    for name in list(recorded_nvml):
        if name.startswith("nvmlDeviceGet") and name not in ("nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex"):
            recorded_nvml[name] = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
    (card,) = nvml.read_gpus()
    assert card.name == "NVIDIA card"
    for value in (card.total_bytes, card.power_w, card.temperature_c, card.capability, card.display_active, card.bf16):
        assert value is None
    assert card.processes == ()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "no NVIDIA driver is installed"),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "updated"),
        (pynvml.NVML_ERROR_UNKNOWN, "does not answer"),
    ],
)
def test_no_driver_is_a_reason(recorded_nvml: dict[str, Any], code: int, words: str) -> None:
    recorded_nvml["nvmlInit"] = pynvml.NVMLError(code)
    cards, reason = nvml.probe_gpus()
    assert cards == []
    assert words in reason


def test_a_driver_without_cards_and_a_lost_card(recorded_nvml: dict[str, Any]) -> None:
    recorded_nvml["nvmlDeviceGetHandleByIndex"] = pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
    assert nvml.probe_gpus() == ([], "the NVIDIA driver works and sees no card")


def test_our_own_workers_are_called_by_their_name() -> None:
    command = ["/v/bin/python", "-m", "edgepeft.engine.workers.train", "/runs/a-1"]
    assert name_from_command(command, "python") == "edgepeft train"
    assert name_from_command(["/usr/bin/Xorg", "vt2"], "Xorg") == "Xorg"
    assert process_name(999999991) == "process 999999991"


def test_cpu_flags_of_linux() -> None:
    flags = flags_from_cpuinfo("processor\t: 0\nflags\t\t: fpu avx2 avx512f amx_bf16\n")
    assert (flags.avx2, flags.avx512, flags.avx512_bf16, flags.amx_bf16) == (True, True, False, True)
    assert flags_from_cpuinfo("Features\t: fp asimd\n").avx2 is None


def test_this_host_tells_sound_figures() -> None:
    host = read_host()
    assert 0 < host.ram_available_bytes <= host.ram_total_bytes
    assert host.logical_cores >= 1
    assert host.disk_free_bytes > 0
    assert Path(host.disk_path).is_dir()


def test_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    assert existing_parent(tmp_path / "a/b/c") == tmp_path
    assert existing_parent(tmp_path) == tmp_path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_the_lowest_limit_on_the_way_up_counts(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    membership = write(tmp_path / "self", "0::/slice/unit\n")
    write(root / "slice/unit/memory.max", "max\n")
    write(root / "slice/memory.max", f"{8 * GIB}\n")
    write(root / "slice/memory.current", f"{3 * GIB}\n")
    assert read_cgroup_memory(root, membership) == (8 * GIB, 3 * GIB)
    write(root / "slice/unit/memory.max", f"{4 * GIB}\n")
    write(root / "slice/unit/memory.current", f"{GIB}\n")
    assert read_cgroup_memory(root, membership) == (4 * GIB, GIB)


def test_control_groups_of_version_1_and_none(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    membership = write(tmp_path / "self", "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n")
    assert read_cgroup_memory(root, membership) == (None, None)
    # Inside a container the named folder is the host's, and the limit lies at the root.
    write(root / "memory/memory.limit_in_bytes", f"{2 * GIB}\n")
    write(root / "memory/memory.usage_in_bytes", f"{GIB}\n")
    assert read_cgroup_memory(root, membership) == (2 * GIB, GIB)
    assert read_cgroup_memory(root, tmp_path / "absent") == (None, None)


def test_an_nvidia_card_on_the_bus(tmp_path: Path) -> None:
    write(tmp_path / "0000:00:1f.0/vendor", "0x8086\n")
    write(tmp_path / "0000:00:1f.0/class", "0x030000\n")
    write(tmp_path / "0000:01:00.1/vendor", "0x10de\n")
    write(tmp_path / "0000:01:00.1/class", "0x040300\n")
    assert not has_nvidia_device(tmp_path)
    write(tmp_path / "0000:01:00.0/vendor", "0x10de\n")
    write(tmp_path / "0000:01:00.0/class", "0x030000\n")
    assert has_nvidia_device(tmp_path)
    assert not has_nvidia_device(tmp_path / "absent")


def test_amd_and_intel_by_the_kernel(tmp_path: Path) -> None:
    write(tmp_path / "card0/device/vendor", "0x1002\n")
    write(tmp_path / "card0/device/product_name", "AMD Radeon RX 7900 XTX\n")
    write(tmp_path / "card0/device/mem_info_vram_total", f"{24 * GIB}\n")
    write(tmp_path / "card0-DP-1/device/vendor", "0x1002\n")
    write(tmp_path / "card1/device/vendor", "0x8086\n")
    write(tmp_path / "card1/device/device", "0x9a49\n")
    write(tmp_path / "card2/device/vendor", "0x10de\n")
    found = read_accelerators(tmp_path)
    assert [(device.vendor, device.name, device.memory_bytes) for device in found] == [
        ("AMD", "AMD Radeon RX 7900 XTX", 24 * GIB),
        ("Intel", "Intel 0x9a49", None),
    ]
    assert read_accelerators(tmp_path / "absent") == []


def test_torch_is_read_as_text() -> None:
    source = """
from typing import Optional
__version__ = '2.13.0+cu130'
cuda: Optional[str] = '13.0'
hip: Optional[str] = None
boom = 1 / 0
"""
    assert read_assignments(source) == {"__version__": "2.13.0+cu130", "cuda": "13.0"}
    assert read_assignments("not python (") == {}


def test_cuda_libraries_of_bitsandbytes(tmp_path: Path) -> None:
    for device in ("cuda128.so", "cuda130.dll", "cpu.so", "rocm72.so"):
        (tmp_path / f"libbitsandbytes_{device}").touch()
    assert cuda_libraries(tmp_path) == ((12, 8), (13, 0))
    assert cuda_libraries(None) == ()


def test_packages_of_this_python() -> None:
    packages = read_packages()
    assert packages.torch is not None
    assert packages.torch.startswith("2.")
    assert packages.bitsandbytes is not None


def test_the_sampler_keeps_the_latest_value() -> None:
    samples = iter(range(1000))
    reached = threading.Event()

    def read() -> int:
        value = next(samples)
        if value == 3:
            reached.set()
        return value

    with Sampler(read, interval_seconds=0.001) as sampler:
        assert sampler.wait(5) is not None
        assert reached.wait(5)
    assert sampler.latest is not None
    assert sampler.latest >= 2
    assert sampler.age_seconds is not None


def test_a_failing_sensor_is_raised_where_it_is_looked_at() -> None:
    def read() -> int:
        raise OSError("gone")

    with Sampler(read, interval_seconds=0.001) as sampler, pytest.raises(OSError, match="gone"):
        sampler.wait(5)
