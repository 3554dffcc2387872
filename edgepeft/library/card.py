"""`card.json`: what an adapter is, beyond what PEFT's own config can say."""

from __future__ import annotations

import msgspec

from edgepeft.spec import Layout, Recipe

CARD_FILE = "card.json"


class ChangedParameter(msgspec.Struct, frozen=True):
    """One parameter that the adapter adds to the base, or changes in it."""

    name: str
    """Key in adapter_model.safetensors."""
    shape: tuple[int, ...]


class TemplateRecord(msgspec.Struct, frozen=True):
    """The chat template that the adapter was trained with."""

    text: str
    """The Jinja source, with any date frozen to the training day."""
    fingerprint: str
    """`sha256:…` of `text`."""
    stop_token_ids: tuple[int, ...]
    """Tokens that end an answer."""


class Card(msgspec.Struct, frozen=True):
    """The record kept beside an adapter's weights."""

    name: str
    version: int
    base: str
    """Name of the base model where it was trained."""
    base_fingerprint: str
    """`sha256:…` over the base's source weights."""
    recipe: Recipe
    layout: Layout
    """The layout at the end of the run."""
    parameters: tuple[ChangedParameter, ...]
    trainable_parameters: int
    trainable_share: float
    """Of all the model's parameters, as a fraction."""
    versions: dict[str, str]
    """Package → version at training time."""
    template: TemplateRecord | None
    """None for plain-text training."""
    created: str
    """ISO 8601, UTC."""
    run: str
    """Id of the run that made it."""
    steps: int
    """Optimizer steps that made these weights; the run may have made more, see `last_step` of the metrics."""
    metrics: dict[str, float] = {}
    """train_loss, eval_loss, base_eval_loss, train_seconds, tokens_per_second, measured_peak_bytes, energy_wh,
    co2_grams …"""
    parent: str = ""
    """`NAME@vK` that training started from."""
    notes: tuple[str, ...] = ()
