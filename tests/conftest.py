"""Every test gets a home of its own and no network."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import pytest

from tiny import write_alpaca, write_tiny_model

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background job ignores Ctrl-C, and so would every process that a test wants to interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def edgepeft_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty EDGEPEFT_HOME."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("EDGEPEFT_HOME", str(folder))
    for name in ("EDGEPEFT_BUDGET", "EDGEPEFT_GPU", "EDGEPEFT_INTENT", "EDGEPEFT_DEBUG", "EDGEPEFT_CO2_GRAMS_PER_KWH"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: object) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            raise AssertionError(f"a test tried to connect to {address}")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    """A model folder as one downloads it."""
    return write_tiny_model(tmp_path / "tiny-model")


@pytest.fixture
def alpaca_file(tmp_path: Path) -> Path:
    """A small data file of good records."""
    return write_alpaca(tmp_path / "alpaca.jsonl")
