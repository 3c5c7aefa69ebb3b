"""What a backend has to do: time operators alone, and run a whole model."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from math import nan
from statistics import median
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from prunus.latency.operators import Operator
from prunus.latency.samples import Widths

Run = Callable[[], Any]
"""One forward, with nothing to prepare."""


class Point(NamedTuple):
    """One operator at some widths."""

    operator: Operator
    widths: Widths


class Backend(Protocol):
    """Times operators alone, and runs a whole model."""

    name: str
    device: torch.device
    weights_mb: int

    @property
    def version(self) -> str:
        """Of whatever computes, as part of the signature of the cache."""
        ...

    def absorbs(self, before: str, name: str) -> bool:
        """Whether an operator is computed along with the one that feeds it."""
        ...

    def time_points(
        self, points: Sequence[Point], rounds: int
    ) -> tuple[list[float], Mapping[str, str]]:
        """Median nanoseconds of every point, the points in turn in each of the rounds.

        Returns
        -------
        times
            NaN for what can't be run alone.
        refused
            Keys of these operators, with the reason.
        """
        ...

    def prepare(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> Run:
        """The forward of a model, compiled or exported if the backend does that.

        It is called, and the forward run, while the model is in eval mode without gradients.
        """
        ...


def time_in_turn(
    points: Sequence[Point], make: Callable[[Point], Run], rounds: int, device: torch.device
) -> tuple[list[float], dict[str, str]]:
    """Median nanoseconds of every point, and what can't be run; see :class:`Backend`.

    Parameters
    ----------
    make
        Prepares a point; called again in every round, and not timed.
    """
    now = clock(device)
    times: list[list[float]] = [[] for _ in points]
    refused: dict[str, str] = {}
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of exporters and compilers
        for turn in range(rounds + 1):
            for index, point in enumerate(points):
                if point.operator.key in refused:
                    continue
                try:
                    run = make(point)
                    started = now()
                    run()
                    taken = now() - started
                except Exception as error:  # whatever a kernel raises on made-up arguments
                    refused[point.operator.key] = str(error).partition("\n")[0][:200]
                    continue
                if turn:  # the first warms up
                    times[index].append(taken)
    return [median(found) if found else nan for found in times], refused


def clock(device: torch.device) -> Callable[[], int]:
    """Nanoseconds since some moment.

    Where one thread computes, it is that thread's own processor time: what other processes take
    meanwhile does not count.  Else it is the time on the wall, once the device has finished.
    """
    if device.type == "cuda":

        def finished() -> int:
            torch.cuda.synchronize(device)
            return time.perf_counter_ns()

        return finished
    return time.thread_time_ns if torch.get_num_threads() == 1 else time.perf_counter_ns
