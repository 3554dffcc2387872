"""An adapter that is resident in a model, whatever its method: its updates by site, and its tensors by name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from edgepeft.engine.model.frozen import FrozenWeight
from edgepeft.engine.model.load import LoadedModel
from edgepeft.errors import BadInput
from edgepeft.library.card import ChangedParameter
from edgepeft.library.peft_config import PEFT_PREFIX
from edgepeft.methods import MethodConfig

_PART_ENTRIES = 1 << 20
"""Of a tensor that are looked at together."""


class Update(Protocol):
    """What an adapter does at one site."""

    def named_tensors(self) -> Mapping[str, nn.Parameter]:
        """Its own trainable tensors, float32, by the end of their names in a file."""
        ...


@runtime_checkable
class HasPlaces(Protocol):
    """An update whose trained values stand in places that do not change in training."""

    def named_places(self) -> Mapping[str, Tensor]:
        """Its places, int32, by the end of their names."""
        ...


@runtime_checkable
class ChoosesFirst(Protocol):
    """An update that looks at gradients of samples before it trains, to choose what it trains."""

    chooses: bool
    """Whether it has not chosen yet."""

    def begin_looking(self) -> None:
        """From here on backward looks and forms no gradients of its own."""
        ...

    def choose(self) -> None:
        """Decides by what was seen, and trains from here on."""
        ...


@runtime_checkable
class Mergeable(Protocol):
    """An update that can become part of its module's parameters; a method that merges has no others."""

    @property
    def alters(self) -> Collection[str]:
        """The parameters that it changes, such as `weight`, as far as the module has them."""
        ...

    def merge_into(self, parameter: str, values: Tensor, rows: slice) -> None:
        """Makes of the base's values what they are with the update at its trained strength.

        Args:
            parameter: one of `alters`.
            values: these rows of the base's own, float32 [rows, ...]; changed in place.
            rows: which they are; a matrix is never split along its columns.
        """
        ...


class Parts(NamedTuple):
    """What a method makes for a model."""

    updates: Mapping[str, Update]
    """By the name of the site, in the model's order."""
    shared: Mapping[str, nn.Parameter] = {}
    """Trainable tensors that several updates use, by their whole names."""
    written: Callable[[], Mapping[str, Tensor]] | None = None
    """Makes what stands in the file by key, where that is not every trainable tensor by itself."""


class AttachedAdapter:
    """An adapter that is resident in a model."""

    def __init__(self, name: str, config: MethodConfig, parts: Parts) -> None:
        self.name = name
        self.config = config
        self.updates = dict(parts.updates)
        self.shared = dict(parts.shared)
        self._written = parts.written

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Site and tensor name, such as `model.layers.0.self_attn.q_proj.lora_A.weight`; float32."""
        own = {
            f"{site}.{tensor}": parameter
            for site, update in self.updates.items()
            for tensor, parameter in update.named_tensors().items()
        }
        return own | self.shared

    def named_places(self) -> dict[str, Tensor]:
        """The places of values, int32, named like parameters; most methods have none."""
        return {
            f"{site}.{name}": places
            for site, update in self.updates.items()
            if isinstance(update, HasPlaces)
            for name, places in update.named_places().items()
        }

    def state_dict(self) -> dict[str, Tensor]:
        """The values of `named_parameters` and `named_places`, sharing their memory."""
        trained = {name: parameter.detach() for name, parameter in self.named_parameters().items()}
        return trained | self.named_places()

    def file_tensors(self) -> dict[str, Tensor]:
        """What stands in adapter_model.safetensors, by key; on the CPU, float32 or whole numbers."""
        return {
            key: (value.float() if value.is_floating_point() else value).cpu().contiguous()
            for key, value in self._by_key().items()
        }

    def _by_key(self) -> Mapping[str, Tensor]:
        if self._written is not None:
            return self._written()
        return {PEFT_PREFIX + name: value for name, value in self.state_dict().items()}

    def load_state_dict(self, values: Mapping[str, Tensor], *, where: str = "") -> None:
        """Copies values of the same names and shapes into the parameters; those on `meta` become the values themselves.

        Raises:
            BadInput: a tensor is missing, unknown, of another shape, or not finite; nothing is changed then.
        """
        own = self.state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
        check_tensors(values, shapes, whole=self.named_places(), where=where)
        with torch.no_grad():
            for name, tensor in own.items():
                if not tensor.is_meta:
                    tensor.copy_(values[name])
            for name, parameter in self.named_parameters().items():
                if parameter.is_meta:
                    # See `trained_copy`. A parameter cannot be pointed at memory of another device.
                    torch.utils.swap_tensors(parameter, nn.Parameter(values[name].float()))

    def changed(self) -> list[ChangedParameter]:
        """Every parameter that this adapter adds or changes, by its key in adapter_model.safetensors."""
        return [ChangedParameter(name=key, shape=tuple(value.shape)) for key, value in self._by_key().items()]


def trained_copy(source: FrozenWeight | Tensor, loaded: LoadedModel) -> nn.Parameter:
    """What is trained in place of one of the base's parameters: float32, with its values.

    On a base that only reads adapters it is on `meta`, and the file's tensor takes its place unmoved: a model as large
    as the base stays in its file.
    """
    if loaded.only_reads:
        return nn.Parameter(torch.empty(source.shape, dtype=torch.float32, device="meta"))
    if isinstance(source, Tensor):
        return nn.Parameter(source.detach().to(loaded.device, torch.float32, copy=True))
    return nn.Parameter(source.materialize(torch.empty(source.shape, dtype=torch.float32, device=loaded.device)))


def check_tensors(
    values: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
    *,
    whole: Container[str] = (),
    where: str = "",
) -> None:
    """Checks that `values` has exactly the expected names and shapes, all entries finite; whole numbers where `whole`
    has the name.

    Raises:
        BadInput: naming the first tensor that is wrong.
    """
    hint = "It belongs to another base model or was damaged"
    for name, shape in expected.items():
        value = values.get(name)
        if value is None:
            raise BadInput(f"tensor {name} is missing", where=where, hint=hint)
        if tuple(value.shape) != shape:
            found = "×".join(map(str, value.shape))
            wanted = "×".join(map(str, shape))
            raise BadInput(f"tensor {name} is {found}, this model needs {wanted}", where=where, hint=hint)
        if name in whole:
            if value.is_floating_point() or value.dtype == torch.bool:
                raise BadInput(f"tensor {name} holds no whole numbers", where=where, hint=hint)
        elif not value.is_floating_point() or not _all_finite(value):
            raise BadInput(f"tensor {name} holds values that are not finite numbers", where=where, hint="Train it anew")
    for name in values:
        if name not in expected:
            raise BadInput(f"tensor {name} fits no layer of this model", where=where, hint=hint)


def _all_finite(value: Tensor) -> bool:
    """By parts: looking at a table at once would take as much memory as it has."""
    return all(bool(torch.isfinite(part).all()) for part in value.reshape(-1).split(_PART_ENTRIES))
