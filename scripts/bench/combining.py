"""What combined and merged adapters still know: the demo's three systems, each alone and put together.

    python scripts/bench/combining.py [--precision nf4] [--epochs 2] [--seed 0] [--limit N] [--model NAME] [--json FILE]

Trains one adapter on each of the demo's three sets of alerts, combines them by every `--how`, and asks everything the
held-out alerts of all three systems: alerts in wordings that none was trained on. Then each adapter is merged into its
base, `dequantized` and `original`, and the merged model's answers are compared with those of the adapter beside its
base, word for word. Needs the embedded model's wheel unless --model is given.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from command_line import edgepeft

HOWS = {
    "exact, each at 1": ("compose", 1.0, "--how", "exact"),
    "exact, each at 1/3": ("compose", 1 / 3, "--how", "exact"),
    "svd, rank 16": ("compose", 1.0, "--how", "svd", "--rank", "16"),
    "linear": ("compose", 1.0, "--how", "linear"),
    "ties": ("compose", 1.0, "--how", "ties"),
    "dare": ("compose", 1.0, "--how", "dare"),
    "average by samples": ("average", None, "--by", "samples"),
}
"""What is compared: the verb, each adapter's weight, and options."""
ANSWER_TOKENS = 80
"""Longer than any right answer."""


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--precision", default="nf4")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--samples-per-step", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="held-out alerts of each system that are asked, at the most")
    parser.add_argument("--json", metavar="FILE", help="write all figures")
    return parser.parse_args(arguments)


def train(task, system, file):
    edgepeft(
        *("train", task.model, file, "--name", system, "--precision", task.precision, "--rank", 16),
        *("--learning-rate", 1e-3, "--epochs", task.epochs, "--samples-per-step", task.samples_per_step),
        *("--micro-batch-tokens", 1024, "--eval-every", 0, "--seed", task.seed),
    )


def ask(task, held_out, *who):
    """The evaluation of each system's held-out alerts."""
    limit = ["--limit", task.limit] if task.limit else []
    return {
        system: edgepeft("eval", *who, "--data", file, "--max-new-tokens", ANSWER_TOKENS, *limit)
        for system, file in held_out.items()
    }


def scores(found):
    return {system: {key: result[key] for key in ("field_accuracy", "loss")} for system, result in found.items()}


def combine(name, systems, verb, weight, *options):
    parts = [system if weight is None else f"{system}={weight:.6f}" for system in systems]
    edgepeft("adapters", verb, *parts, "--name", name, *options)


def agreement(first, second):
    """Share of equal answers, over all systems."""
    pairs = [
        (a["answer"], b["answer"])
        for system in first
        for a, b in zip(first[system]["rows"], second[system]["rows"], strict=True)
    ]
    return sum(a == b for a, b in pairs) / len(pairs)


def merge(task, folder, system, into, held_out, beside):
    """One adapter merged: its drift, and whether the model answers as the adapter beside its base."""
    out = Path(folder) / f"{system}-{into}"
    # Kept beyond the limit, too: what such a model answers is what is asked here.
    done = edgepeft("adapters", "merge", system, "--into", into, "--out", out, "--limit", 1e9)
    name = f"merged-{system}-{into}"
    edgepeft("models", "add", out, "--name", name)
    own = {system: held_out[system]}
    found = ask(task, own, name, "--precision", done["dtype"])
    return {
        "adapter": system,
        "into": into,
        "dtype": done["dtype"],
        "mean_kl": done["drift"]["mean_kl"],
        "same_likeliest_token": done["drift"]["top1_agreement"],
        "same_answers": agreement({system: beside[system]}, found),
        "field_accuracy": found[system]["field_accuracy"],
        "beside_its_base": beside[system]["field_accuracy"],
    }


def show(result):
    """The tables, as scripts/bench/README.md keeps them."""
    systems = list(result["combined"][0]["scores"])
    print(f"| fields right | {' | '.join(systems)} |")
    print("|---|" + "---|" * len(systems))
    for row in result["combined"]:
        cells = [f"{row['scores'][system]['field_accuracy']:.1%}" for system in systems]
        print(f"| {row['name']} | {' | '.join(cells)} |")
    print("\n| adapter | merged into | mean KL | same likeliest token | same answers | fields right (beside base) |")
    print("|---|---|---|---|---|---|")
    for row in result["merged"]:
        print(
            f"| {row['adapter']} | {row['into']}, {row['dtype']} | {row['mean_kl']:.2g} | "
            f"{row['same_likeliest_token']:.1%} | {row['same_answers']:.1%} | "
            f"{row['field_accuracy']:.1%} ({row['beside_its_base']:.1%}) |"
        )


def main(arguments):
    task = parse(arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from edgepeft.demo.alerts import write_data

    result = {"task": vars(task), "combined": [], "merged": []}

    def keep(kind, row):
        result[kind].append(row)
        print(f"{row.get('name') or row['adapter'] + ', ' + row['into']}: done", file=sys.stderr)
        if task.json:
            Path(task.json).write_text(json.dumps(result, indent=2))

    with tempfile.TemporaryDirectory() as folder:
        # A home of its own: nothing of this machine's user takes part.
        os.environ["EDGEPEFT_HOME"] = str(Path(folder) / "home")
        files = write_data(Path(folder) / "data", task.seed)
        held_out = {system: pair[1] for system, pair in files.items()}
        for system, (train_file, _) in files.items():
            train(task, system, train_file)
        precision = ("--precision", task.precision)
        keep("combined", {"name": "the base", "scores": scores(ask(task, held_out, task.model, *precision))})
        beside = {}
        for system in files:
            found = ask(task, held_out, "--adapter", system)
            beside[system] = found[system]
            keep("combined", {"name": f"{system} alone", "scores": scores(found)})
        for number, (name, how) in enumerate(HOWS.items()):
            combine(f"combined-{number}", files, *how)
            found = ask(task, held_out, "--adapter", f"combined-{number}")
            keep("combined", {"name": name, "scores": scores(found)})
        for system in files:
            for into in ("dequantized", "original"):
                keep("merged", merge(task, folder, system, into, held_out, beside))
    show(result)


if __name__ == "__main__":
    main(sys.argv[1:])
