"""Which parameters a value that is made of weights alone was computed from."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from prunus.graph.axis import Axis, Label
from prunus.graph.program import Node, refs_in
from prunus.tracer.capture import Recorder


class Origins:
    """Walks back from values to the state behind them; made once all operators are recorded."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._makers: dict[int, Node] = {out: n for n in recorder.nodes for out in n.outputs}

    def axes(self, value: int, label: Label, names: frozenset[str]) -> tuple[Axis, ...]:
        """Axes, of the named tensors behind a value, that share atoms with a label of it."""
        algebra = self._recorder.algebra
        roots = algebra.find(label)
        roots = roots[roots > 0]
        return tuple(
            Axis(name, dim)
            for number, name in self._state(value)
            if name in names
            for dim, own in enumerate(self._recorder.labels[number])
            if own is not None and np.isin(algebra.find(own), roots).any()
        )

    def names(self, value: int) -> set[str]:
        """Names of all state behind a value."""
        return {name for _, name in self._state(value)}

    def _state(self, value: int) -> Iterator[tuple[int, str]]:
        pending, seen = [value], {value}
        while pending:
            number = pending.pop()
            if number in self._recorder.state:
                yield number, self._recorder.state[number]
            elif number in self._makers:
                behind = {ref.value for ref in refs_in(self._makers[number].args)} - seen
                seen |= behind
                pending += sorted(behind)
