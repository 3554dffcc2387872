"""Budgets as people write them, and cards that others use too."""

from __future__ import annotations

import msgspec
import pytest

from edgepeft.errors import DeviceUnusable, UsageError
from edgepeft.hardware.snapshot import GpuProcess, GpuSnapshot
from edgepeft.plan.build import build
from edgepeft.plan.device import card_device, cpu_device, find_device
from edgepeft.plan.refusal import NothingFits
from edgepeft.units import GIB, MIB, parse_bytes
from recorded_machine import CARD, HOST

HALF_USED = msgspec.structs.replace(
    CARD,
    used_bytes=12 * GIB,
    free_bytes=CARD.total_bytes - 12 * GIB if CARD.total_bytes else None,
    processes=(GpuProcess(4711, "blender", "both", 11 * GIB), GpuProcess(812, "Xorg", "graphics", 300 * MIB)),
)


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> list[GpuSnapshot]:
    """What NVML reports; changed by the test."""
    found: list[GpuSnapshot] = [CARD]
    monkeypatch.setattr("edgepeft.hardware.nvml.read_gpus", lambda: list(found))
    return found


@pytest.mark.parametrize(
    ("text", "size"),
    [("20GiB", 20 * GIB), ("20 GiB", 20 * GIB), ("20GB", 20 * 10**9), ("20 gb", 20 * 10**9), ("1.5GiB", 3 * GIB // 2)],
)
def test_gb_and_gib_differ_and_spaces_do_not(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("0", "not above zero"),
        ("0GiB", "not above zero"),
        ("-3", "not above zero"),
        ("-3GiB", "not above zero"),
        ("20", "Write 20GiB"),
        ("20 G", "unknown unit 'G'"),
        ("lots", "cannot read 'lots'"),
        ("", "cannot read ''"),
        ("1e3GiB", "cannot read"),
        ("nanGiB", "cannot read"),
        ("9" * 400 + "GiB", "more than any device has"),
    ],
)
def test_a_budget_that_cannot_be_meant_is_one_clear_line(text: str, complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        build("llama-3.2-1b", None, {"gpu": "rtx-3060-12gb", "budget": text})
    assert complaint in str(caught.value)
    assert str(caught.value).startswith("--budget: ")
    assert "\n" not in str(caught.value)


def test_a_budget_above_the_whole_card_is_refused_with_what_it_has() -> None:
    with pytest.raises(UsageError, match=r"20\.00 GiB is more than all memory of the card, 12\.00 GiB"):
        build("llama-3.2-1b", None, {"gpu": "rtx-3060-12gb", "budget": "20GiB"})


def test_a_free_card_is_planned_with_what_is_free_less_a_margin(cards: list[GpuSnapshot]) -> None:
    plan = build("llama-3.1-8b", None, {})
    assert plan.spec.device == CARD.uuid
    assert CARD.free_bytes is not None
    assert plan.spec.budget_bytes == CARD.free_bytes - 384 * MIB
    assert not any("blender" in note for note in plan.notes)


def test_a_half_used_card_is_planned_with_what_is_free_and_says_so(cards: list[GpuSnapshot]) -> None:
    cards[0] = HALF_USED
    plan = build("llama-3.1-8b", None, {})
    assert HALF_USED.free_bytes is not None
    assert plan.spec.budget_bytes == HALF_USED.free_bytes - 384 * MIB
    assert plan.memory.peak_bytes <= plan.spec.budget_bytes
    why = next(choice.why for choice in plan.choices if choice.what == "budget")
    assert "12.0 of 24.0 GiB free now" in why or "12.0 GiB of 24.0 GiB free now" in why
    assert any("blender" in note for note in plan.notes)


def test_a_budget_above_what_is_free_is_kept_and_told(cards: list[GpuSnapshot]) -> None:
    cards[0] = HALF_USED
    plan = build("llama-3.1-8b", None, {"budget": "20GiB"})
    assert plan.spec.budget_bytes == 20 * GIB
    assert any("larger than the 12.0 GiB that are free now" in note for note in plan.notes)


def test_a_refusal_on_a_half_used_card_says_what_others_hold(cards: list[GpuSnapshot]) -> None:
    cards[0] = HALF_USED
    with pytest.raises(NothingFits) as caught:
        build("mistral-small-24b", None, {})
    budgets = [found.text for found in caught.value.refusal.ways if found.kind == "budget"]
    assert len(budgets) == 1
    assert "24.0 GiB in all, of which other programs hold a part" in budgets[0]


def test_the_freest_card_is_taken(cards: list[GpuSnapshot]) -> None:
    cards[:] = [HALF_USED, msgspec.structs.replace(CARD, index=1, uuid="GPU-second")]
    assert find_device(None).id == "GPU-second"
    assert find_device("0").id == HALF_USED.uuid


def test_a_card_by_its_number_on_the_box_is_explained(cards: list[GpuSnapshot]) -> None:
    with pytest.raises(UsageError, match=r"Cards here: 0 \(NVIDIA GeForce RTX 4090\).*rtx-4070-12gb"):
        find_device("4070")


def test_a_card_that_does_not_tell_its_memory_is_refused() -> None:
    with pytest.raises(DeviceUnusable, match="does not tell its memory"):
        card_device(msgspec.structs.replace(CARD, free_bytes=None))


def test_a_full_card_leaves_nothing() -> None:
    assert card_device(msgspec.structs.replace(CARD, free_bytes=100 * MIB)).budget_bytes == 0


def test_the_cpu_takes_a_share_of_what_is_free() -> None:
    device = cpu_device(HOST)
    assert device.budget_bytes == 30 * GIB
    assert "50.0 GiB of RAM free now" in device.budget_why
