"""What can be chatted with, read from the light rooms. Everything here may take a while: call it from a thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from edgepeft.chat.protocol import Sampling
from edgepeft.chat.setup import ChosenAdapter, Prompting, Setup
from edgepeft.errors import EdgepeftError
from edgepeft.library.store import AdapterFolder
from edgepeft.models.store import ModelEntry
from edgepeft_tui.text import visible

Progress = Callable[[str, float | None], None]
BASE = "base"
"""What the base without adapters is called wherever adapters are listed."""
MOST_LANES = 4
STRONGEST = 4.0
"""Largest strength that a key sets; 1 is as trained."""


class Start(msgspec.Struct, frozen=True):
    """What a chat opens with when nobody said."""

    model: str
    adapters: tuple[str, ...] = ()
    """References with strengths, as `parse_adapter` takes them."""
    at_hand: bool = False
    """Whether the base is in the store, so that nothing has to be converted first."""


class Prepared(msgspec.Struct, frozen=True):
    """A base with the adapters of each lane, checked."""

    setup: Setup
    lanes: tuple[tuple[ChosenAdapter, ...], ...]
    promptings: tuple[Prompting, ...]
    """One for each lane."""
    advised: Sampling
    """What the model's authors advise."""
    fitting: tuple[AdapterFolder, ...]
    """The newest version of each adapter in the library that is for this base."""


def label_of(chosen: Sequence[ChosenAdapter]) -> str:
    """`db-triage v3 ×1.0`, several with a plus between, or `base`."""
    return " + ".join(_label(one) for one in chosen) or BASE


def _label(one: ChosenAdapter) -> str:
    adapter = one.adapter
    name = f"{adapter.name} v{adapter.version}" if adapter.name else adapter.path.name
    return f"{visible(name)} ×{one.scale:.1f}"


def read_start() -> Start:
    """Last used, else the newest adapter, else the embedded model."""
    from edgepeft.chat.archive import list_kept
    from edgepeft.library.store import list_adapters, resolve_adapter, split_reference
    from edgepeft.models.embedded import EMBEDDED
    from edgepeft.models.store import list_models

    stored = {entry.fingerprint: entry.name for entry in list_models()}
    for kept in list_kept(1):
        if kept.model in stored.values():
            try:
                for text in kept.adapters:
                    resolve_adapter(split_reference(text, "=")[0])
            except EdgepeftError:
                return Start(kept.model, (), True)
            return Start(kept.model, kept.adapters, True)
    carded = [one for one in list_adapters() if one.card is not None and one.card.base_fingerprint in stored]
    if carded:
        newest = max(carded, key=lambda one: one.card.created if one.card else "")
        assert newest.card is not None
        return Start(stored[newest.card.base_fingerprint], (newest.reference,), True)
    return Start(EMBEDDED, (), EMBEDDED in stored.values())


def prepare(
    model: str | None,
    lanes: Sequence[Sequence[str | ChosenAdapter]],
    precision: str | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Checks a base and the adapters of each lane; a base that is not in the store yet is put there.

    Args:
        model: None for the base of the first adapter.
        lanes: adapters, or their references, of each lane; none for the base alone.
        precision: None for what the first adapter was trained on.

    Raises:
        EdgepeftError: a base or adapter is missing, damaged, or of another base.
    """
    from edgepeft.chat.sampling_defaults import sampling_defaults
    from edgepeft.chat.setup import choose_setup, entry_warnings, parse_adapter

    chosen = [tuple(parse_adapter(one) if isinstance(one, str) else one for one in lane) for lane in lanes]
    leading = next((lane for lane in chosen if lane), ())
    setup = choose_setup(model, leading, precision, None, progress)
    for lane in chosen:
        entry_warnings(setup.entry, lane)
    return Prepared(
        setup=setup,
        lanes=tuple(chosen),
        promptings=tuple(_prompting(setup.entry, lane) for lane in chosen),
        advised=sampling_defaults(Path(setup.entry.folder)),
        fitting=read_fitting(setup.entry),
    )


def adopt(setup: Setup, chosen: Sequence[ChosenAdapter]) -> tuple[Prompting, tuple[str, ...]]:
    """Checks adapters for a base that is in use; returns how to prompt with them, and warnings.

    Raises:
        BadInput: one belongs to another base.
    """
    from edgepeft.chat.setup import entry_warnings, precision_warnings

    warnings = (*entry_warnings(setup.entry, chosen), *precision_warnings(setup.precision, chosen))
    prompting = _prompting(setup.entry, chosen)
    return prompting, (*warnings, *prompting.warnings)


def read_fitting(entry: ModelEntry) -> tuple[AdapterFolder, ...]:
    """The newest version of each name in the library that is for this base, by name."""
    from edgepeft.library.store import check_base, list_adapters

    newest = {adapter.name: adapter for adapter in list_adapters()}
    found = []
    for adapter in newest.values():
        try:
            check_base(adapter, entry)
        except EdgepeftError:
            continue
        found.append(adapter)
    return tuple(found)


def read_models() -> list[tuple[str, str]]:
    """(name, line) of each base, the embedded one included."""
    from edgepeft.models.embedded import EMBEDDED
    from edgepeft.models.store import list_models
    from edgepeft.units import format_count, format_gib

    rows = []
    for entry in list_models():
        size = f"{format_count(entry.shape.parameters)}  {entry.stored_as} {format_gib(entry.weights_bytes)}"
        rows.append((entry.name, f"{entry.name}  {size}"))
    if EMBEDDED not in [name for name, _ in rows]:
        rows.append((EMBEDDED, f"{EMBEDDED}  the embedded one; it is prepared first"))
    return rows


def _prompting(entry: ModelEntry, chosen: Sequence[ChosenAdapter]) -> Prompting:
    from edgepeft.chat.setup import choose_prompting

    return choose_prompting(entry, chosen, fall_back=True)
