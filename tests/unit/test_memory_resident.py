"""What a process holds beside its tensors."""

from __future__ import annotations

import msgspec
import pytest

from edgepeft.hardware.host import read_host
from edgepeft.hardware.snapshot import HostSnapshot
from edgepeft.memory.breakdown import Breakdown, Phase
from edgepeft.memory.resident import Resident, Traffic, predict_resident
from edgepeft.spec import Layout, RunSpec
from shapes import run_spec

LEDGER = Breakdown(
    (
        Phase("load", {"frozen weights": 100 << 20}, "load"),
        Phase("train step", {"frozen weights": 100 << 20, "saved activations": 40 << 20}, "loss"),
    ),
    0.03,
)


def predicted(host: HostSnapshot, spec: RunSpec, traffic: Traffic, **options: int) -> Resident:
    found = predict_resident(LEDGER, spec, host, traffic, **options)
    assert found is not None
    return found


@pytest.fixture
def host() -> HostSnapshot:
    found = read_host()
    return msgspec.structs.replace(found, flags=msgspec.structs.replace(found.flags, avx512=True))


def test_shapes_of_products_grow_with_a_run_and_then_no_more(host: HostSnapshot) -> None:
    spec = msgspec.structs.replace(run_spec(compute_dtype="bf16"), layout=Layout(micro_batch_tokens=1024))
    sizes = [predicted(host, spec, Traffic(steps, 8 * steps, 300)).total_bytes for steps in (2, 20, 1000, 10**6)]
    assert sizes[0] < sizes[1] < sizes[2] == sizes[3]
    assert sizes[3] - sizes[0] < 200 << 20


def test_the_highest_phase_decides_and_holds_the_tensors(host: HostSnapshot) -> None:
    found = predicted(host, run_spec(), Traffic(10, 40, 300), tokenizer_bytes=1 << 20)
    rows = {row.name: row.size_bytes for row in found.rows}
    assert found.phase == "train step"
    assert rows["tensors"] == 140 << 20
    assert rows["tokenizer"] >= 1 << 20
    assert found.total_bytes == sum(rows.values())


def test_a_card_is_the_drivers_affair(host: HostSnapshot) -> None:
    spec = msgspec.structs.replace(run_spec(), device="GPU-0")
    assert predict_resident(LEDGER, spec, host, Traffic(10, 40, 300)) is None
