"""How fast the terminal UI is: its first frame, how long its event loop is held up, and when long lists are open.

    python scripts/bench/terminal_ui.py [--rounds 5] [--seconds 10] [--steps-per-second 100] [--json FILE]

The first frame is that of the real program in a pseudo-terminal of 120 x 40, from the start of the process until its
top line is written, in turn with a Textual app that shows one word. The lag is by how much a sleep of 5 ms in the app's
own event loop comes late while another process writes a run's steps and the Train screen follows it; the app draws into
a headless terminal of the same size. Lists are timed from the start of the app, or from the key that goes there, with
500 runs and 1,000 adapters on the disk.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tui"), str(ROOT / "tests")]
SIZE = (120, 40)
RUNS, ADAPTERS = 500, 1000
LIMITS = {"first frame": 0.6, "lag while a run is followed": 0.05, "lists": 0.3}
BARE = """
from textual.app import App
from textual.widgets import Static
class Bare(App):
    def compose(self):
        yield Static("bare")
Bare().run()
"""
WRITER = """
import sys, time
from recorded_runs import beginning, steps_between
from edgepeft.runs.events_file import EventWriter
from edgepeft.runs.layout import RunFolder
from edgepeft.runs.lock import RunLock
from pathlib import Path
run, rate, total = RunFolder(Path(sys.argv[1])), float(sys.argv[2]), int(sys.argv[3])
with RunLock(run), EventWriter(run.events_file) as writer:
    for event in beginning(total):
        writer.write(event)
    print("ready", flush=True)
    began = time.monotonic()
    for number in range(1, total + 1):
        for event in steps_between(number, number, total, every=500):
            writer.write(event)
        time.sleep(max(0.0, began + number / rate - time.monotonic()))
"""


@contextmanager
def own_home():
    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get("EDGEPEFT_HOME")
        os.environ["EDGEPEFT_HOME"] = folder
        try:
            yield Path(folder)
        finally:
            if before is None:
                del os.environ["EDGEPEFT_HOME"]
            else:
                os.environ["EDGEPEFT_HOME"] = before


def first_frame(arguments, awaited):
    """Seconds from the start of a program until it has written `awaited` to its terminal; POSIX only."""
    import fcntl
    import pty
    import struct
    import termios

    with own_home() as home:
        leader, follower = pty.openpty()
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", SIZE[1], SIZE[0], 0, 0))
        environment = {**os.environ, "EDGEPEFT_HOME": str(home), "TERM": "xterm-256color"}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path[:2])
        begun = time.perf_counter()
        program = subprocess.Popen(
            [sys.executable, *arguments], stdin=follower, stdout=follower, stderr=follower, env=environment
        )
        os.close(follower)
        try:
            seen = b""
            while awaited not in seen:
                seen += os.read(leader, 65536)
            return time.perf_counter() - begun
        finally:
            program.kill()
            program.wait()
            os.close(leader)


async def following(run, rate, seconds):
    """How late the loop's own sleeps are, in seconds, while a run is written and followed."""
    from edgepeft_tui.app import EdgepeftApp

    total = int(rate * (seconds + 20))
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(run.path), str(rate), str(total)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path[:3])},
    )
    try:
        assert writer.stdout.readline() == b"ready\n"
        app = EdgepeftApp()
        async with app.run_test(size=SIZE) as pilot:
            await app.go("train", run=run.id)
            while app.screen._view is None:
                await pilot.pause(0.05)
            # The first drawing loads plotext: once in the life of a program, and told apart.
            opening = await lags(2.0)
            late = await lags(seconds)
            steps = app.screen._view.state.step
    finally:
        writer.kill()
        writer.wait()
    return opening, late, steps


async def lags(seconds):
    late, until = [], time.perf_counter() + seconds
    while (begun := time.perf_counter()) < until:
        await asyncio.sleep(0.005)
        late.append(time.perf_counter() - begun - 0.005)
    return late


