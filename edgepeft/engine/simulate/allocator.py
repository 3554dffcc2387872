"""A model of PyTorch's caching allocator for CUDA: from births and deaths of tensors to *reserved* bytes.

It follows the rules of torch 2.13's native allocator with its default settings (c10/cuda/CUDACachingAllocator.cpp,
c10/core/AllocatorConfig.h), for one stream: what is asked for is rounded to 512 bytes and taken from the smallest free
block of its pool that holds it; what is left of that block is split off; freed blocks merge with free neighbours and
are kept. No tensors are needed, so the same trace can be replayed under other settings.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from edgepeft.units import MIB

MIN_BLOCK_BYTES = 512
"""Every request is rounded up to a multiple of it."""
SMALL_BYTES = 1 * MIB
"""Largest request of the pool for small tensors."""
SMALL_SEGMENT_BYTES = 2 * MIB
"""What the pool for small tensors asks the driver for, at a time."""
LARGE_SEGMENT_BYTES = 20 * MIB
"""The same for large tensors below `MIN_OWN_SEGMENT_BYTES`, and the page of their expandable segment."""
MIN_OWN_SEGMENT_BYTES = 10 * MIB
"""From here on, a request that nothing cached can hold gets a segment of its own."""
OWN_SEGMENT_STEP_BYTES = 2 * MIB
"""The size of such a segment is a multiple of it."""
ADDRESS_SPACE_BYTES = LARGE_SEGMENT_BYTES << 25
"""Addresses that an expandable segment may grow into, whole pages; the real one takes 9/8 of the card's memory."""


class _Block:
    """A range of addresses of one segment, and its neighbours there."""

    __slots__ = ("free", "mapped", "next", "pool", "previous", "size", "start")

    def __init__(self, pool: _Pool, start: int, size: int, *, mapped: bool) -> None:
        self.pool = pool
        self.start = start
        self.size = size
        self.mapped = mapped
        self.free = True
        self.previous: _Block | None = None
        self.next: _Block | None = None

    def reach(self) -> int:
        """Bytes it could have if the segment grew into the addresses behind it."""
        after = self.next
        return self.size + (after.size if after is not None and not after.mapped else 0)

    def split(self, size: int) -> _Block:
        """Keeps the first `size` bytes; returns the rest."""
        rest = _Block(self.pool, self.start + size, self.size - size, mapped=self.mapped)
        rest.previous, rest.next = self, self.next
        if self.next is not None:
            self.next.previous = rest
        self.next, self.size = rest, size
        return rest

    def absorb(self, after: _Block) -> None:
        """Takes the block behind it into itself."""
        self.size += after.size
        self.next = after.next
        if after.next is not None:
            after.next.previous = self


class _Pool:
    """The free blocks of one kind of tensors, by size and then by address."""

    def __init__(self, segment_bytes: int, *, split_from: int) -> None:
        self.segment_bytes = segment_bytes
        """Smallest segment, and the page of an expandable one."""
        self.split_from = split_from
        """Least rest of a block that is worth splitting off."""
        self.unmapped: list[_Block] = []
        """Ranges of the expandable segment without memory behind them, by address."""
        self._order: list[tuple[int, int]] = []
        self._blocks: dict[int, _Block] = {}

    def add(self, block: _Block) -> None:
        """Keeps a free block."""
        insort(self._order, (block.size, block.start))
        self._blocks[block.start] = block

    def remove(self, block: _Block) -> None:
        """Forgets a free block."""
        del self._order[bisect_left(self._order, (block.size, block.start))]
        del self._blocks[block.start]

    def best_fit(self, size: int) -> _Block | None:
        """The free block that a request gets, or None. A block that can grow counts with all that it can grow to."""
        at = bisect_left(self._order, (size, 0))
        if at == len(self._order):
            return None
        block = self._blocks[self._order[at][1]]
        while at + 1 < len(self._order):
            larger = self._blocks[self._order[at + 1][1]]
            if larger.reach() >= block.reach():
                break
            block, at = larger, at + 1
        return block

    def free_blocks(self) -> list[_Block]:
        """All of them, smallest first."""
        return [self._blocks[start] for _, start in self._order]


