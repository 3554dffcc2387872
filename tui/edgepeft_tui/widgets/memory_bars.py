"""Bars that say how full each memory is, in words too: colour is never the only signal."""

from __future__ import annotations

from rich.text import Text
from textual.reactive import reactive
from textual.widget import Widget

from edgepeft_tui.glyphs import glyphs
from edgepeft_tui.readings import Bar
from edgepeft_tui.text import visible

_GIB = 1 << 30
_NUMBERS = 18


class MemoryBars(Widget):
    """One line for each memory: label, bar, used and total GiB, and who uses it."""

    bars: reactive[tuple[Bar, ...]] = reactive((), layout=True)

    def render(self) -> Text:
        """The lines, drawn to the widget's width."""
        if not self.bars:
            return Text("reading …", style="dim")
        note_width = max((len(bar.note) for bar in self.bars), default=0)
        width = self.size.width
        # On a narrow terminal the note gives way before the bar does.
        note_width = min(note_width, max(0, width - 6 - _NUMBERS - 12))
        bar_width = max(4, width - 6 - _NUMBERS - (note_width + 2 if note_width else 0))
        lines = Text(no_wrap=True, overflow="crop")
        for index, bar in enumerate(self.bars):
            share = min(1.0, bar.used_bytes / bar.total_bytes) if bar.total_bytes else 0.0
            filled = round(share * bar_width)
            lines.append("\n" if index else "")
            lines.append(f"{bar.label:<5} ", style="bold")
            lines.append(glyphs().full * filled, style="red" if share > 0.92 else "green")
            lines.append(glyphs().empty * (bar_width - filled), style="dim")
            lines.append(f"{bar.used_bytes / _GIB:.1f} / {bar.total_bytes / _GIB:.1f} GiB".rjust(_NUMBERS))
            if note_width:
                lines.append("  " + visible(bar.note)[:note_width], style="dim")
        return lines

    def get_content_height(self, container: object, viewport: object, width: int) -> int:
        """A line for each bar."""
        return max(1, len(self.bars))
