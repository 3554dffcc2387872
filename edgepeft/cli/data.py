"""`edgepeft data`: what a data file holds, and what the model will see of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgepeft.cli.output import JsonFlag, line, note, print_json
from edgepeft.cli.output import console as out

if TYPE_CHECKING:
    from rich.text import Text

    from edgepeft.data.preview import PreviewedSample
    from edgepeft.data.statistics import Pair, Survey
    from edgepeft.data.template import ChatTemplate
    from edgepeft.data.tokens import Tokenizer
    from edgepeft.spec import DataRef, TrainOn

app = typer.Typer(no_args_is_help=True, help="Check data files, and see what the model reads.")

DataFile = Annotated[Path, typer.Argument(help="A json, jsonl, csv, tsv or parquet file.", show_default=False)]
Model = Annotated[
    str, typer.Option("--model", "-m", help="Whose tokens: a model in the store, a folder or a GGUF file.")
]
FormatOption = Annotated[
    str | None,
    typer.Option("--format", help="alpaca, sharegpt, messages, prompt-completion or text; detected otherwise."),
]
MapOption = Annotated[
    list[str] | None,
    typer.Option("--map", metavar="FIELD=COLUMN", help="Which column holds a field of the format; may be repeated."),
]
System = Annotated[str | None, typer.Option(help="A system message for records that have none.")]
TrainOnOption = Annotated[str, typer.Option(help="assistant (answers and tool calls) or all tokens.")]
Template = Annotated[str | None, typer.Option(help="chatml, plain or a Jinja file, instead of the model's own.")]
_DEFAULT_MODEL = "smollm2-135m"
_WIDTH = 80


@app.command("check")
def check(
    file: DataFile,
    model: Model = _DEFAULT_MODEL,
    format: FormatOption = None,
    map_: MapOption = None,
    system: System = None,
    train_on: TrainOnOption = "assistant",
    template: Template = None,
    max_bad: Annotated[int, typer.Option(min=0, help="Bad records to list; --json lists all.")] = 20,
    as_json: JsonFlag = False,
) -> None:
    """Count records, repeats and tokens, and list every bad record with its line."""
    from edgepeft.data.statistics import survey
    from edgepeft.errors import BadInput

    data = _describe(file, format, map_, system, train_on, template)
    tokenizer, chat_template = _load(model, data)
    with _progress("reading") as progress:
        found = survey(data, tokenizer, chat_template, progress=progress)
    warnings = _warnings(found, data, tokenizer, chat_template)
    if as_json:
        print_json({"model": model, "survey": found, "warnings": warnings})
    else:
        _print_survey(found, warnings, file, model, max_bad)
    fatal = next((record for record in found.bad if record.fatal), None)
    if fatal is not None:
        raise BadInput(
            fatal.why, where=f"{file}:{fatal.line}", hint="Training would refuse this file; copy or export it again"
        )
    if found.usable == 0:
        raise BadInput("no usable record", where=str(file), hint="Correct the records listed above")
    if found.trained_tokens == 0:
        raise BadInput(
            "no token would be trained", where=str(file), hint="See what is rendered with `edgepeft data preview`"
        )


@app.command("preview")
def preview(
    file: DataFile,
    model: Model = _DEFAULT_MODEL,
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="Records to show.")] = 3,
    record: Annotated[int | None, typer.Option(min=1, help="Show only this record, counted from 1.")] = None,
    at_line: Annotated[
        int | None, typer.Option("--line", min=1, help="Show only the record that begins on this line.")
    ] = None,
    ids: Annotated[bool, typer.Option("--ids", help="One token a line, with its id.")] = False,
    format: FormatOption = None,
    map_: MapOption = None,
    system: System = None,
    train_on: TrainOnOption = "assistant",
    template: Template = None,
    as_json: JsonFlag = False,
) -> None:
    """Show the exact tokens of some records, and which of them are trained."""
    from edgepeft.data.conversation import RecordError
    from edgepeft.data.preview import preview_record
    from edgepeft.data.records import BadRecord, RecordReader
    from edgepeft.errors import BadInput

    data = _describe(file, format, map_, system, train_on, template)
    tokenizer, chat_template = _load(model, data)
    reader = RecordReader(file, data.format, data.columns)
    unit = reader.detection.unit
    shown: list[dict[str, Any]] = []
    if not as_json:
        rendering = "plain text, no chat template" if chat_template is None else _template_name(chat_template)
        line(f"{file.name} as {data.format}, tokens of {model}, {rendering}", "bold")
        line("⟦trained⟧ not trained · is a space, ↵ a line end, → a tab", "dim")
    for number, item in enumerate(reader, 1):
        if (record is not None and number != record) or (at_line is not None and item.line != at_line):
            continue
        title = f"record {number}, {unit} {item.line}"
        try:
            if isinstance(item, BadRecord):
                raise RecordError(item.why)
            samples = preview_record(item, tokenizer, chat_template, data.train_on, data.system)
        except RecordError as refusal:
            shown.append({"record": number, "line": item.line, "bad": str(refusal)})
            if not as_json:
                line()
                line(f"{title} cannot be used: {refusal}", "yellow")
        else:
            shown.append({"record": number, "line": item.line, "samples": [_sample_json(sample) for sample in samples]})
            if not as_json:
                _print_samples(title, samples, ids)
        if record is not None or at_line is not None or len(shown) >= count:
            break
    if not shown:
        wanted = f"record {record}" if record is not None else f"record that begins on {unit} {at_line}"
        raise BadInput(f"there is no {wanted}", where=str(file), hint="See the lines with `edgepeft data check`")
    if as_json:
        print_json({"model": model, "format": data.format, "records": shown})


def parse_columns(pairs: list[str] | None) -> dict[str, str]:
    """`field=column` options as a mapping.

    Raises:
        UsageError: one of them is not of this form, or a field is named twice.
    """
    from edgepeft.errors import UsageError

    columns: dict[str, str] = {}
    for pair in pairs or []:
        field, equals, column = pair.partition("=")
        if not equals or not field or not column:
            raise UsageError(
                f"cannot read {pair!r}", where="--map", hint="Write FIELD=COLUMN, for example prompt=question"
            )
        if field in columns:
            raise UsageError(f"the field {field!r} is mapped twice", where="--map", hint="Keep one of the two")
        columns[field] = column
    return columns


def _describe(
    file: Path, format: str | None, pairs: list[str] | None, system: str | None, train_on: str, template: str | None
) -> DataRef:
    from edgepeft.data.prepare import describe_data
    from edgepeft.errors import UsageError

    chosen: TrainOn | None = "assistant" if train_on == "assistant" else "all" if train_on == "all" else None
    if chosen is None:
        raise UsageError(f"unknown value {train_on!r}", where="--train-on", hint="Known: assistant, all")
    return describe_data(
        file, format=format, columns=parse_columns(pairs), system=system, train_on=chosen, template=template
    )


def _load(model: str, data: DataRef) -> tuple[Tokenizer, ChatTemplate | None]:
    from edgepeft.cli.models import model_progress
    from edgepeft.data.prepare import load_template
    from edgepeft.data.tokens import Tokenizer
    from edgepeft.models.store import ensure_model

    with model_progress() as report:
        folder = Path(ensure_model(model, report).folder)
    return Tokenizer.load(folder), load_template(data, folder)


def _warnings(found: Survey, data: DataRef, tokenizer: Tokenizer, template: ChatTemplate | None) -> list[str]:
    from edgepeft.data.prepare import template_notes
    from edgepeft.data.records import unread_columns

    warnings = template_notes(data, tokenizer, template)
    warnings += [f"{sentence} ({samples:,} samples)" for sentence, samples in found.adapted.items()]
    unit = found.detection.unit
    if found.detection.others:
        others = ", ".join(f"{count:,} like {name}" for name, count in found.detection.others.items())
        warnings.append(f"formats are mixed: the first records are mostly {found.detection.format}, but {others}")
    unread = unread_columns(found.detection, data.columns)
    if unread:
        warnings.append(f"not read: {', '.join(unread)}; --map FIELD=COLUMN says otherwise")
    if found.large:
        lines = ", ".join(f"{at:,}" for at in found.large[:3]) + (" …" if len(found.large) > 3 else "")
        warnings.append(f"records longer than a million characters: {len(found.large):,} ({unit} {lines})")
    if found.control_tokens:
        warnings.append(f"the text of {found.control_tokens:,} records holds control tokens of the model")
    endless = found.samples - found.with_end
    if endless:
        warnings.append(f"in {endless:,} of {found.samples:,} samples no token that ends an answer is trained")
    return warnings


def _print_survey(found: Survey, warnings: list[str], file: Path, model: str, max_bad: int) -> None:
    from edgepeft.data.statistics import draw_histogram
    from edgepeft.units import format_share

    unit = found.detection.unit
    line(f"{file.name}: {found.detection.format}, {found.detection.container}", "bold")
    line()
    empty = f" ({found.empty:,} of them empty)" if found.empty else ""
    _fact("records", f"{found.usable:,} usable, {len(found.bad) or 'none'} bad{empty}")
    _fact("duplicates", _repeats(found.duplicates, found.duplicate_pairs, unit, "equals"))
    _fact("conflicts", _repeats(found.conflicts, found.conflict_pairs, unit, "answers otherwise than"))
    lengths = found.lengths
    if lengths is not None:
        share = format_share(found.trained_tokens / found.tokens)
        _fact("samples", f"{found.samples:,}")
        _fact("tokens", f"{found.tokens:,} of {model}, {found.trained_tokens:,} trained ({share})")
        middle = ", ".join(f"{name[1:]} % ≤ {length:,}" for name, length in lengths.percentiles.items())
        _fact("length", f"{middle}, longest {lengths.longest:,} ({unit} {lengths.longest_line:,})")
        line()
        line("Samples by length in tokens", "bold")
        for bar in draw_histogram(lengths.histogram, min(_WIDTH, out.width) - 2):
            line(f"  {bar}")
    if found.bad:
        line()
        line("Bad records", "bold")
        for record in found.bad[:max_bad]:
            _item(f"{file.name}:{record.line}", record.why)
        if len(found.bad) > max_bad:
            line(f"  … and {len(found.bad) - max_bad:,} more; --max-bad N lists more, --json all")
    if warnings:
        line()
        line("Worth knowing", "bold")
        for warning in warnings:
            _item("-", warning)


def _repeats(count: int, pairs: tuple[Pair, ...], unit: str, verb: str) -> str:
    if not count:
        return "none"
    return f"{count:,}; the first: {unit} {pairs[0].line:,} {verb} {unit} {pairs[0].earlier:,}"


def _fact(name: str, value: str) -> None:
    _item(f"{name:<10}", value)


def _item(label: str, text: str) -> None:
    """A label and its text, wrapped with the text kept in its own column."""
    import textwrap

    width = max(40, min(out.width, 100) if out.is_terminal else 10_000)
    head = f"  {label} " if label == "-" else f"  {label}  "
    for part in textwrap.wrap(
        head + text,
        width,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    ):
        line(part)


def _template_name(template: ChatTemplate) -> str:
    return "the model's own chat template" if template.name == "model" else f"template {template.name}"


def _print_samples(title: str, samples: list[PreviewedSample], ids: bool) -> None:
    for number, sample in enumerate(samples, 1):
        line()
        part = f", sample {number} of {len(samples)}" if len(samples) > 1 else ""
        line(f"── {title}{part}: {sample.trained:,} of {sample.tokens:,} tokens are trained", "bold")
        if ids:
            _print_ids(sample)
        else:
            out.print(_drawn(sample))
    for sentence in dict.fromkeys(sentence for sample in samples for sentence in sample.notes):
        note(f"note: {sentence}")


def _print_ids(sample: PreviewedSample) -> None:
    from rich.text import Text

    from edgepeft.data.preview import show_blanks

    at = 0
    for piece in sample.pieces:
        numbers = ",".join(map(str, piece.ids))
        mark = "⟦ ⟧" if piece.trained else "   "
        out.print(
            Text(f"{at:>6} {numbers:>8} {mark} ")
            + Text(show_blanks(piece.text).rstrip("\n"), _style(piece.trained, piece.special))
        )
        at += len(piece.ids)


def _drawn(sample: PreviewedSample) -> Text:
    """The sample's text with ⟦ and ⟧ around what is trained, for readers with and without colour."""
    from rich.text import Text

    from edgepeft.data.preview import show_blanks

    text = Text()
    trained = False
    for piece in sample.pieces:
        if piece.trained != trained:
            text.append("⟦" if piece.trained else "⟧", "bold")
            trained = piece.trained
        text.append(show_blanks(piece.text), _style(piece.trained, piece.special))
    if trained:
        text.append("⟧", "bold")
    if text.plain.endswith("\n"):
        text.right_crop(1)
    return text


def _style(trained: bool, special: bool) -> str:
    if special:
        return "bold green" if trained else "magenta"
    return "green" if trained else ""


def _sample_json(sample: PreviewedSample) -> dict[str, Any]:
    return {
        "tokens": sample.tokens,
        "trained": sample.trained,
        "notes": sample.notes,
        "pieces": [
            {"ids": piece.ids, "text": piece.text, "trained": piece.trained, "special": piece.special}
            for piece in sample.pieces
        ],
    }


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar with the time left, on a terminal's stderr."""
    from edgepeft.cli.output import stderr

    if not stderr.is_terminal or os.environ.get("TERM") == "dumb":
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=stderr,
        transient=True,
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
