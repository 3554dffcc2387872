"""What a compiled region holds: torch's own partition of forward and backward, and buffers as its code generator plans.

The rules, fixed beforehand: AOT autograd with the min-cut partitioner and inductor's decompositions decides what is
saved and what is computed again, where a dequantized matrix is always computed again. Element-wise operations, casts,
gathers and concatenations make no buffer of their own unless a matrix product, a custom operation or the caller reads
them; views never do; reductions always do. A buffer dies with its last reader, and an element-wise result takes over a
buffer of the same size that dies there.
"""

import math
import operator

import torch
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.utils.checkpoint import CheckpointPolicy

aten = torch.ops.aten
_VIEWS = {
    aten.view, aten._unsafe_view, aten.permute, aten.transpose, aten.t, aten.expand, aten.unsqueeze, aten.squeeze,
    aten.slice, aten.select, aten.alias, aten.detach, aten.reshape, aten.split, aten.as_strided, operator.getitem,
}  # fmt: skip
_REDUCTIONS = {aten.sum, aten.mean, aten.amax, aten.max, aten.var, aten.var_mean, aten.any}
_FUSED_GATHERS = {
    aten.index, aten.gather, aten.embedding, aten.cat, aten.full, aten.full_like, aten.arange, aten.clone,
    aten.constant_pad_nd, aten.scalar_tensor, aten.slice_scatter, aten.select_scatter, aten.scatter,
}  # fmt: skip


def compiled(function):
    """`function` of tensors as torch.compile would run it; graphs are made at the first call, for its shapes."""
    return aot_function(
        function,
        fw_compiler=_Planned,
        bw_compiler=_Planned,
        partition_fn=_partition,
        decompositions=select_decomp_table(),
    )


def _partition(joint, inputs, *, num_fwd_outputs, **options):
    for node in joint.graph.nodes:
        if node.target is torch.ops.published.dequantize.default:
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
            node.meta["ac_graph_id"] = 0
    return min_cut_rematerialization_partition(joint, inputs, num_fwd_outputs=num_fwd_outputs, **options)


class _Planned:
    """One graph; calling it makes and drops its buffers and computes nothing."""

    _boxed_call = True

    def __init__(self, module, inputs):
        self._nodes = list(module.graph.nodes)
        self._inputs = [node for node in self._nodes if node.op == "placeholder"]
        (self._outputs,) = next(node for node in self._nodes if node.op == "output").args
        self._root = {}
        """The node whose buffer a node reads: itself, or what it is a view of."""
        self._made = set()
        self._plan()

    def _plan(self):
        for node in self._nodes:
            if node.op == "call_function":
                self._root[node] = self._root[node.args[0]] if _packet(node) in _VIEWS else node
            else:
                self._root[node] = node
        for node in self._nodes:
            if node.op == "output":
                self._made.update(self._root[used] for used in node.all_input_nodes)
            elif node.op == "call_function" and self._root[node] is node and not _is_fused(node):
                self._made.add(node)
                if _packet(node) not in _REDUCTIONS:
                    self._made.update(self._root[used] for used in node.all_input_nodes)
        self._made.update(self._inputs)
        self._reads = reads = {}
        """The buffers that a value is computed from, through what is fused into it."""
        self._dies_at = {}
        """The last reader of a buffer."""
        for node in self._nodes:
            if node.op != "call_function" or self._root[node] is not node:
                continue
            found = {}
            for used in node.all_input_nodes:
                root = self._root[used]
                found.update({root: None} if root in self._made else reads[root])
            # In an order that is the same in every process: which buffer is taken over depends on it.
            reads[node] = found
            if node in self._made:
                for root in found:
                    self._dies_at[root] = node
        self._returned = {self._root[node] for node in self._outputs if isinstance(node, torch.fx.Node)}

    def __call__(self, arguments):
        held = dict(zip(self._inputs, arguments, strict=True))
        arguments.clear()
        for node in self._nodes:
            if node not in self._made or node in held:
                continue
            dying = [root for root in self._reads[node] if self._dies_at[root] is node and root not in self._returned]
            taken = self._take_over(node, dying, held)
            held[node] = _buffers(node) if taken is None else taken
            del taken
            for root in dying:
                held.pop(root, None)
            if node not in self._dies_at and node not in self._returned:
                del held[node]
        return [
            _seen(held[self._root[node]], node, self._root[node]) if isinstance(node, torch.fx.Node) else node
            for node in self._outputs
        ]

    def _take_over(self, node, dying, held):
        """The buffer of a value that dies here, if an element-wise result fits into it."""
        if not _is_fused(node):
            return None
        wanted = _bytes(node)
        for root in dying:
            if root.op != "placeholder" and root in held and _bytes(root) == wanted:
                return _like(held.pop(root), node.meta["val"])
        return None


def _packet(node):
    return node.target if node.target is operator.getitem else getattr(node.target, "overloadpacket", node.target)


def _is_fused(node):
    packet = _packet(node)
    if packet in _REDUCTIONS:
        return False
    if packet in _FUSED_GATHERS or packet is torch.ops.prims.convert_element_type or packet is torch.ops.prims.iota:
        return True
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def _bytes(node):
    value = node.meta["val"]
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else -1


def _buffers(node):
    value = node.meta["val"]
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    return [torch.empty_strided(each.shape, each.stride(), dtype=each.dtype) for each in value]


def _like(buffer, value):
    """The same storage as another tensor."""
    entries = math.prod(value.shape)
    flat = torch.as_strided(buffer, (buffer.numel(),), (1,)).view(value.dtype)
    return torch.as_strided(flat[:entries], value.shape, value.stride())


def _seen(buffer, node, root):
    """What the caller gets of a buffer: the buffer, or the view of it that the graph returns."""
    value = node.meta["val"]
    if node is root or not isinstance(buffer, torch.Tensor):
        return buffer
    return torch.as_strided(buffer, value.shape, value.stride(), value.storage_offset())
