"""Combining LoRA adapters of one base: which adapters with which weights, and whether that can be done.

Everything here is told by cards, configs and headers; the tensors are the engine's, which `library.combine_client`
starts. An update is ΔW = scale · B · A; what is combined are updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import msgspec

from edgepeft.errors import BadInput, UsageError
from edgepeft.library.card import How
from edgepeft.library.combine_parts import Part
from edgepeft.library.lora_pairs import LoraPair, join_paths
from edgepeft.library.store import AdapterFolder, check_same_base, find_newest
from edgepeft.library.tensors import linear_of_other_size
from edgepeft.models.headers import read_header
from edgepeft.paths import check_name

TRUNCATED: tuple[How, ...] = ("svd", "ties", "dare")
"""Kinds whose result is cut to a rank."""
SPARSE: tuple[How, ...] = ("ties", "dare")
"""Kinds that keep a share of an update's entries."""
DENSITIES: dict[How, float] = {"ties": 0.2, "dare": 0.5}
"""Shares that are kept when none is said: the TIES paper's 20 %. For DARE half: the fewer entries stay, the more of the
result is noise of full rank, which the cut to a small rank loses."""


class PartTensors(msgspec.Struct, frozen=True):
    """One adapter, as the engine needs it."""

    name: str
    """For messages."""
    weights_file: str
    """Absolute path."""
    weight: float
    pairs: dict[str, LoraPair]
    """By the module path under which all parts are joined."""


class CombineRequest(msgspec.Struct, frozen=True):
    """What the worker is asked to do."""

    parts: tuple[PartTensors, ...]
    how: How
    rank: int | None
    """Largest rank of a module of the result; None where it is not truncated."""
    density: float | None
    seed: int
    weights_file: str
    """Where the result goes; absolute."""


class Combined(msgspec.Struct, frozen=True, tag="combined"):
    """What the worker made."""

    ranks: dict[str, int]
    """Of each module, by its path."""
    distance: float
    """‖result − weighted sum‖ / ‖weighted sum‖, Frobenius norms over all modules together."""
    worst_distance: float
    """The largest of a single module."""
    worst_module: str
    """Where that is."""
    energy_kept: float | None
    """Share of the squared singular values of what was truncated; None where nothing was."""
    least_energy_kept: float | None
    """The smallest share of a single module."""
    least_energy_module: str
    """Where that is; empty without truncation."""
    versions: dict[str, str]
    """Package → version."""


class Plan(msgspec.Struct, frozen=True):
    """A combination that can be made."""

    name: str
    """What it is published as."""
    parts: tuple[Part, ...]
    how: How
    rank: int | None
    density: float | None
    seed: int | None
    paths: tuple[dict[str, str], ...]
    """For each part: its module path → the path under which all parts are joined."""
    base: str
    """Name of the base; empty where nobody tells."""
    base_fingerprint: str
    """Of the base; empty where no card tells."""
    notes: tuple[str, ...]
    """What a person should know, as sentences."""

    def modules(self) -> dict[str, list[LoraPair]]:
        """Joined path → the pairs of the parts that change it."""
        found: dict[str, list[LoraPair]] = {}
        for part, paths in zip(self.parts, self.paths, strict=True):
            for path, pair in part.pairs.items():
                found.setdefault(paths[path], []).append(pair)
        return found


def plan_combination(
    name: str,
    parts: Sequence[Part],
    how: str,
    *,
    rank: int | None = None,
    density: float | None = None,
    seed: int | None = None,
    notes: Sequence[str] = (),
) -> Plan:
    """Checks everything that can be told without reading a tensor.

    Args:
        name: to publish as; its versions must be of the same base.
        parts: distinct adapters.
        how: one of `How`.
        rank: to truncate to; None for the largest rank of the parts, where the kind truncates.
        density: share of entries that ties and dare keep; None for `DENSITIES`.
        seed: of dare; None for 0.
        notes: put before those that are found here.

    Raises:
        UsageError: an unknown kind, or an option that it has no use for or that is out of range.
        BadInput: there are not two adapters, they are of different bases, or their ranks do not suit the kind.
    """
    if how not in get_args(How):
        known = ", ".join(kind for kind in get_args(How) if kind != "factors")
        raise UsageError(f"unknown kind {how!r}", where="--how", hint=f"Known: {known}")
    kind = msgspec.convert(how, How)
    check_name(name)
    if len(parts) < 2:
        raise BadInput(
            "only one adapter is named",
            where=parts[0].adapter.reference if parts else "",
            hint="Name two or more; for the strength of one, use chat --adapter a=0.7",
        )
    paths = tuple(join_paths([part.pairs for part in parts]))
    base, fingerprint, unverified = _common_base(parts)
    plan = Plan(
        name=name,
        parts=tuple(parts),
        how=kind,
        rank=None,
        density=_density(kind, density),
        seed=_seed(kind, seed),
        paths=paths,
        base=base,
        base_fingerprint=fingerprint,
        notes=(*notes, *unverified),
    )
    _check_sizes(plan)
    _check_name_free(plan)
    if kind in ("linear", "factors"):
        _check_equal_ranks(plan)
    return msgspec.structs.replace(plan, rank=_rank(plan, rank))


def _density(how: How, density: float | None) -> float | None:
    if how not in SPARSE:
        if density is not None:
            raise UsageError(f"{how} keeps every entry", where="--density", hint="Use it with --how ties or dare")
        return None
    chosen = DENSITIES[how] if density is None else density
    if not 0 < chosen <= 1:
        raise UsageError(f"a density of {chosen} is not possible", where="--density", hint="Use 0.1 to 1")
    return chosen


