"""Budgets that are kept: random tiny models, data and budgets; what fits is trained, what is refused is simulated.

A plan that is made trains three steps for real, with every micro-batch, the load and the evaluation watched and nothing
enforced: its live tensor bytes must stay within the budget. Where a plan used less than 70 % of it, everything that
would have been better must exceed the budget in a dry run. Where planning refuses, the dry run of the smallest plan
that was tried must exceed the budget.

`error` is the share of the budget by which a promise was broken: below 0 where more was used than promised, above 0
where a plan was refused that fits, 0 where all is well.
"""

import gc
import json
import os
import random
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import msgspec

from edgepeft.errors import DoesNotFit, EdgepeftError
from edgepeft.memory.dry_run import DryRunRequest
from edgepeft.plan.device import PlanDevice
from edgepeft.plan.lengths import SampleLengths
from edgepeft.plan.request import PlanRequest
from edgepeft.plan.search import Search
from edgepeft.plan.simulated import plan_for, read_config
from edgepeft.profiles import find_preset
from edgepeft.units import GIB

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tests"))

from tiny import write_tiny_model

CASES, QUICK_CASES = 300, 30
STEPS = 3
USED_SHARE = 0.70
"""Of the budget, where something better was left to choose."""


class Case(msgspec.Struct, frozen=True):
    """What is planned."""

    number: int
    model: dict
    """Changes to the tiny Llama's config."""
    lengths: list[int]
    """Characters of each answer, which are tokens of a byte-level tokenizer."""
    compute_dtype: str
    preset: str
    overrides: dict
    """What the user typed."""
    share: float
    """Where the budget lies: 0 is the smallest plan's peak, 1 that of the best plan, in powers."""
    eval_fraction: float

    def __str__(self):
        model = self.model
        typed = " ".join(f"{name}={value}" for name, value in self.overrides.items() if name != "max_steps")
        return (
            f"{self.number}: {model['num_hidden_layers']} layers of {model['hidden_size']}, vocabulary "
            f"{model['vocab_size']}, {len(self.lengths)} samples to {max(self.lengths)}, {self.compute_dtype}, "
            f"{self.preset} {typed}".rstrip()
        )


def measure(seed, quick, cases=None, progress=None):
    """One row a case.

    Args:
        seed: draws the cases.
        quick: fewer of them.
        cases: how many; None leaves it to `quick`.
        progress: told of each; None writes to stderr.
    """
    from accuracy.report import Progress

    count = cases or (QUICK_CASES if quick else CASES)
    progress = progress or Progress("budgets", count)
    rows = []
    with own_objects():
        for number in range(count):
            rows.append(check(draw(seed, number)))
            progress.step(rows[-1]["verdict"])
    return rows


