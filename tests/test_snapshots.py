"""A snapshot tells every change that surgery could make."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.snapshots import same, snapshot


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Linear(8, 4))


def set_to(value: float) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        model[3].bias.data[0] = value

    return change


def renew(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "a value": set_to(1.5),
    "the sign of a zero": set_to(-0.0),
    "a NaN": set_to(float("nan")),
    "a parameter of the same values": renew,
    "an attribute": lambda m: setattr(m[1], "num_features", 7),
    "a mode": lambda m: m[1].eval(),
    "a hook": lambda m: m[2].register_forward_hook(lambda *_: None),
    "a gradient": lambda m: setattr(m[0].bias, "grad", torch.ones(8)),
    "a buffer": lambda m: m[1].running_mean.add_(1),
    "a type": lambda m: m.double(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(name: str) -> None:
    model = net()
    model[3].bias.data[0] = 0.0
    before = snapshot(model)
    assert same(snapshot(model), before)
    CHANGES[name](model)
    assert not same(snapshot(model), before)


def test_a_nan_that_stays_is_no_change() -> None:
    model = net()
    set_to(float("nan"))(model)
    assert same(snapshot(model), snapshot(model))
