"""The figures of a run under its charts: how far it is, how fast, what it draws, and what to do next."""

from __future__ import annotations

from rich.cells import cell_len
from rich.text import Text
from textual.reactive import reactive
from textual.widget import Widget

from edgepeft.units import format_bytes, format_grams, format_seconds, format_watt_hours
from edgepeft_tui.glyphs import glyphs
from edgepeft_tui.run_view import RunView
from edgepeft_tui.text import drawable, visible

_BAR = (8, 40)
_GAP = "   "
_WIDE = 72
"""Columns from which the progress line has all of its words."""
_NEXT = {
    "lost": "Space resumes it from its last checkpoint",
    "failed": "Space resumes it from its last checkpoint",
    "stopped": "Space resumes it where it stopped",
    "finished": "t chats with its adapter, i tells more",
}
_STYLES = {
    "starting": "green",
    "running": "green",
    "finished": "green",
    "stopped": "yellow",
    "failed": "red",
    "lost": "red",
    "damaged": "red",
}


class RunFigures(Widget):
    """Lines that are wrapped between figures; every figure keeps its width while it changes."""

    view: reactive[RunView | None] = reactive(None)
    asked: reactive[str] = reactive("")
    """What was asked of the worker and has not happened yet, as a sentence."""
    trouble: reactive[str] = reactive("")
    """Why nothing can be shown."""

    def watch_view(self) -> None:
        """A screen is arranged anew when another number of lines is needed, not for every figure that moves."""
        if self.is_attached and self.size.width:
            wanted = self.get_content_height(None, None, self.size.width)
            if wanted != self._arranged:
                self._arranged = wanted
                self.refresh(layout=True)

    def watch_asked(self) -> None:
        """The same for a sentence."""
        self.watch_view()

    def watch_trouble(self) -> None:
        """The same for a reason."""
        self.watch_view()

    _arranged = 0

    def render(self) -> Text:
        """The lines, drawn to the widget's width."""
        if self.trouble:
            return Text(visible(self.trouble), style="red")
        if self.view is None:
            return Text("")
        text = Text("\n").join(self._lines(self.view, self.size.width or 80))
        text.no_wrap, text.overflow = True, "ellipsis"
        text.plain = drawable(text.plain)
        return text

    def get_content_height(self, container: object, viewport: object, width: int) -> int:
        """As many lines as it takes."""
        if self.trouble or self.view is None:
            return max(1, -(-cell_len(self.trouble) // max(1, width)))
        return len(self._lines(self.view, width))

    def _lines(self, view: RunView, width: int) -> list[Text]:
        """What matters most comes first: where there is little room, the last lines are cut."""
        said, style = self._word(view)
        lines = [_progress(view, width), *(_sentence(said, width, style) if said else [])]
        memory, *rest = (_sentence(fact, width, "") for fact in view.outcome or ("",))
        figures = _wrapped(_figures(view), width)
        return [*lines, *memory, *figures, *(line for fact in rest for line in fact)]

    def _word(self, view: RunView) -> tuple[str, str]:
        """What is the matter and which key is next, and its style."""
        state = view.state
        if view.silent_seconds is not None:
            silent = format_seconds(view.silent_seconds)
            return f"No word for {silent}: the worker may hang. k ends it at once", "yellow"
        if self.asked:
            return self.asked, "yellow"
        if state.alive:
            return "", ""
        why = state.message.rstrip(". ")
        following = "Space gives it more" if state.wants_time else _NEXT.get(state.status, "")
        style = {"failed": "red", "lost": "red", "damaged": "red"}.get(state.status, "dim")
        return ". ".join(part for part in (why, following) if part), style


def _progress(view: RunView, width: int) -> Text:
    """`● db-triage-2  Training  step 412 / 900  ███████░░░░  45 %  ETA 6 min 00 s`."""
    from edgepeft.runs.text import PHASES

    state, signs = view.state, glyphs()
    style = _STYLES[state.status]
    sign = {"running": signs.running, "starting": signs.running, "finished": signs.done, "stopped": signs.paused}
    doing = PHASES.get(state.phase, "Starting") if state.alive else state.status.capitalize()
    steps = f"{state.steps:,}"
    right = Text()
    share: float | None = None
    if state.alive and state.phase in ("load", "data") and state.phase_fraction is not None:
        share = state.phase_fraction
    elif state.steps:
        share = state.step / state.steps
        right.append(f"step {f'{state.step:,}':>{len(steps)}} / {steps}{_GAP}", style="bold")
    tail = Text()
    if share is not None:
        tail.append(f" {100 * min(1.0, share):3.0f} %")
    if state.alive:
        eta = "n/a" if state.eta_seconds is None else format_seconds(state.eta_seconds)
        tail.append(f"{_GAP}ETA {eta:<12}" if width >= _WIDE else f"{_GAP}ETA {eta}")
    if width < _WIDE and state.alive and state.phase == "train":
        # The sign and the moving figures say as much.
        doing = ""
    head = Text(f"{sign.get(state.status, signs.trouble)} ", style=style)
    used = cell_len(right.plain) + cell_len(tail.plain) + 2
    name_room = max(8, width - used - len(doing) - 5 - (_BAR[0] if width >= _WIDE else 0))
    head.append(visible(view.id)[:name_room], style="bold")
    head.append(f"{_GAP}{doing}{_GAP if doing else ''}", style=style)
    room = width - cell_len(head.plain) - used + 2
    bar = Text()
    if share is not None and room >= _BAR[0]:
        columns = min(_BAR[1], room)
        filled = round(min(1.0, share) * columns)
        bar.append(signs.full * filled, style=style)
        bar.append(signs.empty * (columns - filled), style="dim")
    return Text.assemble(head, right, bar, tail)


def _figures(view: RunView) -> list[tuple[str, str]]:
    """Each figure with its style, in the order of what matters."""
    from edgepeft.runs.text import memory_text

    state = view.state
    loss = "n/a" if state.loss is None else f"{state.loss:.4f}"
    figures = [f"loss {loss:>6}"]
    if state.eval_loss is not None:
        figures.append(f"held out {state.eval_loss:.4f}")
    speed = "n/a" if state.tokens_per_second is None else f"{state.tokens_per_second:,.0f}"
    figures.append(f"{speed:>6} tok/s")
    if state.alive:
        rate = "n/a" if view.learning_rate is None else f"{view.learning_rate:.1e}"
        norm = "n/a" if view.grad_norm is None else f"{view.grad_norm:.2f}"
        figures += [f"lr {rate:>7}", f"norm {norm:>5}"]
        power = "n/a" if state.power_watts is None else f"{state.power_watts:.0f} W"
        figures.append(f"power {power:>5}")
    energy = "n/a" if state.energy_wh is None else format_watt_hours(state.energy_wh)
    if view.co2_grams is not None and view.co2_grams_per_kwh is not None:
        energy += f", about {format_grams(view.co2_grams)} CO₂ at {view.co2_grams_per_kwh:g} g/kWh"
    if not view.outcome:
        figures.append(f"energy {energy}")
        memory = memory_text(state, view.predicted_bytes)
        figures.append(memory if memory.startswith("memory") else f"memory {memory}")
        if view.budget_bytes:
            figures.append(f"budget {format_bytes(view.budget_bytes)}")
    figures.append(visible(view.model))
    return [(figure, "") for figure in figures]


def _wrapped(parts: list[tuple[str, str]], width: int) -> list[Text]:
    """Parts side by side, broken only between them."""
    lines = [Text("  ")]
    for part, style in parts:
        wanted = cell_len(part) + (len(_GAP) if lines[-1].plain.strip() else 0)
        if lines[-1].plain.strip() and cell_len(lines[-1].plain) + wanted > width:
            lines.append(Text("  "))
        lines[-1].append((_GAP if lines[-1].plain.strip() else "") + part, style=style)
    return lines


def _sentence(text: str, width: int, style: str) -> list[Text]:
    """A sentence, broken between words, three lines at the most."""
    import textwrap

    lines = textwrap.wrap(
        visible(text), max(20, width - 2), initial_indent="  ", subsequent_indent="  ", max_lines=3, placeholder=" …"
    )
    return [Text(line, style=style) for line in lines]
