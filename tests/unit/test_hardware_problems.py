"""Problems: recorded machines in, problems and remedies out."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from edgepeft.hardware.assumed import assume_gpu
from edgepeft.hardware.problems import Problem, find_problems, parse_cuda, wheel_runs_on
from edgepeft.hardware.snapshot import CpuFlags, GpuProcess, GpuSnapshot
from edgepeft.profiles import find_gpu
from edgepeft.units import GIB, MIB
from recorded_machine import CARD, HOST, PACKAGES


def ids(problems: list[Problem]) -> list[str]:
    return [problem.id for problem in problems]


def only(problems: list[Problem]) -> Problem:
    assert len(problems) == 1, problems
    return problems[0]


def test_a_sound_machine_has_no_problems() -> None:
    assert find_problems(HOST, [CARD], PACKAGES) == []


def test_a_machine_without_a_card_has_no_problem_either() -> None:
    host = replace(HOST, nvidia_device=False)
    packages = replace(PACKAGES, torch_cuda=None)
    assert find_problems(host, [], packages, no_gpu_reason="no NVIDIA driver is installed") == []


def test_cpu_only_torch_beside_a_card() -> None:
    problem = only(find_problems(HOST, [CARD], replace(PACKAGES, torch="2.13.0+cpu", torch_cuda=None)))
    assert (problem.id, problem.level) == ("torch-cpu-only", "error")
    assert "uv pip install --torch-backend=auto torch" in problem.remedy
    assert problem.alternative.startswith("pip install")


def test_on_windows_pip_needs_the_wheels_with_cuda_by_name() -> None:
    windows = replace(HOST, system="Windows 11", machine="AMD64")
    problem = only(find_problems(windows, [CARD], replace(PACKAGES, torch_cuda=None)))
    assert "pytorch.org/get-started" in problem.alternative


@pytest.mark.parametrize(
    ("driver", "speaks", "cuda", "too_old"),
    [
        ("550.120", (12, 4), "13.0", True),
        ("580.82.07", (13, 0), "13.2", False),
        ("550.120", (12, 4), "12.6", False),
        ("550.120", (13, 0), "13.0", False),  # a compatibility package
        ("550.120", None, "13.0", True),
        ("590.10", None, "13.0", False),
        ("470.10", None, "12.6", True),
        (None, None, "13.0", False),
    ],
)
def test_a_driver_too_old_for_torch(
    driver: str | None, speaks: tuple[int, int] | None, cuda: str, too_old: bool
) -> None:
    card = replace(CARD, driver=driver, cuda_driver=speaks)
    found = find_problems(HOST, [card], replace(PACKAGES, torch_cuda=cuda))
    assert ("driver-too-old" in ids(found)) == too_old
    if too_old:
        assert "Update the NVIDIA driver" in only(found).remedy


def test_a_card_on_the_bus_without_a_driver() -> None:
    problem = only(find_problems(HOST, [], PACKAGES, no_gpu_reason="no NVIDIA driver is installed"))
    assert problem.id == "no-driver"
    assert "no NVIDIA driver is installed" in problem.what
    mismatch = "the NVIDIA driver was updated and the old one still runs"
    host = replace(HOST, nvidia_device=False)
    assert only(find_problems(host, [], PACKAGES, no_gpu_reason=mismatch)).remedy == "Restart the machine"


def test_an_architecture_that_the_wheel_lacks() -> None:
    blackwell = replace(CARD, name="NVIDIA GeForce RTX 5090", capability=(12, 0))
    problem = only(find_problems(HOST, [blackwell], replace(PACKAGES, torch_cuda="12.6")))
    assert problem.id == "architecture-missing"
    assert "--torch-backend=cu130" in problem.remedy
    pascal = replace(CARD, name="NVIDIA GeForce GTX 1080 Ti", capability=(6, 1))
    found = find_problems(HOST, [pascal], PACKAGES)
    assert ids(found) == ["architecture-missing", "old-architecture"]
    assert "--torch-backend=cu126" in found[0].remedy
    assert ids(find_problems(HOST, [pascal], replace(PACKAGES, torch_cuda="12.6"))) == ["old-architecture"]


@pytest.mark.parametrize(
    ("cuda", "capability", "runs"),
    [
        ((12, 6), (8, 9), True),
        ((12, 6), (12, 0), False),
        ((12, 8), (12, 0), True),
        ((12, 8), (6, 1), False),
        ((13, 0), (7, 0), False),
        ((13, 0), (12, 1), True),
        ((13, 7), (12, 0), None),
    ],
)
def test_what_the_wheels_hold(cuda: tuple[int, int], capability: tuple[int, int], runs: bool | None) -> None:
    assert wheel_runs_on(cuda, capability) is runs


def test_only_linux_wheels_carry_portable_code_and_arm_is_not_judged() -> None:
    assert wheel_runs_on((13, 0), (14, 0)) is True
    assert wheel_runs_on((13, 0), (14, 0), machine="AMD64", system="Windows 11") is False
    assert wheel_runs_on((12, 6), (12, 0), machine="aarch64") is None


def test_turing_is_told_that_it_computes_in_fp16() -> None:
    problem = only(find_problems(HOST, [replace(CARD, name="Tesla T4", capability=(7, 5))], PACKAGES))
    assert (problem.id, problem.level) == ("no-bf16", "note")


def test_a_desktop_that_holds_vram() -> None:
    desktop = (GpuProcess(901, "Xorg", "graphics", 620 * MIB), GpuProcess(2210, "firefox", "graphics", 480 * MIB))
    problem = only(find_problems(HOST, [replace(CARD, processes=desktop, display_active=True)], PACKAGES))
    assert problem.id == "desktop-on-card"
    assert "1.1 GiB" in problem.what
    assert "Xorg, firefox" in problem.what


def test_a_windows_desktop_is_seen_though_no_process_tells_its_size() -> None:
    card = replace(CARD, used_bytes=1400 * MIB, display_active=True, processes=(GpuProcess(4, "dwm.exe", "graphics"),))
    assert only(find_problems(HOST, [card], PACKAGES)).id == "desktop-on-card"
    assert find_problems(HOST, [replace(card, used_bytes=300 * MIB)], PACKAGES) == []


def test_other_programs_are_named_with_what_they_hold() -> None:
    processes = (
        GpuProcess(4120, "edgepeft train", "compute", 9 * GIB),
        GpuProcess(4431, "python3", "compute", 2 * GIB),
        GpuProcess(4500, "small", "compute", 10 * MIB),
    )
    found = find_problems(HOST, [replace(CARD, processes=processes)], PACKAGES)
    assert [(problem.level, problem.what.split()[0]) for problem in found] == [
        ("warning", "python3"),
        ("note", "edgepeft"),
    ]
    assert "4431" in found[0].remedy
    assert "edgepeft runs stop" in found[1].remedy


def test_several_cards_are_told_apart() -> None:
    busy = replace(CARD, index=1, processes=(GpuProcess(7, "python3", "compute", 2 * GIB),))
    assert "on card 1" in only(find_problems(HOST, [CARD, busy], PACKAGES)).what


def test_bitsandbytes_without_the_cuda_major_of_torch() -> None:
    lacking = replace(PACKAGES, bitsandbytes_cuda=((11, 8), (12, 8)))
    assert only(find_problems(HOST, [CARD], lacking)).id == "bitsandbytes-cuda"
    other_minor = replace(PACKAGES, torch_cuda="13.2")
    assert find_problems(HOST, [CARD], other_minor) == []
    missing = replace(PACKAGES, bitsandbytes=None, bitsandbytes_cuda=())
    assert only(find_problems(HOST, [CARD], missing)).id == "bitsandbytes-missing"


def test_torch_not_installed() -> None:
    problem = only(find_problems(HOST, [CARD], replace(PACKAGES, torch=None, torch_cuda=None)))
    assert problem.remedy == "uv pip install --torch-backend=auto torch"


def test_low_disk_low_ram_and_old_cpus() -> None:
    assert only(find_problems(replace(HOST, disk_free_bytes=5 * GIB), [CARD], PACKAGES)).level == "warning"
    assert only(find_problems(replace(HOST, disk_free_bytes=1 * GIB), [CARD], PACKAGES)).level == "error"
    small = replace(HOST, ram_total_bytes=4 * GIB, ram_available_bytes=3 * GIB)
    assert only(find_problems(small, [CARD], PACKAGES)).id == "low-ram"
    assert only(find_problems(replace(HOST, ram_available_bytes=GIB), [CARD], PACKAGES)).id == "low-ram-available"
    old = replace(HOST, flags=CpuFlags(avx2=False), nvidia_device=False)
    assert only(find_problems(old, [], PACKAGES)).id == "no-avx2"
    unknown = replace(old, flags=CpuFlags())
    assert find_problems(unknown, [], PACKAGES) == []


def test_a_container_keeps_less_than_the_machine_has() -> None:
    limited = replace(HOST, ram_limit_bytes=16 * GIB, ram_available_bytes=12 * GIB)
    problem = only(find_problems(limited, [CARD], PACKAGES))
    assert (problem.id, problem.level) == ("container-limit", "note")
    assert limited.ram_usable_bytes == 16 * GIB


def test_the_worst_comes_first() -> None:
    host = replace(HOST, disk_free_bytes=5 * GIB, ram_limit_bytes=16 * GIB)
    levels = [problem.level for problem in find_problems(host, [CARD], replace(PACKAGES, torch_cuda=None))]
    assert levels == ["error", "warning", "note"]


def test_sensors_that_do_not_tell_are_no_problem() -> None:
    silent = GpuSnapshot(index=0, uuid="GPU-1", name="NVIDIA GB10")
    assert find_problems(HOST, [silent], PACKAGES) == []


def test_an_assumed_card_is_judged_like_a_real_one() -> None:
    card = assume_gpu(find_gpu("rtx-5090-32gb"))
    assert card.free_bytes == (32607 - 1024) * MIB
    assert ids(find_problems(HOST, [card], replace(PACKAGES, torch_cuda="12.6"))) == ["architecture-missing"]


@pytest.mark.parametrize(
    ("text", "version"), [("13.0", (13, 0)), ("12.8.1", (12, 8)), ("", None), (None, None), ("x.y", None)]
)
def test_cuda_versions(text: str | None, version: tuple[int, int] | None) -> None:
    assert parse_cuda(text) == version
