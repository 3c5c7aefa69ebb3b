"""What a backend has to do: time operators alone, and run a whole model."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import inf, nan
from statistics import median
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from prunus.latency.operators import Operator
from prunus.latency.samples import Widths

Run = Callable[[], Any]
"""One forward, with nothing to prepare."""


PASSES = 5
"""Over the operators that are measured together; the least of their medians counts.  For a second
at a time other machines on the same hardware may slow this one down, and where buffers happen to
lie they may share the sets of a cache."""


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
        """Nanoseconds of every point: the least of its medians over passes of some rounds.

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
    take = stopwatch(device, queued=True)
    times: list[list[float]] = [[] for _ in points]
    refused: dict[str, str] = {}
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of exporters and compilers
        for turn in range(rounds + 1):
            for index, point in enumerate(points):
                if point.operator.key in refused:
                    continue
                try:
                    taken = take(make(point))
                except Exception as error:  # whatever a kernel raises on made-up arguments
                    refused[point.operator.key] = str(error).partition("\n")[0][:200]
                    continue
                if turn:  # the first warms up
                    times[index].append(taken)
    return [median(found) if found else nan for found in times], refused


def time_in_passes(
    points: Sequence[Point],
    rounds: int,
    once: Callable[[Sequence[Point], int], tuple[list[float], Mapping[str, str]]],
) -> tuple[list[float], dict[str, str]]:
    """The least of each point's medians over the passes, which share the rounds out.

    Parameters
    ----------
    once
        Times points in so many rounds, as :func:`time_in_turn` does; what it refuses is not
        tried again.
    """
    passes = min(PASSES, rounds)
    least = dict.fromkeys(points, inf)
    refused: dict[str, str] = {}
    for _ in range(passes):
        left = [point for point in points if point.operator.key not in refused]
        times, failed = once(left, -(-rounds // passes))
        refused.update(failed)
        least.update({p: min(least[p], time) for p, time in zip(left, times, strict=True)})
    return [nan if p.operator.key in refused else least[p] for p in points], refused


def stopwatch(device: torch.device, *, queued: bool = False) -> Callable[[Run], float]:
    """What takes the time of a run, in nanoseconds.

    On a GPU it is the time between two events in the queue of its stream.  Where one thread
    computes on the CPU, it is that thread's own processor time: what other processes take
    meanwhile does not count.  Else it is the time on the wall.

    Parameters
    ----------
    queued
        Whether on a GPU the run is queued behind another of its kind, as an operator is behind
        the one before: launching it then takes no time unless it takes longer than computing.
    """
    if device.type == "cuda":
        return partial(_between_events, device, queued)
    now = time.thread_time_ns if torch.get_num_threads() == 1 else time.perf_counter_ns

    def take(run: Run) -> float:
        started = now()
        run()
        return now() - started

    return take


def _between_events(device: torch.device, queued: bool, run: Run) -> float:
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.current_stream(device)
    stream.synchronize()
    if queued:
        run()
    before.record(stream)
    run()
    after.record(stream)
    after.synchronize()
    return float(1e6 * before.elapsed_time(after))
