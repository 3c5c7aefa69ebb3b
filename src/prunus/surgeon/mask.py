"""Evaluate a plan without surgery: the real forward, with the removed units' consumers silenced.

The model is traced again for every new shape of inputs, so that any batch and length will do.
While the real forward runs, a dispatch mode walks along the traced program: the weights that
read a removed unit are zeroed there, and operators that mix positions see the kept ones only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from prunus.errors import ApplyError, checks_options
from prunus.graph.axis import Label, Mask, kept_positions
from prunus.graph.coupling import CouplingGraph
from prunus.graph.plans import Plan
from prunus.graph.program import Node, Program, state_of
from prunus.surgeon.apply import check_model, differing_axes, kept_axes, output_shapes
from prunus.surgeon.depth import without_blocks
from prunus.surgeon.tensors import fit_plan, with_biases
from prunus.tracer.adapters import adapted
from prunus.tracer.capture import PASSIVE
from prunus.tracer.forward_fn import ForwardFn, entered_as_traced
from prunus.tracer.quiet import ALL_TRUE, asks_which
from prunus.tracer.registry import bind, call_bound
from prunus.tracer.rerun import run_on_kept
from prunus.tracer.trace import plain_kernels, quiet_run, trace
from prunus.tracer.wrappers import unwraps


@checks_options
@unwraps
@contextmanager
def mask(
    plan: Plan,
    model: nn.Module,
    *,
    forward_fn: ForwardFn | None = None,
    traces: dict[Any, CouplingGraph] | None = None,
) -> Iterator[nn.Module]:
    """Within the context the model answers as the pruned one would, its tensors whole.

    Blocks that the plan drops are out of the model until the context ends.

    For evaluation: the forward runs in eval mode and without gradients, at any batch and length.
    Where the model was traced with a ``forward_fn``, calling the model means calling that.

    A dict given as ``traces`` is filled with what was traced, by shapes of inputs: given again with
    the next plan for the same model, none of which drops blocks, it saves these traces.

    Raises
    ------
    PlanError
        If the plan is for another model.

    Examples
    --------
    >>> with prunus.mask(plan, model):          # doctest: +SKIP
    ...     accuracy = evaluate(model, loader)
    """
    with (
        entered_as_traced(model, plan.traced, forward_fn),
        without_blocks(model, plan.drops),
    ):
        state, _ = state_of(model)
        plan = fit_plan(plan, state)
        check_model(plan.widths, model, state)
        with (
            with_biases(model, plan.biases),
            _silenced(plan, model, {} if traces is None else traces),
        ):
            yield model


@contextmanager
def _silenced(plan: Plan, model: nn.Module, traces: dict[Any, CouplingGraph]) -> Iterator[None]:
    """Silence what the plan removes of the model that has lost its blocks already."""
    running = ExitStack()
    depth = 0

    def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
        nonlocal depth
        depth += 1
        if depth > 1:  # the model's forward calls the model
            return None
        if not torch.is_inference_mode_enabled():
            silence(args, kwargs)
            return None
        # In there operators come whole, and not as those that were traced.
        running.enter_context(torch.inference_mode(False))
        running.enter_context(torch.no_grad())
        ordinary = tree_map(_ordinary, (args, kwargs))
        silence(*ordinary)
        return ordinary

    def silence(args: Any, kwargs: Any) -> None:
        key = str(tree_map(_signature, (args, kwargs)))
        with _paused(handles):
            if plan.drops and key not in traces:
                _check_runs(model, args, kwargs)
            if plan.keep and key not in traces:  # else blocks are gone, and all that is left stays
                traces[key] = trace(model, args, kwargs, real=True)
        silencing = plan.keep and _silencer(plan, traces[key])
        running.enter_context(quiet_run(model, users_own=True))
        if silencing:
            running.enter_context(plain_kernels())
            running.enter_context(silencing)

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal depth
        depth -= 1
        if not depth:
            running.close()

    handles = _Hooks(model, enter, leave)
    handles.attach()
    try:
        with adapted(model):
            yield
    finally:
        handles.detach()
        running.close()


def _check_runs(model: nn.Module, args: Any, kwargs: Any) -> None:
    """Refuse a model that can't do without the blocks that are gone; what runs is a copy."""
    try:
        output_shapes(model, args, kwargs)
    except Exception as error:  # a forward may raise anything
        raise ApplyError(
            "the model does not run without the blocks that the plan drops",
            why=f"its own forward raised {type(error).__name__}: {error}",
            fix="drop blocks of `prunus.trace(model, inputs).blocks`, and check the inputs",
        ) from error


