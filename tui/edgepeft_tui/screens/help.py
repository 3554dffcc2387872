"""F1: what the focused part is and which keys it has, then the screen's, then those that work everywhere."""

from __future__ import annotations

from typing import Any, ClassVar

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.dom import DOMNode
from textual.screen import ModalScreen, Screen
from textual.widget import Widget
from textual.widgets import Input, Static, TextArea

from edgepeft_tui.text import visible

_TEXT_ACTIONS = {
    binding.action for kind in (Input, TextArea) for binding in kind.BINDINGS if isinstance(binding, Binding)
}
"""What every line of text does with its keys."""


class HelpScreen(ModalScreen[None]):
    """Lies over a screen; what it says is made from the keys that are in force there."""

    CSS = """
    HelpScreen { align: center middle; background: $background 60%; }
    HelpScreen .dialog { width: 84; padding: 0 1; }
    HelpScreen .dialog Static { height: auto; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,enter,q,f1", "dismiss_empty", "Close", id="help.close", tooltip="Close this help"),
    ]

    def __init__(self, screen: Screen[Any]) -> None:
        super().__init__()
        self._told = tell_help(screen)

    def compose(self) -> ComposeResult:
        """One text in a frame that scrolls."""
        with VerticalScroll(classes="dialog") as frame:
            frame.border_title = "Help"
            frame.border_subtitle = "escape closes it"
            yield Static(self._told)

    def on_mount(self) -> None:
        """The frame scrolls by keys."""
        self.query_one(".dialog").focus()

    def action_dismiss_empty(self) -> None:
        """Closes it."""
        self.dismiss(None)


def tell_help(screen: Screen[Any]) -> RenderableType:
    """The focused part, what it lies in, the screen, and the app: each with its words and its keys."""
    keys = _keys_by_node(screen)
    parts: list[RenderableType] = []
    node: DOMNode | None = screen.focused or screen
    while node is not None:
        words, table = help_of(node), keys.get(node)
        if words or table is not None:
            parts += [Text()] if parts else []
            parts.append(Text(_title_of(node, screen), style="bold"))
            parts += [Text(visible(words))] if words else []
            parts += [table] if table is not None else []
        node = node.parent
    return Group(*parts) if parts else Text("There is nothing to say about this part.")


def help_of(node: DOMNode) -> str:
    """What a part says about itself: its own `help_text`, else its class's `HELP`."""
    own = getattr(node, "help_text", "")
    if isinstance(node, Input) and not own and not node.HELP:
        own = "A line of text. Left and right move in it, ctrl+a and ctrl+e to its ends; ctrl+u clears it."
    return " ".join((own or node.HELP or "").split())


def _title_of(node: DOMNode, screen: Screen[Any]) -> str:
    if node is screen:
        return visible(str(getattr(node, "AREA", "") or "This dialog")).capitalize()
    if not isinstance(node, Widget):
        return "Everywhere"
    title = "Line of text" if isinstance(node, Input) else node.border_title
    return visible(Text.from_markup(title).plain) if title else _words(type(node).__name__)


def _words(name: str) -> str:
    """`FilterLine` as `Filter line`."""
    return "".join(f" {char.lower()}" if char.isupper() and at else char for at, char in enumerate(name))


def _keys_by_node(screen: Screen[Any]) -> dict[DOMNode, Table]:
    """Tables of keys, by the part that has them; several keys of one action are in one line."""
    found: dict[DOMNode, dict[str, tuple[list[str], str]]] = {}
    for active in screen.active_bindings.values():
        binding = active.binding
        words = binding.tooltip or binding.description
        if not words or not active.enabled or _needs_no_word(active.node, binding.action):
            continue
        keys, _ = found.setdefault(active.node, {}).setdefault(binding.action, ([], words))
        shown = screen.app.get_key_display(binding)
        if shown not in keys:
            keys.append(shown)
    tables = {}
    for node, actions in found.items():
        table = Table.grid(padding=(0, 1))
        table.add_column(min_width=9, style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for keys, words in actions.values():
            table.add_row(Text(visible(" ".join(keys))), Text(visible(words)))
        tables[node] = table
    return tables


def _needs_no_word(node: DOMNode, action: str) -> bool:
    """Whether it is a key that every line of text has, or scrolls to a side of which there is no more."""
    if isinstance(node, Input | TextArea):
        return action in _TEXT_ACTIONS or action.startswith(("scroll_", "page_", "cursor_"))
    sideways = action in ("scroll_left", "scroll_right", "page_left", "page_right")
    return sideways and isinstance(node, Widget) and not node.allow_horizontal_scroll
