"""`card.json`: what an adapter is, beyond what PEFT's own config can say."""

from __future__ import annotations

from typing import Literal

import msgspec

from edgepeft.spec import ComputeDtype, Layout, Precision, Recipe

CARD_FILE = "card.json"
How = Literal["exact", "svd", "linear", "ties", "dare", "factors"]
"""How adapters are combined; what each does is told in `edgepeft.engine.combine.composition`."""


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


class CombinedPart(msgspec.Struct, frozen=True):
    """One adapter that went into a combination."""

    adapter: str
    """`NAME@vK`, or the absolute path of a folder."""
    sha256: str
    """`sha256:…` of its adapter_model.safetensors."""
    weight: float
    """What its update was multiplied with."""
    samples: int | None = None
    """Training samples that the weight was taken from; None where it was said, or is the same for all."""


class Combination(msgspec.Struct, frozen=True):
    """How an adapter was made from others, without training."""

    command: Literal["composed", "averaged"]
    how: How
    parts: tuple[CombinedPart, ...]
    """In the order in which they were named."""
    rank: int | None = None
    """Rank that the result was truncated to; None where it was not."""
    density: float | None = None
    """Share of each update's entries that was kept (ties, dare)."""
    seed: int | None = None
    """Of the entries that were dropped (dare)."""
    energy_kept: float | None = None
    """Share of the squared singular values that the truncation kept; None without one."""
    distance: float = 0.0
    """‖result − weighted sum‖ / ‖weighted sum‖, Frobenius norms over all modules together."""
    precision: Precision | None = None
    """How the base was held when the parts were trained; None where they differ or do not tell."""
    compute_dtype: ComputeDtype | None = None
    """Likewise what was computed in."""
    system: str | None = None
    """The system message of all parts; None where they differ or have none."""
    template_day: str = ""
    """ISO date that the card's template is frozen to."""

    @property
    def formula(self) -> str:
        """`0.7 × a@v1 + 0.3 × b@v2, exact`."""
        terms = [f"{part.weight:.6g} × {part.adapter}" for part in self.parts]
        return f"{' + '.join(terms)}, {self.how}"


class Origin(msgspec.Struct, frozen=True):
    """The file that an adapter was imported from, which said neither its base nor how it was trained."""

    path: str
    """Absolute path of the file."""
    sha256: str
    """`sha256:…` of the file."""
    format: Literal["safetensors", "gguf"]
    alpha_from: str
    """Where alpha was taken from, as a clause."""


class Card(msgspec.Struct, frozen=True):
    """The record kept beside an adapter's weights: of one that was trained, combined from others, or imported.

    One that was combined has `combined`, one that was imported `imported`, and neither has recipe, layout or run.
    """

    name: str
    version: int
    base: str
    """Name of the base model where it was trained, or imported."""
    base_fingerprint: str
    """`sha256:…` over the base's source weights; empty where no part of a combination tells it."""
    recipe: Recipe | None
    """None for one that was not trained here."""
    layout: Layout | None
    """The layout at the end of the run; None for one that was not trained here."""
    parameters: tuple[ChangedParameter, ...]
    trainable_parameters: int
    trainable_share: float | None
    """Of all the model's parameters, as a fraction; None where the base's size is not known."""
    versions: dict[str, str]
    """Package → version when it was made."""
    template: TemplateRecord | None
    """None for plain-text training, where the parts of a combination differ, and where a file did not tell it."""
    created: str
    """ISO 8601, UTC."""
    run: str
    """Id of the run that made it; empty for one that was not trained here."""
    steps: int
    """Optimizer steps that made these weights; the run may have made more, see `last_step` of the metrics."""
    metrics: dict[str, float] = {}
    """train_loss, eval_loss, base_eval_loss, train_samples (distinct ones that were trained on), train_seconds,
    tokens_per_second, measured_peak_bytes, energy_wh, co2_grams …"""
    parent: str = ""
    """`NAME@vK` that training started from."""
    notes: tuple[str, ...] = ()
    combined: Combination | None = None
    """How it was made from other adapters; None for one that was not."""
    imported: Origin | None = None
    """What it was imported from; None for one that was not, or that came as PEFT's folder."""

    @property
    def precision(self) -> Precision | None:
        """How the base was held in training; None where the parts of a combination differ or do not tell."""
        if self.recipe is not None:
            return self.recipe.precision
        return self.combined.precision if self.combined is not None else None

    @property
    def compute_dtype(self) -> ComputeDtype | None:
        """What training computed in; None where the parts of a combination differ or do not tell."""
        if self.recipe is not None:
            return self.recipe.compute_dtype
        return self.combined.compute_dtype if self.combined is not None else None

    @property
    def system(self) -> str | None:
        """The system message of training records that had none; None without one."""
        if self.recipe is not None:
            return self.recipe.data.system
        return self.combined.system if self.combined is not None else None

    @property
    def template_day(self) -> str:
        """ISO date that the template's date is frozen to."""
        if self.recipe is not None:
            return self.recipe.data.day or self.created[:10]
        return self.combined.template_day if self.combined is not None else ""
