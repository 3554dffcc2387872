"""Merging an adapter into its base and exporting it: what is asked for, what comes back, and what is checked before.

The tensors are the engine's: `library.merge_client` starts it.
"""

from __future__ import annotations

from typing import Literal, get_args

import msgspec

from edgepeft.errors import BadInput, UsageError
from edgepeft.library.peft_config import OWN_PREFIX, method_id_of
from edgepeft.library.store import CONFIG_FILE, AdapterFolder
from edgepeft.methods import METHODS
from edgepeft.models.quantized import StoredAs
from edgepeft.spec import ComputeDtype, Precision
from edgepeft.units import GIB

Into = Literal["original", "dequantized"]
"""What an update is added to: the base's weights as its files have them, or the values that training computed with."""
ModelFormat = Literal["safetensors", "gguf-f16", "gguf-q8_0"]
AdapterFormat = Literal["peft", "gguf"]

DEFAULT_LIMIT_NATS = 0.02
"""Mean divergence above which a merged model is not kept. Text that the adapter on its base would write is e^KL times
as perplexing to the merged model, so this is 2 %. Rounding stays far below it, and adding an update to weights that it
was not trained on far above. An NF4 adapter of the demo on SmolLM2-135M: 0.00012 in bf16, 0.0025 in GGUF's 8 bit, and
0.45 where it was merged into the weights from before they were NF4."""
MAX_SHARD_BYTES = 4 * GIB
"""Of one safetensors file."""


class MergeRequest(msgspec.Struct, frozen=True, tag="merge"):
    """A base with an adapter's update in its weights, to be written."""

    base: str
    """Name in the model store."""
    adapter: str
    """Folder of the adapter."""
    title: str
    """What the model is called in its own files, `BASE with NAME@vK`."""
    adapter_name: str
    """`NAME@vK`, or the folder."""
    work: str
    """Empty folder to write into."""
    into: Into
    dtype: ComputeDtype
    """Of the result; GGUF files have their own."""
    format: ModelFormat
    precision: Precision
    """The base was held in, in training."""
    compute_dtype: ComputeDtype
    """That training computed in."""
    prompts: tuple[tuple[int, ...], ...]
    """Token ids to compare the models on."""
    template: str | None = None
    """The chat template that the adapter was trained with; None keeps the base's."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end an answer, as the adapter learned them."""
    max_shard_bytes: int = MAX_SHARD_BYTES


class ExportRequest(msgspec.Struct, frozen=True, tag="export"):
    """An adapter by itself, to be written for other programs."""

    base: str
    """Name in the model store."""
    adapter: str
    """Folder of the adapter."""
    title: str
    """What the adapter is called in its own files."""
    work: str
    """Empty folder to write into."""
    format: AdapterFormat


class Drift(msgspec.Struct, frozen=True):
    """How far the merged model's predictions are from those of the adapter on its base."""

    prompts: int
    tokens: int
    """Positions compared."""
    mean_kl: float
    """Mean Kullback-Leibler divergence of the next token's distribution, in nats."""
    max_kl: float
    """The largest of all positions."""
    top1_agreement: float
    """Share of positions at which both find the same token the likeliest."""


class Merged(msgspec.Struct, frozen=True, tag="merged"):
    """The model is written."""

    size_bytes: int
    """Of its weights."""
    changed: int
    """Tensors that are no copies of the base's."""
    tensors: int
    drift: Drift
    notes: tuple[str, ...] = ()
    """What a person should know, as clauses."""


class Exported(msgspec.Struct, frozen=True, tag="exported"):
    """The adapter is written."""

    size_bytes: int
    method: str
    """Its id."""
    modules: int
    """What it changes: linears, where it is a LoRA."""
    rank: int | None = None
    """Of a plain LoRA, as `alpha`; None where the adapter is none."""
    alpha: float | None = None
    notes: tuple[str, ...] = ()


_QUANTIZED = ("nf4", "int8")
MERGE_RECORD = "edgepeft_merge.json"
"""In a merged folder: what it was made of, and how far it is from that."""
MODEL_FILE = "model.gguf"
"""What the worker calls a GGUF model in its work folder."""
ADAPTER_FILE = "adapter.gguf"
"""What the worker calls a GGUF adapter in its work folder."""


class IntoChoice(msgspec.Struct, frozen=True):
    """What an update is added to, and why."""

    into: Into
    why: str
    """As a clause."""


def check_mergeable(adapter: AdapterFolder) -> None:
    """Refuses an adapter whose method cannot become part of the weights.

    Raises:
        BadInput: saying what is in the way.
    """
    where = str(adapter.path / CONFIG_FILE)
    name = method_id_of(adapter.config, where)
    method = METHODS[name]
    if not method.merges:
        raise BadInput(
            f"an adapter of the method {name} cannot become part of the weights: it adds {method.adds}",
            where=where,
            hint="Use it beside its base, as edgepeft chat does; lora and other methods merge",
        )


def check_exportable(adapter: AdapterFolder, format: AdapterFormat) -> None:
    """Refuses an adapter that other programs do not read in this format.

    Raises:
        BadInput: saying what they read, and what to do instead.
    """
    where = str(adapter.path / CONFIG_FILE)
    name = method_id_of(adapter.config, where)
    kind = "DoRA" if adapter.config.get("use_dora") else f"of the method {name}"
    merging = "edgepeft adapters merge makes a model of it" if METHODS[name].merges else "Use it with edgepeft chat"
    if format == "gguf" and (name != "lora" or adapter.config.get("use_dora")):
        raise BadInput(f"llama.cpp reads plain LoRA, and this adapter is {kind}", where=where, hint=merging)
    if format == "peft" and str(adapter.config.get("peft_type")).startswith(OWN_PREFIX):
        raise BadInput(f"PEFT has no place for this adapter, which is {kind}", where=where, hint=merging)


