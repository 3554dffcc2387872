"""`edgepeft adapters`: the library of trained adapters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgepeft.cli import combine, merge
from edgepeft.cli.output import JsonFlag, line, note, print_json, row, table
from edgepeft.cli.output import console as out

if TYPE_CHECKING:
    from edgepeft.library.store import AdapterFolder

app = typer.Typer(
    no_args_is_help=True, help="List, show, import, combine, merge, export, roll back and remove adapters."
)
app.command("compose")(combine.compose)
app.command("average")(combine.average)
app.command("merge")(merge.merge)
app.command("export")(merge.export)

Reference = Annotated[str, typer.Argument(help="NAME, NAME@v2 or a folder.")]


@app.command("list")
def list_(as_json: JsonFlag = False) -> None:
    """List every version in the library."""
    from edgepeft.library.store import scan_library
    from edgepeft.units import format_bytes

    adapters, broken = scan_library()
    if as_json:
        print_json(
            {
                "adapters": [_summary(adapter) for adapter in adapters],
                "broken": [{"path": str(version.path), "why": version.why} for version in broken],
            }
        )
        return
    for version in broken:
        note(f"Unusable: {version.why}", "yellow")
    if not adapters:
        line(
            "The library is empty. Train an adapter with edgepeft train MODEL DATA --name N, "
            "or take one over with edgepeft adapters import PATH --name N."
        )
        return
    grid = table("adapter", "base", "method", "precision", "eval loss", "size", "made", right=("eval loss", "size"))
    for adapter in adapters:
        card = adapter.card
        loss = card.metrics.get("eval_loss") if card else None
        row(
            grid,
            adapter.reference,
            (card.base if card else str(adapter.config.get("base_model_name_or_path") or "")) or "n/a",
            adapter.method,
            (card.precision if card else None) or "n/a",
            "n/a" if loss is None else f"{loss:.3f}",
            format_bytes(adapter.weights.stat().st_size),
            card.created[:16].replace("T", " ") if card else "imported",
        )
    out.print(grid)


@app.command("show")
def show(
    reference: Reference,
    every: Annotated[bool, typer.Option("--parameters", help="List every parameter, not a summary.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show what an adapter is: its base, recipe, results, and every parameter it changes."""
    from edgepeft.library.audit import read_audit
    from edgepeft.library.card_text import adapter_lines, audit_text, changed_groups
    from edgepeft.library.store import resolve_adapter
    from edgepeft.models.headers import read_header

    adapter = resolve_adapter(reference)
    tensors = read_header(adapter.weights)
    audit = read_audit(adapter.name) if adapter.name else []
    if as_json:
        print_json(
            {
                **_summary(adapter),
                "config": adapter.config,
                "card": adapter.card,
                "tensors": [{"name": tensor.name, "shape": tensor.shape, "dtype": tensor.dtype} for tensor in tensors],
                "audit": audit,
            }
        )
        return
    grid = table("", "")
    grid.show_header = False
    for key, value in adapter_lines(adapter):
        row(grid, key, value)
    out.print(grid)
    line()
    if every:
        for tensor in tensors:
            line(f"{'×'.join(map(str, tensor.shape)):>12}  {tensor.dtype}  {tensor.name}")
    else:
        total = sum(tensor.entries for tensor in tensors)
        line(f"{len(tensors)} parameters with {total:,} entries that it adds or changes:", "bold")
        changes = table("where", "layers", "shapes", "entries", right=("entries",))
        for group in changed_groups(tensors):
            row(changes, group.where, group.layers, group.shapes, f"{group.entries:,}")
        out.print(changes)
    for entry in audit:
        line(audit_text(entry), "dim")


@app.command("import")
def import_(
    path: Annotated[
        Path,
        typer.Argument(help="A folder that PEFT, edgepeft or mlx-lm saved, or a LoRA's .safetensors or .gguf file."),
    ],
    name: Annotated[str, typer.Option("--name", help="Name in the library.")],
    base: Annotated[
        str | None,
        typer.Option(
            "--base", help="The base model it belongs to: needed for a file, checked for a folder.", show_default=False
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option("--alpha", help="Alpha of a LoRA whose file does not say it.", show_default=False),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Copy an adapter into the library as the next version of NAME; a LoRA file becomes a folder of PEFT's format."""
    from edgepeft.cli.worker_progress import timed_progress
    from edgepeft.library.import_words import import_path

    with timed_progress() as progress:
        adapter, warnings = import_path(path, name, base, alpha, progress)
    if as_json:
        print_json({**_summary(adapter), "warnings": warnings})
        return
    for warning in warnings:
        note(f"Warning: {warning}", "yellow")
    line(f"Imported as {adapter.reference}")


@app.command("rollback")
def rollback(
    reference: Annotated[str, typer.Argument(help="NAME of an adapter in the library.")],
    version: Annotated[
        str | None, typer.Argument(help="v1, v2, …; by default the one before the newest.", show_default=False)
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Make NAME mean an older version again: it is published once more as the newest, and nothing is lost."""
    from edgepeft.library.store import resolve_adapter
    from edgepeft.library.store import rollback as roll_back

    made, number = roll_back(reference, version)
    adapter = resolve_adapter(made)
    if as_json:
        print_json({**_summary(adapter), "rolled_back_to": f"{adapter.name}@v{number}"})
        return
    line(f"{made} is a copy of v{number}: {adapter.name} means it from now on, and every version is still there")


@app.command("remove")
def remove(
    reference: Annotated[str, typer.Argument(help="NAME for all its versions, or NAME@v2.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Remove one version, or all versions of a name."""
    from edgepeft.cli.output import interactive
    from edgepeft.errors import UsageError
    from edgepeft.library.store import removable
    from edgepeft.library.store import remove as remove_versions

    name, version, doomed = removable(reference)
    if not yes:
        if not interactive():
            raise UsageError(f"this removes {', '.join(doomed)}", where="adapters remove", hint="Add --yes to do it")
        if not typer.confirm(f"Remove {', '.join(doomed)} for good?"):
            line("Nothing was removed.")
            return
    gone = remove_versions(name, version)
    if as_json:
        print_json({"removed": gone})
        return
    line(f"Removed {', '.join(gone)}")


def _summary(adapter: AdapterFolder) -> dict[str, Any]:
    card = adapter.card
    return {
        "reference": adapter.reference,
        "name": adapter.name,
        "version": adapter.version,
        "path": str(adapter.path),
        "bytes": adapter.weights.stat().st_size,
        "method": adapter.method,
        "base": card.base if card else adapter.config.get("base_model_name_or_path"),
        "base_fingerprint": card.base_fingerprint if card else None,
        "precision": card.precision if card else None,
        "combined": card.combined if card else None,
        "imported": card.imported if card else None,
        "created": card.created if card else None,
        "metrics": card.metrics if card else {},
    }
