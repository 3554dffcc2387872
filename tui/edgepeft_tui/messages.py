"""What the workers tell the screens. Sampled messages replace older ones that were not handled yet."""

from __future__ import annotations

from dataclasses import dataclass

from textual.message import Message

from edgepeft_tui.readings import Machine, Shelves


@dataclass
class MachineRead(Message):
    """The machine was looked at."""

    machine: Machine

    def can_replace(self, message: Message) -> bool:
        """A newer look makes an older one worthless."""
        return isinstance(message, MachineRead)


@dataclass
class ShelvesRead(Message):
    """Runs, adapters and models were looked at."""

    shelves: Shelves

    def can_replace(self, message: Message) -> bool:
        """A newer look makes an older one worthless."""
        return isinstance(message, ShelvesRead)
