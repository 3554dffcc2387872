"""How fast a layout is beside others, and how long a run takes on a device.

Beside one forward, a step under frozen weights has a backward of equal cost: gradients go to the inputs only. So a
token costs 4 operations for each frozen weight that it is multiplied with, and 6 where checkpointing runs every layer
forward once more. The output head sees only tokens whose successor is trained.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np

from edgepeft.data.schedule import step_samples, steps_per_epoch
from edgepeft.memory.calibration import Observation, observations
from edgepeft.methods import count_parameters, method_of
from edgepeft.models.quantized_copy import usable_copy_bytes
from edgepeft.models.shape import ModelShape
from edgepeft.plan.unfreezing import training_share
from edgepeft.plan.workloads import Counts, StepList
from edgepeft.spec import Checkpointing, RunSpec
from edgepeft.units import format_seconds, format_share

if TYPE_CHECKING:
    from edgepeft.hardware.measured import Measured
    from edgepeft.models.described import DescribedModel
    from edgepeft.models.store import ModelEntry
    from edgepeft.plan.device import PlanDevice
    from edgepeft.plan.lengths import SampleLengths

SATURATION: dict[Literal["cpu", "cuda"], tuple[int, int]] = {"cpu": (64, 2048), "cuda": (512, 8192)}
"""Tokens of a micro-batch at which a device reaches half of its speed, and above which more bring nothing. Rules of
thumb."""
RECOMPUTE_SPEED = 2 / 3
"""Speed with checkpointing, as a share: 4 operations of 6."""
OFFLOAD_SPEED = 0.95
"""Speed of checkpointing with inputs in the host's RAM, as a share of that with inputs on the card: an assumption. An
input takes microseconds a token over PCIe, the layer that it is copied beside tens of them."""
CHUNK_COST = 4.0
"""Rows of logits whose work one more launch is worth; it ranks chunk sizes and nothing else."""
ASSUMED_SHARE: dict[tuple[str, str], float] = {("cpu", "bf16"): 0.15, ("cpu", "fp32"): 0.45}
"""Part of a device's matrix throughput that training reaches, by the dtype that was measured, until a run was
observed: with the embedded model 0.11 to 0.17 on a CPU with instructions for bfloat16, about 0.5 on one without."""
ASSUMED_SHARE_OF_CARD = 0.35
"""The same for cards: an assumption."""
OBSERVED_RUNS = 5
"""Newest runs that tell a device's speed."""
LEAST_SECONDS = 1.0
"""Shorter runs tell little about speed."""
START_SECONDS = 6.0
"""Imports, and the first look at the data."""
READ_BYTES_PER_S = 0.5e9
"""Of a disk that was not measured."""
QUANTIZED_WEIGHTS_PER_S: dict[Literal["cpu", "cuda"], float] = {"cpu": 60e6, "cuda": 5e9}
"""To NF4, while loading; measured on two cores, assumed for cards."""


class RunTime(msgspec.Struct, frozen=True):
    """How long a run takes."""

    operations: float
    """Of all training steps."""
    seconds: float | None
    """From the start of its process to the finished adapter; None when the device's speed is not known."""
    why: str
    """Where that comes from, in one line."""
    share: float = 1.0
    """Part of the steps that the run's time limit leaves time for."""


class Rate(msgspec.Struct, frozen=True):
    """Operations that training does in a second, and how that is known."""

    operations_per_second: float
    why: str
    """Words for the plan, such as `as 3 runs here did`."""
    assumed: bool = False
    """Whether no run and no measurement stands behind it."""


def relative_speed(
    kind: Literal["cpu", "cuda"], tokens: int, checkpointing: Checkpointing, loss_chunk_tokens: int
) -> float:
    """A speed that ranks layouts of one recipe; 1 is a saturated device that computes nothing twice.

    Args:
        kind: of the device.
        tokens: of the largest micro-batch.
        checkpointing: of the layout.
        loss_chunk_tokens: of the layout.
    """
    half, most = SATURATION[kind]
    tokens = min(most, tokens)
    speed = tokens / (tokens + half)
    if checkpointing != "none":
        speed *= RECOMPUTE_SPEED
    if checkpointing == "offload" and kind == "cuda":
        speed *= OFFLOAD_SPEED
    return speed * loss_chunk_tokens / (loss_chunk_tokens + CHUNK_COST)


