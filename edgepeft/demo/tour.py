"""The steps of the demo: its data, the plan's pinned values, the scores, and one alert answered twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from edgepeft.chat.client import SyncInference
from edgepeft.chat.evaluation import EvaluatedRecord, Evaluation, EvaluationProgress, evaluate
from edgepeft.chat.protocol import AdapterUse
from edgepeft.chat.scoring import Scores
from edgepeft.demo.alerts import write_data
from edgepeft.demo.wordings import DATABASE
from edgepeft.errors import BadInput
from edgepeft.library.store import resolve_adapter
from edgepeft.models.store import ModelEntry
from edgepeft.paths import home
from edgepeft.plan.train_plan import TrainPlan
from edgepeft.runs.events import Finished

SYSTEM = DATABASE
"""The system whose alerts are learned."""
ADAPTER = "demo-database"
MAX_ANSWER_TOKENS = 80
"""Longer than any right answer."""


class Score(msgspec.Struct, frozen=True):
    """Means over the held-out alerts, as fractions."""

    valid_json: float
    field_accuracy: float
    exact_match: float


class DemoReport(msgspec.Struct, frozen=True):
    """What `edgepeft demo --json FILE` writes."""

    base: Score
    adapter: Score
    train_seconds: float
    tokens_per_second: float
    predicted_peak_bytes: int
    measured_peak_bytes: int
    seed: int
    held_out: int
    """Alerts that were scored."""
    published: str
    """`NAME@vK` in the adapter library."""


class Example(msgspec.Struct, frozen=True):
    """One held-out alert and what each said to it."""

    alert: str
    reference: str
    base: str
    adapter: str


def demo_files(seed: int) -> tuple[Path, Path]:
    """The training and the held-out file of the demo's system, written under the cache."""
    return write_data(home().cache / "demo" / f"seed-{seed}", seed)[SYSTEM.name]


def pinned_options(held_out: Path, seed: int) -> dict[str, Any]:
    """What the demo pins of its plan, as if a user had typed it: NF4, and enough learning for a small model."""
    return {
        "precision": "nf4",
        "rank": 16,
        "alpha": 32.0,
        "epochs": 2.0,
        "samples_per_step": 8,
        "micro_batch_tokens": 1024,
        "learning_rate": 1e-3,
        "eval_data": str(held_out),
        "eval_every": 0,
        "seed": seed,
    }


def score_both(
    entry: ModelEntry,
    plan: TrainPlan,
    published: str,
    held_out: Path,
    progress: Callable[[str, EvaluationProgress], None] | None = None,
) -> tuple[Evaluation, Evaluation]:
    """Scores base and adapter on the held-out file with one loaded base; `progress` is told whose turn it is.

    Raises:
        EdgepeftError: the base or the adapter cannot be loaded.
    """
    recipe = plan.spec.recipe
    adapter = AdapterUse(folder=str(resolve_adapter(published).path))

    def run(client: SyncInference, whose: str, uses: Sequence[AdapterUse]) -> Evaluation:
        return evaluate(
            client,
            entry,
            held_out,
            uses,
            max_new_tokens=MAX_ANSWER_TOKENS,
            batch_size=24,
            progress=None if progress is None else lambda now: progress(whose, now),
        )

    with SyncInference.start(entry, recipe.precision, recipe.compute_dtype, plan.spec.device) as client:
        return run(client, "base", ()), run(client, "adapter", (adapter,))


def report(finished: Finished, base: Evaluation, adapter: Evaluation, seed: int) -> DemoReport:
    """The figures of a whole demo."""
    return DemoReport(
        base=_score(base.scores),
        adapter=_score(adapter.scores),
        train_seconds=finished.train_seconds,
        tokens_per_second=finished.tokens_per_second,
        predicted_peak_bytes=finished.predicted_peak_bytes,
        measured_peak_bytes=finished.measured_peak_bytes,
        seed=seed,
        held_out=adapter.records,
        published=finished.published,
    )


def pick_example(held_out: Path, base: Evaluation, adapter: Evaluation) -> Example:
    """The first held-out alert, whatever came of it: a picked success would prove nothing."""
    first_base, first_adapter = base.rows[0], adapter.rows[0]
    record = msgspec.json.decode(held_out.read_text(encoding="utf-8").splitlines()[0])
    return Example(
        alert=record["messages"][0]["content"].partition("\n")[2],
        reference=first_adapter.reference or "",
        base=_answer(first_base),
        adapter=_answer(first_adapter),
    )


def _answer(row: EvaluatedRecord) -> str:
    return row.answer if row.answer is not None else ""


def _score(scores: Scores | None) -> Score:
    if scores is None or scores.valid_json is None or scores.field_accuracy is None:
        raise BadInput("the held-out file has no JSON answers to score")
    return Score(valid_json=scores.valid_json, field_accuracy=scores.field_accuracy, exact_match=scores.exact_match)
