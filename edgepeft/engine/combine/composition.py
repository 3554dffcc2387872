"""Adapters combined into one: module by module, read from their files and written into a new one.

| kind | what the result is |
|---|---|
| exact | Σ w·ΔW, ranks side by side |
| svd | the same, cut to the nearest update of a smaller rank |
| linear | A and B weighted and added, as PEFT's `linear`; not the sum of the updates |
| factors | A and B averaged, as federated averaging of parameters does; not the average of the updates |
| ties | TIES on the weighted updates, cut to a rank |
| dare | Σ w·drop(ΔW), cut to a rank |
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from edgepeft.engine.combine.low_rank import (
    Factors,
    Truncated,
    add_factors,
    concatenate,
    energy_between,
    energy_of,
    truncate,
)
from edgepeft.engine.combine.sparse import drop, elect_and_average, trim, truncate_dense
from edgepeft.engine.saving import save_tensors
from edgepeft.engine.training.device import package_versions
from edgepeft.errors import BadInput
from edgepeft.library.combining import SPARSE, Combined, CombineRequest, PartTensors
from edgepeft.library.lora_pairs import LoraPair
from edgepeft.library.peft_config import PEFT_PREFIX
from edgepeft.paths import atomic_path
from edgepeft.processes import Progress

_NOTHING = 1e-14
"""Energy of a sum, as a share of its terms', below which it is rounding: float32 keeps 1e-7 of an entry."""

_Term = tuple[int, Factors, float]
"""Number of the part, its update, and weight times scale."""


def combine(request: CombineRequest, report: Progress = lambda what, fraction: None) -> Combined:
    """Writes the combined weights, float32 under PEFT's names, and tells how far they are from the weighted sum.

    Raises:
        BadInput: a tensor is damaged or not finite; the updates cancel each other; the result exceeds float32.
        DiskProblem: no space, or no permission.
    """
    modules = list(dict.fromkeys(path for part in request.parts for path in part.pairs))
    tensors: dict[str, Tensor] = {}
    losses = _Losses()
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(_open(part)) for part in request.parts]
        for done, path in enumerate(modules):
            report("combining", done / len(modules))
            terms = _read_terms(request, files, path)
            exact = concatenate([(factors, factor) for _, factors, factor in terms])
            result, cut = _combine_module(request, path, terms, exact)
            A, B = result.A.float().contiguous(), result.B.float().contiguous()
            if not bool(torch.isfinite(A).all() and torch.isfinite(B).all()):
                raise BadInput(f"{path} of the result exceeds what float32 holds", hint="Use smaller weights")
            tensors[f"{PEFT_PREFIX}{path}.lora_A.weight"], tensors[f"{PEFT_PREFIX}{path}.lora_B.weight"] = A, B
            # What the file holds is what is compared.
            losses.add(path, terms, exact, Factors(A.double(), B.double()), cut)
    losses.check()
    report("writing", None)
    with atomic_path(Path(request.weights_file)) as temporary:
        save_tensors(temporary, tensors, hint="Free some space, or set EDGEPEFT_HOME to another disk")
    return Combined(
        ranks={path: int(tensors[f"{PEFT_PREFIX}{path}.lora_A.weight"].shape[0]) for path in modules},
        distance=losses.distance,
        worst_distance=losses.worst_distance[0],
        worst_module=losses.worst_distance[1],
        energy_kept=losses.kept / losses.cut_energy if losses.cut_energy else None,
        least_energy_kept=losses.least_kept[0] if losses.cut_energy else None,
        least_energy_module=losses.least_kept[1],
        versions=package_versions(),
    )


def _combine_module(
    request: CombineRequest, path: str, terms: Sequence[_Term], exact: Factors
) -> tuple[Factors, Truncated | None]:
    """The result for one module, and what was cut where something was."""
    if request.how in ("linear", "factors"):
        shares = [request.parts[part].weight for part, _, _ in terms] if request.how == "factors" else None
        return add_factors([(factors, factor) for _, factors, factor in terms], shares), None
    if request.how in SPARSE:
        merged = _merge_dense(request, path, terms)
        assert request.rank is not None
        cut = truncate_dense(merged, min(request.rank, *merged.shape))
        return cut.factors, cut
    full = min(exact.A.shape[1], exact.B.shape[0])
    if request.how == "svd":
        assert request.rank is not None
        cut = truncate(exact, min(request.rank, exact.rank, full))
        return cut.factors, cut
    # No matrix has a higher rank than its sides: cutting there loses nothing.
    return (exact if exact.rank <= full else truncate(exact, full).factors), None


