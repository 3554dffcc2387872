"""`edgepeft adapters merge` and `export`: adapters for programs that know no edgepeft."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgepeft.cli.output import JsonFlag, line, note, print_json

if TYPE_CHECKING:
    from edgepeft.library.merging import IntoChoice, Merged, MergeRequest

Reference = Annotated[str, typer.Argument(help="NAME, NAME@v2 or a folder.")]
Base = Annotated[
    str | None, typer.Option("--base", help="Base model, where the adapter does not tell.", show_default=False)
]


def merge(
    reference: Reference,
    out: Annotated[Path, typer.Option("--out", help="Folder of the merged model, or a .gguf file.")],
    into: Annotated[
        str | None,
        typer.Option(
            "--into",
            help="original: the weights in the base's files. dequantized: the values that training computed with. "
            "By default what fits the training.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help="bf16, fp16 or fp32; by default the base's; into dequantized weights, training's.",
            show_default=False,
        ),
    ] = None,
    base: Base = None,
    format: Annotated[str, typer.Option("--format", help="safetensors, gguf-f16 or gguf-q8_0.")] = "safetensors",
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            help="Texts to compare on: a .txt with one a line, or records. By default those of the adapter's data.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        float | None,
        typer.Option(
            "--limit", min=0, help="Mean KL in nats a token above which nothing is kept; 0.02.", show_default=False
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Keep it beyond the limit, and replace a model that is at --out.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Write a model that has the adapter in its weights, and measure how far it is from the adapter on its base."""
    from typing import get_args

    import msgspec

    from edgepeft.chat.comparison import choose_prompts
    from edgepeft.chat.setup import ChosenAdapter, choose_setup, other_template
    from edgepeft.cli.worker_progress import timed_progress
    from edgepeft.library import merge_client, merging
    from edgepeft.library.store import resolve_adapter
    from edgepeft.library.target_path import Kind, check_target

    kind = msgspec.convert(merging.check_format(format, get_args(merging.ModelFormat)), merging.ModelFormat)
    adapter = resolve_adapter(reference)
    merging.check_mergeable(adapter)
    choice = merging.choose_into(adapter, into)
    with timed_progress() as progress:
        setup = choose_setup(base, [ChosenAdapter(adapter)], gpu="cpu", progress=progress)
        entry, card = setup.entry, adapter.card
        place: Kind = "model" if kind == "safetensors" else "gguf"
        target = check_target(out, place, replace=force, base=entry, adapter=adapter.path)
        precision, compute_dtype = merging.how_trained(adapter, entry.stored_as)
        texts = choose_prompts(entry, setup.adapters[0], prompts)
        request = merging.MergeRequest(
            base=entry.name,
            adapter=str(adapter.path),
            title=f"{entry.name} with {adapter.name or adapter.path.name}",
            adapter_name=adapter.reference,
            work="",
            into=choice.into,
            dtype=merging.choose_dtype(dtype, kind, choice.into, entry.stored_as, compute_dtype),
            format=kind,
            precision=precision,
            compute_dtype=compute_dtype,
            prompts=texts.ids,
            template=other_template(entry, card) if card else None,
            stop_ids=card.template.stop_token_ids if card and card.template else (),
        )
        most = merging.DEFAULT_LIMIT_NATS if limit is None else limit
        result = merge_client.merge(request, target, most, force=force, progress=progress)
    if as_json:
        warnings = [*setup.warnings, *result.notes]
        print_json(
            {
                "path": str(target),
                "base": entry.name,
                "adapter": adapter.reference,
                "format": kind,
                "into": choice.into,
                "why": choice.why,
                "dtype": request.dtype if kind == "safetensors" else kind.removeprefix("gguf-"),
                "bytes": result.size_bytes,
                "changed_tensors": result.changed,
                "tensors": result.tensors,
                "drift": result.drift,
                "limit_nats": most,
                "compared_on": texts.source,
                "warnings": warnings,
            }
        )
        return
    for warning in (*setup.warnings, *result.notes):
        note(f"Note: {warning}", "yellow")
    _tell_merged(target, kind, request, choice, result, texts.source, most)


def export(
    reference: Reference,
    out: Annotated[Path, typer.Option("--out", help="Folder of the PEFT adapter, or a .gguf file.")],
    format: Annotated[str, typer.Option("--format", help="peft or gguf.")],
    base: Base = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an adapter that is at --out.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Write the adapter alone, as vLLM, llama.cpp and PEFT read it: a plain LoRA with one rank, one alpha, no patterns.

    Another method goes into the form that PEFT has for it.
    """
    from typing import get_args

    import msgspec

    from edgepeft.chat.setup import ChosenAdapter, choose_setup
    from edgepeft.cli.worker_progress import timed_progress
    from edgepeft.library import merge_client, merging
    from edgepeft.library.store import resolve_adapter
    from edgepeft.library.target_path import Kind, check_target
    from edgepeft.units import format_bytes

    kind = msgspec.convert(merging.check_format(format, get_args(merging.AdapterFormat)), merging.AdapterFormat)
    adapter = resolve_adapter(reference)
    merging.check_exportable(adapter, kind)
    with timed_progress() as progress:
        setup = choose_setup(base, [ChosenAdapter(adapter)], gpu="cpu", progress=progress)
        place: Kind = "adapter" if kind == "peft" else "gguf"
        target = check_target(out, place, replace=force, base=setup.entry, adapter=adapter.path)
        request = merging.ExportRequest(
            base=setup.entry.name,
            adapter=str(adapter.path),
            title=adapter.name or adapter.path.name,
            work="",
            format=kind,
        )
        result = merge_client.export(request, target, progress)
    warnings = [*setup.warnings, *merging.export_notes(adapter), *result.notes]
    if as_json:
        print_json(
            {
                "path": str(target),
                "base": setup.entry.name,
                "adapter": adapter.reference,
                "format": kind,
                "bytes": result.size_bytes,
                "method": result.method,
                "rank": result.rank,
                "alpha": result.alpha,
                "modules": result.modules,
                "warnings": warnings,
            }
        )
        return
    for warning in warnings:
        note(f"Note: {warning}", "yellow")
    line(f"Wrote {target} ({format_bytes(result.size_bytes)})")
    if result.alpha is None:
        line(f"  {result.method}, in {result.modules} places of {setup.entry.name}")
    else:
        line(f"  rank {result.rank}, alpha {result.alpha:g}, on {result.modules} linears of {setup.entry.name}")
    if kind == "gguf":
        line(f"  llama-cli -m BASE.gguf --lora {target}", "dim")


def _tell_merged(
    target: Path,
    kind: str,
    request: MergeRequest,
    choice: IntoChoice,
    result: Merged,
    compared_on: str,
    limit: float,
) -> None:
    from edgepeft.library.merging import drift_text
    from edgepeft.units import format_bytes

    rounded = "" if kind == "safetensors" else ", rounded to the file's type"
    form = request.dtype if kind == "safetensors" else kind.removeprefix("gguf-")
    line(f"Wrote {target} ({format_bytes(result.size_bytes)}, {form})")
    line(f"  merged into the {choice.into} weights: {choice.why}")
    line(f"  {result.changed} of {result.tensors} tensors changed, the others are the base's" + rounded)
    line(f"  against the adapter on its base, on {compared_on}:")
    line(f"  {drift_text(result.drift)}", None if result.drift.mean_kl <= limit else "yellow")
    line(f"  edgepeft models add {target}", "dim")
