"""What the Plan screen asks: a value, a model or a file; and the data as the model reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from rich.text import Text
from textual import events, on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.message import Message
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from edgepeft.errors import EdgepeftError
from edgepeft_tui.choice_rows import ChoiceRow
from edgepeft_tui.finds import DrawnSample, Found
from edgepeft_tui.glyphs import glyphs
from edgepeft_tui.screens.dialogs import Dialog
from edgepeft_tui.text import visible
from edgepeft_tui.widgets.sample_text import draw_lengths, draw_sample, mask_key

AUTO = "auto"
_KEYS = "enter takes it · escape leaves everything as it is"


class EditValue(Dialog):
    """One value, below what it changes: the memory bar stays in sight and moves with what is typed.

    Answers the text; empty for back to auto.
    """

    CSS_PATH = "plan_dialogs.tcss"

    def __init__(self, row: ChoiceRow, words: Sequence[tuple[str, str]], tried: Callable[[str], None]) -> None:
        """Args: `words` are what it may be, with what each means; `tried` is told each text before it is taken."""
        super().__init__()
        self._row, self._tried = row, tried
        self._words = [(AUTO, "let the planner choose"), *words] if words else []

    def compose(self) -> ComposeResult:
        """What it is, the line or the list, and what it would do."""
        with Vertical(classes="editor") as frame:
            frame.border_title = Text(visible(self._row.what)).markup
            frame.border_subtitle = _KEYS
            yield Static(Text(visible(self._row.help or self._row.why)), classes="question")
            if self._words:
                width = max(len(word) for word, _ in self._words)
                lines = [f"{visible(word):<{width}}  {visible(note)}" for word, note in self._words]
                yield OptionList(*(Option(Text(line, no_wrap=True)) for line in lines), markup=False)
            else:
                yield Input(self._row.text, placeholder="empty: let the planner choose")
            yield Static("", id="effect", markup=False)

    def on_mount(self) -> None:
        """The list begins at the value that is set."""
        if not self._words:
            self.query_one(Input).focus()
            return
        words = [word for word, _ in self._words]
        now = self._row.value if self._row.origin == "user" else AUTO
        self.query_one(OptionList).highlighted = words.index(now) if now in words else 0
        self.query_one(OptionList).focus()

    def show_effect(self, text: Text) -> None:
        """Says what the value under the cursor would do."""
        self.query_one("#effect", Static).update(text)

    @on(Input.Changed)
    def _typed(self, event: Input.Changed) -> None:
        self._tried(event.value.strip())

    @on(OptionList.OptionHighlighted)
    def _moved(self, event: OptionList.OptionHighlighted) -> None:
        self._tried(self._word(event.option_index))

    @on(Input.Submitted)
    def _submitted(self, event: Input.Submitted) -> None:
        text = event.value.strip()
        # What was only looked at stays as it was: an automatic value is not made the user's own by that.
        self.dismiss(None if text == self._row.text else "" if text == AUTO else text)

    @on(OptionList.OptionSelected)
    def _selected(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(self._word(event.option_index))

    def _word(self, index: int) -> str:
        word = self._words[index][0]
        return "" if word == AUTO else word


class Chooser(Dialog):
    """A line to type into above what fits it; answers a name or a path.

    Args:
        question: what is asked.
        readers: give what is to choose from for a typed text; they run in a thread, one after the other.
    """

    CSS_PATH = "plan_dialogs.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("down", "move(1)", show=False),
        Binding("up", "move(-1)", show=False),
    ]

    class Rows(Message):
        """What was found so far for a text."""

        def __init__(self, text: str, rows: tuple[Found, ...], done: bool) -> None:
            super().__init__()
            self.text, self.rows, self.done = text, rows, done

    def __init__(
        self, question: str, readers: Sequence[Callable[[str], tuple[Found, ...]]], *, title: str, hint: str
    ) -> None:
        super().__init__()
        self._question, self._readers, self._title, self._hint = question, readers, title, hint
        self._rows: tuple[Found, ...] = ()

    def compose(self) -> ComposeResult:
        """The line above the list."""
        with Vertical(classes="dialog tall chooser") as frame:
            frame.border_title = Text(visible(self._title)).markup
            frame.border_subtitle = _KEYS
            yield Static(Text(visible(self._question)), classes="question")
            yield Input(placeholder=self._hint)
            yield OptionList(markup=False)
            yield Static("", id="found", markup=False)

    def on_mount(self) -> None:
        """Shows what there is before anything is typed."""
        self.query_one(Input).focus()
        self._read("")

    @on(Input.Changed)
    def _typed(self, event: Input.Changed) -> None:
        self._read(event.value)

    @work(thread=True, exclusive=True, group="chooser", exit_on_error=False)
    def _read(self, text: str) -> None:
        found: tuple[Found, ...] = ()
        for number, read in enumerate(self._readers, 1):
            known = {row.key for row in found}
            try:
                found += tuple(row for row in read(text) if row.key not in known)
            except (EdgepeftError, OSError) as error:
                found += (Found("", str(error), usable=False),)
            self.post_message(self.Rows(text, found, number == len(self._readers)))

    @on(Rows)
    def _show(self, message: Rows) -> None:
        if message.text != self.query_one(Input).value:
            return
        before = self._highlighted()
        self._rows = message.rows
        options = self.query_one(OptionList)
        options.clear_options()
        for row in message.rows:
            line = Text(no_wrap=True, overflow="ellipsis")
            line.append(_shortened(visible(row.key), 44), style="bold" if row.usable else "dim")
            line.append(f"  {visible(row.note)}", style="dim")
            options.add_option(Option(line, disabled=not row.usable))
        keys = [row.key for row in self._rows]
        options.highlighted = keys.index(before.key) if before is not None and before.key in keys else None
        word = "" if message.done else f"looking {glyphs().more}"
        self.query_one("#found", Static).update(word if message.rows or not message.done else "nothing like it here")

    def action_move(self, by: int) -> None:
        """Moves in the list while the line keeps the focus."""
        options = self.query_one(OptionList)
        if options.highlighted is None and options.option_count:
            options.action_first()
        elif by > 0:
            options.action_cursor_down()
        else:
            options.action_cursor_up()

    @on(Input.Submitted)
    def _submitted(self, event: Input.Submitted) -> None:
        row = self._highlighted()
        if row is not None:
            self._take(row)
        elif event.value.strip():
            self.dismiss(event.value.strip())

    @on(OptionList.OptionSelected)
    def _selected(self, event: OptionList.OptionSelected) -> None:
        self._take(self._rows[event.option_index])

    def _take(self, row: Found) -> None:
        if row.note == "folder":
            line = self.query_one(Input)
            line.value = row.key
            line.cursor_position = len(row.key)
            line.focus()
        elif row.usable:
            self.dismiss(row.key)

    def _highlighted(self) -> Found | None:
        index = self.query_one(OptionList).highlighted
        return self._rows[index] if index is not None and index < len(self._rows) else None


class DataPreview(Dialog):
    """The data as the model reads it: lengths, and record by record what is trained."""

    CSS_PATH = "plan_dialogs.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("right,n", "move(1)", "Next record", id="preview.next"),
        Binding("left,b", "move(-1)", "Record before", id="preview.before"),
        Binding("q,p,enter", "dismiss_empty", "Close", id="preview.close", show=False),
    ]

    class Read(Message):
        """The samples, or why there are none."""

        def __init__(self, samples: tuple[DrawnSample, ...], trouble: str = "") -> None:
            super().__init__()
            self.samples, self.trouble = samples, trouble

    def __init__(self, title: str, bins: Sequence[Any], read: Callable[[], tuple[DrawnSample, ...]]) -> None:
        """Args: `bins` are the lengths' histogram; `read` gives the samples, in a thread."""
        super().__init__()
        self._title, self._bins, self._reader = title, bins, read
        self._samples: tuple[DrawnSample, ...] = ()
        self._at = 0

    def compose(self) -> ComposeResult:
        """Lengths above one record."""
        with Vertical(classes="dialog preview") as frame:
            frame.border_title = Text(visible(self._title)).markup
            frame.border_subtitle = "left and right show other records · escape closes"
            yield Static("", id="lengths", markup=False)
            yield Static(Text(f"reading {glyphs().more}"), id="which", markup=False)
            with VerticalScroll(id="scroll"):
                yield Static("", id="sample", markup=False)

    def on_mount(self) -> None:
        """Reads in a thread."""
        self.query_one("#scroll").focus()
        self._read()

    def on_resize(self, event: events.Resize) -> None:
        """Draws the histogram to the new width."""
        lengths = self.query_one("#lengths", Static)
        lengths.display = bool(self._bins) and event.size.height >= 24
        lengths.update(draw_lengths(self._bins, min(90, max(20, event.size.width - 16))))

    @work(thread=True, exclusive=True, group="preview", exit_on_error=False)
    def _read(self) -> None:
        try:
            self.post_message(self.Read(self._reader()))
        except (EdgepeftError, OSError) as error:
            self.post_message(self.Read((), str(error)))

    @on(Read)
    def _show_first(self, message: Read) -> None:
        self._samples = message.samples
        if message.trouble or not message.samples:
            self.query_one("#which", Static).update(Text(visible(message.trouble or "There is no record in it.")))
            return
        self._show()

    def action_move(self, by: int) -> None:
        """Shows another record."""
        self._at = max(0, min(len(self._samples) - 1, self._at + by))
        if self._samples:
            self._show()

    def _show(self) -> None:
        sample = self._samples[self._at]
        head = Text(f"{sample.title}: {sample.trained:,} of {sample.tokens:,} tokens are trained\n", style="bold")
        head.append_text(mask_key())
        self.query_one("#which", Static).update(head)
        self.query_one("#sample", Static).update(draw_sample(sample))
        self.query_one("#scroll").scroll_home(animate=False)


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else glyphs().more + text[-most + 1 :]
