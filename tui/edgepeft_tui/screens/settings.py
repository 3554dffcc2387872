"""Settings: what config.toml says, the keys, the folders, and what runs here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Vertical
from textual.message import Message

from edgepeft.errors import EdgepeftError
from edgepeft_tui.actions import Action, all_actions, bindings
from edgepeft_tui.keys import judge_key, keys_of
from edgepeft_tui.preferences import (
    Place,
    Setting,
    check_value,
    read_here,
    read_keys,
    read_places,
    read_settings,
    words_for,
)
from edgepeft_tui.screens.dialogs import Choice, Pick
from edgepeft_tui.screens.form import Field, Form, Values
from edgepeft_tui.screens.room import Room
from edgepeft_tui.screens.settings_dialogs import KeyCatch, ThemePick
from edgepeft_tui.widgets.lines import NOTHING, Column, Line, Lines

_HINTS = {
    "budget": "20GiB; empty for what is free",
    "gpu": "cpu, a UUID or a profile such as rtx-4090-24gb; empty for the freest card",
    "co2_grams_per_kwh": "350; empty for the world's average",
}


@dataclass
class PlacesRead(Message):
    """One more folder was measured."""

    places: tuple[Place, ...]
    done: bool


@dataclass
class CacheCleared(Message):
    """The cache is gone, or not."""

    path: str
    error: Exception | None = None


class SettingsScreen(Room):
    """Shows every setting with its origin; a change is in force at once and kept in config.toml."""

    AREA = "settings"
    CSS_PATH = "settings.tcss"
    BINDINGS: ClassVar[list[BindingType]] = bindings("settings")
    HELP = (
        "Settings are kept in config.toml and in force at once. An environment variable, such as EDGEPEFT_BUDGET, "
        "comes before config.toml; the column `from` says so. Enter changes the highlighted setting or key, d puts it "
        "back to its default."
    )

    def __init__(self) -> None:
        super().__init__()
        self._settings: dict[str, Setting] = {}
        self._keys: dict[str, str] = {}

    def content(self) -> ComposeResult:
        """Four tables, in two columns where there is room."""
        with Vertical(id="board"):
            with Vertical(id="left"):
                yield Lines(
                    (
                        Column("setting"),
                        Column("value", most=30),
                        Column("from"),
                        Column("what it is", most=36, leaves=1),
                    ),
                    id="settings",
                    classes="frame",
                    title="Settings (s)",
                    empty="reading …",
                    help="Every setting of config.toml. Enter changes it; a theme is seen while you move.",
                )
                yield Lines(
                    (Column("folder"), Column("size", right=True), Column("where", most=60)),
                    id="folders",
                    classes="frame",
                    title="Folders (o)",
                    empty="reading …",
                    help="Where everything lies. EDGEPEFT_HOME moves it all; c clears the cache; enter copies a path.",
                )
                yield Lines(
                    (Column("what"), Column("version, or where", most=80)),
                    id="here",
                    classes="frame",
                    title="What runs here (h)",
                    help="Versions and places of what this program is made of, for a report of a problem.",
                )
            with Vertical(id="right"):
                yield Lines(
                    (
                        Column("action"),
                        Column("keys", most=18),
                        Column("default", most=18, leaves=2),
                        Column("what it does", most=60, leaves=1),
                    ),
                    id="keys",
                    classes="frame",
                    title="Keys (k)",
                    help="Every action with its keys. Enter takes another key for it, d gives it its default back.",
                )

    def on_mount(self) -> None:
        """Reads, and puts the cursor into the settings."""
        self.query_one("#settings").focus()
        self.query_one("#here", Lines).show_rows([Line(what, (what, text)) for what, text in read_here()])
        self.read_again()
        self._measure()

    def read_again(self) -> None:
        """Shows what config.toml and the environment say now; both are small."""
        try:
            self._settings = {setting.key: setting for setting in read_settings()}
            self._keys = read_keys()
        except EdgepeftError as error:
            self.query_one("#settings", Lines).show_rows((), str(error))
            return
        self.query_one("#settings", Lines).show_rows([_setting_line(setting) for setting in self._settings.values()])
        self.query_one("#keys", Lines).show_rows([_key_line(action, self._keys) for action in all_actions()])

    @work(thread=True, exclusive=True, group="places", exit_on_error=False)
    def _measure(self) -> None:
        found: list[Place] = []
        for place in read_places():
            found.append(place)
            self.post_message(PlacesRead(tuple(found), False))
        self.post_message(PlacesRead(tuple(found), True))

    @on(PlacesRead)
    def _places_read(self, message: PlacesRead) -> None:
        table = self.query_one("#folders", Lines)
        table.show_rows(
            [Line(place.name, (place.name, place.size, place.path), trouble=place.trouble) for place in message.places]
        )
        table.border_title = "Folders (o)" if message.done else "Folders (o) · measuring …"

    # Changing.

    def action_focus_part(self, part: str) -> None:
        """Moves to one of the tables."""
        self.query_one(f"#{part}").focus()

    @on(Lines.Chosen)
    def _row_clicked(self) -> None:
        self.action_change()

    def action_change(self) -> None:
        """Asks for another value, or another key."""
        table = self.focused
        if not isinstance(table, Lines) or table.current is None:
            return
        key = table.current.key
        if table.id == "keys":
            self._change_key(_action(key))
        elif table.id == "settings":
            self._change_setting(self._settings[key])
        else:
            self._copy(table.current.cells[-1])

    def action_default(self) -> None:
        """Puts the highlighted setting or key back to its default."""
        table = self.focused
        if isinstance(table, Lines) and table.current is not None and table.id in ("keys", "settings"):
            self._store(f"keys.{table.current.key}" if table.id == "keys" else table.current.key, None)

    def _change_setting(self, setting: Setting) -> None:
        if setting.key == "theme":
            self.app.push_screen(
                ThemePick(sorted(self.app.available_themes), self.app.theme), partial(self._take, "theme")
            )
            return
        words = words_for(setting.key)
        if words:
            rows = [(word, f"{word}  {meaning}".rstrip()) for word, meaning in words]
            self.app.push_screen(Pick(setting.meaning, rows, title=setting.key), partial(self._take, setting.key))
            return

        def check(values: Values) -> None:
            if values["value"]:
                check_value(setting.key, values["value"])

        def take(values: Values | None) -> None:
            if values is not None:
                self._store(setting.key, values["value"] or None)

        field = Field("value", setting.key, setting.value or "", hint=_HINTS[setting.key])
        self.app.push_screen(Form([field], title=setting.key, question=setting.meaning, take="Keep", check=check), take)

    def _take(self, key: str, value: str | None) -> None:
        if value is not None:
            self._store(key, value)

    def _change_key(self, action: Action) -> None:
        def take(key: str | None) -> None:
            if key is not None:
                self._store(f"keys.{action.id}", key or None)

        question = f"{action.tooltip} ({action.id}). It has {keys_of(action, self._keys)}; by default {action.key}."
        self.app.push_screen(KeyCatch(question, lambda key: judge_key(key, action, self._keys)), take)

    def _store(self, key: str, value: str | None) -> None:
        from edgepeft.settings import store_setting, variable_of

        try:
            store_setting(key, value)
        except (EdgepeftError, OSError) as error:
            self._app.tell_error(error)
        self._app.apply_settings()
        self.app.refresh_css(animate=False)
        self.read_again()
        setting = self._settings.get(key)
        if setting is not None and setting.origin == "environment":
            self._app.tell(f"{variable_of(key)} comes before it, as long as it is set", severity="warning")

    @work(thread=True, group="copy", exit_on_error=False)
    def _copy(self, text: str) -> None:
        from edgepeft_tui.clipboard import copy_text

        how = copy_text(self.app, text)
        self.app.call_from_thread(self._app.tell, f"{text}: {how}")

    # The cache.

    def action_clear_cache(self) -> None:
        """Asks, and clears the cache."""
        cache = next((row for row in self.query_one("#folders", Lines).rows if row.key == "cache"), None)
        if cache is None:
            self._app.tell("The folders are still being measured")
            return
        question = f"{cache.cells[2]} ({cache.cells[1]}) is deleted. What it holds is made again when it is needed."
        answers = (("keep", "Keep"), ("clear", "Clear"))

        def clear(answer: str | None) -> None:
            if answer == "clear":
                self._clear()

        self.app.push_screen(Choice(question, answers, title="Clear the cache", danger="clear"), clear)

    @work(thread=True, exclusive=True, group="cache", exit_on_error=False)
    def _clear(self) -> None:
        from edgepeft.paths import clear_cache

        try:
            self.post_message(CacheCleared(str(clear_cache())))
        except (EdgepeftError, OSError) as error:
            self.post_message(CacheCleared("", error))

    @on(CacheCleared)
    def _cache_cleared(self, message: CacheCleared) -> None:
        if message.error is not None:
            self._app.tell_error(message.error)
        else:
            self._app.tell(f"Cleared {message.path}")
        self._measure()


def _action(name: str) -> Action:
    return next(action for action in all_actions() if action.id == name)


def _setting_line(setting: Setting) -> Line:
    return Line(setting.key, (setting.key, setting.value or setting.usual, setting.origin, setting.meaning))


def _key_line(action: Action, chosen: dict[str, str]) -> Line:
    keys = keys_of(action, chosen)
    default = action.key if keys != action.key else NOTHING
    return Line(action.id, (action.id, keys, default, action.tooltip))
