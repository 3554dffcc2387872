"""The adapters that a chat has read and keeps, within its memory budget."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from edgepeft.engine.methods import detach
from edgepeft.engine.methods.files import read_adapter
from edgepeft.engine.model.frozen import DTYPES
from edgepeft.engine.model.load import LoadedModel
from edgepeft.errors import BadInput, DoesNotFit
from edgepeft.library.peft_config import leading_tokens
from edgepeft.library.store import CONFIG_FILE, WEIGHTS_FILE, AdapterFolder, open_adapter
from edgepeft.memory.chat import AdapterBytes, adapter_bytes, formed_head_bytes
from edgepeft.models.headers import read_header
from edgepeft.units import format_bytes

_KEPT_ADAPTERS = 8


class _Resident(NamedTuple):
    state: str
    """What its files looked like when they were read."""
    name: str
    """Inside the model."""
    held_bytes: int


class Residents:
    """Adapters by folder, the latest used last.

    Args:
        loaded: the base that they are put on.
        free_bytes: what a budget leaves beside the base; None for no bound.
        token_bytes: keys and values of one token.
    """

    def __init__(self, loaded: LoadedModel, free_bytes: int | None, token_bytes: int) -> None:
        self._loaded = loaded
        self._free_bytes = free_bytes
        self._token_bytes = token_bytes
        self._known: OrderedDict[str, _Resident] = OrderedDict()
        self._count = 0
        self.formed_bytes = 0
        """Of the output head that lies between the base's and an adapter's."""

    @property
    def held_bytes(self) -> int:
        """Bytes of all that are kept, used or not, and of what was formed for those that are used."""
        return sum(resident.held_bytes for resident in self._known.values()) + self.formed_bytes

    def take(self, scales: Mapping[str, float], make_room: Callable[[], None]) -> dict[str, float]:
        """Reads the adapters of some folders as far as they are not there; name in the model → strength.

        A folder is read once, and again only when its files changed. Those that are not wanted go when there are many,
        or where room is needed.

        Args:
            scales: folder → strength.
            make_room: called before one is read, when it is known that all fit.

        Raises:
            BadInput: a folder is missing, or its tensors do not belong to this base.
            DoesNotFit: they do not fit into the budget; nothing has changed then.
        """
        states = {folder: _state_of(Path(folder)) for folder in scales}
        new = [folder for folder, state in states.items() if self._state(folder) != state]
        opened = {folder: open_adapter(Path(folder)) for folder in scales}
        sizes = {folder: self._size(opened[folder]) for folder in new}
        formed = sum(
            formed_head_bytes(opened[folder].config, scale, self._loaded.shape, self._loaded.compute_dtype)
            for folder, scale in scales.items()
        )
        for folder in self._to_give_up(scales, new, sizes, formed, opened):
            self._give_up(folder)
        if new:
            make_room()
        for folder in new:
            self._give_up(folder)
            self._known[folder] = self._read(folder, states[folder], sizes[folder].held)
        for folder in scales:
            self._known.move_to_end(folder)
        self.formed_bytes = formed
        while len(self._known) > max(_KEPT_ADAPTERS, len(scales)):
            self._give_up(next(iter(self._known)))
        return {self._known[folder].name: scale for folder, scale in scales.items()}

    def _state(self, folder: str) -> str | None:
        resident = self._known.get(folder)
        return None if resident is None else resident.state

    def _size(self, adapter: AdapterFolder) -> AdapterBytes:
        return adapter_bytes(read_header(adapter.weights), self._loaded.compute_dtype)

    def _to_give_up(
        self,
        scales: Mapping[str, float],
        new: list[str],
        sizes: Mapping[str, AdapterBytes],
        formed: int,
        opened: Mapping[str, AdapterFolder],
    ) -> list[str]:
        """What has to go for the wanted ones to fit, the longest unused first.

        Raises:
            DoesNotFit: they do not fit even alone.
        """
        if self._free_bytes is None:
            return []
        leading = sum(leading_tokens(opened[folder].config) for folder, scale in scales.items() if scale)
        stay = sum(resident.held_bytes for folder, resident in self._known.items() if folder in scales.keys() - new)
        # One after the other is read beside those that are there.
        need, before = 0, 0
        for folder in new:
            need = max(need, before + sizes[folder].reading)
            before += sizes[folder].held
        need = stay + max(need, before + formed + (leading + 1) * self._token_bytes)
        if need > self._free_bytes:
            called = ", ".join(adapter.path.name for adapter in opened.values())
            raise DoesNotFit(
                f"with {called} {format_bytes(need)} are needed beside the base, and the memory budget leaves "
                f"{format_bytes(self._free_bytes)}",
                hint="Use fewer or smaller adapters, a larger budget or --precision nf4",
            )
        others = [folder for folder in self._known if folder not in scales]
        doomed = []
        room = self._free_bytes - need - sum(self._known[folder].held_bytes for folder in others)
        while room < 0:
            doomed.append(others.pop(0))
            room += self._known[doomed[-1]].held_bytes
        return doomed

    def _give_up(self, folder: str) -> None:
        resident = self._known.pop(folder, None)
        if resident is not None:
            detach(self._loaded, resident.name)

    def _read(self, folder: str, state: str, held_bytes: int) -> _Resident:
        self._count += 1
        name = f"adapter-{self._count}"
        adapter = read_adapter(Path(folder), self._loaded, name)
        for parameter in adapter.named_parameters().values():
            parameter.requires_grad_(False)
            if parameter.dim() > 1 and min(parameter.shape) > 1:
                # Products would cast a matrix at every token; nothing is trained here.
                parameter.data = parameter.data.to(DTYPES[self._loaded.compute_dtype])
        return _Resident(state, name, held_bytes)


def _state_of(folder: Path) -> str:
    try:
        states = [(folder / name).stat() for name in (CONFIG_FILE, WEIGHTS_FILE)]
    except OSError as error:
        raise BadInput(
            f"is not a readable adapter folder: {error.strerror}",
            where=str(folder),
            hint="See: edgepeft adapters list",
        ) from error
    return " ".join(f"{state.st_mtime_ns}-{state.st_size}-{state.st_ino}" for state in states)
