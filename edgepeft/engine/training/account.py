"""What a run's memory really was: by category and with its place, comparable with the prediction."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from edgepeft.engine.model.load import LoadedModel
from edgepeft.engine.training.measured import MeasuredPeak, higher
from edgepeft.engine.training.memory import Known, MemoryGauge, resident_bytes
from edgepeft.engine.training.update import AdapterUpdate
from edgepeft.memory.breakdown import Breakdown, Category
from edgepeft.runs.events import MemoryMeasured

_SAMPLE_SECONDS = 0.01


class MemoryAccount:
    """The gauge of this process, its resident memory, and on a card what it holds beside tensors.

    Args:
        device: of the run.
        uuid: of the card; `cpu` where there is none.
        predicted: the plan's ledger.
        limit_bytes: see `MemoryGauge`.
    """

    def __init__(self, device: torch.device, uuid: str, predicted: Breakdown, limit_bytes: int | None) -> None:
        self._device = device
        self._uuid = uuid
        self._context_bytes = predicted.peak.bytes_by_category.get("device context", 0)
        self._rss_before = resident_bytes()
        self._rss_peak = self._rss_before
        self._loaded: LoadedModel | None = None
        self._update: AdapterUpdate | None = None
        self.gauge = MemoryGauge(device, limit_bytes=limit_bytes, known=self.known)

    def follow(self, loaded: LoadedModel, update: AdapterUpdate) -> None:
        """Says what is in memory from now on."""
        self._loaded, self._update = loaded, update

    def known(self) -> Known:
        """The tensors that outlive a micro-batch, by what they are; none before the model is loaded."""
        if self._loaded is None or self._update is None:
            return {}
        return self._loaded.tensors_by_category() | self._update.tensors_by_category()

    def live_bytes(self) -> int:
        """Live tensor bytes between two micro-batches: what outlives them."""
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        workspace = self._loaded.workspace.nbytes if self._loaded is not None else 0
        return workspace + sum(tensor.nbytes for tensors in self.known().values() for tensor in tensors)

    def read_resident(self) -> int | None:
        """Resident bytes now; they count for the peak."""
        now = resident_bytes()
        self._rss_peak = higher(self._rss_peak, now)
        return now

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Within it, resident memory is read all the time: its peak lies inside a step, not behind it."""
        ended = threading.Event()

        def sample() -> None:
            while not ended.wait(_SAMPLE_SECONDS):
                self.read_resident()

        thread = threading.Thread(target=sample, name="resident memory", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def peak(self) -> MeasuredPeak:
        """The highest so far in this process."""
        gauge, rss = self.gauge, None
        if self._rss_peak is not None and self._rss_before is not None:
            rss = max(0, self._rss_peak - self._rss_before)
        if self._device.type == "cpu":
            return MeasuredPeak(gauge.peak_bytes, dict(gauge.by_category), gauge.place, gauge.peak_bytes, None, rss)
        reserved = gauge.reserved_bytes or 0
        # What was not followed storage by storage is the allocator's: rounding, gaps, libraries' workspaces.
        beside: dict[Category, int] = {
            "allocator slack": max(0, reserved - sum(gauge.by_category.values())),
            "device context": self._context_bytes,
        }
        by_category = gauge.by_category | beside
        return MeasuredPeak(sum(by_category.values()), by_category, gauge.place, gauge.peak_bytes, reserved, rss)

    def event(self, step: int, phase: Literal["load", "train step", "evaluation", "save"]) -> MemoryMeasured:
        """The peak as an event."""
        self._read_context()
        found = self.peak()
        return MemoryMeasured(
            step=step,
            phase=phase,
            live_bytes=self.live_bytes(),
            peak_bytes=found.peak_bytes,
            reserved_bytes=found.reserved_bytes,
            rss_bytes=self.read_resident(),
            by_category={name: size for name, size in found.by_category.items() if size},
            place=found.place,
        )

    def _read_context(self) -> None:
        """What this process holds of the card beside the allocator's memory; as planned where nobody tells."""
        if self._device.type == "cuda" and (held := card_bytes_of_process(self._uuid)) is not None:
            self._context_bytes = max(0, held - torch.cuda.memory_reserved(self._device))


def card_bytes_of_process(uuid: str) -> int | None:
    """What NVML says that this process holds of a card; None where it does not say, such as on Windows."""
    from edgepeft.hardware.nvml import read_gpus

    for card in read_gpus():
        if card.uuid == uuid:
            for process in card.processes:
                if process.pid == os.getpid():
                    return process.used_bytes
    return None
