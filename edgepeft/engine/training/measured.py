"""The highest memory that was measured, as checkpoints and events carry it."""

from __future__ import annotations

import msgspec

from edgepeft.memory.breakdown import Category


class MeasuredPeak(msgspec.Struct, frozen=True):
    """The highest memory of a run, over all of its processes."""

    peak_bytes: int = 0
    """On the CPU live tensor bytes; on a card all that the process held of it."""
    by_category: dict[Category, int] = {}
    """Adds up to that."""
    place: str = ""
    """Where in the run it was."""
    live_bytes: int = 0
    """Live tensor bytes at their highest."""
    reserved_bytes: int | None = None
    """What the CUDA allocator held at most; None on the CPU."""
    rss_bytes: int | None = None
    """Resident bytes at their highest, without those before the model was loaded; see `resident_bytes`."""

    def with_other(self, other: MeasuredPeak) -> MeasuredPeak:
        """Both taken together."""
        first = self if self.peak_bytes >= other.peak_bytes else other
        return MeasuredPeak(
            peak_bytes=first.peak_bytes,
            by_category=first.by_category,
            place=first.place,
            live_bytes=max(self.live_bytes, other.live_bytes),
            reserved_bytes=higher(self.reserved_bytes, other.reserved_bytes),
            rss_bytes=higher(self.rss_bytes, other.rss_bytes),
        )


def higher(one: int | None, other: int | None) -> int | None:
    """The larger of two figures, of which either may be unknown."""
    return other if one is None else one if other is None else max(one, other)
