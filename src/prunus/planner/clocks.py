"""Clocks: what one forward of a model takes, and a race of the pruned model with the dense one."""

from __future__ import annotations

import io
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from prunus.errors import ModelError, PlanError, require
from prunus.graph.budget import Timer, name_of_timer
from prunus.graph.plans import Plan
from prunus.surgeon.apply import cut_own
from prunus.tracer.copies import duplicate
from prunus.tracer.quiet import quiet_run

Run = Callable[[], float]
"""Seconds of one forward."""

PRECISE = 0.005
"""A race ends once the median ratio is known this well, as a part of it."""

_ROUNDS = 45
"""Rounds of a race at most, of the clocks that are built in; of a user's timer a fifth of it."""

_OPSET = 17
"""The first with LayerNormalization."""


@dataclass(frozen=True)
class Race:
    """What a race found.

    Attributes
    ----------
    ratio
        Pruned to dense: the median over the rounds.
    dense
        Median seconds of the dense model.
    rounds
        How many there were.
    spread
        The standard error of the ratio, as a part of it.
    """

    ratio: float
    dense: float
    rounds: int
    spread: float


class Clock:
    """Compares pruned models with the dense one; only copies run, never the model itself.

    Parameters
    ----------
    timer
        The user's function of a model, or the name of a clock: ``"eager"`` or ``"onnxruntime"``.
        On the CPU these run a model on as many threads as PyTorch has.
    model
        The dense model.
    inputs
        Arguments by position and by name.

    Raises
    ------
    ModelError
        If the model lies where the clock can't run it, or can't be exported.
    MissingExtraError
        If a package of the extra ``export`` is not installed.
    """

    def __init__(
        self, timer: Timer, model: nn.Module, inputs: tuple[Any, Mapping[str, Any]]
    ) -> None:
        self.name = name_of_timer(timer)
        self._timer, self._model, self._inputs = timer, model, inputs
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        if self._device.type == "meta" and not callable(timer):
            raise ModelError(
                "a model on the meta device takes no time",
                why="it has no numbers to compute with",
                fix="build it on the device whose latency matters, or give Budget(timer=…)",
            )
        self._dense = self._copy()
        self._run = self._prepare(self._dense)

    def compare(self, plan: Plan, wanted: float | None) -> Race:
        """Run the dense and the pruned model in turn until their ratio is known.

        Each pruned forward is compared with the dense ones before and after it, so that what
        slows the machine down for a while cancels.

        Parameters
        ----------
        wanted
            The further the ratio is from this, the fewer rounds are needed to see that.
        """
        pruned = cut_own(plan, self._copy())
        own = callable(self._timer)
        least, most = (2, _ROUNDS // 5) if own else (5, _ROUNDS)
        run = self._prepare(pruned)
        with quiet_run(self._dense, copies=not own), quiet_run(pruned, copies=not own):
            for warm_up in () if own else (self._run, run) * 2:
                warm_up()
            full, ratios = [self._run()], list[float]()
            while True:
                small = run()
                full.append(self._run())
                ratios.append(2 * small / (full[-1] + full[-2]))
                low, ratio, high = np.percentile(ratios, (25, 50, 75))
                # The standard error of a median, by the quartiles of a normal distribution.
                spread = 0.93 * (high - low) / len(ratios) ** 0.5 / ratio
                far = 0.0 if wanted is None else abs(ratio / wanted - 1)
                enough = spread <= max(PRECISE, far / 5)
                if len(ratios) >= least and (enough or len(ratios) == most):
                    return Race(float(ratio), median(full), len(ratios), float(spread))

    def _copy(self) -> nn.Module:
        """A copy; it has memory of its own where a user's timer may write into its weights."""
        return duplicate(self._model, share=not callable(self._timer))

    def _prepare(self, model: nn.Module) -> Run:
        """What times one forward of a copy."""
        if callable(self._timer):
            return lambda: self._ask(model)
        args, kwargs = self._inputs
        forward: Callable[[], Any] = lambda: model(*args, **kwargs)  # noqa: E731
        if self._timer == "onnxruntime":
            with quiet_run(model, copies=False):
                forward = _session(model, args, kwargs)
        return lambda: _seconds(forward, self._device)

    def _ask(self, model: nn.Module) -> float:
        """The user's timer, held to its word."""
        assert callable(self._timer)
        found: Any = self._timer(model)
        real = isinstance(found, Real) and not isinstance(found, bool)
        if not real or not 0 < found < float("inf"):
            raise PlanError(
                f"the timer returned {found!r}",
                where=f"Budget(timer={self.name})",
                why="that is no positive number of seconds",
                fix="return what a forward of the model takes, in seconds, as a float",
            )
        return float(found)


def _seconds(forward: Callable[[], Any], device: torch.device) -> float:
    """What a forward takes.

    On a GPU it is the time between two events of its stream.  Where one thread computes on the
    CPU, it is that thread's processor time, so that other processes don't count; else the wall's.
    """
    with torch.inference_mode():
        if device.type == "cuda":
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            stream = torch.cuda.current_stream(device)
            stream.synchronize()
            before.record(stream)
            forward()
            after.record(stream)
            after.synchronize()
            return float(before.elapsed_time(after)) / 1e3
        now = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        started = now()
        forward()
        return max(now() - started, 1e-9)


class _Exportable(nn.Module):
    """The model as the exporter wants it: tensors in, tensors out, the rest constant."""

    def __init__(self, model: nn.Module, leaves: Sequence[Any], spec: Any) -> None:
        super().__init__()
        self.model, self.leaves, self.spec = model, leaves, spec

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The model's tensors, whatever container they come in."""
        given = iter(tensors)
        filled = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        args, kwargs = tree_unflatten(filled, self.spec)
        return tuple(o for o in tree_leaves(self.model(*args, **kwargs)) if isinstance(o, Tensor))


def _session(model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> Callable[[], Any]:
    """The forward of the exported model in ONNX Runtime.

    Raises
    ------
    ModelError
        If it can't be exported or loaded.
    """
    require("onnx", "export")
    runtime: Any = require("onnxruntime", "export")
    leaves, spec = tree_flatten((tuple(args), dict(kwargs)))
    inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    names = [f"input_{n}" for n in range(len(inputs))]
    file: Any = io.BytesIO()  # the annotation of export() knows paths only
    # It prints what it can't export, by default on stdout, which belongs to the command line.
    torch._C._jit_set_onnx_log_output_stream("stderr")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                _Exportable(model, leaves, spec).eval(), tuple(inputs), file, input_names=names,
                opset_version=_OPSET, dynamo=False,
            )  # fmt: skip
        session = runtime.InferenceSession(
            file.getvalue(), options, providers=["CPUExecutionProvider"]
        )
        wanted = {node.name for node in session.get_inputs()}
        given = zip(names, inputs, strict=True)
        feed = {name: x.contiguous().numpy() for name, x in given if name in wanted}
    except Exception as error:  # whatever the exporter raises, or a device that is not the CPU
        raise ModelError(
            "the model can't be run by ONNX Runtime",
            why=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
            fix='time it with timer="eager"',
        ) from error
    return lambda: session.run(None, feed)
