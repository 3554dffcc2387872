"""How long the Adapters screen takes to open on a large library: until the first screenful is there, and until all is.

    python scripts/bench/open_adapters.py [COUNT]

The library is made in a temporary folder; the first look reads every file, the second one only asks when they changed.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
from pathlib import Path

AIM_SECONDS = 0.3


def make_library(root: Path, count: int) -> None:
    """`count` adapters with a card each, as training writes it: two modules in 30 layers."""
    import numpy as np
    from safetensors.numpy import save_file

    source = root / "source"
    source.mkdir()
    names = [
        f"base_model.model.model.layers.{layer}.self_attn.{linear}.lora_{part}.weight"
        for layer in range(30)
        for linear in ("q_proj", "v_proj")
        for part in "AB"
    ]
    save_file({name: np.zeros((1, 1), np.float32) for name in names}, source / "weights")
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}
    card = {
        "name": "",
        "version": 1,
        "base": "smollm2-135m",
        "base_fingerprint": "sha256:" + "a" * 64,
        "recipe": None,
        "layout": None,
        "parameters": [{"name": name, "shape": [16, 576]} for name in names],
        "trainable_parameters": 921600,
        "trainable_share": 0.007,
        "versions": {"torch": "2.13.0"},
        "template": None,
        "created": "2026-03-04T14:02:00+00:00",
        "run": "triage-1",
        "steps": 900,
        "metrics": {"eval_loss": 0.297},
    }
    for number in range(count):
        folder = root / "adapters" / f"adapter-{number:04d}" / "v1"
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        (folder / "card.json").write_text(json.dumps(card))
        os.link(source / "weights", folder / "adapter_model.safetensors")


async def measure(count: int) -> None:
    """Opens the screen twice and prints both times."""
    from edgepeft_tui import app as ui
    from edgepeft_tui.app import EdgepeftApp
    from edgepeft_tui.readings import Machine, Shelves
    from edgepeft_tui.widgets.lines import Lines

    # Home's own look at the folders would be measured along.
    ui.read_machine = lambda: Machine("", ())  # type: ignore[assignment]
    ui.read_shelves = lambda: Shelves((), (), ())  # type: ignore[assignment]
    for look in ("first", "second"):
        app = EdgepeftApp()
        async with app.run_test(size=(120, 40)) as pilot:
            await pilot.pause()
            began = time.perf_counter()
            going = asyncio.create_task(app.go("adapters"))
            while not (table := next(iter(app.screen.query(Lines)), None)) or not table.rows:
                await asyncio.sleep(0.001)
            # Drawn, not only held.
            table.render_line(1)
            screenful = time.perf_counter() - began
            while len(table.rows) < count:
                await asyncio.sleep(0.001)
            whole = time.perf_counter() - began
            await going
        verdict = "within" if screenful <= AIM_SECONDS else "beyond"
        print(
            f"{look} look, {count} adapters: screenful after {1000 * screenful:.0f} ms ({verdict} the aim of "
            f"{1000 * AIM_SECONDS:.0f} ms), all after {1000 * whole:.0f} ms"
        )


if __name__ == "__main__":
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    with tempfile.TemporaryDirectory() as folder:
        os.environ["EDGEPEFT_HOME"] = folder
        make_library(Path(folder), wanted)
        asyncio.run(measure(wanted))
