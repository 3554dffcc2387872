"""Which key an action can have: what is taken, and what terminals do not deliver."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping

import msgspec

from edgepeft_tui.actions import Action, all_actions

_OTHERS = {
    "ctrl+h": "backspace",
    "ctrl+i": "tab",
    "ctrl+m": "enter",
    "ctrl+j": "enter",
    "ctrl+left_square_bracket": "escape",
}
"""Keys that arrive as another one."""
_MOVING = ("up", "down", "left", "right", "home", "end", "pageup", "pagedown", "tab", "shift+tab")
_EDITING = tuple(f"ctrl+{letter}" for letter in "acdekuvwxyz")


class KeyWord(msgspec.Struct, frozen=True):
    """What is to be said of a key for an action."""

    refusal: str = ""
    """Why it cannot be had; empty where it can."""
    note: str = ""
    """What should be known before it is taken."""


def keys_of(action: Action, chosen: Mapping[str, str]) -> str:
    """The keys that an action has now."""
    return chosen.get(action.id, action.key)


def judge_key(key: str, action: Action, chosen: Mapping[str, str]) -> KeyWord:
    """What is to be said of `key`, as Textual names it, for an action.

    Args:
        key: such as `ctrl+f` or `question_mark`.
        action: that shall have it.
        chosen: keys of config.toml by the action's id.
    """
    if key in _OTHERS:
        return KeyWord(refusal=f"terminals deliver it as {_OTHERS[key]}")
    if key in _MOVING:
        return KeyWord(refusal="lists and texts move with it")
    for other in all_actions():
        if other.id != action.id and _meet(area_of(action), area_of(other)) and key in _names(keys_of(other, chosen)):
            return KeyWord(refusal=f"{other.id} ({other.label}) has it; give that one another key first")
    return KeyWord(note=_doubts(key, action))


def area_of(action: Action) -> str:
    """`app`, or a screen's."""
    return action.id.partition(".")[0]


def _meet(one: str, other: str) -> bool:
    return one == other or "app" in (one, other)


def _doubts(key: str, action: Action) -> str:
    modifiers, _, last = key.rpartition("+")
    held = set(modifiers.split("+")) - {""}
    if held - {"ctrl"} or (held and len(last) > 1):
        return "many terminals, and tmux, do not deliver it"
    if key == "ctrl+b":
        return "tmux keeps it for itself"
    if key == "ctrl+q" or key == "f11":
        return "some terminals keep it for themselves"
    if key in _EDITING:
        return "it does nothing here while a line of text has the focus, which uses it"
    if not held and len(last) == 1 and area_of(action) in ("app", "chat"):
        return "it does nothing while a line of text has the focus"
    return ""


def _names(keys: str) -> set[str]:
    """Keys with commas between, as Textual names them."""
    return {_name(key.strip()) for key in keys.split(",")}


def _name(key: str) -> str:
    if len(key) == 1 and not key.isalnum():
        return unicodedata.name(key, key).lower().replace("-", "_").replace(" ", "_")
    return key
