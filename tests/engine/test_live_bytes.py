"""Live tensor bytes: born, viewed and gone."""

from __future__ import annotations

import torch

from edgepeft.engine.ledger import LiveBytes, assign, counting_as, current_place, mark_place

CPU = torch.device("cpu")


def test_live_bytes_count_what_lives() -> None:
    before = torch.zeros(1000)
    with LiveBytes(torch.device("cpu")) as counter:
        start = counter.live_bytes
        assert start >= before.nbytes
        kept = before + 1
        view = kept[10:]
        (kept * 2).sum()
        assert counter.live_bytes == start + kept.nbytes
        del kept
        assert counter.live_bytes == start + 4000
        del view
    assert counter.live_bytes == start
    assert 8000 <= counter.peak_bytes - start <= 8100


def test_the_ledger_keeps_no_tensor_alive() -> None:
    gradient = torch.zeros(1000)
    with LiveBytes(torch.device("cpu"), known={"gradients": [gradient]}, others=False) as counter:
        assert counter.by_category == {"gradients": 4000}
        del gradient
        assert counter.live_bytes == 0


def test_the_highest_point_of_each_place_is_kept() -> None:
    with LiveBytes(CPU, others=False) as counter, counting_as("workspace", "first"):
        kept = torch.zeros(100)
        mark_place("second")
        with counting_as("saved activations", "third"):
            torch.zeros(1000)
        assert current_place() == "second"
        more = torch.zeros(10)
    peaks = counter.peaks_by_place
    assert peaks["first"] == {"workspace": 400}
    assert peaks["third"] == {"workspace": 400, "saved activations": 4000}
    assert sum(peaks["second"].values()) == 440
    assert (counter.peak_place, counter.peak_bytes) == ("third", 4400)
    assert kept.nbytes + more.nbytes == counter.live_bytes


def test_what_stays_is_named_when_it_is_known() -> None:
    with LiveBytes(CPU, others=False) as counter:
        with counting_as("recomputed layer"):
            gradient = torch.zeros(100)
        assert counter.by_category == {"recomputed layer": 400}
        assign([gradient], "gradients")
        assert {name: size for name, size in counter.by_category.items() if size} == {"gradients": 400}
        del gradient
        assert counter.live_bytes == sum(counter.by_category.values()) == 0


def test_files_mapped_into_memory_count_nothing_and_may_go() -> None:
    mapped = torch.zeros(1000)
    with LiveBytes(CPU, mapped=[mapped], others=False) as counter:
        view = mapped[5:]
        assert counter.live_bytes == 0
        mapped = view.clone()
        assert counter.live_bytes == 4 * 995
        del view, mapped
        assert counter.live_bytes == 0


def test_scratch_of_an_operation_raises_the_peak_and_is_gone() -> None:
    class Heard:
        def __init__(self) -> None:
            self.told: list[int] = []

        def born(self, key: int, size_bytes: int) -> None:
            self.told.append(size_bytes)

        def died(self, key: int) -> None:
            self.told.append(0)

    trace = Heard()
    asked = torch.ops.aten.neg.default
    values = torch.zeros(10)
    with LiveBytes(
        CPU, others=False, trace=trace, scratch=lambda func, args, options: 5000 if func is asked else 0
    ) as counter:
        made = -values
        assert counter.live_bytes == 40
    assert counter.peak_bytes == 5040
    assert trace.told == [made.nbytes, 5000, 0]


def test_a_new_phase_begins_with_what_lives() -> None:
    with LiveBytes(CPU, others=False) as counter:
        kept = torch.zeros(10)
        torch.zeros(1000)
        counter.restart_peaks()
        assert counter.peak_bytes == kept.nbytes
