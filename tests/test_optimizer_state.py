"""What an optimizer keeps follows a cut axis by axis, is refused by name, or is dropped aloud."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import prunus
from prunus.errors import ApplyError
from prunus.graph.plans import Plan
from tests.snapshots import same, snapshot

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


def net(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    sizes = (6, *(widths or (16, 20)), 3)
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def step(model: nn.Module, optimizer: Any) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(X) ** 2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)


def halved(model: nn.Module) -> Plan:
    return prunus.plan(prunus.trace(model, X), model, ratio=0.5)


class Lion(torch.optim.Optimizer):
    """A user's own."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        with torch.enable_grad():
            closure()
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                p -= group["lr"] * average.lerp(p.grad, 0.1).sign()
                average.lerp_(p.grad, 0.01)


class Nested(Lion):
    """State in containers, by parameter, and beside the state."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.slow = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]
        self.norms = {p: p.detach().norm(dim=-1) for g in self.param_groups for p in g["params"]}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group, slow in zip(self.param_groups, self.slow, strict=True):
            for p, old in zip(group["params"], slow, strict=True):
                old.lerp_(p, 0.5)
                past = self.state[p].setdefault("past", {"grads": [], "last": (0, p.grad)})
                past["grads"] = [*past["grads"][-1:], p.grad.clone()]
                past["last"] = (past["last"][0] + 1, p.grad.clone())
                self.norms[p].copy_(p.norm(dim=-1))


class SAM(torch.optim.Optimizer):
    """A wrapper around another optimizer, which has the state."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"rho": 0.05})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=0.1, momentum=0.9)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        with torch.enable_grad():
            closure()
        for p in self.param_groups[0]["params"]:
            self.state[p]["old"] = p.detach().clone()
            p += 0.05 * p.grad
        with torch.enable_grad():
            closure()
        for p in self.param_groups[0]["params"]:
            p.copy_(self.state[p]["old"])
        self.base_optimizer.step()


def muon(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Muon([p for p in params if p.dim() == 2])


def musgd(params: Any) -> torch.optim.Optimizer:
    kind = pytest.importorskip("ultralytics.optim.muon").MuSGD
    groups = {True: [], False: []}
    for p in params:
        groups[p.dim() == 2].append(p)
    return kind([{"params": ps, "use_muon": use, "momentum": 0.9} for use, ps in groups.items()])


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": torch.optim.Adam,
    "amsgrad": lambda p: torch.optim.AdamW(p, amsgrad=True, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, fused=True),
    "tensor rate": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-3), foreach=False),
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.1),
    "adadelta": torch.optim.Adadelta,
    "adamax": torch.optim.Adamax,
    "asgd": torch.optim.ASGD,
    "rprop": torch.optim.Rprop,
    "adafactor": torch.optim.Adafactor,
    "muon": muon,
    "musgd": musgd,
    "lion": Lion,
    "nested": Nested,
    "sam": SAM,
}


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [t for v in items for t in tensors(v)] if hasattr(items, "__iter__") else []


def by_hand(value: Tensor, shape: tuple[int, ...], keep: dict[int, list[int]]) -> Tensor:
    """What numpy leaves of a state whose dims are the parameter's, or 1, or all but the last."""
    array = value.numpy()
    for dim in range(array.ndim):
        if dim in keep and array.shape[dim] == shape[dim]:
            array = np.take(array, keep[dim], axis=dim)
    return torch.from_numpy(array)


