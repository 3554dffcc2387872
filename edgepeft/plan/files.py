"""Plans as TOML files: written by `plan --out`, edited by hand, read by `train --plan`."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import msgspec

from edgepeft.errors import BadInput, UsageError
from edgepeft.paths import write_atomic
from edgepeft.plan.train_plan import TrainPlan

_HEADER = """\
# A training plan of edgepeft. Run it with: edgepeft train --plan THIS_FILE --name NAME
# [spec] is what is executed, and may be edited. The rest says where its values came from and what was predicted.
"""


class _Strict(TrainPlan, frozen=True, forbid_unknown_fields=True):
    """The plan as a file may spell it: a misspelt key is an error, not a silent default."""


def write_plan_toml(plan: TrainPlan, path: Path) -> None:
    """Writes a plan so that people can read and edit it.

    Raises:
        DiskProblem: the disk is full, or may not be written.
    """
    import tomli_w

    write_atomic(path, _HEADER + "\n" + tomli_w.dumps(_without_none(msgspec.to_builtins(plan))))


def read_plan_toml(path: Path) -> TrainPlan:
    """Reads a plan.

    Raises:
        BadInput: it cannot be read, is not TOML, or has an unknown, missing or wrong key; the message names it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot be read: {getattr(error, 'strerror', None) or error}", where=str(path)) from error
    try:
        plan = msgspec.convert(tomllib.loads(text), _Strict)
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"is not valid TOML: {error}", where=str(path)) from error
    except UsageError as error:
        raise BadInput(error.what, where=f"{path}, {error.where}", hint=error.hint) from error
    except msgspec.ValidationError as error:
        raise BadInput(
            f"is not a plan: {error}", where=str(path), hint="Make a new one with: edgepeft plan … --out P.toml"
        ) from error
    return TrainPlan(**{name: getattr(plan, name) for name in TrainPlan.__struct_fields__})


def _without_none(value: Any) -> Any:
    """TOML has no null: absent values are left out, and their defaults restore them."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_none(item) for item in value]
    return value
