"""Prompt tuning: trained embeddings before every sample, as if they were those of tokens.

Lester, Al-Rfou and Constant 2021, *The Power of Scale for Parameter-Efficient Prompt Tuning* (arXiv 2104.08691). The
`tokens` rows go through the model like any others, at the first positions of each sample, so they cost memory and time
as tokens do and carry no loss. Where they start matters most: at the embeddings of a text that tells the task, at those
of random tokens of the vocabulary, or at random.

Used with a strength, they are multiplied by that; at 0 they are not there at all. Of several active adapters the rows
stand one after another, in the order in which they were named.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from edgepeft.errors import UsageError
from edgepeft.methods.prefix import check_tokens
from edgepeft.methods.terms import Method, Trained
from edgepeft.models.shape import ModelShape

Start = Literal["text", "vocabulary", "random"]


class PromptConfig(msgspec.Struct, frozen=True, tag="prompt", forbid_unknown_fields=True):
    """What decides a trained prompt."""

    tokens: int = 20
    """Rows before each sample; 10 to 100 are usual. They take as many places of the context."""
    start: Start = "vocabulary"
    """Where the rows start: `text` at the embeddings of `text`, `vocabulary` at those of random tokens, or `random`."""
    text: str = ""
    """Tells the task; its tokens are repeated, or cut, to as many as there are rows."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise UsageError(f"a prompt of {self.tokens} tokens is not possible", where="tokens", hint="Use 10 to 100")
        if self.text and self.start != "text":
            hint = "Use --set start=text as well, or leave the text out"
            raise UsageError(f"a prompt that starts at {self.start} has no text", where="text", hint=hint)
        if self.start == "text" and not self.text.strip():
            raise UsageError("there is no text to start at", where="text", hint="Tell the task in a sentence")


class Prompt(Method):
    """See the module."""

    paper = "arXiv 2104.08691"
    peft_type = "PROMPT_TUNING"
    adds = "trained embeddings before every sample"
    merges = False
    # Between 20 and 100 times LoRA's, which were about alike on the embedded model's alerts.
    rate = 30.0

    def trained(self, config: PromptConfig, shape: ModelShape) -> Trained:
        """One tensor.

        Raises:
            UsageError: the context has no place for the rows.
        """
        check_tokens(config.tokens, shape)
        return Trained((), (config.tokens * shape.hidden,))

    def leading_tokens(self, config: PromptConfig) -> int:
        """All of them."""
        return config.tokens

    def leading_rows(self, config: PromptConfig) -> int:
        """All of them."""
        return config.tokens

    def continued(self, config: PromptConfig) -> PromptConfig:
        """Where the rows started matters no more."""
        return PromptConfig(config.tokens)