def held(optimizer: Any, parameter: Tensor) -> list[Tensor]:
    """All that is kept for a parameter, inner optimizers and own attributes included."""
    found = tensors(optimizer.state.get(parameter, {}))
    if isinstance(optimizer, SAM):
        found += tensors(optimizer.base_optimizer.state[parameter])
    if isinstance(optimizer, Nested):
        place = [id(p) for p in optimizer.param_groups[0]["params"]].index(id(parameter))
        found += [optimizer.slow[0][place], optimizer.norms[parameter]]
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_what_slicing_by_hand_gives_and_training_goes_on(name: str) -> None:
    model = net()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    step(model, optimizer)
    step(model, optimizer)
    plan = halved(model)
    before = {
        n: (tuple(p.shape), [t.clone() for t in held(optimizer, p)])
        for n, p in model.named_parameters()
    }
    assert sum(t.numel() > 1 for _, found in before.values() for t in found) > 1
    prunus.apply(plan, model, optimizer=optimizer)
    for path, parameter in model.named_parameters():
        shape, old = before[path]
        keep = {a.dim: list(stay) for a, stay in plan.keep.items() if a.tensor == path}
        wanted = [by_hand(value, shape, keep) for value in old]
        assert same(held(optimizer, parameter), wanted), path
    rows = [p.shape for p in model.parameters()]
    step(model, optimizer)
    assert [p.shape for p in model.parameters()] == rows
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_sparse_gradients() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 8, sparse=True), nn.Flatten(), nn.Linear(24, 4))
    tokens = torch.tensor([[1, 4, 7]])
    optimizer = torch.optim.SparseAdam([model[0].weight])
    model(tokens).sum().backward()
    optimizer.step()
    graph = prunus.trace(model, tokens)
    plan = prunus.plan(graph, model, ratio=0.5)
    average = optimizer.state[model[0].weight]["exp_avg"].clone()
    (stay,) = (stay for axis, stay in plan.keep.items() if axis.tensor == "0.weight")
    prunus.apply(plan, model, optimizer=optimizer)
    assert torch.equal(optimizer.state[model[0].weight]["exp_avg"], average[:, list(stay)])
    assert model[0].weight.grad.shape == model[0].weight.shape
    optimizer.zero_grad()
    model(tokens).sum().backward()
    optimizer.step()


def test_lbfgs_begins_anew_and_says_so() -> None:
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    step(model, optimizer)
    with pytest.warns(UserWarning, match="LBFGS: the history of earlier steps was dropped"):
        prunus.apply(halved(model), model, optimizer=optimizer)
    assert not any(optimizer.state.values())
    step(model, optimizer)
    step(model, optimizer)


def test_lbfgs_is_whole_after_a_failure() -> None:
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    step(model, optimizer)
    before, state = snapshot(model), copy.deepcopy(optimizer.state_dict())
    plan = halved(model)
    plan.origin["traced"]["outputs"]["output"] = [1]
    with pytest.raises(ApplyError), pytest.warns(UserWarning, match="history"):
        prunus.apply(plan, model, optimizer=optimizer)
    assert same(snapshot(model), before)
    assert same(optimizer.state_dict(), state)
    step(model, optimizer)


class Kept(Lion):
    """Lion, with something more in the state of the first weight."""

    def __init__(self, params: Any, more: Callable[[Tensor], Any]) -> None:
        super().__init__(params)
        self.state[self.param_groups[0]["params"][2]]["more"] = more(
            self.param_groups[0]["params"][2]
        )


class Sums:
    def __init__(self, value: Tensor) -> None:
        self.value = value


REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "flat": (lambda p: torch.ones(p.numel()), r"tensor of shape \(256,\)"),
    "one of two like dims": (lambda p: torch.ones(16), r"shape \(16,\), whose dims may be several"),
    "8 bits": (lambda p: torch.ones_like(p, dtype=torch.uint8), "codes in blocks"),
    "blocks": (lambda p: torch.ones(p.numel() // 8), r"tensor of shape \(32,\)"),
    "products": (lambda p: [p.detach() @ p.detach().T], r"more\[0\](.|\n)*symmetric matrix"),
    "an object": (lambda p: {"sums": Sums(torch.ones(3))}, r"a Sums that holds tensors"),
    "a history": (lambda p: torch.ones(2, *p.shape), r"tensor of shape \(2, 16, 16\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_shapes_do_not_tell_is_refused_by_name(name: str) -> None:
    more, told = REFUSED[name]
    model = net(16, 16)
    optimizer = Kept(model.parameters(), more)
    graph = prunus.trace(model, X)
    plan = prunus.plan(graph, model, ratios={graph.groups[0].name: 0.5})
    before = snapshot(model)
    with pytest.raises(ApplyError, match="the state of Kept can't be cut along") as caught:
        prunus.apply(plan, model, optimizer=optimizer)
    message = str(caught.value)
    assert "more" in message
    assert "2.weight" in message
    assert "(16, 16)" in message
    assert re.search(told, message)
    assert same(snapshot(model), before)


def test_a_vector_that_can_only_be_one_dim_follows() -> None:
    model = net(16, 20)
    optimizer = Kept(model.parameters(), lambda p: {"rows": torch.arange(20.0), "count": 3})
    plan = halved(model)
    prunus.apply(plan, model, optimizer=optimizer)
    stay = next(s for a, s in plan.keep.items() if (a.tensor, a.dim) == ("2.weight", 0))
    found = optimizer.state[model[2].weight]["more"]
    assert found["rows"].tolist() == list(stay)
    assert found["count"] == 3


def test_tensors_of_no_parameter_are_refused() -> None:
    model = net()
    optimizer = Lion(model.parameters())
    optimizer.trust = torch.ones(7)
    with pytest.raises(ApplyError, match="the state of Lion can't be cut along: 'trust'"):
        prunus.apply(halved(model), model, optimizer=optimizer)
    del optimizer.trust
    optimizer.known = list(model.parameters())[::-1]  # only its own parameters
    prunus.apply(halved(model), model, optimizer=optimizer)


def test_the_optimizer_of_another_model_is_refused() -> None:
    model = net()
    before = snapshot(model)
    wrong = torch.optim.Adam(net().parameters())
    with pytest.raises(ApplyError, match=r"\(Adam\) holds none of the model's parameters"):
        prunus.apply(halved(model), model, optimizer=wrong)
    assert same(snapshot(model), before)
    some = torch.optim.Adam(model[0].parameters())
    step(model, some)
    prunus.apply(halved(model), model, optimizer=some)
    step(model, some)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(self.up(x).tanh())
        return out


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("make", [torch.optim.Adam, SAM, torch.optim.LBFGS])
def test_dropped_blocks_leave_every_group(make: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    model = Blocks()
    optimizer = make(list(model.parameters()))
    step(model, optimizer)
    gone = {id(p) for p in model.layers[1].parameters()}
    plan = prunus.plan(prunus.trace(model, X), model, drop=["layers.1"])
    if make is torch.optim.LBFGS:
        with pytest.warns(UserWarning, match="history"):
            prunus.apply(plan, model, optimizer=optimizer)
    else:
        prunus.apply(plan, model, optimizer=optimizer)
    for one in (optimizer, getattr(optimizer, "base_optimizer", optimizer)):
        assert gone.isdisjoint(id(p) for group in one.param_groups for p in group["params"])
        assert gone.isdisjoint(map(id, one.state))
    step(model, optimizer)


class Slow(torch.optim.Optimizer):
    """Keeps averages in the state of optimizers that it holds under names of its own."""

    def __init__(self, *inside: torch.optim.Optimizer, listed: bool) -> None:
        self.param_groups = [group for one in inside for group in one.param_groups]
        self.defaults: dict[str, Any] = {}
        self.state = defaultdict(dict)
        if listed:
            self.parts = list(inside)
        else:
            (self._fast,) = inside

    def step(self, closure: Any = None) -> None:
        for one in self.parts if hasattr(self, "parts") else [self._fast]:
            one.step()
            for parameter in one.param_groups[0]["params"]:
                slow = one.state[parameter].setdefault("slow", parameter.detach().clone())
                parameter.data.copy_(slow.lerp_(parameter.detach(), 0.5))


@pytest.mark.parametrize("listed", [False, True])
def test_optimizers_inside_are_found_under_any_name(listed: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    first, second = list(model[0].parameters()), list(model[2].parameters())
    if listed:
        inside = [torch.optim.Adam(first), torch.optim.SGD(second, 0.1, momentum=0.9)]
    else:
        inside = [torch.optim.Adam(first + second)]
    optimizer = Slow(*inside, listed=listed)
    x = torch.randn(5, 4)
    model(x).square().sum().backward()
    optimizer.step()
    prunus.shrink(model, x, ratio=0.5, optimizer=optimizer, recover="none")
    for one in inside:
        for parameter, state in one.state.items():
            assert state["slow"].shape == parameter.shape
            torch.testing.assert_close(state["slow"], parameter.detach())
    model(x).square().sum().backward()
    optimizer.step()
