"""Plans for methods that put something before every sample: context, micro-batches, refusals."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from edgepeft.errors import UsageError
from edgepeft.memory.target import CPU
from edgepeft.memory.workload import Workload
from edgepeft.methods.prompt import PromptConfig
from edgepeft.plan.prediction import predict
from edgepeft.plan.search import Search, make_plan
from edgepeft.units import GIB
from plans import entry, request
from shapes import SMOLLM2

LENGTHS = [100] * 90 + [400] * 9 + [1500]
SHORT = entry(msgspec.structs.replace(SMOLLM2, context_length=1024))


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_it_takes_its_places_of_the_context(method: str) -> None:
    plan = make_plan(request(lengths=LENGTHS, base=SHORT, method=method, set=("tokens=24",)))
    assert plan.spec.recipe.max_seq_len == 1000
    assert plan.spec.recipe.method.tokens == 24
    typed = make_plan(request(lengths=LENGTHS, base=SHORT, method=method, set=("tokens=24",), max_seq_len=1020))
    assert typed.spec.recipe.max_seq_len == 1000


def test_rows_before_samples_are_part_of_micro_batches() -> None:
    search = Search(request(lengths=[50] * 20, method="prompt", set=("tokens=30",), max_seq_len=64))
    assert search.longest_sample(64) == 80
    lean = search.leanest(64, "bf16", 0)
    assert lean.micro_batch_tokens == 80
    lengths = search.request.lengths
    assert lengths is not None
    (workload, *_) = lengths.exact(search.spec(lean))
    assert (workload.tokens, workload.longest, workload.samples) == (80, 80, 1)
    without = Search(request(lengths=[50] * 20, method="prefix", set=("tokens=30",), max_seq_len=64))
    assert without.longest_sample(64) == 50


def test_the_bound_covers_what_is_counted() -> None:
    for method in ("prefix", "prompt"):
        search = Search(request(8 * GIB, lengths=LENGTHS, method=method, set=("tokens=40",)))
        lean = search.leanest(512, "bf16", 0)
        bound = search.cost(lean).peak_bytes
        assert search.count(lean).memory.peak_bytes <= bound


def test_a_micro_batch_of_many_samples_is_split_into_as_many() -> None:
    workload = Workload(100, 40, 100, samples=5)
    assert workload.lengths() == (40, 15, 15, 15, 15)
    assert sum(Workload(103, 40, 100, samples=5).lengths()) == 103
    assert Workload(100, 40, 100, samples=2).lengths() == Workload(100, 40, 100).lengths() == (40, 40, 20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "prefix", "set": ("tokens=1024",)}, "leave no place in a context of 1,024"),
        ({"method": "prompt", "set": ("tokens=0",)}, "0 tokens is not possible"),
        ({"method": "prompt", "set": ("text=Sort them.",)}, "starts at vocabulary has no text"),
        ({"method": "prompt", "set": ("start=words",)}, "Invalid enum value 'words'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_searched(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_plan(request(lengths=LENGTHS, base=SHORT, **options))


def test_a_text_comes_through_whole() -> None:
    text = "Sort alerts: cause = component, severity."
    plan = make_plan(request(lengths=LENGTHS, method="prompt", set=("start=text", f"text={text}")))
    assert plan.spec.recipe.method == PromptConfig(start="text", text=text)


def test_many_samples_count_where_something_stands_before_each() -> None:
    # One micro-batch has more tokens and a longer sample, another one many more samples.
    lengths = [512] * 8 + [20] * 92
    found = Search(request(lengths=lengths, method="prefix", set=("tokens=100",), samples_per_step=100))
    candidate = msgspec.structs.replace(found.leanest(512, "bf16", 0), micro_batch_tokens=2048)
    assert found.request.lengths is not None
    workloads = found.request.lengths.exact(found.spec(candidate))
    most = max(workload.samples for workload in workloads)
    assert most > 50
    lora = Search(request(lengths=lengths, samples_per_step=100))
    without = found.request.lengths.exact(lora.spec(msgspec.structs.replace(candidate, rank=8)))
    assert {workload.samples for workload in without} == {0}


def test_a_prediction_takes_an_evaluation_from_one_workload() -> None:
    search = Search(request(lengths=LENGTHS, method="prefix", set=("tokens=24",)))
    spec = search.spec(search.leanest(512, "bf16", 0))
    first = Workload(2048, 512, 2048, samples=100, held_out_tokens=64, held_out_longest=32, held_out_samples=2)
    second = Workload(64, 64, 64, samples=1, held_out_tokens=4096, held_out_longest=512, held_out_samples=9)
    decides = predict(spec, SMOLLM2, (first, second), CPU).workload
    assert (decides.samples, decides.held_out_tokens, decides.held_out_samples) == (100, 4096, 9)
