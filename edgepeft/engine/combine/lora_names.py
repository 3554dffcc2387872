"""How programs name the two factors of a LoRA in a safetensors file.

| whose | A [rank, in] | B [out, rank] |
|---|---|---|
| PEFT | `P.lora_A.weight`, `P.lora_A.default.weight` | `P.lora_B.weight`, `P.lora_B.default.weight` |
| kohya and its kin | `P.lora_down.weight` | `P.lora_up.weight`, and a number `P.alpha` |
| mlx-lm | `P.lora_a`, transposed | `P.lora_b`, transposed |

The path P may have `base_model.model.` before it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from edgepeft.errors import BadInput

_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<path>.+)\."
    r"(?:lora_(?P<peft>[AB])(?:(?:\.[^.]+)?\.weight)?|lora_(?P<kohya>down|up)\.weight|lora_(?P<mlx>[ab])|(?P<alpha>alpha))"
)
_SIDES = {"A": "A", "B": "B", "down": "A", "up": "B", "a": "A", "b": "B"}
_OTHER_KINDS = (
    (re.compile(r"lora_magnitude_vector|dora_scale"), "is a DoRA", "Import it as the folder that PEFT saved it into"),
    (re.compile(r"lora_embedding_[AB]"), "changes embeddings, and only linears of the layers can be changed here", ""),
    (re.compile(r"\.(hada_w[12]|lokr_w[12])|lora_mid"), "is a LoHa, LoKr or LoCon, and only plain LoRA is read", ""),
    (re.compile(r"^lora_(unet|te\d?)_"), "is a LoRA of an image model", "Give one of a language model"),
)
_OF_MODELS = re.compile(r"(^|\.)(embed_tokens|layers\.\d+\.\S+_proj|layers\.\d+\.\S+norm)\.weight$")


class NamedPair(NamedTuple):
    """The keys of one module's tensors."""

    a_key: str
    b_key: str
    transposed: bool
    """Whether A is [in, rank] and B [rank, out]."""
    alpha_key: str | None
    """Of the number alpha; None where the file has none for this module."""


def pair_names(keys: Iterable[str], where: str) -> dict[str, NamedPair]:
    """Module path, as the file has it → keys of A and B.

    Raises:
        BadInput: there is no LoRA; it is of another kind; half of a pair is missing; a tensor belongs to no pair.
    """
    found: dict[str, dict[str, str]] = {}
    transposed: set[str] = set()
    others: list[str] = []
    for key in keys:
        for pattern, what, hint in _OTHER_KINDS:
            if pattern.search(key):
                raise BadInput(f"{what} (tensor {key})", where=where, hint=hint)
        match = _KEY.fullmatch(key)
        if match is None:
            others.append(key)
            continue
        side = "alpha" if match["alpha"] else _SIDES[match["peft"] or match["kohya"] or match["mlx"]]
        sides = found.setdefault(match["path"], {})
        if side in sides:
            raise BadInput(f"{match['path']} has both {sides[side]} and {key}", where=where, hint=_ANEW)
        sides[side] = key
        if match["mlx"]:
            transposed.add(sides[side])
    if not any("A" in sides or "B" in sides for sides in found.values()):
        if any(_OF_MODELS.search(key) for key in others):
            raise BadInput("is a whole model, not a LoRA", where=where, hint=f"Use: edgepeft models add {where}")
        raise BadInput("holds no LoRA: no pair of lora_A and lora_B, lora_down and lora_up", where=where)
    if others:
        raise BadInput(
            f"tensor {others[0]} belongs to no pair of A and B", where=where, hint="Save the LoRA without it"
        )
    return {path: _pair(path, sides, transposed, where) for path, sides in found.items()}


def _pair(path: str, sides: dict[str, str], transposed: set[str], where: str) -> NamedPair:
    for side in "AB":
        if side not in sides:
            other = next(iter(sides.values()))
            raise BadInput(f"{path} has {other} without its {side}: half of a pair is missing", where=where, hint=_ANEW)
    turned = {sides[side] in transposed for side in "AB"}
    if len(turned) > 1:
        raise BadInput(f"{sides['A']} and {sides['B']} are no pair", where=where, hint=_ANEW)
    return NamedPair(sides["A"], sides["B"], turned.pop(), sides.get("alpha"))


_ANEW = "It was damaged, or another program wrote it: save it anew where it was made"
