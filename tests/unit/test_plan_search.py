"""The search: what it keeps, what it gives up first, and what it says when nothing fits."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepeft.errors import DoesNotFit, UsageError
from edgepeft.models.shape import ModelShape
from edgepeft.models.store import ModelEntry
from edgepeft.plan.device import PlanDevice, profile_device
from edgepeft.plan.lengths import SampleLengths
from edgepeft.plan.search import PlanRequest, Search, make_plan
from edgepeft.profiles import find_preset, load_gpus, load_presets
from edgepeft.spec import DataRef
from edgepeft.units import GIB, MIB
from shapes import LLAMA_8B, SMOLLM2, llama_shape

DATA = DataRef("/data/x.jsonl", "sha256:1", "alpaca")


class Table:
    """The part of a token table that plans read."""

    def __init__(self, lengths: Any, trained: Any = None) -> None:
        self.lengths = np.asarray(lengths, np.int32)
        self.trained = self.lengths // 2 if trained is None else trained

    def limited(self, max_seq_len: int, overlong: str) -> Table:
        if overlong == "drop":
            kept = self.lengths <= max_seq_len
            return Table(self.lengths[kept], self.trained[kept])
        return Table(self.lengths.clip(max=max_seq_len), self.trained.clip(max=max_seq_len))


def entry(shape: ModelShape = SMOLLM2, **changes: Any) -> ModelEntry:
    values: dict[str, Any] = {
        "name": "base",
        "kind": "folder",
        "folder": "/m",
        "weights": "/m",
        "source": "/m",
        "fingerprint": "sha256:2",
        "shape": shape,
        "stored_as": "bf16",
        "weights_bytes": 1,
        "licence": None,
        "notes": (),
        "added": "2026-01-01T00:00:00+00:00",
    }
    return ModelEntry(**values | changes)


def device(kind: Any = "cpu", **changes: Any) -> PlanDevice:
    made = PlanDevice(kind, kind, kind, 64 * GIB, 32 * GIB, "all", "bf16", "it has it")
    return msgspec.structs.replace(made, **changes)


def request(
    budget: int = 8 * GIB,
    *,
    lengths: Any = None,
    preset: str = "balanced",
    base: ModelEntry | None = None,
    **overrides: Any,
) -> PlanRequest:
    on = overrides.pop("on", device())
    known = None if lengths is None else SampleLengths(Table(lengths), Table([40, 50]))
    return PlanRequest(base or entry(), find_preset(preset), on, budget, DATA if known else None, known, overrides)


LENGTHS = [100] * 90 + [400] * 9 + [1500]


def test_everything_fits_when_there_is_room():
    plan = make_plan(request(lengths=LENGTHS))
    recipe = plan.spec.recipe
    assert (recipe.max_seq_len, recipe.precision, recipe.method.rank) == (1500, "bf16", 16)
    assert recipe.method.alpha == 32
    assert plan.spec.layout.checkpointing == "none"
    assert plan.data is not None
    assert plan.data.overlong == 0
    assert plan.memory.peak_bytes <= 8 * GIB
    assert plan.steps == 25 * 4


def test_samples_stay_whole_before_precision_before_rank():
    base = entry(LLAMA_8B)
    found = []
    for budget in (24, 12, 10, 8):
        plan = make_plan(request(budget * GIB, lengths=[3000] * 100, base=base, preset="quality"))
        found.append((plan.spec.recipe.max_seq_len, plan.spec.recipe.precision, plan.spec.recipe.method.rank))
    precisions = ["bf16", "int8", "nf4"]
    assert [length for length, _, _ in found[:3]] == [3000, 3000, 3000]
    places = [precisions.index(precision) for _, precision, _ in found]
    assert places == sorted(places)
    assert found[0][1] == "bf16"
    assert found[-1][1] == "nf4"


def test_length_gives_way_last_and_is_told():
    base = entry(LLAMA_8B)
    plan = make_plan(request(7 * GIB, lengths=[200] * 95 + [8000] * 5, base=base))
    recipe = plan.spec.recipe
    assert recipe.precision == "nf4"
    assert recipe.method.rank == 8
    assert 256 <= recipe.max_seq_len < 8000
    assert plan.data is not None
    assert plan.data.overlong == 5
    assert any("5 of 100 training samples are cut" in note for note in plan.notes)
    search = Search(request(7 * GIB, lengths=[200] * 95 + [8000] * 5, base=base))
    longer = search.smallest(recipe.max_seq_len + 128)
    assert not search.fits(longer)


def test_refusal_says_by_how_much_and_what_helps():
    with pytest.raises(DoesNotFit) as refusal:
        make_plan(request(3 * GIB, base=entry(LLAMA_8B), lengths=LENGTHS))
    text = str(refusal.value)
    assert "more than the budget of 3.00 GiB" in text
    assert "smaller model" in text
    assert "budget of" in text


def test_the_budget_it_names_is_enough():
    with pytest.raises(DoesNotFit) as refusal:
        make_plan(request(3 * GIB, base=entry(LLAMA_8B), lengths=LENGTHS))
    named = float(refusal.value.hint.split("a budget of ")[1].split(" GiB")[0])
    make_plan(request(round((named + 0.005) * GIB), base=entry(LLAMA_8B), lengths=LENGTHS))


def test_refusal_names_the_option_that_stands_in_the_way():
    with pytest.raises(DoesNotFit) as refusal:
        make_plan(request(8 * GIB, base=entry(LLAMA_8B), lengths=LENGTHS, precision="bf16"))
    assert "leaving out --precision (it fits with nf4)" in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("rank", 4, lambda spec: spec.recipe.method.rank),
        ("alpha", 3.0, lambda spec: spec.recipe.method.alpha),
        ("targets", ("q_proj", "v_proj"), lambda spec: spec.recipe.method.targets),
        ("dropout", 0.1, lambda spec: spec.recipe.method.dropout),
        ("precision", "nf4", lambda spec: spec.recipe.precision),
        ("compute_dtype", "fp32", lambda spec: spec.recipe.compute_dtype),
        ("max_seq_len", 300, lambda spec: spec.recipe.max_seq_len),
        ("overlong", "drop", lambda spec: spec.recipe.overlong),
        ("micro_batch_tokens", 700, lambda spec: spec.layout.micro_batch_tokens),
        ("checkpointing", "layer", lambda spec: spec.layout.checkpointing),
        ("loss_chunk_tokens", 33, lambda spec: spec.layout.loss_chunk_tokens),
        ("samples_per_step", 5, lambda spec: spec.recipe.samples_per_step),
        ("epochs", 1.5, lambda spec: spec.recipe.epochs),
        ("max_steps", 7, lambda spec: spec.recipe.max_steps),
        ("learning_rate", 1e-5, lambda spec: spec.recipe.optimizer.learning_rate),
        ("weight_decay", 0.01, lambda spec: spec.recipe.optimizer.weight_decay),
        ("warmup", 0.2, lambda spec: spec.recipe.schedule.warmup_fraction),
        ("schedule", "linear", lambda spec: spec.recipe.schedule.name),
        ("seed", 9, lambda spec: spec.recipe.seed),
        ("eval_every", 3, lambda spec: spec.upkeep.eval_every_steps),
    ],
)
def test_what_is_typed_is_kept_and_marked(name, value, read):
    plan = make_plan(request(lengths=LENGTHS, **{name: value}))
    assert read(plan.spec) == value
    origins = {choice.what: choice.origin for choice in plan.choices}
    assert origins[name.replace("_", "-")] == "user"
    assert list(origins.values()).count("user") == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rank", 0),
        ("rank", -3),
        ("rank", 5000),
        ("alpha", float("nan")),
        ("dropout", 1.0),
        ("max_seq_len", 1),
        ("micro_batch_tokens", 0),
        ("samples_per_step", 0),
        ("epochs", 0.0),
        ("learning_rate", -1.0),
        ("precision", "int3"),
        ("checkpointing", "some"),
        ("targets", "nonsense"),
        ("targets", " , "),
        ("max_steps", 0),
        ("warmup", 1.5),
    ],
)
def test_nonsense_is_one_clear_line(name, value):
    with pytest.raises(UsageError) as error:
        make_plan(request(lengths=LENGTHS, **{name: value}))
    assert name.replace("_", "-") in str(error.value)
    assert "\n" not in str(error.value)


def test_length_above_the_context_is_limited_and_noted():
    plan = make_plan(request(lengths=LENGTHS, max_seq_len=100_000))
    assert plan.spec.recipe.max_seq_len == SMOLLM2.context_length
    assert any("limited to the model's context" in note for note in plan.notes)


def test_micro_batch_below_the_longest_sample_is_counted_for_the_longest():
    plan = make_plan(request(lengths=LENGTHS, micro_batch_tokens=64))
    assert any("memory is counted for the longest" in note for note in plan.notes)


def test_without_data_the_preset_gives_the_length():
    plan = make_plan(request())
    assert plan.spec.recipe.max_seq_len == 2048
    assert plan.data is None
    assert plan.steps == 0


@pytest.mark.parametrize(("stored", "only"), [("bnb-4bit", "nf4"), ("bnb-8bit", "int8")])
def test_a_quantized_base_is_used_as_it_is(stored, only):
    base = entry(stored_as=stored)
    assert make_plan(request(lengths=LENGTHS, base=base)).spec.recipe.precision == only
    with pytest.raises(UsageError, match="stored quantized"):
        make_plan(request(lengths=LENGTHS, base=base, precision="bf16"))


def test_nf4_on_the_embedded_model_says_what_it_costs():
    base = entry(kind="embedded")
    assert any("30.8 to 39.0" in note for note in make_plan(request(lengths=LENGTHS, base=base, precision="nf4")).notes)
    assert not any("30.8 to 39.0" in note for note in make_plan(request(lengths=LENGTHS, base=base)).notes)


@pytest.mark.parametrize(("compute", "dense"), [("fp16", "fp16"), ("fp32", "fp32"), ("bf16", "bf16")])
def test_dense_base_takes_the_dtype_of_the_products(compute, dense):
    plan = make_plan(request(lengths=LENGTHS, on=device(compute_dtype=compute)))
    assert plan.spec.recipe.precision == dense


def test_small_data_gets_more_passes_and_fewer_samples_a_step():
    small, large = (make_plan(request(lengths=[100] * count)).spec.recipe for count in (60, 20_000))
    assert small.epochs > large.epochs
    assert small.samples_per_step < large.samples_per_step


def test_learning_rate_suits_the_width():
    rates = [
        make_plan(request(32 * GIB, lengths=LENGTHS, base=entry(shape))).spec.recipe.optimizer.learning_rate
        for shape in (LLAMA_8B, SMOLLM2)
    ]
    assert rates[0] == pytest.approx(2e-4)
    assert rates[1] == pytest.approx(1e-3, rel=0.01)


def test_alternatives_say_truly_whether_they_fit():
    plan = make_plan(request(12 * GIB, base=entry(LLAMA_8B), lengths=[2000] * 200))
    assert plan.alternatives
    for other in plan.alternatives:
        assert other.fits == (other.peak_bytes <= 12 * GIB)
        assert ("too much" in other.why) == (not other.fits)


@pytest.mark.parametrize("preset", ["quality", "balanced", "speed", "prototype"])
def test_every_card_gets_a_plan_within_its_memory_or_a_clear_refusal(preset):
    assert preset in load_presets()
    for card in load_gpus().values():
        on = profile_device(card)
        for base in (entry(LLAMA_8B), entry(SMOLLM2)):
            asked = request(on.budget_bytes, on=on, base=base, lengths=LENGTHS, preset=preset)
            search = Search(asked)
            if not search.fits(search.smallest(256)):
                with pytest.raises(DoesNotFit, match="more than the budget"):
                    make_plan(asked)
                assert base.shape is LLAMA_8B
                continue
            plan = make_plan(asked)
            assert plan.memory.peak_bytes <= on.budget_bytes
            assert plan.spec.device == card.id
            if not card.bf16:
                assert plan.spec.recipe.compute_dtype == "fp16"


@settings(max_examples=40, deadline=None)
@given(
    budget_mib=st.integers(4, 400),
    lengths=st.lists(st.integers(2, 3000), min_size=1, max_size=60),
    layers=st.integers(1, 8),
    preset=st.sampled_from(["quality", "balanced", "speed", "prototype"]),
    kind=st.sampled_from(["cpu", "cuda"]),
)
def test_a_plan_never_exceeds_its_budget(budget_mib, lengths, layers, preset, kind):
    asked = request(
        budget_mib * MIB, lengths=lengths, preset=preset, on=device(kind), base=entry(llama_shape(layers=layers))
    )
    try:
        plan = make_plan(asked)
    except DoesNotFit:
        search = Search(asked)
        least = min(search.target_length(), asked.preset.min_seq_len.value)
        assert search.cost(search.smallest(least)).peak_bytes > asked.budget_bytes
        return
    assert plan.memory.peak_bytes <= asked.budget_bytes
    assert plan.spec.recipe.max_seq_len <= max(max(lengths), 2)
