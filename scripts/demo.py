"""Runs the main job on the embedded model: sets up .venv by itself, then `edgepeft demo` with the given options.

python3 scripts/demo.py [--seed N] [--json FILE] [--write-data DIR]
"""

import sys

import environment


def main():
    python = environment.prepare()
    return environment.call([python, "-m", "edgepeft", "demo"] + sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
