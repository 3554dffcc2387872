"""What an adapter is, in lines: its card, or its config where it has none, and the parameters that it changes.

The command line and the terminal UI show the same ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import msgspec

from edgepeft.library.audit import AuditLine
from edgepeft.library.card import Card
from edgepeft.library.combine_text import combination_lines
from edgepeft.library.parent import lineage
from edgepeft.library.store import AdapterFolder
from edgepeft.methods import id_of, method_values
from edgepeft.models.headers import TensorHeader
from edgepeft.units import format_bytes, format_count, format_seconds, format_share


class ChangedGroup(msgspec.Struct, frozen=True):
    """Parameters of an adapter that differ only in their layer."""

    where: str
    """Name behind the layer's number."""
    layers: str
    """`0–29`, or `0–3, 7`; a dash outside the layers."""
    shapes: str
    """Such as `16×576`."""
    entries: int


def adapter_lines(adapter: AdapterFolder) -> list[tuple[str, str]]:
    """What an adapter is: what a line is about, and the line."""
    return [
        ("adapter", adapter.reference),
        ("folder", str(adapter.path)),
        *(_card_lines(adapter.card) if adapter.card else _config_lines(adapter)),
    ]


def changed_groups(tensors: Sequence[TensorHeader]) -> list[ChangedGroup]:
    """Parameters that differ only in their layer in one line each, in the order in which they come."""
    found: dict[str, tuple[set[int], dict[tuple[int, ...], None], int]] = {}
    for tensor in tensors:
        match = re.search(r"\.layers\.(\d+)\.", tensor.name)
        where = tensor.name[match.end() :] if match else tensor.name
        layers, shapes, entries = found.get(where, (set(), {}, 0))
        if match:
            layers.add(int(match.group(1)))
        found[where] = (layers, {**shapes, tensor.shape: None}, entries + math.prod(tensor.shape))
    return [
        ChangedGroup(where, _ranges(sorted(layers)), ", ".join("×".join(map(str, shape)) for shape in shapes), entries)
        for where, (layers, shapes, entries) in found.items()
    ]


def audit_text(entry: AuditLine) -> str:
    """A line of an adapter's audit."""
    detail = f" ({entry.detail})" if entry.detail else ""
    return f"{entry.time[:16].replace('T', ' ')}  {entry.user} {entry.action} v{entry.version}{detail}"


def _lineage_lines(card: Card) -> list[tuple[str, str]]:
    parent = card.recipe.parent if card.recipe else None
    if not card.parent:
        return []
    return [("continues", " ← ".join(lineage(card)))] + ([("parent weights", parent.sha256)] if parent else [])


def _card_lines(card: Card) -> list[tuple[str, str]]:
    share = "" if card.trainable_share is None else f", {format_share(card.trainable_share, digits=2)} of the model's"
    lines = [
        *(combination_lines(card, card.combined) if card.combined else []),
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


def _ranges(numbers: list[int]) -> str:
    """`0–29`, or `0–3, 7`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("–".join(map(str, part)) for part in parts) or "–"
