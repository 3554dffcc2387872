"""A training run from its folder to a finished adapter.

The recipe decides what is learned; the layout may change on the way when memory runs out. Every step is a pure function
of the recipe, the step's number and the state before it, so a run goes on from any checkpoint as if never interrupted.
"""

from __future__ import annotations

import math
import time
from typing import Literal, NamedTuple

import msgspec
from accelerate import Accelerator

from edgepeft.data.prepare import PreparedData
from edgepeft.data.schedule import step_samples, total_steps
from edgepeft.engine.methods import attach, set_active
from edgepeft.engine.model.load import LoadedModel
from edgepeft.engine.training.account import MemoryAccount
from edgepeft.engine.training.batches import Sample
from edgepeft.engine.training.checkpoints import Checkpoint, RunPosition, read_newest_checkpoint, write_checkpoint
from edgepeft.engine.training.device import (
    be_deterministic,
    device_name,
    package_versions,
    training_device,
    use_physical_cores,
)
from edgepeft.engine.training.divergence import Diverged, check_divergence, followed, keep_last_good, with_sound_step
from edgepeft.engine.training.ending import protected_steps, reason_to_end, without_lost_best
from edgepeft.engine.training.energy import EnergyAccount
from edgepeft.engine.training.evaluation import Evaluations
from edgepeft.engine.training.held_out import evaluate, evaluate_base
from edgepeft.engine.training.limit import limit_memory
from edgepeft.engine.training.measured import MeasuredPeak
from edgepeft.engine.training.memory import resident_bytes
from edgepeft.engine.training.opening import Emit, check_same_tokens, find_base, load_base, open_data
from edgepeft.engine.training.optimizer import FiniteWatch, learning_rate_at
from edgepeft.engine.training.outcome import finish_run, keep_observation, stopped_before_training
from edgepeft.engine.training.pace import Pace
from edgepeft.engine.training.preparation import prepare
from edgepeft.engine.training.reading import SampleReader
from edgepeft.engine.training.recovery import (
    first_line,
    is_out_of_memory,
    largest_group,
    release_memory,
    smaller_layout,
    what_would_help,
)
from edgepeft.engine.training.samples import Samples
from edgepeft.engine.training.spill import SpillWatch, card_memory, driver_spills
from edgepeft.engine.training.start import load_start
from edgepeft.engine.training.step import MicroBatchTooLarge, StepRunner, StepSums
from edgepeft.engine.training.stopping import StopRequests, StopRun
from edgepeft.engine.training.unfreezing import Unfreezing
from edgepeft.engine.training.update import AdapterUpdate
from edgepeft.engine.training.vocabulary import check_vocabulary
from edgepeft.errors import BadInput, OutOfMemory
from edgepeft.plan.train_plan import TrainPlan
from edgepeft.plan.unfreezing import work_of_steps
from edgepeft.runs.events import (
    Cause,
    CheckpointSaved,
    EndedBy,
    OutOfMemoryHit,
    PhaseChanged,
    Recovered,
    Started,
    StepDone,
    Warned,
)
from edgepeft.runs.layout import RunFolder
from edgepeft.spec import Layout

_LIFE_SECONDS = 2.0
"""Time between signs of life during the first step of a process."""


class _Learned(NamedTuple):
    """What came of one step."""

    sums: StepSums
    loss: float
    """Mean over the trained tokens."""
    grad_norm: float
    outcome: Literal["changed", "nothing to learn", "not finite"]


