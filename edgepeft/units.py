"""Bytes, counts and durations as people write and read them. GB = 10⁹ bytes, GiB = 2³⁰ bytes; screens show GiB."""

from __future__ import annotations

import math
import re

from edgepeft.errors import UsageError

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_BYTE_UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": 1 << 40,
}
_LARGEST = 1e15
"""Of a number before its unit: a petabyte in bytes."""
_QUANTITY = re.compile(r"^([+-]?\d+(?:\.\d+)?)\s*([a-zA-Z]*)$")
_SECOND_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


def parse_bytes(text: str, *, where: str = "size") -> int:
    """`20GiB`, `20 GB` or `512 MiB` as bytes.

    Raises:
        UsageError: no unit, an unknown unit, or a value that is not above zero or beyond all measure.
    """
    match = _QUANTITY.match(text.strip())
    if match is None:
        raise UsageError(f"cannot read {text!r} as a size", where=where, hint="Write for example 20GiB or 20GB")
    number, unit = match.groups()
    if not 0 < float(number) < _LARGEST:
        what = "not above zero" if float(number) <= 0 else "more than any device has"
        raise UsageError(f"{text!r} is {what}", where=where, hint="Give a size such as 20GiB")
    if not unit:
        raise UsageError(
            f"{text!r} has no unit",
            where=where,
            hint=f"Write {number}GiB (2³⁰ bytes) or {number}GB (10⁹ bytes)",
        )
    factor = _BYTE_UNITS.get(unit.lower())
    if factor is None:
        raise UsageError(
            f"unknown unit {unit!r} in {text!r}", where=where, hint="Known units: B, kB, MB, GB, TB, KiB, MiB, GiB, TiB"
        )
    return max(1, int(float(number) * factor))


def parse_seconds(text: str, *, where: str = "duration") -> float:
    """`90s`, `30min` or `1.5h` as seconds.

    Raises:
        UsageError: no unit, an unknown unit, or a value that is not above zero.
    """
    match = _QUANTITY.match(text.strip())
    factor = _SECOND_UNITS.get(match.group(2).lower()) if match else None
    if match is None or factor is None or float(match.group(1)) <= 0:
        raise UsageError(f"cannot read {text!r} as a duration", where=where, hint="Write for example 90s, 30min or 2h")
    return float(match.group(1)) * factor


def format_gib(size_bytes: float, *, digits: int = 2) -> str:
    """`11.10 GiB`; the number alone keeps its width when sizes are near each other."""
    return f"{size_bytes / GIB:.{digits}f} GiB"


def format_bytes(size_bytes: float) -> str:
    """The size in the binary unit that keeps three significant digits: `19.2 MiB`, `1.01 GiB`."""
    size = abs(float(size_bytes))
    sign = "-" if size_bytes < 0 else ""
    for unit, factor in (("TiB", 1 << 40), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if size >= factor:
            value = size / factor
            digits = 0 if value >= 100 else 1 if value >= 10 else 2
            return f"{sign}{value:.{digits}f} {unit}"
    return f"{sign}{size:.0f} B"


def format_count(count: float) -> str:
    """`8.03 B`, `134.5 M`, `460 k` or `812`."""
    for suffix, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= factor:
            value = count / factor
            return (
                f"{value:.2f} {suffix}"
                if value < 10
                else f"{value:.1f} {suffix}"
                if value < 1000
                else f"{value:.0f} {suffix}"
            )
    return f"{count:.0f}"


def format_watt_hours(watt_hours: float) -> str:
    """`0.0412 Wh`, `12.3 Wh` or `1.25 kWh`."""
    return f"{watt_hours / 1000:.3g} kWh" if watt_hours >= 999.5 else f"{watt_hours:.3g} Wh"


def format_grams(grams: float) -> str:
    """An estimate: `0.018 g`, `5.5 g` or `1.2 kg`."""
    if grams >= 999.5:
        return f"{grams / 1000:.2g} kg" if grams < 99_500 else f"{grams / 1000:,.0f} kg"
    return f"{grams:.2g} g" if grams < 99.5 else f"{grams:.0f} g"


def format_seconds(seconds: float) -> str:
    """`41 s`, `6 min 05 s`, `2 h 10 min` or `3 d 4 h`; `n/a` when it is not known."""
    if not math.isfinite(seconds):
        return "n/a"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def format_age(seconds: float) -> str:
    """How long ago, in one unit: `41 s`, `19 min`, `2 h` or `3 d`; a clock that was set back gives `0 s`."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return f"{int(max(0.0, seconds))} s"


def format_share(fraction: float, *, digits: int = 1) -> str:
    """A fraction as `85.2 %`."""
    return f"{100 * fraction:.{digits}f} %"
