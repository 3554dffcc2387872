"""The options that `plan` and `train` share: everything that a plan decides can be said by hand.

A command takes them all by one parameter:

    @takes_plan_options
    def plan(model: …, options: PlanOptions, as_json: JsonFlag = False) -> None:
        overrides = options.typed()

Typer sees one keyword parameter for each field of `PlanOptions`; the command receives the struct.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import msgspec
import typer


class PlanOptions(msgspec.Struct, frozen=True):
    """What the user may type; None is what was not typed."""

    budget: Annotated[
        str | None,
        typer.Option("--budget", help="Memory the run may use, such as 20GiB.", show_default=False),
    ] = None
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu",
            help="Card: a UUID or index as doctor shows it, a profile id such as rtx-4090-24gb, or cpu.",
            show_default=False,
        ),
    ] = None
    intent: Annotated[
        str | None,
        typer.Option("--intent", help="Preset: quality, balanced, speed or prototype.", show_default=False),
    ] = None
    precision: Annotated[
        str | None,
        typer.Option("--precision", help="How the base is held: bf16, fp16, fp32, int8 or nf4.", show_default=False),
    ] = None
    compute_dtype: Annotated[
        str | None, typer.Option("--compute-dtype", help="bf16, fp16 or fp32.", show_default=False)
    ] = None
    from_: Annotated[
        str | None,
        typer.Option("--from", help="Adapter to go on from: NAME, NAME@v2 or a folder.", show_default=False),
    ] = None
    method: Annotated[
        str | None,
        typer.Option("--method", help="PEFT method, as methods list shows them; lora by itself.", show_default=False),
    ] = None
    set: Annotated[
        list[str] | None,
        typer.Option("--set", help="FIELD=VALUE of the method; repeatable. See methods show.", show_default=False),
    ] = None
    rank: Annotated[int | None, typer.Option("--rank", help="LoRA rank.", show_default=False)] = None
    alpha: Annotated[float | None, typer.Option("--alpha", help="LoRA alpha.", show_default=False)] = None
    targets: Annotated[
        str | None,
        typer.Option(
            "--targets",
            help="Linear layers to adapt, with commas; or all-linear. Beside them embed_tokens and lm_head.",
            show_default=False,
        ),
    ] = None
    dropout: Annotated[float | None, typer.Option("--dropout", help="LoRA dropout.", show_default=False)] = None
    max_seq_len: Annotated[
        int | None,
        typer.Option("--max-seq-len", "--seq-len", help="Longest sample in tokens.", show_default=False),
    ] = None
    overlong: Annotated[
        str | None, typer.Option("--overlong", help="Longer samples: truncate or drop.", show_default=False)
    ] = None
    micro_batch_tokens: Annotated[
        int | None,
        typer.Option("--micro-batch-tokens", help="Tokens of one packed micro-batch.", show_default=False),
    ] = None
    samples_per_step: Annotated[
        int | None,
        typer.Option("--samples-per-step", help="Samples of one optimizer step.", show_default=False),
    ] = None
    epochs: Annotated[float | None, typer.Option("--epochs", help="Passes over the data.", show_default=False)] = None
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", help="Optimizer steps at the most.", show_default=False)
    ] = None
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", "--lr", help="Peak learning rate.", show_default=False)
    ] = None
    lora_plus_ratio: Annotated[
        float | None,
        typer.Option("--lora-plus-ratio", help="LoRA+: learning rate of B over that of A.", show_default=False),
    ] = None
    optimizer: Annotated[
        str | None,
        typer.Option("--optimizer", help="adamw, or adamw8bit for states in 8 bit.", show_default=False),
    ] = None
    weight_decay: Annotated[
        float | None, typer.Option("--weight-decay", help="AdamW's weight decay.", show_default=False)
    ] = None
    warmup: Annotated[
        float | None,
        typer.Option("--warmup", help="Share of the steps spent warming up.", show_default=False),
    ] = None
    schedule: Annotated[
        str | None,
        typer.Option("--schedule", help="After warm-up: cosine, linear or constant.", show_default=False),
    ] = None
    unfreeze: Annotated[
        float | None,
        typer.Option(
            "--unfreeze",
            help="Layers begin to train one by one, the top one first; all of them after this share of the steps.",
            show_default=False,
        ),
    ] = None
    unfreeze_every: Annotated[
        int | None,
        typer.Option("--unfreeze-every", help="The same, with so many steps between two layers.", show_default=False),
    ] = None
    checkpointing: Annotated[
        str | None,
        typer.Option("--checkpointing", help="Activation checkpointing: layer, none or offload.", show_default=False),
    ] = None
    loss_chunk_tokens: Annotated[
        int | None,
        typer.Option("--loss-chunk-tokens", help="Tokens whose logits exist at one time.", show_default=False),
    ] = None
    deterministic: Annotated[
        bool | None,
        typer.Option("--deterministic", help="On a card, the same bits each time; slower.", show_default=False),
    ] = None
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of order and start.", show_default=False)] = None
    eval_data: Annotated[
        str | None,
        typer.Option("--eval-data", help="Held-out file; else a share of DATA.", show_default=False),
    ] = None
    eval_fraction: Annotated[
        float | None, typer.Option("--eval-fraction", help="Share of DATA held out.", show_default=False)
    ] = None
    eval_every: Annotated[
        int | None,
        typer.Option("--eval-every", help="Steps between evaluations; 0: at the end only.", show_default=False),
    ] = None
    early_stop: Annotated[
        int | None,
        typer.Option(
            "--early-stop",
            help="End after so many evaluations without a lower held-out loss; 0: never.",
            show_default=False,
        ),
    ] = None
    keep: Annotated[
        str | None,
        typer.Option(
            "--keep",
            help="State that becomes the adapter: best or last; best with --early-stop.",
            show_default=False,
        ),
    ] = None
    max_time: Annotated[
        str | None,
        typer.Option("--max-time", help="End and save after so much training, such as 30m.", show_default=False),
    ] = None
    sample_prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--sample-prompt", help="Answer this at each evaluation; repeatable, up to 8.", show_default=False
        ),
    ] = None
    train_on: Annotated[
        str | None,
        typer.Option("--train-on", help="Tokens that carry loss: assistant or all.", show_default=False),
    ] = None
    system: Annotated[
        str | None,
        typer.Option("--system", help="System message for records without one.", show_default=False),
    ] = None
    template: Annotated[
        str | None,
        typer.Option("--template", help="chatml, plain or a file, instead of the model's own.", show_default=False),
    ] = None
    map: Annotated[
        list[str] | None,
        typer.Option("--map", help="FIELD=COLUMN where the file's columns differ; repeatable.", show_default=False),
    ] = None
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="alpaca, sharegpt, messages, prompt-completion or text; else detected.",
            show_default=False,
        ),
    ] = None

    def typed(self) -> dict[str, Any]:
        """Only what the user typed, by field name."""
        return {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}


def takes_plan_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives `command`, which has a parameter `options: PlanOptions`, one option for each field of it."""
    hints = get_type_hints(PlanOptions, include_extras=True)
    signature = inspect.signature(command, eval_str=True)

    def expanded(**arguments: Any) -> None:
        options = PlanOptions(**{name: arguments.pop(name) for name in hints})
        command(**arguments, options=options)

    parameters = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in signature.parameters.values()
        if parameter.name != "options"
    ] + [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint)
        for name, hint in hints.items()
    ]
    expanded.__name__, expanded.__doc__ = command.__name__, command.__doc__
    # Typer reads the signature for the parameters and the annotations for their types.
    vars(expanded)["__signature__"] = inspect.Signature(parameters)
    expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return expanded
