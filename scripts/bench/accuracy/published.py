"""Figures that others published for runs on their cards, against a simulation of what they ran.

`published_rows.toml` says which rows are usable, what was run and which number was read; it was fixed before any error
was known. `error` is 0 where the prediction lies in the interval that the figure was rounded from, else its distance
from the interval's nearest end as a share of the figure, signed; `error_to_figure` is predicted / figure - 1. No row is
tuned: what is simulated follows from the columns and the file alone.
"""

import csv
import random
import re
import tomllib
from decimal import Decimal, InvalidOperation
from pathlib import Path

from accuracy.report import Progress

RULES = Path(__file__).with_name("published_rows.toml")
UNITS = {"GB": 10**9, "GiB": 2**30}
COLUMNS = (
    "source", "model", "method", "bits_quant", "lora_rank", "lora_targets", "seq_len", "seq_mode", "micro_batch", "gpu",
    "value_GB_as_printed", "notes", "source_path",
)  # fmt: skip
"""What is read of a figure's row."""
EQUAL_STEPS = 3
"""Micro-batches of equal length that are played: the first has no optimizer state yet, the last finds caches warm."""
MIXED_STEPS, SHORTEST = 16, 64
"""Micro-batches before the longest one where lengths vary, and the shortest of them in tokens."""
DEFAULTS = {
    "full": False,
    "targets": "",
    "rank": None,
    "nf4": None,
    "seq_len": None,
    "micro_batch": None,
    "template_layer": False,
    "table_in_each_layer": False,
}


def measure(seed, quick, csv_path):
    """One row for each of the file's; those without a figure to compare have `error` None and a `reason`.

    Args:
        seed: draws the lengths of the batches before the longest one, and the sample.
        quick: a third of the rows, drawn from the seed.
        csv_path: a file with `COLUMNS`.

    Raises:
        SystemExit: the file lacks columns.
    """
    rules = tomllib.loads(RULES.read_text(encoding="utf-8"))
    with Path(csv_path).open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
        if missing:
            raise SystemExit(f"{csv_path}: the columns {', '.join(missing)} are missing")
        figures = [{column: row[column] or "" for column in COLUMNS} for row in reader]
    plans = [plan_of(figure, rules) for figure in figures]
    pairs = list(zip(figures, plans, strict=True))
    if quick:
        pairs = _third(pairs, seed)
    progress = Progress("published", sum(plan.technique is not None for _, plan in pairs))
    known, rows = {}, []
    for figure, plan in pairs:
        if plan.technique is None:
            rows.append(told(figure, plan, plan.reason))
        else:
            rows.append(simulated(figure, plan, seed, known))
            progress.step(plan.case)
    return rows


