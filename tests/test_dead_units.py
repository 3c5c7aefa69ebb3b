"""Training that is cut half-way goes on as if the removed units had been dead all along."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import prunus
from prunus.api import keep
from tests.test_optimizer_state import Lion, Nested, muon, musgd

AdamW, SGD = torch.optim.AdamW, torch.optim.SGD

ELEMENTWISE: dict[str, Callable[[Any], Any]] = {
    "sgd": lambda p: SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw fused": lambda p: AdamW(p, lr=0.01, fused=True),
    "adamw foreach": lambda p: AdamW(p, lr=0.01, foreach=True),
    "adamw amsgrad": lambda p: AdamW(p, lr=0.01, amsgrad=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "adadelta": torch.optim.Adadelta,
    "adamax": torch.optim.Adamax,
    "asgd": torch.optim.ASGD,
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.001),
    "lion": Lion,
    "nested": Nested,
}

OTHERS: dict[str, Callable[[Any], Any]] = {
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.02),
    "muon": muon,
    "musgd": musgd,
    "lbfgs": lambda p: torch.optim.LBFGS(p, max_iter=5, line_search_fn="strong_wolfe"),
}
"""Those that mix the entries of a parameter, so that its size matters to every one of them."""


class Dense(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, width), nn.Linear(width, 5), nn.Linear(5, 3)
        self.norm = nn.LayerNorm(5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c(self.norm(self.b(self.a(x).relu())).tanh())
        return out


class Convolved(nn.Module):
    """Without a bias in front of the norm, whose gradient would be rounding errors alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv1d(1, width, 3, bias=False), nn.BatchNorm1d(width)
        self.b = nn.Conv1d(width, 3, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.norm(self.a(x[:, None])).relu())[..., 0]
        return out


class Run:
    """A network in training, some units of which are dead: nothing goes in or comes out."""

    def __init__(self, kind: type[nn.Module], width: int, dead: set[int], make: Any) -> None:
        self.model = kind(width).double()
        chance = torch.Generator().manual_seed(width)
        self.x = torch.randn(64, 6, generator=chance, dtype=torch.double)
        self.y = torch.randn(64, 3, generator=chance, dtype=torch.double)
        self.live = [unit for unit in range(width) if unit not in dead]
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name.startswith("a.") or (kind is Convolved and name.startswith("norm.")):
                    parameter[list(dead)] = 0
            self.model.b.weight[:, list(dead)] = 0
        self.optimizer = make(list(self.model.parameters()))

    def loss(self) -> Tensor:
        return (self.model(self.x) - self.y).square().mean()

    def steps(self, count: int) -> None:
        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        for _ in range(count):
            self.optimizer.step(closure)

    def cut(self) -> prunus.Plan:
        graph = prunus.trace(self.model, self.x)
        (group,) = (one.name for one in graph.groups if "tensor='a.weight', dim=0" in str(one))
        plan = keep(copy.deepcopy(self.model), group, self.live, self.x).plan
        prunus.apply(plan, self.model, optimizer=self.optimizer)
        assert len(self.model.a.weight) == len(self.live)
        return plan


def both(kind: type[nn.Module], width: int, dead: set[int], make: Any, k: int) -> Any:
    """A masked run of 2k steps, and one that is cut after k of them, with the plan."""
    masked, smaller = (run(kind, width, dead, make) for _ in range(2))
    masked.steps(2 * k)
    smaller.steps(k)
    plan = smaller.cut()
    smaller.steps(k)
    return masked, smaller, plan


def run(kind: type[nn.Module], width: int, dead: set[int], make: Any) -> Run:
    torch.manual_seed(width)
    return Run(kind, width, dead, make)


def kept_of(plan: prunus.Plan, name: str, tensor: Tensor) -> Tensor:
    for axis, kept in plan.keep.items():
        if axis.tensor == name:
            tensor = tensor.index_select(axis.dim, torch.tensor(kept))
    return tensor


@pytest.mark.parametrize("name", ELEMENTWISE)
@settings(max_examples=3, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(st.data())
def test_training_goes_on_as_with_dead_units(name: str, data: st.DataObject) -> None:
    """Every parameter, and all that the optimizer keeps for it, to 1e-5."""
    kind = data.draw(st.sampled_from([Dense, Convolved]))
    width = data.draw(st.integers(7, 12))
    dead = data.draw(st.sets(st.integers(0, width - 1), min_size=1, max_size=width - 1))
    k = data.draw(st.integers(1, 5))
    masked, smaller, plan = both(kind, width, dead, ELEMENTWISE[name], k)
    before = run(kind, width, dead, ELEMENTWISE[name])
    for (path, wanted), found in zip(
        masked.model.named_parameters(), smaller.model.parameters(), strict=True
    ):
        torch.testing.assert_close(found, kept_of(plan, path, wanted), rtol=1e-5, atol=1e-8)
        assert not torch.equal(wanted, before.model.get_parameter(path))
        state = masked.optimizer.state[wanted]
        for key, value in smaller.optimizer.state[found].items():
            if isinstance(value, Tensor) and value.shape == found.shape:
                old = kept_of(plan, path, state[key])
                torch.testing.assert_close(value, old, rtol=1e-5, atol=1e-8)


@pytest.mark.filterwarnings("ignore:LBFGS")
@pytest.mark.parametrize("width", [8, 12])
@pytest.mark.parametrize("name", OTHERS)
def test_optimizers_that_mix_entries_go_on_nearly_so(name: str, width: int) -> None:
    dead = set(range(1, width, 3))
    masked, smaller, _ = both(Dense, width, dead, OTHERS[name], 10)
    first = run(Dense, width, dead, OTHERS[name]).loss()
    wanted, found = masked.loss(), smaller.loss()
    assert wanted < 0.995 * first
    assert abs(found - wanted) < 0.05 * wanted
    for parameter, state in smaller.optimizer.state.items():
        assert bool(parameter.isfinite().all())
        held = [one for one in state.values() if isinstance(one, Tensor)]
        assert all(bool(one.isfinite().all()) for one in held)


def test_hooks_groups_and_the_scaler_go_on() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(5, 4)
    optimizer = SGD(
        [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters()}],
        lr=0.2, momentum=0.9,
    )  # fmt: skip
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    seen: list[tuple[int, ...]] = []
    weight = model[0].weight
    weight.register_hook(lambda grad: seen.append(tuple(grad.shape)))
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(tuple(p.grad.shape)))
    model[0].bias.requires_grad_(False)

    def step() -> None:
        optimizer.zero_grad()
        scaler.scale(model(x).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()

    step()
    groups = [id(group) for group in optimizer.param_groups]
    plan = prunus.plan(prunus.trace(model, x), model, ratio=0.5)
    prunus.apply(plan, model, optimizer=optimizer, scheduler=schedule)
    assert model[0].weight is weight
    assert [id(group) for group in optimizer.param_groups] == groups
    assert not model[0].bias.requires_grad
    step()
    assert seen == [(8, 4), (8, 4), (4, 4), (4, 4)]
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.05]
    assert scaler.get_scale() == 8.0
