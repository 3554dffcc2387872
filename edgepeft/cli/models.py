"""`edgepeft models`: the base models on this disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgepeft.cli.output import JsonFlag, line, note, print_json, row, stderr, table
from edgepeft.cli.output import console as out

if TYPE_CHECKING:
    from edgepeft.models.store import ModelEntry
    from edgepeft.processes import Progress

app = typer.Typer(no_args_is_help=True, help="List, find, add and remove base models.")

_PHASES = {
    "fingerprint": "Reading the weights for their fingerprint",
    "reading": "Reading the file",
    "converting": "Converting to bf16",
    "copying": "Copying the weights",
    "tokenizer": "Preparing the tokenizer",
}


@app.command("list")
def list_(as_json: JsonFlag = False) -> None:
    """List the models in the store."""
    from edgepeft.models.embedded import EMBEDDED
    from edgepeft.models.store import list_models
    from edgepeft.units import format_bytes, format_count

    entries = list_models()
    if as_json:
        print_json([_summary(entry) for entry in entries])
        return
    if entries:
        grid = table("name", "parameters", "stored as", "size", "licence", "weights", right=("parameters", "size"))
        for entry in entries:
            row(
                grid,
                entry.name,
                format_count(entry.shape.parameters),
                entry.stored_as,
                format_bytes(entry.weights_bytes),
                entry.licence or "n/a",
                entry.weights if entry.kind == "folder" else "in the store",
            )
        out.print(grid)
    else:
        line("No model is in the store yet.")
    if not any(entry.name == EMBEDDED for entry in entries):
        line(f"{EMBEDDED} comes with edgepeft and is prepared when it is first used.", "dim")
    line("Find models on this disk with: edgepeft models scan", "dim")


@app.command("scan")
def scan(
    folders: Annotated[list[Path] | None, typer.Argument(help="Folders to search beside the known ones.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Find models of Hugging Face's cache, LM Studio and Ollama, and in the folders named."""
    from edgepeft.models.discovery import scan as find
    from edgepeft.paths import as_name
    from edgepeft.units import format_bytes

    found = find([folder.expanduser() for folder in folders or ()])
    if as_json:
        print_json(found)
        return
    if not found:
        line("No model was found. Name a folder to search: edgepeft models scan DIR")
        return
    grid = table("model", "from", "form", "size", "state", right=("size",))
    for model in found:
        state = (
            f"added as {model.in_store}"
            if model.in_store
            else "can be added"
            if model.usable
            else f"not usable: {model.reason}"
        )
        row(grid, model.name, model.origin, model.kind, format_bytes(model.size_bytes), state)
    out.print(grid)
    fresh = [model for model in found if model.usable and not model.in_store]
    if fresh:
        line()
        line("Add one with:")
        for model in fresh[:12]:
            named = f" --name {as_name(model.name)}" if model.origin == "ollama" else ""
            line(f"  edgepeft models add {_quoted(model.path)}{named}")


