"""What the Home screen shows, read from the light rooms in a thread and turned into plain lines of data.

No function here touches a widget: each returns frozen structs, which a message carries to the screen.
"""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING, Literal

import msgspec

from edgepeft.errors import EdgepeftError
from edgepeft.units import format_age, format_bytes, format_count, format_gib, format_seconds

if TYPE_CHECKING:
    from edgepeft.runs.listing import RunListing
    from edgepeft.runs.state import RunSummary

Mark = Literal["running", "done", "trouble", "plain"]


class Bar(msgspec.Struct, frozen=True):
    """How full a memory is."""

    label: str
    used_bytes: int
    total_bytes: int
    note: str = ""
    """Who uses it, or what else the machine tells."""


class Machine(msgspec.Struct, frozen=True):
    """The machine, as Home shows it."""

    title: str
    """Device and driver, for the top line."""
    bars: tuple[Bar, ...]


class Row(msgspec.Struct, frozen=True):
    """One thing in a list."""

    key: str
    """Its name; unique within its list."""
    text: str
    """The line that is shown."""
    mark: Mark = "plain"
    command: str = ""
    """What to type in a shell to go on with it."""


class Shelves(msgspec.Struct, frozen=True):
    """Runs, adapters and models."""

    runs: tuple[Row, ...]
    adapters: tuple[Row, ...]
    models: tuple[Row, ...]
    troubles: tuple[str, ...] = ()
    """Folders that could not be read, one line each."""


def read_machine() -> Machine:
    """Cards, RAM and disk as they are now."""
    from edgepeft.hardware.host import read_host
    from edgepeft.hardware.nvml import read_gpus

    host, gpus = read_host(), read_gpus()
    bars = []
    for gpu in gpus:
        if gpu.total_bytes is None or gpu.used_bytes is None:
            continue
        users = [f"{held.name} {held.used_bytes / (1 << 30):.1f}" for held in gpu.processes[:2] if held.used_bytes]
        sensors = [f"{gpu.temperature_c} °C"] if gpu.temperature_c is not None else []
        sensors += [f"{gpu.power_w:.0f} W"] if gpu.power_w is not None else []
        bars.append(Bar("VRAM", gpu.used_bytes, gpu.total_bytes, " · ".join([*users, *sensors])))
    ram_total = host.ram_usable_bytes
    bars.append(
        Bar(
            "RAM",
            max(0, ram_total - host.ram_available_bytes),
            ram_total,
            f"disk {host.disk_free_bytes / (1 << 30):.0f} GiB free",
        )
    )
    if gpus:
        title = f"{gpus[0].name} · driver {gpus[0].driver or 'n/a'}"
    else:
        title = f"{host.cpu} · {host.physical_cores or host.logical_cores} cores"
    return Machine(title=title, bars=tuple(bars))


def read_shelves(now: float | None = None) -> Shelves:
    """Runs with their true state, the library's adapters and the store's models."""
    troubles: list[str] = []
    lists: list[tuple[Row, ...]] = []
    for read in (_runs, _adapters, _models):
        try:
            lists.append(tuple(read(time.time() if now is None else now)))
        except (EdgepeftError, OSError) as error:
            troubles.append(str(error))
            lists.append(())
    return Shelves(runs=lists[0], adapters=lists[1], models=lists[2], troubles=tuple(troubles))


def _runs(now: float) -> list[Row]:
    return [row_of_run(run, now) for run in listed_runs().read()]


@functools.cache
def listed_runs() -> RunListing:
    """Every run as it was last seen; all screens that list runs look through this one."""
    from edgepeft.runs.listing import RunListing

    return RunListing()


def row_of_run(run: RunSummary, now: float) -> Row:
    """A run as a list shows it; `now` in seconds since 1970."""
    state = run.state
    loss = "" if state.loss is None else f"  loss {state.loss:.3f}"
    mark: Mark
    if state.alive:
        doing = f"step {state.step}/{state.steps}" if state.step else state.phase or "starting"
        eta = "" if state.eta_seconds is None else f"  ETA {format_seconds(state.eta_seconds)}"
        text, mark, verb = f"{doing}{loss}{eta}", "running", "attach"
    elif state.status == "finished":
        age = "" if state.updated_at is None else f" {format_age(now - state.updated_at)} ago"
        held_out = "" if state.eval_loss is None else f"  held out {state.eval_loss:.3f}"
        text, mark, verb = f"finished{age}{held_out}", "done", "show"
    elif state.status == "damaged":
        text, mark, verb = f"damaged: {state.message}", "trouble", "show"
    else:
        text, mark, verb = f"{state.status} {state.step}/{state.steps}{loss}", "trouble", "resume"
    return Row(run.id, text, mark, f"edgepeft runs {verb} {run.id}")


def _adapters(now: float) -> list[Row]:
    from edgepeft_tui.adapters import read_library

    rows = []
    for one in (row for part, _ in read_library() for row in part):
        if one.trouble:
            rows.append(Row(one.name, f"damaged: {one.trouble}", "trouble", "edgepeft adapters list"))
        else:
            text = f"v{one.version}  {one.method}  {format_bytes(one.size_bytes)}  {one.base}".rstrip()
            rows.append(Row(one.name, text, "plain", f"edgepeft chat --adapter {one.name}"))
    return rows


def _models(now: float) -> list[Row]:
    from edgepeft.models.store import list_models

    return [
        Row(
            entry.name,
            f"{format_count(entry.shape.parameters)}  {entry.stored_as} {format_gib(entry.weights_bytes)}",
            "plain",
            f"edgepeft chat {entry.name}",
        )
        for entry in list_models()
    ]
