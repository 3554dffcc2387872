"""Takes README's pictures of the terminal UI anew: a real run and real answers of the embedded model, as SVG.

    python scripts/screenshots.py [--keep FOLDER]

Everything happens in a home of its own: a few steps of training on the demo's alerts, then each screen at 120×36,
driven by its keys. It takes some minutes. --keep leaves that home in FOLDER, and goes on with what is there.
"""

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "screenshots"
SIZE = (120, 36)
NAME = "db-triage"
STEPS = 60
WAIT_SECONDS = 240


def train(home):
    """One finished run, and its adapter."""
    from edgepeft.demo.tour import demo_files

    train_file, held_out = demo_files(0)
    if (home / "adapters" / NAME).exists():
        return
    command = [sys.executable, "-m", "edgepeft", "train", "smollm2-135m", str(train_file), "--name", NAME]
    command += ["--precision", "nf4", "--learning-rate", "1e-3", "--samples-per-step", "8", "--max-steps", str(STEPS)]
    command += ["--eval-data", str(held_out), "--eval-every", "15", "--micro-batch-tokens", "1024"]
    subprocess.run(command, check=True)


def text_of(app):
    """What is on the screen."""
    return "\n".join("".join(segment.text for segment in strip) for strip in app.screen._compositor.render_strips())


async def until(app, pilot, pattern):
    """Waits until the screen matches."""
    for _ in range(WAIT_SECONDS * 4):
        await pilot.pause(0.25)
        if re.search(pattern, text_of(app)):
            return
    sys.exit(f"{pattern!r} was not seen:\n{text_of(app)}")


async def write(app, pilot, text):
    """Types a text into what has the focus."""
    named = {" ": "space", "\n": "ctrl+t"}
    await pilot.press(*(named.get(sign, sign) for sign in text))


def keep(app, name):
    TARGET.mkdir(parents=True, exist_ok=True)
    picture = app.export_screenshot(title="edgepeft")
    # No folder of this machine is shown; what stands for one is as long, for the lines were measured.
    for place, name in ((os.environ["EDGEPEFT_HOME"], "/home/me/peft"), (str(ROOT), "/home/me/edgepeft")):
        picture = picture.replace(place, (name + "-home" * len(place))[: len(place)])
    # Names that differ from one rendering to the next would change the files for nothing.
    (TARGET / f"{name}.svg").write_text(re.sub(r"terminal-\d+", "terminal", picture), encoding="utf-8")
    print(f"wrote docs/screenshots/{name}.svg", flush=True)


async def take():
    """Every screen, as a person comes by."""
    from edgepeft.demo.tour import demo_files
    from edgepeft_tui.app import EdgepeftApp

    _, held_out = demo_files(0)
    question = json.loads(held_out.read_text(encoding="utf-8").splitlines()[0])["messages"][0]["content"]

    app = EdgepeftApp()
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        await until(app, pilot, NAME)
        keep(app, "home")
        await pilot.press("d")
        await until(app, pilot, r"predicted +[\d.]+ [GM]iB")
        await until(app, pilot, r"checkpointing +[−-]")
        keep(app, "plan")
        await pilot.press("f4")
        await until(app, pilot, r"Finished|finished")
        await pilot.pause(1)
        keep(app, "train")
        await pilot.press("t")
        await until(app, pilot, "Write a message")
        await pilot.press("ctrl+o")
        await until(app, pilot, "base")
        await pilot.press("enter")
        await write(app, pilot, question)
        await pilot.press("enter")
        await until(app, pilot, r'"severity"')
        # The base says what it wants, until both have ended.
        await until(app, pilot, r"(?s)[\d.]+ t/s.*[\d.]+ t/s")
        await pilot.pause(5)
        keep(app, "chat")
        await pilot.press("f6")
        await until(app, pilot, NAME)
        await pilot.pause(2)
        keep(app, "adapters")
        await pilot.press("f7")
        await pilot.pause(3)
        keep(app, "settings")


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", metavar="FOLDER", type=Path)
    task = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as made:
        home = task.keep or Path(made)
        os.environ["EDGEPEFT_HOME"] = str(home)
        train(home)
        asyncio.run(take())


if __name__ == "__main__":
    main(sys.argv[1:])
