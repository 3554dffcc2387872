"""Evaluations within a run: the loss on held-out samples, in a layout of their own where memory demands it."""

from __future__ import annotations

import math
from typing import NamedTuple

import msgspec

from edgepeft.engine.training.opening import Emit
from edgepeft.engine.training.reading import SampleReader
from edgepeft.engine.training.step import StepRunner
from edgepeft.plan.workloads import MicroBatchSize, largest_held_out
from edgepeft.runs.events import OutOfMemoryHit, Recovered
from edgepeft.spec import Layout


class HeldOutLoss(NamedTuple):
    """What an evaluation found."""

    loss: float
    """Mean over the trained tokens."""
    samples: int
    trained_tokens: int


class Evaluations:
    """The evaluations of one run.

    Args:
        runner: of the run.
        reader: of the held-out samples.
        max_samples: read for one evaluation at the most.
        emit: told when memory runs out.
    """

    def __init__(self, runner: StepRunner, reader: SampleReader, max_samples: int, emit: Emit) -> None:
        self._runner = runner
        self._reader = reader
        self._emit = emit
        self.samples = min(len(reader), max_samples)
        """Held-out samples of one evaluation."""
        self._smaller: Layout | None = None

    def largest(self, micro_batch_tokens: int) -> MicroBatchSize | None:
        """The micro-batch of an evaluation with most tokens; None where there is nothing to evaluate."""
        tokens, trained = self._reader.trainable()
        found = largest_held_out(tokens, trained, micro_batch_tokens, self.samples)
        return found[0] if found else None

    def try_largest(self, layout: Layout, step: int) -> None:
        """Evaluates the largest micro-batch alone, so that memory runs out now or never.

        Raises:
            OutOfMemory: not even one sample fits.
        """
        largest = self.largest(layout.micro_batch_tokens)
        if largest is not None:
            self._run(list(largest.samples), layout, step)

    def evaluate(self, layout: Layout, step: int) -> HeldOutLoss | None:
        """The loss now; None where there is nothing to evaluate.

        Args:
            layout: of training, which stays as it is whatever happens here.
            step: optimizer steps done.

        Raises:
            OutOfMemory: not even one sample fits.
        """
        if not self.samples:
            return None
        loss, trained = self._run(list(range(self.samples)), layout, step)
        return HeldOutLoss(loss / trained, self.samples, trained) if trained else None

    def _run(self, indices: list[int], layout: Layout, step: int) -> tuple[float, int]:
        own = self._smaller
        if own is not None:
            cap = min(own.micro_batch_tokens, layout.micro_batch_tokens)
            chunk = min(own.loss_chunk_tokens, layout.loss_chunk_tokens)
            layout = msgspec.structs.replace(layout, micro_batch_tokens=cap, loss_chunk_tokens=chunk)

        def shrunk(smaller: Layout, what: str, tokens: int, message: str) -> None:
            # The next evaluation begins with what this one came down to.
            self._smaller = smaller
            self._emit(OutOfMemoryHit(step=step, phase="evaluation", micro_batch_tokens=tokens, message=message))
            self._emit(
                Recovered(
                    step=step,
                    what=what,
                    micro_batch_tokens=smaller.micro_batch_tokens,
                    checkpointing=layout.checkpointing,
                    cause="evaluation",
                )
            )

        sums = self._runner.evaluate(self._reader.read(indices), layout, on_smaller=shrunk)
        return sums.loss, sums.trained_tokens


def improves(loss: float, best: float | None) -> bool:
    """Whether a loss is a number and below the best one."""
    return math.isfinite(loss) and (best is None or loss < best)
