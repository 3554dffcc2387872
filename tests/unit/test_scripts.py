"""The two commands on a fresh machine."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["environment.py", "demo.py", "test.py"])
def test_setup_scripts_parse_on_an_old_python(name: str) -> None:
    ast.parse((ROOT / "scripts" / name).read_text(encoding="utf-8"), feature_version=(3, 4))


def test_an_old_python_is_told_which_one_is_needed() -> None:
    code = (
        "import sys; sys.path.insert(0, 'scripts'); sys.version_info = (3, 9, 1, 'final', 0)\n"
        "import environment; environment.prepare()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "needs Python 3.11 or newer; this is 3.9" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_python_without_venv_is_told_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, 'scripts'); sys.modules['venv'] = None\n"
        "import environment; environment.prepare()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "venv" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="the hook is a shell script")
def test_ci_calls_the_test_command_of_the_readme() -> None:
    hook = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "python3 scripts/test.py --full" in hook
    assert "python3 scripts/test.py" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "python3 scripts/demo.py" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_constraints_hold_exact_versions_only() -> None:
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        name, _, version = line.partition("==")
        assert name, line
        assert version, line
        assert " " not in line, line
        assert "/" not in line, line
