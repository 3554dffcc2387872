"""`edgepeft runs`: what is training, what was trained, and taking hold of it again."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from edgepeft.cli.output import JsonFlag, interactive, line, note, print_json, stderr, table
from edgepeft.cli.output import console as out

if TYPE_CHECKING:
    from edgepeft.runs.layout import RunFolder
    from edgepeft.runs.state import RunState

app = typer.Typer(no_args_is_help=True, help="List, follow, stop, resume and remove training runs.")

RunId = Annotated[str, typer.Argument(metavar="RUN", help="Id of the run, such as my-adapter-1, or its folder.")]


@app.command("list")
def list_(as_json: JsonFlag = False) -> None:
    """List all runs, the newest first."""
    from edgepeft.cli.run_text import STYLES
    from edgepeft.runs.state import summarise_runs
    from edgepeft.runs.text import progress_text
    from edgepeft.units import format_age

    found = summarise_runs()
    if as_json:
        print_json(found)
        return
    if not found:
        line("There are no runs yet. Start one: edgepeft train smollm2-135m DATA --name my-adapter")
        return
    grid = table("run", "status", "step", "loss", "age", "adapter", "model", right=("step", "loss", "age"))
    for run in found:
        state = run.state
        grid.add_row(
            Text(run.id),
            Text(state.status, style=STYLES[state.status]),
            Text(progress_text(state)),
            Text("–" if state.loss is None else f"{state.loss:.4f}"),
            Text("n/a" if run.made_at is None else format_age(time.time() - run.made_at)),
            Text(state.published or run.adapter_name or "–"),
            Text(run.model or "–"),
        )
    out.print(grid)
    for run in found:
        if run.state.status == "damaged":
            note(f"{run.id}: {run.state.message}. Remove it with `edgepeft runs remove {run.id}`.", "yellow")
    lost = [run.id for run in found if run.state.status == "lost"]
    if lost:
        note(f"Lost runs go on with: edgepeft runs resume {lost[0]}")


@app.command("show")
def show(run_id: RunId, as_json: JsonFlag = False) -> None:
    """Show one run: its plan, what it does, its last events, and where its files lie."""
    from edgepeft.cli.run_text import STYLES, memory_table, plan_lines
    from edgepeft.runs.events import Finished
    from edgepeft.runs.launch import log_tail
    from edgepeft.runs.layout import open_run
    from edgepeft.runs.state import RunWatch, highest_memory
    from edgepeft.runs.text import energy_text, memory_text, sentence
    from edgepeft.units import format_age, format_watt_hours

    run = open_run(run_id)
    plan = run.read_plan()
    watch = RunWatch(run, plan.steps)
    events, state = watch.poll()
    ending = watch.folded.ending
    measured = highest_memory(events)
    failed = state.status in ("failed", "lost")
    tail = log_tail(run) if failed else []
    if as_json:
        paths = {"run": run.path, "events": run.events_file, "log": run.log_file, "checkpoints": run.checkpoints}
        print_json(
            {
                "id": run.id,
                "state": state,
                "plan": plan,
                "memory": {"predicted": plan.memory.peak, "measured": measured},
                "last_events": events[-10:],
                "paths": {name: str(path) for name, path in paths.items()},
                "log_tail": tail,
            }
        )
        return
    told = f"Status   {state.status}, step {state.step} of {state.steps}"
    if state.loss is not None:
        told += f", loss {state.loss:.4f}"
    if state.eval_loss is not None:
        told += f", held-out loss {state.eval_loss:.4f}"
    line(told, STYLES[state.status])
    if state.message:
        line(f"Reason   {state.message}")
    if state.updated_at is not None:
        line(f"Last     heard of {format_age(time.time() - state.updated_at)} ago")
    if state.peak_bytes is not None:
        line(f"Measured {memory_text(state, plan.memory.peak_bytes)}")
    if isinstance(ending, Finished):
        line(f"Energy   {energy_text(ending)}")
    elif state.step:
        line(f"Energy   {'n/a' if state.energy_wh is None else format_watt_hours(state.energy_wh)}")
    for text in plan_lines(plan, out.width):
        line(text)
    if measured is not None:
        head, *rows = memory_table(plan.memory.peak, measured, out.width)
        line(head, "bold")
        for text in rows:
            line(text)
    sentences = [f"  {found[0]}" for event in events if (found := sentence(event))]
    if sentences:
        line("Events")
        for text in sentences[-10:]:
            line(text)
    if state.skipped_lines:
        note(f"{state.skipped_lines} damaged lines of {run.events_file} were skipped.", "yellow")
    line(f"Folder   {run.path}")
    line(f"Log      {run.log_file}")
    if state.published:
        line(f"Adapter  {state.published}")
    if tail:
        line("The log ends with")
        for text in tail:
            line(f"  {text}", "dim")
    if state.resumable:
        line(f"Next     edgepeft runs resume {run.id}")
    elif state.wants_time:
        line(f"Next     edgepeft runs resume {run.id} --max-time TIME   (trains on)")
    elif state.alive:
        line(f"Next     edgepeft runs attach {run.id}")


@app.command("attach")
def attach_(run_id: RunId, as_json: JsonFlag = False) -> None:
    """Follow a run; Ctrl-C asks whether to stop it or only to look away."""
    from edgepeft.cli.attach import attach
    from edgepeft.runs.layout import open_run
    from edgepeft.runs.state import RunWatch

    run = open_run(run_id)
    plan = run.read_plan()
    told = RunWatch(run, plan.steps)
    told.poll()
    raise typer.Exit(attach(run, plan, as_json=as_json, told=told))


@app.command("stop")
def stop_(
    run_id: RunId,
    timeout: Annotated[
        str, typer.Option("--timeout", help="How long it may take to save, before it is ended.")
    ] = "10min",
    as_json: JsonFlag = False,
) -> None:
    """Stop a run after its current step, and save its adapter."""
    from edgepeft.runs.launch import stop
    from edgepeft.runs.layout import open_run
    from edgepeft.runs.state import read_state
    from edgepeft.units import parse_seconds

    run = open_run(run_id)
    seconds = parse_seconds(timeout, where="--timeout")
    state = read_state(run)
    if state.alive:
        with _waiting(f"Stopping {run.id}: it ends its step and saves"):
            state = stop(run, seconds)
    if as_json:
        print_json({"id": run.id, "state": state})
    else:
        _tell_state(run, state)


@app.command("resume")
def resume_(
    run_id: RunId,
    max_time: Annotated[
        str | None,
        typer.Option(
            "--max-time",
            help="Training time of the whole run, such as 2h, in place of what it had.",
            show_default=False,
        ),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Start it and return.")] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Though a data file changed or is gone: with the file as it was, from the cache."),
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Go on with a lost, failed or stopped run from its newest checkpoint, or with one whose time was over."""
    import json

    from edgepeft.cli.attach import attach
    from edgepeft.runs.launch import resume
    from edgepeft.runs.layout import open_run
    from edgepeft.runs.state import RunWatch
    from edgepeft.units import parse_seconds

    run = open_run(run_id)
    plan = run.read_plan()
    told = RunWatch(run, plan.steps)
    told.poll()
    resume(run, None if max_time is None else parse_seconds(max_time, where="--max-time"), force=force)
    if detach:
        if as_json:
            sys.stdout.write(json.dumps({"type": "launched", "run": run.id, "path": str(run.path)}) + "\n")
        else:
            note(f"Run {run.id} goes on. Follow it with `edgepeft runs attach {run.id}`.", None)
        return
    raise typer.Exit(attach(run, plan, as_json=as_json, told=told))


@app.command("remove")
def remove_(
    run_id: RunId,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove without asking.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Delete the folder of a run; an adapter that it published stays in the library."""
    from edgepeft.errors import UsageError
    from edgepeft.runs.launch import remove
    from edgepeft.runs.layout import open_run

    run = open_run(run_id)
    if not yes:
        if as_json or not interactive():
            raise UsageError(f"removing run {run.id} needs a confirmation", where="runs remove", hint="Add --yes")
        if not typer.confirm(f"Delete {run.path} with its checkpoints?", default=False, err=True):
            raise typer.Exit(0)
    remove(run)
    if as_json:
        print_json({"removed": run.id})
    else:
        line(f"Removed {run.id}")


@contextmanager
def _waiting(text: str) -> Iterator[None]:
    """A spinner on a terminal, one line elsewhere."""
    if not stderr.is_terminal:
        note(text)
        yield
        return
    with stderr.status(Text(text)):
        yield


def _tell_state(run: RunFolder, state: RunState) -> None:
    told = f"Run {run.id} is {state.status} at step {state.step} of {state.steps}"
    line(f"{told}; its adapter is {state.published}" if state.published else told)
    if state.resumable:
        line(f"Next     edgepeft runs resume {run.id}")
