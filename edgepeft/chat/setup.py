"""What a conversation or an evaluation begins with: which base, which adapters, how precise, which template."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import msgspec

from edgepeft.chat.protocol import AdapterUse
from edgepeft.data.conversation import RecordError
from edgepeft.data.encode import encode_prompt
from edgepeft.data.template import BUILT_IN, ChatTemplate
from edgepeft.data.tokens import Tokenizer, untrained_tokens
from edgepeft.errors import BadInput, UsageError
from edgepeft.library.card import Card
from edgepeft.library.store import AdapterFolder, check_base, resolve_adapter, split_reference
from edgepeft.models.embedded import EMBEDDED
from edgepeft.models.store import ModelEntry, ensure_model, list_models
from edgepeft.plan.device import PlanDevice, find_device
from edgepeft.settings import settings
from edgepeft.spec import ComputeDtype, Precision

Progress = Callable[[str, float | None], None]


class ChosenAdapter(msgspec.Struct, frozen=True):
    """An adapter and its strength."""

    adapter: AdapterFolder
    scale: float = 1.0

    @property
    def label(self) -> str:
        """`NAME@vK`, with the strength when it is not 1."""
        return self.adapter.reference + ("" if self.scale == 1 else f"={self.scale:g}")

    @property
    def use(self) -> AdapterUse:
        """For a request."""
        return AdapterUse(str(self.adapter.path), self.scale)


class Setup(msgspec.Struct, frozen=True):
    """Everything an inference process is started with."""

    entry: ModelEntry
    adapters: tuple[ChosenAdapter, ...]
    precision: Precision
    compute_dtype: ComputeDtype
    device: str
    """`cpu`, or the UUID of a card."""
    device_name: str
    warnings: tuple[str, ...]
    """What a person should know before reading answers."""


class Prompting(msgspec.Struct, frozen=True):
    """How messages become tokens, for one base and the adapters on it."""

    tokenizer: Tokenizer
    template: ChatTemplate
    stop_ids: tuple[int, ...]
    system: str | None
    """The system message of the training data's records that had none; None without one."""
    warnings: tuple[str, ...]


def parse_adapter(text: str) -> ChosenAdapter:
    """`NAME`, `NAME@v2` or a folder, with `=0.7` behind it for its strength.

    Raises:
        UsageError: the strength is not a number.
        BadInput: there is no such adapter.
    """
    reference, strength = split_reference(text, "=")
    if strength is None:
        return ChosenAdapter(resolve_adapter(text))
    try:
        scale = float(strength)
    except ValueError:
        raise UsageError(f"{strength!r} is not a strength", where="--adapter", hint="Write for example a=0.7") from None
    if not abs(scale) <= 100:
        raise UsageError(
            f"a strength of {strength} is not possible", where="--adapter", hint="1 is as trained, 0 is off"
        )
    return ChosenAdapter(resolve_adapter(reference), scale)


def choose_setup(
    model: str | None,
    adapters: Sequence[ChosenAdapter],
    precision: str | None = None,
    gpu: str | None = None,
    progress: Progress | None = None,
) -> Setup:
    """Decides what was not said: the adapters' base and their trained precision, else the embedded model in 16 bit.

    Args:
        model: as the user names it; None for the base of the first adapter that knows it, else the embedded model.
        adapters: checked against the base.
        precision: of the base; None for the one that the first adapter with a card was trained on.
        gpu: as `--gpu` takes it; None for the setting, else the freest card or the CPU.
        progress: told while the base is prepared.

    Raises:
        BadInput: the base is not on this disk, or an adapter belongs to another one.
        UsageError: an unknown precision or card.
    """
    card = next((chosen.adapter.card for chosen in adapters if chosen.adapter.card), None)
    if model is None and adapters:
        entry = _base_of(adapters[0].adapter, card, progress)
    else:
        entry = ensure_model(model or EMBEDDED, progress)
    warnings = entry_warnings(entry, adapters)
    if precision is not None and precision not in get_args(Precision):
        known = ", ".join(get_args(Precision))
        raise UsageError(f"unknown precision {precision!r}", where="--precision", hint=f"Known: {known}")
    device = find_device(gpu or settings().gpu)
    if not device.present:
        raise UsageError(f"this machine has no {device.name}", where="--gpu", hint="Leave the option out, or use cpu")
    chosen: Precision = (
        msgspec.convert(precision, Precision) if precision else (card.precision if card else None) or "bf16"
    )
    warnings += precision_warnings(chosen, adapters)
    return Setup(
        entry=entry,
        adapters=tuple(adapters),
        precision=chosen,
        compute_dtype=_compute_dtype(chosen, device),
        device=device.id,
        device_name=device.name,
        warnings=tuple(warnings),
    )


def entry_warnings(entry: ModelEntry, adapters: Sequence[ChosenAdapter]) -> list[str]:
    """Checks each adapter against the base; what is unverified about them.

    Raises:
        BadInput: one belongs to another base.
    """
    return [warning for chosen in adapters for warning in check_base(chosen.adapter, entry)]


