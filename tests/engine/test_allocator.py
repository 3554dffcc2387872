"""The model of the CUDA caching allocator: scenarios computed by hand, and what holds for any trace."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepeft.engine.simulate.allocator import CachingAllocator
from edgepeft.units import MIB


def after(expandable: bool, *sizes: int) -> CachingAllocator:
    """An allocator in which storages of these bytes were born, with keys from 0 on."""
    allocator = CachingAllocator(expandable)
    for key, size in enumerate(sizes):
        allocator.born(key, size)
    return allocator


@pytest.mark.parametrize("expandable", [False, True])
def test_a_small_tensor_takes_512_bytes_of_a_segment_of_2_mib(expandable: bool) -> None:
    allocator = after(expandable, 1, 513)
    assert allocator.allocated_bytes == 512 + 1024
    assert allocator.reserved_bytes == 2 * MIB


@pytest.mark.parametrize("expandable", [False, True])
def test_an_empty_tensor_takes_nothing(expandable: bool) -> None:
    allocator = after(expandable, 0)
    allocator.died(0)
    assert allocator.peak_reserved_bytes == 0


@pytest.mark.parametrize("expandable", [False, True])
def test_small_and_large_tensors_share_no_segment(expandable: bool) -> None:
    allocator = after(expandable, MIB, MIB + 1)
    assert allocator.reserved_bytes == 2 * MIB + 20 * MIB
    allocator.died(1)
    for key in range(2, 4):  # the second no longer fits beside the first in 2 MiB, nor into the free 20 MiB
        allocator.born(key, MIB)
    assert allocator.reserved_bytes == 4 * MIB + 20 * MIB


def test_from_10_mib_on_a_tensor_gets_its_own_segment_of_whole_2_mib() -> None:
    assert after(False, 10 * MIB - 512).reserved_bytes == 20 * MIB
    assert after(False, 10 * MIB).reserved_bytes == 10 * MIB
    assert after(False, 33 * MIB).reserved_bytes == 34 * MIB


def test_a_rest_of_up_to_1_mib_stays_with_the_large_tensor() -> None:
    assert after(False, 33 * MIB).allocated_bytes == 34 * MIB
    split = after(False, 33 * MIB - 512)
    assert split.allocated_bytes == 33 * MIB - 512
    assert split.reserved_bytes == 34 * MIB


def test_an_expandable_segment_grows_by_pages_of_20_mib_from_the_free_end_of_the_last() -> None:
    allocator = after(True, 15 * MIB)
    assert allocator.reserved_bytes == 20 * MIB
    allocator.born(1, 20 * MIB)  # 5 MiB are free at the end: 15 more are needed, one page
    assert allocator.reserved_bytes == 40 * MIB
    allocator.born(2, 6 * MIB)
    assert allocator.reserved_bytes == 60 * MIB
    assert allocator.allocated_bytes == 41 * MIB


def test_the_smallest_free_block_that_holds_a_request_is_taken() -> None:
    allocator = after(False, 40 * MIB, 30 * MIB, 50 * MIB)
    for key in range(3):
        allocator.died(key)
    allocator.born(3, 29 * MIB)
    held = [size for _, size, taken in allocator.blocks() if taken]
    assert held == [30 * MIB]  # the rest of 1 MiB is not worth splitting off
    allocator.born(4, 31 * MIB)
    allocator.born(5, 41 * MIB)
    assert allocator.reserved_bytes == 120 * MIB


def test_of_free_blocks_the_end_of_an_expandable_segment_is_taken_last() -> None:
    allocator = after(True, 8 * MIB, 2 * MIB, 2 * MIB)  # 8 MiB are free at the end
    allocator.died(0)
    allocator.born(3, 5 * MIB)
    assert min(start for start, size, taken in allocator.blocks() if taken and size == 5 * MIB) == 0


def test_freed_neighbours_become_one_block() -> None:
    allocator = after(False, 4 * MIB, 4 * MIB, 4 * MIB)
    for key in (0, 2, 1):
        allocator.died(key)
    assert [size for _, size, _ in allocator.blocks()] == [20 * MIB]


def test_growing_sizes_strand_segments_that_an_expandable_one_reuses() -> None:
    peaks = []
    for expandable in (False, True):
        allocator = CachingAllocator(expandable)
        for step in range(8):  # a batch that is a little longer every time
            size = (64 + 3 * step) * MIB
            allocator.born(0, size)
            allocator.born(1, size)
            allocator.died(0)
            allocator.died(1)
        peaks.append(allocator.peak_reserved_bytes)
    fixed, expandable_peak = peaks
    assert fixed > 4 * expandable_peak
    assert expandable_peak == 180 * MIB  # 2 · 85 MiB in pages of 20


def test_emptying_the_cache_gives_back_whole_segments_only() -> None:
    allocator = after(False, 12 * MIB, 4 * MIB, 4 * MIB)
    allocator.died(0)
    allocator.died(1)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 20 * MIB


def test_pages_that_were_given_back_are_mapped_again_before_the_segment_grows() -> None:
    allocator = after(True, 50 * MIB, 10 * MIB)  # three pages
    allocator.died(0)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 20 * MIB
    assert allocator.peak_reserved_bytes == 60 * MIB
    allocator.born(2, 30 * MIB)
    assert allocator.reserved_bytes == 60 * MIB
    allocator.born(3, 20 * MIB)  # the rest of the pages and 10 MiB of the third
    assert allocator.reserved_bytes == 60 * MIB


def test_a_key_is_its_storages_own_until_it_dies() -> None:
    allocator = after(True, 100)
    with pytest.raises(ValueError, match="alive"):
        allocator.born(0, 100)
    allocator.died(0)
    with pytest.raises(KeyError):
        allocator.died(0)


SIZES = st.one_of(
    st.integers(0, 4096), st.integers(0, 2 * MIB), st.integers(MIB, 24 * MIB), st.integers(10 * MIB, 300 * MIB)
)
EVENTS = st.lists(st.one_of(SIZES, st.tuples(st.integers(0, 1 << 20)), st.none()), max_size=120)
"""A number is a birth of that size, a tuple the death of one of the living, None an emptied cache."""


def replay(allocator: CachingAllocator, events: list[int | tuple[int] | None]) -> dict[int, int]:
    """Lets the events happen, looking at everything after each; returns the sizes of what lives at the end."""
    living: dict[int, int] = {}
    for key, event in enumerate(events):
        if isinstance(event, int):
            allocator.born(key, event)
            living[key] = event
        elif event is None:
            allocator.empty_cache()
        elif living:
            chosen = sorted(living)[event[0] % len(living)]
            allocator.died(chosen)
            del living[chosen]
        look(allocator, living)
    return living


def look(allocator: CachingAllocator, living: dict[int, int]) -> None:
    """Blocks lie side by side without overlapping, and the figures are theirs."""
    blocks = allocator.blocks()
    for (start, size, _), (following, _, _) in pairwise(blocks):
        assert start + size <= following
    assert all(size > 0 and size % 512 == 0 for _, size, _ in blocks)
    assert sum(size for _, size, _ in blocks) == allocator.reserved_bytes
    assert sum(size for _, size, held in blocks if held) == allocator.allocated_bytes
    assert sum(held for _, _, held in blocks) == sum(size > 0 for size in living.values())
    assert sum(living.values()) <= allocator.allocated_bytes <= allocator.reserved_bytes
    assert allocator.allocated_bytes <= allocator.peak_allocated_bytes <= allocator.peak_reserved_bytes


@given(EVENTS, st.booleans())
def test_in_any_trace_blocks_never_overlap_and_make_up_what_is_reserved(
    events: list[int | tuple[int] | None], expandable: bool
) -> None:
    replay(CachingAllocator(expandable), events)


@given(EVENTS, st.booleans())
def test_memory_of_the_dead_stays_cached_until_the_cache_is_emptied(
    events: list[int | tuple[int] | None], expandable: bool
) -> None:
    allocator = CachingAllocator(expandable)
    living = replay(allocator, [event for event in events if event is not None])
    reserved = allocator.reserved_bytes
    for key in living:
        allocator.died(key)
    assert allocator.allocated_bytes == 0
    assert allocator.reserved_bytes == reserved == allocator.peak_reserved_bytes
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0
    assert allocator.blocks() == []


@given(st.lists(SIZES, min_size=1, max_size=60))
def test_what_was_just_freed_serves_the_same_sizes_again(sizes: list[int]) -> None:
    for expandable in (False, True):
        allocator = after(expandable, *sizes)
        reserved = allocator.reserved_bytes
        last = len(sizes) - 1
        allocator.died(last)
        allocator.born(last, sizes[last])
        assert allocator.reserved_bytes == reserved
