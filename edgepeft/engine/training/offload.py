"""Layers' inputs in the host's RAM between forward and backward: what checkpointing keeps, moved off the card.

An input is copied to pinned memory on a stream of its own while its layer runs, and leaves the card behind it; in
backward it is brought back while the layer above it is computed. So two inputs at most lie on the card: that of the
layer at work, and that of the next one. Copies change no bit. Compare Rajbhandari et al. 2021, *ZeRO-Infinity* (arXiv
2104.07857, section 5.2.3).
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from edgepeft.engine.kernels import target_of
from edgepeft.engine.ledger import counting_as


class Carrier(Protocol):
    """Moves tensors between a device and the host; a ticket stands for a copy that was begun."""

    def send(self, x: Tensor) -> tuple[Tensor, Any]:
        """Begins to copy x to the host; x must stay until `wait` has been called."""
        ...

    def bring(self, host: Tensor) -> tuple[Tensor, Any]:
        """Begins to copy a tensor of the host back; `wait` before it is read."""
        ...

    def wait(self, ticket: Any) -> None:
        """Whatever is computed from here on comes after that copy."""
        ...


class CardCarrier:
    """Copies between a CUDA device and pinned memory, on a side stream.

    Memory on the card is always the computing stream's, so its allocator needs no events: each copy waits for what was
    queued before it, and the computing stream waits for each copy before its memory can be used again.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)

    def send(self, x: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """See `Carrier`."""
        host = torch.empty_like(x, device="cpu", pin_memory=True)
        return host, self._copy(host, x)

    def bring(self, host: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """See `Carrier`."""
        x = torch.empty_like(host, device=self._device)
        return x, self._copy(x, host)

    def wait(self, ticket: torch.cuda.Event) -> None:
        """See `Carrier`."""
        torch.cuda.current_stream(self._device).wait_event(ticket)

    def _copy(self, to: Tensor, source: Tensor) -> torch.cuda.Event:
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            to.copy_(source, non_blocking=True)
        copied: torch.cuda.Event = self._side.record_event()
        return copied


class SizesCarrier:
    """The same for tensors without values: what lies on the host has a size that counts nowhere."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def send(self, x: Tensor) -> tuple[Tensor, None]:
        """See `Carrier`."""
        return torch.empty_like(x, device="meta"), None

    def bring(self, host: Tensor) -> tuple[Tensor, None]:
        """See `Carrier`."""
        return torch.empty_like(host, device=self._device), None

    def wait(self, ticket: None) -> None:
        """Nothing is under way."""


def carrier_of(device: torch.device) -> Carrier | None:
    """What moves tensors of a device to the host; None for the CPU, whose tensors are there."""
    if target_of(device).kind == "cpu":
        return None
    return CardCarrier(device) if device.type == "cuda" else SizesCarrier(device)


class OffloadedInputs:
    """The inputs of one model's layers, from a forward to its backward."""

    def __init__(self) -> None:
        self._carriers: dict[torch.device, Carrier | None] = {}
        # The graph owns them: whatever becomes of it, nothing stays on the card.
        self._last: weakref.ref[_Kept] | None = None

    def leave(self) -> None:
        """Gives up the input of the layer that was called last; all that reads it must be under way."""
        last = self._last() if self._last is not None else None
        if last is not None:
            last.leave()

    def of_layer(self, number: int, x: Tensor) -> saved_tensors_hooks | None:
        """The hooks under which a checkpointed layer is to be called with x; None where x stays where it is.

        `leave` belongs behind the call.

        Args:
            number: of the layer, from 1; layers run in their order.
            x: its input.
        """
        if x.device not in self._carriers:
            self._carriers[x.device] = carrier_of(x.device)
        carrier = self._carriers[x.device]
        if carrier is None:
            return None
        # The hooks live as long as the graph does: they must not hold x.
        storage, shape = x.untyped_storage()._cdata, x.shape

        def pack(saved: Tensor) -> Tensor | _Kept:
            if saved.untyped_storage()._cdata != storage or saved.shape != shape:
                return saved
            below = self._last() if self._last is not None and number > 1 else None
            kept = _Kept(saved, carrier, below)
            self._last = weakref.ref(kept)
            return kept

        return saved_tensors_hooks(pack, _unpack)


def _unpack(packed: Tensor | _Kept) -> Tensor:
    return packed if isinstance(packed, Tensor) else packed.take()


class _Kept:
    """One layer's input."""

    def __init__(self, x: Tensor, carrier: Carrier, below: _Kept | None) -> None:
        self._carrier = carrier
        self._below = below
        self._host, self._ticket = carrier.send(x)
        self._here: Tensor | None = x

    def leave(self) -> None:
        """Gives up the tensor on the card."""
        self._carrier.wait(self._ticket)
        self._here = None

    def fetch(self) -> None:
        """Begins to bring it back, unless it is there."""
        if self._here is None:
            with counting_as("saved activations"):
                self._here, self._ticket = self._carrier.bring(self._host)

    def take(self) -> Tensor:
        """The input for its layer's second run; that of the layer below sets out."""
        self.fetch()
        self._carrier.wait(self._ticket)
        x, self._here = self._here, None
        if self._below is not None:
            self._below.fetch()
        assert x is not None
        return x
