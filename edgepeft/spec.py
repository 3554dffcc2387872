"""A run, fully said: the recipe that decides the result and the layout that decides only how it is executed.

An optimizer step is a fixed list of samples. Packing that list into micro-batches is a pure function of the list and
the layout, and the loss is normalised by the step's trained tokens. So a layout may change in the middle of a run
(after running out of memory, on resume, on another machine) without changing what is learned.
"""

from __future__ import annotations

import hashlib
import math
from typing import Literal

import msgspec

from edgepeft.errors import UsageError
from edgepeft.methods import MethodConfig

Precision = Literal["fp32", "bf16", "fp16", "int8", "nf4"]
"""How the frozen base is held. nf4: NormalFloat-4 with double quantization, Dettmers et al. 2023, arXiv 2305.14314."""
ComputeDtype = Literal["fp32", "bf16", "fp16"]
Overlong = Literal["truncate", "drop"]
TrainOn = Literal["assistant", "all"]
Checkpointing = Literal["layer", "none", "offload"]
OptimizerName = Literal["adamw", "adamw8bit"]
Keep = Literal["best", "last"]
"""Which state of a run becomes its adapter: that of the best evaluation, or the last one."""
MOST_SAMPLE_PROMPTS = 8
"""Prompts that a run may answer at each evaluation."""


class BaseRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which base model."""

    model: str
    """Name in the model store."""
    fingerprint: str
    """`sha256:…` over the source weights; two stores that agree in it hold the same base."""
    architecture: str
    """Class name in transformers."""


class DataRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which data, and how it is read."""

    path: str
    """The training file, absolute."""
    fingerprint: str
    """`sha256:…` of the file's bytes."""
    format: str
    """alpaca, sharegpt, messages, prompt-completion or text."""
    columns: dict[str, str] = {}
    """The format's field → the file's column, where they differ."""
    train_on: TrainOn = "assistant"
    """Which tokens carry loss; `assistant` includes tool calls and the end-of-turn token."""
    system: str | None = None
    """A system message put before records that have none."""
    template: str | None = None
    """Chat template instead of the model's own: `chatml`, `plain`, or an absolute path."""
    day: str = ""
    """ISO date that a template which inserts today's date gets, so that a resumed run sees the same text."""
    eval_path: str | None = None
    """A separate held-out file; None splits `eval_fraction` off the training file."""
    eval_fingerprint: str | None = None
    """`sha256:…` of the held-out file."""
    eval_fraction: float = 0.05
    """Share of the samples held out when there is no `eval_path`; 0 trains on everything."""


class Optimizer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101)."""

    name: OptimizerName = "adamw"
    """`adamw` keeps float32 states; `adamw8bit` keeps those of larger tensors in 8 bit (Dettmers et al. 2021, arXiv
    2110.02861). A plan never takes that by itself: a low-rank adapter's states are small beside everything else, so 8
    bit saves little there and costs exactness."""
    learning_rate: float = 2e-4
    """Peak rate, after warm-up."""
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 switches it off."""
    lora_plus_ratio: float = 1.0
    """Learning rate of LoRA's B over that of A: LoRA+ (Hayou et al. 2024, arXiv 2402.12354); 1 trains both alike."""


