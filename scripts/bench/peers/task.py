"""What all engines train: the same tokens in the same order, said once and read by each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec


class Sample(msgspec.Struct, frozen=True):
    """One tokenized record."""

    ids: list[int]
    trained: list[bool]
    """For each token whether it carries loss as a label."""

    @property
    def labels(self) -> list[int]:
        """Ids, -100 where nothing is learned."""
        return [token if learned else -100 for token, learned in zip(self.ids, self.trained, strict=True)]


class Settings(msgspec.Struct, frozen=True):
    """What all engines of a comparison have in common."""

    rank: int
    learning_rate: float
    max_seq_len: int
    samples_per_step: int
    peer_batch: int
    """Samples of a peer's micro-batch; accumulation makes up the rest of the step."""
    micro_batch_tokens: int
    """Of edgepeft."""
    checkpointing: str
    """Of edgepeft; peers checkpoint every layer."""
    seed: int

    def plan_options(self, precision: str, steps: int) -> dict[str, Any]:
        """The options of edgepeft's plan; what they leave open, the planner chooses."""
        return {
            "gpu": "cpu",
            "precision": precision,
            "compute_dtype": "bf16",
            "rank": self.rank,
            "alpha": 2.0 * self.rank,
            "learning_rate": self.learning_rate,
            "schedule": "constant",
            "warmup": 0.0,
            "max_seq_len": self.max_seq_len,
            "overlong": "drop",
            "samples_per_step": self.samples_per_step,
            "max_steps": steps,
            "micro_batch_tokens": self.micro_batch_tokens,
            "checkpointing": self.checkpointing,
            "eval_every": 0,
            "seed": self.seed,
        }


class Task(msgspec.Struct, frozen=True):
    """What one engine is to train."""

    model: str
    """Name in the model store."""
    weights: str
    """The model's folder of safetensors."""
    data: str
    precision: str
    """Of the frozen linears: bf16 or nf4."""
    settings: Settings
    steps: list[list[Sample]]
    """The records of each optimizer step."""
    held_out: list[Sample]
    folder: str = ""
    """Where an engine saves its adapter."""

    @property
    def tokens_of_steps(self) -> list[int]:
        """Real tokens, padding never counted."""
        return [sum(len(sample.ids) for sample in step) for step in self.steps]


def make_task(model: str, data: Path, precision: str, settings: Settings, *, steps: int, held_out: int) -> Task:
    """The task for a model and a file of records, tokenized as edgepeft reads it.

    Args:
        model: a name in the store, a folder or a GGUF file.
        data: records in any form that edgepeft reads.
        precision: of the frozen linears.
        settings: of all engines.
        steps: optimizer steps.
        held_out: records at the most that the loss is compared on.
    """
    from edgepeft.data.prepare import prepare
    from edgepeft.data.schedule import step_samples
    from edgepeft.models.store import ensure_model
    from edgepeft.plan.build import build

    entry = ensure_model(model)
    recipe = build(entry.name, data, settings.plan_options(precision, steps)).spec.recipe
    prepared = prepare(recipe.data, Path(entry.folder))
    train, rest = (table.limited(recipe.max_seq_len, recipe.overlong) for table in (prepared.train, prepared.held_out))

    def read(table: Any, index: int) -> Sample:
        ids, mask = table.sample(index)
        # Nothing is learned from what lies behind the last trained token.
        end = int(mask.nonzero()[0][-1]) + 1
        return Sample(ids[:end].tolist(), [False, *mask[1:end].tolist()])

    return Task(
        model=entry.name,
        weights=entry.weights,
        data=str(data),
        precision=precision,
        settings=settings,
        steps=[
            [read(train, index) for index in step_samples(len(train), recipe.samples_per_step, step, recipe.seed)]
            for step in range(steps)
        ],
        held_out=[read(rest, index) for index in range(min(held_out, len(rest)))],
    )
