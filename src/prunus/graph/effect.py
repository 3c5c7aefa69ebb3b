"""What an operator does to labels: the record that its rule returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prunus.graph.axis import Label
from prunus.graph.expressions import Expression

Labels = tuple[Label | None, ...]
"""One entry per dim of a tensor."""

Path = tuple[str | int, ...]
"""Where an argument stands: ``("input",)``, or ``("tensors", 1)`` inside a list."""

Place = tuple[Path, int]
"""One dim of one tensor argument."""


Span = tuple[tuple[int, Label | None], ...]
"""Dims whose sizes are multiplied, as (size, label)."""


Equations = tuple[tuple[Expression, int, Label | None], ...]
"""Sizes that the forward's code states, as (expression, size, label of the dim)."""


@dataclass(frozen=True)
class Effect:
    """What an operator does to labels.

    Attributes
    ----------
    outputs
        Labels of every tensor among the outputs, in order.
    contracted
        Dims that are summed over: a removed position has to contribute nothing there.
    produced
        Dims of operands that become dims of the output of a contraction.
    mixing
        Dims over which every position sees the others (norms, softmax, reductions): the operator
        runs on the kept positions alone.
    sizes
        Integer arguments that speak of labelled dims, as the labels whose count they are
        (a plain int stays as it is): ``{"normalized_shape": [label]}``.
    spans
        The operator's MACs: a sum of products over dims, each as (size, label).
    nonempty
        Slices of dims that have to keep at least one position.
    equations
        Sizes that the forward's code states; a plain int pins its dim.
    aligned
        Dims of which the kernel takes multiples only, as (label, multiple).
    counted
        Outputs that hold positions along a mixing dim, as (output, label of the dim): once
        anything reads such an output, the dim stays whole.
    """

    outputs: tuple[Labels, ...]
    contracted: tuple[Place, ...] = ()
    produced: tuple[Place, ...] = ()
    mixing: tuple[Place, ...] = ()
    sizes: Mapping[str, Any] = field(default_factory=dict)
    spans: tuple[Span, ...] = ()
    nonempty: tuple[Label, ...] = ()
    equations: Equations = ()
    aligned: tuple[tuple[Label | None, int], ...] = ()
    counted: tuple[tuple[int, Label], ...] = ()
