"""Parameters that the traced forward never read: an expert that no token visited, a spare head.

The next input may read them.  Where they stand in a list beside modules of the same class that
ran, those show what they are tied to; elsewhere whatever may be tied to them stays whole.  A model
that is entered by a method of its instead of its forward is used by that method: what only the
forward reads holds nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from prunus.graph.axis import Label
from prunus.graph.groups import Pin
from prunus.graph.program import refs_in
from prunus.tracer.capture import Recorder

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def tie_unread(
    recorder: Recorder,
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    forward_ran: bool = True,
) -> list[str]:
    """Tie what was not read as its siblings are, or pin; returns the names of such parameters.

    Buffers of the same modules are tied along.

    Parameters
    ----------
    state
        The tensors that the recorder knows, by name.
    forward_ran
        Whether the model's own forward was run, and not only a method in its place.
    """
    numbers = {ref.value for node in recorder.nodes for ref in refs_in(node.args)}
    read = {recorder.state[number] for number in recorder.state.keys() & numbers}
    unread = [name for name in state if name not in read and state[name].dim()]
    parameters = [name for name in unread if isinstance(state[name], nn.Parameter)]
    if parameters:
        _Ties(recorder, model, state, read).tie(unread, parameters, forward_ran=forward_ran)
    return parameters


class _Ties:
    """What the tensors that were read show of those that were not."""

    def __init__(
        self, recorder: Recorder, model: nn.Module, state: Mapping[str, Tensor], read: set[str]
    ) -> None:
        self._recorder, self._state, self._read = recorder, state, read
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._ran = {name.rpartition(".")[0] for name in read}

    def tie(self, unread: list[str], parameters: list[str], *, forward_ran: bool) -> None:
        """Tie or pin what was not read."""
        for name in unread:
            if not self.follow(name) and name in parameters:
                self.pin(name, forward_ran=forward_ran)

    def follow(self, name: str) -> bool:
        """Tie a tensor like its siblings'; False if it has none that was read."""
        for prefix, siblings in self._siblings(name):
            algebra = self._recorder.algebra
            own = self._labels(name)
            why = Pin("not read by this run, tied as its siblings are", "", prefix, "")
            for dim, label in enumerate(own):
                theirs = [algebra.canonical(self._labels(one)[dim]) for one in siblings]
                if self._are_shared(siblings, theirs):
                    algebra.unify(label, theirs[0], why)
                else:
                    algebra.pin(label, why)
            return True
        return False

    def pin(self, name: str, *, forward_ran: bool) -> None:
        """Keep whole what a tensor without siblings may be tied to: of its sizes, beside it."""
        path = name.rpartition(".")[0]
        while path and not self._ran_inside(path):
            path = path.rpartition(".")[0]
        if not path and not forward_ran:
            return
        why = Pin(f"{name}, which this run did not read, may be tied to it", "", path, "")
        sizes = {*self._state[name].shape} - {0, 1}
        for one in self._read:
            for label in self._labels(one) if self._is_beside(one, path) else ():
                if label is not None and len(label) in sizes:
                    self._recorder.algebra.pin(label, why)

    def _ran_inside(self, path: str) -> bool:
        return any(f"{one}.".startswith(f"{path}.") for one in self._ran)

    def _is_beside(self, name: str, path: str) -> bool:
        """Whether a tensor is the module's own, or that of a layer which is its child."""
        owner = name.rpartition(".")[0]
        return owner == path or (owner.rpartition(".")[0] == path and owner != path)

    def _labels(self, name: str) -> tuple[Label | None, ...]:
        number = self._recorder.value_of(self._state[name])
        return self._recorder.labels[number]

    def _siblings(self, name: str) -> Iterator[tuple[str, list[str]]]:
        """Tensors at the same place of modules of one class in one list, innermost list first."""
        parts = name.split(".")
        for at in range(len(parts) - 2, -1, -1):
            path, key, rest = ".".join(parts[:at]), parts[at], parts[at + 1 :]
            container = self._modules.get(path)
            if not isinstance(container, _CONTAINERS) or key not in container._modules:
                continue
            found = self._alike(name, container._modules, at) if rest else []
            if found:
                yield ".".join(parts[: at + 1]), found

    def _alike(self, name: str, modules: Mapping[str, Any], at: int) -> list[str]:
        """The tensors that were read whose names differ in the module of a list alone."""
        parts, shape = name.split("."), self._state[name].shape
        kind = type(modules[parts[at]])
        keys = [key for key, module in modules.items() if type(module) is kind]
        others = (".".join([*parts[:at], key, *parts[at + 1 :]]) for key in keys)
        return [o for o in others if o in self._read and self._state[o].shape == shape]

    def _are_shared(self, siblings: list[str], labels: list[Label | None]) -> bool:
        """Whether a dim of all siblings is one and the same, as that of a residual stream is."""
        first = labels[0]
        if first is None:
            return False
        if len(labels) > 1:
            return all(
                label is not None and label.shape == first.shape and (label == first).all()
                for label in labels
            )
        return any(
            np.isin(first, canonical).all()
            for name in self._read
            if not self._is_part(name, siblings[0])
            for label in self._labels(name)
            if (canonical := self._recorder.algebra.canonical(label)) is not None
        )

    def _is_part(self, name: str, sibling: str) -> bool:
        """Whether a tensor is inside the same child of a list as a sibling's."""
        parts, others = name.split("."), sibling.split(".")
        for at in range(len(others) - 1, 0, -1):
            if isinstance(self._modules.get(".".join(others[: at - 1])), _CONTAINERS):
                return parts[:at] == others[:at]
        return False
