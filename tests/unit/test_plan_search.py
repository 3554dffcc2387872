"""The search: what it keeps, what it gives up first, and what it says when nothing fits."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepeft.errors import DoesNotFit, UsageError
from edgepeft.plan.device import profile_device
from edgepeft.plan.search import Search, make_plan
from edgepeft.profiles import load_gpus, load_presets
from edgepeft.units import GIB, MIB
from plans import device, entry, request
from shapes import LLAMA_8B, SMOLLM2, llama_shape

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


def test_nothing_is_refused_for_samples_that_the_run_never_sees():
    short_run = {"lengths": [20] * 5000 + [6000], "samples_per_step": 1, "max_steps": 3}
    search = Search(request(**short_run))
    needed = search.count(search.leanest_of_all).memory.peak_bytes
    assert search.cost(search.smallest(search.target_length())).peak_bytes > 2 * needed
    plan = make_plan(request(round(1.1 * needed), **short_run))
    assert plan.spec.recipe.max_seq_len == 6000


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
        ("optimizer", "adamw8bit", lambda spec: spec.recipe.optimizer.name),
        ("lora_plus_ratio", 8.0, lambda spec: spec.recipe.optimizer.lora_plus_ratio),
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
        ("optimizer", "sgd"),
        ("lora_plus_ratio", 0.5),
        ("lora_plus_ratio", float("inf")),
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
            search.careful = False
            if not search.fits(search.smallest(search.least_length())):
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


@settings(max_examples=30, deadline=None)
@given(
    share=st.floats(0.0, 1.1),
    lengths=st.lists(st.integers(2, 1500), min_size=4, max_size=80),
    hidden=st.sampled_from([64, 128, 192]),
    preset=st.sampled_from(["quality", "balanced", "speed", "prototype"]),
)
def test_whatever_would_be_better_exceeds_the_budget(share, lengths, hidden, preset):
    base = entry(llama_shape(layers=3, hidden=hidden, intermediate=2 * hidden, heads=4, head_dim=hidden // 4))
    roomy = Search(request(1 << 50, lengths=lengths, preset=preset, base=base))
    least = roomy.count(roomy.leanest_of_all).safe_bytes
    most = roomy.count(roomy.choose()).safe_bytes
    budget = round(least * (max(most, least) / least) ** share) + 1
    plan = make_plan(request(budget, lengths=lengths, preset=preset, base=base))
    assert plan.memory.peak_bytes <= budget
    assert all(from_bytes > budget for from_bytes in plan.wants_more.values())


def test_with_room_for_everything_nothing_more_is_wanted():
    assert make_plan(request(64 * GIB, lengths=LENGTHS)).wants_more == {}


def test_what_more_memory_would_bring_is_what_a_larger_budget_gets():
    base = entry(LLAMA_8B)
    plan = make_plan(request(8 * GIB, lengths=[400] * 100, base=base))
    assert plan.wants_more
    for what, from_bytes in plan.wants_more.items():
        better = make_plan(request(from_bytes, lengths=[400] * 100, base=base))
        layouts = (plan.spec.layout, better.spec.layout)
        assert {
            "longer samples": better.spec.recipe.max_seq_len > plan.spec.recipe.max_seq_len,
            "a more exact base": better.spec.recipe.precision != plan.spec.recipe.precision,
            "a larger rank": better.spec.recipe.method.rank > plan.spec.recipe.method.rank
            or better.spec.recipe.precision != plan.spec.recipe.precision,
            "nothing computed twice": layouts[0] != layouts[1],
            "larger micro-batches": layouts[1].micro_batch_tokens > layouts[0].micro_batch_tokens,
            "larger pieces of the loss": layouts[1].loss_chunk_tokens > layouts[0].loss_chunk_tokens,
        }[what], what


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 900), min_size=1, max_size=40),
    cap=st.integers(16, 4000),
    checkpointing=st.sampled_from(["layer", "none"]),
    max_seq_len=st.integers(16, 1000),
)
def test_the_bound_is_never_below_what_is_counted(lengths, cap, checkpointing, max_seq_len):
    pins = {"micro_batch_tokens": cap, "checkpointing": checkpointing, "max_seq_len": max_seq_len}
    search = Search(request(1 << 50, lengths=lengths, base=entry(llama_shape()), **pins))
    lean = search.leanest(max_seq_len, "bf16", 8)
    bound = search.cost(lean)
    counted = search.count(lean).memory
    for above, below in zip(bound.phases, counted.phases, strict=True):
        assert above.total_bytes >= below.total_bytes


def pinned(spec, **changes):
    """The values that memory decides, as options that a user types."""
    recipe, layout = spec.recipe, spec.layout
    values = {
        "max_seq_len": recipe.max_seq_len,
        "precision": recipe.precision,
        "rank": recipe.method.rank,
        "micro_batch_tokens": layout.micro_batch_tokens,
        "checkpointing": layout.checkpointing,
        "loss_chunk_tokens": layout.loss_chunk_tokens,
    }
    return values | changes


def test_runner_ups_are_real_and_cost_what_they_say():
    plan = make_plan(request(24 * GIB, base=entry(LLAMA_8B), lengths=[900] * 200))
    assert plan.spec.layout.checkpointing == "none"
    names = [other.what for other in plan.alternatives]
    assert 3 <= len(names) <= 6
    assert len(set(names)) == len(names)
    other = next(other for other in plan.alternatives if other.what == "checkpointing")
    typed = request(24 * GIB, base=entry(LLAMA_8B), lengths=[900] * 200, **pinned(plan.spec, checkpointing="layer"))
    assert make_plan(typed).memory.peak_bytes == other.peak_bytes


def test_full_fine_tuning_is_named_where_it_fits_easily():
    def names(budget: int) -> list[str]:
        return [other.what for other in make_plan(request(budget, lengths=LENGTHS)).alternatives]

    assert "full fine-tuning" in names(20 * GIB)
    assert "full fine-tuning" not in names(2 * GIB)
    (full,) = (other for other in make_plan(request(20 * GIB, lengths=LENGTHS)).alternatives if "full" in other.what)
    assert full.why.endswith("--method full")
    assert full.peak_bytes > 16 * SMOLLM2.parameters
    plan = make_plan(request(20 * GIB, lengths=LENGTHS))
    layout = plan.spec.layout
    typed = make_plan(
        request(
            20 * GIB,
            lengths=LENGTHS,
            method="full",
            checkpointing="layer",
            micro_batch_tokens=layout.micro_batch_tokens,
            loss_chunk_tokens=layout.loss_chunk_tokens,
        )
    )
    assert typed.memory.peak_bytes == full.peak_bytes
    assert not any("full" in other.what for other in typed.alternatives)


def test_a_prediction_that_may_be_off_leaves_room_unless_nothing_else_fits():
    lengths = [300] * 100
    for budget in (300, 350, 450, 600, 900, 1500, 3000):
        try:
            plan = make_plan(request(budget * MIB, lengths=lengths))
        except DoesNotFit:
            continue
        roomy = plan.memory.peak_bytes * (1 + plan.memory.uncertainty) <= budget * MIB
        assert roomy != any("--verify" in note for note in plan.notes)
    search = Search(request(1 << 50, lengths=lengths))
    least = search.count(search.leanest_of_all).memory.peak_bytes
    tight = make_plan(request(least + 2000, lengths=lengths))
    assert any("--verify runs the step without values first" in note for note in tight.notes)
