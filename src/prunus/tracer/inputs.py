"""Example inputs as plain data: shapes, types and ranges in nested containers, rebuilt on demand.

A float tensor is its shape and type.  Integers and booleans mean something (a length, an index, a
mask), so that not any will do: what is read as the rows of a table may be any row, few values are
kept as they are, and many become random ones between the least and the greatest of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prunus.errors import PlanError, TraceError
from prunus.graph.plan_json import check_inputs
from prunus.graph.program import Node, Ref
from prunus.tracer.dataflow import name_of

FEW = 256
"""Integers and booleans of a tensor that are kept as they are, unless they are rows of a table."""

_TABLES = {
    "embedding": ("weight", "indices"),
    "_embedding_bag": ("weight", "indices"),
    "_embedding_bag_forward_only": ("weight", "indices"),
    "index_select": ("self", "index"),
    "index": ("self", "indices"),
}
"""Operators that read rows of a table, with the names of the table and of the row numbers."""

_CARRIED = {
    "_to_copy", "alias", "clone", "detach", "expand", "permute", "select", "slice", "squeeze",
    "t", "transpose", "unsqueeze", "view", "_unsafe_view", "reshape", "lift_fresh_copy",
}  # fmt: skip
"""Operators whose results are elements of what they are given."""


def positional(args: Any) -> tuple[Any, ...]:
    """The arguments of a forward, of which a bare tensor is the only one.

    Raises
    ------
    TraceError
        If they are no sequence.
    """
    if isinstance(args, Tensor):
        return (args,)
    if isinstance(args, (tuple, list)):
        return tuple(args)
    fix = "args=(one, two) are the forward's arguments by position"
    if isinstance(args, Mapping):
        fix = "kwargs= takes arguments by name; a forward that takes the mapping gets args=(batch,)"
    elif type(args).__module__ == "numpy":
        fix = "give a tensor: torch.from_numpy(array)"
    raise TraceError(
        f"the example inputs are a {type(args).__name__}",
        where="args=",
        why="they are a tensor, or a tuple of what the forward is called with",
        fix=fix,
    )


def describe_inputs(args: Any, kwargs: Any, rows: Sequence[int | None] = ()) -> Any:
    """A JSON-able description of a call's arguments; None where one can't be described.

    See :func:`prunus.graph.plan_json.check_inputs` for the form.

    Parameters
    ----------
    rows
        For each tensor, in order: of how many rows it chooses some (:func:`find_rows`).

    >>> describe_inputs((torch.zeros(1, 3),), {"flag": True})
    {'args': [{'tensor': [1, 3], 'dtype': 'float32'}], 'kwargs': {'flag': True}}
    >>> describe_inputs((torch.tensor([4, 7]),), {})["args"]
    [{'tensor': [2], 'dtype': 'int64', 'values': [4, 7]}]
    >>> describe_inputs((torch.tensor([4, 7]),), {}, [30])["args"]
    [{'tensor': [2], 'dtype': 'int64', 'low': 0, 'high': 29}]
    """
    counts = iter(rows)
    try:
        spec = {
            "args": [_describe(value, counts) for value in args],
            "kwargs": {name: _describe(value, counts) for name, value in kwargs.items()},
        }
        check_inputs(spec)
    except (TypeError, PlanError):  # no plain data, or more than anybody should build from a file
        return None
    return spec


def find_rows(
    nodes: Sequence[Node],
    inputs: Sequence[int],
    shapes: Sequence[tuple[int, ...]],
    from_state: Sequence[bool],
) -> list[int | None]:
    """For each input, by its value number: of how many rows of a table it chooses some.

    None for one that is no row number, or that something else is computed from as well.
    """
    source = {number: number for number in inputs}
    found: dict[int, int] = {}
    for node in nodes:
        given = node.args.get("self")
        if name_of(node) in _CARRIED and isinstance(given, Ref) and given.value in source:
            source.update(dict.fromkeys(node.outputs, source[given.value]))
        for value, (table, dim) in _row_numbers(node):
            if value in source and from_state[table]:
                count = shapes[table][dim]
                found[source[value]] = min(count, found.get(source[value], count))
    return [found.get(number) for number in inputs]


def _row_numbers(node: Node) -> Iterator[tuple[int, tuple[int, int]]]:
    """The values that choose rows of a table, with the table and the dim along which they do."""
    if name_of(node) not in _TABLES:
        return
    table, index = (node.args[name] for name in _TABLES[name_of(node)])
    indices = index if isinstance(index, list) else [index]
    for dim, reference in enumerate(indices, start=int(node.args.get("dim", 0))):
        if isinstance(reference, Ref):
            yield reference.value, (table.value, dim)


def rebuild_inputs(
    spec: Any, model: nn.Module, *, seed: int = 0, varied: bool = True
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments that fit the description: seeded normal numbers, integers within their bounds.

    They lie on the device of the model's first parameter.  Unless they are to be ``varied``,
    integers of which only bounds are known are all the lower one.

    Raises
    ------
    PlanError
        If that is no description of inputs, or one of more than 2²⁷ elements.
    """
    check_inputs(spec)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    build = _Builder(generator, device, varied)
    try:
        args = tuple(build(value) for value in spec["args"])
        kwargs = {name: build(value) for name, value in spec["kwargs"].items()}
    except (ValueError, RuntimeError) as error:  # a type that PyTorch has no random numbers of, say
        raise PlanError("the described inputs can't be built", why=str(error)) from error
    return args, kwargs


