"""Which layers of an adapter train in a step: progressive unfreezing (Howard & Ruder 2018, arXiv 1801.06146).

A tensor that does not train asks for no gradient. Autograd records nothing below the lowest layer that has one, so
backward ends there and nothing is kept for it.
"""

from __future__ import annotations

from torch import nn

from edgepeft.engine.methods import AttachedAdapter
from edgepeft.engine.model.load import LoadedModel
from edgepeft.spec import Unfreeze


class Unfreezing:
    """The trained tensors of an adapter by layer, and the schedule by which they begin to train.

    Args:
        loaded: the base; its layers are counted from the bottom.
        adapter: on it. Tensors that it has in no layer, or shares between layers, always train.
        schedule: of the recipe; None trains everything at once.
        steps: of the whole run.
    """

    def __init__(self, loaded: LoadedModel, adapter: AttachedAdapter, schedule: Unfreeze | None, steps: int) -> None:
        self._schedule = schedule
        self._steps = steps
        self._from_top = [layer for layer in reversed(_by_layer(loaded, adapter)) if layer]

    def begin_step(self, step: int) -> None:
        """Lets train what trains in step `step`, counted from 0, and nothing else."""
        count = len(self._from_top)
        self._train(count if self._schedule is None else self._schedule.layers_at(step, self._steps, count))

    def train_all(self) -> None:
        """Lets everything train, as at the end of the run."""
        self._train(len(self._from_top))

    def _train(self, count: int) -> None:
        for place, layer in enumerate(self._from_top):
            for parameter in layer:
                parameter.requires_grad_(place < count)


def _by_layer(loaded: LoadedModel, adapter: AttachedAdapter) -> list[list[nn.Parameter]]:
    """For each decoder layer, from the bottom, the tensors that the adapter has in it alone."""
    numbers = {id(layer): number for number, layer in enumerate(loaded.layers)}
    # A site's name is the path of a module, or begins with one.
    begins = {f"{path}.": numbers[id(module)] for path, module in loaded.model.named_modules() if id(module) in numbers}
    shared = {id(parameter) for parameter in adapter.shared.values()}
    found: list[list[nn.Parameter]] = [[] for _ in loaded.layers]
    for site, update in adapter.updates.items():
        number = next((number for begin, number in begins.items() if site.startswith(begin)), None)
        if number is not None:
            found[number] += [tensor for tensor in update.named_tensors().values() if id(tensor) not in shared]
    return found
