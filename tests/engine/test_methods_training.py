"""Whole runs of every method on a tiny model: they learn, resume to the bit, and what they publish can be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from edgepeft.engine.methods import set_active
from edgepeft.engine.methods.files import read_adapter
from edgepeft.engine.model.load import load_model
from edgepeft.library.parent import find_parent
from edgepeft.library.store import check_base, resolve_adapter
from edgepeft.methods import METHODS, FullConfig, LoraConfig, count_parameters, id_of, method_of
from edgepeft.methods.bias import BiasConfig
from edgepeft.methods.bottleneck import BottleneckConfig
from edgepeft.methods.compacter import CompacterConfig
from edgepeft.methods.ia3 import Ia3Config
from edgepeft.methods.norm import NormConfig
from edgepeft.methods.prefix import PrefixConfig
from edgepeft.methods.prompt import PromptConfig
from edgepeft.methods.sparse import SparseConfig
from edgepeft.models.store import ModelEntry
from edgepeft.runs.control import request
from edgepeft.runs.events import Evaluated, Finished, Started, StepDone
from edgepeft.spec import Optimizer
from training_runs import of_type, tiny_base, tiny_run, train

CONFIGS: dict[str, Any] = {
    "lora": LoraConfig(rank=4),
    "lora of several ranks": LoraConfig(rank=4, ranks={"down_proj": 8, "q_proj": 2}),
    "dora": LoraConfig(rank=4, dora=True),
    "lora of everything": LoraConfig(rank=4, targets=("all-linear", "embed_tokens", "lm_head"), dropout=0.1),
    "houlsby": BottleneckConfig(reduction=4),
    "parallel": BottleneckConfig("parallel", reduction=4),
    "compacter": CompacterConfig(reduction=4),
    "ia3": Ia3Config(),
    "norm": NormConfig(),
    "bias": BiasConfig(),
    "prefix": PrefixConfig(8),
    "reparameterised prefix": PrefixConfig(8, reparameterised=True, width=32),
    "full": FullConfig(),
    "prompt": PromptConfig(8, "text", "Repeat the number."),
    "sparse": SparseConfig(density=0.05),
    "sparse as PEFT has it": SparseConfig(rank=4),
}


@pytest.fixture
def base(tmp_path: Path) -> ModelEntry:
    return tiny_base(tmp_path, biased=True)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_run_learns_resumes_to_the_bit_and_publishes(tmp_path: Path, base: ModelEntry, config: Any) -> None:
    rate = 2e-2 * METHODS[id_of(config)].rate
    options = {"method": config, "checkpoint_steps": 2, "optimizer": Optimizer(learning_rate=rate), "max_steps": 8}
    whole, parts = tiny_run(tmp_path, base, "whole", **options), tiny_run(tmp_path, base, "parts", **options)
    steps = of_type(train(whole), StepDone)
    assert steps[-1].loss < steps[0].loss - 0.02

    def stop(event: Any) -> None:
        if isinstance(event, StepDone) and event.step == 3:
            request(parts, "stop")

    train(parts, stop)
    events = train(parts)
    assert of_type(events, Started)[0].step == 3
    assert of_type(events, Finished)[0].published == "parts@v1"
    first, second = resolve_adapter("whole@v1"), resolve_adapter("parts@v1")
    assert first.weights.read_bytes() == second.weights.read_bytes()
    assert first.card is not None
    assert first.card.recipe.method == config
    assert first.card.trainable_parameters == count_parameters(config, base.shape)
    assert check_base(first, base) == []
    assert find_parent("whole@v1", base).method == method_of(config).continued(config)
    loaded = load_model(base, precision="fp32", compute_dtype="fp32", device=torch.device("cpu"))
    adapter = read_adapter(first.path, loaded, "a")
    set_active(loaded, [("a", 1.0)])
    assert [parameter.name for parameter in first.card.parameters] == list(adapter.file_tensors())


def test_the_base_is_measured_without_what_an_adapter_puts_first(tmp_path: Path, base: ModelEntry) -> None:
    losses = []
    for name in ("lora", "prefix", "prompt"):
        run = tiny_run(tmp_path, base, name, method=CONFIGS[name], max_steps=1)
        first, *_, last = of_type(train(run), Evaluated)
        assert first.step == 0
        losses.append(first.loss)
        assert last.loss != first.loss
    assert losses == [losses[0]] * 3
