"""What a run leaves behind: the adapter in PEFT's form, its card, and its version in the library."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from edgepeft.data.prepare import load_template
from edgepeft.data.tokens import Tokenizer
from edgepeft.engine.heap import trim_heap
from edgepeft.engine.methods.files import save_adapter
from edgepeft.engine.training.checkpoints import RunPosition
from edgepeft.engine.training.device import device_name, package_versions
from edgepeft.engine.training.ending import Kept, complaint_about, keep_state
from edgepeft.errors import EdgepeftError
from edgepeft.library.card import Card, TemplateRecord
from edgepeft.library.store import WEIGHTS_FILE, list_adapters, next_version, publish, read_card, write_card
from edgepeft.memory.calibration import observe, observed
from edgepeft.methods import method_of
from edgepeft.models.store import ModelEntry
from edgepeft.plan.train_plan import TrainPlan
from edgepeft.runs.events import EndedBy, Finished, Warned
from edgepeft.runs.layout import RunFolder
from edgepeft.spec import DataRef

if TYPE_CHECKING:
    from edgepeft.engine.training.loop import Training


def finish_run(training: Training, ended_by: EndedBy) -> Finished:
    """Saves the adapter as it is now; a run that was not stopped saves the state that the plan keeps, and publishes it
    as the next version of its name.

    Returns:
        The event that ends the run.

    Raises:
        DiskProblem: no space, or no permission.
    """

    def warn(message: str) -> None:
        training.emit(Warned(message=message))

    energy = training.energy.ending(warn)
    run, plan, position, measured = training.run, training.plan, training.position, training.measured()
    stopped = ended_by == "request"
    kept = Kept(position.step, position.last_eval_loss) if stopped else keep_state(training)
    if not stopped and (complaint := complaint_about(kept, position.base_eval_loss)):
        training.emit(Warned(message=complaint, step=position.step))
    card = write_adapter(training, kept.step, kept.eval_loss, energy)
    published = ""
    if not stopped and plan.adapter_name:
        published = _published_before(run, plan.adapter_name) or publish(run.adapter, plan.adapter_name, card)
    return Finished(
        step=position.step,
        adapter=run.adapter.relative_to(run.path).as_posix(),
        stopped=stopped,
        train_seconds=position.train_seconds,
        tokens_per_second=_tokens_per_second(training),
        predicted_peak_bytes=plan.memory.peak_bytes,
        measured_peak_bytes=measured.peak_bytes,
        measured_by_category=measured.by_category,
        measured_place=measured.place,
        live_peak_bytes=measured.live_bytes,
        reserved_peak_bytes=measured.reserved_bytes,
        rss_peak_bytes=measured.rss_bytes,
        train_loss=_train_loss(training),
        eval_loss=kept.eval_loss,
        last_eval_loss=position.last_eval_loss,
        base_eval_loss=position.base_eval_loss,
        kept_step=kept.step,
        ended_by=ended_by,
        published=published,
        **energy,
    )


def stopped_before_training(run: RunFolder, plan: TrainPlan, position: RunPosition) -> Finished:
    """The end of a process that was asked to stop while it loaded: what was saved before it stays as it is.

    Args:
        run: of the process.
        plan: of the run.
        position: of the newest checkpoint.
    """
    # An adapter that an earlier stop left behind may be of fewer steps than the newest checkpoint.
    card = read_card(run.adapter) if run.adapter.is_dir() else None
    return Finished(
        step=position.step,
        adapter=run.adapter.name if card is not None and card.steps == position.step else "",
        stopped=True,
        train_seconds=position.train_seconds,
        tokens_per_second=position.train_tokens / position.train_seconds if position.train_seconds else 0.0,
        predicted_peak_bytes=plan.memory.peak_bytes,
        measured_peak_bytes=position.measured.peak_bytes,
        eval_loss=position.last_eval_loss,
    )


def write_adapter(
    training: Training, step: int, eval_loss: float | None, energy: Mapping[str, Any] | None = None
) -> Card:
    """Writes the adapter and its card into the run folder.

    Args:
        training: its adapter is written as it is.
        step: whose state that is.
        eval_loss: of that state.
        energy: what the run used, by the names of `Finished`; None where it has not ended.

    Raises:
        DiskProblem: no space, or no permission.
    """
    card = _make_card(training, step, eval_loss, energy or {})
    save_adapter(training.run.adapter, training.adapter, training.loaded.entry.name)
    write_card(training.run.adapter, card)
    return card


def _published_before(run: RunFolder, name: str) -> str | None:
    """The version that an earlier process of this run published just before it died.

    The id alone does not tell: once a run is removed, the next one of its name gets the same.
    """
    weights = (run.adapter / WEIGHTS_FILE).read_bytes()
    for adapter in list_adapters():
        if adapter.name != name or adapter.card is None or adapter.card.run != run.id:
            continue
        if adapter.weights.read_bytes() == weights:
            return adapter.reference
    return None


def _make_card(training: Training, step: int, eval_loss: float | None, energy: Mapping[str, Any]) -> Card:
    plan, position, entry = training.plan, training.position, training.loaded.entry
    recipe = plan.spec.recipe
    trainable = sum(parameter.numel() for parameter in training.adapter.named_parameters().values())
    # What takes the base's place is none beside it.
    added = 0 if method_of(recipe.method).needs_dense_base else trainable
    metrics = {
        "train_loss": _train_loss(training),
        "eval_loss": eval_loss,
        "best_eval_loss": position.best_eval_loss,
        "base_eval_loss": position.base_eval_loss,
        # The first pass over the data takes each sample once.
        "train_samples": float(min(len(training.train), step * recipe.samples_per_step)),
        "last_step": float(position.step),
        "last_eval_loss": position.last_eval_loss,
        "train_seconds": position.train_seconds,
        "tokens_per_second": _tokens_per_second(training),
        "predicted_peak_bytes": float(plan.memory.peak_bytes),
        "measured_peak_bytes": float(training.measured().peak_bytes),
        **{name: value for name, value in energy.items() if isinstance(value, float)},
    }
    return Card(
        name=plan.adapter_name,
        version=next_version(plan.adapter_name) if plan.adapter_name else 0,
        base=entry.name,
        base_fingerprint=entry.fingerprint,
        recipe=recipe,
        layout=position.layout,
        parameters=tuple(training.adapter.changed()),
        trainable_parameters=trainable,
        trainable_share=trainable / (entry.shape.parameters + added),
        versions=package_versions(),
        template=_template(recipe.data, entry),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        run=training.run.id,
        steps=step,
        parent=recipe.parent.adapter if recipe.parent is not None else "",
        metrics={name: value for name, value in metrics.items() if value is not None and math.isfinite(value)},
        notes=plan.notes if step == position.step else (*plan.notes, _kept_note(training, step, eval_loss)),
    )


def _kept_note(training: Training, step: int, eval_loss: float | None) -> str:
    last = training.position.last_eval_loss
    losses = "" if eval_loss is None or last is None else f", whose held-out loss was {eval_loss:.4f}, not {last:.4f}"
    return f"The run went on to step {training.position.step}; the state of step {step} is kept{losses}."


def _template(data: DataRef, entry: ModelEntry) -> TemplateRecord | None:
    folder = Path(entry.folder)
    template = load_template(data, folder)
    if template is None:
        return None
    # A large vocabulary takes some 30 MiB: they find room where the last step's tensors were.
    trim_heap()
    stops = Tokenizer.load(folder).stop_token_ids(template)
    return TemplateRecord(text=template.text, fingerprint=template.fingerprint, stop_token_ids=tuple(stops))


def _train_loss(training: Training) -> float | None:
    """The mean over the last steps; one step's loss says more about its samples than about the adapter."""
    losses = training.position.recent_losses
    return sum(losses) / len(losses) if losses else None


def _tokens_per_second(training: Training) -> float:
    position = training.position
    return position.train_tokens / position.train_seconds if position.train_seconds else 0.0


def keep_observation(training: Training, finished: Finished) -> str:
    """Keeps what a run measured for the predictions of the next ones; returns a complaint where that is not possible.

    A run whose layout became smaller on the way says nothing about the plan's prediction.
    """
    plan, position = training.plan, training.position
    if finished.stopped or position.layout != plan.spec.layout:
        return ""
    try:
        observe(
            observed(
                plan.spec,
                plan.memory,
                run=training.run.id,
                device_name=device_name(training.loaded.device),
                torch=str(torch.__version__),
                measured_bytes=finished.measured_peak_bytes,
                operations=plan.operations * position.step / plan.steps,
                seconds=position.train_seconds,
                tokens_per_second=finished.tokens_per_second,
            )
        )
    except (EdgepeftError, OSError) as error:
        return f"what this run measured could not be kept for the next plans: {error}"
    return ""
