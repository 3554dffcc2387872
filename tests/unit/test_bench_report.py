"""How the memory bench sums up its rows and judges them."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench"
sys.path.insert(0, str(BENCH))

from accuracy.report import LIMITS, Progress, line, summarize, table  # noqa: E402

MIB = 1 << 20


def rows(*errors: float | None, **more: Any) -> list[dict[str, Any]]:
    return [{"case": f"case {n}", "error": error, **more} for n, error in enumerate(errors)]


def test_a_summary_is_of_absolute_errors_and_names_the_largest_under_prediction() -> None:
    summary = summarize(rows(0.03, -0.02, 0.001))
    assert {name: summary[name] for name in ("count", "median", "worst", "worst_under")} == {
        "count": 3,
        "median": 0.02,
        "worst": 0.03,
        "worst_under": 0.02,
    }
    assert json.loads(json.dumps(summary)) == summary


def test_nothing_under_predicted_is_zero() -> None:
    assert summarize(rows(0.03, 0.01))["worst_under"] == 0


def test_a_section_without_figures_is_no_hit() -> None:
    assert "MISSED" in line("dry_run", summarize([]))


@pytest.mark.parametrize(
    ("name", "errors", "verdict"),
    [
        ("closed_form", (0.0, 0.005, -0.04), "met"),
        ("closed_form", (0.0, 0.005, -0.041), "worst 4.10 % is above 4.00 %"),
        ("closed_form", (0.02, 0.02, 0.0), "median 2.00 % is above 1.00 %"),
        ("dry_run", (0.0, -0.011), "worst 1.10 %"),
        ("published", (0.5, 0.08, 0.0, None, None), "met"),
        ("published", (0.01, None), "50.00 % of the rows are covered"),
    ],
)
def test_the_line_says_what_of_the_promise_is_missed(name: str, errors: tuple[float | None, ...], verdict: str) -> None:
    text = line(name, summarize(rows(*errors)))
    assert verdict in text
    assert ("MISSED" in text) == (verdict != "met")


@pytest.mark.parametrize(
    ("predicted", "measured", "kept"),
    [
        (164, 100, True),  # 64 MiB are allowed above a small process
        (165, 100, False),
        (52, 100, True),  # and 48 below
        (51, 100, False),
        (2160, 2000, True),  # 8 % above a large one
        (2161, 2000, False),
        (1940, 2000, True),  # and 3 % below
        (1939, 2000, False),
    ],
)
def test_resident_memory_may_differ_by_a_share_or_by_some_mib(predicted: int, measured: int, kept: bool) -> None:
    row = {"predicted_bytes": predicted * MIB, "measured_bytes": measured * MIB, "error": predicted / measured - 1}
    assert ("met" in line("rss", summarize([row]))) == kept


def test_a_table_shows_every_case_that_breaks_the_promise() -> None:
    kept = rows(*(0.0 for _ in range(20)), kept=True)
    broken = {"case": "the broken one", "error": 0.0, "kept": False, "reason": "used 40 % of the budget"}
    text = table("budgets", summarize([*kept, broken]))
    assert "the broken one" in text
    assert "used 40 % of the budget" in text
    assert len(text.splitlines()) < 10


def test_every_promise_of_the_bench_is_judged() -> None:
    assert list(LIMITS) == ["closed_form", "dry_run", "rss", "budgets", "published"]


def test_progress_ends_with_all_cases() -> None:
    out = io.StringIO()
    progress = Progress("rss", 2, out)
    progress.step()
    progress.step()
    assert "2/2" in out.getvalue()


def test_a_missing_file_of_published_figures_is_told_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCH / "memory_accuracy.py"), "--only", "published", "--published", "nowhere.csv"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.strip() == "nowhere.csv: there is no such file"
