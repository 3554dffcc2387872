"""A training run from its folder to a finished adapter.

The recipe decides what is learned; the layout may change on the way when memory runs out. Every step is a pure function
of the recipe, the step's number and the state before it, so a run goes on from any checkpoint as if never interrupted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from accelerate import Accelerator

from edgepeft.data.prepare import PreparedData, check_unchanged, prepare
from edgepeft.data.schedule import step_samples, total_steps
from edgepeft.data.token_table import TokenTable
from edgepeft.engine.methods import attach, set_active
from edgepeft.engine.model.load import LoadedModel, load_model
from edgepeft.engine.training.batches import Sample, read_samples
from edgepeft.engine.training.checkpoints import (
    Checkpoint,
    RunPosition,
    optimizer_tensors,
    read_newest_checkpoint,
    restore_optimizer,
    write_checkpoint,
)
from edgepeft.engine.training.device import device_name, package_versions, training_device, use_physical_cores
from edgepeft.engine.training.memory import MemoryGauge, resident_bytes
from edgepeft.engine.training.optimizer import FiniteWatch, learning_rate_at, make_adamw
from edgepeft.engine.training.outcome import finish_run
from edgepeft.engine.training.recovery import release_memory, smaller_layout
from edgepeft.engine.training.step import MicroBatchTooLarge, StepRunner, StepSums
from edgepeft.engine.training.stopping import StopRequests, StopRun
from edgepeft.errors import BadInput, OutOfMemory
from edgepeft.memory.breakdown import Category
from edgepeft.models.store import ModelEntry, find_model, verify_unchanged
from edgepeft.plan.train_plan import TrainPlan
from edgepeft.runs.events import (
    CheckpointSaved,
    Evaluated,
    Event,
    MemoryMeasured,
    OutOfMemoryHit,
    PhaseChanged,
    Recovered,
    Started,
    StepDone,
    Warned,
)
from edgepeft.runs.layout import RunFolder
from edgepeft.spec import Recipe

Emit = Callable[[Event], None]

_RECENT_STEPS = 20
_LIFE_SECONDS = 2.0
"""Time between signs of life during the first step of a process."""
_FRESH_STEPS = 2
"""Steps of a process in which gradients and optimizer state come into being; all of their memory is measured."""


def run_training(run: RunFolder, emit: Emit, requests: StopRequests) -> None:
    """Executes the plan of `run`, or what is left of it, and ends with a `Finished` event.

    Raises:
        BadInput: the base, the data or a checkpoint are not those of the plan.
        OutOfMemory: no smaller layout is left.
        EdgepeftError: anything else that its reader can do something about.
    """
    plan = run.read_plan()
    recipe = plan.spec.recipe
    accelerator = Accelerator(
        cpu=plan.spec.device == "cpu",
        mixed_precision="fp16" if recipe.compute_dtype == "fp16" and plan.spec.device != "cpu" else "no",
    )
    device = training_device(plan.spec.device, accelerator.device)
    use_physical_cores()
    complaints: list[str] = []
    checkpoint = read_newest_checkpoint(run.checkpoints, recipe, complaints.append)
    done = checkpoint.position.step if checkpoint else 0
    emit(Started(step=done, steps=plan.steps, device=device_name(device), versions=package_versions()))
    for complaint in complaints:
        emit(Warned(message=complaint, step=done))
    entry = _find_base(recipe)
    data = _prepare_data(recipe, entry, emit)
    loaded = _load(recipe, entry, device, emit)
    training = Training(run, plan, loaded, data, accelerator, emit, requests)
    if checkpoint is not None:
        training.restore(checkpoint)
    training.execute()


def _find_base(recipe: Recipe) -> ModelEntry:
    entry = find_model(recipe.base.model)
    if entry.fingerprint != recipe.base.fingerprint:
        raise BadInput(
            f"model {entry.name} in the store is not the one that was planned with",
            where=recipe.base.model,
            hint="Add the model of the plan under this name again, or plan anew",
        )
    verify_unchanged(entry)
    return entry


def _prepare_data(recipe: Recipe, entry: ModelEntry, emit: Emit) -> PreparedData:
    emit(PhaseChanged(name="data", detail=Path(recipe.data.path).name))
    for gone in check_unchanged(recipe.data):
        emit(Warned(message=gone))
    told = [time.monotonic()]

    def progress(done: int, total: int) -> None:
        if time.monotonic() - told[0] > 0.5:
            told[0] = time.monotonic()
            emit(PhaseChanged(name="data", detail=Path(recipe.data.path).name, fraction=done / max(1, total)))

    return prepare(recipe.data, Path(entry.folder), progress=progress)


def _load(recipe: Recipe, entry: ModelEntry, device: torch.device, emit: Emit) -> LoadedModel:
    emit(PhaseChanged(name="load", detail=entry.name))
    told = [time.monotonic()]

    def progress(what: str, fraction: float | None) -> None:
        if time.monotonic() - told[0] > 0.5:
            told[0] = time.monotonic()
            emit(PhaseChanged(name="load", detail=what, fraction=fraction))

    return load_model(
        entry, precision=recipe.precision, compute_dtype=recipe.compute_dtype, device=device, progress=progress
    )


class Training:
    """The state of a run in this process, and the loop over its steps."""

    def __init__(
        self,
        run: RunFolder,
        plan: TrainPlan,
        loaded: LoadedModel,
        data: PreparedData,
        accelerator: Accelerator,
        emit: Emit,
        requests: StopRequests,
    ) -> None:
        self.run = run
        self.plan = plan
        self.loaded = loaded
        self.emit = emit
        self._recipe = plan.spec.recipe
        self._upkeep = plan.spec.upkeep
        self._accelerator = accelerator
        self._requests = requests
        self.adapter = attach(loaded, "training", self._recipe.method, self._recipe.seed)
        set_active(loaded, [(self.adapter.name, 1.0)])
        self._parameters = self.adapter.named_parameters()
        self._adamw = make_adamw(list(self._parameters.values()), self._recipe.optimizer)
        self._optimizer = accelerator.prepare_optimizer(self._adamw)
        self._train = data.train.limited(self._recipe.max_seq_len, self._recipe.overlong)
        self._held_out = data.held_out.limited(self._recipe.max_seq_len, self._recipe.overlong)
        if not len(self._train):
            raise BadInput(
                f"no sample is left of at most {self._recipe.max_seq_len} tokens",
                where=self._recipe.data.path,
                hint="Raise --max-seq-len, or let longer samples be truncated",
            )
        self.steps = total_steps(
            len(self._train), self._recipe.samples_per_step, self._recipe.epochs, self._recipe.max_steps
        )
        if self.steps != plan.steps:
            emit(Warned(message=f"the data gives {self.steps} steps, the plan said {plan.steps}"))
        self.position = RunPosition(step=0, layout=plan.spec.layout)
        self.gauge = MemoryGauge(loaded.device)
        self._finite = FiniteWatch()
        self._runner = StepRunner(
            loaded,
            self._recipe,
            backward=self._backward,
            gauge=self.gauge,
            before_micro_batch=self._before_micro_batch,
        )
        self._saved_at = time.monotonic()
        self._saved_step = -1
        self._seconds_smoothed: float | None = None
        self._micro_batches = 0
        self._told_at = 0.0

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes on where `checkpoint` was written."""
        self.adapter.load_state_dict(checkpoint.adapter)
        restore_optimizer(self._adamw, self._parameters, checkpoint.optimizer)
        checkpoint.restore_random_states()
        if self._scaler is not None and checkpoint.scaler:
            self._scaler.load_state_dict(checkpoint.scaler)
        self.position = checkpoint.position
        self._finite.in_a_row = self.position.not_finite_in_a_row
        self._saved_step = self.position.step

    def execute(self) -> None:
        """Runs the steps that are left, evaluates, and saves; when asked to stop, saves what there is."""
        self.emit(PhaseChanged(name="load", detail="trying the model on a few tokens"))
        with self.gauge.watch():
            self._runner.check()
        self._measured("load")
        stopped = False
        try:
            self._run_steps()
            if self.position.step != self._saved_step:
                self._save_checkpoint()
            if self.position.last_eval_step != self.position.step:
                self._evaluate()
        except StopRun:
            stopped = True
        if self.position.step != self._saved_step:
            self._save_checkpoint()
        self.emit(PhaseChanged(name="save"))
        self.emit(finish_run(self, stopped=stopped))

    def _run_steps(self) -> None:
        self.emit(PhaseChanged(name="train", detail="the first step takes longest"))
        self._told_at = time.monotonic()
        first = self.position.step
        while self.position.step < self.steps:
            self._requests.poll()
            fresh = self.position.step - first
            self._step(watch_all=fresh < _FRESH_STEPS)
            if fresh == 0:
                # Optimizer state exists only from here on: earlier figures may not stand in for later ones.
                self.gauge.forget_sizes()
            every = self._upkeep.eval_every_steps
            if every and self.position.step % every == 0 and self.position.step < self.steps:
                self._evaluate()
                self.emit(PhaseChanged(name="train"))
            if self._checkpoint_is_due():
                self._save_checkpoint()

    def _step(self, *, watch_all: bool) -> None:
        step = self.position.step
        rate = learning_rate_at(step, self.steps, self._recipe.optimizer, self._recipe.schedule)
        for group in self._adamw.param_groups:
            group["lr"] = rate
        indices = step_samples(len(self._train), self._recipe.samples_per_step, step, self._recipe.seed)
        begun = time.perf_counter()
        peak_before = self.gauge.peak_bytes
        sums = self._gradients(self._read(self._train, indices), watch_all=watch_all)
        loss = sums.loss / max(1, sums.trained_tokens)
        grad_norm = self._clip()
        if not sums.trained_tokens:
            # Truncated to their first token, samples teach nothing; a gradient scaler refuses a step without gradients.
            recent = self.position.recent_losses
        elif self._finite.accepts(loss, grad_norm, self._scaler.get_scale() if self._scaler is not None else 1.0):
            self._optimizer.step()
            recent = (*self.position.recent_losses, loss)[-_RECENT_STEPS:]
        else:
            # A scaler lowers its scale when it sees the bad gradient; without one, dropping the gradient is all.
            if self._scaler is not None:
                self._optimizer.step()
            recent = self.position.recent_losses
            self.emit(Warned(message=f"step {step + 1} is skipped: its loss or gradient is not finite", step=step + 1))
        self._optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - begun
        self.position = msgspec.structs.replace(
            self.position,
            step=step + 1,
            train_seconds=self.position.train_seconds + seconds,
            train_tokens=self.position.train_tokens + sums.tokens,
            recent_losses=recent,
            not_finite_in_a_row=self._finite.in_a_row,
        )
        before = self._seconds_smoothed
        self._seconds_smoothed = seconds if before is None or watch_all else 0.8 * before + 0.2 * seconds
        self.emit(
            StepDone(
                step=step + 1,
                loss=loss,
                learning_rate=rate,
                grad_norm=grad_norm,
                tokens=sums.tokens,
                trained_tokens=sums.trained_tokens,
                seconds=seconds,
                tokens_per_second=sums.tokens / seconds,
                live_bytes=self.gauge.live_bytes,
                peak_bytes=self.gauge.peak_bytes,
                eta_seconds=self._seconds_smoothed * (self.steps - step - 1),
            )
        )
        if self.gauge.peak_bytes > peak_before:
            self._measured("train step")

    def _gradients(self, samples: list[Any], *, watch_all: bool) -> StepSums:
        """Forward and backward of the step; after an out-of-memory the same again in a smaller layout."""
        while True:
            failed: tuple[int, int, str] | None = None
            try:
                return self._runner.train(samples, self.position.layout, self.position.step, watch_all=watch_all)
            except MicroBatchTooLarge as error:
                failed = (error.tokens, error.samples, str(error))
            except StopRun:
                self._optimizer.zero_grad(set_to_none=True)
                raise
            self._shrink(*failed)

    def _shrink(self, tokens: int, samples: int, message: str) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        release_memory()
        layout = self.position.layout
        number = self.position.step + 1
        self.emit(
            OutOfMemoryHit(
                step=number, phase="train step", micro_batch_tokens=layout.micro_batch_tokens, message=message
            )
        )
        smaller = smaller_layout(layout, tokens, samples)
        if smaller is None:
            raise OutOfMemory(
                f"memory ran out in step {number}, in a micro-batch of one sample with {tokens} tokens",
                hint=f"Resume when more memory is free, or train with --max-seq-len {max(1, tokens // 2)}, a smaller "
                "rank, or a base in nf4",
            )
        self.position = msgspec.structs.replace(self.position, layout=smaller[0])
        self.emit(
            Recovered(
                step=number,
                what=smaller[1],
                micro_batch_tokens=smaller[0].micro_batch_tokens,
                checkpointing=smaller[0].checkpointing,
            )
        )
        # A process killed in the next attempt then resumes in the smaller layout.
        self._save_checkpoint()

    def _clip(self) -> float:
        """Scales the gradients down to the recipe's norm; returns the norm before."""
        gradients = [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]
        if not gradients:
            return 0.0
        self._accelerator.unscale_gradients(self._optimizer)
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        limit = self._recipe.optimizer.max_grad_norm
        found = float(norm)
        if limit > 0 and math.isfinite(found) and found > limit:
            torch._foreach_mul_(gradients, limit / (found + 1e-6))
        return found

    def _evaluate(self) -> None:
        count = min(len(self._held_out), self._upkeep.eval_max_samples)
        if not count:
            return
        self.emit(PhaseChanged(name="evaluate"))
        peak_before = self.gauge.peak_bytes
        sums = self._runner.evaluate(self._read(self._held_out, range(count)), self.position.layout)
        if not sums.trained_tokens:
            return
        loss = sums.loss / sums.trained_tokens
        best = self.position.best_eval_loss
        improved = math.isfinite(loss) and (best is None or loss < best)
        self.position = msgspec.structs.replace(
            self.position,
            last_eval_loss=loss,
            last_eval_step=self.position.step,
            best_eval_loss=loss if improved else best,
        )
        self.emit(
            Evaluated(
                step=self.position.step,
                loss=loss,
                samples=count,
                trained_tokens=sums.trained_tokens,
                best=improved,
            )
        )
        if self.gauge.peak_bytes > peak_before:
            self._measured("evaluation")

    def _before_micro_batch(self) -> None:
        """Obeys requests; before there is a step to tell of, says that something happens."""
        self._requests.poll()
        self._micro_batches += 1
        if self._seconds_smoothed is None and time.monotonic() - self._told_at > _LIFE_SECONDS:
            self._told_at = time.monotonic()
            self.emit(PhaseChanged(name="train", detail=f"first step, micro-batch {self._micro_batches}"))

    def _read(self, table: TokenTable, indices: Sequence[int]) -> list[Sample]:
        """The samples at `indices`; a token without an embedding, which on a card ends the process, is refused."""
        samples = read_samples(table, indices)
        rows = self.loaded.shape.vocab
        for sample in samples:
            if (largest := max(int(sample.ids.max()), int(sample.targets.max()))) >= rows:
                raise BadInput(
                    f"line {table.line(sample.number)} has token {largest}, and the model has {rows} embeddings",
                    where=self._recipe.data.path,
                    hint="Use the tokenizer that belongs to the model's weights",
                )
        return samples

    def _checkpoint_is_due(self) -> bool:
        if self._requests.checkpoint_wanted:
            return True
        every = self._upkeep.checkpoint_steps
        if every and self.position.step % every == 0:
            return True
        return time.monotonic() - self._saved_at >= self._upkeep.checkpoint_seconds

    def _save_checkpoint(self) -> None:
        self.position = msgspec.structs.replace(
            self.position, peak_bytes=max(self.position.peak_bytes, self.gauge.peak_bytes)
        )
        folder = write_checkpoint(
            self.run.checkpoints,
            self.position,
            self._recipe,
            self.adapter.state_dict(),
            optimizer_tensors(self._adamw, self._parameters),
            scaler=self._scaler.state_dict() if self._scaler is not None else None,
            keep=self._upkeep.keep_checkpoints,
        )
        self._saved_at = time.monotonic()
        self._saved_step = self.position.step
        self._requests.checkpoint_wanted = False
        path = folder.relative_to(self.run.path).as_posix()
        self.emit(CheckpointSaved(step=self.position.step, path=path))

    def _measured(self, phase: Any) -> None:
        by_category: dict[Category, int] = self.loaded.bytes_by_category()
        by_category["adapter weights"] = sum(parameter.nbytes for parameter in self._parameters.values())
        by_category["optimizer state"] = sum(
            tensor.nbytes for tensor in optimizer_tensors(self._adamw, self._parameters).values()
        )
        self.emit(
            MemoryMeasured(
                step=self.position.step,
                phase=phase,
                live_bytes=self.gauge.live_bytes,
                peak_bytes=self.gauge.peak_bytes,
                reserved_bytes=self.gauge.reserved_bytes,
                rss_bytes=resident_bytes(),
                by_category=by_category,
            )
        )

    def _backward(self, loss: torch.Tensor) -> None:
        self._accelerator.backward(loss)

    @property
    def _scaler(self) -> Any:
        return self._accelerator.scaler