def write_many(home):
    """Folders of many runs and adapters, as links to one of each."""
    from adapter_files import write_lora
    from recorded_runs import finished

    first = finished("many", 200)
    for number in range(2, RUNS + 1):
        copy_of(first.path, first.path.with_name(f"many-{number}"), ("plan.json", "events.jsonl"))
    sizes = {
        f"model.layers.{layer}.self_attn.{name}": (8, 64, 64) for layer in range(4) for name in ("q_proj", "v_proj")
    }
    one = write_lora(home / "one", sizes)
    for number in range(ADAPTERS):
        copy_of(one, home / "adapters" / f"adapter-{number:04d}" / "v1", [file.name for file in one.iterdir()])


def copy_of(folder, target, names):
    target.mkdir(parents=True)
    for name in names:
        os.link(folder / name, target / name)


async def opening():
    """Seconds until Home has all runs and adapters, and until Train has its first runs and all of them."""
    from edgepeft_tui.app import EdgepeftApp
    from edgepeft_tui.readings import listed_runs
    from edgepeft_tui.widgets.shelf import Shelf

    async def until(screen, shelf, count):
        begun = time.perf_counter()
        while screen.query_one(f"#{shelf}", Shelf).option_count < count:
            await asyncio.sleep(0.005)
        return time.perf_counter() - begun

    found = {}
    listed_runs.cache_clear()
    app = EdgepeftApp()
    async with app.run_test(size=SIZE):
        home = app.screen
        begun = time.perf_counter()
        await until(home, "runs", RUNS)
        await until(home, "adapters", ADAPTERS)
        found["Home: all runs and adapters"] = time.perf_counter() - begun
        await app.go("train")
        found["Train: first runs"] = await until(app.screen, "runs", 2)
        found["Train: all runs"] = found["Train: first runs"] + await until(app.screen, "runs", RUNS)
    listed_runs.cache_clear()
    app = EdgepeftApp()
    app._look_at_shelves = lambda: None
    async with app.run_test(size=SIZE):
        await app.go("train")
        found["Train, nothing read before: first runs"] = await until(app.screen, "runs", 2)
        more = await until(app.screen, "runs", RUNS)
        found["Train, nothing read before: all runs"] = found["Train, nothing read before: first runs"] + more
    return found


def share(values, part):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def milliseconds(seconds):
    return f"{1000 * seconds:6.0f} ms"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--steps-per-second", type=float, default=100.0)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    frames, bare = [], []
    for _ in range(options.rounds):
        bare.append(first_frame(["-c", BARE], b"bare"))
        frames.append(first_frame(["-m", "edgepeft"], b"Adapters"))
    median, limit = statistics.median(frames), LIMITS["first frame"]
    figures = {
        "first_frame_seconds": {
            "median": median,
            "low": min(frames),
            "high": max(frames),
            "bare": statistics.median(bare),
            "limit": limit,
        }
    }
    print(
        f"first frame                 {milliseconds(median)}  ({milliseconds(min(frames)).strip()} to "
        f"{milliseconds(max(frames)).strip()}; an app of one word: "
        f"{milliseconds(statistics.median(bare)).strip()}; wanted {milliseconds(limit).strip()})"
    )
    with own_home():
        from edgepeft.runs.layout import create_run
        from recorded_runs import card_plan

        run = create_run(card_plan(1000), "followed")
        first, late, steps = asyncio.run(following(run, options.steps_per_second, options.seconds))
    limit = LIMITS["lag while a run is followed"]
    figures["lag_following_seconds"] = {
        "p50": share(late, 0.5),
        "p99": share(late, 0.99),
        "highest": max(late),
        "highest_at_opening": max(first),
        "steps": steps,
        "limit": limit,
    }
    print(
        f"lag while a run is followed {milliseconds(share(late, 0.99))}  at the 99th percentile (median "
        f"{milliseconds(share(late, 0.5)).strip()}, highest {milliseconds(max(late)).strip()}, at the opening "
        f"{milliseconds(max(first)).strip()}; {steps:,} steps; wanted {milliseconds(limit).strip()})"
    )
    with own_home() as home:
        write_many(home)
        opened = asyncio.run(opening())
    figures["lists_seconds"] = opened | {"limit": LIMITS["lists"]}
    for name, seconds in opened.items():
        print(f"{name:<40} {milliseconds(seconds)}")
    print(f"{RUNS} runs, {ADAPTERS:,} adapters; wanted {milliseconds(LIMITS['lists']).strip()} until a list is open")
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
