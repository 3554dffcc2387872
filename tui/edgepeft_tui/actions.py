"""Every action of the UI that a key can have: one table, from which bindings, palette and help are made.

An action's id is what config.toml names to give it another key:

    [keys]
    "train.stop" = "ctrl+s,f8"
"""

from __future__ import annotations

import msgspec
from textual.binding import Binding, BindingType


class Action(msgspec.Struct, frozen=True):
    """Something that can be done on a screen."""

    id: str
    """`AREA.WORD`; the area is `app` or a screen's."""
    key: str
    """Default keys, with commas between."""
    run: str
    """Textual's action string, for the screen or the app."""
    label: str
    """A word or two, for the footer."""
    tooltip: str
    """What it does, as a sentence without its full stop."""
    show: bool = False
    """Whether the footer has it: at most five of a screen, beside help and the palette."""
    priority: bool = False
    """Whether it comes before what the focused widget does with the key."""


APP = (
    Action("app.help", "f1", "show_help", "Help", "Say what the focused part is and which keys it has", show=True),
    Action("app.home", "f2", "go('home')", "Home", "Machine, runs, adapters and models at one glance"),
    Action("app.plan", "f3", "go('plan')", "Plan", "Plan a run: what fits, what it costs, and why"),
    Action("app.train", "f4", "go('train')", "Train", "Watch runs, pause, stop and resume them"),
    Action("app.chat", "f5", "go('chat')", "Chat", "Talk with a base and its adapters"),
    Action("app.adapters", "f6", "go('adapters')", "Adapters", "Keep, compare, combine and export adapters"),
    Action("app.settings", "f7", "go('settings')", "Settings", "Folders, theme, keys and spacing"),
    Action("app.palette", "ctrl+p", "command_palette", "Commands", "Find an action by its name", show=True),
    Action("app.jump", "ctrl+g", "jump", "Jump", "Show a letter on every part; press it to go there"),
    Action("app.refresh", "ctrl+r", "refresh_now", "Refresh", "Look at the machine and the folders again"),
    Action("app.back", "escape", "go_back", "Back", "Go to the screen before this one"),
    Action("app.quit", "ctrl+q", "quit", "Quit", "Leave; runs go on unless you say otherwise", priority=True),
)
HOME = (
    Action("home.new", "n", "new_run", "New", "Plan a run on the highlighted model", show=True),
    Action("home.runs", "r", "focus_shelf('runs')", "Runs", "Move to the list of runs", show=True),
    Action("home.adapters", "a", "focus_shelf('adapters')", "Adapters", "Move to the list of adapters", show=True),
    Action("home.models", "m", "focus_shelf('models')", "Models", "Move to the list of base models", show=True),
    Action("home.demo", "d", "plan_demo", "Demo", "Plan a first run on the demo's data"),
    Action("home.scan", "s", "scan_models", "Find models", "Look for base models on this disk"),
)
PLAN = (
    Action("plan.edit", "e", "edit", "Edit", "Change the highlighted value; enter does it too", show=True),
    Action("plan.verify", "v", "verify", "Verify", "Run the step without values; again: cancel, or details", show=True),
    Action("plan.preview", "p", "preview", "Preview", "Show the data as the model reads it, with the mask", show=True),
    Action("plan.copy", "c", "copy", "Copy", "Copy the command that makes the same run", show=True),
    Action("plan.start", "ctrl+s", "start", "Start", "Name the adapter and train this plan", show=True),
    Action("plan.model", "m", "choose_model", "Model", "Choose a base model; looks on this disk too"),
    Action("plan.data", "d", "choose_data", "Data", "Choose the data file"),
    Action("plan.intent", "i", "edit('intent')", "Intent", "Choose quality, balanced, speed or prototype"),
    Action("plan.method", "k", "edit('method')", "Method", "Choose the kind of adapter"),
    Action("plan.demo", "b", "demo", "Demo", "Take the demo's model, data and values"),
    Action("plan.choices", "t", "focus_part('table')", "Choices", "Move to the table of choices"),
    Action("plan.others", "o", "focus_part('others')", "Others", "Move to the other plans that fit; enter takes one"),
    Action("plan.auto", "backspace,delete", "automatic", "Auto", "Give the highlighted value back to the planner"),
    Action("plan.undo", "u", "undo", "Undo", "Take the last change back"),
    Action("plan.explain", "n", "explain", "Explain", "Tell everything that is known of the plan, notes included"),
    Action("plan.replan", "g", "replan", "Plan again", "Look at machine, model and data again and plan anew"),
)
TRAIN = (
    Action(
        "train.pause",
        "space",
        "pause_or_resume",
        "Pause",
        "Let a run that trains save and give its memory back, or let one that does not go on",
        show=True,
    ),
    Action(
        "train.stop", "s", "stop_run", "Stop and save", "Stop after the step in hand and save the adapter", show=True
    ),
    Action("train.overlay", "o", "overlay", "Overlay", "Draw another run's loss beside", show=True),
    Action("train.chat", "t", "chat", "Chat", "Chat with the adapter of the run", show=True),
    Action("train.log", "l", "show_log", "Log", "Read the end of what the worker wrote", show=True),
    Action("train.chart", "c", "next_chart", "Chart", "Show loss, learning rate or gradient norm"),
    Action("train.samples", "v", "samples", "Samples", "Read the answers that were given during training"),
    Action("train.details", "i", "details", "Details", "Read what the run was planned as and where its files lie"),
    Action("train.new", "n", "new_run", "New", "Plan a new run"),
    Action("train.runs", "r", "focus_part('runs')", "Runs", "Move to the list of runs"),
    Action("train.events", "e", "focus_part('events')", "Events", "Move to what happened"),
    Action("train.end", "k", "end_run", "End at once", "End a worker that does not obey, after a question"),
    Action("train.remove", "d", "remove_run", "Remove", "Delete the folder of the run, after a question"),
)
CHAT = (
    Action("chat.next", "ctrl+n", "next_adapter", "Next", "Answer with the next adapter of this base", show=True),
    Action("chat.base", "ctrl+l", "base_alone", "Base", "Answer with the base alone", show=True),
    Action("chat.adapters", "ctrl+f", "choose_adapters", "Adapters", "Choose adapters and their strengths", show=True),
    Action("chat.compare", "ctrl+o", "compare", "Compare", "Put each question to up to four adapters", show=True),
    Action("chat.kept", "ctrl+s", "kept", "Kept", "Reopen a kept conversation, or write this one to a file", show=True),
    Action("chat.send", "enter", "send", "Send", "Send what is written", priority=True),
    Action("chat.line", "ctrl+t,shift+enter,alt+enter", "new_line", "New line", "Begin a new line", priority=True),
    Action("chat.stop", "escape", "stop_or_back", "Stop", "Stop the answer; when none runs, go back"),
    Action("chat.weaker", "f8", "strength(-1)", "Weaker", "Lower the adapter's strength by 0.1"),
    Action("chat.stronger", "f9", "strength(1)", "Stronger", "Raise the adapter's strength by 0.1"),
    Action("chat.sampling", "f10", "sampling", "Sampling", "Temperature, top-p and what else decides the next token"),
    Action("chat.edit", "e", "edit_last", "Edit", "Change the last question and ask again"),
    Action("chat.again", "r", "again", "Again", "Answer the last question again"),
    Action("chat.copy", "c", "copy_answer", "Copy", "Copy the last answer"),
    Action("chat.code", "b", "copy_code", "Copy code", "Copy a block of code of the last answer"),
    Action("chat.write", "w", "write_file", "Write", "Write this conversation to a file"),
    Action("chat.new", "n", "new_conversation", "New", "Begin an empty conversation"),
    Action("chat.model", "m", "choose_model", "Model", "Choose another base model"),
    Action("chat.system", "s", "system", "System message", "Say what the model should know before the first question"),
    Action("chat.precision", "p", "precision", "Precision", "Choose how the base is held in memory"),
)
ADAPTERS = (
    Action("adapters.card", "enter", "card", "Card", "Show everything that is known of it", show=True),
    Action("adapters.mark", "space", "mark", "Mark", "Mark it, for what takes several", show=True),
    Action("adapters.chat", "c", "chat", "Chat", "Chat with it, or compare two to four marked ones", show=True),
    Action("adapters.compose", "o", "compose", "Compose", "Make one adapter of the marked ones", show=True),
    Action("adapters.merge", "m", "merge", "Merge", "Write a model with it in its weights", show=True),
    Action("adapters.average", "a", "average", "Average", "Make the mean of the marked ones"),
    Action("adapters.compare", "d", "compare", "Differences", "Show two marked ones side by side"),
    Action("adapters.export", "x", "export", "Export", "Write it alone, for other programs"),
    Action("adapters.import", "i", "import", "Import", "Take over a folder that PEFT saved, or a LoRA file"),
    Action("adapters.rollback", "b", "roll_back", "Roll back", "Make the name mean an older version again"),
    Action("adapters.remove", "delete", "remove", "Delete", "Delete it, after a question"),
    Action("adapters.filter", "ctrl+f", "filter", "Filter", "Show only what holds the words you type"),
    Action("adapters.versions", "v", "versions", "Versions", "Move to the versions"),
    Action("adapters.stop", "s", "stop", "Stop", "Stop the work that runs; then hide what it said"),
)
SETTINGS = (
    Action("settings.change", "enter", "change", "Change", "Give it another value, or another key", show=True),
    Action("settings.default", "d", "default", "Default", "Put it back to its default", show=True),
    Action("settings.list", "s", "focus_part('settings')", "Settings", "Move to the settings", show=True),
    Action("settings.keys", "k", "focus_part('keys')", "Keys", "Move to the keys", show=True),
    Action("settings.folders", "o", "focus_part('folders')", "Folders", "Move to the folders", show=True),
    Action("settings.here", "h", "focus_part('here')", "Versions", "Move to what runs here"),
    Action("settings.clear", "c", "clear_cache", "Clear cache", "Delete what is made again when needed"),
)

AREAS: dict[str, tuple[Action, ...]] = {
    "app": APP,
    "home": HOME,
    "plan": PLAN,
    "train": TRAIN,
    "chat": CHAT,
    "adapters": ADAPTERS,
    "settings": SETTINGS,
}
"""Actions by their area."""


def bindings(area: str) -> list[BindingType]:
    """What a screen, or the app, binds its keys to."""
    return [
        Binding(
            action.key,
            action.run,
            action.label,
            id=action.id,
            show=action.show,
            tooltip=action.tooltip,
            priority=action.priority,
        )
        for action in AREAS[area]
    ]


def all_actions() -> list[Action]:
    """Those of all areas."""
    return [action for actions in AREAS.values() for action in actions]
