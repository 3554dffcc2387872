"""Which licence a model folder says it has."""

from __future__ import annotations

import re
from pathlib import Path

_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---", re.DOTALL)
_KNOWN_TEXTS = {
    "apache license": "apache-2.0",
    "mit license": "mit",
    "gnu general public license": "gpl-3.0",
    "gemma terms of use": "gemma",
    "creative commons attribution-noncommercial": "cc-by-nc",
    "creative commons attribution": "cc-by",
}
_READ_BYTES = 65536


def read_licence(folder: Path) -> str | None:
    """The licence in the model card's front matter, else what the LICENSE file begins with; None without either."""
    front = _FRONT_MATTER.match(_beginning(folder / "README.md"))
    if front is not None:
        fields: dict[str, str] = dict(
            re.findall(r"^(license|license_name):[ \t]*['\"]?([^\n'\"#]+)", front.group(1), re.MULTILINE)
        )
        name: str | None = fields.get("license_name") or fields.get("license")
        if name and name.strip():
            return name.strip()
    for path in sorted(folder.glob("LICEN[CS]E*")):
        text = _beginning(path)
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        for phrase, name in _KNOWN_TEXTS.items():
            if phrase in " ".join(lines[:6]).lower():
                return name
        if lines:
            return lines[0][:80]
    return None


def _beginning(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_READ_BYTES).decode("utf-8", errors="replace").replace("\r\n", "\n")
    except OSError:
        return ""
