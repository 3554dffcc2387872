"""The generator of the demo's data: alerts of three systems, each with the diagnosis that an operator would want.

Everything is drawn from the seed, so that the same seed writes the same files on every machine. A held-out alert uses a
symptom wording and an impact wording that no training alert uses; only frames, component names and numbers recur.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import msgspec

from edgepeft.demo.impacts import IMPACTS
from edgepeft.demo.wordings import APPLICATIONS, FRAMES, SYSTEMS, Cause, System
from edgepeft.paths import write_atomic

TRAIN_ALERTS = 360
HELD_OUT_ALERTS = 72
HELD_OUT_WORDINGS = 3
"""Wordings of each cause, and of each severity, that are kept for scoring."""
INSTRUCTION = "Diagnose this alert as JSON with severity, cause, component and runbook_step."


class Alert(msgspec.Struct, frozen=True):
    """One alert and what is right about it."""

    text: str
    """What monitoring says."""
    diagnosis: dict[str, str]
    """severity, cause, component and runbook_step."""

    @property
    def prompt(self) -> str:
        """What the model is asked."""
        return f"{INSTRUCTION}\n{self.text}"

    @property
    def answer(self) -> str:
        """What the model should say."""
        return json.dumps(self.diagnosis)


class AlertSet(msgspec.Struct, frozen=True):
    """The alerts of one system."""

    system: str
    train: tuple[Alert, ...]
    held_out: tuple[Alert, ...]


def generate(system: System, seed: int) -> AlertSet:
    """Training and held-out alerts of `system`, balanced over causes and severities."""
    # Seeding with a string hashes it by SHA-512, which no Python version or process changes.
    source = random.Random(f"edgepeft-demo-{system.name}-{seed}")
    train_causes, held_causes = _split_causes(system, source)
    train_impacts, held_impacts = _split_impacts(source)
    return AlertSet(
        system=system.name,
        train=tuple(_alerts(system, train_causes, train_impacts, TRAIN_ALERTS, source)),
        held_out=tuple(_alerts(system, held_causes, held_impacts, HELD_OUT_ALERTS, source)),
    )


def write_data(folder: Path, seed: int) -> dict[str, tuple[Path, Path]]:
    """Writes SYSTEM-train.jsonl and SYSTEM-heldout.jsonl for all three systems as `messages`; returns their paths."""
    written: dict[str, tuple[Path, Path]] = {}
    for system in SYSTEMS:
        alerts = generate(system, seed)
        paths = folder / f"{system.name}-train.jsonl", folder / f"{system.name}-heldout.jsonl"
        for path, part in zip(paths, (alerts.train, alerts.held_out), strict=True):
            write_atomic(path, "".join(_record(alert) for alert in part))
        written[system.name] = paths
    return written


def _record(alert: Alert) -> str:
    messages = [{"role": "user", "content": alert.prompt}, {"role": "assistant", "content": alert.answer}]
    return json.dumps({"messages": messages}) + "\n"


def _split_causes(system: System, source: random.Random) -> tuple[list[Cause], list[Cause]]:
    train, held_out = [], []
    for cause in system.causes:
        wordings = source.sample(cause.wordings, len(cause.wordings))
        train.append(msgspec.structs.replace(cause, wordings=tuple(wordings[HELD_OUT_WORDINGS:])))
        held_out.append(msgspec.structs.replace(cause, wordings=tuple(wordings[:HELD_OUT_WORDINGS])))
    return train, held_out


def _split_impacts(source: random.Random) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    train, held_out = {}, {}
    for severity, sentences in IMPACTS.items():
        shuffled = source.sample(sentences, len(sentences))
        train[severity], held_out[severity] = shuffled[HELD_OUT_WORDINGS:], shuffled[:HELD_OUT_WORDINGS]
    return train, held_out


def _alerts(
    system: System, causes: list[Cause], impacts: dict[str, list[str]], count: int, source: random.Random
) -> Iterator[Alert]:
    pairs = [(cause, severity) for cause in causes for severity in impacts]
    drawn = [pairs[index % len(pairs)] for index in range(count)]
    source.shuffle(drawn)
    # Each wording is used about equally often, in an order that has nothing to do with the other parts.
    decks: dict[str, list[str]] = {}

    def deal(name: str, cards: tuple[str, ...] | list[str]) -> str:
        if not decks.get(name):
            decks[name] = source.sample(list(cards), len(cards))
        return decks[name].pop()

    for cause, severity in drawn:
        component = f"{source.choice(system.components)}-{source.randint(1, 9)}"
        symptom = deal(cause.name, cause.wordings).format(
            n=source.randint(3, 95),
            p=source.randint(21, 99),
            s=source.randint(12, 95),
            m=source.randint(6, 58),
            app=source.choice(APPLICATIONS),
        )
        text = source.choice(FRAMES).format(
            component=component,
            symptom=symptom,
            impact=deal(severity, impacts[severity]),
            time=f"{source.randint(0, 23):02d}:{source.randint(0, 59):02d}",
        )
        yield Alert(
            text=text[0].upper() + text[1:] if text.startswith(symptom) else text,
            diagnosis={
                "severity": severity,
                "cause": cause.name,
                "component": component,
                "runbook_step": cause.step,
            },
        )
