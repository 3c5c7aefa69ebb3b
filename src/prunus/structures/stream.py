"""Residual streams: units that are added to what was computed from them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from prunus.graph.coupling import CouplingGraph
from prunus.graph.program import Program, Ref
from prunus.tracer.attention import Units
from prunus.tracer.dataflow import contracts, name_of, read_by

_FIXED, _GIVEN = -2, -1
"""Where weights and inputs come from; everything else comes from a node, by its index."""

_SUMS = frozenset({"add", "add_", "sub", "sub_"})
_TABLES = frozenset({"embedding"})


def find_stream(graph: CouplingGraph) -> Iterator[Units]:
    """Units in any dim of a sum of two activations that come from different products or tables.

    Weights are no activations, nor is what is computed from them alone: a bias is no stream.  Nor
    is the sum in an activation function, whose two sides come from the same product.
    """
    program = graph.program
    for value in _sums(program) if program is not None else ():
        for dim in range(1, len(program.shapes[value])):
            label = program.value_label(Ref(value), dim)
            if label is not None:
                yield np.setdiff1d(label, [0])


def _sums(program: Program) -> Iterator[int]:
    """The first term of every sum of two activations of one shape from different origins."""
    origin = dict.fromkeys((*program.state, *program.constants), _FIXED)
    for index, node in enumerate(program.nodes):
        read = read_by(node)
        before = [origin.get(value, _GIVEN) for value in read]
        name = name_of(node)
        fresh = name in _TABLES or (contracts(node) and max(before) > _FIXED)
        origin.update(dict.fromkeys(node.outputs, index if fresh else max(before, default=_FIXED)))
        different = name in _SUMS and len(read) == 2 and len({*before} - {_FIXED}) == 2
        if different and program.shapes[read[0]] == program.shapes[read[1]]:
            yield read[0]
