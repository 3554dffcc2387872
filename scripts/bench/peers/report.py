"""Ratios with their spread, and the tables that are printed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

Result = dict[str, Any]
"""What a child said: engine, precision, tokens_per_second, growth_bytes, held_out_loss …"""

WANTED = {
    "speed_vs_trl": "at least 5 (8 is the aim)",
    "speed_vs_peft": "at least 2, NF4 against NF4",
    "speed_vs_peft_bf16": "at least 2, 16 bit against 16 bit",
    "memory_vs_trl": "at most 0.15",
    "peak_vs_bound": "at most 1.15",
    "loss_gap": "0 within noise; ours less PEFT's",
}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def compared(
    rounds: list[dict[str, Result]], ours: str, theirs: str, key: str, how: Callable[[float, float], float]
) -> dict[str, float] | None:
    """A figure of two engines, round by round, so that what slows the machine slows both.

    Args:
        rounds: of each round the results by engine.
        ours: engine.
        theirs: engine.
        key: of the figure.
        how: puts ours and theirs together.
    """
    pairs = [(results[ours][key], results[theirs][key]) for results in rounds if {ours, theirs} <= results.keys()]
    return spread([how(one, other) for one, other in pairs]) if pairs else None


def summarize(rounds: list[dict[str, Result]], *, ceiling_flops: float, operations_per_token: float) -> dict[str, Any]:
    """What `--json` holds.

    Args:
        rounds: of each round the results by engine.
        ceiling_flops: floating-point operations a second of a large matrix product, in 16 bit.
        operations_per_token: of edgepeft's training, its products alone.
    """

    def ratio(one: float, other: float) -> float:
        return one / other

    found = {
        "speed_vs_trl": compared(rounds, "edgepeft-nf4", "trl-nf4", "tokens_per_second", ratio),
        "speed_vs_peft": compared(rounds, "edgepeft-nf4", "peft-nf4", "tokens_per_second", ratio),
        "speed_vs_peft_bf16": compared(rounds, "edgepeft-bf16", "peft-bf16", "tokens_per_second", ratio),
        "memory_vs_trl": compared(rounds, "edgepeft-nf4", "trl-nf4", "growth_bytes", ratio),
        "loss_gap": compared(rounds, "edgepeft-nf4", "peft-nf4", "held_out_loss", lambda one, other: one - other),
    }
    own = [results["edgepeft-nf4"] for results in rounds if "edgepeft-nf4" in results]
    found["peak_vs_bound"] = spread([one["live_peak_bytes"] / one["bound_bytes"] for one in own]) if own else None
    names = sorted({name for results in rounds for name in results})
    speeds = {name: spread([r[name]["tokens_per_second"] for r in rounds if name in r]) for name in names}
    shares = [one["tokens_per_second"] * operations_per_token / ceiling_flops for one in own]
    return {
        **{name: value for name, value in found.items() if value is not None},
        "tokens_per_second": speeds,
        "growth_bytes": {name: spread([r[name]["growth_bytes"] for r in rounds if name in r]) for name in names},
        "held_out_loss": {name: spread([r[name]["held_out_loss"] for r in rounds if name in r]) for name in names},
        "ceiling_share": spread(shares) if shares else None,
        "ceiling_flops": ceiling_flops,
        "rounds": rounds,
    }


def lines(summary: dict[str, Any]) -> list[str]:
    """The summary for a person."""
    out = [f"{'engine':<16} {'tokens/s':>22} {'RSS growth, MiB':>24} {'held-out loss':>14}"]
    for name, speed in summary["tokens_per_second"].items():
        growth, loss = summary["growth_bytes"][name], summary["held_out_loss"][name]
        mib = {key: value / 2**20 for key, value in growth.items()}
        out.append(f"{name:<16} {_spread(speed, '.0f'):>22} {_spread(mib, '.0f'):>24} {loss['median']:>14.4f}")
    out.append("")
    for name, wanted in WANTED.items():
        if name in summary:
            out.append(f"{name:<20} {_spread(summary[name], '.3f' if 'loss' in name else '.2f'):<24} {wanted}")
    if summary["ceiling_share"]:
        share, flops = _spread(summary["ceiling_share"], ".1%"), summary["ceiling_flops"]
        out.append(f"{'ceiling_share':<20} {share:<24} of {flops / 1e12:.2f} TFLOP/s, a large 16-bit product here")
    return out


def _spread(values: dict[str, float], form: str) -> str:
    return f"{values['median']:{form}} ({values['low']:{form}}–{values['high']:{form}})"
