"""The tensors of each PEFT method; each file has a light twin of the same name in edgepeft.methods.

An adapter is attached to a loaded model by name, stays resident, and acts when it is in the active list. Swapping
adapters is changing that list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from edgepeft.engine.methods.lora import LoraUpdate
from edgepeft.engine.model.linear import AdaptedLinear
from edgepeft.engine.model.load import LoadedModel
from edgepeft.errors import BadInput, UsageError
from edgepeft.library.card import ChangedParameter
from edgepeft.methods import MethodConfig

ENGINE_METHODS: dict[str, type[LoraUpdate]] = {"lora": LoraUpdate}
"""Every method's tensors by its id; the ids are those of edgepeft.methods.METHODS."""

PEFT_PREFIX = "base_model.model."
"""What PEFT puts before every module path in its files."""


class AttachedAdapter:
    """An adapter that is resident in a model: its tensors, by module."""

    def __init__(self, name: str, config: MethodConfig, updates: Mapping[str, LoraUpdate]) -> None:
        self.name = name
        self.config = config
        self.updates = dict(updates)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Module path and tensor name, such as `model.layers.0.self_attn.q_proj.lora_A.weight`; float32."""
        return {
            f"{module}.{tensor}": parameter
            for module, update in self.updates.items()
            for tensor, parameter in update.named_tensors().items()
        }

    def state_dict(self) -> dict[str, Tensor]:
        """The values of `named_parameters`, sharing their memory."""
        return {name: parameter.detach() for name, parameter in self.named_parameters().items()}

    def load_state_dict(self, values: Mapping[str, Tensor]) -> None:
        """Copies values of the same names and shapes into the parameters.

        Raises:
            BadInput: a tensor is missing, unknown, of another shape, or not finite; nothing is changed then.
        """
        own = self.named_parameters()
        check_tensors(values, {name: tuple(parameter.shape) for name, parameter in own.items()})
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(values[name])

    def changed(self) -> list[ChangedParameter]:
        """Every parameter that this adapter adds, by its key in adapter_model.safetensors."""
        return [
            ChangedParameter(name=PEFT_PREFIX + name, shape=tuple(parameter.shape))
            for name, parameter in self.named_parameters().items()
        ]


def attach(loaded: LoadedModel, name: str, config: MethodConfig, seed: int) -> AttachedAdapter:
    """Makes a fresh adapter on `loaded`; it acts once `set_active` names it.

    Raises:
        UsageError: an adapter of this name is there already, a target matches no linear layer, or the rank exceeds a
            targeted dimension.
    """
    linears = loaded.linears()
    kind = ENGINE_METHODS[str(config.__struct_config__.tag)]
    updates: dict[str, LoraUpdate] = {}
    adaptable = {path: linear for path, linear in linears.items() if min(linear.weight_source.shape) > 1}
    for path in resolve_targets(config.targets, adaptable):
        shape = linears[path].weight_source.shape
        if config.rank > min(shape):
            raise UsageError(
                f"rank {config.rank} exceeds the smaller dimension {min(shape)} of {path}",
                where="rank",
                hint=f"Use at most {min(shape)}",
            )
        updates[path] = kind.initialised(config, shape, path, seed, loaded.device)
    return place(loaded, AttachedAdapter(name, config, updates))


def place(loaded: LoadedModel, adapter: AttachedAdapter) -> AttachedAdapter:
    """Puts an adapter's updates onto the linears that it names.

    Raises:
        UsageError: an adapter of this name is resident already.
    """
    linears = loaded.linears()
    if any(adapter.name in linear.adapters for linear in linears.values()):
        raise UsageError(f"an adapter named {adapter.name!r} is attached already", hint="Detach it first")
    for path, update in adapter.updates.items():
        linears[path].adapters[adapter.name] = update
    return adapter


def set_active(loaded: LoadedModel, active: Sequence[tuple[str, float]]) -> None:
    """Lets exactly these adapters act, each with its strength; 1 is as trained, an empty list is the base alone.

    Raises:
        UsageError: a name is not resident, or stands in the list twice.
    """
    linears = loaded.linears()
    resident = {name for linear in linears.values() for name in linear.adapters}
    names = [name for name, _ in active]
    for name in names:
        if name not in resident:
            known = ", ".join(sorted(resident)) or "none"
            raise UsageError(f"no adapter named {name!r} is attached", hint=f"Attached: {known}")
        if names.count(name) > 1:
            raise UsageError(f"adapter {name!r} is named twice", hint="Add up its strengths")
    for linear in linears.values():
        # A strength of 0 is left out: the base's own values come back to the bit.
        linear.active = [(name, scale) for name, scale in active if name in linear.adapters and scale != 0]


def detach(loaded: LoadedModel, name: str) -> None:
    """Removes an adapter; the others stay as they are.

    Raises:
        UsageError: no adapter of this name is resident.
    """
    found = False
    for linear in loaded.linears().values():
        found |= linear.adapters.pop(name, None) is not None
        linear.active = [use for use in linear.active if use[0] != name]
    if not found:
        raise UsageError(f"no adapter named {name!r} is attached")


def resolve_targets(targets: Sequence[str], linears: Mapping[str, AdaptedLinear]) -> list[str]:
    """The module paths that targets stand for, in the model's order.

    `all-linear` stands for every linear of every decoder layer; anything else is a module path or its ending.

    Raises:
        UsageError: a target matches nothing.
    """
    chosen: set[str] = set()
    for target in targets:
        matches = {path for path in linears if target == "all-linear" or path == target or path.endswith(f".{target}")}
        if not matches:
            known = ", ".join(sorted({path.rsplit(".", 1)[-1] for path in linears}))
            raise UsageError(
                f"target {target!r} matches no linear layer of this model", where="targets", hint=f"It has: {known}"
            )
        chosen |= matches
    return [path for path in linears if path in chosen]


def check_tensors(values: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], *, where: str = "") -> None:
    """Checks that `values` has exactly the expected names and shapes, all entries finite.

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
        if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
            raise BadInput(f"tensor {name} holds values that are not finite numbers", where=where, hint="Train it anew")
    for name in values:
        if name not in expected:
            raise BadInput(f"tensor {name} fits no layer of this model", where=where, hint=hint)


__all__ = [
    "ENGINE_METHODS",
    "PEFT_PREFIX",
    "AttachedAdapter",
    "attach",
    "check_tensors",
    "detach",
    "place",
    "resolve_targets",
    "set_active",
]
