"""`edgepeft train`: the plan as a detached process, followed until it ends or the user lets it go on alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgepeft.cli.output import JsonFlag, note, stderr
from edgepeft.cli.plan_options import PlanOptions, takes_plan_options

if TYPE_CHECKING:
    from edgepeft.plan.train_plan import TrainPlan


@takes_plan_options
def train(
    options: PlanOptions,
    model: Annotated[
        str | None, typer.Argument(help="Model: a name in the store, a folder or a GGUF file.", show_default=False)
    ] = None,
    data: Annotated[Path | None, typer.Argument(help="Training data.", show_default=False)] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the adapter; a known one gets its next version.")
    ] = None,
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="Train a plan that `plan --out` wrote.", show_default=False)
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Start it and return.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Train an adapter; Ctrl-C asks whether to stop and save, or to let it run on."""
    from edgepeft.errors import UsageError
    from edgepeft.paths import check_name

    if name is None:
        raise UsageError("the adapter has no name", where="--name", hint="Add for example --name my-adapter")
    check_name(name)
    made = _make_plan(model, data, plan_file, options)
    if not as_json:
        from edgepeft.cli.run_text import plan_lines

        warned = False
        for text in plan_lines(made, stderr.width):
            warned = text.startswith("Note") or (warned and text.startswith(" "))
            note(text, "yellow" if warned else None)
    _run(made, name, detach=detach, as_json=as_json)


def _make_plan(model: str | None, data: Path | None, plan_file: Path | None, options: PlanOptions) -> TrainPlan:
    from edgepeft.errors import UsageError

    if plan_file is not None:
        typed = sorted(options.typed())
        if model is not None or typed:
            extra = "MODEL" if model is not None else "--" + typed[0].strip("_").replace("_", "-")
            raise UsageError(
                f"--plan and {extra} cannot be given together",
                where="train",
                hint="A plan file says everything; edit it, or leave it out",
            )
        return _read_plan(plan_file)
    if model is None or data is None:
        raise UsageError(
            "MODEL and DATA are missing" if model is None else "DATA is missing",
            where="train",
            hint="For example: edgepeft train smollm2-135m data.jsonl --name my-adapter",
        )
    from edgepeft.cli.plan import build_plan
    from edgepeft.runs.launch import check_runs_here

    made = build_plan(model, data, options.typed())
    check_runs_here(made)
    return made


def _read_plan(plan_file: Path) -> TrainPlan:
    """The plan of a file; its figures are made anew, since [spec] may have been edited."""
    from edgepeft.cli.plan import planning_progress
    from edgepeft.plan.files import read_plan_toml
    from edgepeft.plan.revise import revise
    from edgepeft.runs.launch import check_runs_here

    made = read_plan_toml(plan_file)
    check_runs_here(made)
    with planning_progress() as tell:
        return revise(made, where=str(plan_file), progress=tell)


def _run(plan: TrainPlan, name: str, *, detach: bool, as_json: bool) -> None:
    import json

    from edgepeft.cli.attach import attach
    from edgepeft.runs.launch import launch

    run = launch(plan, name)
    if as_json:
        sys.stdout.write(json.dumps({"type": "launched", "run": run.id, "path": str(run.path)}) + "\n")
        sys.stdout.flush()
    else:
        note(f"Run      {run.id} in {run.path}", None)
    if detach:
        if not as_json:
            note(f"Follow it with `edgepeft runs attach {run.id}`.", None)
        return
    raise typer.Exit(attach(run, run.read_plan(), as_json=as_json))
