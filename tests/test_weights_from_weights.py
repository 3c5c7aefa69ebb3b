"""Weights that a forward computes from weights: kept entries keep their values, or are named."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import prunus
from prunus.cli.shrink import show_certificate
from prunus.graph.plans import Plan
from prunus.verifier.permutation import relative_error

WIDTH = 12
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Wrap = Callable[[nn.Module], nn.Module]


def older(norm: Callable[..., nn.Module], **options: Any) -> Wrap:
    def wrap(layer: nn.Module) -> nn.Module:
        with warnings.catch_warnings(action="ignore"):  # deprecated
            return norm(layer, **options)

    return wrap


class Silenced(nn.Module):
    """Two layers, of which the second reads what the first makes, and silences some of it."""

    def __init__(self, first: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.a, self.b = first, last
        self.keep: Tensor | float = 1.0

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        out: Tensor = self.b(h * self.keep if isinstance(self.keep, Tensor) else h)
        return out


def linear(wrap: Wrap, which: str) -> Silenced:
    torch.manual_seed(0)
    a, b = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3)
    return Silenced(wrap(a), b) if which == "producer" else Silenced(a, wrap(b))


def reference(dense: Silenced, plan: Plan, x: Tensor) -> dict[str, Tensor]:
    """Plain PyTorch: the removed units set to zero between the layers."""
    dense.keep = torch.zeros(WIDTH)
    kept = next(k for axis, k in plan.keep.items() if plan.shapes[axis.tensor][axis.dim] == WIDTH)
    dense.keep[list(kept)] = 1
    if x.dim() == 4:
        dense.keep = dense.keep.reshape(-1, 1, 1)
    with torch.no_grad():
        return {"output": dense(x)}


NORMS: dict[str, Wrap] = {
    "parametrization": parametrizations.weight_norm,
    "along the inputs": lambda layer: parametrizations.weight_norm(layer, dim=1),
    "one norm of all": lambda layer: parametrizations.weight_norm(layer, dim=None),  # type: ignore[arg-type]
    "older": older(nn.utils.weight_norm),
    "older, one norm of all": older(nn.utils.weight_norm, dim=None),
}


@pytest.mark.parametrize("which", ["producer", "consumer"])
@pytest.mark.parametrize("name", NORMS)
def test_the_magnitude_makes_up_for_what_goes(name: str, which: str) -> None:
    model, dense = linear(NORMS[name], which).eval(), linear(NORMS[name], which).eval()
    shrunk = prunus.shrink(model, X, ratio=0.4, recover="none")
    assert shrunk.certificate.verdict == "exact"
    assert shrunk.certificate.renormalised == {}
    assert "renormalised" not in shrunk.plan.origin
    with torch.no_grad():
        answer = {"output": model(X)}
    assert relative_error(reference(dense, shrunk.plan, X), answer) < 1e-5


def test_along_the_kernel_of_a_convolution() -> None:
    """As in wav2vec2's positional convolution: a norm for every place of the kernel."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        layer = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        normed = parametrizations.weight_norm(layer, dim=2)
        return nn.Sequential(nn.Conv1d(4, WIDTH, 1), normed, nn.ReLU(), nn.Conv1d(WIDTH, 3, 1))

    model = build().eval()
    certificate = prunus.shrink(model, torch.randn(2, 4, 9), ratio=0.4).certificate
    assert (certificate.verdict, certificate.renormalised) == ("exact", {})
    assert certificate.unverified == ()


def test_a_magnitude_that_is_not_rescaled_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = linear(parametrizations.weight_norm, "consumer").eval()
    graph = prunus.trace(model, X)
    plan = prunus.plan(graph, model, ratio=0.4)
    monkeypatch.setattr(sys.modules["prunus.surgeon.apply"], "make_up", lambda *_: ())
    certificate = prunus.verify(plan, model, X)
    assert certificate.verdict == "inexact"


