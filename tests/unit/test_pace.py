"""The time that a run still takes: by its pace, and by what the steps to come cost."""

from __future__ import annotations

import msgspec
import pytest

from edgepeft.engine.training.pace import Pace
from edgepeft.methods.prefix import PrefixConfig
from edgepeft.methods.prompt import PromptConfig
from edgepeft.plan.unfreezing import training_share, work_of_steps
from edgepeft.spec import Layout, Unfreeze
from shapes import SMOLLM2, run_spec


def test_steps_that_cost_alike_take_the_smoothed_time_of_those_before():
    pace = Pace([1.0] * 4)
    assert not pace.known
    assert pace.seconds_left(0) == 0
    pace.add(0, 2.0)
    assert pace.known
    assert pace.seconds_left(1) == 6
    pace.add(1, 7.0)
    assert pace.seconds_left(2) == pytest.approx(2 * (0.8 * 2 + 0.2 * 7))
    assert pace.seconds_left(4) == 0


def test_a_run_that_unfreezes_knows_from_its_first_step_that_later_ones_take_longer():
    recipe = msgspec.structs.replace(run_spec().recipe, unfreeze=Unfreeze(share=0.5))
    for checkpointing, back in (("none", 1), ("layer", 2)):
        work = work_of_steps(recipe, Layout(64, checkpointing), SMOLLM2, 60)
        assert work[0] == pytest.approx(1 + back / SMOLLM2.layers)
        assert work[30:] == [1 + back] * 30
        assert work == sorted(work)
        pace = Pace(work)
        # Whatever a unit takes, the first step tells all of the time to come.
        pace.add(0, 3 * work[0])
        assert pace.seconds_left(1) == pytest.approx(3 * sum(work[1:]))
    assert sum(work_of_steps(recipe, Layout(64, "none"), SMOLLM2, 60)) / 60 - 1 == pytest.approx(
        training_share(recipe, SMOLLM2, 60)
    )


@pytest.mark.parametrize("method", [None, PromptConfig(4), PrefixConfig(4, reparameterised=True)])
def test_without_a_schedule_or_with_something_below_all_layers_every_step_costs_the_same(method):
    recipe = run_spec().recipe
    if method is not None:
        recipe = msgspec.structs.replace(recipe, method=method, unfreeze=Unfreeze(share=0.5))
    assert work_of_steps(recipe, Layout(64, "none"), SMOLLM2, 5) == [2.0] * 5