class CachingAllocator:
    """Follows births and deaths of tensors as torch's CUDA allocator would; a `Trace` for `engine.ledger.LiveBytes`.

    Args:
        expandable_segments: whether each pool is one range of addresses that gets pages of memory as it grows; Windows
            has no such mode.
    """

    def __init__(self, expandable_segments: bool) -> None:
        self.expandable_segments = expandable_segments
        self.allocated_bytes = 0
        """In blocks that tensors hold now, rounding included (torch.cuda.memory_allocated)."""
        self.peak_allocated_bytes = 0
        self.reserved_bytes = 0
        """Taken from the driver now, cached blocks included (torch.cuda.memory_reserved)."""
        self.peak_reserved_bytes = 0
        self._small = _Pool(SMALL_SEGMENT_BYTES, split_from=MIN_BLOCK_BYTES)
        self._large = _Pool(LARGE_SEGMENT_BYTES, split_from=MIN_BLOCK_BYTES if expandable_segments else SMALL_BYTES + 1)
        self._held: dict[int, _Block | None] = {}
        self._next_address = 0

    def born(self, key: int, size_bytes: int) -> None:
        """A storage of `size_bytes` was allocated; `key` is its own until it dies. An empty one takes nothing.

        Raises:
            ValueError: the key is held already.
        """
        if key in self._held:
            raise ValueError(f"storage {key} is alive already")
        if size_bytes == 0:
            self._held[key] = None
            return
        size = -(-size_bytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES
        pool = self._small if size <= SMALL_BYTES else self._large
        block = pool.best_fit(size)
        if block is None:
            block = self._grown(pool, size) if self.expandable_segments else self._new_segment(pool, size)
        else:
            pool.remove(block)
        if block.size - size >= pool.split_from:
            pool.add(block.split(size))
        block.free = False
        self._held[key] = block
        self.allocated_bytes += block.size
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)

    def died(self, key: int) -> None:
        """The storage of that key was freed; its memory stays in the cache.

        Raises:
            KeyError: there is no such storage.
        """
        block = self._held.pop(key)
        if block is not None:
            self.allocated_bytes -= block.size
            block.free = True
            self._keep(block)

    def empty_cache(self) -> None:
        """Gives back what no tensor holds: whole segments, or whole pages of an expandable one."""
        for pool in (self._small, self._large):
            for block in pool.free_blocks():
                if self.expandable_segments:
                    self._unmap(block)
                elif block.previous is None and block.next is None:
                    pool.remove(block)
                    self.reserved_bytes -= block.size

    def blocks(self) -> list[tuple[int, int, bool]]:
        """Every block with memory behind it, by address: its start, its bytes, and whether a tensor holds it."""
        held = [(block.start, block.size, True) for block in self._held.values() if block is not None]
        cached = [
            (block.start, block.size, False) for pool in (self._small, self._large) for block in pool.free_blocks()
        ]
        return sorted(held + cached)

    # Segments ------------------------------------------------------------------------------------------------------

    def _reserve(self, size: int) -> None:
        self.reserved_bytes += size
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)

    def _new_segment(self, pool: _Pool, size: int) -> _Block:
        if size >= MIN_OWN_SEGMENT_BYTES:
            segment = -(-size // OWN_SEGMENT_STEP_BYTES) * OWN_SEGMENT_STEP_BYTES
        else:
            segment = pool.segment_bytes
        block = _Block(pool, self._next_address, segment, mapped=True)
        self._next_address += segment
        self._reserve(segment)
        return block

    def _grown(self, pool: _Pool, size: int) -> _Block:
        """A block of at least `size` at the lowest address where pages can be put; it is in no pool."""
        block = self._growable(pool, size)
        if not block.mapped:
            block = self._map(block, min(size, block.size))
        while block.size < size:
            after = block.next
            assert after is not None
            block = self._map(after, min(size - block.size, after.size))
        pool.remove(block)
        return block

    def _growable(self, pool: _Pool, size: int) -> _Block:
        """The first of neighbours, each free or unmapped, that make room for `size` together."""
        for candidate in pool.unmapped:
            before = candidate.previous
            first = before if before is not None and before.free else candidate
            room = 0
            following: _Block | None = first
            while following is not None and following.free and room < size:
                room, following = room + following.size, following.next
            if room >= size:
                return first
        segment = _Block(pool, self._next_address, ADDRESS_SPACE_BYTES, mapped=False)
        self._next_address += ADDRESS_SPACE_BYTES
        pool.unmapped.append(segment)
        return segment

    def _map(self, block: _Block, size: int) -> _Block:
        """Puts pages behind the first `size` bytes of an unmapped block; returns it with its free neighbours, kept."""
        pool = block.pool
        size = -(-size // pool.segment_bytes) * pool.segment_bytes
        pool.unmapped.remove(block)
        if size < block.size:
            insort(pool.unmapped, block.split(size), key=_address)
        block.mapped = True
        self._reserve(size)
        return self._keep(block)

    def _unmap(self, block: _Block) -> None:
        """Takes the pages that lie wholly within a free block away from it."""
        pool = block.pool
        page = pool.segment_bytes
        begin = -(-block.start // page) * page
        end = (block.start + block.size) // page * page
        if begin >= end:
            return
        pool.remove(block)
        if begin > block.start:
            rest = block.split(begin - block.start)
            pool.add(block)
            block = rest
        if end < block.start + block.size:
            pool.add(block.split(end - block.start))
        block.mapped = False
        self.reserved_bytes -= block.size
        before, after = block.previous, block.next
        if before is not None and not before.mapped:
            before.absorb(block)
            block = before
        else:
            insort(pool.unmapped, block, key=_address)
        if after is not None and not after.mapped:
            pool.unmapped.remove(after)
            block.absorb(after)

    def _keep(self, block: _Block) -> _Block:
        """Merges a free block with free neighbours and keeps it for the next request; returns the merged block."""
        pool, before, after = block.pool, block.previous, block.next
        if before is not None and before.free and before.mapped:
            pool.remove(before)
            before.absorb(block)
            block = before
        if after is not None and after.free and after.mapped:
            pool.remove(after)
            block.absorb(after)
        pool.add(block)
        return block


def _address(block: _Block) -> int:
    return block.start
