"""What an optimizer keeps for a parameter is cut along, axis by axis, or refused by name.

State is judged by its shape, not by its name.  Scalars stay.  Each dim of any other tensor is a dim
of the parameter, or 1 where the optimizer has reduced it (Adafactor), or it is left out; where
several dims could be meant and they lose different positions, nobody can tell.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prunus.errors import ApplyError
from prunus.surgeon.tensors import slice_tensor

Axes = Mapping[int, Tensor]
"""Dim → positions that stay."""

_INNER = ("optimizer", "base_optimizer", "optim")
"""Attributes under which wrappers (SAM, accelerate) keep an optimizer, of whatever class it is."""

_OF_EVERY_OPTIMIZER = frozenset(vars(torch.optim.SGD([nn.Parameter(torch.zeros(1))])))

_FIX = "make a new optimizer after the cut; nothing was changed"

_SQUARE = 16
"""Smaller square states may be symmetric by chance."""

_CODES = (torch.uint8, torch.int8)
"""Of states that are stored in 8 bits, block by block."""


_GONE = object()
"""In the place of a value: the entry goes."""


class Change(NamedTuple):
    """An entry of a state, and its later value; without a key, all entries go."""

    holder: Any
    key: Any
    value: Any


class _Place(NamedTuple):
    """What speaks of a parameter, for messages."""

    optimizer: str
    parameter: str
    key: str


def slice_state(
    optimizer: Any,
    before: Sequence[nn.Parameter],
    model: nn.Module,
    kept: Mapping[int, tuple[str, Axes]],
) -> list[Change]:
    """What an optimizer's state becomes; nothing is changed yet.

    Parameters
    ----------
    optimizer
        Any optimizer, or a wrapper around one.
    before
        All parameters that the model had before blocks were dropped.
    model
        Without these blocks, and not cut yet.
    kept
        By the id of each tensor that loses positions: its name, and what stays of its dims.

    Raises
    ------
    ApplyError
        If the optimizer has none of the parameters, or a state that can't be cut along.
    """
    found = list(_optimizers(optimizer))
    held = {id(p) for one in found for group in one.param_groups for p in group["params"]}
    kind = type(optimizer).__name__
    if before and not held & {id(p) for p in before}:
        raise ApplyError(
            f"the optimizer ({kind}) holds none of the model's parameters",
            why="it was made for another model, or for copies of the parameters",
            fix="give the optimizer that trains this model, or none",
        )
    gone = {id(p) for p in before} - {id(p) for p in model.parameters()}
    changes: list[Change] = []
    for one in found:
        changes += _Slicer(one, kept, gone).changes()
        changes += _without(one, gone)
    return changes


def write_state(changes: Sequence[Change]) -> None:
    """Make the changes, in place."""
    for holder, key, value in changes:
        if key is None:
            holder.clear()
        elif value is _GONE:
            holder.pop(key, None)  # a wrapper has the state of the optimizer inside
        elif isinstance(holder, (dict, list)):
            holder[key] = value
        else:
            setattr(holder, key, value)


def _without(optimizer: Any, gone: Collection[int]) -> Iterator[Change]:
    """Parameters that leave, with their state; in place, since lists may be kept elsewhere too."""
    for group in optimizer.param_groups if gone else ():
        left = [parameter for parameter in group["params"] if id(parameter) not in gone]
        yield Change(group["params"], slice(None), left)
    for parameter in optimizer.state:
        if id(parameter) in gone:
            yield Change(optimizer.state, parameter, _GONE)


def _optimizers(optimizer: Any) -> Iterator[Any]:
    """An optimizer, and those inside, each state once."""
    seen: set[int] = set()
    waiting = [optimizer]
    while waiting:
        one = waiting.pop(0)
        if id(one) in seen or not hasattr(one, "param_groups") or not hasattr(one, "state"):
            continue
        seen.add(id(one))
        yield one
        for name, value in vars(one).items():
            if _is_inner(name, value):
                waiting += value if isinstance(value, (list, tuple)) else [value]


def _is_inner(name: str, value: Any) -> bool:
    """Whether an attribute of an optimizer is another one inside of it, or a list of such."""
    if isinstance(value, (list, tuple)):
        return bool(value) and all(isinstance(one, torch.optim.Optimizer) for one in value)
    return value is not None and (name in _INNER or isinstance(value, torch.optim.Optimizer))


class _Slicer:
    """Finds what becomes of one optimizer."""

    def __init__(
        self, optimizer: Any, kept: Mapping[int, tuple[str, Axes]], gone: Collection[int]
    ) -> None:
        self._optimizer, self._kept, self._gone = optimizer, kept, gone
        self._kind = type(optimizer).__name__
        self._groups = [group["params"] for group in optimizer.param_groups]
        self._parameters = [parameter for group in self._groups for parameter in group]

    def changes(self) -> list[Change]:
        touched = {*self._kept, *self._gone}
        if not any(id(parameter) in touched for parameter in self._parameters):
            return []
        if isinstance(self._optimizer, torch.optim.LBFGS):
            return _without_history(self._optimizer)
        found: list[Change] = []
        for parameter, entries in list(self._optimizer.state.items()):
            if isinstance(parameter, Tensor):
                found += self._of_parameter(self._optimizer.state, parameter, parameter, "")
            else:
                self._refuse_tensors(entries, repr(parameter))
        for group in self._optimizer.param_groups:
            for key in sorted(group.keys() - {"params"}):
                self._refuse_tensors(group[key], key)
        own = vars(self._optimizer)
        for name in sorted(own.keys() - _OF_EVERY_OPTIMIZER):
            for holder, key, parameter in self._kept_beside(name, own[name]):
                found += self._of_parameter(holder, key, parameter, name)
        return found

    def _of_parameter(self, holder: Any, key: Any, parameter: Tensor, name: str) -> list[Change]:
        """What is kept for a parameter; entry by entry, where it is a dict that others may hold."""
        value = holder[key]
        if id(parameter) not in self._kept or value is parameter:
            return []
        path, axes = self._kept[id(parameter)]
        entries = [(holder, key, name)]
        if isinstance(value, dict):
            entries = [(value, inner, str(inner)) for inner in value]
        shape, found = tuple(parameter.shape), list[Change]()
        for one, inner, called in entries:
            later = _cut(one[inner], shape, axes, _Place(self._kind, path, called))
            if later is not one[inner]:
                found.append(Change(one, inner, later))
        return found

    def _kept_beside(self, name: str, value: Any) -> list[tuple[Any, Any, Tensor]]:
        """Tensors that a class keeps beside its state: by parameter, or in the order of groups."""
        if _is_inner(name, value) or not self._has_tensors(value):
            return []
        if isinstance(value, dict) and {isinstance(key, Tensor) for key in value} == {True}:
            return [(value, key, key) for key in value]
        found = [] if self._gone else _in_order(value, self._groups)
        if not found:
            self._refuse_tensors(value, name)
        return found

    def _has_tensors(self, value: Any) -> bool:
        """Whether there are tensors in it that are none of the optimizer's own parameters."""
        return _has_tensors(value, frozenset(map(id, self._parameters)))

    def _refuse_tensors(self, value: Any, key: str) -> None:
        """Refuse tensors that are kept for no single parameter."""
        if self._has_tensors(value):
            what = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else "in it"
            raise ApplyError(
                f"the state of {self._kind} can't be cut along: {key!r}",
                where=key,
                why=f"it is kept for no single parameter, and has a tensor {what}",
                fix=_FIX,
            )


