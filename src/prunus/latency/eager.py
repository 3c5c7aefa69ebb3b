"""PyTorch as it is, operator by operator: eager mode, and ``torch.compile``."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from prunus.errors import ModelError
from prunus.latency.backends import Point, Run, time_in_passes, time_in_turn
from prunus.latency.operators import Operator
from prunus.latency.supply import Supply, function_of

_POINTWISE = {
    "relu", "relu_", "hardtanh", "hardtanh_", "silu", "silu_", "gelu", "sigmoid", "sigmoid_",
    "tanh", "add", "add_", "sub", "mul", "mul_", "div", "hardswish", "hardswish_", "hardsigmoid",
    "leaky_relu", "leaky_relu_", "elu", "exp", "clamp", "clamp_", "native_batch_norm",
    "native_layer_norm",
}  # fmt: skip
"""What the compiler writes into one loop."""


class Eager:
    """Operators and models as PyTorch runs them.

    Parameters
    ----------
    device
        Where they run.
    weights_mb
        Size of the memory from which weights are taken in turn: about that of the model's, so that
        they come from where they come from in the model, a cache or memory.
    """

    name = "eager"

    def __init__(self, device: torch.device, weights_mb: int) -> None:
        self.device = device
        self.weights_mb = weights_mb

    @property
    def version(self) -> str:
        """Of PyTorch."""
        return str(torch.__version__)

    def absorbs(self, before: str, name: str) -> bool:
        """Nothing: every operator runs alone."""
        return False

    def time_points(
        self, points: Sequence[Point], rounds: int
    ) -> tuple[list[float], Mapping[str, str]]:
        """The least of the passes' median nanoseconds; activations have just been written."""
        functions: dict[str, Callable[..., Any]] = {}
        supply = Supply(self.device, self.weights_mb)

        def make(point: Point) -> Run:
            key = point.operator.key
            if key not in functions:
                functions[key] = self._function(point.operator)
            args, kwargs = supply.arguments(*point)
            return partial(functions[key], *args, **kwargs)

        def once(left: Sequence[Point], count: int) -> tuple[list[float], dict[str, str]]:
            return time_in_turn(left, make, count, self.device)

        return time_in_passes(points, rounds, once)

    def prepare(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> Run:
        """The model's own forward."""
        return lambda: model(*args, **kwargs)

    def _function(self, operator: Operator) -> Callable[..., Any]:
        return function_of(operator)


class Compiled(Eager):
    """Operators and models compiled by ``torch.compile``.

    Raises
    ------
    ModelError
        If there is no compiler for the code that it writes.
    """

    name = "compile"

    def __init__(self, device: torch.device, weights_mb: int) -> None:
        super().__init__(device, weights_mb)
        if device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
            raise ModelError(
                "torch.compile has no C++ compiler here",
                why="neither c++, g++, clang++ nor cl is on the path",
                fix='install one, or measure with backend="eager"',
            )

    def absorbs(self, before: str, name: str) -> bool:
        """Whatever is computed element by element after something that is."""
        return before in _POINTWISE and name in _POINTWISE

    def prepare(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> Run:
        """The compiled forward; it is compiled when it runs first."""
        torch._dynamo.reset()
        forward: Any = torch.compile(model, dynamic=False)
        return lambda: forward(*args, **kwargs)

    def _function(self, operator: Operator) -> Callable[..., Any]:
        torch._dynamo.reset()
        compiled: Callable[..., Any] = torch.compile(function_of(operator), dynamic=True)
        return compiled
