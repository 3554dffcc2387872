"""Resident memory of real training processes, predicted and measured.

Models and data are made on the spot, planned and trained through the worker that users get. The worker's anonymous and
shared pages are read from outside, a hundred times a second, and count from its `started` event on, which it writes
after its imports and before it loads anything.

`error` is predicted / measured - 1. `live_peak_bytes` is what the run measured of its tensors alone.
"""

import random
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from accuracy.report import Progress
from accuracy.rss_models import HEAD_DIM, write_data, write_model
from edgepeft.errors import BadInput
from edgepeft.hardware.host import read_host
from edgepeft.memory.resident import predict_resident
from edgepeft.models.embedded import EMBEDDED, embedded_gguf
from edgepeft.models.store import ensure_model
from edgepeft.plan.build import build
from edgepeft.runs.events import Finished, Started
from edgepeft.runs.events_file import read_events
from edgepeft.runs.launch import launch, log_tail
from edgepeft.runs.lock import is_locked
from edgepeft.runs.state import read_launched

CASES, QUICK_CASES = 9, 3
SAMPLE_SECONDS = 0.01
STEPS = 3
SIZES = (
    (256, 704, 6, 4),
    (320, 896, 4, 5),
    (384, 1024, 10, 3),
    (512, 1408, 8, 2),
    (512, 1536, 12, 8),
    (768, 2048, 8, 12),
    (1024, 2816, 6, 4),
    (1024, 3072, 8, 16),
)
"""Width, inner width, layers and key heads of models with 5 to 150 million weights, the smallest first."""
TOKENS, QUICK_TOKENS = (192, 512, 1024, 2048), (192, 512)
OPERATIONS = 1.6e12
"""Of all training of a case: some ten seconds on two cores."""
OPERATIONS_OF_WEIGHT = 6 * 6
"""Forward and backward of some six micro-batches, a token."""


class Case(msgspec.Struct, frozen=True):
    """A run: a random model, or the embedded one where `family` says so."""

    family: str
    hidden: int
    inner: int
    layers: int
    kv_heads: int
    vocab: int
    precision: str
    checkpointing: str
    rank: int
    loss_chunk: int
    micro_batch: int
    """Tokens."""
    lengths: tuple[int, ...]
    """Tokens of each sample."""

    @property
    def parameters(self):
        """Of the linears, and of the embedding that is also the head."""
        return _weights(self.hidden, self.inner, self.layers, self.kv_heads, self.vocab)

    def __str__(self):
        size = f"{self.parameters / 1e6:.0f} M, {self.layers} layers of {self.hidden}"
        return (
            f"{self.family} {size}, vocabulary {self.vocab}, {self.precision}, rank {self.rank}, {self.micro_batch} "
            f"tokens, samples to {max(self.lengths)}, checkpointing {self.checkpointing}"
        )


def measure(seed, quick):
    """One row a case.

    Args:
        seed: draws the cases.
        quick: three small ones.
    """
    cases = draw(seed, quick)
    progress = Progress("rss", len(cases))
    rows = []
    for number, case in enumerate(cases):
        with tempfile.TemporaryDirectory(prefix="edgepeft-rss-") as folder:
            rows.append(check(case, Path(folder), f"rss{number}"))
        progress.step()
    return rows


def draw(seed, quick):
    """The cases of a seed; the last of the full ones is the embedded model."""
    chance = random.Random(f"rss/{seed}")
    precisions = _spread(chance, ("nf4", "bf16", "int8"))
    modes = _spread(chance, ("none", "layer"))
    count = QUICK_CASES if quick else CASES
    cases = [_draw_case(chance, next(precisions), next(modes), quick=quick) for _ in range(count)]
    if not quick and embedded_is_installed():
        cases[-1] = msgspec.structs.replace(
            cases[-1],
            family=EMBEDDED,
            hidden=576,
            inner=1536,
            layers=30,
            kv_heads=3,
            vocab=49152,
            micro_batch=min(768, cases[-1].micro_batch),
        )
    return cases


def embedded_is_installed():
    try:
        embedded_gguf()
    except BadInput:
        return False
    return True


