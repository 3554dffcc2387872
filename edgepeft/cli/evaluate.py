"""`edgepeft eval`: held-out loss and scores of a base or an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgepeft.cli.output import JsonFlag

if TYPE_CHECKING:
    from edgepeft.chat.evaluation import Evaluation


def evaluate(
    data: Annotated[Path, typer.Option("--data", help="Records to answer: any format that training takes.")],
    model: Annotated[
        str | None,
        typer.Argument(
            help="Base model: a name, a folder or a GGUF file; the adapter's base when left out.", show_default=False
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", "-a", help="NAME, NAME@v2 or a folder; =0.7 sets its strength.", show_default=False),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Use only the first records.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer in tokens.")] = 256,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Prompts answered at once.")] = 32,
    template: Annotated[
        str | None,
        typer.Option("--template", help="Chat template: chatml, plain or a Jinja file.", show_default=False),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(
            "--system",
            help="System message for records without one; as the adapter was trained by itself.",
            show_default=False,
        ),
    ] = None,
    columns: Annotated[
        list[str] | None, typer.Option("--map", help="FIELD=COLUMN, for files with other columns.", show_default=False)
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision", help="How the base is held: bf16, fp16, fp32, int8 or nf4; as trained.", show_default=False
        ),
    ] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", help="Card by UUID or index, or cpu.", show_default=False)] = None,
    as_json: JsonFlag = False,
) -> None:
    """Measure a base or an adapter on a file: loss, exact match, valid JSON, right fields."""
    from edgepeft.chat.evaluation import evaluate as run_evaluation
    from edgepeft.chat.setup import choose_prompting, choose_setup, parse_adapter
    from edgepeft.cli.output import note, print_json
    from edgepeft.cli.worker_progress import evaluation_progress, loading_status, start_inference
    from edgepeft.errors import BadInput

    if not data.is_file():
        raise BadInput("there is no such file", where=str(data), hint="Give a json, jsonl, csv or parquet file")
    mapped = _parse_columns(columns or [])
    with loading_status() as progress:
        setup = choose_setup(model, [parse_adapter(text) for text in adapter or []], precision, gpu, progress)
        prompting = choose_prompting(setup.entry, setup.adapters, template, fall_back=True)
    warnings = [*setup.warnings, *prompting.warnings]
    for warning in warnings:
        note(f"Warning: {warning}", "yellow")
    with start_inference(setup) as inference, evaluation_progress() as tell:
        result = run_evaluation(
            inference,
            setup.entry,
            data,
            [chosen.use for chosen in setup.adapters],
            max_new_tokens=max_new_tokens,
            limit=limit,
            template=prompting.template,
            stop_ids=prompting.stop_ids,
            system=prompting.system if system is None else system,
            columns=mapped,
            batch_size=batch_size,
            progress=tell,
        )
    if as_json:
        print_json(
            {
                "model": setup.entry.name,
                "adapters": [chosen.label for chosen in setup.adapters],
                "precision": setup.precision,
                "data": str(data),
                "records": result.records,
                "loss": result.loss,
                "trained_tokens": result.trained_tokens,
                "exact_match": result.scores.exact_match if result.scores else None,
                "valid_json": result.scores.valid_json if result.scores else None,
                "field_accuracy": result.scores.field_accuracy if result.scores else None,
                "answered": result.scores.count if result.scores else 0,
                "seconds": result.seconds,
                "answer_tokens": result.answer_tokens,
                "answer_tokens_per_second": result.answer_tokens_per_second,
                "warnings": warnings,
                "notes": result.notes,
                "rows": result.rows,
            }
        )
        return
    who = " + ".join(chosen.label for chosen in setup.adapters) or "the base alone"
    show(who, f"{setup.entry.name} in {setup.precision}", data.name, result)


def show(who: str, base: str, data: str, result: Evaluation) -> None:
    """Prints the table of an evaluation."""
    import math

    from edgepeft.cli.output import console, line, note, row, table
    from edgepeft.units import format_seconds, format_share

    line(f"{who} on {base}, {result.records} records of {data}", "bold")
    grid = table("measure", "value", "over", right=("value",))
    if result.loss is not None:
        shown = f"{result.loss:.4f}"
        row(
            grid,
            "held-out loss",
            shown,
            f"{result.trained_tokens:,} tokens (perplexity {math.exp(min(result.loss, 700)):,.4g})",
        )
    if result.scores is not None:
        answers = f"{result.scores.count} answers"
        row(grid, "exact match", format_share(result.scores.exact_match), answers)
        if result.scores.valid_json is not None:
            row(grid, "valid JSON", format_share(result.scores.valid_json), answers)
        if result.scores.field_accuracy is not None:
            row(grid, "field accuracy", format_share(result.scores.field_accuracy), answers)
    console.print(grid)
    for text in result.notes:
        note(f"Note: {text}")
    speed = f"; answers at {result.answer_tokens_per_second:.0f} tokens/s" if result.answer_tokens else ""
    note(f"{format_seconds(result.seconds)}{speed}")


def _parse_columns(pairs: list[str]) -> dict[str, str] | None:
    from edgepeft.errors import UsageError

    columns: dict[str, str] = {}
    for pair in pairs:
        field, separator, column = pair.partition("=")
        if not separator or not field or not column:
            raise UsageError(f"cannot read {pair!r}", where="--map", hint="Write FIELD=COLUMN, such as prompt=question")
        columns[field] = column
    return columns or None
