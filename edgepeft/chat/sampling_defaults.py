"""How a model's own authors advise to sample from it: the sampling values of generation_config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from edgepeft.chat.protocol import Sampling, check_sampling
from edgepeft.errors import UsageError

_ADVISED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def sampling_defaults(folder: Path) -> Sampling:
    """The values that generation_config.json in `folder` advises, ours where it says nothing or cannot be read.

    A file that sets `do_sample` to false advises the likeliest token (temperature 0). Values that no distribution can
    be made from are left out.
    """
    try:
        config = msgspec.json.decode((folder / "generation_config.json").read_bytes())
    except (OSError, msgspec.DecodeError):
        config = None
    if not isinstance(config, dict):
        return Sampling()
    found = Sampling()
    if config.get("do_sample") is False:
        found = Sampling(temperature=0.0)
    for name in _ADVISED:
        value: Any = config.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if name == "temperature" and config.get("do_sample") is False:
            continue
        changed = msgspec.structs.replace(found, **{name: int(value) if name == "top_k" else float(value)})
        try:
            check_sampling(changed)
        except UsageError:
            continue
        found = changed
    return found