def _is_parallel(values: Any, parameters: Sequence[Tensor]) -> bool:
    """Whether a list has, in their order, a tensor for every parameter, of its shape."""
    return (
        isinstance(values, list)
        and len(values) == len(parameters)
        and all(
            isinstance(value, Tensor) and value.shape == parameter.shape
            for value, parameter in zip(values, parameters, strict=True)
        )
    )


def _in_order(
    value: Any, groups: Sequence[Sequence[Tensor]]
) -> list[tuple[list[Any], int, Tensor]]:
    """The entries of a list with one for each parameter, or of lists for each group."""
    flat = [parameter for group in groups for parameter in group]
    for values, lists in (([value], [flat]), (value, groups)):
        alike = isinstance(values, list) and len(values) == len(lists)
        if alike and all(map(_is_parallel, values, lists)):
            pairs = zip(values, lists, strict=True)
            return [(own, n, one) for own, group in pairs for n, one in enumerate(group)]
    return []


def _without_history(optimizer: torch.optim.LBFGS) -> list[Change]:
    """Differences of earlier steps say nothing of a smaller model: LBFGS begins anew."""
    if any(optimizer.state.values()):
        warnings.warn(
            "LBFGS: the history of earlier steps was dropped, since the curvature that it holds is "
            "that of the larger model; the next step starts without any",
            stacklevel=2,
        )
    return [Change(optimizer.state, None, None), Change(optimizer, "_numel_cache", None)]


