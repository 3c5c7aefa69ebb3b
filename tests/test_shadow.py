"""The shadow run: it agrees with what is right, and objects to what is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunus
from prunus.graph.axis import Axis
from prunus.graph.plans import Plan
from tests import shadow
from tests.faults import Net, between, conv, head
from tests.pipeline import cut

IMAGE = (2, 3, 8, 8)


def resized(mode: str, **options: Any) -> Callable[[], nn.Module]:
    return between(lambda x: F.interpolate(x, scale_factor=2, mode=mode, **options))


MODELS: dict[str, tuple[Callable[[], nn.Module], Axis]] = {
    "bilinear": (resized("bilinear"), Axis("second.weight", 1)),
    "corners": (resized("bilinear", align_corners=True), Axis("second.weight", 1)),
    "bicubic": (resized("bicubic"), Axis("second.weight", 1)),
    "antialiased": (resized("bilinear", antialias=True), Axis("second.weight", 1)),
    "nearest": (resized("nearest"), Axis("second.weight", 1)),
}


def planned(build: Callable[[], nn.Module]) -> tuple[Plan, nn.Module, Tensor]:
    model, x = build().eval(), torch.randn(IMAGE)
    plan = prunus.plan(prunus.trace(model, x), model, ratio=0.3, importance="random")
    return plan, model, x


def gap(plan: Plan, model: nn.Module, pruned: nn.Module, x: Tensor) -> float:
    return shadow.compare(model, pruned.double(), plan.keep, (x,), {})


@pytest.mark.parametrize("name", MODELS)
def test_it_agrees_and_can_object(name: str) -> None:
    """The axis that consumes a group is cut by other positions: same shapes, another answer."""
    build, axis = MODELS[name]
    plan, model, x = planned(build)
    assert gap(plan, model, cut(plan, model), x) < 1e-12
    gone = sorted(set(range(12)) - set(plan.keep[axis]))
    wrong = tuple(sorted([*plan.keep[axis][1:], gone[0]]))
    assert gap(plan, model, cut(replace(plan, keep={**plan.keep, axis: wrong}), model), x) > 1e-3


def test_an_answer_of_another_shape_is_an_objection() -> None:
    def run(m: Any, x: Tensor) -> Any:
        x = m.first(x)
        return m.head(x), m.second(x)

    plan, model, x = planned(lambda: Net(run, first=conv(3, 8), second=conv(8, 5), head=head(8)))
    pruned = cut(plan, model)
    assert gap(plan, model, pruned, x) < 1e-12
    pruned.second = nn.Sequential(pruned.second, nn.AvgPool2d(2))
    assert gap(plan, model, pruned, x) == float("inf")


def test_it_says_nothing_of_what_it_does_not_know() -> None:
    def mixes(x: Tensor) -> Tensor:
        return torch.linalg.svdvals(x.flatten(2)).unsqueeze(-1).unsqueeze(-1).expand(-1, 12, 8, 8)

    model = between(lambda x: x + 0 * mixes(x).mean())().eval()
    with pytest.raises(shadow.UndecidedError):
        shadow.run(model, {Axis("first.weight", 0): range(5)}, torch.randn(IMAGE))


def test_an_image_of_which_a_part_is_gone_is_not_judged() -> None:
    """Interpolation reads beside the hole."""

    def run(m: Any, x: Tensor) -> Tensor:
        out: Tensor = F.interpolate(x * m.field.weight, scale_factor=2, mode="bilinear")
        return out

    field = nn.LayerNorm([8, 8])
    model = Net(run, field=field).eval()
    with pytest.raises(shadow.UndecidedError, match="a part is gone"):
        shadow.run(model, {Axis("field.weight", 1): range(5)}, torch.randn(IMAGE))
