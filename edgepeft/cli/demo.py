"""`edgepeft demo`: the main job on the embedded model, told step by step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgepeft.cli.output import console, line, note, row, stderr, table

if TYPE_CHECKING:
    from edgepeft.chat.evaluation import Evaluation
    from edgepeft.demo.tour import DemoReport
    from edgepeft.models.store import ModelEntry
    from edgepeft.plan.train_plan import TrainPlan


def demo(
    seed: Annotated[
        int, typer.Option("--seed", help="Draws the alerts, which wordings are held out, and the start.")
    ] = 0,
    write_data: Annotated[
        Path | None,
        typer.Option("--write-data", help="Only write the three data sets into this folder.", show_default=False),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the figures to this file.", show_default=False)
    ] = None,
) -> None:
    """Train an adapter on the embedded model and score it: about ten minutes on two cores."""
    if write_data is not None:
        _write_data(write_data, seed)
        return
    from edgepeft.cli.attach import attach
    from edgepeft.cli.plan import build_plan
    from edgepeft.cli.run_text import plan_lines
    from edgepeft.demo import tour
    from edgepeft.errors import ExitCode
    from edgepeft.models.embedded import EMBEDDED
    from edgepeft.models.store import find_model
    from edgepeft.paths import write_atomic
    from edgepeft.runs.events import Finished
    from edgepeft.runs.events_file import read_events
    from edgepeft.runs.launch import launch

    _title(1, "This machine")
    _machine()
    _title(2, "The task")
    train_file, held_out = tour.demo_files(seed)
    _task(train_file, held_out)
    _title(3, "The plan")
    plan = build_plan(EMBEDDED, train_file, tour.pinned_options(held_out, seed))
    for text in plan_lines(plan):
        line(text)
    line(
        "The demo pins NF4 to show QLoRA; a model this small would fit in bf16, which keeps more of its quality.", "dim"
    )
    _title(4, "Training")
    run = launch(plan, tour.ADAPTER)
    code = attach(run, plan)
    ending = read_events(run.events_file)[-1]
    if code != ExitCode.DONE or not isinstance(ending, Finished):
        raise typer.Exit(code or ExitCode.BUG)
    _title(5, "Base and adapter on alerts whose wordings were never trained")
    entry = find_model(EMBEDDED)
    base, adapter = _score(entry, plan, ending.published, held_out)
    report = tour.report(ending, base, adapter, seed)
    _scores(report, base, adapter)
    example = tour.pick_example(held_out, base, adapter)
    _title(6, "The same alert, answered by both")
    for label, text in (
        ("alert", example.alert),
        ("base", example.base),
        ("adapter", example.adapter),
        ("wanted", example.reference),
    ):
        _labelled(label, text)
    if json_file is not None:
        import msgspec

        write_atomic(json_file, msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    _title(7, "What to type next")
    for command, purpose in (
        (f"edgepeft chat --adapter {tour.ADAPTER}", "paste an alert; /adapter off asks the base"),
        (f"edgepeft eval --adapter {tour.ADAPTER} --data {held_out}", "the scores again"),
        (f"edgepeft adapters show {tour.ADAPTER}", "what the adapter is and where it came from"),
        ("edgepeft train smollm2-135m YOUR.jsonl --name mine", "your own data"),
        ("edgepeft", "the terminal UI"),
    ):
        line(f"  {command}")
        line(f"      {purpose}", "dim")


def _title(number: int, text: str) -> None:
    line()
    line(f"{number}  {text}", "bold")


def _labelled(label: str, text: str) -> None:
    from rich.padding import Padding
    from rich.text import Text

    grid = table("", "")
    grid.show_header = False
    grid.add_row(Text(f"{label:<8}", style="bold"), Text(_shortened(text) or "(nothing)"))
    console.print(Padding(grid, (0, 0, 0, 2)), soft_wrap=False)


def _shortened(text: str, limit: int = 320) -> str:
    """An answer on few lines: an untrained model tends to repeat itself until it is stopped."""
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[:limit].rstrip() + " …"


def _machine() -> None:
    from edgepeft.hardware.host import read_host
    from edgepeft.hardware.nvml import read_gpus
    from edgepeft.units import format_gib

    host = read_host()
    for gpu in read_gpus():
        total = "n/a" if gpu.total_bytes is None else format_gib(gpu.total_bytes, digits=1)
        free = "n/a" if gpu.free_bytes is None else format_gib(gpu.free_bytes, digits=1)
        line(f"  {gpu.name}, {total}, {free} free")
    line(f"  {host.cpu}, {host.physical_cores or host.logical_cores} cores")
    free = format_gib(host.ram_available_bytes, digits=1)
    line(f"  RAM {format_gib(host.ram_usable_bytes, digits=1)}, {free} available")
    line("  More, and remedies for problems: edgepeft doctor", "dim")


def _task(train_file: Path, held_out: Path) -> None:
    from edgepeft.demo.alerts import HELD_OUT_ALERTS, TRAIN_ALERTS
    from edgepeft.demo.tour import SYSTEM

    line(f"  {TRAIN_ALERTS} {SYSTEM.title} alerts over {len(SYSTEM.causes)} causes, each with a diagnosis in JSON:")
    line("  severity, cause, component and runbook step.")
    line(f"  {HELD_OUT_ALERTS} more are held out; their wordings do not occur in training.")
    line(f"  {train_file.parent}", "dim")


def _write_data(folder: Path, seed: int) -> None:
    from edgepeft.demo.alerts import write_data

    for train_file, held_out in write_data(folder, seed).values():
        line(str(train_file))
        line(str(held_out))


def _score(entry: ModelEntry, plan: TrainPlan, published: str, held_out: Path) -> tuple[Evaluation, Evaluation]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from edgepeft.chat.evaluation import EvaluationProgress
    from edgepeft.demo.tour import score_both

    if not stderr.is_terminal:
        note("  scoring base and adapter …")
        return score_both(entry, plan, published, held_out)
    with Progress(
        TextColumn("  {task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
        console=stderr,
        transient=True,
    ) as bar:
        tasks = {whose: bar.add_task(f"{whose:<8}", total=None) for whose in ("base", "adapter")}

        def told(whose: str, now: EvaluationProgress) -> None:
            bar.update(tasks[whose], description=f"{whose:<8} {now.what}", completed=now.done, total=now.total)

        return score_both(entry, plan, published, held_out, told)


def _scores(report: DemoReport, base: Evaluation, adapter: Evaluation) -> None:
    from edgepeft.units import format_bytes, format_seconds, format_share

    grid = table(
        "",
        "valid JSON",
        "fields right",
        "all fields right",
        "held-out loss",
        right=("valid JSON", "fields right", "all fields right", "held-out loss"),
    )
    for label, score, evaluation in (("base", report.base, base), ("adapter", report.adapter, adapter)):
        loss = "–" if evaluation.loss is None else f"{evaluation.loss:.3f}"
        row(
            grid,
            f"  {label}",
            format_share(score.valid_json),
            format_share(score.field_accuracy),
            format_share(score.exact_match),
            loss,
        )
    console.print(grid)
    error = report.measured_peak_bytes / report.predicted_peak_bytes - 1
    measured, predicted = format_bytes(report.measured_peak_bytes), format_bytes(report.predicted_peak_bytes)
    line(
        f"  trained in {format_seconds(report.train_seconds)} at {report.tokens_per_second:.0f} tokens/s; "
        f"peak {measured} measured, {predicted} predicted ({100 * error:+.1f} %)",
        "dim",
    )
