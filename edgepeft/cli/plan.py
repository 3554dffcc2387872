"""`edgepeft plan`: which run fits this machine, each choice with its reason, and what it costs in memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgepeft.cli.output import JsonFlag
from edgepeft.cli.plan_options import PlanOptions, takes_plan_options

if TYPE_CHECKING:
    from edgepeft.plan.train_plan import TrainPlan


def build_plan(model: str, data: Path | None, overrides: dict[str, Any]) -> TrainPlan:
    """The plan for what was typed, with progress on stderr while a model is converted or data is tokenized.

    Args:
        model: a name in the store, a folder or a GGUF file.
        data: the training file; None plans by the preset's length.
        overrides: `PlanOptions.typed()`.

    Raises:
        EdgepeftError: bad options, model or data; `DoesNotFit` when no plan fits the budget.
    """
    from edgepeft.plan.build import build

    return build(model, data, overrides)


@takes_plan_options
def plan(
    model: Annotated[str, typer.Argument(help="Model: a name in the store, a folder or a GGUF file.")],
    options: PlanOptions,
    data: Annotated[Path | None, typer.Argument(help="Training data.", show_default=False)] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Write the plan as TOML, for train --plan.", show_default=False),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Choose a run that fits, and show why and what it costs."""
    build_plan(model, data, options.typed())
