"""Packing samples into micro-batches by tokens."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], cap: int) -> list[list[int]]:
    """Groups samples so that each group holds at most `cap` tokens, by best fit decreasing.

    The longest sample is placed first, each into the fullest group that still has room for it (Johnson 1973: at most
    11/9 of the fewest groups, and a few more). A sample longer than the cap forms a group of its own.

    Args:
        lengths: tokens of each sample.
        cap: tokens of one group at the most.

    Returns:
        Groups of indices into `lengths`, each index exactly once. The result depends on nothing but the arguments;
        groups stand in the order in which they were opened, indices in a group in ascending order.

    Raises:
        ValueError: `cap` is below 1 or a length is negative.
    """
    if cap < 1:
        raise ValueError(f"cap must be at least 1, not {cap}")
    groups: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, group), ascending
    for index in sorted(range(len(lengths)), key=lambda index: (-int(lengths[index]), index)):
        length = int(lengths[index])
        if length < 0:
            raise ValueError(f"length {length} of sample {index} is negative")
        place = bisect_left(room, (length, -1))
        if place < len(room):
            left, group = room.pop(place)
            groups[group].append(index)
            insort(room, (left - length, group))
            continue
        groups.append([index])
        if length <= cap:
            insort(room, (cap - length, len(groups) - 1))
    return [sorted(group) for group in groups]
