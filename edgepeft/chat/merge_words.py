"""From what a person types to a merge or an export, and what came of it in words.

The command line and the terminal UI use it. What is compared is said by the data room, so this is no part of the
library, which knows none.
"""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import msgspec

from edgepeft.chat.comparison import choose_prompts
from edgepeft.chat.setup import ChosenAdapter, Setup, choose_setup, other_template
from edgepeft.library import merge_client, merging
from edgepeft.library.combine_text import Said
from edgepeft.library.merging import Exported, ExportRequest, IntoChoice, Merged, MergeRequest
from edgepeft.library.store import AdapterFolder, resolve_adapter
from edgepeft.library.target_path import Kind, check_target
from edgepeft.processes import Progress
from edgepeft.units import format_bytes


class MergePlan(msgspec.Struct, frozen=True):
    """A merge that can be made."""

    adapter: AdapterFolder
    request: MergeRequest
    target: Path
    choice: IntoChoice
    compared_on: str
    """Texts that the models are compared on, as a clause after `on`."""
    limit_nats: float
    """Mean divergence above which nothing is kept."""
    force: bool
    warnings: tuple[str, ...]

    @property
    def dtype(self) -> str:
        """Of the result's weights."""
        return self.request.dtype if self.request.format == "safetensors" else self.request.format.removeprefix("gguf-")


class ExportPlan(msgspec.Struct, frozen=True):
    """An export that can be made."""

    adapter: AdapterFolder
    request: ExportRequest
    target: Path
    warnings: tuple[str, ...]


def plan_merge(
    reference: str,
    out: Path,
    *,
    into: str | None = None,
    dtype: str | None = None,
    format: str = "safetensors",
    base: str | None = None,
    prompts: Path | None = None,
    limit: float | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> MergePlan:
    """A merge from what was typed; what was not follows from how the adapter was trained.

    Args:
        reference: `NAME`, `NAME@v2` or a folder.
        out: folder of the merged model, or a .gguf file.
        into: `original` or `dequantized`.
        dtype: of the result's weights.
        format: one of `ModelFormat`.
        base: model, where the adapter does not tell.
        prompts: file of texts to compare on.
        limit: mean KL in nats a token above which nothing is kept.
        force: keep it beyond the limit, and replace a model that is there.
        progress: told while the base is prepared.

    Raises:
        UsageError: a word that cannot be meant.
        BadInput: the adapter cannot be merged, or something that must not be replaced is at `out`.
    """
    kind = msgspec.convert(merging.check_format(format, get_args(merging.ModelFormat)), merging.ModelFormat)
    adapter = resolve_adapter(reference)
    merging.check_mergeable(adapter)
    choice = merging.choose_into(adapter, into)
    setup = _setup(adapter, base, progress)
    entry, card = setup.entry, adapter.card
    place: Kind = "model" if kind == "safetensors" else "gguf"
    target = check_target(out, place, replace=force, base=entry, adapter=adapter.path)
    precision, compute_dtype = merging.how_trained(adapter, entry.stored_as)
    texts = choose_prompts(entry, setup.adapters[0], prompts)
    request = MergeRequest(
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
    return MergePlan(
        adapter=adapter,
        request=request,
        target=target,
        choice=choice,
        compared_on=texts.source,
        limit_nats=merging.DEFAULT_LIMIT_NATS if limit is None else limit,
        force=force,
        warnings=setup.warnings,
    )


def make_merge(plan: MergePlan, progress: Progress | None = None) -> Merged:
    """Makes a planned merge; raises what `merge_client.merge` raises."""
    return merge_client.merge(plan.request, plan.target, plan.limit_nats, force=plan.force, progress=progress)


def plan_export(
    reference: str,
    out: Path,
    format: str,
    *,
    base: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> ExportPlan:
    """An export from what was typed.

    Args:
        reference: `NAME`, `NAME@v2` or a folder.
        out: folder of the adapter, or a .gguf file.
        format: one of `AdapterFormat`.
        base: model, where the adapter does not tell.
        force: replace an adapter that is there.
        progress: told while the base is prepared.

    Raises:
        UsageError: a word that cannot be meant.
        BadInput: the adapter cannot be exported, or something that must not be replaced is at `out`.
    """
    kind = msgspec.convert(merging.check_format(format, get_args(merging.AdapterFormat)), merging.AdapterFormat)
    adapter = resolve_adapter(reference)
    merging.check_exportable(adapter, kind)
    setup = _setup(adapter, base, progress)
    place: Kind = "adapter" if kind == "peft" else "gguf"
    target = check_target(out, place, replace=force, base=setup.entry, adapter=adapter.path)
    request = ExportRequest(
        base=setup.entry.name,
        adapter=str(adapter.path),
        title=adapter.name or adapter.path.name,
        work="",
        format=kind,
    )
    return ExportPlan(adapter, request, target, (*setup.warnings, *merging.export_notes(adapter)))


def make_export(plan: ExportPlan, progress: Progress | None = None) -> Exported:
    """Makes a planned export; raises what `merge_client.export` raises."""
    return merge_client.export(plan.request, plan.target, progress)


def say_merged(plan: MergePlan, result: Merged) -> list[Said]:
    """What a merge became: size, what was changed, and how far it is from the adapter on its base."""
    rounded = "" if plan.request.format == "safetensors" else ", rounded to the file's type"
    return [
        Said(f"Wrote {plan.target} ({format_bytes(result.size_bytes)}, {plan.dtype})"),
        Said(f"merged into the {plan.choice.into} weights: {plan.choice.why}"),
        Said(f"{result.changed} of {result.tensors} tensors changed, the others are the base's{rounded}"),
        Said(f"against the adapter on its base, on {plan.compared_on}:"),
        Said(merging.drift_text(result.drift), careful=result.drift.mean_kl > plan.limit_nats),
    ]


def say_exported(plan: ExportPlan, result: Exported) -> list[Said]:
    """What an export became."""
    base = plan.request.base
    if result.alpha is None:
        what = f"{result.method}, in {result.modules} places of {base}"
    else:
        what = f"rank {result.rank}, alpha {result.alpha:g}, on {result.modules} linears of {base}"
    return [Said(f"Wrote {plan.target} ({format_bytes(result.size_bytes)})"), Said(what)]


def _setup(adapter: AdapterFolder, base: str | None, progress: Progress | None) -> Setup:
    return choose_setup(base, [ChosenAdapter(adapter)], gpu="cpu", progress=progress)
