"""`edgepeft plan`: which run fits this machine, each choice with its reason, and what it costs in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgepeft.cli.output import JsonFlag, line, note, print_json, stderr
from edgepeft.cli.output import console as out
from edgepeft.cli.plan_options import PlanOptions, takes_plan_options

if TYPE_CHECKING:
    from edgepeft.plan.train_plan import TrainPlan


def build_plan(model: str, data: Path | None, overrides: dict[str, Any], *, verify: bool = False) -> TrainPlan:
    """The plan for what was typed, with progress on stderr while a model is converted or data is tokenized.

    Args:
        model: a name in the store, a folder or a GGUF file.
        data: the training file; None plans by the preset's length.
        overrides: `PlanOptions.typed()`.
        verify: simulate the plan's training step.

    Raises:
        EdgepeftError: bad options, model or data; `DoesNotFit` when no plan fits the budget.
    """
    from edgepeft.plan.build import build

    with planning_progress() as tell:
        return build(model, data, overrides, progress=tell, verify=verify)


@contextmanager
def planning_progress() -> Iterator[Callable[[str, float | None], None]]:
    """A bar on stderr, and nothing in a pipe; takes (what, share done)."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task("reading", total=None)

        def tell(what: str, fraction: float | None) -> None:
            bar.update(task, description=what, total=None if fraction is None else 1.0, completed=fraction or 0.0)

        yield tell


@takes_plan_options
def plan(
    model: Annotated[
        str,
        typer.Argument(help="Model: a name in the store, a folder, a GGUF file, or one of `profiles list models`."),
    ],
    options: PlanOptions,
    data: Annotated[Path | None, typer.Argument(help="Training data.", show_default=False)] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Simulate the training step without values, and compare its memory.")
    ] = False,
    out_file: Annotated[
        Path | None, typer.Option("--out", help="Write the plan as TOML, for train --plan.", show_default=False)
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Choose a run that fits, and show why and what it costs."""
    from edgepeft.errors import DoesNotFit

    try:
        made = build_plan(model, data, options.typed(), verify=verify)
    except DoesNotFit as error:
        refusal = getattr(error, "refusal", None) if as_json else None
        if refusal is not None:
            print_json({"fits": False, "refusal": refusal})
        raise
    if out_file is not None:
        from edgepeft.plan.files import write_plan_toml

        write_plan_toml(made, out_file)
    if as_json:
        print_json(made)
    else:
        from edgepeft.plan.explain import explain

        for text, tone in explain(made, out.width):
            line(text, tone)
    if out_file is not None:
        trains = made.spec.recipe.data.path and made.spec.recipe.base.fingerprint
        then = f", then: edgepeft train --plan {out_file} --name NAME" if trains else ""
        note(f"Written to {out_file}. Edit [spec] as you like{then}")
