"""The bench that simulates what others ran: recordings of few layers, compiled pieces, the rules about rows."""

from __future__ import annotations

import csv
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench"
sys.path.insert(0, str(BENCH))

from accuracy import published, published_compiled, published_trace  # noqa: E402
from accuracy.published_step import MODE, Step  # noqa: E402

from edgepeft.engine.ledger import LiveBytes  # noqa: E402
from edgepeft.memory.target import Target  # noqa: E402

RULES = tomllib.loads(published.RULES.read_text(encoding="utf-8"))
SHAPE = {
    "vocab": 1024,
    "hidden": 128,
    "intermediate": 384,
    "layers": 10,
    "heads": 4,
    "kv_heads": 4,
    "positions": 256,
    "tied": False,
}
LENGTH = 128


def technique(rule: str, **changes: Any) -> dict[str, Any]:
    own = next(known["technique"] for known in RULES["rules"] if known["name"] == rule)
    given = {"seq_len": LENGTH, "micro_batch": 2, "rank": 8, "nf4": False}
    return {**published.DEFAULTS, **given, **published._technique(own, RULES["techniques"]), **changes}


TECHNIQUES = {
    "torchtune without checkpoints": technique("torchtune ladder: packed", seq_len=LENGTH),
    "torchtune compiled, optimizer in backward": technique("torchtune ladder: optimizer in backward"),
    "torchtune offloaded, NF4": technique("torchtune ladder: QLoRA", targets="qkvogud", rank=8),
    "torchtune, LoRA on the head": technique(
        "torchtune tutorials, LoRA on all linears and the head", seq_len=LENGTH, rank=8
    ),
    "transformers, NF4": technique("LLaMA-Factory, table 2, FlashAttention 2"),
    "transformers, 16 bit": technique("LLaMA-Factory, table 1, transformers"),
    "unsloth, offloaded": technique("LLaMA-Factory, table 2, Unsloth"),
}


class Sum:
    """What lives, its highest sum, and how many births and deaths there were."""

    def __init__(self) -> None:
        self.alive: dict[Any, int] = {}
        self.peak = 0
        self.events = 0

    def born(self, key: Any, size: int) -> None:
        self.alive[key] = size
        self.peak = max(self.peak, sum(self.alive.values()))
        self.events += 1

    def died(self, key: Any) -> None:
        del self.alive[key]
        self.events += 1

    def seen(self) -> tuple[int, int, int]:
        return self.peak, sum(self.alive.values()), self.events


@pytest.mark.parametrize("name", TECHNIQUES)
def test_a_step_of_few_layers_plays_as_one_of_all_layers(name: str) -> None:
    played = Sum()
    Step(SHAPE, TECHNIQUES[name])._recording([LENGTH]).play(SHAPE["layers"], LENGTH, played)
    # The same model with all its layers, followed directly.
    whole = Step(SHAPE, TECHNIQUES[name], recorded=SHAPE["layers"])
    with MODE:
        blocks = whole._record(LENGTH)
    direct = Sum()
    for block in blocks:
        number = 0
        for event in block.events:
            if event == "+":
                direct.born((block.name, number), block.sizes[number])
                number += 1
            else:
                direct.died(event)
    assert played.seen() == direct.seen()
    assert direct.peak > 0


def test_two_lengths_tell_a_third() -> None:
    plain = TECHNIQUES["transformers, NF4"]
    between, direct = Sum(), Sum()
    Step(SHAPE, plain)._recording([256, 64]).play(SHAPE["layers"], 160, between)
    Step(SHAPE, plain)._recording([160]).play(SHAPE["layers"], 160, direct)
    assert between.seen() == direct.seen()


def test_reserved_bytes_grow_with_what_a_technique_keeps() -> None:
    target, shape = Target("cuda", (8, 0)), {**SHAPE, "vocab": 64}
    peaks = {
        checkpoint: Step(shape, technique("torchtune ladder: packed", checkpoint=checkpoint, seq_len=LENGTH))
        .play([LENGTH] * 3, target)
        .peak_allocated_bytes
        for checkpoint in ("none", "layer", "offload")
    }
    assert peaks["none"] > peaks["layer"] > peaks["offload"]


def test_a_recipe_that_holds_its_logits_pays_for_them_in_the_next_step() -> None:
    holds = technique("torchtune tutorials, LoRA on q and v", seq_len=LENGTH, rank=8)
    step, logits = Step(SHAPE, holds), 4 * 2 * (LENGTH - 1) * SHAPE["vocab"]
    left = step._recording([LENGTH]).play(SHAPE["layers"], LENGTH, Sum())
    assert [key[0] for key in left] == ["loss"]
    assert step.play([LENGTH, LENGTH], Target("cuda")).allocated_bytes >= logits