def check(case, folder, name):
    """Trains a case; the row of it."""
    data = write_data(folder / "data.jsonl", case.lengths)
    if case.family == EMBEDDED:
        model = EMBEDDED
    else:
        write_model(
            folder / "model",
            case.family,
            hidden=case.hidden,
            inner=case.inner,
            layers=case.layers,
            kv_heads=case.kv_heads,
            vocab=case.vocab,
        )
        model = str(folder / "model")
    typed = {
        "gpu": "cpu",
        "precision": case.precision,
        "rank": case.rank,
        "checkpointing": case.checkpointing,
        "micro_batch_tokens": case.micro_batch,
        "loss_chunk_tokens": case.loss_chunk,
        "samples_per_step": max(1, len(case.lengths) // (STEPS + 1)),
        "max_steps": STEPS,
        "eval_fraction": 0.1,
    }
    plan = build(model, data, typed)
    tokenizer = Path(ensure_model(model).folder) / "tokenizer.json"
    predicted = predict_resident(
        plan.memory, plan.spec, read_host(), plan.traffic(), tokenizer_bytes=tokenizer.stat().st_size
    )
    run = launch(plan, name)
    measured = watch(run)
    events = read_events(run.events_file)
    finished = next((event for event in events if isinstance(event, Finished)), None)
    if finished is None:
        raise RuntimeError(f"{case} did not finish: {log_tail(run, 3)}")
    return {
        "case": str(case),
        "predicted_bytes": predicted.total_bytes,
        "measured_bytes": measured,
        "error": predicted.total_bytes / measured - 1,
        "live_peak_bytes": finished.measured_peak_bytes,
        "predicted_live_bytes": plan.memory.peak_bytes,
        "phase": predicted.phase,
        "rows": {row.name: row.size_bytes for row in predicted.rows},
    }


def watch(run):
    """The highest resident bytes of a run's worker until it ends, beyond what it held when it started."""
    process = read_launched(run.launched_file).pid
    highest = 0
    while is_locked(run):
        # Twenty readings, then one look at the lock, which costs more.
        for _ in range(20):
            highest = max(highest, resident_bytes(process))
            time.sleep(SAMPLE_SECONDS)
    started = next(event for event in read_events(run.events_file) if isinstance(event, Started))
    return highest - started.rss_bytes


def resident_bytes(process):
    """Anonymous and shared resident bytes of a process; 0 when it is gone."""
    try:
        text = Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    parts = (line.split() for line in text.splitlines() if line.startswith(("RssAnon:", "RssShmem:")))
    return sum(int(part[1]) * 1024 for part in parts)


def _spread(chance, values):
    """The values in turn, each round in an order of its own."""
    while True:
        order = list(values)
        chance.shuffle(order)
        yield from order


def _draw_case(chance, precision, checkpointing, *, quick):
    micro_batch = chance.choice(QUICK_TOKENS if quick else TOKENS)
    vocab = chance.choice((4096, 16384, 49152))
    # The larger the micro-batch, the smaller the model: time is what is given.
    budget = OPERATIONS / (5 if quick else 1)
    affordable = [size for size in SIZES if OPERATIONS_OF_WEIGHT * _weights(*size, vocab) * micro_batch <= budget]
    hidden, inner, layers, kv_heads = chance.choice(affordable[-3:] or SIZES[:1])
    longest = max(96, int(micro_batch * chance.uniform(0.15, 0.95)))
    per_step = chance.choice((2, 3, 4, 6))
    return Case(
        family=chance.choice(("llama", "qwen2", "qwen3")),
        hidden=hidden,
        inner=inner,
        layers=layers,
        kv_heads=kv_heads,
        vocab=vocab,
        precision=precision,
        checkpointing=checkpointing,
        rank=chance.choice((4, 8, 16, 32)),
        loss_chunk=chance.choice((64, 128, 256)),
        micro_batch=micro_batch,
        lengths=tuple(chance.randint(max(80, longest // 4), longest) for _ in range(per_step * (STEPS + 1))),
    )


def _weights(hidden, inner, layers, kv_heads, vocab):
    return layers * hidden * (2 * hidden + 2 * HEAD_DIM * kv_heads + 3 * inner) + vocab * hidden


if __name__ == "__main__":
    print(msgspec.json.format(msgspec.json.encode(measure(int(sys.argv[1]), "--quick" in sys.argv))).decode())
