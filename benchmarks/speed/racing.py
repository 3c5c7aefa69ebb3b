"""Forwards of models in turn, eager or under ONNX Runtime.

On one thread they are timed by its processor time, which other processes disturb less than a clock
on the wall.
"""

from __future__ import annotations

import argparse
import io
import time
import warnings
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from benchmarks.rows import MissingError

BACKENDS = ("eager", "onnxruntime")
VOID = 0.03
"""How far two runs of one model may differ: else what ran beside them is not told from them."""

Run = Callable[[], Any]
Seconds = np.ndarray[Any, Any]


class BusyError(MissingError):
    """Other processes disturb the clock."""


def race(runs: Sequence[Run], rounds: int) -> Seconds:
    """Seconds of every run in every round, shape ``(rounds, runs)``; two rounds warm up.

    Each round is begun by another run.
    """
    now = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds = np.zeros((rounds + 2, len(runs)))
    with torch.inference_mode():
        for row in range(len(seconds)):
            for place in range(len(runs)):
                index = (row + place) % len(runs)
                started = now()
                runs[index]()
                seconds[row, index] = now() - started
    return seconds[2:]


def trusted_race(
    dense: Run, twin: Run, pruned: Sequence[Run], options: argparse.Namespace
) -> Seconds:
    """Seconds of the dense model, of its twin, and of the others, of the first race not void.

    Raises
    ------
    BusyError
        If all are void.
    """
    for _ in range(options.tries):
        seconds = race([dense, twin, *pruned], options.pairs)
        off = control(seconds)
        if abs(off - 1) <= VOID:
            return seconds
        print(f"  void: dense against dense is {off:.3f}", flush=True)
    raise BusyError(f"a quiet machine: dense against dense differs by more than {VOID:.0%}")


def ask_how_to_race(parser: argparse.ArgumentParser, pairs: int) -> None:
    """Add what :func:`trusted_race` wants to know; ``pairs`` is how many rounds count."""
    parser.add_argument("--pairs", type=int, default=pairs, help="rounds of a race")
    parser.add_argument("--tries", type=int, default=12, help="races until one is not void")
    parser.add_argument("--threads", type=int, default=1)


def control(seconds: Seconds) -> float:
    """Dense against dense."""
    return float(median(seconds[:, 1]) / median(seconds[:, 0]))


def forward_of(model: nn.Module, images: torch.Tensor, backend: str) -> Run:
    """The forward of a model on a backend, on as many threads as PyTorch has."""
    if backend == "eager":
        return lambda: model(images)
    import onnxruntime

    file: Any = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Tensors(model).eval(), (images,), file, input_names=["x"], opset_version=17,
            dynamo=False,
        )  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        file.getvalue(), options, providers=["CPUExecutionProvider"]
    )
    feed = {"x": images.numpy()}
    return lambda: session.run(None, feed)


class _Tensors(nn.Module):
    """What is exported has tensors for outputs, and nothing else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(o for o in tree_leaves(self.model(x)) if isinstance(o, torch.Tensor))