def test_training_goes_on_with_the_same_magnitude() -> None:
    model = linear(parametrizations.weight_norm, "consumer")
    plan = prunus.plan(prunus.trace(model, X), model, ratio=0.4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    magnitude = model.b.parametrizations.weight.original0
    model(X).square().mean().backward()
    gradient = magnitude.grad.clone()
    prunus.apply(plan, model, optimizer=optimizer)
    assert model.b.parametrizations.weight.original0 is magnitude
    assert torch.equal(magnitude.grad, gradient)
    optimizer.step()
    assert model(X).isfinite().all()


def test_twice_and_composed() -> None:
    model = linear(parametrizations.weight_norm, "consumer").eval()
    fresh = copy.deepcopy(model)
    plans = []
    for ratio in (0.3, 0.3):
        plans.append(prunus.shrink(model, X, ratio=ratio, recover="none").plan)
    prunus.apply(plans[0].then(plans[1]), fresh)
    with torch.no_grad():
        torch.testing.assert_close(fresh(X), model(X))


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = linear(parametrizations.weight_norm, "consumer").eval()
    prunus.shrink(model, X, ratio=0.4, recover="none")
    prunus.save(model, tmp_path / "model.safetensors")
    loaded = prunus.load(
        tmp_path / "model.safetensors",
        build=lambda: linear(parametrizations.weight_norm, "consumer"),
    ).eval()
    with torch.no_grad():
        assert torch.equal(loaded(X), model(X))


# -- what no parameter absorbs ---------------------------------------------------------------------


class Computed(nn.Linear):
    """A linear layer whose weight is a function of its parameter."""

    def __init__(self, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__(WIDTH, 5)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.how(self.weight), self.bias)


class Standardised(nn.Conv2d):
    """As in BiT and NFNet."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(rows, None, None, training=True, momentum=0.0)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, padding=1)


class StandardisedByHand(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        deviation, mean = torch.std_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (deviation + 1e-6), self.bias, padding=1)


class Gates(nn.Linear):
    """Factors of the inputs that are a softmax of a parameter."""

    def __init__(self) -> None:
        super().__init__(WIDTH, 3)
        self.gates = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.gates.softmax(0))


def computed(how: Callable[[Tensor], Tensor]) -> Callable[[], Silenced]:
    return lambda: Silenced(nn.Linear(4, WIDTH), Computed(how))


def standardised(kind: Callable[..., nn.Module]) -> Callable[[], Silenced]:
    return lambda: Silenced(nn.Conv2d(3, WIDTH, 3, padding=1), kind(WIDTH, 4, 3))


RENORMALISED: dict[str, tuple[Callable[[], Silenced], Tensor]] = {
    "spectral norm": (lambda: linear(parametrizations.spectral_norm, "consumer"), X),
    "spectral norm before": (lambda: linear(parametrizations.spectral_norm, "producer"), X),
    "spectral norm, older": (lambda: linear(older(nn.utils.spectral_norm), "consumer"), X),
    "normalised": (computed(lambda w: F.normalize(w, dim=1)), X),
    "softmax": (computed(lambda w: w.softmax(1)), X),
    "centred": (computed(lambda w: w - w.mean(1, keepdim=True)), X),
    "weight norm by hand": (computed(lambda w: w / w.norm(dim=1, keepdim=True)), X),
    "standardised": (standardised(Standardised), IMAGES),
    "standardised by hand": (standardised(StandardisedByHand), IMAGES),
    "gates": (lambda: Silenced(nn.Linear(4, WIDTH), Gates()), X),
}  # fmt: skip


@pytest.mark.parametrize("name", RENORMALISED)
def test_what_changes_kept_weights_is_named(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    build, x = RENORMALISED[name]
    torch.manual_seed(0)
    model = build().eval()
    dense = copy.deepcopy(model)
    plan = prunus.plan(prunus.trace(model, x), model, ratio=0.4)
    certificate = prunus.verify(plan, model, x, randomise=False)
    assert certificate.verdict == "exact"
    (group,) = certificate.renormalised
    assert plan.origin["renormalised"] == (group,)
    assert Plan.from_json(plan.to_json()) == plan
    show_certificate(certificate, "")
    assert f"Kept weights change with what is removed: {group}" in capsys.readouterr().out
    prunus.apply(plan, model)
    with torch.no_grad():
        answer = {"output": model(x)}
    by_hand = relative_error(reference(dense, plan, x), answer)
    assert certificate.renormalised[group] == pytest.approx(by_hand, rel=1e-3)
    assert by_hand > 1e-2


class Position(nn.Module):
    """Factors that a small network of its own makes of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3)
        self.net = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, WIDTH))
        self.register_buffer("table", torch.randn(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x) * self.net(self.table))
        return out


class Factored(nn.Module):
    """A weight that is a product of two: its rank is pruned like any other width."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = (
            nn.Parameter(torch.randn(WIDTH, 4)),
            nn.Parameter(torch.randn(9, WIDTH)),
        )
        self.b = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(F.linear(x, self.up @ self.down).relu())
        return out


class Queries(nn.Module):
    """Learned queries, normalised like data."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, 5, WIDTH))
        self.norm, self.q = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.a, self.b = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        keys = self.a(x)[:, None]
        scores = (self.q(self.norm(self.queries)) @ keys.transpose(1, 2)).tanh()
        out: Tensor = self.b((scores * keys + self.queries).mean(1))
        return out


@pytest.mark.parametrize(
    "build",
    [Position, Factored, Queries, computed(lambda w: F.normalize(w, dim=0))],
    ids=["network", "product", "queries", "norm of each column"],
)
def test_what_leaves_kept_weights_alone_is_not(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    certificate = prunus.shrink(build().eval(), X, ratio=0.4).certificate
    assert (certificate.verdict, certificate.renormalised) == ("exact", {})
