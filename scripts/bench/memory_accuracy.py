"""How far predicted memory is from measured memory: five sections, each with the limit that it promises.

    python scripts/bench/memory_accuracy.py [--seed 0] [--published CSV] [--quick] [--only SECTION ...]
                                            [--json FILE] [--check]

    closed_form  the closed form against the dry run, over configurations drawn from the seed
    dry_run      the dry run against the real step on the CPU, read from the allocator's own events
    rss          predicted against measured resident memory of real training processes
    budgets      plans for random budgets on tiny models: those that fit are trained, those refused are simulated
    published    figures that others measured on their cards, by simulating their technique

Errors are predicted / measured - 1. `--quick` measures a sample in about two minutes. Every section runs in a process
of its own, so that nothing of one is alive in another. `--check` ends with exit code 1 when a limit is missed.
"""

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def parse(arguments):
    names = ("closed_form", "dry_run", "rss", "budgets", "published")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="draws other configurations")
    parser.add_argument("--published", metavar="CSV", help="file with the columns of published_vram.csv")
    parser.add_argument("--quick", action="store_true", help="a sample, in about two minutes")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="SECTION")
    parser.add_argument("--json", metavar="FILE", help="write all rows and figures")
    parser.add_argument("--check", action="store_true", help="exit code 1 when a limit is missed")
    parser.add_argument("--rows-of", choices=names, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def measure_here(name, options):
    """Measures one section in this process and writes its rows to the file that `--json` names."""
    section = importlib.import_module(f"accuracy.{name}")
    extra = (options.published,) if name == "published" else ()
    rows = section.measure(options.seed, options.quick, *extra)
    Path(options.json).write_text(json.dumps(rows), encoding="utf-8")


def measure_apart(name, options, folder):
    """The rows of one section, measured in a process of its own; None where that failed, which it has told then."""
    rows = folder / f"{name}.json"
    home = folder / f"home-{name}"
    command = [sys.executable, __file__, "--rows-of", name, "--seed", str(options.seed), "--json", str(rows)]
    if options.quick:
        command.append("--quick")
    if options.published:
        command += ["--published", str(Path(options.published).absolute())]
    environment = {**os.environ, "EDGEPEFT_HOME": str(home), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    # Sections print nothing of their own: stdout is for figures, so a library that prints goes to stderr.
    code = subprocess.run(command, env=environment, stdout=sys.stderr.fileno(), check=False).returncode
    return json.loads(rows.read_text(encoding="utf-8")) if code == 0 else None


def main(arguments):
    options = parse(arguments)
    if options.rows_of:
        measure_here(options.rows_of, options)
        return 0
    from accuracy.report import LIMITS, line, summarize, table

    if options.published and not Path(options.published).is_file():
        sys.exit(f"{options.published}: there is no such file")
    summaries, lines, met = {}, [], True
    with tempfile.TemporaryDirectory(prefix="edgepeft-accuracy-") as folder:
        for name in LIMITS:
            if name not in options.only:
                continue
            if name == "published" and not options.published:
                summaries[name] = summarize([])
                lines.append(f"{LIMITS[name].title}: not measured, --published names no file")
                continue
            begun = time.monotonic()
            rows = measure_apart(name, options, Path(folder))
            summary = summaries[name] = summarize(rows or [])
            met = met and not LIMITS[name].broken(summary)
            lines.append(line(name, summary) if rows is not None else f"{LIMITS[name].title}: FAILED, see above")
            print(f"== {name}, seed {options.seed}, {time.monotonic() - begun:.0f} s ==")
            if summary["count"]:
                print(table(name, summary))
            print(flush=True)
    print("\n".join(lines))
    if options.json:
        Path(options.json).write_text(json.dumps(summaries, indent=1) + "\n", encoding="utf-8")
    failed = any(text.endswith("FAILED, see above") for text in lines)
    return 1 if failed or (options.check and not met) else 0


if __name__ == "__main__":
    if importlib.util.find_spec("edgepeft") is None:
        sys.path.insert(0, str(ROOT / "scripts"))
        import environment

        sys.exit(environment.call([environment.prepare(), *sys.argv], cwd=Path.cwd()))
    sys.exit(main(sys.argv[1:]))
