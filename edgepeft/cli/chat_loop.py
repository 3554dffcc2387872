"""The conversation at a terminal: questions, answers, and commands that begin with a slash."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgepeft.chat.client import SyncInference
from edgepeft.chat.conversation import Conversation
from edgepeft.chat.protocol import Answer, Sampling
from edgepeft.chat.setup import (
    ChosenAdapter,
    Prompting,
    Setup,
    choose_prompting,
    encode_conversation,
    entry_warnings,
    parse_adapter,
    precision_warnings,
)
from edgepeft.cli.answers import stream_answer
from edgepeft.cli.output import line
from edgepeft.errors import EdgepeftError
from edgepeft.library.store import check_base, list_adapters

_HELP = (
    ("/adapter A [B=0.5 …]", "answer with these adapters; the base stays loaded"),
    ("/adapter off", "answer with the base alone"),
    ("/adapter", "show the active adapters and those that fit this base"),
    ("/system TEXT", "set the system message; without TEXT show it, with - remove it"),
    ("/reset", "forget the conversation"),
    ("/save FILE", "write the conversation as JSON"),
    ("/load FILE", "go on with a saved conversation"),
    ("/help", "show this"),
    ("/quit", "end; Ctrl-D too. Ctrl-C stops an answer. A line ending in \\ goes on below"),
)


class ChatLoop:
    """Reads lines until `/quit` or the end of input.

    Args:
        inference: a process with the base loaded.
        setup: what it was started with.
        prompting: template and stop tokens for the first adapters.
        sampling: for every answer.
        system: as the user said it; None for the one that the adapter was trained with.
        template: as the user said it.
        styled: whether a terminal shows colours and takes line editing.
    """

    def __init__(
        self,
        inference: SyncInference,
        setup: Setup,
        prompting: Prompting,
        sampling: Sampling,
        system: str | None,
        template: str | None,
        *,
        styled: bool,
    ) -> None:
        self._inference = inference
        self._setup = setup
        self._prompting = prompting
        self._sampling = sampling
        self._template = template
        self._own_system = system is not None
        self._conversation = Conversation(prompting.system if system is None else system)
        self._adapters: tuple[ChosenAdapter, ...] = setup.adapters
        self._styled = styled
        self._commands: dict[str, Callable[[str], None]] = {
            "adapter": self._choose_adapters,
            "system": self._set_system,
            "reset": self._reset,
            "save": self._save,
            "load": self._load,
            "help": self._help,
        }

    def run(self) -> None:
        """The loop."""
        if self._styled:
            _edit_lines()
        line(
            f"{self._setup.entry.name} in {self._setup.precision} on {self._setup.device_name}. /help lists commands.",
            "dim",
        )
        if self._adapters:
            self._show_active()
        while True:
            text = self._read()
            if text is None:
                return
            command, _, rest = text.strip().partition(" ")
            if command in ("/quit", "/exit", "/q"):
                return
            try:
                if not command:
                    continue
                if command.startswith("//"):
                    self._ask(text.strip()[1:])
                elif command.startswith("/"):
                    self._run_command(command[1:], rest.strip())
                else:
                    self._ask(text)
            except EdgepeftError as error:
                if not self._inference.alive:
                    raise
                line(str(error), "red")

    def _read(self) -> str | None:
        """A question or command; None at the end of input."""
        lines: list[str] = []
        while True:
            try:
                lines.append(input("… " if lines else "> "))
            except EOFError:
                line()
                return None
            except KeyboardInterrupt:
                line()
                if not lines:
                    line("/quit or Ctrl-D ends the chat.", "dim")
                lines = []
                continue
            if not lines[-1].endswith("\\"):
                return "\n".join(lines)
            lines[-1] = lines[-1][:-1]

    def _run_command(self, name: str, rest: str) -> None:
        command = self._commands.get(name)
        if command is None:
            line(f"There is no command /{name}. /help lists them; // sends a line that begins with a slash.", "red")
            return
        command(rest)

    def _ask(self, text: str) -> None:
        self._conversation.ask(text)
        try:
            ids = encode_conversation(self._conversation.messages(), self._prompting)
            uses = [chosen.use for chosen in self._adapters]
            stream = self._inference.generate(ids, self._prompting.stop_ids, self._sampling, uses)
            answer_text, answer = stream_answer(stream, self._prompting.tokenizer)
        except EdgepeftError:
            self._conversation.take_back()
            raise
        if answer.ids:
            self._conversation.answer(answer_text, tuple(chosen.label for chosen in self._adapters))
        else:
            self._conversation.take_back()
        self._show_status(answer)

    def _show_status(self, answer: Answer) -> None:
        context = self._setup.entry.shape.context_length
        active = " + ".join(chosen.label for chosen in self._adapters) or "base"
        parts = [
            active,
            f"{answer.tokens_per_second:.1f} tokens/s",
            f"{answer.prompt_tokens + len(answer.ids):,} of {context:,} tokens",
        ]
        ends = {
            "cancelled": "stopped",
            "length": f"cut at {self._sampling.max_new_tokens} tokens (--max-new-tokens)",
            "context": "the context is full: /reset",
        }
        if answer.stopped_by in ends:
            parts.append(ends[answer.stopped_by])
        line(" · ".join(parts), "dim")

    def _choose_adapters(self, rest: str) -> None:
        if not rest:
            self._show_active()
            self._show_fitting()
            return
        chosen = () if rest == "off" else tuple(parse_adapter(text) for text in rest.split())
        warnings = entry_warnings(self._setup.entry, chosen)
        prompting = choose_prompting(self._setup.entry, chosen, self._template, fall_back=True)
        # Refused before anything is changed here.
        self._inference.activate([one.use for one in chosen])
        for warning in (*warnings, *precision_warnings(self._setup.precision, chosen), *prompting.warnings):
            line(f"Warning: {warning}", "yellow")
        self._adapters, self._prompting = chosen, prompting
        if not self._own_system:
            self._conversation.system = prompting.system
        self._show_active()

    def _show_active(self) -> None:
        active = " + ".join(chosen.label for chosen in self._adapters)
        line(f"Answering with {active}." if active else "Answering with the base alone.", "dim")

    def _show_fitting(self) -> None:
        fitting = []
        for adapter in list_adapters():
            try:
                check_base(adapter, self._setup.entry)
            except EdgepeftError:
                continue
            fitting.append(adapter.reference)
        line(f"In the library for this base: {', '.join(fitting) or 'none'}", "dim")

    def _set_system(self, rest: str) -> None:
        if rest:
            self._conversation.system = None if rest == "-" else rest
            self._own_system = True
        line(f"System message: {self._conversation.system or 'none'}", "dim")

    def _reset(self, _: str) -> None:
        self._conversation.reset()
        line("The conversation is empty.", "dim")

    def _save(self, rest: str) -> None:
        if not rest:
            line("Say where: /save FILE", "red")
            return
        path = Path(rest).expanduser()
        self._conversation.save(path, self._setup.entry.name)
        line(f"Saved to {path}", "dim")

    def _load(self, rest: str) -> None:
        if not rest:
            line("Say which: /load FILE", "red")
            return
        self._conversation = Conversation.load(Path(rest).expanduser())
        self._own_system = True
        line(f"Going on after {len(self._conversation.turns)} turns.", "dim")

    def _help(self, _: str) -> None:
        width = max(len(command) for command, _ in _HELP)
        for command, what in _HELP:
            line(f"{command:<{width}}  {what}", "dim")


def _edit_lines() -> None:
    """Arrow keys and history in `input`, where the system has them."""
    try:
        import readline
    except ImportError:
        return
    readline.set_auto_history(True)
