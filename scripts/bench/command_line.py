"""edgepeft's command line, for measurements that are whole runs."""

import json
import subprocess
import sys


def edgepeft(*words):
    """What a command prints with --json; of `train`, the event that it ends with.

    Its warnings and errors go to stderr, as they come.
    """
    done = subprocess.run(
        [sys.executable, "-m", "edgepeft", *map(str, words), "--json"], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"edgepeft {' '.join(map(str, words))} ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1] if words[0] == "train" else done.stdout)
