"""Checks the project: sets up .venv by itself, then format, lint, types, layers and tests.

    python3 scripts/test.py          the quick tests, within 10 minutes
    python3 scripts/test.py --full   the slow ones too (kills, whole-model runs), within 30 minutes

Other options go to pytest: python3 scripts/test.py -k lora
"""

import os
import sys
import time

import environment


def main():
    arguments = sys.argv[1:]
    if "-h" in arguments or "--help" in arguments:
        print(__doc__)
        return 0
    full = "--full" in arguments
    rest = [argument for argument in arguments if argument != "--full"]
    python = environment.prepare()
    pytest = [python, "-m", "pytest", "-n", str(min(os.cpu_count() or 1, 8)), "--dist", "worksteal"]
    if not full:
        pytest += ["-m", "not slow"]
    steps = [
        ("format", [python, "-m", "ruff", "format", "--check", "."]),
        ("lint", [python, "-m", "ruff", "check", "."]),
        ("types", [python, "-m", "mypy"]),
        ("layers", [python, "-c", "from importlinter.cli import lint_imports_command as run; run()"]),
        ("tests", pytest + rest),
    ]
    failed = []
    for name, command in steps:
        environment.say("\n== %s ==" % name)
        begun = time.monotonic()
        code = environment.call(command)
        environment.say("== %s: %s, %.0f s ==" % (name, "ok" if code == 0 else "FAILED", time.monotonic() - begun))
        if code != 0:
            failed.append(name)
    environment.say("\nall green" if not failed else "\nfailed: %s" % ", ".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