def test_a_compiled_piece_makes_no_buffer_of_what_is_fused() -> None:
    def piece(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(x.float().exp()).to(x.dtype) * scale

    def saved(function: Any) -> int:
        x = torch.empty(64, 256, dtype=torch.bfloat16, requires_grad=True)
        scale = torch.empty(256, dtype=torch.bfloat16, requires_grad=True)
        function(x, scale).sum().backward()
        known = [x, scale, x.grad, scale.grad]
        with LiveBytes(torch.device("cpu"), known={"workspace": known}, others=False) as live:
            before = live.live_bytes
            out = function(x, scale)
            after = live.live_bytes - before
            assert out.shape == x.shape
            out.sum().backward()
        return after

    with FakeTensorMode():
        eager, planned = saved(piece), saved(published_compiled.compiled(piece))
    assert planned == 2 * 64 * 256
    assert eager >= 4 * planned


def test_every_rule_is_about_known_columns_and_complete() -> None:
    wanted = {"engine", "loss", "checkpoint", "compiled", "attention", "adapter_bytes", "state_bytes", "optimizer"}
    for rule in RULES["rules"]:
        assert set(rule["match"]) <= set(published.COLUMNS), rule["name"]
        if rule.get("usable", True):
            assert wanted <= set(published._technique(rule["technique"], RULES["techniques"])), rule["name"]
            assert rule["metric"] in ("active", "reserved", "nvidia-smi")
            assert rule["unit"] in published.UNITS
        else:
            assert rule["why"], rule["name"]


def figure(**columns: str) -> dict[str, str]:
    return {**dict.fromkeys(published.COLUMNS, ""), **columns}


WIKI = figure(
    source="LLaMA-Factory wiki",
    model="Llama-2-7B",
    method="qlora",
    bits_quant="4",
    lora_rank="8",
    lora_targets="all",
    seq_len="1024",
    seq_mode="max length",
    micro_batch="1",
    gpu="A100 40GB",
    value_GB_as_printed="5",
    notes="Unsloth+FA2; grad accum 4",
)


def test_rows_are_matched_by_what_they_say() -> None:
    assert published.plan_of(WIKI, RULES).technique["checkpoint"] == "offload"
    assert published.plan_of({**WIKI, "notes": "HF+FA2; grad accum 4"}, RULES).technique["engine"] == "transformers"
    assert "no rule" in published.plan_of({**WIKI, "source": "somebody else"}, RULES).reason
    assert "shape" in published.plan_of({**WIKI, "model": "Llama-9-1T"}, RULES).reason
    assert "seq_len" in published.plan_of({**WIKI, "seq_len": "long"}, RULES).reason


@pytest.mark.parametrize(
    ("printed", "predicted_gib", "error"),
    [("5", 4.6, 0.0), ("5", 5.5, 0.0), ("5", 4.0, -0.1), ("5", 6.5, 0.2), ("5.0", 4.6, -0.07)],
)
def test_a_figure_stands_for_the_interval_it_was_rounded_from(printed: str, predicted_gib: float, error: float) -> None:
    plan = published.plan_of(WIKI, RULES)
    row = published.compared({**WIKI, "value_GB_as_printed": printed}, plan, int(predicted_gib * 2**30))
    assert row["covered"]
    assert row["error"] == pytest.approx(error, abs=1e-6)
    assert row["error_to_figure"] == pytest.approx(predicted_gib / 5 - 1, abs=1e-6)


def test_out_of_memory_is_checked_but_is_no_figure() -> None:
    plan = published.plan_of(WIKI, RULES)
    row = published.compared({**WIKI, "value_GB_as_printed": "OOM"}, plan, 41 * 2**30)
    assert (row["holds"], row["covered"], row["error"]) == (True, False, None)
    assert not published.compared({**WIKI, "value_GB_as_printed": "OOM"}, plan, 39 * 2**30)["holds"]


@pytest.mark.parametrize("printed", ["", "?", "0", "-3", "nan", "inf"])
def test_a_cell_that_is_no_figure_is_not_covered(printed: str) -> None:
    plan = published.plan_of(WIKI, RULES)
    row = published.compared({**WIKI, "value_GB_as_printed": printed}, plan, 2**30)
    assert row["error"] is None
    assert "no figure" in row["reason"]


def test_a_file_of_other_rows_is_measured_as_far_as_rules_reach(tmp_path: Path) -> None:
    path = tmp_path / "figures.csv"
    columns = ("reported", *published.COLUMNS)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows([WIKI, {**WIKI, "source": "somebody else"}, {**WIKI, "seq_len": "2048"}])
    rows = published.measure(0, False, str(path))
    assert [row["covered"] for row in rows] == [True, False, True]
    assert rows[0]["predicted_bytes"] < rows[2]["predicted_bytes"]
    assert rows[1]["predicted_bytes"] is None


def test_a_file_without_the_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "figures.csv"
    path.write_text("source,model\nx,y\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="columns method"):
        published.measure(0, False, str(path))


def test_layers_that_differ_are_noticed() -> None:
    step = Step(SHAPE, TECHNIQUES["unsloth, offloaded"])
    with MODE:
        blocks = step._record(LENGTH)
    next(block for block in blocks if block.name == ("forward", 2)).sizes[0] += 1
    with pytest.raises(RuntimeError, match="not alike"):
        published_trace.Recording(blocks, LENGTH)
