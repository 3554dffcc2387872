"""Profiles: the shipped cards hold what they promise, and a wrong file is named with its key."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from edgepeft.errors import BadInput, UsageError
from edgepeft.paths import builtin_profiles, home
from edgepeft.profiles import GpuProfile, find_gpu, load_gpus, load_presets, load_profile, match_gpu
from edgepeft.units import GIB, MIB

SHIPPED = load_gpus()
KNOWN_ORIGINS = ("as NVML", "nominal", "estimated", "the card", "maximum link")


class Card(msgspec.Struct, frozen=True):
    name: str
    total_bytes: int | None


def write_user_card(name: str, **changes: str) -> Path:
    text = (builtin_profiles() / "gpus/rtx-4090-24gb.toml").read_text(encoding="utf-8")
    for old, new in changes.items():
        text = text.replace(old, new)
    folder = home().profiles / "gpus"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_at_least_28_cards_of_6_to_48_gib() -> None:
    assert len(SHIPPED) >= 28
    assert min(card.memory_bytes for card in SHIPPED.values()) < 6.1 * GIB
    assert max(card.memory_bytes for card in SHIPPED.values()) > 47 * GIB
    assert "rtx-4090-24gb" in SHIPPED


@pytest.mark.parametrize("card", SHIPPED.values(), ids=SHIPPED.keys())
def test_each_card_is_plausible_and_says_where_its_numbers_come_from(card: GpuProfile) -> None:
    nominal = int(card.id.rsplit("-", 1)[1].removesuffix("gb"))
    assert 0.93 * nominal * GIB <= card.memory_bytes <= nominal * GIB
    for name in ("memory_gb_per_s", "tensor_tflops", "board_power_w", "pcie_generation", "pcie_lanes"):
        assert (getattr(card, name) is None) == (name not in card.sources)
    for text in card.sources.values():
        assert "https://" in text or text.startswith(KNOWN_ORIGINS)
    assert card.capability in {(7, 5), (8, 6), (8, 9), (12, 0)}
    assert card.bf16 == (card.architecture != "Turing")


def test_ids_and_driver_names_tell_cards_apart() -> None:
    sizes: dict[str, list[int]] = {}
    for card in SHIPPED.values():
        for name in card.nvml_names:
            sizes.setdefault(name, []).append(card.memory_bytes)
    for name, held in sizes.items():
        for first, second in zip(sorted(held), sorted(held)[1:], strict=False):
            assert second / first > 1.16, name


@pytest.mark.parametrize(
    ("name", "mib", "wanted"),
    [
        ("NVIDIA GeForce RTX 3080", 10240, "rtx-3080-10gb"),
        ("NVIDIA GeForce RTX 3080", 12288, "rtx-3080-12gb"),
        ("NVIDIA GeForce RTX 4060 Ti", 16380, "rtx-4060-ti-16gb"),
        ("NVIDIA GeForce RTX 4060 Ti", 8188, "rtx-4060-ti-8gb"),
        ("Tesla T4", 15109, "t4-16gb"),
        ("NVIDIA GeForce RTX 3060", 8192, None),
        ("NVIDIA GeForce RTX 9090", 24576, None),
    ],
)
def test_a_live_card_finds_its_profile_by_name_and_memory(name: str, mib: int, wanted: str | None) -> None:
    found = match_gpu(Card(name, mib * MIB))
    assert (found.id if found else None) == wanted


def test_without_a_memory_size_only_an_unambiguous_name_matches() -> None:
    found = match_gpu(Card("NVIDIA GeForce RTX 4090", None))
    assert found is not None
    assert found.id == "rtx-4090-24gb"
    assert match_gpu(Card("NVIDIA GeForce RTX 3080", None)) is None


def test_an_unknown_id_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match="rtx-3080-10gb or rtx-3080-12gb"):
        find_gpu("rtx-3080")
    with pytest.raises(UsageError, match="rtx-4090-24gb"):
        find_gpu("rtx4090")
    with pytest.raises(UsageError, match="edgepeft profiles list gpus"):
        find_gpu("")
    assert find_gpu("RTX 4090 24GB").id == "rtx-4090-24gb"


def test_a_users_file_overrides_by_id_and_adds_new_ones() -> None:
    write_user_card("rtx-4090-24gb", **{"memory_mib = 24564": "memory_mib = 49140"})
    write_user_card("my-card", **{'id = "rtx-4090-24gb"': 'id = "my-card"'})
    cards = load_gpus()
    assert cards["rtx-4090-24gb"].memory_mib == 49140
    assert cards["my-card"].compute_capability == "8.9"


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("memory_mib = 24564", 'memory_mib = "24564"', "key `memory_mib`: Expected `int`"),
        ("bf16 = true", "bf16 = true\nbf61 = true", "bf61"),
        ("memory_mib = 24564", "", "memory_mib"),
        ("bf16 = true", "bf16 = false", "key `bf16`"),
        ('compute_capability = "8.9"', 'compute_capability = "ada"', "key `compute_capability`"),
        ("memory_mib = 24564", "memory_mib = 512", "desktop_reserve_mib"),
        ('pcie_lanes = "maximum', 'pcie_width = "maximum', "key `sources.pcie_width`"),
        ('id = "wrong"', 'id = "other"', "the file is called wrong.toml"),
        ("bf16 = true", "bf16 = yes", "not valid TOML"),
    ],
)
def test_a_wrong_file_is_named_with_its_key(old: str, new: str, complaint: str) -> None:
    write_user_card("wrong", **{'id = "rtx-4090-24gb"': 'id = "wrong"', old: new})
    with pytest.raises(BadInput, match=r"wrong\.toml") as caught:
        load_gpus()
    assert complaint in str(caught.value)


def test_a_number_without_an_origin_is_refused() -> None:
    path = write_user_card("wrong", **{'id = "rtx-4090-24gb"': 'id = "wrong"'})
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(line for line in lines if not line.startswith('tensor_tflops = "')), encoding="utf-8")
    with pytest.raises(BadInput, match="key `tensor_tflops`"):
        load_gpus()


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "card.toml"
    path.write_bytes(b'name = "\xff"')
    with pytest.raises(BadInput, match="not UTF-8"):
        load_profile(path, GpuProfile)
    with pytest.raises(BadInput, match="cannot be read"):
        load_profile(tmp_path / "absent.toml", GpuProfile)


def test_every_intent_has_a_preset() -> None:
    assert {"quality", "balanced", "speed", "prototype"} <= set(load_presets())
