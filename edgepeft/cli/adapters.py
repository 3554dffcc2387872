"""`edgepeft adapters`: the library of trained adapters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgepeft.cli import combine, merge
from edgepeft.cli.output import JsonFlag, line, note, print_json, row, table
from edgepeft.cli.output import console as out

if TYPE_CHECKING:
    from edgepeft.library.card import Card
    from edgepeft.library.lora_file import LoraFile
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
    for key, value in (
        ("adapter", adapter.reference),
        ("folder", str(adapter.path)),
        *(_card_lines(adapter.card) if adapter.card else _config_lines(adapter)),
    ):
        row(grid, key, value)
    out.print(grid)
    line()
    if every:
        for tensor in tensors:
            line(f"{'×'.join(map(str, tensor.shape)):>12}  {tensor.dtype}  {tensor.name}")
    else:
        total = sum(tensor.entries for tensor in tensors)
        line(f"{len(tensors)} parameters with {total:,} entries that it adds or changes:", "bold")
        groups = _grouped([(tensor.name, tensor.shape) for tensor in tensors])
        changes = table("where", "layers", "shapes", "entries", right=("entries",))
        for where, layers, shapes, entries in groups:
            row(changes, where, layers, shapes, f"{entries:,}")
        out.print(changes)
    for entry in audit:
        detail = f" ({entry.detail})" if entry.detail else ""
        line(f"{entry.time[:16].replace('T', ' ')}  {entry.user} {entry.action} v{entry.version}{detail}", "dim")


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
    from edgepeft.errors import UsageError
    from edgepeft.library.lora_file import find_lora_file
    from edgepeft.library.store import resolve_adapter

    file = find_lora_file(path)
    if file is None:
        if alpha is not None:
            raise UsageError("the adapter's own config says its alpha", where="--alpha", hint="Leave the option out")
        reference, warnings = _import_folder(path.expanduser(), name, base)
        adapter = resolve_adapter(reference)
    else:
        adapter, warnings = _import_file(file, name, base, alpha)
    if as_json:
        print_json({**_summary(adapter), "warnings": warnings})
        return
    for warning in warnings:
        note(f"Warning: {warning}", "yellow")
    line(f"Imported as {adapter.reference}")


def _import_folder(path: Path, name: str, base: str | None) -> tuple[str, list[str]]:
    from edgepeft.library.store import check_base, import_adapter, open_adapter
    from edgepeft.models.store import find_model

    folder = path if path.is_dir() else path.parent
    warnings = check_base(open_adapter(folder), find_model(base)) if base else []
    return import_adapter(folder, name), warnings


def _import_file(file: LoraFile, name: str, base: str | None, alpha: float | None) -> tuple[AdapterFolder, list[str]]:
    import math

    from edgepeft.cli.worker_progress import timed_progress
    from edgepeft.errors import UsageError
    from edgepeft.library.import_client import UNVERIFIED, import_lora
    from edgepeft.models.store import find_model

    if base is None:
        raise UsageError(
            "the file does not say which base model it belongs to",
            where=file.path,
            hint="Add --base MODEL; see: edgepeft models list",
        )
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise UsageError(f"an alpha of {alpha:g} is not possible", where="--alpha", hint="Give a number above 0")
    entry = find_model(base)
    with timed_progress() as progress:
        adapter, made = import_lora(file, name, entry, alpha, progress)
    return adapter, [f"{adapter.reference}: {UNVERIFIED.format(base=entry.name)}", *made.notes]


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


def _lineage_lines(card: Card) -> list[tuple[str, str]]:
    from edgepeft.library.parent import lineage

    parent = card.recipe.parent if card.recipe else None
    if not card.parent:
        return []
    return [("continues", " ← ".join(lineage(card)))] + ([("parent weights", parent.sha256)] if parent else [])


def _card_lines(card: Card) -> list[tuple[str, str]]:
    from edgepeft.units import format_bytes, format_count, format_seconds, format_share

    share = "" if card.trainable_share is None else f", {format_share(card.trainable_share, digits=2)} of the model's"
    lines = [
        *(combine.combination_lines(card, card.combined) if card.combined else []),
        *_recipe_lines(card),
        *_origin_lines(card),
        ("trainable", f"{format_count(card.trainable_parameters)} parameters{share}"),
        *_lineage_lines(card),
    ]
    if card.system:
        lines.append(("system message", card.system))
    if card.template:
        lines.append(
            (
                "chat template",
                f"{card.template.fingerprint}, stops at tokens {', '.join(map(str, card.template.stop_token_ids))}",
            )
        )
    if card.parent:
        lines.append(("trained from", card.parent))
    for key, value in card.metrics.items():
        shown = (
            format_bytes(value)
            if key.endswith("_bytes")
            else format_seconds(value)
            if key.endswith("_seconds")
            else f"{value:,.4g}"
        )
        lines.append((key.replace("_", " "), shown))
    lines.append(("versions", ", ".join(f"{name} {version}" for name, version in card.versions.items())))
    lines += [("note", text) for text in card.notes]
    return lines


def _origin_lines(card: Card) -> list[tuple[str, str]]:
    origin = card.imported
    if origin is None:
        return []
    return [
        ("imported", f"{card.created}, from {origin.path}"),
        ("file", f"{origin.format}, {origin.sha256}"),
        ("alpha", f"from {origin.alpha_from}"),
    ]


def _recipe_lines(card: Card) -> list[tuple[str, str]]:
    """What is known of the training; for a combination, of the base alone."""
    held = f", held in {card.precision}" if card.precision else ""
    computed = f", computed in {card.compute_dtype}" if card.compute_dtype else ""
    base = [("base", f"{card.base or 'n/a'}{held}{computed}"), ("base fingerprint", card.base_fingerprint or "n/a")]
    recipe, layout = card.recipe, card.layout
    if recipe is None or layout is None:
        return base
    from edgepeft.methods import id_of
    from edgepeft.plan.reasons import method_values

    settings = "".join(f", {name} {value}" for name, value in method_values(recipe.method).items())
    return [
        ("made", f"{card.created}, by run {card.run}, {card.steps} steps"),
        *base,
        ("method", id_of(recipe.method) + settings),
        ("data", f"{recipe.data.path} ({recipe.data.format}, trained on {recipe.data.train_on})"),
        ("data fingerprint", recipe.data.fingerprint),
        (
            "recipe",
            f"{recipe.epochs:g} epochs, {recipe.samples_per_step} samples a step, up to {recipe.max_seq_len} tokens, "
            f"learning rate {recipe.optimizer.learning_rate:g} {recipe.schedule.name}, seed {recipe.seed}",
        ),
        ("layout", f"{layout.micro_batch_tokens} tokens a micro-batch, checkpointing {layout.checkpointing}"),
    ]


def _config_lines(adapter: AdapterFolder) -> list[tuple[str, str]]:
    config = adapter.config
    targets = config.get("target_modules")
    return [
        ("card", "none: it was not made by edgepeft, so its base is checked by shape only"),
        ("base", f"{config.get('base_model_name_or_path') or 'n/a'}, as its config says"),
        ("method", adapter.method + (f", alpha {config['lora_alpha']}" if "lora_alpha" in config else "")),
        ("modules", ", ".join(sorted(map(str, targets))) if isinstance(targets, list) else str(targets or "n/a")),
    ]


def _grouped(tensors: list[tuple[str, tuple[int, ...]]]) -> list[tuple[str, str, str, int]]:
    """Parameters that differ only in their layer in one line: module, layers, shapes, entries."""
    import math
    import re

    found: dict[str, tuple[set[int], dict[tuple[int, ...], None], int]] = {}
    for name, shape in tensors:
        match = re.search(r"\.layers\.(\d+)\.", name)
        where = name[match.end() :] if match else name
        layers, shapes, entries = found.get(where, (set(), {}, 0))
        if match:
            layers.add(int(match.group(1)))
        found[where] = (layers, {**shapes, shape: None}, entries + math.prod(shape))
    return [
        (where, _ranges(sorted(layers)), ", ".join("×".join(map(str, shape)) for shape in shapes), entries)
        for where, (layers, shapes, entries) in found.items()
    ]


def _ranges(numbers: list[int]) -> str:
    """`0–29`, or `0–3, 7`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("–".join(map(str, part)) for part in parts) or "–"