@app.command("add")
def add(
    path: Annotated[str, typer.Argument(help="A model folder, a GGUF file, or smollm2-135m.")],
    name: Annotated[
        str | None, typer.Option("--name", help="Its name here; by default made from the folder's.")
    ] = None,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy the weights into the store instead of referring to them.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Add a model that is on this disk; its weights stay where they lie unless --copy is given."""
    from edgepeft.models.store import add_model

    with model_progress() as report:
        entry = add_model(path, name=name, copy=copy, progress=report)
    if as_json:
        print_json(_summary(entry))
        return
    line(f"{entry.name} is ready: {_in_short(entry)}")
    for remark in entry.notes:
        note(f"Note: {remark}.")


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(help="Its name in the store, or the folder it was added from.")],
    as_json: JsonFlag = False,
) -> None:
    """Show one model: its shape, its size in each precision, template, licence and place."""
    from edgepeft.models.sizes import size_by_precision
    from edgepeft.models.source_folder import template_kind
    from edgepeft.models.store import find_model
    from edgepeft.units import format_bytes, format_count

    entry = find_model(name)
    shape = entry.shape
    if as_json:
        print_json(_summary(entry))
        return
    line(f"{entry.name}: {_in_short(entry)}", "bold")
    sizes = size_by_precision(shape)
    packed = shape.layers * shape.linear_parameters_per_layer
    head = "one matrix for input and output" if shape.tied_embeddings else "separate output head"
    facts = {
        "architecture": f"{shape.architecture}, {shape.layers} layers of {shape.hidden}, MLP {shape.intermediate}",
        "attention": _attention(entry),
        "parameters": f"{shape.parameters:,}, of which {format_count(packed)} in linear layers that can be quantized",
        "vocabulary": f"{shape.vocab:,} tokens, {head}",
        "context": f"{shape.context_length:,} tokens",
        "weights in memory": ", ".join(f"{form} {format_bytes(size)}" for form, size in sizes.items()),
        "stored as": f"{entry.stored_as}, {format_bytes(entry.weights_bytes)}",
        "quantized copies": _copies(entry),
        "chat template": template_kind(Path(entry.folder)),
        "licence": entry.licence or "n/a",
        "weights": entry.weights,
        "source": entry.source,
        "fingerprint": entry.fingerprint,
        "added": entry.added,
    }
    width = max(map(len, facts))
    for label, value in facts.items():
        line(f"  {label:<{width}}  {value}")
    for remark in entry.notes:
        line(f"  {'note':<{width}}  {remark}", "dim")


@app.command("remove")
def remove(
    name: Annotated[str, typer.Argument(help="Its name in the store.")],
    as_json: JsonFlag = False,
) -> None:
    """Remove a model from the store; files that the store only refers to are never deleted."""
    from edgepeft.models.store import remove_model

    done = remove_model(name)
    if as_json:
        print_json({"name": name, "done": done})
        return
    for sentence in done:
        line(sentence)


@contextmanager
def model_progress() -> Iterator[Progress]:
    """A progress line with ETA on stderr for adding or converting a model; silent when nothing takes long."""
    from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=28), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def report(phase: str, fraction: float | None) -> None:
            if phase not in tasks:
                for earlier in tasks.values():
                    bar.update(earlier, visible=False)
                tasks[phase] = bar.add_task(_PHASES.get(phase, phase), total=None if fraction is None else 1.0)
                if not stderr.is_terminal and phase in ("converting", "copying"):
                    note(f"{_PHASES[phase]} …")
            if fraction is not None:
                bar.update(tasks[phase], total=1.0, completed=fraction)

        yield report


def _summary(entry: ModelEntry) -> dict[str, Any]:
    """The entry with what is derived from it."""
    import msgspec

    from edgepeft.models.quantized_copy import list_copies
    from edgepeft.models.sizes import size_by_precision
    from edgepeft.models.source_folder import template_kind

    return {
        **msgspec.to_builtins(entry),
        "parameters": entry.shape.parameters,
        "size_by_precision": size_by_precision(entry.shape),
        "template": template_kind(Path(entry.folder)),
        "quantized_copies": [
            {
                "precision": copy.precision,
                "device": copy.device,
                "bytes": copy.size_bytes,
                "path": str(copy.path),
                "problem": copy.problem or None,
            }
            for copy in list_copies(entry)
        ],
    }


def _copies(entry: ModelEntry) -> str:
    from edgepeft.models.quantized_copy import copy_settings, list_copies
    from edgepeft.units import format_bytes

    places = {"cpu": "the CPU", "cuda": "a card"}
    texts = [
        f"{copy.precision} for {places[copy.device]} {format_bytes(copy.size_bytes)}"
        + (f", to be made anew: {copy.problem}" if copy.problem else "")
        for copy in list_copies(entry)
    ]
    if copy_settings(entry, "nf4", "cpu") is None:
        return "none: the source is quantized itself"
    return "; ".join(texts) or "none; the first load in nf4 or int8 stores one"


def _in_short(entry: ModelEntry) -> str:
    from edgepeft.units import format_bytes, format_count

    return f"{format_count(entry.shape.parameters)} parameters, {entry.stored_as}, {format_bytes(entry.weights_bytes)}"


def _attention(entry: ModelEntry) -> str:
    shape = entry.shape
    text = f"{shape.heads} heads of {shape.head_dim}, {shape.kv_heads} for keys and values"
    return text + (f", window of {shape.sliding_window:,} tokens" if shape.sliding_window else "")


def _quoted(path: str) -> str:
    import shlex

    return shlex.quote(path)