def precision_warnings(precision: Precision, adapters: Sequence[ChosenAdapter]) -> list[str]:
    """Where the base is held in another precision than in training: the adapter learned to correct that one."""
    trained = [(chosen.adapter, chosen.adapter.card.precision) for chosen in adapters if chosen.adapter.card]
    return [
        f"{adapter.reference} was trained on a base in {held}, and this one is held in {precision}: answers may differ"
        for adapter, held in trained
        if held is not None and held != precision
    ]


def choose_prompting(
    entry: ModelEntry, adapters: Sequence[ChosenAdapter], template: str | None = None, *, fall_back: bool = False
) -> Prompting:
    """The template and stop tokens: what the first adapter with a card was trained with, else the base's.

    Args:
        entry: the base.
        adapters: in their order.
        template: `chatml`, `plain` or a file, as the user says it.
        fall_back: use a built-in template, and say so, when the base has none.

    Raises:
        BadInput: there is no template, or it cannot be read.
    """
    folder = Path(entry.folder)
    tokenizer = Tokenizer.load(folder)
    card = next((chosen.adapter.card for chosen in adapters if chosen.adapter.card), None)
    trained = card.template if card else None
    warnings: list[str] = []
    if template is not None:
        used = ChatTemplate.load(folder, template)
        if trained is not None and trained.text != used.text:
            warnings.append("the adapter was trained with another chat template than the one given: answers may suffer")
    elif trained is not None and card is not None:
        used = ChatTemplate({"default": trained.text}, tokenizer.special_tokens, name="the adapter's template")
        if _own_template(folder) is not None and other_template(entry, card) is not None:
            warnings.append(
                "the base's chat template is not the one that the adapter was trained with; the trained one is used"
            )
    else:
        try:
            used = ChatTemplate.load(folder)
        except BadInput as error:
            if not fall_back:
                raise
            used, name = _built_in(folder, tokenizer)
            warnings.append(f"{entry.name}: {error.what}; using the built-in one called {name}")
    stops = dict.fromkeys([*(trained.stop_token_ids if trained else ()), *tokenizer.stop_token_ids(used)])
    system = card.system if card else None
    return Prompting(tokenizer, used, tuple(stops), system, tuple(warnings))


def other_template(entry: ModelEntry, card: Card) -> str | None:
    """The chat template that an adapter was trained with, where it is another than its base's or the base has none."""
    if card.template is None:
        return None
    own = _own_template(Path(entry.folder))
    same = own is not None and _frozen_text(own, card) == card.template.text
    return None if same else card.template.text


def encode_conversation(messages: Sequence[dict[str, str]], prompting: Prompting) -> list[int]:
    """The tokens that the next answer follows.

    Raises:
        BadInput: the chat template refuses the conversation.
    """
    try:
        return encode_prompt(messages, prompting.tokenizer, prompting.template)
    except RecordError as error:
        raise BadInput(str(error), where="conversation", hint="Use /reset, or another --template") from error


def _base_of(adapter: AdapterFolder, card: Card | None, progress: Progress | None) -> ModelEntry:
    if card is not None and card.base_fingerprint:
        for entry in list_models():
            if entry.fingerprint == card.base_fingerprint:
                return ensure_model(entry.name, progress)
        return ensure_model(card.base, progress)
    claimed = adapter.config.get("base_model_name_or_path")
    if not isinstance(claimed, str) or not claimed:
        raise BadInput(
            "does not say which base it belongs to", where=adapter.reference, hint="Name the base model before it"
        )
    try:
        return ensure_model(claimed, progress)
    except (BadInput, UsageError) as error:
        raise BadInput(
            f"was trained on {claimed}, which is not on this disk under that name",
            where=adapter.reference,
            hint="Name the base model: edgepeft models list shows those in the store",
        ) from error


def _compute_dtype(precision: Precision, device: PlanDevice) -> ComputeDtype:
    if precision == "fp32":
        return "fp32"
    if precision == "fp16" and device.kind == "cuda":
        return "fp16"
    return device.compute_dtype


def _own_template(folder: Path) -> ChatTemplate | None:
    try:
        return ChatTemplate.load(folder)
    except BadInput:
        return None


def _frozen_text(template: ChatTemplate, card: Card) -> str:
    """The base's template as training froze it."""
    if not template.uses_date or not card.template_day:
        return template.text
    return template.freeze_date(datetime.date.fromisoformat(card.template_day)).text


def _built_in(folder: Path, tokenizer: Tokenizer) -> tuple[ChatTemplate, str]:
    """ChatML where the vocabulary has its marks, else plain text with names."""
    for name in BUILT_IN:
        template = ChatTemplate.load(folder, name)
        if not untrained_tokens(tokenizer, template):
            return template, name
    raise BadInput(
        "no built-in chat template suits this model", where=str(folder), hint="Give one with --template FILE"
    )
