"""Open models that are described by a file: what a plan needs of one before it is downloaded.

`profiles/models` holds the part of each model's config.json that decides sizes and operations, `profiles/tokenizers`
how densely its tokenizer writes. A user's own file overrides a shipped one by id.
"""

from __future__ import annotations

import difflib
from functools import cached_property
from typing import Any, Literal

import msgspec

from edgepeft.errors import BadInput
from edgepeft.models.config import read_shape
from edgepeft.models.embedded import EMBEDDED, INSTALL_COMMAND
from edgepeft.models.quantized import StoredAs
from edgepeft.models.references import how_to_bring
from edgepeft.models.shape import ModelShape
from edgepeft.profiles import Profile, known_id, load_folder

_MODELS, _TOKENIZERS = "models", "tokenizers"


class TokenWeights(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Tokens that a tokenizer makes of each kind of character and run, on average."""

    word: float
    """A run of Latin letters, in English or in code."""
    letter: float
    """Each letter of it, beside that."""
    european_letter: float
    """A letter in another language of Latin script; its words and letters count only here."""
    number: float
    """A run of digits."""
    digit: float
    """Each digit of it, beside that."""
    mark_run: float
    """A run of punctuation, or of two blanks and more."""
    mark: float
    """Each punctuation mark of it, beside that."""
    line_end: float
    """A run of line ends."""
    accent: float
    """An accented Latin letter, beside what it counts as a letter."""
    cjk: float
    """A Chinese character or a Japanese kana."""
    hangul: float
    """A Korean syllable."""
    cyrillic: float
    greek: float
    arabic: float
    hebrew: float
    devanagari: float
    indic: float
    """A character of another script of India or Sri Lanka."""
    other: float
    """A character of any other script, or a pictogram."""


class TokenizerProfile(Profile, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How densely a tokenizer writes, for lengths without the tokenizer itself."""

    name: str
    """Which models have it."""
    chars_per_token: float
    """Characters of a token in English instructions and answers."""
    tokens: TokenWeights
    sources: dict[str, str]
    """Field → how it was measured, or `estimated: …` with how."""


class ModelProfile(Profile, frozen=True, forbid_unknown_fields=True, kw_only=True, dict=True):
    """An open model as its publisher describes it."""

    name: str
    """As its publisher calls it."""
    aliases: tuple[str, ...]
    """Names on the hub that mean this shape, ORG/NAME; the base model comes first."""
    licence: str
    """As the publisher names it."""
    parameters: int
    """Entries of all its weights; a tied head counts once."""
    tokenizer: str
    """Id of its tokenizer's profile."""
    sample_tokens: int
    """Tokens that each conversation has beside its turns: a first token, a system message that is always there."""
    note: str = ""
    """What the figures leave out."""
    config: dict[str, Any]
    """The part of its config.json that decides sizes and operations."""
    sources: dict[str, str]
    """Field → where its value comes from."""

    @cached_property
    def shape(self) -> ModelShape:
        """What `config` describes.

        Raises:
            BadInput: it is no config of a model that edgepeft knows.
        """
        try:
            return read_shape(self.config)
        except BadInput as error:
            raise BadInput(error.what, where=f"profiles/models/{self.id}.toml, [config]", hint=error.hint) from error


class DescribedModel(msgspec.Struct, frozen=True):
    """A model that is not in the store, as far as a plan needs it; the store's `ModelEntry` has the same fields."""

    name: str
    """Id of its profile."""
    kind: Literal["profile"]
    shape: ModelShape
    stored_as: StoredAs
    """Form in which the publisher stores the weights."""
    weights_bytes: int
    """Size of them in that form."""
    profile: ModelProfile
    folder: str = ""
    """Nothing of it is on this disk."""
    fingerprint: str = ""
    """Empty: its weights have not been seen."""


def how_to_get(profile: ModelProfile) -> str:
    """The commands that bring a described model to this disk, as a sentence without its stop."""
    if profile.id == EMBEDDED:
        return f"Install it with: {INSTALL_COMMAND}"
    return how_to_bring(profile.aliases[0])


def describe_model(profile: ModelProfile) -> DescribedModel:
    """What plans are made with while the model itself is elsewhere.

    Raises:
        BadInput: the profile's config is that of no known model.
    """
    return DescribedModel(
        name=profile.id,
        kind="profile",
        shape=profile.shape,
        stored_as="bf16",
        weights_bytes=2 * profile.parameters,
        profile=profile,
    )


def load_models() -> dict[str, ModelProfile]:
    """Every model profile by id.

    Raises:
        BadInput: a file cannot be read, misses a key or a source, or its config is not that of a known model.
    """
    profiles = load_folder(_MODELS, ModelProfile)
    tokenizers = load_tokenizers()
    taken: dict[str, str] = {}
    for profile in profiles.values():
        where = f"profiles/models/{profile.id}.toml"
        if profile.tokenizer not in tokenizers:
            known = ", ".join(tokenizers)
            raise BadInput(f"key `tokenizer`: {profile.tokenizer!r} is not known", where=where, hint=f"Known: {known}")
        if profile.parameters != profile.shape.parameters:
            raise BadInput(
                f"key `parameters`: {profile.parameters:,}, but the weights that [config] describes are "
                f"{profile.shape.parameters:,}",
                where=where,
                hint="Compare both with the model's page",
            )
        _check_sources(profile.sources, ("config", "parameters", "tokenizer", "sample_tokens"), where)
        for alias in profile.aliases:
            other = taken.setdefault(alias.lower(), profile.id)
            if other != profile.id:
                what = f"key `aliases`: {alias} already means {other}"
                raise BadInput(what, where=where, hint="Remove one of the two")
    return profiles


def load_tokenizers() -> dict[str, TokenizerProfile]:
    """Every tokenizer profile by id.

    Raises:
        BadInput: a file cannot be read, or misses a key or a source.
    """
    profiles = load_folder(_TOKENIZERS, TokenizerProfile)
    for profile in profiles.values():
        _check_sources(profile.sources, ("chars_per_token", "tokens"), f"profiles/tokenizers/{profile.id}.toml")
    return profiles


def described_model(reference: str) -> ModelProfile | None:
    """The profile that a name means: its id, or one of its names on the hub; None when there is none.

    Raises:
        BadInput: as `load_models`.
    """
    wanted = reference.strip().lower()
    profiles = load_models()
    named = {alias.lower(): profile for profile in profiles.values() for alias in profile.aliases}
    return profiles.get(wanted) or named.get(wanted)


def near_models(reference: str) -> list[str]:
    """Ids of the profiles whose names are most like `reference`, nearest first; none when nothing is like it."""
    wanted = reference.strip().lower().split("/")[-1]
    names = {name.lower().split("/")[-1]: id for id, model in load_models().items() for name in (*model.aliases, id)}
    begins = [name for name in names if wanted and name.startswith(wanted)]
    near = difflib.get_close_matches(wanted, list(names), n=4, cutoff=0.6)
    return list(dict.fromkeys(names[name] for name in (*begins, *near)))[:4]


def find_model_profile(reference: str, *, where: str = "model") -> ModelProfile:
    """The profile that a name means.

    Raises:
        UsageError: no such id or alias; the nearest ids are named.
        BadInput: as `load_models`.
    """
    found = described_model(reference)
    if found is not None:
        return found
    profiles = load_models()
    listing = "edgepeft profiles list models"
    return profiles[known_id(reference, profiles, what="model", where=where, listing=listing)]


def find_tokenizer_profile(reference: str) -> TokenizerProfile:
    """The tokenizer profile of that id.

    Raises:
        UsageError: no such id; the nearest ones are named.
        BadInput: as `load_tokenizers`.
    """
    profiles = load_tokenizers()
    listing = "edgepeft profiles list tokenizers"
    return profiles[known_id(reference, profiles, what="tokenizer", where="tokenizer", listing=listing)]


def _check_sources(sources: dict[str, str], fields: tuple[str, ...], where: str) -> None:
    missing = [name for name in fields if not sources.get(name)]
    if missing:
        raise BadInput(
            f"key `{missing[0]}`: has no entry under [sources]", where=where, hint="Say where the value comes from"
        )
    unknown = sorted(set(sources) - set(fields))
    if unknown:
        raise BadInput(f"key `sources.{unknown[0]}`: there is no such field", where=where)
