"""Prefix tuning: trained keys and values that every token finds before its own sample, in the attention of each layer.

Li and Liang 2021, *Prefix-Tuning: Optimizing Continuous Prompts for Generation* (arXiv 2101.00190). In a layer there
are `tokens` keys and as many values for each key-value head. The prefix takes the positions 0 to tokens - 1, so real
tokens are numbered from `tokens` on; its keys are used as they are, and a sliding window moves past it as past any
token. It starts as the keys and values that the base makes of random tokens of its vocabulary, which the paper found
better than random numbers. Reparameterised, it comes from a small embedding through two linear maps with a tanh
between, which start at random, steadied the paper's training, and are left out of the file.

Used with a strength, its values are multiplied by that; at 0 the prefix is not there at all. Of several active
adapters the prefixes stand one after another, in the order in which they were named.
"""

from __future__ import annotations

from typing import Any

import msgspec

from edgepeft.errors import UsageError
from edgepeft.methods.terms import Method, PrefixTerms, Trained
from edgepeft.models.shape import ModelShape

KNOWN = frozenset(
    {
        *("llama", "mistral", "ministral", "ministral3", "mixtral", "smollm3", "granite", "phi3"),
        *("qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "olmo", "olmo2", "olmo3"),
        "stablelm",
    }
)
"""Model types whose attention keeps keys and values of one shape in every layer, and lets more stand before them."""


class PrefixConfig(msgspec.Struct, frozen=True, tag="prefix", forbid_unknown_fields=True):
    """What decides a prefix."""

    tokens: int = 20
    """Keys and values before each sample; 10 to 100 are usual. They take as many places of the context."""
    reparameterised: bool = False
    """Whether it is trained through a small network, which the file no longer has."""
    width: int = 512
    """Of that network."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise UsageError(f"a prefix of {self.tokens} tokens is not possible", where="tokens", hint="Use 10 to 100")
        if self.width < 1:
            raise UsageError(f"a width of {self.width} is not possible", where="width", hint="Use 512")


class Prefix(Method):
    """See the module."""

    paper = "arXiv 2101.00190"
    peft_type = "PREFIX_TUNING"
    adds = "trained keys and values before every sample"
    merges = False
    # Of 1, 5, 20 and 50 times LoRA's, the best on the embedded model's alerts, and still P-tuning v2's 1e-2 at width
    # 4,096 (arXiv 2110.07602).
    rate = 50.0

    def trained(self, config: PrefixConfig, shape: ModelShape) -> Trained:
        """Keys and values of a layer; or the maps that make them, of which each layer has its part of the last.

        Raises:
            UsageError: the attention of the model is not known here, or the context has no place for the prefix.
        """
        if shape.model_type not in KNOWN:
            raise UsageError(
                f"it is not known how the attention of {shape.model_type} models takes a prefix",
                where="--method",
                hint="Use lora, which changes linear layers",
            )
        check_tokens(config.tokens, shape)
        key = shape.kv_heads * shape.head_dim
        if not config.reparameterised:
            return Trained((config.tokens * key, config.tokens * key))
        width = config.width
        return Trained((2 * key * width, 2 * key), (config.tokens * key, width * key, width))

    def leading_tokens(self, config: PrefixConfig) -> int:
        """All of it."""
        return config.tokens

    def continued(self, config: PrefixConfig) -> PrefixConfig:
        """Without the network that made it."""
        return PrefixConfig(config.tokens)

    def prefix_terms(self, config: Any, shape: ModelShape) -> PrefixTerms:
        """Keys, values and what makes them are float32."""
        trained, key = self.trained(config, shape), shape.kv_heads * shape.head_dim
        return PrefixTerms(
            tokens=config.tokens,
            entries=config.tokens * key,
            parameters=sum(trained.of_layer),
            shared=sum(trained.others),
            width=config.width if config.reparameterised else 0,
        )


def check_tokens(tokens: int, shape: ModelShape) -> None:
    """Raises UsageError where a model's context has no place left behind so many tokens."""
    # A dry run may not know it.
    if shape.context_length and tokens >= shape.context_length - 1:
        raise UsageError(
            f"{tokens:,} tokens before each sample leave no place in a context of {shape.context_length:,}",
            where="tokens",
            hint="Use 10 to 100",
        )