@contextmanager
def own_objects():
    """Keeps the ledger, which asks the collector for tensors, from looking through all that libraries have made."""
    import edgepeft.engine.simulate
    import edgepeft.engine.training.loop  # noqa: F401 - all of it is to be imported before

    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def draw(seed, number):
    """A case; the same for the same seed and number, whatever the other cases are."""
    chance = random.Random(f"{seed}/{number}")
    head_dim = chance.choice((16, 32, 64))
    kv_heads = chance.choice((1, 2, 4))
    heads = kv_heads * chance.choice((1, 2, 4))
    hidden = chance.choice((64, 64, 128, 192))
    model = {
        "hidden_size": hidden,
        "intermediate_size": 64 * chance.randint(hidden // 64, hidden // 24),
        "num_hidden_layers": chance.randint(1, 4),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": chance.choice((260, 1000, 4000, 16000)),
        "max_position_embeddings": 2048,
        "tie_word_embeddings": chance.random() < 0.5,
        "torch_dtype": "float32",
    }
    typical, longest = chance.choice((10, 30, 80)), chance.choice((60, 150, 400))
    samples = chance.choice((6, 14, 30))
    lengths = [min(longest, 1 + int(chance.expovariate(1 / typical))) for _ in range(samples - 1)] + [longest]
    overrides = {"max_steps": STEPS}
    if chance.random() < 0.7:
        overrides["samples_per_step"] = chance.choice((1, 2, 4, 8))
    typed = chance.choice(("", "", "", "rank", "precision", "checkpointing", "max_seq_len", "overlong", "targets"))
    values = {
        "rank": chance.choice((1, 4, 24)),
        "precision": chance.choice(("nf4", "int8", "bf16")),
        "checkpointing": chance.choice(("none", "layer")),
        "max_seq_len": chance.randint(64, 500),
        "overlong": "drop",
        "targets": "q_proj,v_proj",
    }
    if typed:
        overrides[typed] = values[typed]
    return Case(
        number=number,
        model=model,
        lengths=lengths,
        compute_dtype=chance.choice(("fp32", "bf16")),
        preset=chance.choice(("quality", "balanced", "speed", "prototype")),
        overrides=overrides,
        share=chance.uniform(-0.4, 1.3),
        eval_fraction=chance.choice((0.0, 0.1, 0.3)),
    )


def check(case):
    """The row of a case, made in a folder of its own."""
    before = os.environ.get("EDGEPEFT_HOME")
    with tempfile.TemporaryDirectory(prefix="edgepeft-budget-") as folder:
        os.environ["EDGEPEFT_HOME"] = str(Path(folder) / "home")
        try:
            found = _check(case, Path(folder))
        except EdgepeftError as error:
            # Such as data without a single token to train on: nothing was promised.
            found = {"verdict": "not planned", "error": None, "kept": True, "reason": str(error)}
        finally:
            if before is None:
                os.environ.pop("EDGEPEFT_HOME")
            else:
                os.environ["EDGEPEFT_HOME"] = before
    gc.collect()
    return {"case": str(case), **found}


def _check(case, folder):
    simulate = remembered()
    request, least, most = _request(case, folder)
    budget = round(least * (most / least) ** case.share) if most > least else round(least * 2**case.share)
    request = msgspec.structs.replace(request, budget_bytes=budget)
    try:
        plan = plan_for(request, simulate)
    except DoesNotFit:
        return _check_refusal(request, simulate)
    measured, place = train(plan, folder)
    share = measured / budget
    row = {
        "verdict": "fits",
        "plan": _words(plan.spec),
        "budget_bytes": budget,
        "predicted_bytes": plan.memory.peak_bytes,
        "measured_bytes": measured,
        "place": place,
        "share": share,
        "error": -max(0.0, share - 1),
        "kept": share <= 1,
        "reason": "" if share <= 1 else f"used {share:.1%} of the budget, at {place}",
        "wants": list(plan.wants_more),
    }
    if share < USED_SHARE and plan.wants_more and (left := better_that_fits(request, plan, simulate)):
        return row | {"kept": False, "reason": f"used {share:.0%} of the budget; {left} fits, too"}
    return row


def _request(case, folder):
    """What is planned, still without a budget, and the peaks of the smallest and of the best plan."""
    from edgepeft.data.prepare import describe_data, prepare
    from edgepeft.models.store import add_model

    entry = add_model(write_tiny_model(folder / "model", seed=case.number, **case.model))
    chance = random.Random(case.number)
    lines = [
        {"prompt": f"Sample {number}", "completion": "".join(chance.choices("abcdefgh ", k=length)).strip() or "a"}
        for number, length in enumerate(case.lengths)
    ]
    data = folder / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    reference = describe_data(data, eval_fraction=case.eval_fraction)
    prepared = prepare(reference, Path(entry.folder))
    device = PlanDevice("cpu", "cpu", "cpu", 1 << 50, 1 << 50, "drawn", case.compute_dtype, "drawn")
    request = PlanRequest(
        entry,
        find_preset(case.preset),
        device,
        1024 * GIB,
        reference,
        SampleLengths(prepared.train, prepared.held_out),
        dict(case.overrides),
    )
    search = Search(request)
    least = search.count(search.smallest(search.least_length())).memory.peak_bytes
    return request, least, search.count(search.choose()).memory.peak_bytes


def _words(spec):
    recipe, layout = spec.recipe, spec.layout
    return (
        f"{recipe.precision}, rank {recipe.method.rank}, {recipe.max_seq_len} tokens, micro-batches of "
        f"{layout.micro_batch_tokens}, checkpointing {layout.checkpointing}, chunks of {layout.loss_chunk_tokens}"
    )


def remembered():
    """The dry run, asked only once for each step."""
    from edgepeft.engine.simulate import dry_run

    answers = {}

    def simulate(request):
        question = msgspec.json.encode(request)
        if question not in answers:
            answers[question] = dry_run(request)
        return answers[question]

    return simulate


def _check_refusal(request, simulate):
    """Whether the dry run of the smallest plan that was tried exceeds the budget."""
    search = Search(request)
    smallest = search.smallest(search.least_length())
    needed = simulated_bytes(request, search, smallest, simulate)
    budget = request.budget_bytes
    wrong = needed <= budget
    return {
        "verdict": "refused",
        "budget_bytes": budget,
        "predicted_bytes": search.count(smallest).memory.peak_bytes,
        "measured_bytes": needed,
        "share": needed / budget,
        "error": max(0.0, 1 - needed / budget),
        "kept": not wrong,
        "reason": f"refused, but {smallest} needs {needed / budget:.1%} of the budget" if wrong else "",
    }


def simulated_bytes(request, search, candidate, simulate):
    """The peak of a candidate's dry run."""
    workload, config = search.count(candidate).workload, read_config(Path(request.entry.folder))
    return simulate(DryRunRequest(search.spec(candidate), config, workload, request.device.target)).memory.peak_bytes


def better_that_fits(request, plan, simulate):
    """What would have been better than the plan and fits in a dry run, in words; empty where there is nothing.

    Quality goes before speed: a longer limit in the leanest layout with the least precision and rank, then the next
    precision, then the next rank, each in the leanest layout, then the layout.
    """
    search = Search(request)
    recipe, layout = plan.spec.recipe, plan.spec.layout
    better, faster = {}, {}
    if (target := search.target_length()) > recipe.max_seq_len:
        longer = min(target, recipe.max_seq_len + max(16, recipe.max_seq_len // 8))
        better[f"a limit of {longer} tokens"] = search.smallest(longer)
    if recipe.precision != search.precisions[0]:
        exact = search.precisions[search.precisions.index(recipe.precision) - 1]
        better[f"precision {exact}"] = search.leanest(recipe.max_seq_len, exact, search.ranks[-1])
    if recipe.method.rank != search.ranks[0]:
        larger = search.ranks[search.ranks.index(recipe.method.rank) - 1]
        better[f"rank {larger}"] = search.leanest(recipe.max_seq_len, recipe.precision, larger)
    lean = search.leanest(recipe.max_seq_len, recipe.precision, recipe.method.rank)
    chosen = msgspec.structs.replace(
        lean,
        micro_batch_tokens=layout.micro_batch_tokens,
        checkpointing=layout.checkpointing,
        loss_chunk_tokens=layout.loss_chunk_tokens,
    )
    if layout.checkpointing == "layer" and "checkpointing" not in request.overrides:
        faster["no checkpointing"] = msgspec.structs.replace(lean, checkpointing="none")
    sizes = [tokens for tokens in search.micro_batches(lean) if tokens > layout.micro_batch_tokens]
    for tokens in sizes[:: max(1, len(sizes) // 4)]:  # the next size need not hold another sample
        faster[f"micro-batches of {tokens} tokens"] = msgspec.structs.replace(chosen, micro_batch_tokens=tokens)
    speed = search.speed(chosen)
    better |= {what: candidate for what, candidate in faster.items() if search.speed(candidate) > speed}
    for what, candidate in better.items():
        if simulated_bytes(request, search, candidate, simulate) <= request.budget_bytes:
            return what
    return ""


def train(plan, folder):
    """Trains a plan as a worker does, with every micro-batch watched and no budget in force.

    Returns:
        The highest live tensor bytes, and where they were.
    """
    from edgepeft.engine.training.loop import run_training
    from edgepeft.engine.training.memory import MemoryGauge
    from edgepeft.engine.training.stopping import StopRequests
    from edgepeft.runs.events import Finished
    from edgepeft.runs.layout import create_run

    unlimited = msgspec.structs.replace(plan, spec=msgspec.structs.replace(plan.spec, budget_bytes=None))
    run = create_run(unlimited, "case")
    events = []
    kept = MemoryGauge.wants, MemoryGauge.wants_evaluation
    MemoryGauge.wants = MemoryGauge.wants_evaluation = lambda gauge, *size: True
    try:
        run_training(run, events.append, StopRequests(run))
    finally:
        MemoryGauge.wants, MemoryGauge.wants_evaluation = kept
    finished = next(event for event in events if isinstance(event, Finished))
    assert finished.step == min(STEPS, plan.steps), f"{finished.step} steps instead of {plan.steps}"
    return finished.measured_peak_bytes, getattr(finished, "measured_place", "")