def _seed(how: How, seed: int | None) -> int | None:
    if how != "dare":
        if seed is not None:
            raise UsageError(f"{how} draws nothing at random", where="--seed", hint="Use it with --how dare")
        return None
    return 0 if seed is None else seed


def _rank(plan: Plan, rank: int | None) -> int | None:
    """The rank that the result is cut to.

    Raises:
        UsageError: the kind does not cut, or no module of the result can have so large a rank.
    """
    if plan.how not in TRUNCATED:
        if rank is not None:
            raise UsageError(f"{plan.how} does not cut the rank", where="--rank", hint="Use it with svd, ties or dare")
        return None
    modules = plan.modules().values()
    if rank is None:
        return max(pair.rank for pairs in modules for pair in pairs)
    if rank < 1:
        raise UsageError(f"a rank of {rank} is not possible", where="--rank", hint="Use 4 to 128")
    full = max(min(pairs[0].in_features, pairs[0].out_features) for pairs in modules)
    if plan.how in SPARSE:
        largest, why = full, "the smaller side of the largest linear"
    else:
        largest = max(
            min(sum(pair.rank for pair in pairs), pairs[0].in_features, pairs[0].out_features) for pairs in modules
        )
        why = "the rank of the exact sum"
    if rank > largest:
        raise UsageError(f"rank {rank} is above {largest}, {why}", where="--rank", hint=f"Use at most {largest}")
    return rank


def _common_base(parts: Sequence[Part]) -> tuple[str, str, list[str]]:
    """Name and fingerprint of the base, and what is unverified about it.

    Raises:
        BadInput: two cards name different bases.
    """
    known = [part.adapter for part in parts if _fingerprint(part.adapter)]
    for other in known[1:]:
        first = known[0]
        if _fingerprint(other) != _fingerprint(first):
            raise BadInput(
                f"was trained on {_base(other)} ({_fingerprint(other)[:19]}), and {first.reference} on {_base(first)} "
                f"({_fingerprint(first)[:19]})",
                where=other.reference,
                hint="Only adapters of one base can be combined",
            )
    notes = []
    for part in parts:
        if part.adapter in known:
            continue
        claim = part.adapter.config.get("base_model_name_or_path") or "no base"
        notes.append(
            f"No card tells the base of {part.adapter.reference} (its config says {claim}): its sizes agree, and that "
            "it belongs to the same base is unverified."
        )
    if known:
        return _base(known[0]), _fingerprint(known[0]), notes
    claims = {str(part.adapter.config.get("base_model_name_or_path") or "") for part in parts}
    return claims.pop() if len(claims) == 1 else "", "", notes


def _fingerprint(adapter: AdapterFolder) -> str:
    return adapter.card.base_fingerprint if adapter.card is not None else ""


def _base(adapter: AdapterFolder) -> str:
    return adapter.card.base if adapter.card is not None else ""


def _check_sizes(plan: Plan) -> None:
    """Refuses parts of which one module has different sizes.

    Raises:
        BadInput: naming the module.
    """
    seen: dict[str, tuple[LoraPair, str]] = {}
    for part, paths in zip(plan.parts, plan.paths, strict=True):
        for path, pair in part.pairs.items():
            first, owner = seen.setdefault(paths[path], (pair, part.adapter.reference))
            if (pair.in_features, pair.out_features) != (first.in_features, first.out_features):
                raise BadInput(
                    f"its {path} maps {pair.in_features} to {pair.out_features} features, that of {owner} "
                    f"{first.in_features} to {first.out_features}: they belong to different bases",
                    where=part.adapter.reference,
                    hint="Only adapters of one base can be combined",
                )


def _check_name_free(plan: Plan) -> None:
    """Refuses a name whose versions belong to another base.

    Raises:
        BadInput: they do, by their cards or by the sizes of their tensors.
    """
    check_same_base(plan.name, plan.base_fingerprint)
    newest = find_newest(plan.name)
    if newest is None or newest.config.get("peft_type") != "LORA":
        return
    for part in plan.parts:
        linear = linear_of_other_size(read_header(part.adapter.weights), read_header(newest.weights))
        if linear is not None:
            raise BadInput(
                f"{newest.reference} has another base: its {linear} has other sizes",
                where="--name",
                hint="Choose another name",
            )


def _check_equal_ranks(plan: Plan) -> None:
    """Refuses to add factors of different ranks, and to average those that not all parts have.

    Raises:
        BadInput: naming a module and the ranks.
    """
    for path, pairs in plan.modules().items():
        if plan.how == "factors" and len(pairs) < len(plan.parts):
            raise BadInput(
                f"factors can be averaged only where all adapters change the same linears, and {len(pairs)} of "
                f"{len(plan.parts)} change {path}",
                where="--factors",
                hint="To average the updates themselves, leave --factors out",
            )
        ranks = [pair.rank for pair in pairs]
        if len(set(ranks)) > 1:
            other = "leave --factors out" if plan.how == "factors" else "use --how exact or svd"
            raise BadInput(
                f"factors can be added only where ranks are equal, and {path} has {' and '.join(map(str, ranks))}",
                where="--factors" if plan.how == "factors" else "--how",
                hint=f"To combine the updates themselves, {other}",
            )
