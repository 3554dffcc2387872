"""From a model's shape and a method to what goes onto the tape."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import msgspec

from edgepeft.memory.attention import AttentionPlan
from edgepeft.memory.chunks import CPU_CHUNK, LOSS_SCRATCH_BYTES, NF4_BLOCK, TABLE_ROWS
from edgepeft.memory.experts import ExpertsPlan
from edgepeft.memory.micro_batch import LossPlan, MicroBatchPlan
from edgepeft.memory.operations import FLOAT32, LinearPlan
from edgepeft.memory.prefix import PrefixPlan
from edgepeft.memory.programs import PROGRAMS, LayerPlan, llama
from edgepeft.memory.target import Target
from edgepeft.memory.weights import ELEMENT_BYTES
from edgepeft.methods import Branch, BranchTerms, LinearTerms, MethodConfig, PrefixTerms, TableTerms, Trained, method_of
from edgepeft.models.shape import LinearShape, ModelShape
from edgepeft.spec import ComputeDtype, Precision

INT64 = 8
_GAIN_IN_FLOAT32 = frozenset({"gemma", "gemma2", "gemma3_text", "olmo2", "olmo3"})
_HEAD_NORMS = frozenset({"qwen3", "qwen3_moe", "gemma3_text"})
_ROTATES_IN_FLOAT32 = frozenset({"olmo2", "olmo3"})
_OWN_ANGLES = frozenset({"gemma3_text", "olmo3"})
_SCALES_EMBEDDINGS = frozenset({"gemma", "gemma2", "gemma3_text", "granite"})


class Pass(msgspec.Struct, frozen=True):
    """How a micro-batch goes through a model."""

    precision: Precision
    """Of the linears."""
    compute_dtype: ComputeDtype
    target: Target
    lengths: tuple[int, ...]
    """Tokens of each sample, the longest first."""
    trained: int
    """Rows that meet the output head."""
    loss_chunk_tokens: int
    training: bool
    """Whether it is a train step; nothing else has dropout."""

    @property
    def tokens(self) -> int:
        """Of the micro-batch."""
        return sum(self.lengths)

    @property
    def compute_bytes(self) -> int:
        """Of an entry in the compute dtype."""
        return ELEMENT_BYTES[self.compute_dtype]


def is_exact(shape: ModelShape) -> bool:
    """Whether the layers of this architecture are followed operation by operation; others go as if they were Llama's
    and should be simulated."""
    return shape.model_type in PROGRAMS and not shape.experts


def plan_micro_batch(shape: ModelShape, given: Pass, method: MethodConfig | None) -> MicroBatchPlan:
    """What goes onto the tape for one micro-batch, with the updates of `method`, if any.

    Raises:
        UsageError: the method's targets or rank do not suit the model.
    """
    tokens, c, kind = given.tokens, given.compute_bytes, shape.model_type
    added = _Added() if method is None else _added(method, shape, given)
    prefix, branches, trained = added.prefix, added.branches, added.trained
    ahead = prefix.tokens if prefix is not None else 0
    key_bytes = c * shape.kv_heads * shape.head_dim
    before = PrefixPlan(prefix, len(given.lengths), key_bytes) if prefix is not None else None
    windows, kind_of_layer = _windows(shape, given.lengths[0] + ahead)
    forms_gain = kind in _GAIN_IN_FLOAT32
    known = {linear.name.rsplit(".", 1)[-1]: linear for linear in _known_linears(shape)}
    behind = branches.get("mlp")
    # See engine.model.fused and engine.model.sites.
    ends_with_mlp = PROGRAMS.get(kind) is llama and (behind is None or behind.reads == "input")
    linears = {
        name: LinearPlan(
            in_bytes=c * linear.in_features * tokens,
            out_bytes=c * linear.out_features * tokens,
            scratch_bytes=dequantizing_bytes(linear, given),
            update=added.of_linear(linear),
            ends_layer=name == "down_proj" and ends_with_mlp,
        )
        for name, linear in known.items()
    }

    def shared(*names: str) -> LinearTerms | None:
        return added.of_several([known[name] for name in names]) if all(name in known for name in names) else None

    def layer(window: int | None) -> LayerPlan:
        return LayerPlan(
            linears=linears,
            attention=_attention_plan(shape, given, window, ahead),
            hidden_bytes=c * shape.hidden * tokens,
            query_bytes=c * shape.heads * shape.head_dim * tokens,
            key_bytes=key_bytes * tokens,
            inner_bytes=linears["gate_proj"].out_bytes if "gate_proj" in linears else c * shape.intermediate * tokens,
            gain_bytes=FLOAT32 * shape.hidden if forms_gain else 0,
            head_gain_bytes=FLOAT32 * shape.head_dim if forms_gain else 0,
            query_gain_bytes=FLOAT32 * shape.heads * shape.head_dim if forms_gain else 0,
            key_gain_bytes=FLOAT32 * shape.kv_heads * shape.head_dim if forms_gain else 0,
            shared_attention=shared("q_proj", "k_proj", "v_proj"),
            shared_mlp=shared("gate_proj", "up_proj"),
            head_norms=kind in _HEAD_NORMS,
            rotary_share=shape.rotary_share,
            rotates_in_float32=kind in _ROTATES_IN_FLOAT32,
            scales_queries=kind == "ministral3",
            scales_branches=kind == "granite",
            experts=_experts_plan(shape, given) if shape.experts else None,
            after_attention=branches.get("attention"),
            after_mlp=branches.get("mlp"),
            trains_gains=added.trains_gains,
            prefix=before,
        )

    on_tape = shape.final_norm_parameters if added.trains_gains else 0
    on_tape += shape.embedding_parameters if added.trains_tables else 0
    tables = added.tables
    on_tape += (tables.embedding_rank + tables.head_rank) * (shape.vocab + shape.hidden)
    return MicroBatchPlan(
        tokens=tokens,
        compute_bytes=c,
        program=PROGRAMS.get(kind, llama),
        kinds=tuple(layer(window) for window in windows),
        kind_of_layer=kind_of_layer,
        gain_bytes=FLOAT32 * shape.hidden if forms_gain else 0,
        scales_embeddings=kind in _SCALES_EMBEDDINGS,
        angle_bytes=_angle_bytes(shape, c) * tokens,
        converts=given.target.kind == "cpu",
        loss=LossPlan(
            trained=given.trained,
            chunk_rows=given.loss_chunk_tokens,
            row_bytes=c * shape.hidden,
            vocab=shape.vocab,
            compute_bytes=c,
            scratch_bytes=LOSS_SCRATCH_BYTES[given.target.kind],
            softcap=shape.logit_softcap is not None,
            trains_head=added.trains_tables,
            adding_bytes=_adding_bytes(shape.vocab, shape.hidden, given) if added.trains_tables else 0,
            rank=tables.head_rank,
            adding_rank_bytes=(
                _adding_bytes(tables.head_rank, shape.hidden, given),
                _adding_bytes(shape.vocab, tables.head_rank, given),
            ),
            masked_tokens=tokens if tables.drops and given.training else 0,
        ),
        trained=trained,
        others_beside_tape=sum(trained.others) - on_tape,
        trains_tables=added.trains_tables,
        tied=shape.tied_embeddings,
        embedding_rank=tables.embedding_rank,
        leading_rows=added.leading_rows,
        samples=len(given.lengths),
    )


def _adding_bytes(rows: int, columns: int, given: Pass) -> int:
    """A block of a gradient that is formed with the loss in the compute dtype, and on the CPU its float32 copy while it
    is added."""
    c = given.compute_bytes
    if c == FLOAT32:
        return 0
    return min(rows, TABLE_ROWS) * columns * (c + (FLOAT32 if given.target.kind == "cpu" else 0))


class _Added(msgspec.Struct, frozen=True):
    """What a method adds to a micro-batch; by itself nothing."""

    of_linear: Callable[[LinearShape], LinearTerms | None] = lambda linear: None
    """The update of a linear, if it has one."""
    of_several: Callable[[Sequence[LinearShape]], LinearTerms | None] = lambda linears: None
    """The update that does the work of several linears with the same input, if there is one."""
    branches: Mapping[Branch, BranchTerms | None] = {}
    """What is put behind them."""
    trains_gains: bool = False
    """Whether those of norms are trained."""
    prefix: PrefixTerms | None = None
    """What stands before every sample in each layer."""
    trains_tables: bool = False
    """Whether the embedding and the output head are trained."""
    tables: TableTerms = TableTerms()
    """What is added to embedding and head."""
    leading_rows: int = 0
    """Trained rows before every sample, which are among the tokens."""
    trained: Trained = Trained()
    """All tensors that are."""


def _added(method: MethodConfig, shape: ModelShape, given: Pass) -> _Added:
    module, tokens, c = method_of(method), given.tokens, given.compute_bytes
    targeted = set(module.targeted(method, shape))
    if _known_linears(shape) != shape.linears:
        # Made up: which of them are targeted cannot be told.
        targeted |= set(_known_linears(shape))

    def of_linear(linear: LinearShape) -> LinearTerms | None:
        if linear not in targeted:
            return None
        return module.linear_terms(method, linear, tokens, c, training=given.training)

    def of_several(linears: Sequence[LinearShape]) -> LinearTerms | None:
        if not all(linear in targeted for linear in linears):
            return None
        return module.shared_terms(method, linears, tokens, c, training=given.training)

    names: tuple[Branch, ...] = ("attention", "mlp")
    return _Added(
        of_linear,
        of_several,
        {branch: module.branch_terms(method, shape, branch, tokens, c) for branch in names},
        module.trains_gains(method),
        module.prefix_terms(method, shape),
        module.trains_tables(method),
        module.table_terms(method),
        module.leading_rows(method),
        module.trained(method, shape),
    )


def dequantizing_bytes(linear: LinearShape, given: Pass) -> int:
    """What forming the dense matrix of a linear needs beside the buffer that all linears share."""
    entries, on_cpu = linear.in_features * linear.out_features, given.target.kind == "cpu"
    if given.precision == "nf4":
        chunk = min(entries, CPU_CHUNK) if on_cpu else 0
        return FLOAT32 * math.ceil(entries / NF4_BLOCK) + given.compute_bytes * chunk
    if given.precision != "int8":
        return 0
    scales = FLOAT32 * linear.out_features
    if not on_cpu:
        return scales
    rows = min(linear.out_features, max(1, CPU_CHUNK // linear.in_features))
    # The CPU's product works on float32 copies of the codes and, where that is not float32, of the result.
    copies = 1 if given.compute_dtype == "fp32" else 2
    return scales + copies * FLOAT32 * rows * linear.in_features


def _known_linears(shape: ModelShape) -> tuple[LinearShape, ...]:
    """The linears of a layer under the names that the programs use, made up where the model has others."""
    names = {linear.name.rsplit(".", 1)[-1] for linear in shape.linears}
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"} <= names or {"qkv_proj", "o_proj"} <= names
    mlp = {"gate_proj", "up_proj", "down_proj"} <= names or {"gate_up_proj", "down_proj"} <= names
    if attention and (mlp or shape.experts):
        return shape.linears
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return (
        LinearShape("q_proj", shape.hidden, query),
        LinearShape("k_proj", shape.hidden, key),
        LinearShape("v_proj", shape.hidden, key),
        LinearShape("o_proj", query, shape.hidden),
        LinearShape("gate_proj", shape.hidden, shape.intermediate),
        LinearShape("up_proj", shape.hidden, shape.intermediate),
        LinearShape("down_proj", shape.intermediate, shape.hidden),
    )


def _angle_bytes(shape: ModelShape, compute_bytes: int) -> int:
    """Sines and cosines of one token; layers with and without a window may have their own."""
    entry = FLOAT32 if shape.model_type in _ROTATES_IN_FLOAT32 else compute_bytes
    sets = 2 if shape.full_attention_layers and shape.model_type in _OWN_ANGLES else 1
    return 2 * sets * entry * round(shape.head_dim * shape.rotary_share)


def _windows(shape: ModelShape, longest: int) -> tuple[tuple[int | None, ...], tuple[int, ...]]:
    """The windows that matter for samples of this length, and for each layer which of them it has."""
    window = shape.sliding_window
    if window is None or longest <= window:
        return (None,), (0,) * shape.layers
    full = set(shape.full_attention_layers)
    if not full:
        return (window,), (0,) * shape.layers
    return (window, None), tuple(int(number in full) for number in range(shape.layers))


def _attention_plan(shape: ModelShape, given: Pass, window: int | None, ahead: int) -> AttentionPlan:
    softcap, target, c = shape.attention_softcap is not None, given.target, given.compute_bytes
    return AttentionPlan(
        kernel=target.attention(
            shape.head_dim, given.compute_dtype, softcap=softcap, windowed=window is not None, prefixed=ahead > 0
        ),
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        query_bytes=c * shape.heads * shape.head_dim,
        key_bytes=c * shape.kv_heads * shape.head_dim,
        compute_bytes=c,
        lengths=given.lengths,
        window=window,
        softcap=softcap,
        converts=target.kind == "cpu",
        heads_first=shape.model_type == "phi3",
        ahead=ahead,
    )


def _experts_plan(shape: ModelShape, given: Pass) -> ExpertsPlan:
    pairs, c = given.tokens * shape.experts_per_token, given.compute_bytes
    return ExpertsPlan(
        router_bytes=FLOAT32 * shape.experts * given.tokens,
        index_bytes=INT64 * pairs,
        pair_hidden_bytes=c * shape.hidden * pairs,
        pair_inner_bytes=c * shape.expert_intermediate * pairs,
    )
