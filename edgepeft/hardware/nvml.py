"""NVIDIA cards by NVML. A missing driver is a reason, a missing sensor is None; neither is an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from edgepeft.hardware.process_names import process_name
from edgepeft.hardware.snapshot import GpuProcess, GpuSnapshot, PcieLink, ProcessKind

Value = TypeVar("Value")


def read_gpus() -> list[GpuSnapshot]:
    """Every NVIDIA card in PCI bus order; empty when there is none or no driver answers."""
    return probe_gpus()[0]


def probe_gpus() -> tuple[list[GpuSnapshot], str]:
    """Every NVIDIA card, and why there is none: empty when cards were found."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [], _say(pynvml, error)
    try:
        count: int = pynvml.nvmlDeviceGetCount()
        driver = _text(_read(pynvml, pynvml.nvmlSystemGetDriverVersion))
        cuda = _read(pynvml, pynvml.nvmlSystemGetCudaDriverVersion_v2)
        cuda_driver = None if cuda is None else (cuda // 1000, cuda % 1000 // 10)
        found = [_read_gpu(pynvml, index, driver, cuda_driver) for index in range(count)]
    except pynvml.NVMLError as error:
        return [], _say(pynvml, error)
    finally:
        pynvml.nvmlShutdown()
    cards = [card for card in found if card is not None]
    return cards, "" if cards else "the NVIDIA driver works and sees no card"


class CardSensor:
    """One card, kept open to be asked often."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml = nvml
        self._handle = handle

    def energy_joules(self) -> float | None:
        """Since the driver was loaded; None on cards before Volta."""
        millijoules = _read(self._nvml, self._nvml.nvmlDeviceGetTotalEnergyConsumption, self._handle)
        return None if millijoules is None else millijoules / 1000

    def power_watts(self) -> float | None:
        """Now; the mean of the last second on newer cards."""
        milliwatts = _read(self._nvml, self._nvml.nvmlDeviceGetPowerUsage, self._handle)
        return None if milliwatts is None else milliwatts / 1000


@contextmanager
def open_card(uuid: str) -> Iterator[CardSensor | None]:
    """Within it, the card of this UUID can be asked; None where no driver answers or it has no such card."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        handle = _read(pynvml, pynvml.nvmlDeviceGetHandleByUUID, uuid)
        yield None if handle is None else CardSensor(pynvml, handle)
    finally:
        pynvml.nvmlShutdown()


def _read_gpu(nvml: Any, index: int, driver: str | None, cuda_driver: tuple[int, int] | None) -> GpuSnapshot | None:
    handle = _read(nvml, nvml.nvmlDeviceGetHandleByIndex, index)
    if handle is None:
        # A card that another user owns exclusively, or that fell off the bus: it cannot be used either.
        return None

    def ask(function: Callable[..., Any], *arguments: Any) -> Any:
        return _read(nvml, function, handle, *arguments)

    memory = ask(nvml.nvmlDeviceGetMemoryInfo)
    milliwatts = ask(nvml.nvmlDeviceGetPowerUsage)
    limit_milliwatts = ask(nvml.nvmlDeviceGetEnforcedPowerLimit)
    utilisation = ask(nvml.nvmlDeviceGetUtilizationRates)
    capability = ask(nvml.nvmlDeviceGetCudaComputeCapability)
    display = ask(nvml.nvmlDeviceGetDisplayActive)
    return GpuSnapshot(
        index=index,
        uuid=_text(ask(nvml.nvmlDeviceGetUUID)) or "",
        name=_text(ask(nvml.nvmlDeviceGetName)) or "NVIDIA card",
        total_bytes=None if memory is None else int(memory.total),
        used_bytes=None if memory is None else int(memory.used),
        free_bytes=None if memory is None else int(memory.free),
        processes=_read_processes(nvml, handle),
        driver=driver,
        cuda_driver=cuda_driver,
        capability=None if capability is None else (int(capability[0]), int(capability[1])),
        power_w=None if milliwatts is None else milliwatts / 1000,
        power_limit_w=None if limit_milliwatts is None else limit_milliwatts / 1000,
        temperature_c=ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
        busy_fraction=None if utilisation is None else utilisation.gpu / 100,
        pcie=PcieLink(
            generation=ask(nvml.nvmlDeviceGetCurrPcieLinkGeneration),
            max_generation=ask(nvml.nvmlDeviceGetMaxPcieLinkGeneration),
            lanes=ask(nvml.nvmlDeviceGetCurrPcieLinkWidth),
            max_lanes=ask(nvml.nvmlDeviceGetMaxPcieLinkWidth),
        ),
        display_active=None if display is None else bool(display),
    )


def _read_processes(nvml: Any, handle: Any) -> tuple[GpuProcess, ...]:
    found: dict[int, GpuProcess] = {}
    kinds: tuple[tuple[ProcessKind, Any], ...] = (
        ("compute", nvml.nvmlDeviceGetComputeRunningProcesses),
        ("graphics", nvml.nvmlDeviceGetGraphicsRunningProcesses),
    )
    for kind, function in kinds:
        for entry in _read(nvml, function, handle) or ():
            known = found.get(entry.pid)
            # NVML lists a process that does both twice, each time with the whole of its memory.
            sizes = [size for size in (entry.usedGpuMemory, known.used_bytes if known else None) if size is not None]
            found[entry.pid] = GpuProcess(
                pid=int(entry.pid),
                name=known.name if known else process_name(int(entry.pid)),
                kind="both" if known else kind,
                used_bytes=max(sizes, default=None),
            )
    return tuple(sorted(found.values(), key=lambda process: (-(process.used_bytes or 0), process.pid)))


def _read(nvml: Any, function: Callable[..., Value], *arguments: Any) -> Value | None:
    """The sensor's value, or None where this card or driver does not have it."""
    try:
        return function(*arguments)
    except nvml.NVMLError:
        return None


def _text(value: str | bytes | None) -> str | None:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _say(nvml: Any, error: Any) -> str:
    reasons = {
        nvml.NVML_ERROR_LIBRARY_NOT_FOUND: "no NVIDIA driver is installed",
        nvml.NVML_ERROR_DRIVER_NOT_LOADED: "the NVIDIA driver is installed but not loaded",
        nvml.NVML_ERROR_NO_PERMISSION: "no permission to talk to the NVIDIA driver",
        nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "the NVIDIA driver was updated and the old one still runs",
        nvml.NVML_ERROR_GPU_IS_LOST: "a card does not answer any more",
    }
    return reasons.get(error.value, f"the NVIDIA driver does not answer: {error}")
