"""The shape of a decoder-only language model, read from its config; no weights and no torch are needed."""

from __future__ import annotations

import msgspec


class LinearShape(msgspec.Struct, frozen=True):
    """One linear layer that every decoder layer has."""

    name: str
    """Module path relative to the decoder layer, such as `self_attn.q_proj`."""
    in_features: int
    """Columns of the weight."""
    out_features: int
    """Rows of the weight."""
    bias: bool = False
    """Whether a bias of `out_features` entries is added."""

    @property
    def parameters(self) -> int:
        """Weight and bias entries."""
        return self.in_features * self.out_features + (self.out_features if self.bias else 0)


class ModelShape(msgspec.Struct, frozen=True):
    """What decides a model's memory: its dimensions and its linear layers."""

    architecture: str
    """Class name in transformers, such as `LlamaForCausalLM`."""
    model_type: str
    """The config's `model_type`, such as `llama`."""
    layers: int
    """Decoder layers."""
    hidden: int
    """Width of the residual stream."""
    intermediate: int
    """Width inside the MLP."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Key and value heads; fewer than `heads` in grouped-query attention."""
    head_dim: int
    """Entries of one head."""
    vocab: int
    """Rows of the embedding."""
    context_length: int
    """Longest sequence in tokens that the model was made for."""
    tied_embeddings: bool
    """Whether the output head is the embedding itself."""
    linears: tuple[LinearShape, ...]
    """The linear layers of one decoder layer, in forward order; experts are not among them."""
    norm_parameters: int
    """Norm gains (and biases) of one decoder layer."""
    final_norm_parameters: int
    """Norm gains after the last layer."""
    expert_parameters: int = 0
    """Entries of the fused experts and their router in one decoder layer; transformers leaves these in 16 bit."""
    experts: int = 0
    """Experts of one decoder layer; 0 where there are none."""
    experts_per_token: int = 0
    """Experts that each token goes through."""
    expert_intermediate: int = 0
    """Width inside an expert."""
    attention_softcap: float | None = None
    """Attention scores are capped softly at this value (Gemma 2)."""
    logit_softcap: float | None = None
    """Logits are capped softly at this value (Gemma 2)."""
    sliding_window: int | None = None
    """Attention window in tokens of the layers that have one."""
    full_attention_layers: tuple[int, ...] = ()
    """Layers, counted from 0, that see everything although the model has a window."""
    rotary_share: float = 1.0
    """Share of a head's entries that are rotated by position."""

    @property
    def adaptable(self) -> tuple[LinearShape, ...]:
        """The linears that an adapter may be put on; a single row, such as Qwen2-MoE's `shared_expert_gate`, is a
        switch between experts and stays as it is."""
        return tuple(linear for linear in self.linears if min(linear.in_features, linear.out_features) > 1)

    @property
    def linear_parameters_per_layer(self) -> int:
        """Weights of one layer's linear modules, without biases: what quantization packs."""
        return sum(linear.in_features * linear.out_features for linear in self.linears)

    @property
    def embedding_parameters(self) -> int:
        """Embedding and output head together; a tied head counts once."""
        return self.vocab * self.hidden * (1 if self.tied_embeddings else 2)

    @property
    def parameters(self) -> int:
        """All entries of the model."""
        layer = sum(linear.parameters for linear in self.linears) + self.norm_parameters + self.expert_parameters
        return self.layers * layer + self.embedding_parameters + self.final_norm_parameters