def _third(pairs, seed):
    """A third of the usable rows and a third of the others, so that coverage stays what it is."""
    chosen = set()
    for is_usable in (True, False):
        places = [at for at, (_, plan) in enumerate(pairs) if (plan.technique is not None) == is_usable]
        chosen.update(random.Random(seed).sample(places, -(-len(places) // 3)))
    return [pair for at, pair in enumerate(pairs) if at in chosen]


def simulated(figure, plan, seed, known):
    """The row of a plan that something is simulated for."""
    try:
        predicted = predict(plan, seed, known)
    except (RuntimeError, ValueError) as error:
        return told(figure, plan, f"it could not be simulated: {error}")
    return compared(figure, plan, predicted)


class Plan:
    """What a row's rule makes of it."""

    def __init__(self, case):
        self.case = case
        self.reason = "no rule knows this row"
        """Why nothing is simulated; None where something is."""
        self.why = ""
        self.technique = None
        self.shape = None
        self.metric = ""
        self.unit = 1
        self.card = {}


def plan_of(figure, rules):
    """What the first rule that matches a figure's row says; without one, the row is not covered."""
    length = f" {figure['seq_len']}" if figure["seq_len"] else ""
    variant = figure["notes"].split(";")[0] if "wiki" in figure["source"] else figure["lora_targets"]
    plan = Plan(" ".join(f"{figure['source']} {figure['model']} {figure['method']}{length} {variant}".split()))
    rule = next((rule for rule in rules["rules"] if _matches(rule["match"], figure)), None)
    if rule is None:
        return plan
    plan.why = " ".join(rule.get("why", "").split())
    if not rule.get("usable", True):
        plan.reason = plan.why
        return plan
    plan.shape = rules["models"].get(figure["model"])
    if plan.shape is None:
        plan.reason = f"the shape of {figure['model']} is not in {RULES.name}"
        return plan
    technique = {**DEFAULTS, **_technique(rule["technique"], rules["techniques"])}
    given = {
        "nf4": re.match(r"(nf|int)?4\b", figure["bits_quant"].lower()) is not None,
        "rank": _whole(figure["lora_rank"]),
        "seq_len": _whole(figure["seq_len"]),
        "micro_batch": _whole(figure["micro_batch"]),
    }
    technique.update({key: value for key, value in given.items() if technique[key] is None})
    lacking = [key for key in ("seq_len", "micro_batch") if not technique[key]]
    if technique["targets"] and not technique["rank"]:
        lacking.append("rank")
    if lacking:
        plan.reason = f"its {' and '.join(lacking)} are not known"
        return plan
    plan.technique, plan.reason = technique, None
    plan.metric, plan.unit = rule["metric"], UNITS[rule["unit"]]
    plan.card = rules["cards"].get(figure["gpu"], {})
    return plan


def _matches(patterns, figure):
    return all(re.fullmatch(pattern, figure[column]) for column, pattern in patterns.items())


def _technique(own, known):
    fields = dict(own)
    name = fields.pop("as", None)
    inherited = _technique(known[name], known) if name else {}
    fields.pop("about", None)
    return {**inherited, **fields}


def _whole(text):
    found = re.match(r"\d+", text)
    return int(found.group()) if found else None


def predict(plan, seed, known):
    """Bytes of the plan's metric; `known` keeps simulations that rows share."""
    from accuracy.published_step import Step
    from edgepeft.memory.target import Target
    from edgepeft.memory.unseen import unseen_bytes

    target = Target("cuda", tuple(plan.card["capability"]) if "capability" in plan.card else None)
    technique = plan.technique
    # Graphs are compiled for one length; everything else is recorded once for all lengths.
    decisive = {key: value for key, value in technique.items() if technique["compiled"] or key != "seq_len"}
    key = repr((sorted(decisive.items()), sorted(plan.shape.items())))
    if key not in known:
        known[key] = Step(plan.shape, technique)
    lengths = [technique["seq_len"]] * EQUAL_STEPS
    if technique["lengths"] == "up to the longest":
        draw = random.Random(seed)
        lengths = [draw.randint(SHORTEST, technique["seq_len"]) for _ in range(MIXED_STEPS)] + lengths[:1]
    allocator = known[key].play(lengths, target)
    if plan.metric == "active":
        return allocator.peak_allocated_bytes
    outside = unseen_bytes(target, in_allocator=False) if plan.metric == "nvidia-smi" else 0
    return allocator.peak_reserved_bytes + outside


def compared(figure, plan, predicted):
    """The row of a prediction and its figure."""
    printed = figure["value_GB_as_printed"].strip()
    row = told(figure, plan, None)
    row["predicted_bytes"] = predicted
    value = _figure(printed)
    if value is None:
        most = plan.card.get("bytes")
        row["reason"] = f"{printed or 'an empty cell'} is no figure"
        if printed == "OOM" and most is not None:
            row["holds"] = predicted > most
            row["reason"] = f"OOM, and the prediction is {'more' if predicted > most else 'less'} than the card has"
        return row
    half = Decimal(1).scaleb(value.as_tuple().exponent) / 2
    low, measured, high = (int(bound * plan.unit) for bound in (value - half, value, value + half))
    distance = min(0, predicted - low) + max(0, predicted - high)
    return {
        **row,
        "low_bytes": low,
        "high_bytes": high,
        "measured_bytes": measured,
        "error": distance / measured,
        "error_to_figure": predicted / measured - 1,
        "covered": True,
    }


def _figure(printed):
    try:
        value = Decimal(printed)
    except InvalidOperation:
        return None
    return value if value.is_finite() and value > 0 else None


def told(figure, plan, reason):
    """A row without a comparison."""
    return {
        "case": plan.case,
        "source": figure["source"],
        "model": figure["model"],
        "method": figure["method"],
        "technique": plan.technique,
        "metric": plan.metric,
        "printed": figure["value_GB_as_printed"],
        "predicted_bytes": None,
        "low_bytes": None,
        "high_bytes": None,
        "measured_bytes": None,
        "error": None,
        "error_to_figure": None,
        "covered": False,
        "why": plan.why,
        "reason": reason,
    }
