"""From a model to its latency table: what the cache lacks is measured, some operators at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from math import isfinite
from statistics import median
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from prunus.errors import ModelError, PlanError, checks_options
from prunus.graph.coupling import CouplingGraph
from prunus.latency.backends import Backend, Point
from prunus.latency.cache import Cache, Times, default_folder
from prunus.latency.eager import Compiled, Eager
from prunus.latency.operators import Operator, find_invocations
from prunus.latency.race import race
from prunus.latency.samples import Samples, choose_widths, relate
from prunus.latency.table import LatencyTable
from prunus.tracer.forward_fn import entered_by
from prunus.tracer.quiet import copied_inputs, quiet_run
from prunus.tracer.trace import trace

BackendName = Literal["eager", "compile", "onnxruntime"]

_TOGETHER = 8
"""Operators that are measured in turn; then the file is written."""


@checks_options
def measure(
    model: nn.Module,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    backend: BackendName = "eager",
    graph: CouplingGraph | None = None,
    rounds: int = 9,
    folder: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LatencyTable:
    """Time every operator of a model whose width can change, at a few widths, on this machine.

    A contraction (convolution, matrix product, attention) is timed on a grid of its widths,
    and just below its full widths, to find the multiples at which time steps; any other operator
    at several volumes of what it reads and writes.  Operators take turns, each time is the least
    of the medians of five passes, each after a round that warms up, and goes to disk, so that an
    interrupted measurement goes on where it stopped and the next model measures only what is new.
    The whole model is timed before and after, and the less counts.

    Parameters
    ----------
    model
        It is not modified; it decides on device and type of numbers.
    args, kwargs
        Example inputs: the latency is that for their shapes, batch included.
    backend
        ``"eager"``; ``"compile"``, that is :func:`torch.compile`, which needs a compiler;
        ``"onnxruntime"`` on the CPU (the extra ``export``).
    graph
        What :func:`prunus.trace` found, if it was traced already, or with other outputs.
    rounds
        Times that each operator is timed, shared out to the passes.
    folder
        Where the times are kept; by default ``prunus/latency`` in ``$XDG_CACHE_HOME`` or
        ``~/.cache``.
    progress
        Called with the number of operators that are measured, and of all.

    Raises
    ------
    ModelError
        If there is no such backend, it can't run here, or the model lies on the meta device.
    MissingExtraError
        If the backend's package is not installed.
    FormatError
        If the file of times is damaged.

    Examples
    --------
    >>> table = prunus.latency.measure(model, images)                              # doctest: +SKIP
    >>> plan = prunus.plan(graph, model, budget=Budget(latency=0.5), latency=table)
    ...                                                                    # doctest: +SKIP
    """
    if type(rounds) is not int or rounds < 1:
        raise PlanError(f"rounds={rounds!r} is no number of rounds", fix="give an int ≥ 1")
    args = (args,) if isinstance(args, Tensor) else tuple(args)
    kwargs = dict(kwargs or {})
    runner = make_backend(backend, model)
    found = trace(model, args, kwargs) if graph is None else graph
    dtype = _dtype_of(model)
    invocations, _ = find_invocations(found, dtype, runner.absorbs)
    operators = {i.operator.key: i.operator for i in invocations}
    cache = Cache(default_folder() if folder is None else folder, runner)
    args, kwargs = copied_inputs((args, kwargs))  # once: the copying is not to be timed
    with entered_by(model, found.forward_fn), quiet_run(model, copies=False):
        run = runner.prepare(model, args, kwargs)
        before = race([run], rounds, runner.device)
        unmeasured = _fill(cache, runner, operators, rounds, progress)
        after = race([run], rounds, runner.device)
    dense_ns = float(min(median(before[:, 0]), median(after[:, 0])))
    samples = {
        key: Samples(operator, cache.times[key])
        for key, operator in operators.items()
        if key not in unmeasured
    }
    return LatencyTable(runner, dtype, relate(samples), dense_ns, unmeasured)


def make_backend(name: str, model: nn.Module) -> Backend:
    """The backend of that name, for the device that the model lies on."""
    if name not in get_args(BackendName):
        raise ModelError(
            f"backend={name!r} is none of {', '.join(map(repr, get_args(BackendName)))}",
            fix='write backend="eager", say',
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "meta":
        raise ModelError(
            "a model on the meta device takes no time",
            why="it has no numbers to compute with",
            fix="build it on the device whose latency matters",
        )
    if name == "onnxruntime":
        from prunus.latency.onnx_runtime import OnnxRuntime

        return OnnxRuntime(device, _weights_mb(model))
    kind: type[Eager] = Compiled if name == "compile" else Eager
    return kind(device, _weights_mb(model))


def _fill(
    cache: Cache,
    backend: Backend,
    operators: Mapping[str, Operator],
    rounds: int,
    progress: Callable[[int, int], None] | None,
) -> dict[str, str]:
    """Measure what the cache lacks; what can't be measured, with the reason."""
    wanted = {key: choose_widths(operator) for key, operator in operators.items()}
    left = [k for k in operators if not cache.times.get(k, {}).keys() >= set(wanted[k])]
    unmeasured: dict[str, str] = {}
    for start in range(0, len(left), _TOGETHER):
        chunk = left[start : start + _TOGETHER]
        if progress is not None:
            progress(len(operators) - len(left) + start, len(operators))
        points = [Point(operators[key], widths) for key in chunk for widths in wanted[key]]
        times, refused = backend.time_points(points, rounds)
        unmeasured.update(refused)
        new: Times = {}
        for (operator, widths), time in zip(points, times, strict=True):
            if operator.key not in refused and isfinite(time):
                new.setdefault(operator.key, {})[widths] = max(time, 1.0)
        cache.store(new)
    if progress is not None:
        progress(len(operators), len(operators))
    return unmeasured


def _weights_mb(model: nn.Module) -> int:
    """The model's weights in megabytes, as the next power of two from 16 to 256."""
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    return next((mb for mb in (16, 32, 64, 128) if size <= mb), 256)


def _dtype_of(model: nn.Module) -> str:
    """Of the first parameter that holds fractions."""
    found = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return str(found).removeprefix("torch.")
