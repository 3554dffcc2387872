"""Run checkpoints: what a run needs to go on bit for bit, written so that the last good one is never lost.

`checkpoints/step-N/` holds adapter.safetensors, optimizer.safetensors and state.json with the SHA-256 of both. A folder
is made under a temporary name, fsynced and renamed, so one that is there is complete unless the disk damaged it.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from edgepeft.engine.saving import save_tensors
from edgepeft.engine.training.measured import MeasuredPeak
from edgepeft.errors import BadInput, DiskProblem
from edgepeft.hardware.energy import EnergyUse
from edgepeft.paths import disk_errors, make_folder, sync_folder
from edgepeft.spec import Layout, Recipe
from edgepeft.units import MIB, format_bytes

_SPARE_BYTES = 16 * MIB
_ADAPTER, _OPTIMIZER, _STATE = "adapter.safetensors", "optimizer.safetensors", "state.json"
_FOLDER = re.compile(r"step-(\d+)")
_DAMAGE = (OSError, ValueError, KeyError, msgspec.MsgspecError, SafetensorError)


class RunPosition(msgspec.Struct, frozen=True):
    """Where a run is, beside its tensors."""

    step: int
    """Optimizer steps done; the learning rate and the samples of the next one follow from it."""
    layout: Layout
    """In force now; an out-of-memory may have changed it."""
    train_seconds: float = 0.0
    """Spent in training steps so far, all processes of the run together."""
    train_tokens: int = 0
    """Tokens that went through the model in these steps."""
    recent_losses: tuple[float, ...] = ()
    """Of the last steps, oldest first."""
    lowest_recent_loss: float | None = None
    """Lowest mean of those that there was."""
    sound_step: int = -1
    """Step of the last checkpoint after which the run was still about as good as ever."""
    unproven_step: int = -1
    """Step of a later checkpoint of which that is not known yet."""
    best_eval_loss: float | None = None
    """Of the evaluations during training; the base's is none of them."""
    best_eval_step: int = -1
    """Step after which that was measured."""
    evaluations_without_gain: int = 0
    """Evaluations since then."""
    base_eval_loss: float | None = None
    """Of the base alone, before the first step."""
    last_eval_loss: float | None = None
    last_eval_step: int = -1
    """Step after which that was measured."""
    measured: MeasuredPeak = MeasuredPeak()
    """Highest memory so far, over all processes of the run."""
    not_finite_in_a_row: int = 0
    """Steps skipped one after the other up to here."""
    data_key: str = ""
    """Of the tokens that were trained on; see `PreparedData.key`."""
    energy: EnergyUse = EnergyUse()
    """Used so far, over all processes of the run."""


class _State(msgspec.Struct, frozen=True):
    position: RunPosition
    recipe: Recipe
    recipe_digest: str
    sha256: dict[str, str]
    """File name → digest."""
    random_states: dict[str, str]
    """Device → base64 of torch's generator state."""
    scaler: dict[str, Any] = {}
    """The fp16 gradient scaler's state."""
    schema: int = 1


class Checkpoint(msgspec.Struct, frozen=True):
    """A checkpoint read back and verified."""

    folder: Path
    position: RunPosition
    adapter: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    random_states: dict[str, str]
    scaler: dict[str, Any]

    def restore_random_states(self) -> None:
        """Puts torch's generators back to where they were."""
        for device, encoded in self.random_states.items():
            state = torch.frombuffer(bytearray(base64.b64decode(encoded)), dtype=torch.uint8)
            if device == "cpu":
                torch.set_rng_state(state)
            elif torch.cuda.is_available():
                torch.cuda.set_rng_state(state)


