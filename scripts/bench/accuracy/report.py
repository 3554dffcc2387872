"""Figures of a section: the summary that is written, the table and the line that are printed, progress on the way."""

import statistics
import sys
import time

from edgepeft.units import MIB, format_bytes

WORST_ROWS = 5
"""Rows of a section's table: those with the largest errors."""


class Limit:
    """What a section promises, and whether its rows keep it."""

    def __init__(self, title, promise, *, median=None, worst=None, row=None, coverage=None):
        self.title = title
        self.promise = promise
        self._median = median
        self._worst = worst
        self._row = row
        self._coverage = coverage

    def broken(self, summary):
        """The parts of the promise that the rows do not keep, in words; empty where all is well."""
        if not summary["count"]:
            return ["nothing was measured"]
        found = []
        for name, limit in (("median", self._median), ("worst", self._worst)):
            if limit is not None and summary[name] > limit:
                found.append(f"{name} {percent(summary[name])} is above {percent(limit)}")
        if self._row is not None:
            broken = [row for row in summary["rows"] if row["error"] is not None and not self._row(row)]
            if broken:
                found.append(f"{len(broken)} of {summary['count']} cases break it")
        if self._coverage is not None and covered(summary) < self._coverage:
            found.append(f"{percent(covered(summary))} of the rows are covered, fewer than {percent(self._coverage)}")
        return found


def rss_is_within(row):
    """Within max(8 %, 64 MiB) of the measured bytes, and below them by at most max(3 %, 48 MiB)."""
    predicted, measured = row["predicted_bytes"], row["measured_bytes"]
    return -max(0.03 * measured, 48 * MIB) <= predicted - measured <= max(0.08 * measured, 64 * MIB)


LIMITS = {
    "closed_form": Limit("closed form vs dry run", "median 1 %, worst 4 %", median=0.01, worst=0.04),
    "dry_run": Limit("dry run vs real step", "worst 1 %", worst=0.01),
    "rss": Limit(
        "predicted vs measured RSS",
        "within max(8 %, 64 MiB), under by at most max(3 %, 48 MiB)",
        row=rss_is_within,
    ),
    "budgets": Limit(
        "budgets",
        "plans that fit stay within them and use 70 % where more was wanted; refusals are right",
        row=lambda row: row["kept"],
    ),
    "published": Limit("published figures", "median 8 %, 60 % of the rows covered", median=0.08, coverage=0.60),
}
"""The five, in the order they are measured."""


def summarize(rows):
    """What `--json` holds for a section: all errors are fractions, `worst_under` is the largest under-prediction."""
    errors = [row["error"] for row in rows if row["error"] is not None]
    return {
        "count": len(errors),
        "median": statistics.median(map(abs, errors)) if errors else None,
        "worst": max(map(abs, errors)) if errors else None,
        "worst_under": max(0.0, -min(errors)) if errors else None,
        "rows": rows,
    }


def covered(summary):
    """The share of rows that have something to compare."""
    return summary["count"] / len(summary["rows"]) if summary["rows"] else 0.0


def line(name, summary):
    """One line: what was found, what was promised, and whether that is kept."""
    limit = LIMITS[name]
    broken = limit.broken(summary)
    verdict = "MISSED: " + "; ".join(broken) if broken else "met"
    if not summary["count"]:
        return f"{limit.title}: 0 cases (limit: {limit.promise}) {verdict}"
    cases = f"{summary['count']} cases"
    if summary["count"] < len(summary["rows"]):
        cases += f" of {len(summary['rows'])} ({percent(covered(summary))})"
    return (
        f"{limit.title}: {cases}, median {percent(summary['median'])}, worst {percent(summary['worst'])}, "
        f"worst under {percent(summary['worst_under'])} (limit: {limit.promise}) {verdict}"
    )


def table(name, summary):
    """The rows with the largest errors, and those that break the section's promise."""
    rows = [row for row in summary["rows"] if row["error"] is not None]
    rows.sort(key=lambda row: abs(row["error"]), reverse=True)
    kept = LIMITS[name]._row or (lambda row: True)
    shown = rows[:WORST_ROWS] + [row for row in rows[WORST_ROWS:] if not kept(row)]
    cells = [("largest errors", "predicted", "measured", "error")]
    cells += [
        (
            _case(row),
            _bytes(row.get("predicted_bytes")),
            _bytes(row.get("measured_bytes")),
            f"{100 * row['error']:+.2f} %" + (f"  {row['reason']}" if row.get("reason") else ""),
        )
        for row in shown
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(3)]
    return "\n".join(
        f"  {case:<{widths[0]}}  {predicted:>{widths[1]}}  {measured:>{widths[2]}}  {error}"
        for case, predicted, measured, error in cells
    )


def _case(row):
    """What a row is about: its `case`, or all that was drawn for it."""
    if "case" in row:
        return str(row["case"])
    figures = ("error", "reason", "kept", "predicted_bytes", "measured_bytes")
    return " ".join(str(value) for name, value in row.items() if name not in figures)


def percent(fraction):
    return f"{100 * fraction:.2f} %"


def _bytes(size):
    return "" if size is None else format_bytes(size)


class Progress:
    """How far a section is, on stderr, with the time that is probably left."""

    def __init__(self, name, total, stream=None):
        self._name = name
        self._total = total
        self._stream = stream or sys.stderr
        self._begun = self._told = time.monotonic()
        self._done = 0

    def step(self, what=""):
        """One more case is done."""
        self._done += 1
        now = time.monotonic()
        if now - self._told < 2 and self._done < self._total:
            return
        self._told = now
        left = (now - self._begun) / self._done * (self._total - self._done)
        text = f"[{self._name}] {self._done}/{self._total}, {left:.0f} s left {what}".rstrip()
        if self._stream.isatty():
            self._stream.write(f"\r\033[K{text}" + ("\n" if self._done == self._total else ""))
        else:
            self._stream.write(text + "\n")
        self._stream.flush()
