"""Copying: the system's clipboard where there is one, else the terminal's own way (OSC 52), and a word on which."""

from __future__ import annotations

from typing import Any

from textual.app import App


def copy_text(app: App[Any], text: str) -> str:
    """Copies and returns how, as a clause. May block for a moment: call it from a thread."""
    import pyperclip

    try:
        pyperclip.copy(text)
    except (pyperclip.PyperclipException, OSError):
        app.call_from_thread(app.copy_to_clipboard, text)
        return "sent to the terminal's clipboard (OSC 52); some terminals ignore it"
    return "copied to the system clipboard"
