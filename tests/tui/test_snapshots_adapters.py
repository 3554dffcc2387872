"""Pictures of the Adapters and Settings screens and of the help, driven by recorded readings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from textual.pilot import Pilot

from edgepeft_tui import app as ui
from edgepeft_tui.actions import APP
from edgepeft_tui.adapters import AdapterRow, Facts
from edgepeft_tui.app import EdgepeftApp
from edgepeft_tui.glyphs import choose_glyphs
from edgepeft_tui.preferences import Place
from edgepeft_tui.readings import Bar, Machine, Shelves
from edgepeft_tui.screens import adapter_list
from edgepeft_tui.screens import settings as settings_screen
from tui_driving import settle

SIZES = [(120, 40), (80, 24), (60, 20)]
BASE = "smollm2-135m"
ROWS = (
    AdapterRow("ads-long", 1, 1, BASE, "lora r16", 19_200_000, 0.871, None, "2026-03-01T10:12:00"),
    AdapterRow("db-triage", 3, 3, BASE, "lora r16", 19_200_000, 0.297, 0.94, "2026-03-04T14:02:00"),
    AdapterRow("half", 2, 2, trouble="v2: has no adapter_model.safetensors. Copy the whole folder again."),
    AdapterRow("imported", 1, 1, "Llama-3.1-8B", "dora r8", 84_000_000, None, None, ""),
    AdapterRow("net-triage", 1, 1, BASE, "lora r16", 19_200_000, 0.312, 0.91, "2026-03-02T09:30:00"),
    AdapterRow("polite", 2, 2, BASE, "prefix", 1_200_000, 1.204, None, "2026-02-11T18:45:00"),
)
VERSIONS = tuple(
    AdapterRow("db-triage", version, 3, BASE, "lora r16", 19_200_000, loss, None, f"2026-03-0{version + 1}T14:02:00")
    for version, loss in ((3, 0.297), (2, 0.334), (1, 0.402))
)
FACTS = Facts(
    "db-triage@v3",
    (
        ("adapter", "db-triage@v3"),
        ("made", "2026-03-04T14:02:00+00:00, by run db-triage-3, 900 steps"),
        ("base", f"{BASE}, held in nf4, computed in bf16"),
        ("method", "lora, rank 16, alpha 32, targets all-linear, dropout 0"),
        ("data", "/data/tickets.jsonl (chat, trained on assistant)"),
        ("recipe", "3 epochs, 16 samples a step, up to 2048 tokens, learning rate 0.0002 cosine, seed 0"),
        ("continues", "db-triage@v3 ← db-triage@v2"),
        ("eval loss", "0.297"),
        ("size", "18.3 MiB"),
    ),
    (("self_attn.q_proj.lora_A.weight", "layers 0–29  16×576  276,480 entries"),),
    ("2026-03-04 14:02  anna published v3 (db-triage-3)",),
)


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ui, "read_machine", lambda: Machine("RTX 4090 · driver 580", (Bar("RAM", 1 << 30, 2 << 30),)))
    monkeypatch.setattr(ui, "read_shelves", lambda: Shelves((), (), ()))
    monkeypatch.setattr(adapter_list, "read_library", lambda: iter([(ROWS, True)]))
    monkeypatch.setattr(adapter_list, "read_versions", lambda name: VERSIONS)
    monkeypatch.setattr(adapter_list, "read_facts", lambda reference: FACTS)
    places = tuple(
        Place(name, f"/home/anna/.local/share/edgepeft/{name}", size)
        for name, size in (("models", "5.70 GiB"), ("adapters", "96.1 MiB"), ("runs", "1.20 GiB"), ("cache", "412 MiB"))
    )
    monkeypatch.setattr(settings_screen, "read_places", lambda: iter(places))
    here = (("edgepeft", "0.1.0, in /home/anna/edgepeft"), ("Python", "3.12.4"), ("torch", "2.13.0"))
    monkeypatch.setattr(settings_screen, "read_here", lambda: here)
    # Other screens' actions come and go, and the picture stays.
    monkeypatch.setattr(settings_screen, "all_actions", lambda: list(APP))
    for name in ("THEME", "GLYPHS", "SPACING"):
        monkeypatch.delenv(f"EDGEPEFT_{name}", raising=False)
    monkeypatch.setattr(ui, "choose_glyphs", lambda ascii_only: choose_glyphs(False))
    yield
    choose_glyphs(False)


def picture(snap_compare: Any, size: tuple[int, int], *keys: str) -> bool:
    app = EdgepeftApp()

    async def before(pilot: Pilot[str]) -> None:
        await settle(app, pilot)
        await pilot.press(*keys)
        await settle(app, pilot)

    return bool(snap_compare(app, terminal_size=size, run_before=before))


@pytest.mark.parametrize("size", SIZES)
def test_adapters(snap_compare: Any, size: tuple[int, int]) -> None:
    assert picture(snap_compare, size, "f6", "down", "space", "up")


@pytest.mark.parametrize("size", SIZES)
def test_settings(snap_compare: Any, size: tuple[int, int]) -> None:
    assert picture(snap_compare, size, "f7", "down")


@pytest.mark.parametrize("size", SIZES[1:])
def test_help(snap_compare: Any, size: tuple[int, int]) -> None:
    assert picture(snap_compare, size, "f6", "f1")


def test_a_card_in_a_dialog(snap_compare: Any) -> None:
    assert picture(snap_compare, (80, 24), "f6", "down", "enter")
