"""A plan file that was edited, or comes from another day: its figures are made anew from its [spec]."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import msgspec

from edgepeft.errors import BadInput, DoesNotFit, UsageError
from edgepeft.library.parent import check_continues
from edgepeft.memory.assembly import is_exact
from edgepeft.memory.calibration import Correction, corrected
from edgepeft.memory.dry_run import DryRunRequest
from edgepeft.methods import METHODS, method_of, method_values, no_lora_plus
from edgepeft.methods.full import QUANTIZED, cannot_train
from edgepeft.plan.device import find_device
from edgepeft.plan.lengths import SampleLengths
from edgepeft.plan.prediction import correction_for, predict
from edgepeft.plan.reasons import TIME, check_samples_left, shown_values, steps_of, time_choice
from edgepeft.plan.simulated import read_config
from edgepeft.plan.speed import RunTime, time_run
from edgepeft.plan.train_plan import Choice, TrainPlan
from edgepeft.plan.unfreezing import check_unfreezing
from edgepeft.plan.upkeep import check_prompts, idle_upkeep
from edgepeft.plan.verify import dry_run
from edgepeft.spec import RunSpec
from edgepeft.units import format_bytes

EDITED = "edited in the plan file"
Progress = Callable[[str, float | None], None]


def revise(plan: TrainPlan, *, where: str, progress: Progress | None = None) -> TrainPlan:
    """The plan with memory, steps and data counted again; what was edited is marked `user`.

    Args:
        plan: as it stands in the file.
        where: the file, for messages.
        progress: told while the data is tokenized.

    Raises:
        BadInput: the model or the data are not those of the plan, or a value of its spec is not possible.
        DoesNotFit: it needs more than its budget.
    """
    from edgepeft.data.prepare import check_unchanged, prepare
    from edgepeft.models.store import ensure_model

    spec = plan.spec
    recipe = spec.recipe
    check_values(spec, where)
    entry = ensure_model(recipe.base.model, progress)
    if entry.fingerprint != recipe.base.fingerprint:
        raise BadInput(
            f"model {entry.name} in the store is not the one that was planned with",
            where=where,
            hint="Add the model of the plan under this name, or plan anew",
        )
    if recipe.parent is not None:
        check_continues(recipe.parent, recipe.method, entry)
    leading = method_of(recipe.method).leading_tokens(recipe.method)
    if recipe.max_seq_len + leading > entry.shape.context_length:
        before = f" behind {leading:,} others" if leading else ""
        raise BadInput(
            f"{entry.name} was made for {entry.shape.context_length:,} tokens, not {recipe.max_seq_len:,}{before}",
            where=f"{where}, spec.recipe.max_seq_len",
            hint="Lower it",
        )
    check_unchanged(recipe.data)

    def tell(done: int, total: int) -> None:
        if progress is not None:
            progress("tokenizing", done / total if total else None)

    def say(what: str) -> None:
        if progress is not None:
            progress(what, None)

    prepared = prepare(recipe.data, Path(entry.folder), progress=tell)
    lengths = SampleLengths(prepared.train, prepared.held_out)
    device = find_device(spec.device)
    try:
        workloads = lengths.exact(spec)
        # A plan that was simulated keeps what the dry run put on the closed form.
        kept = None if plan.dry_run is None else Correction(plan.memory.correction, 0)
        learnt = correction_for(device, entry.shape)
        prediction = predict(spec, entry.shape, workloads, device.target, kept or learnt)
    except UsageError as error:
        raise BadInput(error.what, where=f"{where}, {error.where}", hint=error.hint) from error
    data = lengths.summary(recipe.max_seq_len, recipe.overlong)
    check_samples_left(data, recipe)
    steps = steps_of(recipe, data.train_samples)
    if trouble := idle_upkeep(spec.upkeep, data, steps):
        option, what, hint = trouble
        raise BadInput(what, where=f"{where}, spec.upkeep.{option.replace('-', '_')}", hint=hint)
    try:
        check_unfreezing(recipe, entry.shape, steps)
    except UsageError as error:
        raise BadInput(error.what, where=f"{where}, spec.recipe.unfreeze", hint=error.hint) from error
    time = time_run(spec, entry.shape, device, lengths, entry)
    memory = prediction.memory
    if not is_exact(entry.shape) and plan.dry_run is None:
        # It could not be simulated: the closed form is as unsure as it was.
        memory = msgspec.structs.replace(memory, uncertainty=plan.memory.uncertainty)
    elif not is_exact(entry.shape):
        question = DryRunRequest(spec, read_config(Path(entry.folder)), prediction.workload, device.target)
        memory = corrected(dry_run(question, say).memory, learnt)
    revised = msgspec.structs.replace(
        plan,
        choices=_marked(plan.choices, spec, time),
        memory=memory,
        steps=steps,
        data=data,
        operations=time.operations if time else 0.0,
        seconds=time.seconds if time else None,
        workload=prediction.workload,
    )
    if (memory.peak_bytes, steps) != (plan.memory.peak_bytes, plan.steps):
        edited = any(choice.why == EDITED for choice in revised.choices)
        changed = (
            f"{'[spec] was edited' if edited else 'More is known'} since it was planned: "
            f"{format_bytes(memory.peak_bytes)} and {steps:,} steps are predicted now, not "
            f"{format_bytes(plan.memory.peak_bytes)} and {plan.steps:,}."
        )
        # Runner-ups and the dry run were those of the plan as it was.
        revised = msgspec.structs.replace(
            revised, alternatives=(), wants_more={}, dry_run=None, notes=(*plan.notes, changed)
        )
    check_fits(revised, where=where)
    return revised


def check_fits(plan: TrainPlan, *, where: str = "plan") -> None:
    """Refuses a plan that needs more than its budget.

    Raises:
        DoesNotFit: by how much.
    """
    budget, peak = plan.spec.budget_bytes, plan.memory.peak
    rank = "rank, " if method_of(plan.spec.recipe.method).ranked else ""
    if budget is not None and peak.total_bytes > budget:
        raise DoesNotFit(
            f"{format_bytes(peak.total_bytes)} are needed ({peak.name}), {format_bytes(peak.total_bytes - budget)} "
            f"more than the budget of {format_bytes(budget)}",
            where=where,
            hint=f"Lower {rank}max_seq_len or micro_batch_tokens, or plan anew without them",
        )


def check_values(spec: RunSpec, where: str) -> None:
    """Refuses what the types allow and no run can mean.

    Raises:
        BadInput: naming the key.
    """
    recipe, layout, upkeep = spec.recipe, spec.layout, spec.upkeep
    least: tuple[tuple[str, float | None, float], ...] = (
        ("recipe.max_seq_len", recipe.max_seq_len, 2),
        ("recipe.samples_per_step", recipe.samples_per_step, 1),
        ("recipe.max_steps", recipe.max_steps, 1),
        ("recipe.seed", recipe.seed, 0),
        ("recipe.optimizer.weight_decay", recipe.optimizer.weight_decay, 0),
        ("recipe.optimizer.lora_plus_ratio", recipe.optimizer.lora_plus_ratio, 1),
        ("recipe.optimizer.max_grad_norm", recipe.optimizer.max_grad_norm, 0),
        ("layout.micro_batch_tokens", layout.micro_batch_tokens, 1),
        ("layout.loss_chunk_tokens", layout.loss_chunk_tokens, 1),
        ("upkeep.eval_every_steps", upkeep.eval_every_steps, 0),
        ("upkeep.eval_max_samples", upkeep.eval_max_samples, 0),
        ("upkeep.checkpoint_seconds", upkeep.checkpoint_seconds, 0),
        ("upkeep.checkpoint_steps", upkeep.checkpoint_steps, 0),
        ("upkeep.keep_checkpoints", upkeep.keep_checkpoints, 1),
        ("upkeep.early_stop", upkeep.early_stop, 0),
        ("upkeep.max_seconds", upkeep.max_seconds, 1),
        ("budget_bytes", spec.budget_bytes, 1),
    )
    for key, value, low in least:
        if value is not None and not (math.isfinite(value) and value >= low):
            raise BadInput(f"{value} is not possible", where=f"{where}, spec.{key}", hint=f"Give at least {low:g}")
    for key, value in (
        ("recipe.epochs", recipe.epochs),
        ("recipe.optimizer.learning_rate", recipe.optimizer.learning_rate),
    ):
        if not (math.isfinite(value) and value > 0):
            raise BadInput(f"{value} is not possible", where=f"{where}, spec.{key}", hint="Give a number above 0")
    method = method_of(recipe.method)
    if method.needs_dense_base and recipe.precision in QUANTIZED:
        key = f"{where}, spec.recipe.precision"
        raise BadInput(cannot_train(recipe.precision), where=key, hint="Use bf16")
    if recipe.optimizer.lora_plus_ratio != 1 and not method.ranked:
        key = f"{where}, spec.recipe.optimizer.lora_plus_ratio"
        raise BadInput(no_lora_plus(recipe.method), where=key, hint="Use 1")
    try:
        check_prompts(f"{where}, spec.upkeep.sample_prompts", upkeep.sample_prompts)
    except UsageError as error:
        raise BadInput(error.what, where=error.where, hint=error.hint) from error
    shares = {
        "recipe.data.eval_fraction": recipe.data.eval_fraction,
        "recipe.schedule.warmup_fraction": recipe.schedule.warmup_fraction,
        "recipe.schedule.final_fraction": recipe.schedule.final_fraction,
        "recipe.optimizer.beta1": recipe.optimizer.beta1,
        "recipe.optimizer.beta2": recipe.optimizer.beta2,
    }
    for key, value in shares.items():
        if not 0 <= value < 1:
            raise BadInput(f"{value} is not a share", where=f"{where}, spec.{key}", hint="Give 0 to below 1")


def _marked(choices: tuple[Choice, ...], spec: RunSpec, time: RunTime | None) -> tuple[Choice, ...]:
    values = shown_values(spec)
    marked = [
        choice
        if choice.what not in values or choice.value == values[choice.what]
        else Choice(choice.what, values[choice.what], "user", EDITED)
        for choice in choices
        if choice.what != TIME
    ]
    # Of another method than the plan was made with, or switched on by hand.
    settings = {"method"} | {field.replace("_", "-") for kind in METHODS.values() for field in kind.fields}
    marked = [choice for choice in marked if choice.what not in settings or choice.what in values]
    config = spec.recipe.method
    usual = {"method": "lora", **method_values(type(config)())}
    shown = {choice.what for choice in marked}
    marked += [
        Choice(what, values[what], "user", EDITED)
        for what in ("method", *method_values(config))
        if what not in shown and values[what] != usual[what]
    ]
    # A plan does not show what it leaves switched off.
    switched_on = {
        "lora-plus-ratio": spec.recipe.optimizer.lora_plus_ratio != 1,
        "unfreeze": spec.recipe.unfreeze is not None,
    }
    missing = {what for what, on in switched_on.items() if on} - {choice.what for choice in marked}
    marked += [Choice(what, values[what], "user", EDITED) for what in sorted(missing)]
    return (*marked, time_choice(time)) if time is not None else tuple(marked)
