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

from edgepeft.plan.option_help import HELP


class PlanOptions(msgspec.Struct, frozen=True):
    """What the user may type; None is what was not typed."""

    budget: Annotated[
        str | None,
        typer.Option("--budget", help=HELP["budget"], show_default=False),
    ] = None
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu",
            help=HELP["gpu"],
            show_default=False,
        ),
    ] = None
    intent: Annotated[
        str | None,
        typer.Option("--intent", help=HELP["intent"], show_default=False),
    ] = None
    precision: Annotated[
        str | None,
        typer.Option("--precision", help=HELP["precision"], show_default=False),
    ] = None
    compute_dtype: Annotated[
        str | None, typer.Option("--compute-dtype", help=HELP["compute-dtype"], show_default=False)
    ] = None
    from_: Annotated[
        str | None,
        typer.Option("--from", help=HELP["from"], show_default=False),
    ] = None
    method: Annotated[
        str | None,
        typer.Option("--method", help=HELP["method"], show_default=False),
    ] = None
    set: Annotated[
        list[str] | None,
        typer.Option("--set", help=HELP["set"], show_default=False),
    ] = None
    rank: Annotated[int | None, typer.Option("--rank", help=HELP["rank"], show_default=False)] = None
    alpha: Annotated[float | None, typer.Option("--alpha", help=HELP["alpha"], show_default=False)] = None
    targets: Annotated[
        str | None,
        typer.Option("--targets", help=HELP["targets"], show_default=False),
    ] = None
    dropout: Annotated[float | None, typer.Option("--dropout", help=HELP["dropout"], show_default=False)] = None
    max_seq_len: Annotated[
        int | None,
        typer.Option("--max-seq-len", "--seq-len", help=HELP["max-seq-len"], show_default=False),
    ] = None
    overlong: Annotated[str | None, typer.Option("--overlong", help=HELP["overlong"], show_default=False)] = None
    micro_batch_tokens: Annotated[
        int | None,
        typer.Option("--micro-batch-tokens", help=HELP["micro-batch-tokens"], show_default=False),
    ] = None
    samples_per_step: Annotated[
        int | None,
        typer.Option("--samples-per-step", help=HELP["samples-per-step"], show_default=False),
    ] = None
    epochs: Annotated[float | None, typer.Option("--epochs", help=HELP["epochs"], show_default=False)] = None
    max_steps: Annotated[int | None, typer.Option("--max-steps", help=HELP["max-steps"], show_default=False)] = None
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", "--lr", help=HELP["learning-rate"], show_default=False)
    ] = None
    lora_plus_ratio: Annotated[
        float | None,
        typer.Option("--lora-plus-ratio", help=HELP["lora-plus-ratio"], show_default=False),
    ] = None
    optimizer: Annotated[
        str | None,
        typer.Option("--optimizer", help=HELP["optimizer"], show_default=False),
    ] = None
    weight_decay: Annotated[
        float | None, typer.Option("--weight-decay", help=HELP["weight-decay"], show_default=False)
    ] = None
    warmup: Annotated[
        float | None,
        typer.Option("--warmup", help=HELP["warmup"], show_default=False),
    ] = None
    schedule: Annotated[
        str | None,
        typer.Option("--schedule", help=HELP["schedule"], show_default=False),
    ] = None
    unfreeze: Annotated[
        float | None,
        typer.Option(
            "--unfreeze",
            help=HELP["unfreeze"],
            show_default=False,
        ),
    ] = None
    unfreeze_every: Annotated[
        int | None,
        typer.Option("--unfreeze-every", help=HELP["unfreeze-every"], show_default=False),
    ] = None
    checkpointing: Annotated[
        str | None,
        typer.Option("--checkpointing", help=HELP["checkpointing"], show_default=False),
    ] = None
    loss_chunk_tokens: Annotated[
        int | None,
        typer.Option("--loss-chunk-tokens", help=HELP["loss-chunk-tokens"], show_default=False),
    ] = None
    deterministic: Annotated[
        bool | None,
        typer.Option("--deterministic", help=HELP["deterministic"], show_default=False),
    ] = None
    seed: Annotated[int | None, typer.Option("--seed", help=HELP["seed"], show_default=False)] = None
    eval_data: Annotated[
        str | None,
        typer.Option("--eval-data", help=HELP["eval-data"], show_default=False),
    ] = None
    eval_fraction: Annotated[
        float | None, typer.Option("--eval-fraction", help=HELP["eval-fraction"], show_default=False)
    ] = None
    eval_every: Annotated[
        int | None,
        typer.Option("--eval-every", help=HELP["eval-every"], show_default=False),
    ] = None
    early_stop: Annotated[
        int | None,
        typer.Option(
            "--early-stop",
            help=HELP["early-stop"],
            show_default=False,
        ),
    ] = None
    keep: Annotated[
        str | None,
        typer.Option(
            "--keep",
            help=HELP["keep"],
            show_default=False,
        ),
    ] = None
    max_time: Annotated[
        str | None,
        typer.Option("--max-time", help=HELP["max-time"], show_default=False),
    ] = None
    sample_prompt: Annotated[
        list[str] | None,
        typer.Option("--sample-prompt", help=HELP["sample-prompt"], show_default=False),
    ] = None
    train_on: Annotated[
        str | None,
        typer.Option("--train-on", help=HELP["train-on"], show_default=False),
    ] = None
    system: Annotated[
        str | None,
        typer.Option("--system", help=HELP["system"], show_default=False),
    ] = None
    template: Annotated[
        str | None,
        typer.Option("--template", help=HELP["template"], show_default=False),
    ] = None
    map: Annotated[
        list[str] | None,
        typer.Option("--map", help=HELP["map"], show_default=False),
    ] = None
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help=HELP["format"],
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