def _merge_dense(request: CombineRequest, path: str, terms: Sequence[_Term]) -> Tensor:
    """The merged update [out, in] in float32, by TIES or DARE."""
    assert request.density is not None
    updates = []
    for part, (A, B), factor in terms:
        update = (B.float() @ A.float()).mul_(factor)
        if request.how == "ties":
            updates.append(trim(update, request.density))
        else:
            updates.append(drop(update, request.density, request.seed, part, path))
    if request.how == "ties":
        return elect_and_average(updates)
    total = updates[0]
    for update in updates[1:]:
        total += update
    return total


class _Losses:
    """How far the results are from the weighted sums, added up over modules."""

    def __init__(self) -> None:
        self.kept = self.cut_energy = 0.0
        self.least_kept: tuple[float, str] = (1.0, "")
        self.worst_distance: tuple[float, str] = (0.0, "")
        self._between = self._exact = self._result = self._terms = 0.0

    def add(self, path: str, terms: Sequence[_Term], exact: Factors, result: Factors, cut: Truncated | None) -> None:
        """Takes one module."""
        energy = energy_of(exact)
        self._terms += sum(factor**2 * energy_of(factors) for _, factors, factor in terms)
        self._exact += energy
        if cut is not None:
            self.cut_energy += cut.energy
            self.kept += cut.kept
            if cut.energy > 0:
                self.least_kept = min(self.least_kept, (cut.kept / cut.energy, path))
        between = energy_between(result, exact)
        self._between += between
        self._result += energy_of(result)
        if energy > 0:
            self.worst_distance = max(self.worst_distance, (math.sqrt(between / energy), path))

    def check(self) -> None:
        """Refuses a result that is nothing but rounding.

        Raises:
            BadInput: it is.
        """
        if min(self._exact, self._result) <= _NOTHING * self._terms:
            raise BadInput(
                "the result would change nothing: the updates cancel each other, or are nothing but zeros",
                hint="Use other weights, or other adapters",
            )

    @property
    def distance(self) -> float:
        """‖result − sum‖ / ‖sum‖ over all modules together."""
        return math.sqrt(self._between / self._exact)


def _open(part: PartTensors) -> Any:
    try:
        return safe_open(part.weights_file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise BadInput("is damaged or cut short", where=part.weights_file, hint="Copy it anew") from error


def _read_terms(request: CombineRequest, files: Sequence[Any], path: str) -> list[_Term]:
    """What the parts that change a module add to it."""
    terms = []
    for number, (part, file) in enumerate(zip(request.parts, files, strict=True)):
        pair = part.pairs.get(path)
        if pair is not None:
            terms.append((number, _read_factors(part, file, pair), part.weight * pair.scale))
    return terms


def _read_factors(part: PartTensors, file: Any, pair: LoraPair) -> Factors:
    """A and B of one module in float64.

    Raises:
        BadInput: one is damaged, not as the header said, or not finite.
    """
    read = []
    for key, shape in (
        (pair.a_key, (pair.rank, pair.in_features)),
        (pair.b_key, (pair.out_features, pair.rank)),
    ):
        try:
            value: Tensor = file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise BadInput(f"tensor {key} is damaged", where=part.weights_file, hint="Copy it anew") from error
        if tuple(value.shape) != shape:
            raise BadInput("was changed meanwhile", where=part.weights_file, hint="Try again")
        if not bool(torch.isfinite(value).all()):
            raise BadInput(
                f"tensor {key} of {part.name} holds values that are not finite numbers",
                where=part.weights_file,
                hint="Train it anew",
            )
        read.append(value.double())
    return Factors(*read)
