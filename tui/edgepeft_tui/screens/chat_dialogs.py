"""What the Chat screen asks: adapters with strengths, sampling, kept conversations."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import ClassVar

import msgspec
from rich.text import Text
from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from edgepeft.chat.archive import KeptConversation, forget
from edgepeft.chat.protocol import Sampling, check_sampling
from edgepeft.chat.setup import ChosenAdapter
from edgepeft.errors import EdgepeftError, UsageError
from edgepeft.library.store import AdapterFolder
from edgepeft.units import format_age
from edgepeft_tui.chat.choices import BASE, MOST_LANES, STRONGEST
from edgepeft_tui.glyphs import glyphs
from edgepeft_tui.screens.dialogs import Framed
from edgepeft_tui.text import visible

STEP = 0.1


class _Filter(Input):
    """Letters of a name. No name has a space, so that key marks a row."""

    def check_consume_key(self, key: str, character: str | None) -> bool:
        """Whether the key is text."""
        return key != "space" and super().check_consume_key(key, character)


class ChooseAdapters(Framed[tuple[ChosenAdapter | None, ...]]):
    """Adapters with their strengths: all in one answer, or each in a lane of its own.

    Answers the chosen ones in their order; None among them is the lane of the base alone.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        # Before the filter, which has the focus, takes them.
        Binding("up", "move(-1)", show=False, priority=True),
        Binding("down", "move(1)", show=False, priority=True),
        Binding("space", "mark", "Mark", id="lanes.mark", priority=True),
        Binding("left", "strength(-1)", "Weaker", id="lanes.weaker", priority=True),
        Binding("right", "strength(1)", "Stronger", id="lanes.stronger", priority=True),
    ]

    def __init__(
        self, fitting: Sequence[AdapterFolder], chosen: Sequence[ChosenAdapter | None], *, lanes: bool = False
    ) -> None:
        """Args: `chosen` are marked already, None for the base; `lanes` asks for a lane each."""
        super().__init__()
        self._lanes = lanes
        outside = [one.adapter for one in chosen if one is not None]
        known = {adapter.reference: adapter for adapter in [*fitting, *outside]}
        self._rows: list[AdapterFolder | None] = [None, *known.values()]
        self._scales = {one.adapter.reference: one.scale for one in chosen if one is not None}
        self._marked = [one.adapter.reference if one is not None else BASE for one in chosen]
        self._touched = False
        self._shown: list[AdapterFolder | None] = []

    def compose(self) -> ComposeResult:
        """A filter above the list."""
        with Vertical(classes="dialog tall") as frame:
            frame.border_title = "Compare" if self._lanes else "Adapters"
            yield _Filter(placeholder="letters of a name", id="filter")
            yield OptionList(markup=False)
            words = f"space marks 2 to {MOST_LANES}" if self._lanes else "space marks several"
            yield Static(Text(f"{words}, left and right change the strength, enter takes"), classes="hint")

    def on_mount(self) -> None:
        """Shows all of them."""
        self._fill()
        self.query_one(Input).focus()

    @on(Input.Changed)
    def _filter_changed(self) -> None:
        self._fill()

    def action_move(self, lines: int) -> None:
        """Another row is highlighted."""
        options = self.query_one(OptionList)
        (options.action_cursor_down if lines > 0 else options.action_cursor_up)()

    def action_strength(self, steps: int) -> None:
        """The highlighted adapter, weaker or stronger."""
        row = self._row()
        if row is not None:
            scale = self._scales.get(row.reference, 1.0) + steps * STEP
            self._scales[row.reference] = round(min(STRONGEST, max(-STRONGEST, scale)), 2)
            self._fill()

    @on(Input.Submitted)
    @on(OptionList.OptionSelected)
    def _taken(self) -> None:
        # Without a mark set here, the highlighted row alone is meant.
        marked = self._marked if self._touched or self._lanes else [self._key(self._row())] if self._shown else None
        if marked is None or (self._lanes and len(marked) < 2):
            self.query_one(".hint", Static).update(Text("Mark at least two with space", style="bold"))
            return
        rows = {self._key(row): row for row in self._rows}
        found: list[ChosenAdapter | None] = []
        for name in marked:
            row = rows[name]
            if row is not None:
                found.append(ChosenAdapter(row, self._scales.get(row.reference, 1.0)))
            elif self._lanes:
                found.append(None)
        self.dismiss(tuple(found))

    def action_mark(self) -> None:
        """Takes the highlighted row in, or out."""
        if not self._shown:
            return
        name = self._key(self._row())
        if not self._touched and not self._lanes:
            self._marked = []
        self._touched = True
        if name in self._marked:
            self._marked.remove(name)
        elif not self._lanes and name == BASE:
            self._marked = []
        elif not self._lanes or len(self._marked) < MOST_LANES:
            self._marked.append(name)
        self._fill()

    def _row(self) -> AdapterFolder | None:
        at = self.query_one(OptionList).highlighted
        return self._shown[at] if at is not None and at < len(self._shown) else None

    @staticmethod
    def _key(row: AdapterFolder | None) -> str:
        return BASE if row is None else row.reference

    def _fill(self) -> None:
        """Shows the rows that the filter lets through; keeps the highlight."""
        options, wanted = self.query_one(OptionList), self.query_one(Input).value.strip().lower()
        kept = self._key(self._row()) if self._shown else (self._marked[0] if self._marked else BASE)
        self._shown = [row for row in self._rows if wanted in self._key(row).lower()]
        options.clear_options()
        options.add_options([Option(self._line(row)) for row in self._shown])
        keys = [self._key(row) for row in self._shown]
        options.highlighted = keys.index(kept) if kept in keys else (0 if keys else None)

    def _line(self, row: AdapterFolder | None) -> Text:
        name = self._key(row)
        order = f"{self._marked.index(name) + 1}" if name in self._marked else " "
        line = Text(no_wrap=True, overflow="ellipsis")
        line.append(f"{glyphs().done if order.strip() else ' '} " if not self._lanes else f"{order} ", style="bold")
        if row is None:
            line.append(f"{BASE:<28}", style="bold")
            line.append("  without adapters", style="dim")
            return line
        line.append(f"{visible(row.reference)[:28]:<28}", style="bold")
        line.append(f"  ×{self._scales.get(name, 1.0):4.1f}")
        line.append(f"  {visible(row.method)}", style="dim")
        return line


