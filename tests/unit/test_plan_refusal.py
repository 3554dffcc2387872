"""What a refusal explains, and whether what it says would help does."""

from __future__ import annotations

import json
import re

import msgspec
import pytest

from edgepeft.cli.app import run
from edgepeft.errors import DoesNotFit, ExitCode
from edgepeft.models.described import describe_model, find_model_profile
from edgepeft.plan.device import PlanDevice, profile_device
from edgepeft.plan.refusal import NothingFits, Refusal
from edgepeft.plan.request import PlanRequest
from edgepeft.plan.search import Search, make_plan
from edgepeft.profiles import find_gpu
from edgepeft.units import GIB, MIB, format_bytes
from plans import device, entry, request
from shapes import LLAMA_8B, SMOLLM2

LENGTHS = [100] * 90 + [400] * 9 + [1500]


def refused(asked: PlanRequest) -> NothingFits:
    with pytest.raises(NothingFits) as caught:
        make_plan(asked)
    return caught.value


def on_card(name: str, model: str, **options: object) -> PlanRequest:
    card = profile_device(find_gpu(name))
    return request(card.budget_bytes, on=card, base=describe_model(find_model_profile(model)), **options)


def way(refusal: Refusal, kind: str) -> tuple[str, ...]:
    return next((found.names for found in refusal.ways if found.kind == kind), ())


def test_a_70b_on_a_24_gb_card_names_base_budget_cards_and_the_largest_model_that_fits() -> None:
    error = refused(on_card("rtx-4090-24gb", "llama-3.1-70b", lengths=LENGTHS))
    told = error.refusal
    assert told.precision == "nf4"
    assert 36 * GIB < told.base_bytes < 38 * GIB
    assert told.base_bytes < told.needed_bytes
    assert told.budget_bytes == profile_device(find_gpu("rtx-4090-24gb")).budget_bytes
    assert way(told, "model") == ("qwen2.5-32b",)
    assert all(name.endswith("-48gb") for name in way(told, "card"))
    assert not way(told, "option")
    text = " ".join(error.lines("", 80))
    for phrase in ("does not fit GeForce RTX 4090", "less 1.00 GiB for a desktop", "more than all of that"):
        assert phrase in " ".join(text.split())


def test_the_cards_and_the_model_that_it_names_do_fit() -> None:
    asked = on_card("rtx-4090-24gb", "llama-3.1-70b", lengths=LENGTHS)
    told = refused(asked).refusal
    for name in way(told, "card"):
        card = profile_device(find_gpu(name))
        plan = make_plan(msgspec.structs.replace(asked, device=card, budget_bytes=card.budget_bytes))
        assert plan.memory.peak_bytes <= card.budget_bytes
    base = describe_model(find_model_profile(way(told, "model")[0]))
    plan = make_plan(msgspec.structs.replace(asked, entry=base))
    assert plan.memory.peak_bytes <= asked.budget_bytes


def test_no_larger_described_model_fits_than_the_one_it_names() -> None:
    asked = on_card("rtx-3060-12gb", "llama-2-70b", lengths=LENGTHS)
    named = find_model_profile(way(refused(asked).refusal, "model")[0])
    larger = find_model_profile("gemma-2-27b")
    assert named.parameters < larger.parameters
    assert Search(msgspec.structs.replace(asked, entry=describe_model(larger))).find() is None


def test_options_in_the_way_are_named_first() -> None:
    told = refused(on_card("rtx-3060-12gb", "llama-3.1-8b", lengths=LENGTHS, precision="bf16")).refusal
    assert told.ways[0].kind == "option"
    assert told.ways[0].names == ("--precision",)
    assert re.search(r"leaving out --precision \(it fits with (int8|nf4)\)", told.ways[0].text)


def test_less_than_the_preset_asks_for_is_proposed_where_it_is_enough() -> None:
    base = entry(LLAMA_8B)
    low = Search(request(base=base, lengths=LENGTHS, preset="quality", rank=4))
    enough = low.count(low.smallest(256)).memory.peak_bytes + MIB
    error = refused(request(enough, base=base, lengths=LENGTHS, preset="quality"))
    assert way(error.refusal, "option") == ("--rank 4",)
    make_plan(request(enough, base=base, lengths=LENGTHS, preset="quality", rank=4))


def on(**changes: object) -> PlanDevice:
    return device(**changes)


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        ({"budget_bytes": 32 * GIB}, "has 32.0 GiB to give, leave out --budget"),
        ({"budget_bytes": 3 * GIB}, "has 64.0 GiB in all, of which other programs hold a part"),
        ({"budget_bytes": 3 * GIB, "total_bytes": 4 * GIB}, None),
    ],
)
def test_a_budget_is_named_only_where_the_machine_has_it(machine: dict[str, int], words: str | None) -> None:
    told = refused(request(3 * GIB, base=entry(LLAMA_8B), lengths=LENGTHS, on=on(**machine))).refusal
    budgets = [found for found in told.ways if found.kind == "budget"]
    assert [words in found.text for found in budgets] == ([True] if words else [])
    if words:
        assert budgets[0].bytes is not None
        assert budgets[0].bytes > told.needed_bytes


def test_no_card_is_proposed_for_a_run_on_the_cpu() -> None:
    assert not way(refused(request(3 * GIB, base=entry(LLAMA_8B), lengths=LENGTHS)).refusal, "card")


def test_a_model_beyond_every_card_is_told_so() -> None:
    asked = on_card("rtx-4090-24gb", "qwen2.5-72b", lengths=LENGTHS, precision="bf16")
    cards = [found.text for found in refused(asked).refusal.ways if found.kind == "card"]
    assert len(cards) == 1
    assert "no profile describes one" in cards[0]


def test_where_nothing_smaller_is_described_no_model_is_named() -> None:
    assert not way(refused(request(1 << 20, base=entry(SMOLLM2), lengths=LENGTHS)).refusal, "model")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_lines_keep_to_the_terminal(width: int) -> None:
    lines = refused(on_card("rtx-4090-24gb", "llama-3.1-70b", lengths=LENGTHS)).lines("edgepeft: ", width)
    assert lines[0].startswith("edgepeft: llama-3.1-70b does not fit")
    assert max(map(len, lines)) <= width
    assert "What would help:" in lines


def test_a_damaged_profile_does_not_hide_the_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    error = refused(on_card("rtx-4090-24gb", "llama-3.1-70b"))
    monkeypatch.setattr("edgepeft.models.described.load_models", _refuse)
    lines = error.lines("edgepeft: ", 80)
    assert len(lines) == 1
    assert "more than the budget" in lines[0]


def _refuse() -> None:
    raise DoesNotFit("damaged")


def test_the_command_exits_with_4_and_prints_the_figures_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        run(["plan", "llama-3.1-70b", "--gpu", "rtx-4090-24gb", "--json"])
    assert leaving.value.code == ExitCode.DOES_NOT_FIT
    printed = capsys.readouterr()
    answer = json.loads(printed.out)
    assert answer["fits"] is False
    told = msgspec.convert(answer["refusal"], Refusal)
    assert told.model == "llama-3.1-70b"
    assert printed.err.startswith("edgepeft: llama-3.1-70b does not fit")
    assert format_bytes(told.needed_bytes) in " ".join(printed.err.split())
