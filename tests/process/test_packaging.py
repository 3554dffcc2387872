"""The wheel: built as a user's pip builds it, installed beside nothing of the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import edgepeft

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_packages_the_profiles_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"edgepeft", "edgepeft_tui", f"edgepeft-{edgepeft.__version__}.dist-info"}
    assert sum(name.startswith("edgepeft/_profiles/gpus/") for name in names) >= 25
    assert any(name.startswith("edgepeft/_profiles/presets/") for name in names)
    assert "edgepeft_tui/screens/home.tcss" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_an_installed_wheel_works_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    inside = "Scripts" if os.name == "nt" else "bin"
    python = venv / inside / ("python.exe" if os.name == "nt" else "python")
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "-q", str(wheel)],
        check=True,
    )
    # The dependencies come from this environment's folder; its .pth files, and with them the checkout, do not.
    site = Path(
        subprocess.run(
            [python, "-c", "import site; print(site.getsitepackages()[-1])"], check=True, capture_output=True, text=True
        ).stdout.strip()
    )
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    environment = {"PATH": os.environ["PATH"], "EDGEPEFT_HOME": str(tmp_path / "home")}
    if os.name == "nt":
        environment["SYSTEMROOT"] = os.environ["SYSTEMROOT"]

    def run(*arguments: str) -> str:
        program = str(venv / inside / "edgepeft")
        return subprocess.run(
            [program, *arguments], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
        ).stdout

    assert run("--version") == f"edgepeft {edgepeft.__version__}\n"
    shipped = json.loads(run("where", "--json"))["shipped profiles"]
    assert Path(shipped["path"]).is_relative_to(venv)
    assert "rtx-4090-24gb" in run("profiles", "list", "--json")
    assert "24.0 GiB" in run("doctor", "--gpu", "rtx-4090-24gb")
