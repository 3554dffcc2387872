"""`edgepeft adapters merge` and `export`: adapters for programs that know no edgepeft."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgepeft.cli.output import JsonFlag, line, note, print_json, tell_lines

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
    from edgepeft.chat.merge_words import make_merge, plan_merge, say_merged
    from edgepeft.cli.worker_progress import timed_progress

    with timed_progress() as progress:
        plan = plan_merge(
            reference,
            out,
            into=into,
            dtype=dtype,
            format=format,
            base=base,
            prompts=prompts,
            limit=limit,
            force=force,
            progress=progress,
        )
        result = make_merge(plan, progress)
    warnings = [*plan.warnings, *result.notes]
    if as_json:
        print_json(
            {
                "path": str(plan.target),
                "base": plan.request.base,
                "adapter": plan.adapter.reference,
                "format": plan.request.format,
                "into": plan.choice.into,
                "why": plan.choice.why,
                "dtype": plan.dtype,
                "bytes": result.size_bytes,
                "changed_tensors": result.changed,
                "tensors": result.tensors,
                "drift": result.drift,
                "limit_nats": plan.limit_nats,
                "compared_on": plan.compared_on,
                "warnings": warnings,
            }
        )
        return
    for warning in warnings:
        note(f"Note: {warning}", "yellow")
    tell_lines(say_merged(plan, result))
    line(f"  edgepeft models add {plan.target}", "dim")


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
    from edgepeft.chat.merge_words import make_export, plan_export, say_exported
    from edgepeft.cli.worker_progress import timed_progress

    with timed_progress() as progress:
        plan = plan_export(reference, out, format, base=base, force=force, progress=progress)
        result = make_export(plan, progress)
    warnings = [*plan.warnings, *result.notes]
    if as_json:
        print_json(
            {
                "path": str(plan.target),
                "base": plan.request.base,
                "adapter": plan.adapter.reference,
                "format": plan.request.format,
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
    tell_lines(say_exported(plan, result))
    if plan.request.format == "gguf":
        line(f"  llama-cli -m BASE.gguf --lora {plan.target}", "dim")
