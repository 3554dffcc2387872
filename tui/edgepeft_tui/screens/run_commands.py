"""What can be done with the chosen run: pause, stop, resume, end, remove. Each in a thread; the answer is a message."""

from __future__ import annotations

from collections.abc import Callable

from textual import on, work

from edgepeft.errors import BadInput, EdgepeftError, UsageError
from edgepeft_tui.run_messages import Command, CommandDone, CommandFailed, TextRead
from edgepeft_tui.run_view import RunView
from edgepeft_tui.screens.dialogs import Ask, Choice, Reading
from edgepeft_tui.screens.room import Room

_ASKED: dict[Command, str] = {
    "pause": "Pausing: it ends its step, saves and gives the memory back; space resumes it then",
    "stop": "Stopping: it ends its step and saves its adapter",
    "resume": "Resuming: its worker starts",
    "end": "Ending its worker",
}
_END_SECONDS = 2.0
"""How long a worker may take to obey before it is ended hard, where that was asked for."""


class RunCommands(Room):
    """The actions of the Train screen that act on one run."""

    _view: RunView | None = None
    """The chosen run, as it was last seen; None while it cannot be read."""
    _chosen: str = ""
    """Its id; empty while there is no run."""

    def say_asked(self, text: str) -> None:
        """Shows what was asked of the worker and has not happened yet."""
        raise NotImplementedError

    def action_pause_or_resume(self) -> None:
        """Pauses a run that trains, resumes one that does not."""
        view = self._seen()
        if view is None:
            return
        state = view.state
        if state.alive:
            self._command("pause", view.id)
        elif state.wants_time:
            self._ask_for_time(view.id)
        elif state.resumable:
            self._command("resume", view.id)
        else:
            self._app.tell(f"{view.id} is {state.status}; n plans a new run")

    def ask_to_resume(self, view: RunView) -> None:
        """Resumes a run after a question: a click may have meant something else."""
        saved = view.state.checkpoint_step
        since = f"from its checkpoint of step {saved:,}" if saved else "from its beginning"
        question = f"Let {view.id} go on {since}?"
        answers = (("resume", "Resume"), ("leave", "Leave it"))
        self._ask(Choice(question, answers, title="Resume"), "resume", view.id)

    def action_stop_run(self) -> None:
        """Stops the run after its step and saves its adapter."""
        view = self._seen()
        if view is not None and view.state.alive:
            self._command("stop", view.id)
        elif view is not None:
            self._app.tell(f"{view.id} has no worker: it is {view.state.status}")

    def action_end_run(self) -> None:
        """Ends a worker that does not obey, after a question."""
        view = self._seen()
        if view is None:
            return
        if not view.state.alive:
            self._app.tell(f"{view.id} has no worker: it is {view.state.status}")
            return
        saved = view.state.checkpoint_step
        since = f"step {saved:,}, its last checkpoint" if saved else "its beginning; it has no checkpoint yet"
        question = f"End the worker of {view.id} at once? Resuming it goes on from {since}. s stops it without loss."
        answers = (("keep", "Leave it"), ("end", "End it"))
        self._ask(Choice(question, answers, title="End at once", danger="end"), "end", view.id)

    def action_remove_run(self) -> None:
        """Deletes the run's folder, after a question; also that of a damaged one."""
        run, view = self._chosen, self._view
        if not run:
            return
        if view is not None and view.state.alive:
            self._app.tell(f"{run} is training; s stops it, then it can be removed", severity="warning")
            return
        published = view.state.published if view is not None else ""
        kept = f" Its adapter {published} stays in the library." if published else ""
        question = f"Delete the folder of {run} with its checkpoints?{kept}"
        answers = (("keep", "Keep it"), ("remove", "Remove it"))
        self._ask(Choice(question, answers, title="Remove", danger="remove"), "remove", run)

    def _seen(self) -> RunView | None:
        if self._view is None:
            self._app.tell(
                "This run cannot be read; d removes it" if self._chosen else "There is no run yet; n plans one"
            )
        return self._view

    def _ask(self, dialog: Choice, command: Command, run: str) -> None:
        def answered(answer: str | None) -> None:
            if answer == command:
                self._command(command, run)

        self._app.push_screen(dialog, answered)

    def _ask_for_time(self, run: str) -> None:
        from edgepeft.units import parse_seconds

        def answered(answer: str | None) -> None:
            if not answer:
                return
            try:
                seconds = parse_seconds(answer, where="training time")
            except UsageError as error:
                self._app.tell_error(error)
                return
            self._command("resume", run, max_seconds=seconds)

        question = f"The training time of {run} was over. How long may it train in all, what it trained included?"
        self._app.push_screen(Ask(question, title="More time", hint="2h"), answered)

    def _command(self, command: Command, run: str, *, max_seconds: float | None = None, force: bool = False) -> None:
        if command in _ASKED:
            self.say_asked(_ASKED[command])
        self._execute(command, run, max_seconds, force)

    @work(thread=True, group="command", exit_on_error=False)
    def _execute(self, command: Command, run: str, max_seconds: float | None, force: bool) -> None:
        try:
            said = _perform(command, run, max_seconds, force)
        except (EdgepeftError, OSError) as error:
            self.post_message(CommandFailed(command, run, error))
        else:
            self.post_message(CommandDone(command, run, said))

    @on(CommandFailed)
    def _command_failed(self, message: CommandFailed) -> None:
        from edgepeft.runs.control import FORCE_HINT

        self.say_asked("")
        error = message.error
        if isinstance(error, BadInput) and error.hint == FORCE_HINT:
            place = f"{error.where}: " if error.where else ""
            question = (
                f"{place}{error.what}.\n\nThe run can go on with the data as it was, whose tokens are in the cache. "
                "To learn from the file as it is now, train anew."
            )
            answers = (("leave", "Leave it"), ("resume", "Resume with the old data"))

            def answered(answer: str | None) -> None:
                if answer == "resume":
                    self._command("resume", message.run, force=True)

            self._app.push_screen(Choice(question, answers, title=f"Resume {message.run}"), answered)
            return
        self._app.tell_error(error)

    # Longer texts.

    def read_text(self, title: str, read: Callable[[], str]) -> None:
        """Reads a text in a thread and shows it."""
        self._read(title, read)

    @work(thread=True, exclusive=True, group="text", exit_on_error=False)
    def _read(self, title: str, read: Callable[[], str]) -> None:
        try:
            text = read()
        except (EdgepeftError, OSError) as error:
            text = str(error)
        self.post_message(TextRead(title, text))

    @on(TextRead)
    def _text_read(self, message: TextRead) -> None:
        self._app.push_screen(Reading(message.text, title=message.title))


def _perform(command: Command, run_id: str, max_seconds: float | None, force: bool) -> str:
    """Does it, and says what was done; empty where the run's own events tell."""
    from edgepeft.runs.control import request
    from edgepeft.runs.launch import remove, resume, stop
    from edgepeft.runs.layout import open_run

    run = open_run(run_id)
    match command:
        case "pause" | "stop":
            request(run.path, command)
        case "resume":
            resume(run, max_seconds, force=force)
        case "end":
            state = stop(run, _END_SECONDS)
            return f"{run_id} is {state.status} after step {state.step:,}"
        case "remove":
            remove(run)
            return f"{run_id} is removed"
    return ""
