"""Made-up arguments for operators that are run alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload

from prunus.latency.operators import LETTERS, Operator, at_widths


class Supply:
    """Tensors for operators: weights from ever new memory, activations just touched."""

    def __init__(self, device: torch.device, weights_mb: int) -> None:
        self._device = device
        self._bytes = weights_mb * 2**20
        self._arenas: dict[torch.dtype, Tensor] = {}
        self._next = 0

    def arguments(
        self, operator: Operator, widths: Sequence[int]
    ) -> tuple[list[Any], dict[str, Any]]:
        """All arguments at these widths, by position and by name; weights are parameters."""
        document = operator.document
        dtype = getattr(torch, document["dtype"])
        args: dict[str, Any] = at_widths(document["args"], widths)
        groups = args.get("groups")
        if isinstance(groups, int) and groups > 1:
            args["groups"] = count_groups(operator, args)
        made = {name: self._make(value, dtype) for name, value in args.items()}
        schema = _overload(operator.document["target"], True)._schema.arguments
        return [made.pop(a.name) for a in schema if not a.kwarg_only], made

    def _make(self, value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, dict):
            return self._tensor(value, dtype)
        if isinstance(value, list):
            return [self._make(item, dtype) for item in value]
        return value

    def _tensor(self, described: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
        shape = list(described["shape"])
        if described.get("turned"):
            shape = shape[::-1]
        size = prod(shape)
        arena = self._arena(dtype, size)
        if self._next + size > len(arena):
            self._next = 0
        flat = arena[self._next : self._next + size]
        self._next += -(-size // 64) * 64
        held = described.get("held")
        made = (flat if held else flat.clone()).view(shape)  # just written, as by what ran before
        made = made.t() if described.get("turned") else made
        return nn.Parameter(made, requires_grad=False) if held else made

    def _arena(self, dtype: torch.dtype, size: int) -> Tensor:
        known = self._arenas.get(dtype)
        if known is None or len(known) < size:
            generator = torch.Generator().manual_seed(0)
            made = torch.rand(max(self._bytes // dtype.itemsize, size), generator=generator)
            known = self._arenas[dtype] = (made + 0.1).to(self._device, dtype)
        return known


def count_groups(operator: Operator, args: Mapping[str, Any]) -> int:
    """The groups of a convolution at its present widths: blocks keep their size or their number."""
    channels = args["input"]["shape"][1]
    before = operator.document["args"]["input"]["shape"][1]
    full = operator.full[LETTERS.index(before)] if isinstance(before, str) else before
    if args["groups"] == full:  # depthwise
        return int(channels)
    return int(args["groups"] if args.get("transposed") else channels // args["weight"]["shape"][1])


def function_of(operator: Operator, *, in_place: bool = True) -> Callable[..., Any]:
    """What runs the operator, and after it what is computed along with it.

    Parameters
    ----------
    in_place
        Whether an operator that works in place does so here; what is computed along never does.
    """
    run = _alone(operator, in_place)
    after = [(_overload(target, False), options) for target, options in operator.followers]
    if not after:
        return run

    def run_all(*args: Any, **kwargs: Any) -> Any:
        out = run(*args, **kwargs)
        out = out[0] if isinstance(out, tuple) else out
        for function, options in after:
            out = function(out, **options)
        return out

    return run_all


def _alone(operator: Operator, in_place: bool) -> Callable[..., Any]:
    """What runs the operator; attention by its public name, which finds a kernel for any width."""
    overload = _overload(operator.document["target"], in_place)
    if not operator.name.startswith("_scaled_dot_product"):
        return overload
    names = [a.name for a in overload._schema.arguments if not a.kwarg_only]

    def attend(*args: Any, **kwargs: Any) -> Tensor:
        given = {**dict(zip(names, args, strict=True)), **kwargs}
        mask = given.get("attn_mask", given.get("attn_bias"))
        out: Tensor = F.scaled_dot_product_attention(
            given["query"], given["key"], given["value"], mask, given["dropout_p"],
            given["is_causal"], scale=given.get("scale"),
        )  # fmt: skip
        return out

    return attend


def _overload(target: str, in_place: bool) -> OpOverload:
    namespace, name, overload = target.split(".")
    name = name if in_place else name.rstrip("_")
    found: OpOverload = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    return found
