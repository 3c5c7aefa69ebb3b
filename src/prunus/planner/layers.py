"""Which blocks go: by name, by their places in a stack, or the least influential ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from prunus.errors import PlanError
from prunus.graph.amounts import LAYERS, read_amount
from prunus.graph.coupling import Block, CouplingGraph
from prunus.planner.culprits import tell_groups
from prunus.planner.option_values import Drop
from prunus.planner.options import PlanOptions
from prunus.structures import find_structures

_NO_BLOCK = "it is a plain layer, without a skip connection around it"


def drops_asked(
    graph: CouplingGraph,
    asked: PlanOptions,
    influence: Callable[[], Mapping[str, float]],
    hold: Iterable[str] = (),
) -> tuple[str, ...]:
    """Names of the blocks that ``drop`` or the ``layers`` of ``remove`` say, in the model's order.

    Of a transformer layers are meant, not the blocks inside them.  See :func:`find_drops`.
    """
    amounts = (asked.remove or {}).get(LAYERS)
    if amounts is None:
        return find_drops(graph, asked.drop, influence, asked.protect_ends, hold)
    found: list[str] = []
    by_stack = amounts if isinstance(amounts, Mapping) else {None: amounts}
    for stack, amount in by_stack.items():
        own = _layers_of(graph, stack)
        count = _count(own, amount)
        others = {block.name for block in graph.blocks} - {block.name for block in own}
        if count:
            found += least_influential(
                *(graph, influence(), count),
                protect_ends=asked.protect_ends,
                hold={*hold, *others},
            )
    return tuple(block.name for block in graph.blocks if block.name in found)


def _layers_of(graph: CouplingGraph, stack: Any) -> list[Block]:
    """The blocks that are layers, of one stack or of all."""
    paths = {layer.path for layer in find_structures(graph).layers}
    layers = [block for block in graph.blocks if block.name in paths or not paths]
    if stack is not None or not layers:
        container = _find_stack(graph, None if stack is None else str(stack))
        layers = [block for block in layers if block.container == container]
    if not layers:
        raise PlanError(
            f"no layer of {stack!r} can be dropped",
            where="remove=",
            why="its blocks are parts of layers",
            fix="drop blocks by name: drop=[...]; `graph.blocks` lists them",
        )
    return layers


def _count(layers: Sequence[Block], amount: Any) -> int:
    """How many of these layers an amount says; a share to the nearest one."""
    count = read_amount(amount) or 0
    if not isinstance(count, float):
        return count
    size: int = sum({block.container: block.siblings for block in layers}.values())
    if 0 < count * size < 0.5:
        raise PlanError(
            "the share of layers is less than half a layer",
            where="remove=",
            why=f"there are {size} layers",
            fix=f"give at least {0.5 / size:.3g}, or a count: 1",
        )
    return math.floor(count * size + 0.5)


def find_drops(
    graph: CouplingGraph,
    drop: Drop,
    influence: Callable[[], Mapping[str, float]],
    protect_ends: bool = True,
    hold: Iterable[str] = (),
) -> tuple[str, ...]:
    """Names of the blocks to drop, in the model's order.

    Parameters
    ----------
    influence
        Asked for where ``drop`` is a number: the influence of every block by name.

    Raises
    ------
    PlanError
        If a block can't be dropped, or there are not as many.
    """
    if isinstance(drop, int):
        return least_influential(graph, influence(), drop, protect_ends=protect_ends, hold=hold)
    names = [drop] if isinstance(drop, str) else list(drop)
    known = {block.name for block in graph.blocks}
    for name in names:
        if name not in known:
            raise _refusal(graph, name)
        if names.count(name) > 1:
            raise PlanError(f"the block {name!r} is to be dropped twice", fix="name it once")
    return tuple(block.name for block in graph.blocks if block.name in names)


def name_layers(
    graph: CouplingGraph, model: nn.Module, layers: Sequence[int], stack: str | None
) -> tuple[str, ...]:
    """Names of the layers at places of a stack."""
    container = _find_stack(graph, stack)
    keys = list(model.get_submodule(container)._modules)
    places = list(layers)
    for place in places:
        if type(place) is not int or not 0 <= place < len(keys):
            raise PlanError(
                f"there is no layer {place!r} in {container!r}",
                why=f"it has {len(keys)} layers, counted from 0 to {len(keys) - 1}",
                fix="give ints in that range; negative ones don't count from the end",
            )
        if places.count(place) > 1:
            raise PlanError(
                f"layer {place} is to be dropped {places.count(place)} times",
                where=container,
                fix="name every layer once",
            )
    if not places:
        raise PlanError("no layer is named", fix="give layers=[2, 3], say")
    if len(places) == len(keys):
        raise PlanError(
            f"all {len(keys)} layers of {container!r} are to be dropped", fix="keep one of them"
        )
    names = [f"{container}.{keys[place]}" if container else keys[place] for place in places]
    return find_drops(graph, names, dict)


def _find_stack(graph: CouplingGraph, stack: str | None) -> str:
    """The one stack that is meant."""
    stacks = graph.stacks
    if not stacks:
        raise PlanError(
            "the model has no stack of layers that can be dropped",
            why="no child of a list is a residual block",
            fix="`graph.obstacles` says why, child by child",
        )
    found = [name for name in stacks if stack in (None, name)]
    found = found or [name for name in stacks if fnmatchcase(name, stack or "")]
    if len(found) == 1:
        return found[0]
    what = f"{stack!r} fits {', '.join(map(repr, found))}" if found else f"no stack fits {stack!r}"
    if stack is None:
        what = "the model has more than one stack of layers"
    listed = ", ".join(f"{name!r} ({len(blocks)} blocks)" for name, blocks in stacks.items())
    raise PlanError(what, why=f"its stacks are {listed}", fix=f"give stack={next(iter(stacks))!r}")


def _refusal(graph: CouplingGraph, name: str) -> PlanError:
    if name in graph.obstacles or any(name in stack for stack in graph.stacks):
        return PlanError(
            f"{name!r} can't be dropped",
            where=name,
            why=graph.obstacles.get(name, _NO_BLOCK),
            fix="drop blocks of graph.blocks; this one's widths can be pruned all the same",
        )
    container = name.rpartition(".")[0]
    why = _NO_BLOCK if container in graph.stacks else "it is no child of a list of layers"
    return PlanError(
        f"{name!r} can't be dropped",
        where=name,
        why=why,
        fix="`graph.blocks` lists the blocks that can be",
    )


def least_influential(
    graph: CouplingGraph,
    influence: Mapping[str, float],
    count: int,
    *,
    protect_ends: bool = True,
    hold: Iterable[str] = (),
) -> tuple[str, ...]:
    """The ``count`` blocks of least influence, in the model's order.

    Parameters
    ----------
    protect_ends
        Keep the first and the last child of every stack.
    hold
        Names of blocks that stay.

    Raises
    ------
    PlanError
        If there are not as many; of no stack all children go.
    """
    left = {block.container: block.siblings for block in graph.blocks}
    chosen: set[str] = set()
    held = set(hold)
    for block in sorted(graph.blocks, key=lambda block: influence[block.name]):
        spared = block.name in held or (protect_ends and block.at_end)
        if len(chosen) < count and not spared and left[block.container] > 1:
            chosen.add(block.name)
            left[block.container] -= 1
    if len(chosen) < count:
        protected = ", the first and last of each stack are protected" if protect_ends else ""
        raise PlanError(
            f"{count} blocks are to be dropped, and only {len(chosen)} may be",
            why="\n".join(
                [
                    f"{len(graph.blocks)} can be left out{protected}, {len(held)} are held",
                    *(tell_groups(graph.obstacles) or ["no child of a list is a residual block"]),
                ]
            ),
            fix="drop fewer, or name the blocks: drop=[...]; `graph.blocks` lists them",
        )
    return tuple(block.name for block in graph.blocks if block.name in chosen)
