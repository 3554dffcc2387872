"""Progressive unfreezing as a plan sees it: the schedule, what is refused, what is shown, and what it saves in time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgepeft.errors import BadInput, UsageError
from edgepeft.plan.build import build
from edgepeft.plan.files import read_plan_toml, write_plan_toml
from edgepeft.plan.revise import revise
from edgepeft.plan.search import make_plan
from edgepeft.plan.train_plan import TrainPlan
from edgepeft.spec import Unfreeze
from plans import request
from shapes import SMOLLM2

LENGTHS = [100] * 400
LAYERS = SMOLLM2.layers


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 60, 1000])
@pytest.mark.parametrize("layers", [1, 2, 30])
@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_a_share_begins_with_one_layer_and_ends_with_all(steps: int, layers: int, share: float) -> None:
    schedule = Unfreeze(share=share)
    counts = [schedule.layers_at(step, steps, layers) for step in range(steps)]
    assert counts == sorted(counts)
    assert counts[-1] == layers
    full = schedule.full_from(steps, layers)
    assert all(count == layers for count in counts[full:])
    assert all(count < layers for count in counts[:full])
    if full:
        assert counts[0] == 1
        assert full <= share * steps + 1


def test_a_layer_joins_every_so_many_steps() -> None:
    schedule = Unfreeze(every_steps=3)
    assert [schedule.layers_at(step, 100, 4) for step in range(11)] == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4]
    assert schedule.full_from(100, 4) == 9


@pytest.mark.parametrize("fields", [{}, {"share": 0.5, "every_steps": 2}, {"share": 0.0}, {"share": 1.5},
                                    {"every_steps": 0}, {"share": float("nan")}])  # fmt: skip
def test_what_is_no_schedule_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="unfreeze"):
        Unfreeze(**fields)


def shown(plan: TrainPlan) -> tuple[str, str, str]:
    return next((choice.value, choice.origin, choice.why) for choice in plan.choices if choice.what == "unfreeze")


def test_a_plan_keeps_and_shows_what_was_typed() -> None:
    plain = make_plan(request(lengths=LENGTHS, max_steps=200))
    assert plain.spec.recipe.unfreeze is None
    assert not any(choice.what == "unfreeze" for choice in plain.choices)
    half = make_plan(request(lengths=LENGTHS, max_steps=200, unfreeze=0.5))
    assert half.spec.recipe.unfreeze == Unfreeze(share=0.5)
    assert half.spec.recipe.digest() != plain.spec.recipe.digest()
    full = half.spec.recipe.unfreeze.full_from(half.steps, LAYERS) + 1
    assert shown(half) == (
        "over 50 % of the steps",
        "user",
        f"the top layer first, all {LAYERS} from step {full} on; memory is that of the end",
    )
    # The peak is that of the end, and backward goes through three quarters of the layers on average.
    assert half.memory == plain.memory
    assert 0.7 < half.operations / plain.operations < 0.95
    every = make_plan(request(lengths=LENGTHS, max_steps=200, epochs=10.0, unfreeze_every=2))
    assert every.spec.recipe.unfreeze == Unfreeze(every_steps=2)
    assert shown(every)[0] == "a layer every 2 steps"


def test_a_run_too_short_for_its_layers_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--unfreeze-every.*all train from step 291 on, and the run has") as error:
        make_plan(request(lengths=LENGTHS, max_steps=100, epochs=10.0, unfreeze_every=10))
    most = int(error.value.hint.split("--unfreeze-every ")[1].split()[0])
    make_plan(request(lengths=LENGTHS, max_steps=100, epochs=10.0, unfreeze_every=most))
    with pytest.raises(UsageError, match="all train from"):
        make_plan(request(lengths=LENGTHS, max_steps=100, epochs=10.0, unfreeze_every=most + 1))
    # A share always ends with all layers, however short the run is.
    make_plan(request(lengths=LENGTHS, max_steps=2, unfreeze=1.0))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"unfreeze": 0.0}, "--unfreeze"),
        ({"unfreeze": 1.1}, "--unfreeze"),
        ({"unfreeze_every": 0}, "--unfreeze-every"),
        ({"unfreeze": 0.5, "unfreeze_every": 3}, "--unfreeze-every"),
    ],
)
def test_nonsense_is_one_clear_line(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named) as error:
        make_plan(request(lengths=LENGTHS, **options))
    assert "\n" not in str(error.value)


def test_an_edited_plan_file_is_taken_and_checked(tiny_model: Path, alpaca_file: Path, tmp_path: Path) -> None:
    plan = build(str(tiny_model), alpaca_file, {"gpu": "cpu", "budget": "1GiB"})
    path = tmp_path / "p.toml"
    write_plan_toml(plan, path)
    text = path.read_text()

    def edited(lines: str) -> TrainPlan:
        path.write_text(
            text.replace("[spec.recipe.schedule]", f"[spec.recipe.unfreeze]\n{lines}\n[spec.recipe.schedule]")
        )
        return revise(read_plan_toml(path), where="p.toml")

    revised = edited("share = 0.5")
    assert revised.spec.recipe.unfreeze == Unfreeze(share=0.5)
    assert shown(revised)[1] == "user"
    for lines in ("share = 2.0", "every_steps = 100000", "share = 0.5\nevery_steps = 1"):
        with pytest.raises(BadInput, match="unfreeze"):
            edited(lines)
