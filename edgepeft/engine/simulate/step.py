"""A run in small on tensors without values: load, an update that makes optimizer state, a step, an evaluation, a save.

Everything is the engine's own: loading, method, step, loss, checkpointing, optimizer. Nothing is computed.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from edgepeft.engine.kernels import pretend
from edgepeft.engine.ledger import LiveBytes, assign, counting_as, current_place, mark_place
from edgepeft.engine.methods import AttachedAdapter, attach, set_active
from edgepeft.engine.model.frozen import DTYPES, Workspace
from edgepeft.engine.model.load import LoadedModel, take_over
from edgepeft.engine.simulate.fake_operations import fake_operations
from edgepeft.engine.simulate.model import build_model, layers_repeat
from edgepeft.engine.simulate.replay import Recording
from edgepeft.engine.simulate.scratch import ScratchOf
from edgepeft.engine.training.batches import Sample
from edgepeft.engine.training.memory import MemoryGauge, Size
from edgepeft.engine.training.optimizer import make_optimizer
from edgepeft.engine.training.step import StepRunner
from edgepeft.memory.breakdown import Category, PhaseName
from edgepeft.memory.dry_run import DryRunRequest
from edgepeft.models.shape import ModelShape
from edgepeft.models.store import ModelEntry

CPU = torch.device("cpu")

Peaks = dict[str, dict[Category, int]]
"""Live bytes by category at the highest point of each place of a phase."""


class SimulatedRun(msgspec.Struct, frozen=True):
    """What was seen."""

    layers: int
    phases: dict[PhaseName, Peaks]
    recording: Recording
    """All births and deaths, for a model of an allocator."""
    regular: bool
    """Whether layers repeat with the period that was asked for."""


def simulate(config: Any, layers: int, request: DryRunRequest, *, period: int) -> SimulatedRun:
    """Executes the run of `request` on a model of `config`.

    Args:
        config: transformers' config of a model with `layers` layers.
        layers: of it.
        request: what to run.
        period: after how many layers their kinds repeat.

    Raises:
        BadInput: the model cannot be made, or trained.
        UsageError: the method does not suit it.
    """
    recipe = request.spec.recipe
    with _no_collections(), FakeTensorMode(), pretend(request.target):
        workspace = Workspace(CPU, DTYPES[recipe.compute_dtype])
        model = build_model(config)
        regular = layers_repeat(model, period)
        recording = Recording(current_place)
        # Files have each expert by itself: opening a model puts them together, in the memory of the CPU.
        merged = [parameter for parameter in model.parameters() if parameter.dim() > 2]
        held = merged if request.target.kind == "cpu" else []
        ledger = LiveBytes(
            CPU,
            known={"frozen weights": [*model.buffers(), *held]},
            mapped=list(model.parameters()),
            others=False,
            trace=recording,
            scratch=ScratchOf(request.target),
        )
        phases: dict[PhaseName, Peaks] = {}

        def end(phase: PhaseName) -> None:
            phases[phase] = {
                place: {category: size for category, size in peak.items() if size}
                for place, peak in ledger.peaks_by_place.items()
            }
            recording.end(phase)
            mark_place(f"after {phase}")
            ledger.restart_peaks()

        with counting_as("workspace", "loading"), ledger, fake_operations():
            take_over(
                model,
                recipe.precision,
                recipe.compute_dtype,
                workspace,
                merged=merged,
                progress=lambda what, share: None,
                name="",
            )
            loaded = LoadedModel(model, _entry(model), CPU, recipe.compute_dtype, workspace)
            for category, tensors in loaded.tensors_by_category().items():
                assign(tensors, category)
            end("load")
            run = _Run(loaded, request)
            run.first_update()
            ledger.restart_peaks()
            run.measured_step()
            end("train step")
            if request.workload.held_out_tokens:
                run.evaluate()
                end("evaluation")
            run.save()
            end("save")
    return SimulatedRun(layers, phases, recording, regular)


@contextmanager
def _no_collections() -> Iterator[None]:
    """Keeps the garbage collector still: when it comes depends on all that the process has done before, and storages
    in reference cycles would die in one layer in one run and in another in the next."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Run:
    """The steps of a run on one fake model."""

    def __init__(self, loaded: LoadedModel, request: DryRunRequest) -> None:
        spec, self._workload = request.spec, request.workload
        self._recipe = spec.recipe
        with counting_as("adapter weights", "fresh adapter"):
            self._adapter: AttachedAdapter = attach(loaded, "dry run", self._recipe.method, self._recipe.seed)
        set_active(loaded, [(self._adapter.name, 1.0)])
        named = self._adapter.named_parameters()
        self._parameters = list(named.values())
        self._optimizer = make_optimizer(named, self._recipe.optimizer)
        self._runner = StepRunner(
            loaded, self._recipe, backward=lambda loss: loss.backward(), gauge=UnwatchedGauge(loaded.device)
        )
        largest = max(self._workload.tokens, self._workload.held_out_tokens, spec.layout.micro_batch_tokens)
        self._layout = msgspec.structs.replace(spec.layout, micro_batch_tokens=largest)

    def first_update(self) -> None:
        """Makes optimizer state exist, and gradients where the measured micro-batch is not its step's first."""
        with counting_as("gradients", "first update"):
            for parameter in self._parameters:
                parameter.grad = torch.zeros_like(parameter)
        self._step()
        if self._workload.alone:
            self._optimizer.zero_grad(set_to_none=True)

    def measured_step(self) -> None:
        """The workload's micro-batch, and the optimizer after it."""
        self._runner.train(_samples(self._workload.lengths(), self._workload.trained), self._layout, 1)
        self._step()
        self._optimizer.zero_grad(set_to_none=True)

    def evaluate(self) -> None:
        """The held-out micro-batch."""
        samples = _samples(self._workload.held_out_lengths(), self._workload.held_out_trained)
        self._runner.evaluate(samples, self._layout)

    def save(self) -> None:
        """The tensors that go into the adapter's file, as it is written."""
        with counting_as("adapter weights", "save"):
            tensors = list(self._adapter.file_tensors().values())
            # The file's bytes exist whole before they are written.
            torch.empty(sum(tensor.nbytes for tensor in tensors), dtype=torch.uint8)

    def _step(self) -> None:
        with counting_as("optimizer state", "optimizer step"):
            gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
            torch.nn.utils.get_total_norm(gradients, foreach=True)
            torch._foreach_mul_(gradients, 0.5)
            self._optimizer.step()


