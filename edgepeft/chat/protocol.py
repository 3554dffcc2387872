"""The JSON lines between a front end and an inference process: requests on its stdin, replies on its stdout.

Every request carries an id, and every reply the id it answers. The process answers one request at a time; `Cancel` may
arrive while it works.
"""

from __future__ import annotations

import msgspec

from edgepeft.errors import UsageError


class AdapterUse(msgspec.Struct, frozen=True):
    """An adapter and its strength."""

    folder: str
    """Absolute path of a folder with adapter_config.json and adapter_model.safetensors."""
    scale: float = 1.0
    """1 is as trained, 0 is off."""


class Sampling(msgspec.Struct, frozen=True):
    """How the next token is drawn."""

    temperature: float = 0.7
    """0 takes the likeliest token."""
    top_p: float = 0.95
    """Draw from the smallest set of tokens that holds this share of the probability."""
    top_k: int = 0
    """Draw from this many likeliest tokens; 0 means all."""
    min_p: float = 0.0
    """Leave out tokens below this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Divide positive logits of tokens that already occurred (Keskar et al. 2019, arXiv 1909.05858)."""
    max_new_tokens: int = 512
    seed: int | None = None


def check_sampling(sampling: Sampling) -> None:
    """Refuses values that no distribution can be made from.

    Raises:
        UsageError: a value is out of its range.
    """
    limits = (
        ("temperature", sampling.temperature >= 0, "0 or above"),
        ("top-p", 0 < sampling.top_p <= 1, "above 0 and up to 1"),
        ("top-k", sampling.top_k >= 0, "0 (all) or above"),
        ("min-p", 0 <= sampling.min_p < 1, "0 up to, but not 1"),
        ("repetition-penalty", sampling.repetition_penalty > 0, "above 0; 1 switches it off"),
        ("max-new-tokens", sampling.max_new_tokens >= 1, "1 or above"),
    )
    for name, allowed, wanted in limits:
        if not allowed:
            raise UsageError("is out of range", where=name, hint=f"Use {wanted}")


class _Request(msgspec.Struct, frozen=True, tag_field="type", kw_only=True):
    id: int


class Generate(_Request, frozen=True, tag="generate"):
    """Answer one prompt, streaming."""

    prompt_ids: list[int]
    """Token ids of the rendered conversation."""
    stop_ids: list[int]
    sampling: Sampling = Sampling()
    adapters: list[AdapterUse] = []
    """Active adapters; empty means the base alone."""


class GenerateBatch(_Request, frozen=True, tag="generate_batch"):
    """Answer many prompts greedily or by sampling, as a batch; replies with one `Answer` each."""

    prompts: list[list[int]]
    stop_ids: list[int]
    sampling: Sampling = Sampling(temperature=0.0)
    adapters: list[AdapterUse] = []
    batch_size: int = 16


class ScoreLoss(_Request, frozen=True, tag="score_loss"):
    """Mean loss over the masked tokens of samples."""

    samples: list[tuple[list[int], list[bool]]]
    """(token ids, trained mask) each."""
    adapters: list[AdapterUse] = []


class Activate(_Request, frozen=True, tag="activate"):
    """Read these adapters and make them active, as later requests with the same ones will find them."""

    adapters: list[AdapterUse] = []


class Cancel(_Request, frozen=True, tag="cancel"):
    """Stop the answer with this id."""


class Quit(_Request, frozen=True, tag="quit"):
    """End the process."""


Request = Generate | GenerateBatch | ScoreLoss | Activate | Cancel | Quit


class _Reply(msgspec.Struct, frozen=True, tag_field="type", kw_only=True):
    id: int


class Ready(_Reply, frozen=True, tag="ready"):
    """The base is loaded; id 0."""

    device: str
    precision: str
    live_bytes: int
    """Live tensor bytes of the base."""
    load_seconds: float
    warnings: tuple[str, ...] = ()
    """What a person should know of the loading, as clauses."""


class Loading(_Reply, frozen=True, tag="loading"):
    """Progress before `Ready`; id 0."""

    what: str
    fraction: float | None = None


class Token(_Reply, frozen=True, tag="token"):
    """The next tokens of an answer; the reader detokenizes."""

    ids: list[int]


class Answer(_Reply, frozen=True, tag="answer"):
    """An answer ended."""

    ids: list[int]
    """All its tokens, without the stop token."""
    stopped_by: str
    """`stop`, `length`, `context` or `cancelled`."""
    prompt_tokens: int
    prefill_seconds: float
    tokens_per_second: float
    """Speed after the prompt was read."""
    index: int = 0
    """Position in a batch."""


class LossScored(_Reply, frozen=True, tag="loss"):
    """The answer to `ScoreLoss`."""

    mean_loss: float
    trained_tokens: int
    losses: list[float]
    """Mean loss of each sample."""


class Done(_Reply, frozen=True, tag="done"):
    """Every answer of a batch was sent, or the adapters are active."""


class Trouble(_Reply, frozen=True, tag="trouble"):
    """The request could not be served; id 0 means that the process ends."""

    message: str
    exit_code: int


Reply = Ready | Loading | Token | Answer | LossScored | Done | Trouble