def write_checkpoint(
    root: Path,
    position: RunPosition,
    recipe: Recipe,
    adapter: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    *,
    scaler: Mapping[str, Any] | None = None,
    keep: int,
    protected: Collection[int] = (),
) -> Path:
    """Writes `root/step-N` and removes all but the `keep` newest checkpoints and those of the `protected` steps.

    Raises:
        DiskProblem: there is too little space, or the folder may not be written; what was there before is kept.
    """
    target = root / f"step-{position.step}"
    draft = root / f".step-{position.step}.draft"
    needed = sum(tensor.nbytes for tensor in (*adapter.values(), *optimizer.values()))
    make_folder(root)
    with disk_errors(root):
        for leftover in root.glob(".step-*"):
            # The run's lock is held, so nobody else is writing here: these are remains of a crash.
            shutil.rmtree(leftover, ignore_errors=True)
        free = shutil.disk_usage(root).free
        if free < needed + _SPARE_BYTES:
            raise DiskProblem(
                f"a checkpoint needs {format_bytes(needed)} and {format_bytes(free)} are free",
                where=str(root),
                hint="Free some space and resume the run; earlier checkpoints are kept",
            )
        try:
            draft.mkdir()
            digests = {}
            for name, tensors in ((_ADAPTER, adapter), (_OPTIMIZER, optimizer)):
                _save(draft / name, tensors)
                digests[name] = _sha256(draft / name)
            state = _State(
                position=position,
                recipe=recipe,
                recipe_digest=recipe.digest(),
                sha256=digests,
                random_states=_random_states(),
                scaler=dict(scaler or {}),
            )
            (draft / _STATE).write_bytes(msgspec.json.format(msgspec.json.encode(state)))
            for name in (_ADAPTER, _OPTIMIZER, _STATE):
                with (draft / name).open("rb+") as written:
                    os.fsync(written.fileno())
            sync_folder(draft)
            if target.exists():
                target.rename(root / f".step-{position.step}.old")
            draft.rename(target)
            sync_folder(root)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        shutil.rmtree(root / f".step-{position.step}.old", ignore_errors=True)
    # Higher steps are of an earlier process whose checkpoints were found damaged: they are not newer, but void.
    for step, folder in list(_folders(root)):
        if step > position.step:
            shutil.rmtree(folder, ignore_errors=True)
    for step, folder in list(_folders(root))[max(1, keep) :]:
        if step not in protected:
            shutil.rmtree(folder, ignore_errors=True)
    return target


def read_newest_checkpoint(root: Path, recipe: Recipe, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole; damaged ones are told to `warn` and passed over. None when there is none.

    Raises:
        BadInput: it was made under another recipe; the fields that differ are named.
    """
    for step, folder in _folders(root):
        try:
            state, (adapter, optimizer) = _verified(folder, (_ADAPTER, _OPTIMIZER))
        except _DAMAGE as error:
            warn(f"checkpoint step-{step} is damaged and is passed over: {error}")
            continue
        if state.recipe_digest != recipe.digest():
            changed = ", ".join(_differences(msgspec.to_builtins(state.recipe), msgspec.to_builtins(recipe)))
            raise BadInput(
                f"the checkpoint of step {step} was made under another recipe (differs in {changed or 'its version'})",
                where=str(folder),
                hint="Start a new run for the changed recipe",
            )
        return Checkpoint(folder, state.position, adapter, optimizer, state.random_states, state.scaler)
    return None


def read_adapter_of(root: Path, step: int) -> dict[str, Tensor] | None:
    """The adapter's parameters in the checkpoint of one step; None where it is gone or damaged."""
    try:
        return _verified(root / f"step-{step}", (_ADAPTER,))[1][0]
    except _DAMAGE:
        return None


def _verified(folder: Path, names: Sequence[str]) -> tuple[_State, list[dict[str, Tensor]]]:
    """The state and the tensors of some files of a checkpoint, the files compared with their checksums.

    Raises:
        _DAMAGE: something is not as it was written.
    """
    state = msgspec.json.decode((folder / _STATE).read_bytes(), type=_State)
    for name in names:
        if _sha256(folder / name) != state.sha256[name]:
            raise ValueError(f"{name} does not have the checksum that was written down")
    return state, [load_file(folder / name) for name in names]


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """AdamW's states as `PARAMETER/STATE` → tensor; empty before there are any. Plain counts become int64 tensors."""
    return {
        f"{name}/{key}": value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.int64)
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Puts back what `optimizer_tensors` gave."""
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition("/")
        parameter = parameters[owner]
        if tensor.dtype == torch.int64 and tensor.dim() == 0:
            optimizer.state[parameter][key] = int(tensor)
            continue
        # A copy: tensors read from a file are maps of it, and the file is removed while the run goes on.
        optimizer.state[parameter][key] = tensor.to(parameter.device, copy=True)


def _folders(root: Path) -> Iterator[tuple[int, Path]]:
    """Checkpoint folders by step, the highest first."""
    found = []
    for folder in root.iterdir() if root.is_dir() else ():
        match = _FOLDER.fullmatch(folder.name)
        if match and folder.is_dir():
            found.append((int(match.group(1)), folder))
    yield from sorted(found, reverse=True)


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_tensors(path, held, hint="Check the disk; earlier checkpoints are kept")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _random_states() -> dict[str, str]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return {device: base64.b64encode(state.numpy().tobytes()).decode() for device, state in states.items()}


def _differences(one: Any, other: Any, path: str = "") -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other}):
            yield from _differences(one.get(key), other.get(key), f"{path}.{key}" if path else str(key))
    elif one != other:
        yield path
