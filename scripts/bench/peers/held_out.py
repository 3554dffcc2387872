"""The loss of a trained adapter on held-out records, by the same code for every engine."""

from __future__ import annotations

from pathlib import Path

from peers.task import Task


def held_out_loss(task: Task, adapter: Path) -> float:
    """Mean negative log-likelihood of the labels, natural logarithm, on the base that was trained over."""
    import numpy as np
    import torch

    from edgepeft.engine.methods import set_active
    from edgepeft.engine.methods.files import read_adapter
    from edgepeft.engine.model.load import load_model
    from edgepeft.engine.training.batches import Sample
    from edgepeft.engine.training.memory import MemoryGauge
    from edgepeft.engine.training.step import StepRunner
    from edgepeft.methods import LoraConfig
    from edgepeft.models.store import find_model
    from edgepeft.spec import BaseRef, DataRef, Layout, Recipe

    device = torch.device("cpu")
    precision = "nf4" if task.precision == "nf4" else "bf16"
    loaded = load_model(find_model(task.model), precision=precision, compute_dtype="bf16", device=device)
    set_active(loaded, [(read_adapter(adapter, loaded, "trained").name, 1.0)])
    recipe = Recipe(
        base=BaseRef(task.model, "", ""),
        data=DataRef("", "", ""),
        method=LoraConfig(rank=task.settings.rank),
        precision=precision,
        compute_dtype="bf16",
        max_seq_len=task.settings.max_seq_len,
        samples_per_step=1,
    )
    runner = StepRunner(loaded, recipe, backward=lambda loss: None, gauge=MemoryGauge(device))
    samples = []
    for number, sample in enumerate(task.held_out):
        rows = np.flatnonzero(np.array(sample.trained[1:]))
        ids = np.array(sample.ids, np.int32)
        samples.append(Sample(number, ids[:-1], rows.astype(np.int64), ids[rows + 1].astype(np.int64)))
    sums = runner.evaluate(samples, Layout(task.settings.micro_batch_tokens))
    return sums.loss / sums.trained_tokens
