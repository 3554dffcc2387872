"""Every PEFT method on one data set: what it trains, how fast, in how much memory, and what it learns.

    python scripts/bench/methods.py [--methods NAME …] [--precisions bf16 nf4] [--epochs 2] [--seed 0] [--limit N]
        [--rounds 3] [--model NAME] [--json FILE]

Each row is a whole run through the command line: `train` on the demo's alerts of a database (the same samples in the
same order for every method, at the method's usual learning rate), then `eval` on alerts in wordings that were never
trained. The peak is live tensor bytes, base included, as predicted before and as measured; swap is what a chat process
needs to make a resident adapter act, and to read it first. Speed is the median of short runs by themselves, all methods
in turn and in an order drawn anew for each round. Needs the embedded model's wheel unless --model is given.

It takes two hours. Figures that FILE holds already are not measured again, so that it can be stopped and gone on with.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

from command_line import edgepeft

VARIANTS = {
    "lora": ["--method", "lora", "--rank", "16"],
    "dora": ["--method", "lora", "--rank", "16", "--set", "dora=true"],
    "houlsby": ["--method", "bottleneck", "--set", "reduction=16"],
    "pfeiffer": ["--method", "bottleneck", "--set", "placement=pfeiffer", "--set", "reduction=8"],
    "parallel": ["--method", "bottleneck", "--set", "placement=parallel", "--set", "reduction=8", "--set", "scale=4"],
    "compacter": ["--method", "compacter", "--set", "reduction=8"],
    "ia3": ["--method", "ia3"],
    "norm": ["--method", "norm"],
    "prefix": ["--method", "prefix"],
    "prompt": [
        "--method",
        "prompt",
        "--set",
        "start=text",
        "--set",
        "text=Answer with JSON: severity, cause, component.",
    ],
    "sparse": ["--method", "sparse", "--set", "density=0.02"],
    "shira": ["--method", "sparse", "--rank", "16", "--set", "choose=random"],
    "full": ["--method", "full"],
    "lora, unfrozen": ["--method", "lora", "--rank", "16", "--unfreeze", "0.5"],
}
"""What is compared, and the options that make it."""
DENSE_ALONE = ("full",)
"""Those that need an unquantized base."""
SWAPS = 20
ANSWER_TOKENS = 80
"""Longer than any right answer."""
SPEED_STEPS = 6
"""Optimizer steps of a run that is made for its speed."""


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--precisions", nargs="+", default=["bf16", "nf4"], metavar="PRECISION")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--samples-per-step", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="held-out alerts that are scored, at the most")
    parser.add_argument("--rounds", type=int, default=3, help="short runs of each row, for its speed")
    parser.add_argument("--json", metavar="FILE", help="write all figures")
    return parser.parse_args(arguments)


def swap_seconds(model, precision, folder):
    """Seconds to read an adapter into a loaded base, and the median of making it act once it is there."""
    import torch

    from edgepeft.chat.protocol import AdapterUse
    from edgepeft.engine.inference.session import Session
    from edgepeft.engine.model.load import load_model
    from edgepeft.models.store import ensure_model

    loaded = load_model(
        ensure_model(model), precision=precision, compute_dtype="bf16", device=torch.device("cpu"), dense_values=True
    )
    session, use = Session(loaded), [AdapterUse(folder=str(folder))]
    begun = time.perf_counter()
    session.activate(use)
    read = time.perf_counter() - begun
    found = []
    for _ in range(SWAPS):
        session.activate([])
        begun = time.perf_counter()
        session.activate(use)
        found.append(time.perf_counter() - begun)
    return read, statistics.median(found)


def train(name, precision, task, adapter, train_file, *more):
    """How a run ended."""
    return edgepeft(
        *("train", task.model, train_file, "--name", adapter, "--precision", precision, *VARIANTS[name]),
        *("--eval-every", 0, "--micro-batch-tokens", 1024, "--samples-per-step", task.samples_per_step),
        *("--seed", task.seed, *more),
    )


def measure_speed(name, precision, task, train_file):
    """Tokens a second of a short run."""
    finished = train(name, precision, task, "bench-speed", train_file, "--max-steps", SPEED_STEPS)
    edgepeft("adapters", "remove", "bench-speed", "--yes")
    return finished["tokens_per_second"]


def measure(name, precision, task, train_file, held_out):
    """One row, but for its speed."""
    from edgepeft.library.store import resolve_adapter
    from edgepeft.models.store import ensure_model

    adapter = f"bench-{name.replace(', ', '-')}-{precision}"
    finished = train(name, precision, task, adapter, train_file, "--eval-data", held_out, "--epochs", task.epochs)
    limit = ["--limit", str(task.limit)] if task.limit else []
    scores = edgepeft(
        *("eval", "--adapter", adapter, "--data", str(held_out), "--max-new-tokens", str(ANSWER_TOKENS)), *limit
    )
    found = resolve_adapter(adapter)
    read, swap = swap_seconds(task.model, precision, found.path)
    shape = ensure_model(task.model).shape
    return {
        "method": name,
        "precision": precision,
        "parameters": found.card.trainable_parameters,
        "share": found.card.trainable_parameters / shape.parameters,
        "learning_rate": found.card.recipe.optimizer.learning_rate,
        "tokens_per_second": [],
        "predicted_peak_bytes": finished["predicted_peak_bytes"],
        "measured_peak_bytes": finished["measured_peak_bytes"],
        "held_out_loss": scores["loss"],
        "valid_json": scores["valid_json"],
        "field_accuracy": scores["field_accuracy"],
        "exact_match": scores["exact_match"],
        "file_bytes": found.weights.stat().st_size,
        "read_seconds": read,
        "swap_seconds": swap,
    }


def show(rows):
    """The table, as scripts/bench/README.md keeps it."""
    print(
        "| method | base | trains | share | tokens/s | peak predicted, measured | fields right | loss | file | swap |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        speeds = row["tokens_per_second"]
        speed = f"{statistics.median(speeds):.0f} ({min(speeds):.0f}–{max(speeds):.0f})" if speeds else "–"
        peak = f"{row['predicted_peak_bytes'] / 2**20:.0f}, {row['measured_peak_bytes'] / 2**20:.0f} MiB"
        print(
            f"| {row['method']} | {row['precision']} | {row['parameters']:,} | {row['share']:.2%} | "
            f"{speed} | {peak} | {row['field_accuracy']:.1%} | {row['held_out_loss']:.3f} | "
            f"{row['file_bytes'] / 2**20:.2f} MiB | {1000 * row['swap_seconds']:.1f} ms |"
        )


def main(arguments):
    task = parse(arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from edgepeft.demo.tour import demo_files

    rows = json.loads(Path(task.json).read_text())["rows"] if task.json and Path(task.json).exists() else []
    found = {(row["method"], row["precision"]): row for row in rows}

    def keep(row):
        found[row["method"], row["precision"]] = row
        if task.json:
            Path(task.json).write_text(json.dumps({"rows": list(found.values())}, indent=2))

    wanted = [
        (name, precision)
        for precision in task.precisions
        for name in task.methods
        if not (name in DENSE_ALONE and precision in ("nf4", "int8"))
    ]
    with tempfile.TemporaryDirectory() as folder:
        # A home of its own: neither calibration nor adapters of this machine's user take part.
        os.environ["EDGEPEFT_HOME"] = folder
        train_file, held_out = demo_files(task.seed)
        for name, precision in wanted:
            if (name, precision) not in found:
                keep(measure(name, precision, task, train_file, held_out))
                print(f"{name}, {precision}: {found[name, precision]['field_accuracy']:.1%} right", file=sys.stderr)
        for number in range(task.rounds):
            for name, precision in random.Random(number).sample(wanted, len(wanted)):
                row = found[name, precision]
                if len(row["tokens_per_second"]) <= number:
                    speed = measure_speed(name, precision, task, train_file)
                    keep(row | {"tokens_per_second": [*row["tokens_per_second"], speed]})
    show([found[key] for key in wanted])


if __name__ == "__main__":
    main(sys.argv[1:])