class Schedule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Linear warm-up to the peak rate, then the named decay to `final_fraction` of it."""

    name: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_fraction: float = 0.05
    """Share of all steps spent warming up."""
    final_fraction: float = 0.0
    """Rate at the last step, as a share of the peak rate."""


class Unfreeze(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Layers that begin to train one after another, the topmost at the first step.

    Progressive unfreezing: Howard & Ruder 2018, *Universal Language Model Fine-tuning* (arXiv 1801.06146). One of the
    two fields is given. What an adapter has in a layer that does not train yet acts as it is. What it has in no layer,
    or shares between layers, trains from the beginning.
    """

    share: float | None = None
    """All layers train when this share of the steps is done."""
    every_steps: int | None = None
    """Steps from one layer to the next."""

    def __post_init__(self) -> None:
        if (self.share is None) == (self.every_steps is None):
            raise UsageError("is no schedule of layers", where="unfreeze", hint="Give either share or every_steps")
        if self.share is not None and not 0 < self.share <= 1:
            hint = "Give a number above 0 and up to 1, such as 0.5"
            raise UsageError(f"{self.share!r} is no share of the steps", where="unfreeze", hint=hint)
        if self.every_steps is not None and self.every_steps < 1:
            hint = "Give a whole number of at least 1"
            raise UsageError(f"a layer every {self.every_steps} steps is not possible", where="unfreeze", hint=hint)

    def layers_at(self, step: int, steps: int, layers: int) -> int:
        """How many of `layers` train in step `step`, counted from 0, of `steps`; a pure function, so resuming needs no
        state."""
        full = self.full_from(steps, layers)
        if step >= full:
            return layers
        return 1 + (step // self.every_steps if self.every_steps else step * (layers - 1) // full)

    def full_from(self, steps: int, layers: int) -> int:
        """The first step, counted from 0, in which all layers train."""
        if self.every_steps:
            return (layers - 1) * self.every_steps
        return min(steps - 1, math.ceil((self.share or 0.0) * steps)) if layers > 1 else 0


class ParentRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which adapter training starts from, instead of from the base."""

    adapter: str
    """`NAME@vK`, or the absolute path of a folder."""
    sha256: str
    """`sha256:…` of its adapter_model.safetensors."""


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What decides the result of a run."""

    base: BaseRef
    data: DataRef
    method: MethodConfig
    precision: Precision
    compute_dtype: ComputeDtype
    max_seq_len: int
    """Longest sample in tokens."""
    samples_per_step: int
    """Samples of one optimizer step."""
    overlong: Overlong = "truncate"
    """What happens to longer samples."""
    epochs: float = 1.0
    """Passes over the training samples; `max_steps` may end earlier."""
    max_steps: int | None = None
    """Optimizer steps at the most."""
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    seed: int = 0
    parent: ParentRef | None = None
    """The adapter whose values training starts with; None starts from the base."""
    unfreeze: Unfreeze | None = None
    """When layers begin to train; None trains all of them from the beginning."""

    def digest(self) -> str:
        """`sha256:…` of the recipe's canonical JSON; a checkpoint resumes only under the recipe it was made with."""
        content = msgspec.to_builtins(self)
        # What recipes did not have at first is left out where it changes nothing: older checkpoints stay good.
        if self.parent is None:
            del content["parent"]
        if self.unfreeze is None:
            del content["unfreeze"]
        if self.optimizer.lora_plus_ratio == 1.0:
            del content["optimizer"]["lora_plus_ratio"]
        for name in ("dora", "ranks"):
            if not content["method"].get(name, True):
                del content["method"][name]
        return "sha256:" + hashlib.sha256(msgspec.json.encode(content, order="sorted")).hexdigest()


class Layout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a run is executed; changing it changes memory and speed, never the result."""

    micro_batch_tokens: int
    """Token cap of one packed micro-batch; a single longer sample still forms its own micro-batch."""
    checkpointing: Checkpointing = "layer"
    """`layer` keeps each decoder layer's input and recomputes the rest in backward; `offload` keeps the inputs in the
    host's RAM, on a card; on the CPU, where they lie in RAM anyway, it is `layer`."""
    loss_chunk_tokens: int = 256
    """Rows of hidden states whose logits exist at one time."""
    deterministic: bool = False
    """On a card, only kernels that give the same bits each time, some of them slower; the CPU's do anyway."""


class Upkeep(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a run does beside learning."""

    eval_every_steps: int = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    eval_max_samples: int = 200
    """Held-out samples used for one evaluation at the most."""
    checkpoint_seconds: float = 120.0
    """Time between checkpoints."""
    checkpoint_steps: int = 0
    """Steps between checkpoints; 0 leaves it to `checkpoint_seconds`."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    keep: Keep = "last"
    """`best` also keeps the checkpoint of the best evaluation, and makes it the adapter at the end."""
    early_stop: int = 0
    """Evaluations in a row without improvement after which the run ends; 0 runs all steps."""
    max_seconds: float | None = None
    """Training time, all processes of the run together, after which it ends; None for no limit."""
    sample_prompts: tuple[str, ...] = ()
    """Answered at each evaluation, by the adapter as it is then."""


class RunSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What memory estimates and the engine executes."""

    recipe: Recipe
    layout: Layout
    upkeep: Upkeep = Upkeep()
    device: str = "cpu"
    """`cpu`, or the UUID of a card as NVML tells it."""
    budget_bytes: int | None = None
    """Memory that the run may use at its peak; on the CPU, live tensor bytes including the base."""
