"""What is made of an operator's times, what is timed along with it, how a profile is read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import prunus
from prunus.latency.backends import PASSES, Point, time_in_passes
from prunus.latency.onnx_runtime import _Session
from prunus.latency.operators import Operator, find_invocations
from prunus.latency.samples import Samples, choose_widths, fit_step, relate
from prunus.latency.supply import Supply, function_of

IMAGES = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def operators_of(
    model: nn.Module, absorbs: Callable[[str, str], bool] = lambda before, name: False
) -> list[Operator]:
    graph = prunus.trace(model.eval(), IMAGES)
    return [found.operator for found in find_invocations(graph, "float32", absorbs)[0]]


def convolutions(*widths: int) -> list[Operator]:
    pairs = zip((3, *widths), widths, strict=False)
    return operators_of(nn.Sequential(*(nn.Conv2d(a, b, 3, padding=1) for a, b in pairs)))


# Where time steps.


def sample(operator: Operator, step: int, error: float = 0.0, draw: int = 0) -> Samples:
    """A staircase in every width on a fixed part, told by a clock that errs."""
    generator = np.random.default_rng((draw, *operator.full))

    def time(widths: tuple[int, ...]) -> float:
        up = [math.ceil(w / step) * step / n for w, n in zip(widths, operator.full, strict=True)]
        return 1e5 * (0.3 + math.prod(up)) * generator.normal(1.0, error)

    return Samples(operator, {widths: time(widths) for widths in choose_widths(operator)})


def right(samples: dict[str, Samples], step: int) -> float:
    """The part of all widths at which the step is found."""
    return float(np.mean([found == step for one in samples.values() for found in one.steps]))


@pytest.mark.parametrize(("step", "error"), [(4, 0.01), (8, 0.01), (8, 0.02)])
def test_steps_are_found_together_where_the_clock_errs_as_much_as_they_save(step, error) -> None:
    operators = convolutions(*range(128, 328, 8))
    alone, together = [], []
    for draw in range(20):
        samples = {o.key: sample(o, step, error, draw) for o in operators}
        alone.append(right(samples, step))
        together.append(right(relate(samples), step))
    assert np.mean(alone) < 0.8
    assert np.mean(together) > 0.85


def test_a_step_is_found_where_time_hardly_falls_near_the_full_width() -> None:
    due = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    rates = np.array([-2.4, -1.2, -0.8, 0.42, 0.68, 0.64])
    assert fit_step(np.stack([rates * due, due])) == 8
    assert fit_step(np.stack([np.maximum(rates, 0) * 2 * due, due])) == 8
    assert fit_step(np.stack([0.4 * due, due])) == 1
    assert fit_step(np.stack([-due, due])) == 1


def test_an_operator_that_says_clearly_otherwise_keeps_its_own_step() -> None:
    own, *others = convolutions(24, 24, 96, 128, 160, 192)[1:]
    found = relate({o.key: sample(o, 8) for o in others} | {own.key: sample(own, 4)})
    assert found[own.key].steps == (4, 4)
    assert all(set(found[o.key].steps) == {8} for o in others)


@pytest.mark.parametrize("width", [8, 12, 16, 24, 40])
def test_between_the_ends_widths_are_measured_where_no_kernel_pads(width) -> None:
    *_, last = convolutions(width, width)
    multiple = 8 if width >= 16 else 4
    axis = Samples(last, {})._axes[0]
    assert all(w % multiple == 0 for w in axis if w < width)
    assert axis[0] == multiple


# What is computed along with an operator.


class Block(nn.Module):
    """A convolution with a norm and an activation, and one to whose output something is added."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU6()
        self.other, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.norm(self.conv(x)))
        return self.last(self.other(x) + x)


def fuses(before: str, name: str) -> bool:
    return before == "convolution" and name in ("native_batch_norm", "hardtanh", "add")


def test_an_absorbed_activation_is_timed_with_its_operator_and_a_norm_is_not() -> None:
    first, second, _ = operators_of(Block(), fuses)
    assert first.followers == [("aten.hardtanh.default", {"min_val": 0.0, "max_val": 6.0})]
    assert not second.followers  # the addition reads a further tensor
    supply = Supply(torch.device("cpu"), 16)
    args, kwargs = supply.arguments(first, (5,))
    args[1] = torch.nn.Parameter(100 * args[1])
    found = function_of(first)(*args, **kwargs)
    plain = operators_of(Block(), lambda before, name: before == name == "convolution")[0]
    wanted = function_of(plain)(*args, **kwargs)
    assert wanted.max() > 6
    assert torch.equal(found, wanted.clamp(0, 6))


def test_an_operator_is_heavy_whose_weights_outweigh_what_it_computes_on() -> None:
    wide = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 64))
    heavy = {o.name: o.is_heavy for o in operators_of(wide)}
    assert heavy == {"convolution": False, "addmm": True}


# Passes.


def test_the_least_of_the_passes_counts_and_what_is_refused_is_not_tried_again() -> None:
    slow, broken = (Point(o, o.full) for o in convolutions(8, 16))
    asked: list[tuple[int, int]] = []

    def once(points: Sequence[Point], rounds: int) -> tuple[list[float], dict[str, str]]:
        asked.append((len(points), rounds))
        refused = {p.operator.key: "no such kernel" for p in points if p == broken}
        return [math.nan if p == broken else 100.0 / len(asked) for p in points], refused

    times, refused = time_in_passes([slow, broken], 9, once)
    assert times[0] == 100.0 / PASSES
    assert math.isnan(times[1])
    assert set(refused) == {broken.operator.key}
    assert asked == [(2, 2)] + [(1, 2)] * (PASSES - 1)


def test_a_single_round_is_a_single_pass() -> None:
    point, _ = (Point(o, o.full) for o in convolutions(8, 16))
    asked: list[int] = []

    def once(points: Sequence[Point], rounds: int) -> tuple[list[float], dict[str, str]]:
        asked.append(rounds)
        return [1.0 for _ in points], {}

    assert time_in_passes([point], 1, once) == ([1.0], {})
    assert asked == [1]


# The profile of ONNX Runtime.


class Profiled:
    """A session whose profile was written before."""

    def __init__(self, path: Path, events: list[dict[str, Any]]) -> None:
        self.path = path
        path.write_text(json.dumps(events))

    def end_profiling(self) -> str:
        return str(self.path)


def event(name: str, kind: str, micros: int) -> dict[str, Any]:
    return {"cat": "Node", "name": f"{name}_kernel_time", "dur": micros, "args": {"op_name": kind}}


def test_what_brings_ends_into_layouts_and_what_warms_up_does_not_count(tmp_path) -> None:
    events: list[dict[str, Any]] = [{"cat": "Session", "name": "model_run", "dur": 999}]
    for micros in (500, 400, 90, 40, 80, 42, 70, 44):
        events += [event("in", "ReorderInput", 33), event("conv", "Conv", micros)]
        events += [event("pool", "MaxPool", 5), event("out", "ReorderOutput", 44)]
    session = Profiled(tmp_path / "profile", events)
    assert _Session(session, None).own_time(2, 7.0) == 1000 * (42 + 5)
    assert _Session(session, None).own_time(1, 7.0) == 1000 * (57 + 5)


def test_a_session_without_nodes_takes_what_its_call_takes(tmp_path) -> None:
    session = Profiled(tmp_path / "profile", [event("in", "ReorderInput", 33)])
    assert _Session(session, None).own_time(2, 7.0) == 7.0
