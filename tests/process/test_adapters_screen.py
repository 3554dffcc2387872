"""The Adapters screen with real workers on a tiny model: what it makes is what the command line makes."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file
from textual.pilot import Pilot
from textual.widgets import Input, Static

from adapter_files import make_card, write_peft_folder
from edgepeft.library.store import publish, resolve_adapter
from edgepeft.models.store import add_model
from edgepeft_tui import app as ui
from edgepeft_tui.app import EdgepeftApp
from edgepeft_tui.readings import Machine
from edgepeft_tui.screens.form import Form
from tui_driving import drive, seen


@pytest.fixture(autouse=True)
def library(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """a@v1 and b@v1 over a model in the store."""
    monkeypatch.setattr(ui, "read_machine", lambda: Machine("a machine", ()))
    entry = add_model(tiny_model, "tiny")
    for seed, name in enumerate("ab"):
        folder = write_peft_folder(tmp_path / name, entry.shape, seed=seed)
        weights = folder / "adapter_model.safetensors"
        save_file({key: tensor * 0.05 for key, tensor in load_file(weights).items()}, weights)
        publish(folder, name, make_card(base="tiny", base_fingerprint=entry.fingerprint))


async def worked(app: EdgepeftApp, pilot: Pilot[str], word: str) -> str:
    """What the work said, once it says `word`."""
    pane = app.screen.query_one("#work-pane", Static)
    for _ in range(1200):
        await pilot.pause(0.1)
        said = str(pane.render())
        if word in said or "✗" in said:
            return said
    raise AssertionError(said)


def test_composing_publishes_and_tells_its_figures() -> None:
    async def check(app: EdgepeftApp, pilot: Pilot[str]) -> None:
        await pilot.press("space", "space", "o")
        await pilot.pause()
        assert isinstance(app.screen, Form)
        app.screen.query_one("#name", Input).value = "mix"
        app.screen.query_one("#how").focus()
        await pilot.press("right")
        app.screen.query_one("#rank", Input).value = "2"
        await pilot.press("enter")
        await pilot.pause()
        said = await worked(app, pilot, "mix@v1 =")
        for expected in ("0.5 × a@v1 + 0.5 × b@v1", "cut by SVD: rank 2", "energy kept by the cut", "away from"):
            assert expected in said
        await pilot.pause(0.5)
        assert "mix" in seen(app)

    drive(check, "f6")
    assert resolve_adapter("mix").config["r"] == 2


def test_merging_measures_and_exporting_writes(tmp_path: Path) -> None:
    async def check(app: EdgepeftApp, pilot: Pilot[str]) -> None:
        await pilot.press("m")
        await pilot.pause()
        app.screen.query_one("#out", Input).value = str(tmp_path / "merged")
        await pilot.press("enter")
        await pilot.pause()
        said = await worked(app, pilot, "likeliest token")
        for expected in ("merged into the dequantized weights", "KL ", "tensors changed"):
            assert expected in said
        await pilot.press("x")
        await pilot.pause()
        app.screen.query_one("#out", Input).value = str(tmp_path / "exported")
        await pilot.press("enter")
        await pilot.pause()
        assert "rank 4, alpha 8" in await worked(app, pilot, "alpha")

    drive(check, "f6")
    assert (tmp_path / "merged" / "config.json").is_file()
    assert (tmp_path / "exported" / "adapter_config.json").is_file()
