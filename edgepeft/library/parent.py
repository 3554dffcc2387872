"""The adapter that training goes on from: what it is, whether it can be continued, and where it came from itself."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from edgepeft.errors import BadInput, EdgepeftError, UsageError
from edgepeft.library.card import Card
from edgepeft.library.peft_config import method_id_of
from edgepeft.library.store import CONFIG_FILE, AdapterFolder, check_base, resolve_adapter, weights_digest
from edgepeft.library.tensors import lora_dimensions, table_ranks
from edgepeft.methods import LoraConfig, MethodConfig, id_of, method_of
from edgepeft.methods.targets import TABLE_NAMES, matching, table_of
from edgepeft.models.headers import TensorHeader, read_header
from edgepeft.models.shape import ModelShape
from edgepeft.spec import ParentRef

if TYPE_CHECKING:
    from edgepeft.models.store import ModelEntry

TAKEN_OVER = ("rank", "alpha", "targets", "dropout")
"""Options whose values come from the parent."""
_RANK = re.compile(r"(?:^|\.)layers\.\d+\.(?P<linear>.+)\.lora_A(?:\.[^.]+)?\.weight$")
_LONGEST_LINE = 100
"""Ancestors that are followed at the most; a library that was tampered with may hold a circle."""


class Parent(msgspec.Struct, frozen=True):
    """An adapter that can be continued."""

    ref: ParentRef
    method: MethodConfig
    """What the adapter is, and its continuation too."""
    notes: tuple[str, ...] = ()
    """What a person should know, as sentences."""

    def take_over(self, typed: Mapping[str, Any], shape: ModelShape) -> dict[str, Any]:
        """The typed options with the parent's rank, alpha, targets and dropout among them, where it has them.

        Raises:
            UsageError: an option says otherwise.
        """
        method = id_of(self.method)
        if typed.get("method", method) != method or typed.get("set"):
            raise UsageError(
                f"{self.ref.adapter} is of the method {method}, and its continuation keeps all of its settings",
                where="--method" if "method" in typed else "--set",
                hint="Leave it out, or train a new adapter without --from",
            )
        own = {name: getattr(self.method, name) for name in TAKEN_OVER if hasattr(self.method, name)}
        for name in TAKEN_OVER:
            if name in typed and name not in own:
                raise UsageError(f"the method {method} has no {name}", where=f"--{name}", hint=f"Leave --{name} out")
            if name in typed and not self._agrees(name, typed[name], shape):
                shown = ", ".join(own[name]) if name == "targets" else f"{own[name]:g}"
                raise UsageError(
                    f"{self.ref.adapter} has {name} {shown}, and its continuation has to keep it",
                    where=f"--{name}",
                    hint=f"Leave --{name} out, or train a new adapter without --from",
                )
        return {**typed, **own}

    def _agrees(self, name: str, value: Any, shape: ModelShape) -> bool:
        if name != "targets":
            return math.isclose(float(value), float(getattr(self.method, name)), rel_tol=1e-9)
        names = tuple(part.strip() for part in str(value).split(",") if part.strip())
        return bool(names) and _names(names, shape) == _names(getattr(self.method, name), shape)


def find_parent(reference: str, entry: ModelEntry) -> Parent:
    """The adapter that `NAME`, `NAME@v2` or a folder means, to be continued over a base.

    Raises:
        BadInput: there is none, it belongs to another base, or it is of a kind that cannot be trained on.
    """
    adapter = resolve_adapter(reference)
    warnings = check_base(adapter, entry)
    method = _method(adapter, entry.shape)
    ref = ParentRef(adapter.reference, weights_digest(adapter))
    return Parent(ref, method, tuple(f"{warning}." for warning in warnings))


def verified_folder(ref: ParentRef) -> AdapterFolder:
    """The parent's folder, once more.

    Raises:
        BadInput: it is gone, or its weights are other ones than when the plan was made.
    """
    adapter = resolve_adapter(ref.adapter)
    if weights_digest(adapter) != ref.sha256:
        raise BadInput(
            "its weights are not those that the plan was made for",
            where=ref.adapter,
            hint="Plan again with --from",
        )
    return adapter


def check_continues(ref: ParentRef, method: MethodConfig, entry: ModelEntry) -> None:
    """Refuses a plan whose method is not that of its parent.

    Raises:
        BadInput: it is not, or the parent cannot be used any more.
    """
    verified_folder(ref)
    parent = find_parent(ref.adapter, entry).method
    if not isinstance(parent, LoraConfig) or not isinstance(method, LoraConfig):
        if method != parent:
            raise BadInput(
                f"its continuation must keep the method {id_of(parent)} and all of its settings",
                where=ref.adapter,
                hint="Put them back into the plan's [spec.recipe.method], or plan without --from",
            )
        return
    same = msgspec.structs.replace(parent, targets=method.targets, ranks=method.ranks)
    names = _names(parent.targets, entry.shape)
    alike = _names(method.targets, entry.shape) == names and all(
        method.rank_of(name) == parent.rank_of(name) for name in names
    )
    if method != same or not alike:
        ranks = "".join(f", rank {rank} for {name}" for name, rank in parent.ranks.items())
        raise BadInput(
            f"its continuation must keep rank {parent.rank}{ranks}, alpha {parent.alpha:g}, dropout "
            f"{parent.dropout:g} and the targets {', '.join(parent.targets)}",
            where=ref.adapter,
            hint="Put them back into the plan's [spec.recipe.method], or plan without --from",
        )


def lineage(card: Card) -> list[str]:
    """The adapters that one goes back to, its parent first, as far as the library knows them.

    It ends at a combination, whose formula is the last entry.
    """
    line: list[str] = []
    found: Card | None = card
    while found is not None and len(line) < _LONGEST_LINE:
        if found.combined is not None:
            line.append(found.combined.formula)
        if not found.parent or found.parent in line:
            break
        line.append(found.parent)
        try:
            found = resolve_adapter(found.parent).card
        except EdgepeftError:
            break
    return line


def _method(adapter: AdapterFolder, shape: ModelShape) -> MethodConfig:
    """What an adapter is.

    Raises:
        BadInput: it is of a kind that cannot be continued.
    """
    where = str(adapter.path / CONFIG_FILE)
    method = method_id_of(adapter.config, where)
    if method == "lora":
        return _lora(adapter, shape)
    if adapter.card is None or adapter.card.recipe is None:
        raise BadInput(
            f"it is a {method} adapter that edgepeft did not make: of other programs only a LoRA can be continued",
            where=where,
            hint="Use it as it is in chat, or train a new adapter without --from",
        )
    config = adapter.card.recipe.method
    continued: MethodConfig = method_of(config).continued(config)
    return continued


def _lora(adapter: AdapterFolder, shape: ModelShape) -> LoraConfig:
    """The config of a LoRA of one alpha on whole kinds of linears, each kind of one rank, and on embedding or head.

    Raises:
        BadInput: it is another kind of LoRA.
    """
    settings, where = adapter.config, str(adapter.path / CONFIG_FILE)
    hint = "Use it as it is in chat, or train a new adapter without --from"
    tensors = read_header(adapter.weights)
    tables = table_ranks(tensors)
    ranks = _ranks(tensors) | {name: {rank} for name, rank in tables.items()}
    several = sorted({rank for found in ranks.values() for rank in found})
    told_of = bool(settings.get("rank_pattern")) and isinstance(settings.get("r"), int)
    if not ranks or any(len(found) > 1 for found in ranks.values()) or not (told_of or several == [settings.get("r")]):
        told = ", ".join(map(str, several)) or "none"
        raise BadInput(
            f"its layers have the ranks {told} and its config says {settings.get('r')}: only an adapter of one rank "
            "for each kind of linear can be continued",
            where=where,
            hint=hint,
        )
    if settings.get("alpha_pattern"):
        raise BadInput(
            "its layers have different scales (alpha_pattern): only an adapter of one scale can be continued",
            where=where,
            hint=hint,
        )
    alpha, dropout = settings.get("lora_alpha"), settings.get("lora_dropout") or 0.0
    if not isinstance(alpha, int | float) or not isinstance(dropout, int | float):
        raise BadInput("lora_alpha and lora_dropout must be numbers", where=where, hint="Save the adapter anew")
    found = lora_dimensions(tensors)
    for name, layers in found.items():
        if sorted(layers) != list(range(shape.layers)):
            raise BadInput(
                f"it changes {name} in {len(layers)} of {shape.layers} layers: only an adapter on all layers can be "
                "continued",
                where=where,
                hint=hint,
            )
    try:
        own = {name: min(found) for name, found in ranks.items() if min(found) != settings["r"]}
        return LoraConfig(
            rank=int(settings["r"]),
            alpha=float(alpha),
            targets=(*(_shortest(tuple(found), shape) if found else ()), *sorted(tables)),
            dropout=float(dropout),
            rank_stabilised=bool(settings.get("use_rslora")),
            dora=bool(settings.get("use_dora")),
            ranks={
                ending: rank
                for name, rank in own.items()
                for ending in ((name,) if name in tables else _shortest((name,), shape))
            },
        )
    except UsageError as error:
        raise BadInput(error.what, where=where, hint=error.hint) from error


def _ranks(tensors: Iterable[TensorHeader]) -> dict[str, set[int]]:
    """The ranks of each kind of linear."""
    found: dict[str, set[int]] = {}
    for tensor in tensors:
        match = _RANK.search(tensor.name)
        if match is not None and tensor.shape:
            found.setdefault(match["linear"], set()).add(tensor.shape[0])
    return found


def _shortest(names: tuple[str, ...], shape: ModelShape) -> tuple[str, ...]:
    """The same linears as people name them: all-linear, the last parts of their names, or the names."""
    endings = tuple(sorted({name.rsplit(".", 1)[-1] for name in names}))
    for targets in (("all-linear",), endings):
        if _names(targets, shape) == set(names):
            return targets
    return tuple(sorted(names))


def _names(targets: tuple[str, ...], shape: ModelShape) -> set[str]:
    """The linears of a layer, and embedding and head, that targets stand for."""
    tables = {TABLE_NAMES[table][0] for target in targets if (table := table_of(target)) is not None}
    return tables | {linear.name for linear in matching([name for name in targets if table_of(name) is None], shape)}
