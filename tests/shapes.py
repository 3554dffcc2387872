"""Shapes of well-known models and a short way to a run, for tests of memory and plans; no weights are needed."""

from __future__ import annotations

from typing import Any

from edgepeft.methods import LoraConfig
from edgepeft.models.shape import LinearShape, ModelShape
from edgepeft.spec import BaseRef, DataRef, Layout, Recipe, RunSpec


def llama_shape(
    *,
    layers: int = 4,
    hidden: int = 256,
    intermediate: int = 704,
    heads: int = 8,
    kv_heads: int = 4,
    head_dim: int = 32,
    vocab: int = 4096,
    context: int = 8192,
    tied: bool = True,
) -> ModelShape:
    """A model of the Llama family."""
    query, key = heads * head_dim, kv_heads * head_dim
    linears = (
        ("self_attn.q_proj", hidden, query),
        ("self_attn.k_proj", hidden, key),
        ("self_attn.v_proj", hidden, key),
        ("self_attn.o_proj", query, hidden),
        ("mlp.gate_proj", hidden, intermediate),
        ("mlp.up_proj", hidden, intermediate),
        ("mlp.down_proj", intermediate, hidden),
    )
    return ModelShape(
        architecture="LlamaForCausalLM",
        model_type="llama",
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=vocab,
        context_length=context,
        tied_embeddings=tied,
        linears=tuple(LinearShape(*linear) for linear in linears),
        norm_parameters=2 * hidden,
        final_norm_parameters=hidden,
    )


SMOLLM2 = llama_shape(
    layers=30, hidden=576, intermediate=1536, heads=9, kv_heads=3, head_dim=64, vocab=49152, context=8192
)
LLAMA_8B = llama_shape(
    layers=32,
    hidden=4096,
    intermediate=14336,
    heads=32,
    kv_heads=8,
    head_dim=128,
    vocab=128256,
    context=8192,
    tied=False,
)


def run_spec(
    *,
    rank: int = 16,
    precision: Any = "nf4",
    compute_dtype: Any = "bf16",
    micro_batch_tokens: int = 1024,
    checkpointing: Any = "layer",
    loss_chunk_tokens: int = 256,
) -> RunSpec:
    """A run of which only the values that memory depends on matter."""
    recipe = Recipe(
        base=BaseRef("model", "sha256:0", "LlamaForCausalLM"),
        data=DataRef("", "", ""),
        method=LoraConfig(rank=rank),
        precision=precision,
        compute_dtype=compute_dtype,
        max_seq_len=1024,
        samples_per_step=16,
    )
    return RunSpec(recipe, Layout(micro_batch_tokens, checkpointing, loss_chunk_tokens))