def _describe(value: Any, rows: Iterator[int | None]) -> Any:
    if isinstance(value, Tensor):
        return _describe_tensor(value, next(rows, None))
    if isinstance(value, (list, tuple)):
        return [_describe(item, rows) for item in value]
    if isinstance(value, dict):
        return {"dict": {str(name): _describe(item, rows) for name, item in value.items()}}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{type(value).__name__} is no plain data")


def _describe_tensor(tensor: Tensor, rows: int | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "tensor": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
    }
    if tensor.is_floating_point() or tensor.is_complex():
        return found
    if rows is not None and tensor.dtype != torch.bool:
        return {**found, "low": 0, "high": max(rows - 1, 0)}
    if not tensor.numel() or tensor.is_meta:
        return found
    if tensor.numel() <= FEW:
        return {**found, "values": [int(value) for value in tensor.flatten().tolist()]}
    numbers = tensor.to(torch.int64)
    return {**found, "low": int(numbers.min()), "high": int(numbers.max())}


class _Builder:
    """Makes values from their descriptions."""

    def __init__(self, generator: torch.Generator, device: torch.device, varied: bool) -> None:
        self._generator, self._device, self._varied = generator, device, varied

    def __call__(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [self(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "dict" in value:
            return {name: self(item) for name, item in value["dict"].items()}
        dtype, shape = getattr(torch, value["dtype"]), list(value["tensor"])
        if "values" in value:
            return torch.tensor(value["values"]).reshape(shape).to(self._device, dtype)
        if dtype.is_floating_point or dtype.is_complex:
            made = torch.randn(shape, generator=self._generator)
            return made.to(self._device, dtype)
        low, high = value.get("low", 0), value.get("high", 0)
        if self._varied:
            made = torch.randint(low, high + 1, shape, generator=self._generator)
        else:
            made = torch.full(shape, low)
        return made.to(self._device, dtype)


def samples_in(args: Any, kwargs: Any) -> int | None:
    """How many samples a call is given; None where no tensor says so."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    return int(main_tensor(tensors).shape[0]) if any(tensor.dim() for tensor in tensors) else None


def main_tensor(tensors: Sequence[Tensor]) -> Tensor:
    """The tensor that says how many samples there are."""
    deep = (one for one in tensors if one.dim() > 1)
    return next(deep, next(one for one in tensors if one.dim()))