_FIELDS = (
    ("temperature", "Temperature", "0 takes the likeliest token"),
    ("top_p", "Top-p", "smallest set of tokens with this share"),
    ("top_k", "Top-k", "this many likeliest tokens; 0 means all"),
    ("min_p", "Min-p", "leave out tokens below this share of the likeliest"),
    ("repetition_penalty", "Repetition", "above 1 discourages it; 1 is off"),
    ("max_new_tokens", "Longest answer", "tokens"),
    ("seed", "Seed", "the same draws the same answer; empty draws anew"),
)


class SamplingDialog(Framed[Sampling]):
    """How the next token is drawn; refuses what no distribution can be made from."""

    def __init__(self, sampling: Sampling) -> None:
        super().__init__()
        self._sampling = sampling

    def compose(self) -> ComposeResult:
        """A line for each value."""
        with Vertical(classes="dialog sampling") as frame:
            frame.border_title = "Sampling"
            for name, label, what in _FIELDS:
                value = getattr(self._sampling, name)
                with Horizontal(classes="field"):
                    yield Static(Text(label), classes="label")
                    yield Input("" if value is None else f"{value:g}", id=name, compact=True)
                    yield Static(Text(what), classes="what")
            yield Static(Text(_SAMPLING_HINT), classes="hint")

    @on(Input.Submitted)
    def _taken(self) -> None:
        try:
            self.dismiss(self._read())
        except UsageError as error:
            self.query_one(".hint", Static).update(Text(visible(str(error)), style="bold"))

    def on_key(self, event: events.Key) -> None:
        """Up and down move between the lines."""
        if event.key in ("up", "down"):
            (self.focus_previous if event.key == "up" else self.focus_next)()
            event.stop()

    def _read(self) -> Sampling:
        found: dict[str, float | int | None] = {}
        for name, label, _ in _FIELDS:
            text = self.query_one(f"#{name}", Input).value.strip()
            whole = name in ("top_k", "max_new_tokens", "seed")
            if name == "seed" and not text:
                found[name] = None
                continue
            try:
                found[name] = int(text) if whole else float(text)
            except ValueError:
                wanted = "a whole number" if whole else "a number"
                raise UsageError(f"{text!r} is not {wanted}", where=label, hint=f"Write {wanted}") from None
        sampling = msgspec.structs.replace(self._sampling, **found)
        check_sampling(sampling)
        return sampling


