"""What runs are called on screen: why one shrank, and its memory against the prediction."""

from __future__ import annotations

import msgspec
import pytest

from edgepeft.cli.run_text import memory_table, summary_lines
from edgepeft.memory.breakdown import Phase
from edgepeft.runs.events import (
    Cause,
    Evaluated,
    Finished,
    MemoryMeasured,
    OutOfMemoryHit,
    Recovered,
    SampleGenerated,
    StepDone,
)
from edgepeft.runs.state import HighestMemory, RunState, highest_memory
from edgepeft.runs.text import lost_text, peak_text, recovery_sentence, rescued_text, sentence
from edgepeft.units import GIB, MIB

PREDICTED = Phase(
    "train step",
    {"frozen weights": GIB, "adapter weights": 20 * MIB, "logits and loss": 100 * MIB},
    place="loss",
)
MEASURED = HighestMemory(
    GIB + 140 * MIB,
    {"frozen weights": GIB, "adapter weights": 20 * MIB, "logits and loss": 96 * MIB, "workspace": 24 * MIB},
    "backward of layer 3",
    2 * GIB,
)


def test_memory_by_category_fits_eighty_columns() -> None:
    lines = memory_table(PREDICTED, MEASURED, 80)
    assert max(map(len, lines)) <= 80
    cells = {line.split("  ")[1].strip(): line.split() for line in lines[1:-2]}
    assert cells["logits and loss"][-6:] == ["100", "MiB", "96.0", "MiB", "-4.0", "%"]
    assert cells["frozen weights"][-2:] == ["+0.0", "%"]
    # What was not predicted has no error.
    assert cells["workspace"][1:] == ["–", "24.0", "MiB", "–"]
    assert cells["peak"][-2:] == ["+1.7", "%"]
    assert "KV cache" not in cells
    told = " ".join(line.strip() for line in lines[-2:])
    assert told.endswith(
        "predicted: train step, loss · measured: backward of layer 3 · resident memory grew by up to 2.00 GiB"
    )


def test_a_wide_screen_shows_bars_in_proportion() -> None:
    lines = memory_table(PREDICTED, MEASURED, 120)
    assert max(map(len, lines)) <= 120
    bars = {line.split("  ")[1].strip(): line.count("█") for line in lines}
    assert bars["frozen weights"] > 20
    assert 0 < bars["logits and loss"] < 5
    assert bars["peak"] == 0


def test_a_hair_below_the_prediction_is_no_negative_zero() -> None:
    assert peak_text(GIB - 1, GIB).endswith("(+0.0 %)")
    assert peak_text(2 * GIB, GIB).endswith("(+100.0 %)")
    assert "%" not in peak_text(GIB, 0)


def measured(peak_bytes: int) -> MemoryMeasured:
    return MemoryMeasured(
        step=1,
        phase="train step",
        live_bytes=1,
        peak_bytes=peak_bytes,
        by_category={"workspace": peak_bytes},
        place="x",
    )


def test_the_highest_memory_of_a_run() -> None:
    assert highest_memory([]) is None
    events = [measured(5), measured(9), measured(7)]
    found = highest_memory(events)
    assert found == HighestMemory(9, {"workspace": 9}, "x")
    ending = Finished(
        step=1,
        adapter="adapter",
        train_seconds=1.0,
        tokens_per_second=1.0,
        predicted_peak_bytes=9,
        measured_peak_bytes=9,
        measured_by_category={"workspace": 9},
        measured_place="y",
        rss_peak_bytes=12,
    )
    assert highest_memory([*events, ending]) == HighestMemory(9, {"workspace": 9}, "y", 12)


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        ("step", "Step 4 is done again with a smaller layout, nothing lost: half"),
        ("probe", "The layout becomes smaller, what is learned stays the same: half"),
        ("evaluation", "The evaluation goes on in smaller pieces, training as before: half"),
        ("killed", "The worker before this one was killed, so step 4 begins with a smaller layout, nothing lost: half"),
        ("device", "The card failed, so step 4 begins with a smaller layout, nothing lost: half"),
    ],
)
def test_why_a_layout_became_smaller(cause: Cause, said: str) -> None:
    event = Recovered(step=4, what="half", micro_batch_tokens=128, checkpointing="layer", cause=cause)
    assert sentence(event) == (said, "yellow")


def test_running_out_and_going_on_are_one_sentence() -> None:
    hit = OutOfMemoryHit(step=88, phase="train step", micro_batch_tokens=4096)
    halved = Recovered(step=88, what="half", micro_batch_tokens=2048, checkpointing="layer")
    assert recovery_sentence(hit, halved) == (
        "Out of memory in step 88; micro-batch 4,096 → 2,048 tokens, step redone, nothing lost"
    )
    tried = msgspec.structs.replace(hit, phase="probe", micro_batch_tokens=2048)
    offloaded = msgspec.structs.replace(halved, what="inputs of layers kept in the host's RAM", cause="probe")
    assert recovery_sentence(tried, offloaded) == (
        "Out of memory in the trial before step 88; inputs of layers kept in the host's RAM, what is learned stays the "
        "same"
    )


