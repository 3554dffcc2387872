"""The long work of the Adapters screen: from what a form holds to what came of it, run in a thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edgepeft.errors import UsageError
from edgepeft.processes import Progress

if TYPE_CHECKING:
    from edgepeft.library.combine_text import Said
    from edgepeft.library.combining import Plan


class Outcome(msgspec.Struct, frozen=True):
    """What came of it."""

    lines: tuple[Said, ...]
    name: str = ""
    """The adapter that is new, to be shown."""


Work = Callable[[Progress], Outcome]


def compose(references: Sequence[str], values: Mapping[str, str], progress: Progress) -> Outcome:
    """Adds adapters up; `values` has name, how, a `weight-K` each, and rank, density and seed where they apply."""
    from edgepeft.library.combine_words import plan_composition

    progress("reading the adapters", None)
    plan = plan_composition(
        values["name"],
        [f"{reference}={values[f'weight-{at}'] or '1'}" for at, reference in enumerate(references)],
        values["how"],
        rank=whole(values.get("rank", ""), "rank"),
        density=number(values.get("density", ""), "density"),
        seed=whole(values.get("seed", ""), "seed"),
    )
    return _combined(plan, "composed", progress)


def average(references: Sequence[str], values: Mapping[str, str], progress: Progress) -> Outcome:
    """Averages adapters; `values` has name, by, what is averaged, and rank where it applies."""
    from edgepeft.library.combine_words import plan_average

    progress("reading the adapters", None)
    counts = [values.get(f"samples-{at}", "") for at in range(len(references))]
    plan = plan_average(
        values["name"],
        [f"{reference}:{count}" if count else reference for reference, count in zip(references, counts, strict=True)],
        values["by"],
        rank=whole(values.get("rank", ""), "rank"),
        factors=values["what"] == "factors",
    )
    return _combined(plan, "averaged", progress)


def merge(reference: str, values: Mapping[str, str], progress: Progress) -> Outcome:
    """Writes a model with the adapter in its weights; `values` has out, into, format, dtype, limit and force."""
    from edgepeft.chat.merge_words import make_merge, plan_merge, say_merged
    from edgepeft.library.combine_text import Said

    progress("reading the adapter", None)
    plan = plan_merge(
        reference,
        Path(values["out"]),
        into=_unless(values["into"], "auto"),
        dtype=_unless(values.get("dtype", ""), "auto"),
        format=values["format"],
        limit=number(values["limit"], "limit"),
        force=values["force"] == "yes",
        progress=progress,
    )
    result = make_merge(plan, progress)
    notes = (Said(f"Note: {text}", careful=True) for text in (*plan.warnings, *result.notes))
    return Outcome((*say_merged(plan, result), *notes))


def export(reference: str, values: Mapping[str, str], progress: Progress) -> Outcome:
    """Writes the adapter alone for other programs; `values` has out, format and force."""
    from edgepeft.chat.merge_words import make_export, plan_export, say_exported
    from edgepeft.library.combine_text import Said

    progress("reading the adapter", None)
    out, kind, force = Path(values["out"]), values["format"], values["force"] == "yes"
    plan = plan_export(reference, out, kind, force=force, progress=progress)
    result = make_export(plan, progress)
    notes = (Said(f"Note: {text}", careful=True) for text in (*plan.warnings, *result.notes))
    return Outcome((*say_exported(plan, result), *notes))


def import_path(values: Mapping[str, str], progress: Progress) -> Outcome:
    """Copies an adapter into the library; `values` has path, name, base and alpha."""
    from edgepeft.library import import_words
    from edgepeft.library.combine_text import Said

    progress("copying", None)
    alpha = number(values["alpha"], "alpha")
    path, base = Path(values["path"]), values["base"] or None
    adapter, warnings = import_words.import_path(path, values["name"], base, alpha, progress)
    notes = (Said(f"Warning: {text}", careful=True) for text in warnings)
    return Outcome((Said(f"Imported as {adapter.reference}"), *notes), values["name"])


def roll_back(name: str, version: int, progress: Progress) -> Outcome:
    """Makes a name mean an older version again."""
    from edgepeft.library.combine_text import Said
    from edgepeft.library.store import rollback

    progress("copying", None)
    made, number = rollback(name, f"v{version}")
    text = f"{made} is a copy of v{number}: {name} means it from now on, and every version is still there"
    return Outcome((Said(text),), name)


def remove(name: str, version: int | None, progress: Progress) -> Outcome:
    """Deletes one version of a name, or all of them."""
    from edgepeft.library.combine_text import Said
    from edgepeft.library.store import remove as remove_versions

    progress("deleting", None)
    return Outcome((Said(f"Removed {', '.join(remove_versions(name, version))}"),))


def whole(text: str, what: str) -> int | None:
    """A whole number; None for nothing.

    Raises:
        UsageError: it is none.
    """
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{text!r} is no whole number", where=what, hint="Leave it empty for the usual one") from None


def number(text: str, what: str) -> float | None:
    """A number; None for nothing.

    Raises:
        UsageError: it is none.
    """
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    # Not a number is not equal to itself.
    if value != value or abs(value) == float("inf"):
        raise UsageError(f"{text!r} is no number", where=what, hint="Leave it empty for the usual one")
    return value


def _combined(plan: Plan, command: str, progress: Progress) -> Outcome:
    from edgepeft.library.combine_client import combine
    from edgepeft.library.combine_text import Said, say_combined

    adapter, made = combine(plan, "averaged" if command == "averaged" else "composed", progress)
    notes = adapter.card.notes if adapter.card else ()
    return Outcome(
        (*say_combined(plan, adapter, made), *(Said(f"Note: {text}", careful=True) for text in notes)), plan.name
    )


def _unless(word: str, usual: str) -> str | None:
    return None if word in ("", usual) else word