class UnwatchedGauge(MemoryGauge):
    """For steps that are measured from outside."""

    def wants(self, size: Size) -> bool:
        """Never."""
        return False

    def wants_evaluation(self, size: Size) -> bool:
        """Never."""
        return False


def _samples(lengths: tuple[int, ...], trained: int) -> list[Sample]:
    samples = []
    for number, length in enumerate(lengths):
        rows = np.arange(min(length, trained))
        trained -= rows.size
        samples.append(Sample(number, np.zeros(length, np.int32), rows, np.zeros(rows.size, np.int64)))
    return samples


def _entry(model: PreTrainedModel) -> ModelEntry:
    """What the engine asks of a model of the store; of its shape, training asks for the vocabulary alone."""
    text: Any = model.config.get_text_config()
    embedding: Any = model.get_input_embeddings()
    shape = ModelShape(
        architecture=type(model).__name__,
        model_type=str(text.model_type),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", 0),
        heads=text.num_attention_heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocab=embedding.num_embeddings,
        context_length=getattr(text, "max_position_embeddings", 0),
        tied_embeddings=model.get_output_embeddings().weight is embedding.weight,
        linears=(),
        norm_parameters=0,
        final_norm_parameters=0,
    )
    return ModelEntry("", "folder", "", "", "", "", shape, "bf16", 0, None, (), "")
