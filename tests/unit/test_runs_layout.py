"""Run folders: made whole or not at all, and found again."""

from __future__ import annotations

import errno
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from edgepeft.errors import BadInput, DeviceUnusable, DiskProblem, ExitCode, UsageError
from edgepeft.library.card import Card
from edgepeft.library.store import write_card
from edgepeft.paths import home
from edgepeft.runs import launch as launching
from edgepeft.runs.control import clear_request, read_request, request, take_request
from edgepeft.runs.layout import RunFolder, create_run, list_runs, open_run
from toy_run import toy_plan


def test_numbers_go_up_and_names_do_not_mix() -> None:
    assert [create_run(toy_plan(), name).id for name in ("a", "a", "a-1", "a", "b")] == [
        "a-1",
        "a-2",
        "a-1-1",
        "a-3",
        "b-1",
    ]
    shutil.rmtree(home().runs / "a-2")
    assert create_run(toy_plan(), "a").id == "a-4"


def test_the_plan_comes_back_and_knows_its_name() -> None:
    plan = create_run(toy_plan(), "named").read_plan()
    assert plan.adapter_name == "named"
    assert plan.spec == toy_plan().spec


def test_many_launchers_get_many_numbers() -> None:
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: create_run(toy_plan(), "same"), range(24)))
    assert sorted(run.id for run in runs) == sorted(f"same-{number}" for number in range(1, 25))
    assert all(run.read_plan().adapter_name == "same" for run in runs)
    assert sorted(entry.name for entry in home().runs.iterdir()) == sorted(run.id for run in runs)


@pytest.mark.parametrize("name", ["", "A", "a b", "../a", "-a", "a" * 65, "ä"])
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="cannot be used as a name"):
        create_run(toy_plan(), name)
    assert not home().runs.exists()


@pytest.mark.parametrize("content", [b"", b'{"spec":', b"[]", b"{}", b"\xff"])
def test_a_half_written_plan_is_named(content: bytes) -> None:
    run = create_run(toy_plan(), "half")
    run.plan_file.write_bytes(content)
    with pytest.raises(BadInput, match="plan of run half-1 is damaged"):
        run.read_plan()


def test_unknown_ids_suggest_near_ones() -> None:
    with pytest.raises(BadInput, match="no runs yet"):
        open_run("x-1")
    for name in ("db-triage", "db-triage", "other"):
        create_run(toy_plan(), name)
    with pytest.raises(BadInput, match="db-triage-2 or db-triage-1"):
        open_run("db-triage")
    with pytest.raises(BadInput, match="Did you mean db-triage-1"):
        open_run("db-trage-1")
    with pytest.raises(BadInput, match="runs list"):
        open_run("zzzzzzzz")
    with pytest.raises(BadInput, match="no run"):
        open_run("")


def test_a_run_is_found_by_its_folder(tmp_path: Path) -> None:
    run = create_run(toy_plan(), "moved")
    elsewhere = tmp_path / "moved-1"
    run.path.rename(elsewhere)
    assert open_run(str(elsewhere)) == RunFolder(elsewhere)
    with pytest.raises(BadInput, match="holds no run"):
        open_run(str(tmp_path))


def test_the_newest_run_comes_first() -> None:
    for age, name in ((30, "old"), (10, "new"), (20, "middle")):
        run = create_run(toy_plan(), name)
        os.utime(run.plan_file, (1e9 - age, 1e9 - age))
    assert [run.id for run in list_runs()] == ["new-1", "middle-1", "old-1"]


def test_a_full_disk_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(DiskProblem, match="disk is full") as problem:
            launching.launch(toy_plan(), "full")
    assert problem.value.exit_code == ExitCode.DISK
    assert list(home().runs.iterdir()) == []


def test_a_worker_that_cannot_be_started_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(launching, "start_worker", fail)
    with pytest.raises(DiskProblem):
        launching.launch(toy_plan(), "full")
    assert list(home().runs.iterdir()) == []


def test_too_little_space_is_refused_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_SPARE_DISK_BYTES", 1 << 60)
    with pytest.raises(DiskProblem, match="are free, and the run needs up to"):
        launching.launch(toy_plan(), "big")
    assert not home().runs.exists()


def test_a_plan_that_cannot_run_here_is_refused() -> None:
    plan = toy_plan()
    replace = msgspec.structs.replace
    with pytest.raises(BadInput, match="made without data"):
        launching.launch(replace(plan, data=None), "nodata")
    gone = replace(plan.spec.recipe.data, path=str(home().runs / "gone.jsonl"))
    moved = replace(plan, spec=replace(plan.spec, recipe=replace(plan.spec.recipe, data=gone)))
    with pytest.raises(BadInput, match="no such file"):
        launching.launch(moved, "gone")
    with pytest.raises(DeviceUnusable, match="rtx-4090-24gb, which is not in this machine"):
        launching.launch(replace(plan, spec=replace(plan.spec, device="rtx-4090-24gb")), "card")
    assert not home().runs.exists()


def test_a_name_that_belongs_to_another_base_is_refused() -> None:
    version = home().adapters / "taken" / "v1"
    version.mkdir(parents=True)
    recipe = toy_plan(fingerprint="sha256:another").spec.recipe
    card = Card(
        name="taken",
        version=1,
        base="other-model",
        base_fingerprint="sha256:another",
        recipe=recipe,
        layout=toy_plan().spec.layout,
        parameters=(),
        trainable_parameters=1,
        trainable_share=0.1,
        versions={},
        template=None,
        created="2026-01-01T00:00:00+00:00",
        run="taken-1",
        steps=1,
    )
    write_card(version, card)
    with pytest.raises(BadInput, match="trained on another base, other-model"):
        launching.launch(toy_plan(), "taken")
    assert not home().runs.exists()


def test_disk_need_counts_what_may_lie_there_beside_the_kept_checkpoints() -> None:
    needed = launching.needed_disk_bytes(toy_plan()) - launching._SPARE_DISK_BYTES
    # Two that are kept, the one being written, and two to go back to.
    assert needed == 5 * (50_000 + 100_000) + 2 * 50_000


def test_requests_are_read_taken_and_cleared(tmp_path: Path) -> None:
    assert read_request(tmp_path) is None
    assert take_request(tmp_path) is None
    request(tmp_path, "checkpoint")
    request(tmp_path, "stop")
    assert read_request(tmp_path) == "stop"
    assert take_request(tmp_path) == "stop"
    assert read_request(tmp_path) is None
    request(tmp_path, "pause")
    clear_request(tmp_path)
    clear_request(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "control.json").write_text('{"request": "dance", "time": 1}')
    assert read_request(tmp_path) is None
