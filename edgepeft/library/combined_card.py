"""What is written beside the weights of a combined adapter: PEFT's config and our card."""

from __future__ import annotations

import datetime
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC
from typing import Any, Literal, TypeVar

from edgepeft.library.card import Card, ChangedParameter, Combination, CombinedPart, TemplateRecord
from edgepeft.library.combine_parts import TRAIN_SAMPLES
from edgepeft.library.combining import Combined, Plan
from edgepeft.library.peft_config import is_restricted, plain_lora_config, value_by_pattern
from edgepeft.models.headers import TensorHeader
from edgepeft.spec import Precision

_LAYER = re.compile(r"(?:^|\.)layers\.\d+\.(?P<linear>.+)$")
_DATE_FORMS = ("%d", "%m", "%b", "%B", "%y", "%Y", "%a", "%A", "%j")
_Value = TypeVar("_Value")
_Number = TypeVar("_Number", int, float)


def adapter_config(plan: Plan, ranks: Mapping[str, int]) -> dict[str, Any]:
    """adapter_config.json of a plain LoRA whose every update has the scale 1: alpha is the rank, module by module."""
    count = Counter(ranks.values())
    rank = max(count, key=lambda value: (count[value], value))
    pattern = pattern_of(ranks, rank)
    first = plan.parts[0].adapter.config
    return plain_lora_config(
        plan.base or first.get("base_model_name_or_path"),
        rank,
        rank,
        _targets(plan),
        rank_pattern=pattern,
        alpha_pattern=pattern,
        task_type=first.get("task_type") or "CAUSAL_LM",
        fan_in_fan_out=any(bool(part.adapter.config.get("fan_in_fan_out")) for part in plan.parts),
    )


def pattern_of(values: Mapping[str, _Number], usual: _Number) -> dict[str, _Number]:
    """PEFT's rank_pattern or alpha_pattern for values by module path: one line a kind of linear whose layers agree."""
    kinds: dict[str, set[_Number]] = {}
    for path, value in values.items():
        kinds.setdefault(_kind(path), set()).add(value)
    short = {kind: found.pop() for kind, found in kinds.items() if len(found) == 1}
    pattern = {_kind(path) if _kind(path) in short else path: value for path, value in values.items() if value != usual}
    if all(value_by_pattern(pattern, path, usual) == value for path, value in values.items()):
        return pattern
    # The ending of one tower's linear is also that of another's.
    return {path: value for path, value in values.items() if value != usual}


def combined_card(
    plan: Plan, command: Literal["composed", "averaged"], made: Combined, tensors: Sequence[TensorHeader]
) -> Card:
    """The card of a combination; its name and version are set when it is published."""
    template, day, notes = _common_template(plan)
    cards = [part.adapter.card for part in plan.parts if part.adapter.card is not None]
    precision: Precision | None = _agreed([card.precision for card in cards])
    system = _agreed([card.system for card in cards])
    held = sorted({card.precision for card in cards if card.precision})
    if len(held) > 1:
        notes.append(f"The parts were trained on a base held in {' and in '.join(held)}.")
    if system is None and any(card.system is not None for card in cards):
        notes.append("The parts were trained with different system messages; none is kept.")
    entries = sum(tensor.entries for tensor in tensors)
    samples = [part.samples for part in plan.parts]
    return Card(
        name="",
        version=0,
        base=plan.base,
        base_fingerprint=plan.base_fingerprint,
        recipe=None,
        layout=None,
        parameters=tuple(ChangedParameter(tensor.name, tensor.shape) for tensor in tensors),
        trainable_parameters=entries,
        trainable_share=_share(cards, entries),
        versions=made.versions,
        template=template,
        created=datetime.datetime.now(UTC).isoformat(timespec="seconds"),
        run="",
        steps=0,
        metrics={TRAIN_SAMPLES: float(sum(count or 0 for count in samples))} if all(samples) else {},
        notes=(*plan.notes, *notes),
        combined=Combination(
            command=command,
            how=plan.how,
            parts=tuple(
                CombinedPart(part.adapter.reference, part.sha256, part.weight, part.samples) for part in plan.parts
            ),
            rank=plan.rank,
            density=plan.density,
            seed=plan.seed,
            energy_kept=made.energy_kept,
            distance=made.distance,
            precision=precision,
            compute_dtype=_agreed([card.compute_dtype for card in cards]),
            system=system,
            template_day=day,
        ),
    )


def _targets(plan: Plan) -> list[str]:
    """The parts' own targets where they are plain endings, else the paths of their modules."""
    targets: set[str] = set()
    for part, paths in zip(plan.parts, plan.paths, strict=True):
        named = part.adapter.config.get("target_modules")
        renamed = any(path != joined for path, joined in paths.items())
        if isinstance(named, list) and named and not renamed and not is_restricted(part.adapter.config):
            targets |= set(map(str, named))
        else:
            targets |= set(paths.values())
    return sorted(targets)


def _kind(path: str) -> str:
    """`self_attn.q_proj` for that linear of any layer."""
    match = _LAYER.search(path)
    return match["linear"] if match else path


def _share(cards: Sequence[Card], entries: int) -> float | None:
    """The share of all the model's parameters, whose number a part's share tells."""
    for card in cards:
        if card.trainable_share:
            base = card.trainable_parameters / card.trainable_share - card.trainable_parameters
            return entries / (base + entries)
    return None


def _agreed(values: Sequence[_Value | None]) -> _Value | None:
    return values[0] if values and all(value == values[0] for value in values) else None


def _common_template(plan: Plan) -> tuple[TemplateRecord | None, str, list[str]]:
    """The template of all parts that have a card, the day it is frozen to, and notes."""
    cards = [part.adapter.card for part in plan.parts if part.adapter.card is not None]
    if not cards or all(card.template is None for card in cards):
        return None, "", []
    newest = max(cards, key=lambda card: card.template_day)
    differing = [card for card in cards if not _same_template(card, newest)]
    if differing or newest.template is None:
        return None, "", ["The parts were trained with different chat templates; the base's own is used instead."]
    texts = {card.template.text for card in cards if card.template is not None}
    kept = f"The parts' chat templates differ in their date alone; that of {newest.template_day} is kept."
    return newest.template, newest.template_day, [kept] if len(texts) > 1 else []


def _same_template(first: Card, second: Card) -> bool:
    """Whether two cards' templates and stop tokens are the same but for the day that was written into the text."""
    ours, theirs = first.template, second.template
    if ours is None or theirs is None:
        return ours is theirs
    if ours.stop_token_ids != theirs.stop_token_ids:
        return False
    if ours.text == theirs.text:
        return True
    words, others = (re.split(r"(\W+)", record.text) for record in (ours, theirs))
    dates = set(zip(_date_words(first.template_day), _date_words(second.template_day), strict=False))
    return len(words) == len(others) and all(
        word == other or (word, other) in dates for word, other in zip(words, others, strict=True)
    )


def _date_words(day: str) -> list[str]:
    """How parts of a date may be written; empty for no date."""
    if not day:
        return []
    date = datetime.date.fromisoformat(day)
    return [*(date.strftime(form) for form in _DATE_FORMS), str(date.day), str(date.month)]