def time_run(
    spec: RunSpec, shape: ModelShape, device: PlanDevice, lengths: SampleLengths, entry: ModelEntry | DescribedModel
) -> RunTime | None:
    """The time of a whole run: loading, training within its time limit, evaluations; None without a sample to train on.

    Args:
        spec: the run.
        shape: its base.
        device: what it runs on.
        lengths: of its samples.
        entry: the base as the store knows it, or its description.
    """
    run = lengths.steps(spec.recipe)
    if run is None:
        return None
    training = training_operations(spec, shape, run)
    rate = find_rate(device, spec, shape)
    if rate is None:
        return RunTime(training, None, _unknown(device, shape))
    tokens, trained = lengths.held_out(spec.recipe)
    every = spec.upkeep.eval_every_steps
    offloads = spec.layout.checkpointing == "offload" and device.kind == "cuda"
    seconds = training / rate.operations_per_second / (OFFLOAD_SPEED if offloads else 1.0)
    most = spec.upkeep.max_seconds
    share = 1.0 if most is None or seconds <= most else most / seconds
    # One of the base before the first step, and one at the end.
    evaluations = (int((run.steps - 1) * share) // every if every else 0) + 2 if len(tokens) else 0
    evaluating = evaluations * evaluation_operations(spec, shape, tokens, trained)
    copy_bytes = usable_copy_bytes(entry, spec.recipe.precision, device.kind) if device.present else None
    loading = load_seconds(spec, shape, device, entry.weights_bytes, copy_bytes)
    whole = loading + share * seconds + evaluating / rate.operations_per_second
    return RunTime(training, whole, rate.why if share == 1 else f"{rate.why}; ended by max-time", share)


def _unknown(device: PlanDevice, shape: ModelShape) -> str:
    if shape.expert_parameters:
        return "not known for a mixture of experts before a first run"
    return "measure it once: edgepeft doctor --measure" if device.present else "its profile names no throughput"


def training_operations(spec: RunSpec, shape: ModelShape, run: StepList) -> float:
    """Floating-point operations of the products in all steps of a run; where a method does more than products, as many
    as take that time."""
    times = np.zeros(len(run.tokens), np.int64)
    whole, rest = divmod(run.steps, steps_per_epoch(len(run.tokens), run.samples_per_step))
    times += whole
    for step in range(run.steps - rest, run.steps):
        times[step_samples(len(run.tokens), run.samples_per_step, step, run.seed)] += 1
    learning = training_share(spec.recipe, shape, run.steps)
    return _operations(spec, shape, run.tokens, run.trained, times, learning=learning)


def evaluation_operations(spec: RunSpec, shape: ModelShape, tokens: Counts, trained: Counts) -> float:
    """Operations of one evaluation.

    Args:
        spec: the run.
        shape: its base.
        tokens: of each held-out sample, [n].
        trained: its tokens that carry loss, [n].
    """
    count = min(len(tokens), spec.upkeep.eval_max_samples)
    times = np.ones(count, np.int64)
    return _operations(spec, shape, tokens[:count], trained[:count], times, learning=0.0)


def _operations(
    spec: RunSpec, shape: ModelShape, tokens: Counts, trained: Counts, times: Counts, *, learning: float
) -> float:
    """Operations of samples that run `times` times each through every layer, and back through `learning` of them."""
    weights = shape.layers * shape.linear_parameters_per_layer
    config, method = spec.recipe.method, method_of(spec.recipe.method)
    # What is beside the embedding is looked up, and what is beside the head multiplies trained rows alone.
    tables, width = method.table_terms(config), shape.vocab + shape.hidden
    adapter = learned = count_parameters(config, shape) - width * (tables.embedding_rank + tables.head_rank)
    if method.needs_dense_base:
        # A copy in place of the base's weights is no further product; its gradients are.
        adapter, learned = 0, weights
    elif method.forms_matrices(config):
        # No product of its own, but the gradients of whole matrices.
        targeted = method.targeted(config, shape)
        adapter, learned = 0, shape.layers * sum(linear.in_features * linear.out_features for linear in targeted)
    trains_head = method.trains_tables(config)
    all_tokens = float((tokens * times).sum())
    # Of causal scores one half is needed: two products of length² / 2 entries for each head's width.
    squares = float((tokens.astype(np.float64) ** 2 * times).sum())
    attention = 2.0 * shape.layers * shape.heads * shape.head_dim * squares
    rows = float((trained * times).sum())
    head, beside_head = 2.0 * shape.vocab * shape.hidden * rows, 2.0 * width * tables.head_rank * rows
    layers = 2.0 * (weights + adapter) * all_tokens + attention
    work = method.relative_work(config)
    if not learning:
        return work * (layers + head + beside_head)
    # Backward and recomputation; the adapter's own gradients, and the second half of the attention's backward.
    again = layers if spec.layout.checkpointing == "none" else 2.0 * layers
    layers += learning * (again + 2.0 * learned * all_tokens + attention)
    return work * (layers + (3.0 if trains_head else 2.0) * head + 3.0 * beside_head)


def find_rate(device: PlanDevice, spec: RunSpec, shape: ModelShape) -> Rate | None:
    """How fast training runs on a device: as observed, else from its measured or published throughput.

    None for a device that was never measured and has no profile. Experts of a mixture are not counted among the
    operations, since a token meets only some of them: then only runs of the same model tell its speed.
    """
    if not device.present:
        return None if shape.expert_parameters else _published(device)
    from edgepeft.hardware.measured import load_measured
    from edgepeft.hardware.packages import read_packages

    torch = read_packages().torch
    seen = _alike(observations(device.id, torch), spec)
    own = bool(seen) and seen[0].model == spec.recipe.base.model
    if shape.expert_parameters and not own:
        return None
    if seen:
        rates = [one.operations_per_second or 0.0 for one in seen]
        runs = "a run" if len(seen) == 1 else f"{len(seen)} runs"
        of = "of this model " if own else ""
        return Rate(statistics.median(rates), f"as fast as {runs} {of}here")
    measured = load_measured(device.id, torch)
    return _published(device) if measured is None else _from_measured(device, measured)


def _alike(seen: list[Observation], spec: RunSpec) -> list[Observation]:
    """The newest runs that tell most: of the same model and precision, else of the precision, else any."""
    timed = [one for one in seen if one.seconds >= LEAST_SECONDS and one.operations_per_second]
    same = [one for one in timed if one.precision == spec.recipe.precision]
    own = [one for one in same if one.model == spec.recipe.base.model]
    return (own or same or timed)[-OBSERVED_RUNS:]


def _from_measured(device: PlanDevice, measured: Measured) -> Rate:
    share = ASSUMED_SHARE.get((device.kind, measured.matmul_dtype), ASSUMED_SHARE_OF_CARD)
    day = measured.measured_at[:10]
    return Rate(
        measured.matmul_flops * share,
        f"{_flops(measured.matmul_flops)} measured here on {day}, of which training is taken to reach "
        f"{format_share(share, digits=0)}",
    )


def _published(device: PlanDevice) -> Rate | None:
    if device.tensor_flops is None:
        return None
    share = ASSUMED_SHARE_OF_CARD
    return Rate(
        device.tensor_flops * share,
        f"assumed: {format_share(share, digits=0)} of the {_flops(device.tensor_flops)} in its profile",
        assumed=True,
    )


def _flops(operations_per_second: float) -> str:
    if operations_per_second >= 1e12:
        return f"{operations_per_second / 1e12:.3g} TFLOPS"
    return f"{operations_per_second / 1e9:.3g} GFLOPS"


def load_seconds(
    spec: RunSpec, shape: ModelShape, device: PlanDevice, weights_bytes: int, copy_bytes: int | None = None
) -> float:
    """Time from the start of a worker to its first step.

    Args:
        spec: the run.
        shape: its base.
        device: what it runs on.
        weights_bytes: size of the base's files.
        copy_bytes: of the stored copy of its linears in the run's precision: they are read from it and not quantized;
            None where there is none yet.
    """
    linears = shape.layers * shape.linear_parameters_per_layer
    if copy_bytes is not None:
        others = round(weights_bytes * (1 - linears / shape.parameters))
        return START_SECONDS + (copy_bytes + others) / READ_BYTES_PER_S
    seconds = START_SECONDS + weights_bytes / READ_BYTES_PER_S
    if spec.recipe.precision == "nf4":
        seconds += linears / QUANTIZED_WEIGHTS_PER_S[device.kind]
    return seconds


def say_time(seconds: float | None) -> str:
    """`about 38 min`: no finer than a prediction is; n/a when it is not known."""
    if seconds is None:
        return "n/a"
    if seconds < 120:
        return f"about {max(10, round(seconds / 10) * 10)} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"about {minutes} min"
    return f"about {format_seconds(round(minutes / 10) * 600)}"