def _silencer(plan: Plan, found: CouplingGraph) -> Silencer:
    """Refuses inputs for which the model couples other positions than when the plan was made."""
    kept = found.mask_from_positions(kept_axes(plan))
    implied = dict(found.positions(kept))
    for axis in differing_axes(plan, implied):
        raise ApplyError(
            f"for these inputs the model couples {axis} in another way",
            why="its forward takes another path than with the inputs that were traced",
            fix="evaluate the pruned model itself",
        )
    return Silencer(found.program, kept)


class Silencer(TorchDispatchMode):
    """Follows a traced program and changes what the operators of a plan's consumers read."""

    def __init__(self, program: Program, kept: Mask) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._program = program
        self._kept = kept
        self._next = 0

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.name in PASSIVE:
            return func(*args, **kwargs)
        node = self._node
        if node is not None and node.target is ALL_TRUE and asks_which(func, args):
            args = (self.__torch_dispatch__(ALL_TRUE, types, args),)
            node = self._node
        if node is None or node.target is not func:
            raise ApplyError(
                f"the forward ran {func} where the trace ran {node.target if node else 'nothing'}",
                why="it does not take the same path twice",
                fix="make the forward deterministic, or evaluate the pruned model itself",
            )
        self._next += 1
        bound = bind(func, args, kwargs)
        silent = self._silence(node, bound)
        mixed = run_on_kept(node, silent or bound, self._program, self._kept)
        if mixed is not None:
            return mixed
        return func(*args, **kwargs) if silent is None else call_bound(func, silent)

    @property
    def _node(self) -> Node | None:
        """The operator of the trace that comes next; None behind the last one."""
        nodes = self._program.nodes
        return nodes[self._next] if self._next < len(nodes) else None

    def _silence(self, node: Node, bound: dict[str, Any]) -> dict[str, Any] | None:
        """Arguments with an operand of every contraction, the last, zeroed where a unit is gone."""
        silent, done = dict(bound), list[Label]()
        for (name, *_), dim in reversed(node.effect.contracted if node.effect else ()):
            label = self._program.value_label(node.args[str(name)], dim)
            if label is None or any(np.array_equal(label, other) for other in done):
                continue
            done.append(label)
            stay = kept_positions(label, self._kept)
            if len(stay) == len(label):
                continue
            operand: Tensor = silent[str(name)]
            zeroed = torch.zeros_like(operand)
            index = torch.as_tensor(stay, device=operand.device)
            zeroed.index_copy_(dim, index, operand.index_select(dim, index))
            silent[str(name)] = zeroed
        changed = any(silent[name] is not value for name, value in bound.items())
        return silent if changed else None


class _Hooks:
    """The two hooks on the model's own forward, which can be taken off for a trace."""

    def __init__(self, model: nn.Module, enter: Any, leave: Any) -> None:
        self._model, self._enter, self._leave = model, enter, leave
        self._handles: list[Any] = []

    def attach(self) -> None:
        self._handles = [
            self._model.register_forward_pre_hook(self._enter, with_kwargs=True),
            self._model.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
        ]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()


@contextmanager
def _paused(hooks: _Hooks) -> Iterator[None]:
    hooks.detach()
    try:
        yield
    finally:
        hooks.attach()


def _ordinary(value: Any) -> Any:
    """A tensor that was made in inference mode as one that was not."""
    made_there = isinstance(value, Tensor) and value.is_inference()
    return value.clone() if made_there else value


def _signature(value: Any) -> Any:
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else repr(value)
