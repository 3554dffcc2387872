"""What goes through the model at a run's highest point."""

from __future__ import annotations

import msgspec

from edgepeft.memory.chunks import in_token_steps


class Workload(msgspec.Struct, frozen=True):
    """The micro-batch that decides a run's peak, and the held-out one that decides an evaluation's."""

    tokens: int
    """Tokens of the packed micro-batch."""
    longest: int
    """Tokens of its longest sample; only attention depends on it."""
    trained: int
    """Its tokens whose successor carries loss: rows that meet the output head."""
    alone: bool = False
    """Whether it is its step's only micro-batch: gradients then come into being while saved activations go."""
    held_out_tokens: int = 0
    """Tokens of the largest micro-batch of an evaluation; 0 when nothing is held out."""
    held_out_longest: int = 0
    held_out_trained: int = 0
    samples: int = 0
    """Samples of the micro-batch; 0 stands for as few as there can be. Only what stands before each one depends on
    it."""
    held_out_samples: int = 0

    def lengths(self) -> tuple[int, ...]:
        """Sample lengths that add up to `tokens`, none above `longest`: the longest first, the rest alike."""
        return _split(self.tokens, self.longest, self.samples)

    def row_lengths(self) -> tuple[int, ...]:
        """The same with what fills up the row, which is computed like one more sample."""
        return _filled_up(self.lengths())

    def held_out_lengths(self) -> tuple[int, ...]:
        """As `lengths`, for the held-out micro-batch."""
        return _split(self.held_out_tokens, self.held_out_longest, self.held_out_samples)

    def held_out_row_lengths(self) -> tuple[int, ...]:
        """As `row_lengths`, for the held-out micro-batch."""
        return _filled_up(self.held_out_lengths())


def full_workload(micro_batch_tokens: int, longest: int) -> Workload:
    """The worst that can happen under a token cap: full micro-batches of trained tokens, several a step."""
    tokens = max(micro_batch_tokens, longest)
    return Workload(
        tokens=tokens,
        longest=longest,
        trained=tokens,
        held_out_tokens=tokens,
        held_out_longest=longest,
        held_out_trained=tokens,
    )


def _filled_up(lengths: tuple[int, ...]) -> tuple[int, ...]:
    padding = in_token_steps(sum(lengths)) - sum(lengths)
    return tuple(sorted((*lengths, padding), reverse=True)) if padding else lengths


def _split(tokens: int, longest: int, samples: int) -> tuple[int, ...]:
    if not tokens:
        return ()
    whole, rest = divmod(tokens, longest)
    if samples > whole + (1 if rest else 0):
        length, longer = divmod(tokens - longest, samples - 1)
        return (longest, *(longer * (length + 1,)), *((samples - 1 - longer) * (length,)))
    return (longest,) * whole + ((rest,) if rest else ())
