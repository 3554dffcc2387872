"""One micro-batch of a peer's recipe on tensors without values: recorded on few layers, played on all."""

import contextlib
import gc
import importlib
import itertools

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from accuracy.published_trace import Peaks, Recorder, Recording
from edgepeft.engine.ledger import LiveBytes
from edgepeft.memory.unseen import unseen

CPU = torch.device("cpu")
MODE = FakeTensorMode()
"""One for all, so that techniques can share compiled graphs."""
FEW_LAYERS = 3
"""Recorded of a model: the first, one that stands for all in between, and the last."""
STASHED = 5
"""Tensors that torchtune's offloading keeps until later ones come (max_fwd_stash_size)."""
LEAST_OFFLOADED_BYTES = 1024


def engine(technique):
    """What builds the model of a technique."""
    module = importlib.import_module(f"accuracy.published_{technique['engine']}")
    return module.Model


class Step:
    """A technique on a shape; it is recorded when it is played.

    Args:
        shape: of the whole model.
        technique: the fields of published_rows.toml.
        recorded: layers that are recorded; None chooses as few as tell what all do.
    """

    def __init__(self, shape, technique, recorded=None):
        self._shape, self._technique = shape, technique
        if recorded is None:
            # A stash fills over several layers before one is like the next.
            stashes = technique["engine"] == "torchtune" and technique["checkpoint"] == "offload"
            recorded = FEW_LAYERS + (STASHED if stashes else 0)
        with MODE:
            self._model = engine(technique)(shape, technique, recorded)
        self._others, self._layer, self._trained = _sizes(self._model, shape["layers"])
        self._blocks = {}

    def play(self, lengths, target):
        """What a run takes of torch's allocator: the model, micro-batches of these row lengths, and the optimizer's
        state after the first of them."""
        recording = self._recording(lengths)
        layers, longest = self._shape["layers"], max(lengths)
        layer = self._layer + self._model.in_each_layer(longest)
        peaks = Peaks()
        peaks.keep(row.size_bytes for row in unseen(target) if row.in_allocator)
        spare = peaks.keep(layer) if self._technique["template_layer"] else []
        peaks.keep(itertools.chain(self._others, *[layer] * layers))
        peaks.drop(spare)
        update = self._states()[::2] if self._technique["optimizer"] == "foreach" else []
        peaks.keep(self._trained if self._technique["accumulation"] > 1 else [])
        for at, length in enumerate(lengths):
            peaks.step(recording, layers, length, after=update)
            if at == 0:
                peaks.keep(self._states())
        return peaks.allocator

    def _recording(self, lengths):
        """Sizes are straight lines over the row length, so two lengths tell those of all."""
        wanted = sorted(set(lengths), reverse=True)
        for length in wanted[: 2 - min(len(self._blocks), 2)]:
            if length not in self._blocks:
                with MODE:
                    self._blocks[length] = self._record(length)
        (first, blocks), *others = self._blocks.items()
        return Recording(blocks, first, other=others[0][::-1] if others else None)

    def _states(self):
        """Two moments of every trained tensor."""
        entry_bytes = self._technique["adapter_bytes"]
        each = self._technique["state_bytes"] / 2 / entry_bytes
        return [round(size * each) for size in self._trained for _ in range(2)] if each else []

    def _record(self, length):
        model, technique = self._model, self._technique
        ids = torch.empty(technique["micro_batch"], length, dtype=torch.int64)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            # Gradients of earlier micro-batches are added to.
            parameter.grad = torch.empty_like(parameter) if technique["accumulation"] > 1 else None
        hooks = []
        if technique["optimizer"] == "in backward":
            hooks = [parameter.register_post_accumulate_grad_hook(_drop_gradient) for parameter in trained]
        if technique["compiled"]:
            # Graphs are made at the first call.
            _run(model, ids, technique, Recorder())
            for parameter in trained if technique["accumulation"] == 1 else ():
                parameter.grad = None
        known = [*model.parameters(), *model.buffers(), ids, *(p.grad for p in trained if p.grad is not None)]
        recorder = Recorder()
        gc.collect()
        gc.disable()
        try:
            with LiveBytes(CPU, known={"workspace": known}, others=False, trace=recorder):
                held = _run(model, ids, technique, recorder)
            recorder.stop()
            del held
        finally:
            gc.enable()
        for hook in hooks:
            hook.remove()
        return recorder.blocks


def _run(model, ids, technique, marks):
    """Forward and backward; returns what the recipe still holds afterwards."""
    marks.enter(("before",))
    offload = _Offload() if technique["checkpoint"] == "offload" else contextlib.nullcontext()
    loss, held = _forward(model, ids, technique, marks, offload)
    loss.backward()
    return held


def _forward(model, ids, technique, marks, offload):
    with getattr(model, "context", contextlib.nullcontext)():
        return _within(model, ids, technique, marks, offload)


def _within(model, ids, technique, marks, offload):
    with offload:
        hidden, beside = model.begin(ids)
        if getattr(model, "inputs_require_gradients", False):
            hidden.requires_grad_(True)
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: marks.enter(("after",)))
        for at, layer in enumerate(model.layers):
            marks.enter(("forward", at))
            if technique["checkpoint"] == "none":
                hidden = layer(hidden, *beside)
            else:
                hidden = _checkpointed(layer, hidden, beside, technique)
            hidden.register_hook(lambda grad, at=at: marks.enter(("backward", at)))
        marks.enter(("middle",))
    box = [hidden]
    del hidden
    return model.end(box.pop(), ids, marks, offload)


def _checkpointed(layer, hidden, beside, technique):
    own = getattr(layer, "checkpointed", None)
    if own is not None:
        return own(hidden, *beside)
    return checkpoint(
        layer, hidden, *beside, use_reentrant=technique["engine"] != "torchtune", preserve_rng_state=False
    )


def _drop_gradient(parameter):
    parameter.grad = None


def _sizes(model, layers):
    """Bytes of the tensors outside of the layers, of those in one layer, and of all trained ones of the whole model."""
    own = {id(tensor) for layer in model.layers for tensor in _tensors(layer)}
    first = [tensor for tensor in _tensors(model) if id(tensor) not in own]
    middle = list(_tensors(model.layers[1]))
    trained = [_bytes(t) for t in first if t.requires_grad] + [_bytes(t) for t in middle if t.requires_grad] * layers
    return [_bytes(t) for t in first], [_bytes(t) for t in middle], trained


def _tensors(module):
    yield from module.parameters()
    yield from module.buffers()


def _bytes(tensor):
    return tensor.untyped_storage().nbytes()


class _Offload(torch.autograd.graph.saved_tensors_hooks):
    """Saved tensors go to the host (here: a device that nobody counts) and come back one node long."""

    def __init__(self):
        self._stash = {}
        self._back = None
        self._count = 0
        super().__init__(self._pack, self._unpack)

    def _pack(self, tensor):
        size = tensor.numel() * tensor.element_size()
        if size < LEAST_OFFLOADED_BYTES or isinstance(tensor, torch.nn.Parameter):
            return tensor
        self._count += 1
        self._stash[self._count] = tensor
        self._stash.pop(self._count - STASHED, None)
        return self._count, tensor.shape, tensor.stride(), tensor.dtype

    def _unpack(self, packed):
        if isinstance(packed, torch.Tensor):
            return packed
        number, shape, stride, dtype = packed
        tensor = self._stash.pop(number, None)
        self._stash.clear()
        if tensor is None:
            tensor = torch.empty_strided(shape, stride, dtype=dtype)
        self._back = tensor
        return tensor
