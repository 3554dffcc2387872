"""`edgepeft doctor` and `edgepeft profiles`, as a person and as a script see them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from msgspec.structs import replace

from edgepeft.cli.app import run
from edgepeft.cli.output import console
from edgepeft.hardware import host, measured, nvml, packages
from edgepeft.hardware.measured import Measured
from edgepeft.hardware.snapshot import GpuProcess, GpuSnapshot, HostSnapshot
from edgepeft.units import MIB
from recorded_machine import CARD, HOST, PACKAGES

MEASURED = Measured("cpu", "CPU", "2.13.0", "2026-11-22T02:38:00+00:00", 1.2e12, "bf16", 1e10, None, 5e8, None)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    desktop = GpuProcess(901, "Xorg [kms]", "graphics", 700 * MIB)
    card = replace(CARD, processes=(desktop,), used_bytes=800 * MIB, display_active=True, temperature_c=48)
    monkeypatch.setattr(host, "read_host", lambda: HOST)
    monkeypatch.setattr(packages, "read_packages", lambda: PACKAGES)
    monkeypatch.setattr(nvml, "probe_gpus", lambda: ([card], ""))
    monkeypatch.setattr(console, "_width", 80)


def edgepeft(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    with pytest.raises(SystemExit) as ended:
        run(list(arguments))
    captured = capsys.readouterr()
    assert ended.value.code == code, captured.err
    return captured.out if code == 0 else captured.err


@pytest.mark.usefixtures("machine")
def test_a_machine_in_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    text = edgepeft(capsys, "doctor")
    assert max(len(line) for line in text.splitlines()) <= 80
    for words in (
        "NVIDIA GeForce RTX 4090",
        "0.8 of 24.0 GiB",
        "Xorg [kms] (901)",
        "48 °C · n/a",
        "rtx-4090-24gb",
        "AVX-512",
    ):
        assert words in text
    assert text.index("Problems") < text.index("The desktop holds 0.7 GiB")


@pytest.mark.usefixtures("machine")
def test_a_machine_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    measured.store_measured(MEASURED)
    shown = json.loads(edgepeft(capsys, "doctor", "--json"))
    assert shown["gpus"][0]["total_bytes"] == 24564 * MIB
    assert shown["profiles"][0]["id"] == "rtx-4090-24gb"
    assert [problem["id"] for problem in shown["problems"]] == ["desktop-on-card"]
    assert shown["measured"][0]["matmul_flops"] == 1.2e12
    assert shown["assumed"] is False


@pytest.mark.usefixtures("machine")
def test_silent_sensors_are_shown_as_not_available(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvml, "probe_gpus", lambda: ([GpuSnapshot(index=0, uuid="GPU-1", name="NVIDIA GB10")], ""))
    text = edgepeft(capsys, "doctor")
    assert text.count("n/a") >= 6
    assert "No problems found." in text


@pytest.mark.usefixtures("machine")
def test_a_card_that_one_does_not_own(capsys: pytest.CaptureFixture[str]) -> None:
    text = edgepeft(capsys, "doctor", "--gpu", "rtx-5090-32gb")
    assert "not in this machine" in text
    assert "30.8 GiB free for a run" in text
    assert "GPU-5f3c" not in text
    assert "rtx-5080-16gb" in edgepeft(capsys, "doctor", "--gpu", "rtx-5080", code=2)
    assert "--measure" in edgepeft(capsys, "doctor", "--gpu", "rtx-5090-32gb", "--measure", code=2)


def test_no_card_is_no_problem(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    bare: HostSnapshot = replace(HOST, nvidia_device=False)
    monkeypatch.setattr(host, "read_host", lambda: bare)
    monkeypatch.setattr(packages, "read_packages", lambda: replace(PACKAGES, torch_cuda=None))
    monkeypatch.setattr(nvml, "probe_gpus", lambda: ([], "no NVIDIA driver is installed"))
    text = edgepeft(capsys, "doctor")
    assert "none: no NVIDIA driver is installed" in text
    assert "No problems found." in text


def test_doctor_imports_no_torch() -> None:
    program = (
        "import sys\n"
        "from edgepeft.cli.app import run\n"
        "try: run(['doctor', '--gpu', 't4-16gb'])\n"
        "except SystemExit as ended: assert ended.code == 0\n"
        "assert not {'torch', 'transformers', 'bitsandbytes', 'numpy'} & set(sys.modules)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr


def test_measurements_are_kept_for_each_device_and_version() -> None:
    assert measured.load_measured("cpu", "2.13.0") is None
    measured.store_measured(MEASURED)
    measured.store_measured(replace(MEASURED, torch="2.14.0", matmul_flops=2e12))
    kept = measured.load_measured("cpu", "2.13.0")
    assert kept == MEASURED
    measured.measured_file().write_text("{", encoding="utf-8")
    assert measured.load_measured("cpu", "2.13.0") is None


def test_profiles_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    text = edgepeft(capsys, "profiles", "list")
    assert "rtx-4090-24gb" in text
    assert "balanced" in text
    cards = json.loads(edgepeft(capsys, "profiles", "list", "gpus", "--json"))
    assert {card["id"] for card in cards} >= {"rtx-2060-6gb", "rtx-a6000-48gb"}
    shown = edgepeft(capsys, "profiles", "show", "gpus", "rtx-4090-24gb")
    assert "24,564 MiB" in shown
    assert "https://" in shown
    preset = json.loads(edgepeft(capsys, "profiles", "show", "presets", "quality", "--json"))
    assert preset["id"] == "quality"
    assert "edgepeft profiles list gpus" in edgepeft(capsys, "profiles", "show", "gpus", "voodoo", code=2)