def run_training(
    run: RunFolder, emit: Emit, requests: StopRequests, *, smaller: Cause | None = None, old_data: bool = False
) -> None:
    """Executes the plan of `run`, or what is left of it, and ends with a `Finished` event.

    Args:
        run: its folder.
        emit: told everything.
        requests: polled before every micro-batch.
        smaller: begin with the next smaller layout, because the worker before this one was "killed" or lost its
            "device".
        old_data: go on with cached tokens where a data file has changed or is gone.

    Raises:
        BadInput: the base, the data or a checkpoint are not those of the plan.
        DoesNotFit: the base alone exceeds the budget.
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
    if plan.spec.layout.deterministic:
        be_deterministic(device)
    complaints: list[str] = []
    checkpoint = read_newest_checkpoint(run.checkpoints, recipe, complaints.append)
    done = checkpoint.position.step if checkpoint else 0
    emit(
        Started(
            step=done,
            steps=plan.steps,
            device=device_name(device),
            versions=package_versions(),
            rss_bytes=resident_bytes(),
        )
    )
    limit = limit_memory(plan.spec.budget_bytes, plan.memory, device)
    for complaint in (*complaints, limit.warning):
        if complaint:
            emit(Warned(message=complaint, step=done))
    account = MemoryAccount(device, plan.spec.device, plan.memory, limit.limit_bytes)
    entry = find_base(recipe)
    position = checkpoint.position if checkpoint else RunPosition(step=0, layout=plan.spec.layout)
    tell = requests.obeyed_by(emit)
    try:
        data = open_data(recipe, entry, tell, forced=old_data)
        with account.sampling():
            loaded = load_base(recipe, entry, device, account, limit, tell)
            training = Training(run, plan, loaded, data, accelerator, account, emit, requests)
            if checkpoint is not None:
                training.restore(checkpoint)
                # Its tensors, copied by now, would otherwise count as the run's for as long as this function works.
                checkpoint = None
            else:
                load_start(run, recipe, loaded, training.adapter)
            stopped = prepare(training, smaller)
    except StopRun:
        emit(stopped_before_training(run, plan, position))
        return
    training.execute(stopped=stopped)


class Training:
    """The state of a run in this process, and the loop over its steps."""

    def __init__(
        self,
        run: RunFolder,
        plan: TrainPlan,
        loaded: LoadedModel,
        data: PreparedData,
        accelerator: Accelerator,
        account: MemoryAccount,
        emit: Emit,
        requests: StopRequests,
    ) -> None:
        self.run = run
        self.plan = plan
        self.loaded = loaded
        self.account = account
        self.emit = emit
        self.gauge = account.gauge
        self._recipe = plan.spec.recipe
        self._upkeep = plan.spec.upkeep
        self._requests = requests
        self.energy = EnergyAccount(plan.spec.device)
        self.adapter = attach(loaded, "training", self._recipe.method, self._recipe.seed)
        set_active(loaded, [(self.adapter.name, 1.0)])
        self.update = AdapterUpdate(
            self.adapter.named_parameters(),
            self._recipe.optimizer,
            accelerator,
            self.adapter.named_places().values(),
        )
        account.follow(loaded, self.update)
        train, held_out = (
            SampleReader(
                table.limited(self._recipe.max_seq_len, self._recipe.overlong),
                loaded.shape.vocab,
                self._recipe.data.path,
                lambda: loaded.prompt.tokens,
            )
            for table in (data.train, data.held_out)
        )
        self.train = train
        if not len(self.train):
            raise BadInput(
                f"no sample is left of at most {self._recipe.max_seq_len} tokens",
                where=self._recipe.data.path,
                hint="Raise --max-seq-len, or let longer samples be truncated",
            )
        if told := check_vocabulary(loaded, train.table, self._recipe):
            emit(Warned(message=told))
        self.steps = total_steps(
            len(self.train), self._recipe.samples_per_step, self._recipe.epochs, self._recipe.max_steps
        )
        if self.steps != plan.steps:
            emit(Warned(message=f"the data gives {self.steps} steps, the plan said {plan.steps}"))
        self.unfreezing = Unfreezing(loaded, self.adapter, self._recipe.unfreeze, self.steps)
        self.position = RunPosition(step=0, layout=plan.spec.layout, data_key=data.key)
        self._finite = FiniteWatch()
        # Before the model is switched to packed attention, which it remembers to leave for an answer.
        self.samples = Samples(loaded, self._recipe.data, self._upkeep.sample_prompts, self.gauge, requests.poll, emit)
        self.runner = StepRunner(
            loaded,
            self._recipe,
            backward=self.update.backward,
            gauge=self.gauge,
            before_micro_batch=self._before_micro_batch,
        )
        self.evaluations = Evaluations(self.runner, held_out, self._upkeep.eval_max_samples, emit)
        spills = loaded.device.type == "cuda" and driver_spills()
        self._spill = SpillWatch(lambda: card_memory(plan.spec.device), spills=spills)
        self._saved_at = time.monotonic()
        self._saved_step = -1
        self._pace = Pace(work_of_steps(self._recipe, self.position.layout, loaded.shape, self.steps))
        self._micro_batches = 0
        self._told_at = math.inf

    @property
    def starts_anew(self) -> bool:
        """Whether nothing has been trained yet, neither in this run nor in a parent of it."""
        return self._recipe.parent is None and self.position.step == 0

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes on where `checkpoint` was written."""
        check_same_tokens(checkpoint.position.data_key, self.position.data_key, self._recipe)
        self.adapter.load_state_dict(checkpoint.adapter)
        self.update.restore(checkpoint.optimizer, checkpoint.scaler)
        checkpoint.restore_random_states()
        self.position, complaint = without_lost_best(checkpoint.position, self._upkeep, self.run.checkpoints)
        if complaint:
            self.emit(Warned(message=complaint, step=self.position.step))
        self.energy.go_on(self.position.energy)
        self._finite.in_a_row = self.position.not_finite_in_a_row
        self._saved_step = self.position.step

    def execute(self, *, stopped: bool = False) -> None:
        """Runs the steps that are left, evaluates, and saves; when asked to stop, saves what there is.

        Raises:
            Diverged: training makes the adapter worse; that of the last sound checkpoint is in the run folder.
        """
        with self.energy.measuring():
            self._execute(stopped)

    def _execute(self, stopped: bool) -> None:
        ended: EndedBy = "request"
        try:
            if stopped:
                raise StopRun
            reason = self._run_steps()
            if self.position.step != self._saved_step:
                self.save_checkpoint()
            if self.position.last_eval_step != self.position.step:
                evaluate(self)
            ended = reason
        except StopRun:
            pass
        except Diverged as error:
            raise keep_last_good(self, error) from error
        if self.position.step != self._saved_step:
            self.save_checkpoint()
        self.emit(PhaseChanged(name="save"))
        finished = finish_run(self, ended)
        if not finished.stopped and (complaint := keep_observation(self, finished)):
            self.emit(Warned(message=complaint))
        self.emit(finished)

    def measured(self) -> MeasuredPeak:
        """The highest memory of the run so far, over all of its processes."""
        return self.position.measured.with_other(self.account.peak())

    # Steps ----------------------------------------------------------------------------------------------------------

    def _run_steps(self) -> EndedBy:
        """Makes steps as long as there is reason to; returns why there is none any more."""
        evaluate_base(self)
        # A stop may have come between a step and its evaluation.
        self._evaluate_if_due()
        self.emit(PhaseChanged(name="train", detail="the first step"))
        self._told_at, self._micro_batches = time.monotonic(), 0
        while (ended := reason_to_end(self.position, self.steps, self._upkeep)) is None:
            self._requests.poll()
            self._step()
            if self._evaluate_if_due():
                self.emit(PhaseChanged(name="train"))
            if self._checkpoint_is_due():
                self.save_checkpoint()
        return ended

    def _step(self) -> None:
        step = self.position.step
        rate = learning_rate_at(step, self.steps, self._recipe.optimizer, self._recipe.schedule)
        self.update.set_rate(rate)
        indices = step_samples(len(self.train), self._recipe.samples_per_step, step, self._recipe.seed)
        begun = time.perf_counter()
        peak_before = self.gauge.peak_bytes
        learned = self._learn(self.train.read(indices))
        self.update.drop_gradients()
        seconds = time.perf_counter() - begun
        recent, lowest = self.position.recent_losses, self.position.lowest_recent_loss
        if learned.outcome == "changed":
            recent, lowest = followed(recent, lowest, learned.loss)
        elif learned.outcome == "not finite":
            self.emit(Warned(message=f"step {step + 1} is skipped: its loss or gradient is not finite", step=step + 1))
        self.position = msgspec.structs.replace(
            self.position,
            step=step + 1,
            train_seconds=self.position.train_seconds + seconds,
            train_tokens=self.position.train_tokens + learned.sums.tokens,
            recent_losses=recent,
            lowest_recent_loss=lowest,
            not_finite_in_a_row=self._finite.in_a_row,
        )
        self._pace.add(step, seconds)
        speed = learned.sums.tokens / seconds
        self.emit(
            StepDone(
                step=step + 1,
                loss=learned.loss,
                learning_rate=rate,
                grad_norm=learned.grad_norm,
                tokens=learned.sums.tokens,
                trained_tokens=learned.sums.trained_tokens,
                seconds=seconds,
                tokens_per_second=speed,
                live_bytes=self.account.live_bytes(),
                peak_bytes=self.account.peak().peak_bytes,
                rss_bytes=self.account.read_resident(),
                eta_seconds=self._eta_seconds(),
                power_watts=self.energy.power_watts,
                energy_wh=self.energy.watt_hours,
            )
        )
        if self.gauge.peak_bytes > peak_before:
            self.tell_memory("train step")
        if warning := self._spill.step(speed):
            self.emit(Warned(message=warning, step=step + 1))
        check_divergence(self.position, self._recipe.optimizer.learning_rate, self.loaded.shape.vocab)

    def _eta_seconds(self) -> float:
        left = self._pace.seconds_left(self.position.step)
        most = self._upkeep.max_seconds
        return left if most is None else max(0.0, min(left, most - self.position.train_seconds))

    def _learn(self, samples: list[Sample]) -> _Learned:
        """Forward, backward and update of the step; after an out-of-memory all of it again in a smaller layout."""
        while True:
            layout, not_finite = self.position.layout, self._finite.in_a_row
            failed: tuple[int, int, str] | None = None
            try:
                # Layers that begin to train in this step get their state: memory can run out here, too.
                self.unfreezing.begin_step(self.position.step)
                self.update.create_state()
                return self._change(self.runner.train(samples, layout, self.position.step))
            except MicroBatchTooLarge as error:
                failed = (error.tokens, error.samples, str(error))
            except StopRun:
                self.update.drop_gradients()
                raise
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                lengths = [len(sample.ids) for sample in samples]
                failed = (*largest_group(lengths, layout.micro_batch_tokens), first_line(error))
            self._finite.in_a_row = not_finite
            self.update.start_anew()
            self.shrink(*failed, "step")

    def _change(self, sums: StepSums) -> _Learned:
        """Clips the step's gradients and applies them, if they are worth it."""
        loss = sums.loss / max(1, sums.trained_tokens)
        grad_norm = self.update.clip()
        if not sums.trained_tokens:
            # Truncated to their first token, samples teach nothing; a gradient scaler refuses a step without gradients.
            return _Learned(sums, loss, grad_norm, "nothing to learn")
        finite = self._finite.accepts(loss, grad_norm, self.update.loss_scale)
        # A scaler lowers its scale when it sees a bad gradient; without one, dropping the gradient is all.
        if finite or self.update.scaled:
            self.update.apply()
        return _Learned(sums, loss, grad_norm, "changed" if finite else "not finite")

    # When memory runs out -------------------------------------------------------------------------------------------

    def shrink(self, tokens: int, samples: int, message: str, cause: Literal["step", "probe"]) -> None:
        """Takes the next smaller layout after a micro-batch of `tokens` in `samples` did not fit."""
        release_memory()
        layout, number = self.position.layout, self.position.step + 1
        self.emit(
            OutOfMemoryHit(
                step=number,
                phase="probe" if cause == "probe" else "train step",
                micro_batch_tokens=min(tokens, layout.micro_batch_tokens),
                message=message,
            )
        )
        found = smaller_layout(layout, tokens, samples, card=self.loaded.device.type == "cuda")
        if found is None:
            raise OutOfMemory(
                f"memory ran out in step {number}, in a micro-batch of one sample with {tokens:,} tokens ({message})",
                hint=what_would_help(tokens, self._recipe),
            )
        self.take_layout(*found, cause)

    def take_layout(self, layout: Layout, what: str, cause: Cause) -> None:
        """Goes on in `layout`; `what` says in words what changed."""
        self.position = msgspec.structs.replace(self.position, layout=layout)
        self.emit(
            Recovered(
                step=self.position.step + 1,
                what=what,
                micro_batch_tokens=layout.micro_batch_tokens,
                checkpointing=layout.checkpointing,
                cause=cause,
            )
        )
        # A process killed in the next attempt then resumes in the smaller layout.
        self.save_checkpoint()

    # Evaluations, checkpoints, events -------------------------------------------------------------------------------

    def _evaluate_if_due(self) -> bool:
        """Evaluates where the plan says so, once a step; the end of the run has an evaluation of its own."""
        every, step = self._upkeep.eval_every_steps, self.position.step
        due = every and step and step % every == 0 and step < self.steps and self.position.last_eval_step != step
        if due:
            evaluate(self)
        return bool(due)

    def _before_micro_batch(self) -> None:
        """Obeys requests; before there is a step to tell of, says that something happens."""
        self._requests.poll()
        self._micro_batches += 1
        if not self._pace.known and time.monotonic() - self._told_at > _LIFE_SECONDS:
            self._told_at = time.monotonic()
            self.emit(PhaseChanged(name="train", detail=f"first step, micro-batch {self._micro_batches}"))

    def _checkpoint_is_due(self) -> bool:
        if self._requests.checkpoint_wanted:
            return True
        if self._saved_step == self.position.step:
            return False
        every = self._upkeep.checkpoint_steps
        if every and self.position.step % every == 0:
            return True
        return time.monotonic() - self._saved_at >= self._upkeep.checkpoint_seconds

    def save_checkpoint(self) -> None:
        """Writes the position and everything that the next step depends on.

        Raises:
            DiskProblem: it cannot be written; earlier ones are kept.
        """
        self.position = with_sound_step(
            msgspec.structs.replace(self.position, measured=self.measured(), energy=self.energy.use())
        )
        folder = write_checkpoint(
            self.run.checkpoints,
            self.position,
            self._recipe,
            self.adapter.state_dict(),
            self.update.tensors(),
            scaler=self.update.scaler_state,
            keep=self._upkeep.keep_checkpoints,
            protected=protected_steps(self.position, self._upkeep),
        )
        self._saved_at = time.monotonic()
        self._saved_step = self.position.step
        self._requests.checkpoint_wanted = False
        path = folder.relative_to(self.run.path).as_posix()
        self.emit(CheckpointSaved(step=self.position.step, path=path))

    def tell_memory(self, phase: Literal["load", "train step", "evaluation"]) -> None:
        """Emits the peak so far, found in this phase."""
        self.emit(self.account.event(self.position.step, phase))
