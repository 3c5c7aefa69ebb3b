"""Models that are entered by a method or a function in place of their forward."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import prunus


class Encoder(nn.Module):
    """Its forward takes a path that nothing here is interested in."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.mixer = nn.Conv2d(8, 16, 3)
        self.head = nn.Linear(16, 5)
        self.other = nn.Linear(16, 8)

    def encode(self, x: Tensor) -> Tensor:
        return self.head(self.mixer(self.norm(self.stem(x)).relu()).relu().mean((2, 3)))

    def forward(self, x: Tensor, *, wide: bool) -> Tensor:
        return self.other(self.mixer(self.stem(x)).mean((2, 3)))


def both(model: nn.Module, x: Tensor) -> Tensor:
    """Calls the model itself as well."""
    answer: Tensor = model.encode(x).sum(1) + model(x, wide=True).sum(1)  # type: ignore[operator]
    return answer


@pytest.fixture
def model() -> Encoder:
    torch.manual_seed(0)
    return Encoder().eval()


X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))


def test_a_method_by_name_is_what_runs(model: Encoder) -> None:
    before = copy.deepcopy(model)
    graph = prunus.trace(model, X, forward_fn="encode")
    assert graph.traced["forward_fn"] == {"method": "encode"}
    assert not any(axis.tensor.startswith("other") for axis in graph.labels)
    plan = prunus.plan(graph, model, budget=prunus.Budget(macs=0.5))
    assert prunus.verify(plan, model, forward_fn="encode").verdict == "exact"
    with prunus.mask(plan, model, forward_fn="encode"):
        masked = model(X)  # type: ignore[call-arg]
    prunus.apply(prunus.Plan.from_json(plan.to_json()), model, forward_fn="encode")
    assert torch.allclose(model.encode(X), masked, atol=1e-5)
    assert not torch.allclose(model.encode(X), before.encode(X), atol=1e-3)
    assert "forward" not in vars(model)


def test_a_function_may_call_the_model_itself(model: Encoder) -> None:
    graph = prunus.trace(model, X, forward_fn=both)
    assert graph.traced["forward_fn"] == {"function": "both"}
    assert any(axis.tensor.startswith("other") for axis in graph.labels)
    plan = prunus.plan(graph, model, ratio=0.5)
    assert prunus.verify(plan, model, forward_fn=both).verdict == "exact"
    with prunus.mask(plan, model, forward_fn=both):
        masked = model(X)  # type: ignore[call-arg]
    prunus.apply(plan, model, forward_fn=both)
    assert torch.allclose(both(model, X), masked, atol=1e-5)


def test_a_plan_of_a_function_asks_for_it(model: Encoder) -> None:
    plan = prunus.plan(prunus.trace(model, X, forward_fn=both), model, ratio=0.5)
    width = model.mixer.out_channels
    with pytest.raises(prunus.PrunusError, match=r"both\(model, \.\.\.\)[^$]*forward_fn="):
        prunus.apply(plan, model)
    with pytest.raises(prunus.PrunusError, match="forward_fn="):
        prunus.verify(plan, model)
    assert model.mixer.out_channels == width
    prunus.apply(plan, model, check=False)
    assert model.mixer.out_channels == width // 2


def test_a_plan_of_a_method_asks_for_it_and_calls_nothing_by_itself(model: Encoder) -> None:
    plan = prunus.plan(prunus.trace(model, X, forward_fn="encode"), model, ratio=0.5)
    model.encode = pytest.fail  # type: ignore[assignment, method-assign]
    for use in (prunus.apply, prunus.verify, lambda p, m: prunus.mask(p, m).__enter__()):
        with pytest.raises(
            prunus.PrunusError, match=r"model.encode\(\.\.\.\)[^$]*forward_fn='encode'"
        ):
            use(plan, model)
    assert model.mixer.out_channels == 16


def test_a_method_that_is_not_there(model: Encoder) -> None:
    with pytest.raises(prunus.PrunusError, match="no method 'embed'"):
        prunus.trace(model, X, forward_fn="embed")
    assert "forward" not in vars(model)


@pytest.mark.parametrize("forward_fn", ["encode", both])
def test_shrink_runs_it_on_every_batch(model: Encoder, forward_fn: Any) -> None:
    batches = [(X + n, torch.zeros(2)) for n in range(3)]
    before = model.norm.running_mean
    shrunk = prunus.shrink(
        *(model, X),
        budget=prunus.Budget(macs=0.6),
        data=batches,
        importance="activation",
        forward_fn=forward_fn,
    )
    assert shrunk.certificate is not None
    assert shrunk.certificate.verdict == "exact"
    assert model.norm.running_mean is not before
    assert "forward" not in vars(model)


def test_an_entry_of_its_own_is_put_back(model: Encoder) -> None:
    def own(x: Tensor) -> Tensor:
        return x

    model.forward = own  # type: ignore[assignment]
    prunus.trace(model, X, forward_fn="encode")
    assert model.forward is own


def test_blocks_of_a_model_that_is_entered_elsewhere() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(4)
            )

        def run(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    torch.manual_seed(0)
    stack = Stack().eval()
    x = torch.randn(2, 5, 8)
    shrunk = prunus.shrink(stack, x, forward_fn="run", drop=["layers.1"])
    assert shrunk.certificate is not None
    assert shrunk.certificate.verdict == "exact"
    assert len(stack.layers) == 3
    assert np.isfinite(stack.run(x).detach().numpy()).all()
