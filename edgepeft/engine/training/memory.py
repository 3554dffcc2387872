"""What training really takes: live tensor bytes, the CUDA allocator's counters, and the process's resident memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from edgepeft.engine.ledger import LiveBytes
from edgepeft.memory.breakdown import Category

Known = Mapping[Category, list[Tensor]]
"""Tensors that outlive a micro-batch, by what they are."""


class Size(NamedTuple):
    """A micro-batch, as far as its memory depends on it."""

    tokens: int
    longest: int
    """Tokens of its longest sample."""
    rows: int
    """Trained rows whose logits exist at one time."""
    gradients: bool = False
    """Whether there are gradients before it."""
    trained: int = 0
    """Tensors that get a gradient; more of them while layers are unfrozen."""
    samples: int = 0
    """Of it, where something stands before each that needs memory by itself; else 0."""


NEAR_LARGEST = 0.97
"""Predicted need, as a share of the largest that was watched, from which a micro-batch is watched too."""


class MemoryGauge:
    """The highest memory that training took, measured without slowing down micro-batches that cannot raise it.

    On the CPU a micro-batch is watched when in some respect it is larger than each one watched before, unless it is
    predicted to need less.

    Args:
        device: of the run.
        limit_bytes: live bytes above which a watched micro-batch ends with `BudgetExceeded`; on CUDA the allocator
            keeps the limit instead, see `training.limit`.
        known: the tensors that outlive a micro-batch; asked anew at each watch, since optimizer state comes later.
    """

    def __init__(
        self, device: torch.device, *, limit_bytes: int | None = None, known: Callable[[], Known] | None = None
    ) -> None:
        self.device = device
        self._limit_bytes = limit_bytes if device.type == "cpu" else None
        self._known = known or (lambda: {})
        self.predict: Callable[[Size], int] | None = None
        """Tells what a micro-batch needs, where that is known; only comparisons count."""
        self._watched: list[Size] = []
        self._most_predicted = 0
        self._evaluated: list[Size] = []
        self._peak_of_categories = 0
        self.live_bytes = 0
        self.peak_bytes = 0
        self.by_category: dict[Category, int] = {}
        """Live bytes at the highest point that was followed storage by storage."""
        self.place = ""
        """Where that point was."""

    @property
    def reserved_bytes(self) -> int | None:
        """What the CUDA allocator holds from the driver at most; None on the CPU."""
        return torch.cuda.max_memory_reserved(self.device) if self.device.type == "cuda" else None

    def wants(self, size: Size) -> bool:
        """Whether a training micro-batch is worth watching: none that was watched needs as much."""
        if self.device.type != "cpu":
            return True
        if _covered(size, self._watched):
            return False
        return self.predict is None or self.predict(size) >= NEAR_LARGEST * self._most_predicted

    def wants_evaluation(self, size: Size) -> bool:
        """The same for a micro-batch of an evaluation."""
        return self.device.type != "cpu" or not _covered(size, self._evaluated)

    @contextmanager
    def watch(
        self, size: Size | None = None, *, evaluation: bool = False, itemised: bool = False
    ) -> Iterator[LiveBytes | None]:
        """Measures what happens inside; gives the ledger that follows it, if one does.

        Args:
            size: of the micro-batch, which need not be watched again once it went well; None where there is none.
            evaluation: whether it belongs to an evaluation.
            itemised: on CUDA, too, follow storage by storage: slower, but by category.
        """
        on_cpu = self.device.type == "cpu"
        if not on_cpu and not itemised:
            yield None
            self._read_counters()
            return
        ledger = LiveBytes(self.device, known=self._known(), limit_bytes=self._limit_bytes)
        try:
            with ledger:
                yield ledger
            if size is not None and evaluation:
                self._evaluated = _with(size, self._evaluated)
            elif size is not None:
                self._watched = _with(size, self._watched)
                if self.predict is not None:
                    self._most_predicted = max(self._most_predicted, self.predict(size))
        finally:
            if ledger.peak_bytes > self._peak_of_categories:
                self._peak_of_categories = ledger.peak_bytes
                self.by_category = {name: size for name, size in ledger.peak_by_category.items() if size}
                self.place = ledger.peak_place
            if on_cpu:
                self.live_bytes = ledger.live_bytes
                self.peak_bytes = max(self.peak_bytes, ledger.peak_bytes)
            else:
                self._read_counters()

    def _read_counters(self) -> None:
        self.live_bytes = torch.cuda.memory_allocated(self.device)
        self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated(self.device))


def _covered(size: Size, sizes: list[Size]) -> bool:
    """Whether one of `sizes` is at least as large in every respect."""
    return any(all(more >= less for more, less in zip(other, size, strict=True)) for other in sizes)


def _with(size: Size, sizes: list[Size]) -> list[Size]:
    """`sizes` and one more, without those that it covers."""
    return [size, *(other for other in sizes if not _covered(other, [size]))]


def resident_bytes() -> int | None:
    """Anonymous and shared resident bytes of this process; files that are only mapped do not count.

    None where the system does not tell.
    """
    status = Path("/proc/self/status")
    if status.exists():
        found = 0
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name in ("RssAnon", "RssShmem"):
                found += int(value.split()[0]) * 1024
        return found or None
    import psutil

    return int(psutil.Process().memory_info().rss)