def test_where_memory_ran_out() -> None:
    def told(phase: str) -> str:
        hit = OutOfMemoryHit(step=4, phase=phase, micro_batch_tokens=1024)  # type: ignore[arg-type]
        return str((sentence(hit) or ("",))[0])

    assert told("probe") == "Out of memory while the largest micro-batch of 1,024 tokens was tried, before step 4"
    assert told("evaluation") == "Out of memory in an evaluation after step 4 (micro-batch of 1,024 tokens)"
    assert told("train step") == "Out of memory in step 4 (train step, micro-batch of 1,024 tokens)"


def test_a_rescue_is_explained_in_one_sentence_with_the_way_out() -> None:
    state = RunState(status="lost", step=7, steps=9, checkpoint_step=6)
    assert rescued_text(state, "killed") == (
        "The worker was killed, probably for lack of memory. This once the run goes on by itself, from its checkpoint "
        "of step 6 with a smaller layout; Ctrl-C stops it."
    )
    failed = RunState(status="failed", message="CUDA error: an illegal access. Look at doctor.")
    assert rescued_text(failed, "device").startswith("The card failed (CUDA error: an illegal access. Look at doctor).")
    assert "from its beginning" in rescued_text(failed, "device")


def test_a_lost_run_says_how_to_go_on() -> None:
    state = RunState(status="lost", step=7, steps=9)
    once, twice = lost_text("r-1", state, again=False), lost_text("r-1", state, again=True)
    assert once.endswith("its worker was killed. Resume it with `edgepeft runs resume r-1`.")
    assert "killed once more, in a smaller layout; close other programs" in twice


def test_a_step_alone_is_no_sentence() -> None:
    event = StepDone(
        step=1,
        loss=1.0,
        learning_rate=1.0,
        grad_norm=1.0,
        tokens=1,
        trained_tokens=1,
        seconds=1.0,
        tokens_per_second=1.0,
    )
    assert sentence(event) is None


ENDING = Finished(
    step=80,
    adapter="adapter",
    train_seconds=10.0,
    tokens_per_second=100.0,
    predicted_peak_bytes=MIB,
    measured_peak_bytes=MIB,
    train_loss=0.5,
    eval_loss=0.75,
    base_eval_loss=2.25,
    last_eval_loss=0.875,
    kept_step=80,
    published="n@v1",
)


def test_the_summary_compares_base_and_adapter() -> None:
    lines = summary_lines(ENDING, "/runs/n-1", "toy")
    assert "Loss     training 0.5000, held out 2.2500 (base) → 0.7500 (adapter)" in lines
    assert not [line for line in lines if line.startswith(("Ended", "Kept"))]
    alone = summary_lines(msgspec.structs.replace(ENDING, base_eval_loss=None, train_loss=None), "/runs/n-1", "toy")
    assert "Loss     held out 0.7500" in alone


def test_the_summary_says_why_a_run_ended_and_what_it_kept() -> None:
    early = summary_lines(msgspec.structs.replace(ENDING, kept_step=48, ended_by="early stop"), "/runs/n-1", "toy")
    assert "Ended    after step 80: the held-out loss did not fall any more" in early
    assert "Kept     the state of step 48; at the end the held-out loss was 0.8750" in early
    timed = summary_lines(msgspec.structs.replace(ENDING, ended_by="time"), "/runs/n-1", "toy")
    assert "Ended    after step 80: the training time was over" in timed
    # What ended before this was told kept its last state.
    assert not [
        line
        for line in summary_lines(msgspec.structs.replace(ENDING, kept_step=None), "/runs/n-1", "toy")
        if line.startswith("Kept")
    ]


def test_what_is_said_of_the_base_and_of_samples() -> None:
    found = Evaluated(step=0, loss=2.25, samples=9, trained_tokens=90)
    assert sentence(found) == ("Base: held-out loss 2.2500 on 9 samples", "")
    assert sentence(msgspec.structs.replace(found, step=4, best=True)) == (
        "Step 4: held-out loss 2.2500 on 9 samples, best so far",
        "",
    )
    said = SampleGenerated(step=0, prompt="Why\n" * 40, answer="[b]because[/b] " + "so " * 100)
    text, style = sentence(said) or ("", "")
    assert text.startswith("Base: Why Why")
    assert "→ [b]because[/b] so" in text
    assert len(text) < 200
    assert style == "dim"
