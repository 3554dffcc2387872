"""Full fine-tuning in plans: which bases it takes, what it costs, and what is said where it does not fit."""

from __future__ import annotations

from typing import Any

import pytest

from edgepeft.errors import UsageError
from edgepeft.methods import METHODS, FullConfig, count_parameters
from edgepeft.plan.refusal import NothingFits
from edgepeft.plan.search import make_plan
from edgepeft.units import GIB
from plans import device, entry, request
from shapes import LLAMA_8B, SMOLLM2

LENGTHS = [100] * 400


def test_it_takes_the_unquantized_base_and_a_smaller_rate() -> None:
    plan = make_plan(request(20 * GIB, lengths=LENGTHS, method="full"))
    lora = make_plan(request(20 * GIB, lengths=LENGTHS))
    recipe = plan.spec.recipe
    assert recipe.method == FullConfig()
    assert recipe.precision == "bf16"
    rate = METHODS["full"].rate * lora.spec.recipe.optimizer.learning_rate
    assert recipe.optimizer.learning_rate == pytest.approx(rate, rel=0.05)
    assert count_parameters(FullConfig(), SMOLLM2) == SMOLLM2.parameters
    step = next(phase for phase in plan.memory.phases if phase.name == "train step").bytes_by_category
    assert step["adapter weights"] == 4 * SMOLLM2.parameters
    assert step["frozen weights"] + step["embeddings and head"] == 2 * SMOLLM2.parameters
    # The step's gradients and moments are there for every parameter.
    assert step["optimizer state"] > 8 * SMOLLM2.parameters
    assert 1 < plan.operations / lora.operations < 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "nf4"}, "a 4-bit base cannot be trained as a whole.*--precision bf16"),
        ({"precision": "int8"}, "an 8-bit base cannot be trained as a whole.*--precision bf16"),
        ({"base": entry(stored_as="bnb-4bit")}, "stored quantized.*4-bit base cannot be trained as a whole"),
        ({"rank": 8}, "rank"),
    ],
)
def test_what_it_cannot_do_is_one_clear_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        make_plan(request(20 * GIB, lengths=LENGTHS, method="full", **options))
    assert "\n" not in str(error.value)


def test_where_it_does_not_fit_no_quantized_base_is_proposed() -> None:
    card = device("cuda", capability=(8, 9), total_bytes=24 * GIB, budget_bytes=22 * GIB)
    with pytest.raises(NothingFits) as error:
        make_plan(request(22 * GIB, base=entry(LLAMA_8B), lengths=LENGTHS, method="full", on=card))
    told = "\n".join(error.value.lines("", 100))
    assert "bf16" in told
    assert "nf4" not in told