_SAMPLING_HINT = "up and down move, enter takes all of it, escape leaves everything as it is"

NEW, WRITE = "new", "write"


class KeptDialog(Framed[str | KeptConversation]):
    """Conversations that are kept; answers one to reopen, `new`, or `write`."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("delete,d", "forget", "Delete", id="kept.delete", tooltip="Delete the highlighted conversation"),
        Binding("w", "write", "Write", id="kept.write", tooltip="Write this conversation to a file of your choice"),
        Binding("n", "new", "New", id="kept.new", tooltip="Begin an empty conversation"),
    ]

    def __init__(self, kept: Sequence[KeptConversation], where: str) -> None:
        """Args: `where` the present one is kept; empty while it has no answer."""
        super().__init__()
        self._kept = list(kept)
        self._where = where
        self._doomed: KeptConversation | None = None

    def compose(self) -> ComposeResult:
        """The list, newest first."""
        with Vertical(classes="dialog tall wide") as frame:
            frame.border_title = "Conversations"
            told = (
                f"This one is kept in {self._where}" if self._where else "A conversation is kept with its first answer."
            )
            yield Static(Text(visible(told)), classes="question")
            yield OptionList(markup=False)
            yield Static(Text(_KEPT_HINT), classes="hint")

    def on_mount(self) -> None:
        """The list has the focus."""
        self._fill(0)
        self.query_one(OptionList).focus()

    @on(OptionList.OptionSelected)
    def _selected(self, event: OptionList.OptionSelected) -> None:
        if event.option_index < len(self._kept):
            self.dismiss(self._kept[event.option_index])

    def action_new(self) -> None:
        """An empty conversation."""
        self.dismiss(NEW)

    def action_write(self) -> None:
        """The present conversation to a file."""
        self.dismiss(WRITE)

    def action_forget(self) -> None:
        """Deletes the highlighted one; asks by wanting the key twice."""
        at = self.query_one(OptionList).highlighted
        if at is None or at >= len(self._kept):
            return
        hint = self.query_one(".hint", Static)
        if self._doomed is not self._kept[at]:
            self._doomed = self._kept[at]
            hint.update(Text("d once more deletes it for good", style="bold"))
            return
        try:
            forget(self._kept[at].path)
        except EdgepeftError as error:
            hint.update(Text(visible(str(error)), style="bold"))
            return
        del self._kept[at]
        self._doomed = None
        hint.update(Text(_KEPT_HINT))
        self._fill(at)

    def _fill(self, highlighted: int) -> None:
        options, now = self.query_one(OptionList), time.time()
        options.clear_options()
        if not self._kept:
            options.add_option(Option(Text("No conversation is kept yet", style="dim"), disabled=True))
            return
        for kept in self._kept:
            line = Text(no_wrap=True, overflow="ellipsis")
            line.append(f"{format_age(max(0.0, now - kept.changed)):>8}  ", style="dim")
            line.append(visible(kept.title)[:200] or "(empty)", style="bold")
            who = " + ".join(kept.adapters) or BASE
            line.append(f"  {kept.questions} asked  {visible(kept.model)}  {visible(who)[:60]}", style="dim")
            options.add_option(Option(line))
        options.highlighted = min(highlighted, len(self._kept) - 1)


_KEPT_HINT = "enter reopens, n begins a new one, w writes this one to a file, d deletes, escape leaves"
