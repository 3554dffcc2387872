"""Markdown that a model wrote: a stranger's text, which opens nothing, hides nothing and stays cheap to draw."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from textual.geometry import Region
from textual.strip import Strip
from textual.widgets import Markdown
from textual.widgets._markdown import MarkdownBlock

from edgepeft_tui.glyphs import glyphs
from edgepeft_tui.text import visible, visible_lines

_NEVER = ("link", "image", "autolink", "linkify", "reference", "html_block", "html_inline")
"""Rules that are off: links, pictures and HTML are shown as the model wrote them, and nothing is behind them."""
_NESTED = 12
"""Lists and quotes inside each other; what lies deeper is plain text."""
_ITEM = "item"
"""Our token: one item of an outermost list with all that is in it."""


class _Parser(MarkdownIt):
    """Markdown without links and HTML; nothing that a terminal obeys comes out of it, entities included."""

    def __init__(self) -> None:
        super().__init__("gfm-like", {"maxNesting": _NESTED, "html": False, "linkify": False})
        self.disable(_NEVER, ignoreInvalid=True)

    def parse(self, src: str, env: MutableMapping[str, Any] | None = None) -> list[Token]:
        """The tokens of `src`, cleaned, each outermost list as a row of items, each table as lines."""
        tokens = list(_with_tables(_with_items(super().parse(src, env))))
        _clean(tokens)
        return tokens


def _clean(tokens: Sequence[Token]) -> None:
    for token in tokens:
        token.content = visible_lines(token.content)
        # Without a language, all of them would be tried.
        token.info = visible(token.info) or ("text" if token.type in ("fence", "code_block") else "")
        _clean(token.children or ())


def _with_items(tokens: Sequence[Token]) -> Iterator[Token]:
    """One token for each item of an outermost list: Textual draws four widgets an item, and all of them each time."""
    depth, item = 0, []
    held: Token | None = None
    for token in tokens:
        if token.type in ("bullet_list_open", "ordered_list_open"):
            depth += 1
        if depth == 0:
            yield token
            continue
        item.append(token)
        if token.type == "list_item_close" and depth == 1:
            begun = next(part for part in item if part.type == "list_item_open")
            inside = item[item.index(begun) + 1 : -1]
            item = []
            if held is not None:
                yield held
            children = list(_lines_of(inside))
            held = Token(_ITEM, "", 0, map=begun.map, level=begun.level - 1, info=begun.info, children=children)
        if token.type in ("bullet_list_close", "ordered_list_close"):
            depth -= 1
            if depth == 0 and held is not None:
                held.meta["last"] = True
                yield held
                item, held = [], None


def _with_tables(tokens: Iterable[Token]) -> Iterator[Token]:
    """A table as aligned lines: Textual draws a widget for each of its cells."""
    rows: list[list[str]] | None = None
    begun: Token | None = None
    for token in tokens:
        if token.type == "table_open":
            rows, begun = [], token
        elif rows is None or begun is None:
            yield token
        elif token.type == "tr_open":
            rows.append([])
        elif token.type == "inline":
            rows[-1].append(_plain(token))
        elif token.type == "table_close":
            yield Token("fence", "", 0, map=begun.map, level=begun.level, content=_aligned(rows), info="text")
            rows = begun = None


def _plain(token: Token) -> str:
    return visible("".join(child.content or " " * (child.type == "softbreak") for child in token.children or ()))


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    columns = max((len(row) for row in rows), default=0)
    widths = [max((cell_len(row[at]) for row in rows if at < len(row)), default=0) for at in range(columns)]
    lines = [
        "  ".join(set_cell_size(cell, width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows
    ]
    return "\n".join([*lines[:1], "  ".join("-" * width for width in widths), *lines[1:]])


def _lines_of(tokens: Sequence[Token]) -> Iterator[Token]:
    """What is in an item, as one run of text with line ends."""
    depth, mark, empty = 0, "", True
    for token in tokens:
        if token.type in ("bullet_list_open", "ordered_list_open"):
            depth += 1
        elif token.type in ("bullet_list_close", "ordered_list_close"):
            depth -= 1
        elif token.type == "list_item_open":
            mark = _mark_of(token)
        elif token.type in ("fence", "code_block"):
            for line in token.content.splitlines():
                yield from _line(depth, "", empty)
                yield Token("code_inline", "", 0, content=line)
                empty = False
        elif token.type == "inline":
            yield from _line(depth, mark, empty)
            yield from token.children or ()
            mark, empty = "", False


def _line(depth: int, mark: str, first: bool) -> Iterator[Token]:
    """A line's beginning. Textual makes one space of many in a text, but one of each soft break."""
    if not first:
        yield Token("hardbreak", "br", 0)
        yield from (Token("softbreak", "br", 0) for _ in range(2 * depth - (2 if mark else 0)))
    if mark:
        yield Token("text", "", 0, content=f"{mark} ")


def _mark_of(item: Token) -> str:
    return f"{item.info}." if item.info else glyphs().bullet


class ListItem(MarkdownBlock):
    """One item of a list: its mark stands left of the text, however often that wraps."""

    DEFAULT_CSS = """
    ListItem { padding: 0 0 0 2; }
    """

    def __init__(self, markdown: Markdown, token: Token) -> None:
        super().__init__(markdown, token)
        self._take(token)
        self.build_from_token(token)

    def _take(self, token: Token) -> None:
        self._mark = _mark_of(token)
        self.styles.padding = (0, 0, 0, len(self._mark) + 1)
        self.set_class("last" in token.meta, "-last")

    async def _update_from_block(self, block: MarkdownBlock) -> None:
        if not isinstance(block, ListItem):
            await super()._update_from_block(block)
            return
        self._copy_context(block)
        self._take(block._token)
        self.set_content(block._content)

    def render_lines(self, crop: Region) -> list[Strip]:
        """The text, with the mark in the padding of its first line."""
        strips = super().render_lines(crop)
        if crop.x == crop.y == 0 and strips and strips[0].cell_length > len(self._mark):
            first = next(iter(strips[0]), Segment(""))
            mark = Strip([Segment(self._mark, first.style)])
            strips[0] = Strip.join([mark, strips[0].crop(len(self._mark), strips[0].cell_length)])
        return strips


class SafeMarkdown(Markdown):
    """Markdown from a model."""

    def __init__(self, text: str = "") -> None:
        super().__init__(visible_lines(text), parser_factory=_Parser, open_links=False)

    def unhandled_token(self, token: Token) -> MarkdownBlock | None:
        """Our items."""
        return ListItem(self, token) if token.type == _ITEM else None
