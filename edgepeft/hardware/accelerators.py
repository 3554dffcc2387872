"""Devices other than NVIDIA's, by what the system tells without a vendor's library."""

from __future__ import annotations

import platform
from pathlib import Path

from edgepeft.hardware.snapshot import Accelerator

_VENDORS = {"0x1002": "AMD", "0x8086": "Intel"}
_UNTRIED = "not tried with edgepeft: training runs on the CPU here"


def read_accelerators(drm: Path = Path("/sys/class/drm")) -> list[Accelerator]:
    """AMD and Intel display devices of a Linux kernel, or Apple's GPU.

    Args:
        drm: the kernel's list of display devices, one folder `card0`, `card1`, … each.
    """
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return [Accelerator(vendor="Apple", name="Apple GPU", note=f"shares the RAM; {_UNTRIED}")]
    found = []
    for card in sorted(drm.glob("card[0-9]*")) if drm.is_dir() else ():
        # Connectors of a card are called card0-DP-1.
        if "-" in card.name:
            continue
        vendor = _VENDORS.get(_line(card / "device/vendor") or "")
        if vendor is not None:
            found.append(
                Accelerator(
                    vendor=vendor,
                    name=_line(card / "device/product_name")
                    or f"{vendor} {_line(card / 'device/device') or card.name}",
                    memory_bytes=_bytes(card / "device/mem_info_vram_total"),
                    note=_UNTRIED,
                )
            )
    return found


def _line(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip() or None
    except OSError:
        return None


def _bytes(path: Path) -> int | None:
    text = _line(path)
    return int(text) if text is not None and text.isdigit() else None
