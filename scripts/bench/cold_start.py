"""How long the light commands need before they do anything, beside a bare interpreter in the same run.

    python scripts/bench/cold_start.py [--rounds 10] [--json FILE]

Each command is started as a fresh process, in turn with `python -c pass`; what is printed is the median of the
difference to the bare interpreter (the imports), with the lowest and the highest of it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMANDS = {
    "--version": ["--version"],
    "--help": ["--help"],
    "models list": ["models", "list"],
    "runs list": ["runs", "list"],
    "doctor": ["doctor"],
}


def seconds_of(arguments, home):
    begun = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "EDGEPEFT_HOME": home},
    )
    return time.perf_counter() - begun


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    over = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as home:
        for arguments in COMMANDS.values():
            seconds_of(["-m", "edgepeft", *arguments], home)
        for _ in range(options.rounds):
            for name, arguments in COMMANDS.items():
                bare = seconds_of(["-c", "pass"], home)
                over[name].append(seconds_of(["-m", "edgepeft", *arguments], home) - bare)
    figures = {
        name: {"median": statistics.median(values), "low": min(values), "high": max(values)}
        for name, values in over.items()
    }
    for name, figure in figures.items():
        print(
            f"edgepeft {name:<12} {1e3 * figure['median']:4.0f} ms over a bare interpreter "
            f"({1e3 * figure['low']:.0f} to {1e3 * figure['high']:.0f})"
        )
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
