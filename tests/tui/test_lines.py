"""The table that draws only what is seen."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from textual.app import App, ComposeResult
from textual.pilot import Pilot

from edgepeft_tui.widgets.lines import Column, Line, Lines

COLUMNS = (
    Column("name", most=20),
    Column("size", right=True, leaves=1),
    Column("seldom", leaves=3, rare=True),
    Column("remark", most=30, leaves=2),
)


class Table(App[None]):
    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    def compose(self) -> ComposeResult:
        yield Lines(COLUMNS, id="lines", empty="nothing here, and this is what to do about it")

    def on_lines_highlighted(self, message: Lines.Highlighted) -> None:
        self.told.append(message.table.current.key if message.table.current else "")

    def on_lines_chosen(self, message: Lines.Chosen) -> None:
        self.told.append("chosen")


def rows(count: int) -> list[Line]:
    return [Line(f"k{at}", (f"name {at}", str(at), "–", "remark " * 9)) for at in range(count)]


def drive(check: Callable[[Lines, Pilot[None]], Awaitable[None]], size: tuple[int, int] = (60, 10)) -> None:
    async def run() -> None:
        app = Table()
        async with app.run_test(size=size) as pilot:
            await check(app.query_one(Lines), pilot)

    asyncio.run(run())


def drawn(table: Lines) -> list[str]:
    return [table.render_line(y).text for y in range(table.size.height)]


def test_columns_leave_are_cut_and_are_rare() -> None:
    async def check(table: Lines, pilot: Pilot[None]) -> None:
        table.show_rows(rows(5))
        head, first = drawn(table)[:2]
        assert head.split() == ["name", "size", "remark"]
        assert first.startswith("›  name 0")
        assert first.index("0", 10) == head.index("size") + 3
        assert all(len(line) == 60 for line in drawn(table))
        await pilot.resize_terminal(30, 10)
        await pilot.pause()
        assert drawn(table)[0].split() == ["name", "size"]
        await pilot.resize_terminal(12, 10)
        await pilot.pause()
        assert drawn(table)[0].split() == ["name"]

    drive(check)


def test_the_cursor_moves_scrolls_and_stays_on_its_row() -> None:
    async def check(table: Lines, pilot: Pilot[None]) -> None:
        table.show_rows(rows(1000))
        table.focus()
        await pilot.press("end")
        assert table.current is not None
        assert table.current.key == "k999"
        assert "name 999" in drawn(table)[-1]
        await pilot.press("up", "pageup", "down")
        assert table.current.key == "k991"
        table.show_rows([Line("new", ("new", "1", "x", "")), *rows(1000)])
        assert table.current.key == "k991"
        assert "seldom" in drawn(table)[0]
        assert any(line.startswith("›  name 991") for line in drawn(table))
        table.show_rows(rows(3))
        assert table.current.key == "k2"
        table.show_rows([])
        assert table.current is None
        assert "nothing here" in drawn(table)[1]
        await pilot.press("down", "pagedown", "end")

    drive(check)


def test_marks_and_clicks() -> None:
    async def check(table: Lines, pilot: Pilot[None]) -> None:
        table.show_rows(rows(5))
        table.mark({"k3"})
        assert drawn(table)[4].startswith(" ● name 3")
        await pilot.click(Lines, offset=(5, 4))
        assert table.current is not None
        assert table.current.key == "k3"
        await pilot.click(Lines, offset=(5, 4))
        await pilot.pause()
        assert isinstance(pilot.app, Table)
        assert pilot.app.told[-2:] == ["k3", "chosen"]
        await pilot.click(Lines, offset=(5, 0))
        await pilot.click(Lines, offset=(5, 9))
        assert table.current.key == "k3"

    drive(check)
