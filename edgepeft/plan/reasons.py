"""Why each value of a plan was chosen, one line each, and what a person should know beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgepeft.errors import BadInput
from edgepeft.library.parent import TAKEN_OVER
from edgepeft.methods import METHODS, LoraConfig, count_parameters, id_of, method_values
from edgepeft.plan.speed import OFFLOAD_SPEED, say_time
from edgepeft.plan.train_plan import Choice, DataSummary, Origin
from edgepeft.plan.unfreezing import explain_unfreezing, say_unfreezing
from edgepeft.plan.upkeep import upkeep_reasons, upkeep_values
from edgepeft.spec import Recipe, RunSpec
from edgepeft.units import format_bytes, format_count, format_share

if TYPE_CHECKING:
    from edgepeft.plan.search import Candidate, Search
    from edgepeft.plan.speed import RunTime

TIME = "time"
"""The row of a plan that tells how long it takes."""
NO_CORRECTION = 0.0005
"""A correction below this would be shown as none."""
_TYPED = "as typed"
_PRECISION_WORDS = {
    "fp32": "32 bit, as the products",
    "bf16": "unquantized",
    "fp16": "unquantized",
    "int8": "8 bit, nearly exact",
    "nf4": "4 bit, double quantization",
}


def steps_of(recipe: Recipe, train_samples: int) -> int:
    """Optimizer steps of the whole run."""
    from edgepeft.data.schedule import total_steps

    return total_steps(train_samples, recipe.samples_per_step, recipe.epochs, recipe.max_steps)


def check_samples_left(data: DataSummary, recipe: Recipe) -> None:
    """Refuses a length limit that leaves nothing to train on.

    Raises:
        BadInput: no sample is left.
    """
    if not data.train_samples:
        raise BadInput(
            f"no sample is left with trained tokens among at most {recipe.max_seq_len:,}",
            where=recipe.data.path,
            hint="Raise max-seq-len, or let longer samples be truncated",
        )


def shown_values(spec: RunSpec) -> dict[str, str]:
    """What a plan decides, by option name, as people write it."""
    recipe, layout, config = spec.recipe, spec.layout, spec.recipe.method
    return {
        "precision": recipe.precision,
        "compute-dtype": recipe.compute_dtype,
        "max-seq-len": f"{recipe.max_seq_len:,}",
        "overlong": recipe.overlong,
        "method": id_of(config),
        **method_values(config),
        "micro-batch-tokens": f"{layout.micro_batch_tokens:,}",
        "checkpointing": layout.checkpointing,
        "loss-chunk-tokens": str(layout.loss_chunk_tokens),
        "deterministic": "yes" if layout.deterministic else "no",
        "samples-per-step": str(recipe.samples_per_step),
        "epochs": f"{recipe.epochs:g}",
        "max-steps": "none" if recipe.max_steps is None else str(recipe.max_steps),
        "learning-rate": f"{recipe.optimizer.learning_rate:.2g}",
        "lora-plus-ratio": f"{recipe.optimizer.lora_plus_ratio:g}",
        "optimizer": recipe.optimizer.name,
        "weight-decay": f"{recipe.optimizer.weight_decay:g}",
        "schedule": recipe.schedule.name,
        "warmup": format_share(recipe.schedule.warmup_fraction, digits=0),
        "unfreeze": say_unfreezing(recipe),
        **upkeep_values(spec.upkeep),
        "seed": str(recipe.seed),
    }


def describe(
    search: Search, chosen: Candidate, spec: RunSpec, data: DataSummary | None, time: RunTime | None
) -> tuple[Choice, ...]:
    """Every choice of the plan in the order in which it is shown.

    Args:
        search: the search that made it.
        chosen: the values that memory decides.
        spec: the run.
        data: what is known of the data.
        time: how long the run takes.
    """
    preset, pins, recipe = search.request.preset, search.pins, spec.recipe
    given = search.request.given
    found = [Choice(name, given[name].value, given[name].origin, given[name].why) for name in given]
    values = shown_values(spec)
    if search.request.parent is not None:
        found.append(Choice("from", search.request.parent.ref.adapter, "user", "training starts where it ended"))

    parent = search.request.parent

    def add(what: str, why: str, origin: Origin = "auto") -> None:
        value = values[what]
        if parent is not None and what in TAKEN_OVER:
            found.append(Choice(what, value, "user", f"as {parent.ref.adapter} has it"))
        elif what.replace("-", "_") not in {**pins, **pins["settings"]}:
            found.append(Choice(what, value, origin, why))
        elif what == "max-seq-len" and pins["max_seq_len"] > chosen.max_seq_len:
            found.append(Choice(what, value, "user", f"{pins['max_seq_len']:,} typed; the model's context ends here"))
        else:
            found.append(Choice(what, value, "user", _TYPED))

    add("precision", _precision_why(search, chosen))
    add("compute-dtype", search.request.device.compute_why)
    add("max-seq-len", _length_why(search, chosen, data), "auto" if data else "preset")
    add("overlong", _overlong_why(data))
    config = recipe.method
    parameters = count_parameters(config, search.shape)
    share = format_share(parameters / search.shape.parameters, digits=2)
    trains = f"{format_count(parameters)} parameters, {share} of the base"
    if isinstance(config, LoraConfig):
        origin: Origin = "preset" if config.rank == search.ranks[0] else "auto"
        add("rank", f"{_rank_why(search, chosen)}; {trains}", origin)
        add("alpha", "twice the rank")
        add("targets", preset.targets.description, "preset")
        add("dropout", preset.dropout.description, "preset")
        for name in ("rank_stabilised", "dora", "ranks"):
            if getattr(config, name):
                add(name.replace("_", "-"), _TYPED if parent is None else f"as {parent.ref.adapter} has it", "user")
    else:
        found.append(Choice("method", id_of(config), "user", trains))
        for name in method_values(config):
            if parent is None:
                add(name, "the method's default", "preset")
            else:
                add(name, f"as {parent.ref.adapter} has it", "user")
    add("micro-batch-tokens", _micro_batch_why(search, chosen))
    add("checkpointing", _checkpointing_why(search, chosen))
    add("loss-chunk-tokens", _chunk_why(search, chosen))
    if spec.layout.deterministic:
        add("deterministic", "")
    add("samples-per-step", *_samples_why(search, recipe))
    add("epochs", *_epochs_why(search, recipe))
    if recipe.max_steps is not None:
        add("max-steps", preset.max_steps.description, "preset")
    add("learning-rate", _rate_why(search))
    if "lora_plus_ratio" in pins:
        add("lora-plus-ratio", _TYPED)
    small = not METHODS[search.method_id].needs_dense_base
    add("optimizer", "float32 states: those of an adapter are small" if small else "float32 states, the most exact")
    low_rank = isinstance(config, LoraConfig)
    add("weight-decay", preset.weight_decay.description if low_rank else "that of the preset", "preset")
    add("schedule", preset.schedule.description, "preset")
    add("warmup", preset.warmup_fraction.description, "preset")
    if recipe.unfreeze is not None:
        steps = 0 if data is None else steps_of(recipe, data.train_samples)
        found.append(Choice("unfreeze", values["unfreeze"], "user", explain_unfreezing(recipe, search.shape, steps)))
    for what, why, origin in upkeep_reasons(spec.upkeep, pins, preset, data):
        add(what, why, origin)
    add("seed", "of order, dropout and start")
    if time is not None:
        found.append(time_choice(time))
    return tuple(found)


def time_choice(time: RunTime) -> Choice:
    """How long the run takes, beside what was chosen."""
    return Choice(TIME, say_time(time.seconds), "auto", time.why)


def notes_of(search: Search, chosen: Candidate, data: DataSummary | None) -> tuple[str, ...]:
    """Warnings that belong to the plan."""
    notes: list[str] = []
    entry, device = search.request.entry, search.request.device
    if chosen.precision == "nf4" and entry.kind == "embedded":
        notes.append(
            "The embedded model was born in 4 bit (Q4_1): NF4 on top of it raises its perplexity on web text from "
            "30.8 to 39.0. With --precision bf16 nothing is lost."
        )
    elif chosen.precision in ("nf4", "int8") and entry.kind == "gguf":
        notes.append(
            "This base comes from a GGUF: if that was quantized, quantizing it again costs quality a second time."
        )
    if data is not None and data.overlong:
        fate = "cut at" if search.pins.get("overlong", "truncate") == "truncate" else "dropped above"
        notes.append(
            f"{data.overlong:,} of {data.train_samples if fate == 'cut at' else data.train_samples + data.overlong:,} "
            f"training samples are {fate} {chosen.max_seq_len:,} tokens; the longest has {data.length_max:,}."
        )
    asked = search.pins.get("max_seq_len")
    if asked is not None and asked > chosen.max_seq_len:
        notes.append(f"--max-seq-len {asked:,} is limited to the model's context of {search.context:,} tokens.")
    cap = search.pins.get("micro_batch_tokens")
    if cap is not None and cap < search.longest_sample(chosen.max_seq_len):
        notes.append(
            f"Samples of more than {cap:,} tokens form micro-batches of their own: memory is counted for the longest."
        )
    if data is not None and data.train_samples < 50:
        notes.append(f"Only {data.train_samples} training samples: expect a change of style, not new skills.")
    if search.correction is not None:
        notes.append(_correction_note(search))
    if not search.careful:
        notes.append(
            f"The plan is within {format_share(search.cost(chosen).uncertainty, digits=0)} of the budget, which is "
            "how far the prediction may be off: --verify runs the step without values first."
        )
    if device.taken:
        notes.append(f"{device.taken}: the plan uses what is free.")
    if device.free_bytes is not None and search.request.budget_bytes > device.free_bytes:
        notes.append(
            f"The budget is larger than the {format_bytes(device.free_bytes)} that are free now: close other programs "
            "before the run starts."
        )
    if not device.present:
        notes.append(f"{device.name} is not in this machine: the plan is for one that has it.")
    if chosen.checkpointing == "offload":
        notes.append(_offload_note(search, chosen))
    if device.kind == "cuda":
        notes.append("CUDA context and allocator slack are assumptions here, not measurements.")
    return tuple(notes)


def _offload_note(search: Search, chosen: Candidate) -> str:
    if search.request.device.kind == "cpu":
        return "On the CPU --checkpointing offload is layer: inputs of layers lie in RAM anyway."
    held = search.offloaded_bytes(search.count(chosen).workload.tokens)
    return (
        f"Between forward and backward {format_bytes(held)} of inputs of layers lie in pinned RAM, which must be free. "
        f"That copying them costs {_slower()} of the speed is an assumption."
    )


def _correction_note(search: Search) -> str:
    found, device = search.correction, search.request.device
    assert found is not None
    family = search.shape.architecture.removesuffix("ForCausalLM")
    on = "this CPU" if device.kind == "cpu" else device.name
    runs = "a run" if found.runs == 1 else f"{found.runs} runs"
    about = f"Predictions for {family} models on {on}"
    if abs(found.factor - 1) < NO_CORRECTION:
        return f"{about} need no correction, after {runs.replace('run', 'measured run')}."
    return f"{about} are corrected by {100 * (found.factor - 1):+.1f} % beyond the base, from {runs}."


def _precision_why(search: Search, chosen: Candidate) -> str:
    words = _PRECISION_WORDS[chosen.precision]
    place = search.precisions.index(chosen.precision)
    if place == 0:
        reason = "the only form of this base" if len(search.precisions) == 1 else "the most exact base fits"
        if METHODS[search.method_id].needs_dense_base:
            reason = "what is trained as a whole cannot be quantized"
        return f"{words}; {reason}"
    better = search.precisions[place - 1]
    peak = search.cost(search.leanest(chosen.max_seq_len, better, search.ranks[-1])).peak_bytes
    return f"{words}; {better} needs {format_bytes(peak)} or more"


def _length_why(search: Search, chosen: Candidate, data: DataSummary | None) -> str:
    length = chosen.max_seq_len
    if data is None:
        return search.request.preset.max_seq_len.description
    if data.overlong == 0:
        return "the longest sample: all stay whole"
    samples = search.request.lengths.samples if search.request.lengths is not None else data.train_samples
    whole = format_share((samples - data.overlong) / samples)
    if length == search.context:
        return f"the model's context; {whole} of the samples stay whole"
    if length < search.target_length():
        return f"the longest that fits the budget; {whole} of the samples stay whole"
    return f"{whole} of the samples stay whole, as the preset asks"


def _overlong_why(data: DataSummary | None) -> str:
    if data is not None and data.overlong == 0:
        return "no sample is longer"
    return "longer samples lose their end"


def _rank_why(search: Search, chosen: Candidate) -> str:
    if chosen.rank == search.ranks[0]:
        return search.request.preset.ranks.description
    better = search.ranks[search.ranks.index(chosen.rank) - 1]
    peak = search.cost(search.leanest(chosen.max_seq_len, chosen.precision, better)).peak_bytes
    return f"rank {better} needs {format_bytes(peak)} or more"


def _micro_batch_why(search: Search, chosen: Candidate) -> str:
    sizes = search.micro_batches(search.leanest(chosen.max_seq_len, chosen.precision, chosen.rank))
    lengths, tokens = search.request.lengths, chosen.micro_batch_tokens
    if lengths is not None and tokens >= lengths.step_tokens(search.spec(chosen).recipe):
        return "a whole optimizer step at once"
    if tokens >= sizes[-1]:
        return "packed without padding; more would not be faster"
    if tokens == sizes[0]:
        return "the longest sample; more does not fit or helps little"
    return "packed without padding; the most that fits"


def _checkpointing_why(search: Search, chosen: Candidate) -> str:
    if chosen.checkpointing == "none":
        return "activations fit, nothing is computed twice"
    if chosen.checkpointing == "offload" and search.request.device.kind == "cuda":
        return f"inputs of layers lie in RAM: on the card they do not fit; some {_slower()} slower again (assumed)"
    return "less memory, about a third slower"


def _slower() -> str:
    return format_share(1 - OFFLOAD_SPEED, digits=0)


def _chunk_why(search: Search, chosen: Candidate) -> str:
    rows = f"rows of {search.shape.vocab:,} logits at a time"
    from edgepeft.plan.search import LOSS_CHUNKS

    return f"{rows}; fewer than usual, to save memory" if chosen.loss_chunk_tokens < LOSS_CHUNKS[0] else rows


def _samples_why(search: Search, recipe: Recipe) -> tuple[str, Origin]:
    preset = search.request.preset.samples_per_step
    if recipe.samples_per_step < preset.value:
        return "fewer than usual: small data needs steps", "auto"
    return preset.description, "preset"


def _epochs_why(search: Search, recipe: Recipe) -> tuple[str, Origin]:
    preset = search.request.preset
    if recipe.epochs > preset.epochs.value:
        return f"small data: towards {preset.min_steps.value} steps", "auto"
    return preset.epochs.description, "preset"


def _rate_why(search: Search) -> str:
    base, factor = search.request.preset.learning_rate.value, METHODS[search.method_id].rate
    usual = "" if factor == 1 else f", times {factor:g} for {search.method_id}"
    return f"{base:g} at width 4,096; this model is {search.shape.hidden:,} wide{usual}"