def _cut(value: Any, shape: tuple[int, ...], axes: Axes, place: _Place) -> Any:
    """A state without the positions that go; containers are made anew where anything changes."""
    if isinstance(value, Tensor):
        return _cut_tensor(value, shape, axes, place)
    if isinstance(value, (dict, list, tuple)):
        pairs = list(value.items() if isinstance(value, dict) else enumerate(value))
        later = [(key, _cut(item, shape, axes, _inside(place, key))) for key, item in pairs]
        if all(a is b for (_, a), (_, b) in zip(pairs, later, strict=True)):
            return value
        return dict(later) if isinstance(value, dict) else like(value, [v for _, v in later])
    if _has_tensors(value):
        raise _refusal(place, f"a {type(value).__name__} that holds tensors", shape)
    return value


def like(value: Any, items: list[Any]) -> Any:
    """A list or tuple of the same type."""
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def _cut_tensor(value: Tensor, shape: tuple[int, ...], axes: Axes, place: _Place) -> Tensor:
    if value.numel() <= 1:
        return value
    found = list(_meanings(tuple(value.shape), shape, axes))
    objection = _objection(value, found, axes)
    if objection:
        raise _refusal(place, objection, shape)
    wanted = {dim: axes[own] for dim, own in found[0].items()}
    return slice_tensor(value, wanted) if wanted else value


def _objection(value: Tensor, found: Sequence[Mapping[int, int]], axes: Axes) -> str:
    """Why a state can't be cut, of which ``found`` are the meanings that its dims may have."""
    size = tuple(value.shape)
    if type(value) not in (Tensor, nn.Parameter):
        return f"a {type(value).__name__} of shape {size}"
    if value.dtype in _CODES:
        return f"a tensor of {value.dtype} and shape {size}: codes in blocks"
    if _is_product(value):
        return f"a symmetric matrix of shape {size}: of products of one dim"
    if not found:
        return f"a tensor of shape {size}"
    several = any(_kept_of(one, axes) != _kept_of(found[0], axes) for one in found)
    return f"a tensor of shape {size}, whose dims may be several" if several else ""


def _meanings(
    size: tuple[int, ...], shape: tuple[int, ...], axes: Axes
) -> Iterator[dict[int, int]]:
    """Which dims of a state are dims of the parameter that lose positions, in every way."""
    for dims in combinations(range(len(shape)), len(size)):
        if all(n in (shape[own], 1) for n, own in zip(size, dims, strict=True)):
            yield {
                dim: own for dim, own in enumerate(dims) if own in axes and size[dim] == shape[own]
            }


def _kept_of(meaning: Mapping[int, int], axes: Axes) -> dict[int, list[int]]:
    return {dim: axes[own].tolist() for dim, own in meaning.items()}


def _is_product(value: Tensor) -> bool:
    """Whether it looks like a matrix of products of one dim with itself (Shampoo, SOAP, K-FAC)."""
    if value.dim() != 2 or value.shape[0] != value.shape[1] or value.shape[0] < _SQUARE:
        return False
    if value.is_meta or not value.is_floating_point() or bool((value == value[0, 0]).all()):
        return False
    return torch.allclose(value, value.T, rtol=1e-4, atol=1e-6 * float(value.abs().max()))


def _inside(place: _Place, key: Any) -> _Place:
    return place._replace(key=f"{place.key}[{key!r}]")


def _has_tensors(value: Any, known: Collection[int] = (), depth: int = 0) -> bool:
    """Whether a tensor of more than one element is in a value, or in what it holds."""
    if isinstance(value, Tensor):
        return value.numel() > 1 and id(value) not in known
    if depth > 4 or isinstance(value, (torch.optim.Optimizer, nn.Module, type)) or callable(value):
        return False
    items = value if isinstance(value, (list, tuple, set)) else ()
    if isinstance(value, dict):
        items = list(value.values())
    elif hasattr(value, "__dict__"):
        items = list(vars(value).values())
    return any(_has_tensors(item, known, depth + 1) for item in items)


def _refusal(place: _Place, what: str, shape: tuple[int, ...]) -> ApplyError:
    return ApplyError(
        f"the state of {place.optimizer} can't be cut along: {place.key!r} of {place.parameter}",
        where=place.parameter,
        why=f"it is {what}, and the parameter has shape {shape}: shapes don't tell which of its "
        "entries stay",
        fix=_FIX,
    )