def choose_into(adapter: AdapterFolder, wanted: str | None) -> IntoChoice:
    """What the update is added to: as asked for, else what fits how the adapter was trained.

    Raises:
        UsageError: an unknown word.
        BadInput: the values that training saw are asked for, and nothing tells how it held its base.
    """
    trained = _trained(adapter)
    if wanted is not None and wanted not in get_args(Into):
        raise UsageError(f"unknown {wanted!r}", where="--into", hint=f"Known: {', '.join(get_args(Into))}")
    if wanted == "dequantized" and trained is None:
        raise BadInput(
            "has no card that tells how its base was held in training",
            where=adapter.reference,
            hint="Use --into original",
        )
    if wanted is not None:
        return IntoChoice(msgspec.convert(wanted, Into), "as asked for")
    if trained is None:
        return IntoChoice("original", "it has no card that tells how its base was held in training")
    precision, _ = trained
    if precision in _QUANTIZED:
        return IntoChoice("dequantized", f"it was trained on {precision} weights and corrects their rounding, too")
    return IntoChoice("original", f"it was trained on unquantized weights ({precision})")


def how_trained(adapter: AdapterFolder, stored_as: StoredAs) -> tuple[Precision, ComputeDtype]:
    """How training held the base, and what it computed in; where no card tells it, as the base's files have it."""
    if (trained := _trained(adapter)) is not None:
        return trained
    held: dict[str, tuple[Precision, ComputeDtype]] = {
        "fp32": ("fp32", "fp32"),
        "fp16": ("fp16", "fp16"),
        "bnb-4bit": ("nf4", "bf16"),
        "bnb-8bit": ("int8", "bf16"),
    }
    return held.get(stored_as, ("bf16", "bf16"))


def export_notes(adapter: AdapterFolder) -> tuple[str, ...]:
    """What a person should know who uses an adapter beside a base of another program, as clauses."""
    trained = _trained(adapter)
    if trained is None or trained[0] not in _QUANTIZED:
        return ()
    return (
        f"it was trained on {trained[0]} weights: beside a base that is held otherwise it answers "
        "differently; edgepeft adapters merge keeps what it learned",
    )


def choose_dtype(
    wanted: str | None, format: ModelFormat, into: Into, stored_as: StoredAs, compute_dtype: ComputeDtype
) -> ComputeDtype:
    """The dtype of the merged weights: as asked for, else that of the base, or of training's products.

    Raises:
        UsageError: an unknown dtype, or one beside a GGUF format, which says it itself.
    """
    known: tuple[ComputeDtype, ...] = get_args(ComputeDtype)
    if wanted is not None and wanted not in known:
        raise UsageError(f"unknown dtype {wanted!r}", where="--dtype", hint=f"Known: {', '.join(known)}")
    if wanted is not None and format != "safetensors":
        raise UsageError(f"{format} says its own dtype", where="--dtype", hint="Leave the option out")
    named = wanted or (stored_as if into == "original" else "")
    for dtype in known:
        if dtype == named:
            return dtype
    return compute_dtype if compute_dtype != "fp32" or stored_as == "fp32" else "bf16"


def check_format(wanted: str, kinds: tuple[str, ...]) -> str:
    """Returns `wanted` when it is one of `kinds`.

    Raises:
        UsageError: it is not.
    """
    if wanted not in kinds:
        raise UsageError(f"unknown format {wanted!r}", where="--format", hint=f"Known: {', '.join(kinds)}")
    return wanted


def check_drift(
    drift: Drift,
    limit_nats: float,
    into: Into,
    *,
    force: bool,
    format: ModelFormat = "safetensors",
    dtype: str = "bf16",
) -> None:
    """Refuses a merged model that is too far from the adapter on its base.

    Args:
        drift: how far it is.
        limit_nats: how far it may be, on average.
        into: what the update was added to.
        force: whether it is kept all the same.
        format: it was written in.
        dtype: of a folder.

    Raises:
        BadInput: it is, and nobody insists.
    """
    if force or drift.mean_kl <= limit_nats:
        return
    if into == "original":
        other = "Use --into dequantized, which keeps what training saw where that was quantized, "
    elif format != "safetensors":
        other = "Use --format gguf-f16, " if format == "gguf-q8_0" else "Use --format safetensors, "
    else:
        other = "" if dtype == "fp32" else "Use --dtype fp32, "
    raise BadInput(
        f"the merged model answers otherwise than the adapter on its base: {drift_text(drift)}; the limit is "
        f"{limit_nats:g}",
        where="merge",
        hint=f"Nothing was kept. {other}raise --limit, or keep it with --force",
    )


def _trained(adapter: AdapterFolder) -> tuple[Precision, ComputeDtype] | None:
    """How training held the base, and what it computed in; None where no card tells it."""
    card = adapter.card
    if card is None or card.precision is None or card.compute_dtype is None:
        return None
    return card.precision, card.compute_dtype


def drift_text(drift: Drift) -> str:
    """The figures in a line."""
    return (
        f"KL {drift.mean_kl:.2g} nats a token on average and {drift.max_kl:.2g} at most, "
        f"{100 * drift.top1_agreement:.1f} % the same likeliest token, over {drift.tokens:,} tokens"
    )
