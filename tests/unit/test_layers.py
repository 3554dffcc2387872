"""What may import what, seen in a fresh interpreter; import-linter checks the same statically."""

from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import edgepeft

HEAVY = {"torch", "transformers", "bitsandbytes", "accelerate", "peft"}
DRAWING = {"typer", "rich", "textual"}
LIGHT_PACKAGES = ["hardware", "models", "methods", "data", "library", "memory", "plan", "runs", "chat", "demo"]
GROUND = ["errors", "units", "paths", "processes", "settings", "spec", "profiles"]


def _modules_after(code: str, home: Path) -> set[str]:
    program = f"{code}\nimport sys, json\nprint('\\n' + json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "EDGEPEFT_HOME": str(home)},
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def _all_modules(package: str) -> list[str]:
    folder = Path(edgepeft.__file__).parent / package
    return [f"edgepeft.{package}"] + [
        f"edgepeft.{package}.{module.name}" for module in pkgutil.walk_packages([str(folder)])
    ]


@pytest.mark.parametrize("package", LIGHT_PACKAGES)
def test_no_module_of_a_light_room_brings_in_torch_or_a_drawing_library(package: str, tmp_path: Path) -> None:
    imports = "\n".join(f"import {module}" for module in _all_modules(package))
    assert not _modules_after(imports, tmp_path) & (HEAVY | DRAWING)


def test_the_ground_brings_in_neither(tmp_path: Path) -> None:
    imports = "\n".join(f"import edgepeft.{module}" for module in GROUND)
    assert not _modules_after(imports, tmp_path) & (HEAVY | DRAWING)


def test_the_whole_command_line_brings_in_no_torch_and_no_textual(tmp_path: Path) -> None:
    imports = "\n".join(f"import {module}" for module in _all_modules("cli"))
    assert not _modules_after(imports, tmp_path) & (HEAVY | {"textual"})


def test_the_whole_ui_brings_in_no_torch(tmp_path: Path) -> None:
    folder = Path(edgepeft.__file__).parent.parent / "tui" / "edgepeft_tui"
    names = [module.name for module in pkgutil.walk_packages([str(folder)], "edgepeft_tui.")]
    assert names
    assert not _modules_after("\n".join(f"import {name}" for name in names), tmp_path) & HEAVY


@pytest.mark.parametrize(
    "arguments", [["--help"], ["doctor"], ["plan", "--help"], ["models", "list"], ["runs", "list"]]
)
def test_quick_commands_run_without_torch(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import edgepeft.cli.app as program\n"
        f"try:\n    program.run({arguments!r})\n"
        "except SystemExit as end:\n    assert not end.code, end.code"
    )
    assert not _modules_after(code, tmp_path) & HEAVY


def test_version_needs_nothing_but_the_package(tmp_path: Path) -> None:
    code = "import sys; sys.argv = ['edgepeft', '--version']\nimport edgepeft.cli; edgepeft.cli.main()"
    loaded = _modules_after(code, tmp_path)
    assert not loaded & (HEAVY | DRAWING | {"msgspec", "click"})
