"""What a run can be planned with, read from real folders."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from edgepeft.errors import EdgepeftError
from edgepeft.models.store import add_model
from edgepeft.plan import device as devices
from edgepeft.plan.build import build
from edgepeft_tui.finds import (
    described_models,
    drawn_samples,
    files_like,
    recent_data,
    scanned_models,
    store_models,
)
from edgepeft_tui.plans import Planner, PlanView, Question
from edgepeft_tui.starting import doubt_now


def test_models_of_the_store_come_before_described_ones(tiny_model: Path) -> None:
    add_model(tiny_model, name="tiny")
    here = [model.key for model in store_models()]
    assert "tiny" in here
    described = [model.key for model in described_models()]
    assert "llama-3.1-70b" in described
    assert not set(described) & set(here)


def test_a_model_of_another_program_is_found_and_planned(
    tiny_model: Path, alpaca_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "lm" / "publisher" / "model"
    folder.parent.mkdir(parents=True)
    tiny_model.rename(folder)
    monkeypatch.setattr("edgepeft.models.discovery.lmstudio_folders", lambda: [tmp_path / "lm"])
    found = next(model for model in scanned_models() if model.key == str(folder))
    assert found.usable
    assert "lmstudio" in found.note
    answers = list(
        Planner().answer(
            Question(found.key, str(alpaca_file), {"gpu": "cpu", "budget": "2GiB"}), lambda what, share: None, bool
        )
    )
    last = answers[-1]
    assert isinstance(last, PlanView)
    assert last.settled
    assert last.bins
    assert str(folder) not in [model.key for model in scanned_models()]


def test_files_are_found_by_what_is_typed(tmp_path: Path) -> None:
    for name in ("a.jsonl", "ab.CSV", "b.txt", ".hidden.jsonl"):
        (tmp_path / name).write_text("x")
    (tmp_path / "abc").mkdir()
    assert [Path(row.key).name for row in files_like(f"{tmp_path}/")] == ["a.jsonl", "ab.CSV", "abc"]
    assert [row.key for row in files_like(f"{tmp_path}/ab")] == [f"{tmp_path}/ab.CSV", f"{tmp_path}/abc/"]
    assert files_like(f"{tmp_path}/none/such") == ()


def test_data_of_earlier_runs_comes_first(tiny_model: Path, alpaca_file: Path) -> None:
    from edgepeft.runs.layout import create_run

    add_model(tiny_model, name="tiny")
    plan = build("tiny", alpaca_file, {"gpu": "cpu", "budget": "2GiB"})
    create_run(plan, "mine")
    (broken := create_run(plan, "mine")).plan_file.write_text("[/x]")
    assert broken.id == "mine-2"
    assert [(row.key, row.note) for row in recent_data()] == [(str(alpaca_file), "used by mine-1")]
    alpaca_file.unlink()
    assert recent_data() == ()


def test_samples_are_drawn_with_their_mask(tiny_model: Path, tmp_path: Path) -> None:
    add_model(tiny_model, name="tiny")
    data = tmp_path / "d.jsonl"
    records = [{"messages": [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}]}, {"no": 1}]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    good, bad = drawn_samples("tiny", str(data), {})
    assert good.trained < good.tokens
    assert "say" in "".join(piece.text for piece in good.pieces if piece.trained)
    assert "ask" in "".join(piece.text for piece in good.pieces if not piece.trained)
    assert bad.trouble
    everything = drawn_samples("tiny", str(data), {"train-on": "all"})[0]
    assert everything.trained > good.trained


def test_memory_that_is_gone_is_told(tiny_model: Path, alpaca_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_model(tiny_model, name="tiny")
    plan = build("tiny", alpaca_file, {"gpu": "cpu", "budget": "2GiB"})
    assert doubt_now(plan) == ""
    find = devices.find_device
    monkeypatch.setattr(
        devices, "find_device", lambda wanted: msgspec.structs.replace(find(wanted), free_bytes=1 << 10, taken="A game")
    )
    assert "1.00 KiB are free" in doubt_now(plan)
    assert "A game." in doubt_now(plan)


def test_a_device_that_is_gone_is_told(tiny_model: Path, alpaca_file: Path) -> None:
    add_model(tiny_model, name="tiny")
    plan = build("tiny", alpaca_file, {"gpu": "cpu", "budget": "2GiB"})
    gone = msgspec.structs.replace(plan, spec=msgspec.structs.replace(plan.spec, device="GPU-gone"))
    with pytest.raises(EdgepeftError, match="GPU-gone"):
        doubt_now(gone)
