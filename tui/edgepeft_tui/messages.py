"""What the workers tell the screens. Sampled messages replace older ones that were not handled yet.

The app hands them on to the room that is shown; bubbling up from there they would come back to it for ever.
"""

from __future__ import annotations

from dataclasses import dataclass

from textual.message import Message

from edgepeft_tui.readings import Machine, Shelves


@dataclass
class MachineRead(Message, bubble=False):
    """The machine was looked at."""

    machine: Machine

    def can_replace(self, message: Message) -> bool:
        """A newer look makes an older one worthless."""
        return isinstance(message, MachineRead)


@dataclass
class ShelvesRead(Message, bubble=False):
    """Runs, adapters and models were looked at."""

    shelves: Shelves

    def can_replace(self, message: Message) -> bool:
        """A newer look makes an older one worthless."""
        return isinstance(message, ShelvesRead)
