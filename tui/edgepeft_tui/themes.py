"""Themes of our own, beside Textual's."""

from __future__ import annotations

from textual.theme import Theme

DEFAULT_THEME = "edgepeft"

OWN_THEMES = (
    Theme(
        name="edgepeft",
        primary="#5f87af",
        secondary="#87afaf",
        accent="#e0a458",
        foreground="#d7d7d2",
        background="#16191d",
        surface="#1d2126",
        panel="#262b31",
        success="#8fbf7f",
        warning="#e0a458",
        error="#d9705f",
        dark=True,
    ),
)
"""Calm, with one accent; the first one is the default."""
