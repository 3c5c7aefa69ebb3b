"""Tensors that are no state: what a forward leaves behind, sparse tables, unfilled observers."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import prunus
from prunus.errors import FormatError, ModelError, PrunusError
from prunus.graph.plans import Plan


class Keeps(nn.Module):
    """Leaves a feature on itself, under a name that it declares or not."""

    def __init__(self, declared: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)
        if declared:
            self.feature = None

    def forward(self, x: Tensor) -> Tensor:
        self.feature = torch.relu(self.a(x))
        return self.b(self.feature)


class Neuron(nn.Module):
    """Its potential is a number until it has seen data, and is read before it is written."""

    def __init__(self) -> None:
        super().__init__()
        self.v: float | Tensor = 0.0

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.v, float):
            self.v = torch.full_like(x, self.v)
        self.v = self.v + (x - self.v) / 2
        spike = (self.v >= 0.3).float()
        self.v = self.v * (1 - spike)
        return spike


class Spiking(nn.Module):
    def __init__(self, resets: bool = True) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Linear(6, 16), Neuron(), nn.Linear(16, 3)
        self.resets = resets

    def forward(self, x: Tensor) -> Tensor:
        if self.resets:
            self.n.v = 0.0
        answer: Tensor = sum(self.b(self.n(self.a(x))) for _ in range(3)) / 3  # type: ignore[assignment]
        return answer


class Masked(nn.Module):
    """Registers a hidden buffer at its first forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        if "mask" not in self._buffers:
            self.register_buffer("mask", torch.ones(3), persistent=False)
        return self.b(self.a(x).relu()) * self.mask


BUILDS = {
    "feature": Keeps,
    "declared": lambda: Keeps(declared=True),
    "reset": Spiking,
    "stateful": lambda: Spiking(resets=False),
    "hidden buffer": Masked,
}

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def ran(name: str) -> nn.Module:
    """A model that was evaluated, as everybody does before pruning."""
    torch.manual_seed(0)
    model: nn.Module = BUILDS[name]().eval()
    with torch.no_grad():
        model(X)
    return model


@pytest.mark.parametrize("name", BUILDS)
def test_a_plan_of_a_model_that_has_run_fits_a_fresh_copy(name: str) -> None:
    model = ran(name)
    plan = prunus.plan(prunus.trace(model, X), model, ratio=0.5)
    assert "feature" not in plan.shapes
    plan = Plan.from_json(plan.to_json())
    fresh = BUILDS[name]().eval()
    if name == "hidden buffer":
        with pytest.raises(PrunusError, match="the model has no mask"):
            prunus.apply(plan, fresh)
        fresh(X)
    fresh.load_state_dict(model.state_dict())
    with prunus.mask(plan, fresh), torch.no_grad():
        masked = fresh(X)
    fresh = BUILDS[name]().eval() if name != "hidden buffer" else fresh
    fresh.load_state_dict(model.state_dict())
    prunus.apply(plan, fresh)
    assert sum(p.numel() for p in fresh.parameters()) < sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        assert torch.allclose(fresh(X), masked, atol=1e-5)


@pytest.mark.parametrize("name", BUILDS)
def test_what_was_pruned_and_has_run_loads(name: str, tmp_path: Path) -> None:
    model = ran(name)
    prunus.shrink(model, X, ratio=0.5)
    with torch.no_grad():
        model(X)
        prunus.save(model, tmp_path / "m.safetensors")
        if name == "stateful":
            model.n.v = 0.0  # type: ignore[union-attr]
        want = model(X)
        loaded = prunus.load(tmp_path / "m.safetensors", build=BUILDS[name]).eval()
        assert torch.equal(loaded(X), want)


def test_two_cuts_with_a_run_in_between_compose(tmp_path: Path) -> None:
    model = Spiking(resets=False).eval()
    for _ in range(2):
        plan = prunus.plan(prunus.trace(model, X), model, ratio=0.4)
        prunus.apply(plan, model)
        with torch.no_grad():
            model(X)
    prunus.save(model, tmp_path / "m.safetensors")
    prunus.load(tmp_path / "m.safetensors", build=BUILDS["stateful"])


def test_what_was_not_pruned_loads_or_says_what_to_reset(tmp_path: Path) -> None:
    for name in ("feature", "declared", "hidden buffer"):
        model = ran(name)
        prunus.save(model, tmp_path / "m.safetensors")
        loaded = prunus.load(tmp_path / "m.safetensors", build=BUILDS[name]).eval()
        assert torch.equal(loaded(X), model(X))
    prunus.save(ran("reset"), tmp_path / "m.safetensors")
    with pytest.raises(FormatError, match=r"n.v(.|\n)*a float(.|\n)*reset what its forward writes"):
        prunus.load(tmp_path / "m.safetensors", build=Spiking)


class Graph(nn.Module):
    """A graph convolution with a sparse adjacency, which is no buffer or a hidden one."""

    def __init__(self, hidden: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)
        adjacency = torch.eye(4).to_sparse()
        if hidden:
            self.register_buffer("adjacency", adjacency, persistent=False)
        else:
            self.adjacency = adjacency

    def forward(self, x: Tensor) -> Tensor:
        return self.adjacency @ self.b((self.adjacency @ self.a(x)).relu())


@pytest.mark.parametrize("hidden", [False, True])
def test_a_sparse_table_does_not_stop_save(hidden: bool, tmp_path: Path) -> None:
    model = Graph(hidden).eval()
    prunus.shrink(model, X, ratio=0.5)
    prunus.save(model, tmp_path / "m.safetensors")
    loaded = prunus.load(tmp_path / "m.safetensors", build=lambda: Graph(hidden)).eval()
    assert torch.equal(loaded(X), model(X))
    assert loaded.adjacency.is_sparse


def test_a_sparse_part_of_the_state_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    model.register_buffer("adjacency", torch.eye(4).to_sparse())
    with pytest.raises(FormatError, match=r"sparse(.|\n)*adjacency"):
        prunus.save(model, tmp_path / "m.safetensors")


def _quantization_aware() -> nn.Module:
    import torch.ao.quantization as quantization

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4)).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.qconfig = quantization.get_default_qat_qconfig("fbgemm")  # type: ignore[assignment]
        prepared: nn.Module = quantization.prepare_qat(model)
    return prepared


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("prune", [False, True])
def test_observers_that_were_empty_are_filled(prune: bool, tmp_path: Path) -> None:
    model, x = _quantization_aware(), torch.randn(2, 3, 3, 3)
    model(x)
    model.eval()
    if prune:
        prunus.apply(prunus.plan(prunus.trace(model, x), model, ratio=0.5), model)
    prunus.save(model, tmp_path / "m.safetensors")
    loaded = prunus.load(tmp_path / "m.safetensors", build=_quantization_aware).eval()
    assert torch.equal(loaded(x), model(x))


def _lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(6, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(4))


def test_lazy_modules_are_to_be_run_once(tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = _lazy().eval()
        model(torch.zeros(1, 3, 5, 5))
        return model

    model, x = build(), torch.randn(2, 3, 5, 5)
    prunus.shrink(model, x, ratio=0.5)
    prunus.save(model, tmp_path / "m.safetensors")
    with pytest.raises(ModelError, match=r"lazy modules(.|\n)*run the model once in build="):
        prunus.load(tmp_path / "m.safetensors", build=_lazy)
    assert torch.equal(prunus.load(tmp_path / "m.safetensors", build=build).eval()(x), model(x))
