"""ONNX Runtime on the CPU: operators and models exported, then run as its sessions."""

from __future__ import annotations

import io
import json
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from prunus.errors import ModelError, require
from prunus.latency.backends import Point, Run, time_in_passes, time_in_turn
from prunus.latency.operators import Operator
from prunus.latency.supply import Supply, function_of

_FUSED = {"native_batch_norm", "relu", "relu_", "hardtanh", "hardtanh_", "leaky_relu",
          "leaky_relu_"}  # fmt: skip
"""What ONNX Runtime computes within the convolution before it."""

_REORDERS = {"ReorderInput", "ReorderOutput"}
"""What brings images into the layout of ONNX Runtime's convolutions, and back."""

_STALE_MB = 32
"""What is touched at most so that weights come from where a model's come from."""

_OPSET = 17
"""The first with LayerNormalization."""


class OnnxRuntime:
    """Operators and models as ONNX Runtime runs them, on as many threads as PyTorch has.

    Parameters
    ----------
    device
        Where the model lies; only the CPU will do.
    weights_mb
        Size of the memory that made-up weights come from.

    Raises
    ------
    MissingExtraError
        If a package of the extra ``export`` is not installed.
    ModelError
        If the model does not lie on the CPU.
    """

    name = "onnxruntime"

    def __init__(self, device: torch.device, weights_mb: int) -> None:
        if device.type != "cpu":
            raise ModelError(
                'backend="onnxruntime" measures the CPU',
                why=f"the model lies on {device}",
                fix='model.cpu(), or backend="eager"',
            )
        require("onnx", "export")
        self._runtime: Any = require("onnxruntime", "export")
        self.device = device
        self.weights_mb = weights_mb

    @property
    def version(self) -> str:
        """Of ONNX Runtime, and how operators are timed."""
        return f"{self._runtime.__version__}, by its profile"

    def absorbs(self, before: str, name: str) -> bool:
        """A norm or an activation after a convolution becomes part of it."""
        return before == "convolution" and name in _FUSED

    def time_points(
        self, points: Sequence[Point], rounds: int
    ) -> tuple[list[float], Mapping[str, str]]:
        """The least of the passes' median nanoseconds.

        Points of one operator take turns, so that few sessions are alive.  An operator that works
        on activations finds them warm, as if they had just been computed; one that mostly reads
        weights finds these cold, since they are read once in a forward.
        """
        stale = torch.ones(min(self.weights_mb, _STALE_MB) * 2**18)

        def once(left: Sequence[Point], count: int) -> tuple[list[float], dict[str, str]]:
            times: list[float] = []
            refused: dict[str, str] = {}
            for _, own in groupby(left, lambda point: point.operator.key):
                found, failed = self._time_sessions(list(own), count, stale)
                times += found
                refused.update(failed)
            return times, refused

        return time_in_passes(points, rounds, once)

    def _time_sessions(
        self, points: Sequence[Point], rounds: int, stale: Tensor
    ) -> tuple[list[float], Mapping[str, str]]:
        """Median nanoseconds of the points of one operator, in turn, in sessions of their own."""
        sessions: dict[Point, _Session] = {}
        supply = Supply(self.device, self.weights_mb)

        def make(point: Point) -> Run:
            if new := point not in sessions:
                args, kwargs = supply.arguments(*point)
                profile = Path(folder) / str(len(sessions))
                sessions[point] = self._load(_exportable(point.operator), args, kwargs, profile)
            if new or not point.operator.is_heavy:
                sessions[point]()
            if point.operator.is_heavy:
                stale.neg_()
            return sessions[point]

        with tempfile.TemporaryDirectory() as folder:
            called, refused = time_in_turn(points, make, rounds, self.device)
            times = [
                sessions[p].own_time(1 if p.operator.is_heavy else 2, time)
                if p in sessions
                else time
                for p, time in zip(points, called, strict=True)
            ]
        return times, refused

    def prepare(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> Run:
        """The session of the exported model.

        Raises
        ------
        ModelError
            If it can't be exported or loaded.
        """
        try:
            return self._load(model, args, kwargs)
        except Exception as error:  # whatever the exporter raises
            raise ModelError(
                "the model can't be run by ONNX Runtime",
                why=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
                fix='measure with backend="eager"',
            ) from error

    def _load(
        self,
        function: Callable[..., Any],
        args: Any,
        kwargs: Mapping[str, Any],
        profile: Path | None = None,
    ) -> _Session:
        """A session for a call: weights and what is no tensor are constants of it."""
        leaves, spec = tree_flatten((tuple(args), dict(kwargs)))
        given = [n for n, leaf in enumerate(leaves) if _is_input(leaf)]
        names = [f"input_{n}" for n in given]

        def call(*tensors: Tensor) -> tuple[Tensor, ...]:
            filled = list(leaves)
            for number, tensor in zip(given, tensors, strict=True):
                filled[number] = tensor
            positional, named = tree_unflatten(filled, spec)
            out = tree_leaves(function(*positional, **named))
            return tuple(leaf for leaf in out if isinstance(leaf, Tensor))

        inputs = [leaves[number] for number in given]
        exported = _export(_Call(call, function).eval(), inputs, names)
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        session = self._runtime.InferenceSession(
            exported, options, providers=["CPUExecutionProvider"]
        )
        binding = session.io_binding()
        wanted = {node.name for node in session.get_inputs()}
        for name, tensor in zip(names, inputs, strict=True):
            if name in wanted:
                binding.bind_cpu_input(name, tensor.contiguous().numpy())
        for node in session.get_outputs():
            binding.bind_output(node.name)
        return _Session(session, binding)


@dataclass(frozen=True)
class _Session:
    """A session that is called without arguments: its inputs and outputs are bound."""

    session: Any
    binding: Any

    def __call__(self) -> None:
        self.session.run_with_iobinding(self.binding)

    def own_time(self, runs_in_turn: int, called: float) -> float:
        """Nanoseconds in nodes that are not spent on blocked layouts of its ends.

        Alone, a convolution has its input brought into such a layout and its output out of it;
        in a model its neighbours keep it, and a call's own cost is borne once by all operators.
        Read off the session's profile, which ends by this.

        Parameters
        ----------
        runs_in_turn
            Runs of which the last counts each time.  The first two warm up: after one that
            looks, memory is given out anew.
        called
            Nanoseconds of a call, for a session in which no node runs.
        """
        path = Path(self.session.end_profiling())
        runs: dict[str, list[int]] = {}
        for event in json.loads(path.read_text(encoding="utf-8")):
            kernel = event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
            if kernel and event["args"].get("op_name") not in _REORDERS:
                runs.setdefault(event["name"], []).append(event["dur"])
        if not runs:
            return called
        last = slice(1 + runs_in_turn, None, runs_in_turn)
        return 1000 * sum(median(found[last] or found) for found in runs.values())


class _Call(nn.Module):
    """What the exporter wants to be given: a module, which holds the model's weights."""

    def __init__(self, call: Callable[..., Any], function: Callable[..., Any]) -> None:
        super().__init__()
        self._call = call
        self.held = function if isinstance(function, nn.Module) else None

    def forward(self, *tensors: Tensor) -> Any:
        """The call."""
        return self._call(*tensors)


def _export(module: nn.Module, inputs: Sequence[Tensor], names: Sequence[str]) -> bytes:
    """The tracing exporter: it is a hundred times faster than the one of torch.export."""
    file: Any = io.BytesIO()  # the annotation of export() knows paths only
    # It prints what it can't export, by default on stdout, which belongs to the command line.
    torch._C._jit_set_onnx_log_output_stream("stderr")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, tuple(inputs), file, input_names=list(names), opset_version=_OPSET,
            dynamo=False,
        )  # fmt: skip
    found: bytes = file.getvalue()
    return found


def _exportable(operator: Operator) -> Callable[..., Any]:
    """The operator in a form that has a symbol in ONNX: not in place, its first output alone."""
    if operator.name == "native_batch_norm":
        return lambda *args: torch.ops.aten.batch_norm.default(*args, False)
    function = function_of(operator, in_place=False)

    def first(*args: Any, **kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    return first


def _is_input(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and not isinstance(leaf, nn.Parameter)
