"""Operators of every kind between two layers: pruned exactly, or pinned with the reason."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import prunus
from prunus.tracer.trace import trace

WIDTH = 16
VECTORS, IMAGES = torch.randn(4, 6), torch.randn(2, 3, 8, 8)
Op = Callable[[Tensor], Tensor]


class Between(nn.Module):
    """An operator on what one layer makes, and another layer that reads the outcome."""

    def __init__(self, op: Op, *, image: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first: nn.Module = nn.Conv2d(3, WIDTH, 3, padding=1) if image else nn.Linear(6, WIDTH)
        self.op = op
        with torch.no_grad():
            width = op(self.first(IMAGES if image else VECTORS)).shape[1]
        self.last: nn.Module = nn.Conv2d(width, 4, 1) if image else nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.op(self.first(x)))
        return out


def over(h: Tensor) -> Tensor:
    """Where three of four rows go."""
    return torch.tensor([0, 1, 2, 0])[:, None].expand_as(h)


ON_VECTORS: dict[str, Op] = {
    "max": lambda h: h * torch.max(h, 1, keepdim=True)[0],
    "min": lambda h: h * h.min(1, keepdim=True).values,
    "median": lambda h: h * h.median(1, keepdim=True)[0],
    "median of all": lambda h: h * h.median(),
    "kthvalue": lambda h: h * h.kthvalue(3, 1, keepdim=True)[0],
    "mode": lambda h: h * h.mode(1, keepdim=True)[0],
    "topk": lambda h: h * h.topk(2, 1)[0].sum(1, keepdim=True),
    "count": lambda h: h * torch.count_nonzero(h > 0, dim=1)[:, None],
    "renorm": lambda h: torch.renorm(h, 2, 0, 1.0),
    "bucketize": lambda h: h * torch.bucketize(h, torch.tensor([-0.5, 0.0, 0.5])),
    "trace": lambda h: h * torch.trace(h.t() @ h),
    "diagonal": lambda h: h * torch.diagonal(h.t() @ h),
    "diag_embed": lambda h: (h[:, None] @ torch.diag_embed(h))[:, 0],
    "cdist": lambda h: h * torch.cdist(h, h.relu()).sum(1, keepdim=True),
    "cdist, many rows": lambda h: (
        h * torch.cdist(h.repeat(9, 1), h.relu().repeat(9, 1)).sum(1)[:4, None]
    ),
    "pdist": lambda h: h * torch.pdist(h).sum(),
    "dist": lambda h: h * torch.dist(h, h.relu()),
    "addr": lambda h: h @ torch.addr(h.t() @ h, h[0], h[1]),
    "addbmm": lambda h: torch.addbmm(h, (h @ h.t())[None], h[None]),
    "mse": lambda h: h * F.mse_loss(h, h.relu()),
    "scatter_add": lambda h: h.new_zeros(3, h.size(1)).scatter_add(0, over(h), h),
    "index_add": lambda h: h.new_zeros(3, h.size(1)).index_add(0, torch.tensor([0, 1, 2, 0]), h),
    "index_fill": lambda h: h.index_fill(0, torch.tensor([0]), 1.0),
    "segment_reduce": lambda h: torch.segment_reduce(h, "mean", lengths=torch.tensor([1, 3])),
    "masked_scatter": lambda h: h.masked_scatter(
        torch.tensor([[True], [False], [True], [False]]).expand_as(h), h[:2].relu()
    ),
    "cosine_similarity": lambda h: h * F.cosine_similarity(h, h.relu(), dim=1)[:, None],
    "std_mean": lambda h: (lambda s, m: (h - m) / s)(*torch.std_mean(h, 1, keepdim=True)),
    "aminmax": lambda h: h / torch.aminmax(h, dim=1, keepdim=True).max,
    "einsum of a dim twice": lambda h: h * torch.einsum("ii->i", h.t() @ h),
    "repeat": lambda h: h.repeat(1, 2),
}  # fmt: skip


def by_filter(repeated: Callable[[Tensor, int], Tensor]) -> Op:
    """A fixed filter, copied to as many channels as come in."""
    kernel = torch.arange(9.0).reshape(1, 1, 3, 3) / 9
    return lambda h: F.conv2d(h, repeated(kernel, h.shape[1]), padding=1, groups=h.shape[1])


def unpooled(h: Tensor) -> Tensor:
    pooled, places = F.max_pool2d(h, 2, return_indices=True)
    return F.max_unpool2d(pooled.relu(), places, 2)


ON_IMAGES: dict[str, Op] = {
    "max over channels": lambda h: h * torch.max(h, 1, keepdim=True)[0],
    "max_unpool2d": unpooled,
    "positions within a plane": lambda h: sum(F.adaptive_max_pool2d(h, 4, return_indices=True)),
    "filter by repeat": by_filter(lambda k, count: k.repeat(count, 1, 1, 1)),
    "filter by expand": by_filter(lambda k, count: k.expand(count, -1, -1, -1)),
    "filter by tile": by_filter(lambda k, count: k.tile(count, 1, 1, 1)),
    "filter by repeat_interleave": by_filter(lambda k, count: k.repeat_interleave(count, 0)),
    "two filters a channel": by_filter(
        lambda k, count: torch.cat([k, k.flip(2)]).repeat(count, 1, 1, 1)
    ),
    "rot90": lambda h: h.rot90(1, (2, 3)),
    "local norm of channels": lambda h: F.layer_norm(h.movedim(1, -1), h.shape[1:2]).movedim(-1, 1),
}  # type: ignore[dict-item]


@pytest.mark.parametrize("name", ON_VECTORS)
def test_operator_on_vectors(name: str) -> None:
    model = Between(ON_VECTORS[name]).eval()
    shrunk = prunus.shrink(model, VECTORS, ratio=0.5, each_group=False)
    assert shrunk.graph.unknown == {}
    assert (shrunk.certificate.verdict, dict(shrunk.held)) == ("exact", {})
    spare = {"kthvalue": 2}.get(name, 0)  # as many positions as are asked for are kept
    assert model.first.weight.shape[0] == WIDTH // 2 + spare


@pytest.mark.parametrize("name", ON_IMAGES)
def test_operator_on_images(name: str) -> None:
    model = Between(ON_IMAGES[name], image=True).eval()
    shrunk = prunus.shrink(model, IMAGES, ratio=0.5, each_group=False)
    assert shrunk.graph.unknown == {}
    assert (shrunk.certificate.verdict, dict(shrunk.held)) == ("exact", {})
    assert model.first.weight.shape[0] == WIDTH // 2


COUNTED = "positions along this dim are counted"
PINNED: dict[str, tuple[Op, str]] = {
    "max": (lambda h: h + h.max(1, keepdim=True)[1], COUNTED),
    "topk": (lambda h: h + h.topk(2, 1)[1].sum(1, keepdim=True), COUNTED),
    "median": (lambda h: h[:, :1] * h.median(1)[1].unsqueeze(1).expand(-1, 5), COUNTED),
    "sort": (lambda h: h.sort(1)[0][:, :1], COUNTED),
    "as many as a width": (lambda h: h.topk(h.shape[1] // 4, 1)[0], "the code computes a size"),
    "cov": (lambda h: torch.cov(h) @ h, "divides by the number of its columns"),
    "entries through a mask": (
        lambda h: h.masked_scatter(h > 0, torch.ones(64)),
        "entries are counted through a mask",
    ),
    "filters for a fixed width": (
        lambda h: h * torch.ones(1, 1).repeat(1, WIDTH),
        "combined with a tensor that nothing can prune",
    ),
}


@pytest.mark.parametrize("name", PINNED)
def test_what_is_read_by_position_stays(name: str) -> None:
    op, reason = PINNED[name]
    graph = trace(Between(op).eval(), VECTORS)
    pins = [pin for _, pin in graph.why_pinned("first.weight[0]")]
    assert any(reason in pin.reason and "test_operators.py:" in pin.source for pin in pins), pins
    assert graph.groups == ()


def test_positions_that_are_an_output_or_a_number_stay() -> None:
    class Answer(nn.Module):
        def __init__(self, *, number: bool) -> None:
            super().__init__()
            self.first, self.last, self.number = nn.Linear(6, WIDTH), nn.Linear(1, 3), number

        def forward(self, x: Tensor) -> Any:
            best, place = self.first(x).max(1, keepdim=True)
            if self.number:
                return self.last(best) * int(place[0, 0])
            return self.last(best), place

    for number in (False, True):
        graph = trace(Answer(number=number).eval(), VECTORS)
        assert graph.groups == ()
        assert any(COUNTED in pin.reason for _, pin in graph.why_pinned("first.weight[0]"))


# -- layers that take several inputs, or tables ----------------------------------------------------


class Bag(nn.Module):
    def __init__(self, mode: str, *, weighted: bool = False) -> None:
        super().__init__()
        self.table, self.last = nn.EmbeddingBag(50, WIDTH, mode=mode), nn.Linear(WIDTH, 4)
        self.weighted = weighted

    def forward(self, tokens: Tensor, offsets: Tensor) -> Tensor:
        weights = torch.linspace(0.5, 1.5, tokens.shape[0]) if self.weighted else None
        out: Tensor = self.last(self.table(tokens, offsets, weights))
        return out


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(6, 10)
        self.both, self.last = nn.Bilinear(8, 10, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.last(torch.relu(self.both(self.a(x), self.b(y))))
        return out


class Radial(nn.Module):
    """Distances to learned centres."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.last = nn.Linear(6, 12), nn.Linear(10, 3)
        self.centres = nn.Parameter(torch.randn(10, 12))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.exp(-torch.cdist(self.a(x), self.centres)))
        return out


class Graph(nn.Module):
    """Two graph convolutions with a sparse adjacency."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor], *, compressed: bool) -> None:
        super().__init__()
        full = (torch.rand(10, 10) > 0.6).float()
        with warnings.catch_warnings(action="ignore"):  # CSR is in beta
            self.adjacency = full.to_sparse_csr() if compressed else full.to_sparse()
        self.a, self.last, self.product = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 3), product

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.product(self.adjacency, self.a(x)))
        return self.product(self.adjacency, self.last(h))


class Sliced(nn.Module):
    """Halves of one weight, as open-ended slices, for two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.half = 8
        self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 8)
        self.weight = nn.Parameter(torch.randn(3, 16))

    def forward(self, x: Tensor) -> Tensor:
        left = F.linear(self.a(x), self.weight[:, : self.half])
        return left + F.linear(self.b(x), self.weight[:, self.half :])


TOKENS = (torch.randint(0, 50, (20,)), torch.tensor([0, 5, 11]))
NODES = torch.randn(10, 6)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "embedding bag, mean": (lambda: Bag("mean"), TOKENS),
    "embedding bag, max": (lambda: Bag("max"), TOKENS),
    "embedding bag, weighted": (lambda: Bag("sum", weighted=True), TOKENS),
    "bilinear": (Bilinear, (torch.randn(4, 5), torch.randn(4, 6))),
    "radial basis": (Radial, (VECTORS,)),
    "sparse product": (lambda: Graph(torch.sparse.mm, compressed=False), (NODES,)),
    "sparse operand of mm": (lambda: Graph(torch.mm, compressed=False), (NODES,)),
    "compressed sparse product": (lambda: Graph(torch.sparse.mm, compressed=True), (NODES,)),
    "slices of a weight": (Sliced, (VECTORS,)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_pruned_exactly(name: str) -> None:
    build, inputs = LAYERS[name]
    torch.manual_seed(0)
    model = build().eval()
    before = sum(parameter.numel() for parameter in model.parameters())
    shrunk = prunus.shrink(model, inputs, ratio=0.5)
    assert (shrunk.certificate.verdict, dict(shrunk.held)) == ("exact", {})
    assert shrunk.certificate.unverified == ()
    assert sum(parameter.numel() for parameter in model.parameters()) <= 0.6 * before


@pytest.mark.parametrize("name", ["bilinear", "radial basis", "embedding bag, mean"])
def test_layer_under_a_mask(name: str) -> None:
    build, inputs = LAYERS[name]
    torch.manual_seed(0)
    model = build().eval()
    plan = prunus.plan(prunus.trace(model, inputs), model, ratio=0.5)
    with prunus.mask(plan, model):
        masked = model(*inputs)
    prunus.apply(plan, model)
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs), masked)


def test_a_sparse_attribute_is_no_part_of_the_file(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = Graph(torch.sparse.mm, compressed=False).eval()
    prunus.shrink(model, NODES, ratio=0.5)
    prunus.save(model, tmp_path / "graph.safetensors")
    with torch.no_grad():
        expected = model(NODES)

    def build() -> nn.Module:
        again = Graph(torch.sparse.mm, compressed=False).eval()
        again.adjacency = model.adjacency
        return again

    loaded = prunus.load(tmp_path / "graph.safetensors", build=build)
    with torch.no_grad():
        torch.testing.assert_close(loaded(NODES), expected)


# -- masked weights --------------------------------------------------------------------------------


class Masked(nn.Module):
    def __init__(self, *, mask_first: bool) -> None:
        super().__init__()
        self.a, self.last, self.mask_first = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 3), mask_first
        self.register_buffer("mask", (torch.rand(WIDTH, 6) > 0.3).float())

    def forward(self, x: Tensor) -> Tensor:
        weight = self.mask * self.a.weight if self.mask_first else self.a.weight * self.mask
        out: Tensor = self.last(torch.relu(F.linear(x, weight, self.a.bias)))
        return out


@pytest.mark.parametrize("mask_first", [True, False])
def test_a_mask_times_a_weight(mask_first: bool) -> None:
    torch.manual_seed(0)
    model = Masked(mask_first=mask_first).eval()
    shrunk = prunus.shrink(model, VECTORS, ratio=0.5)
    assert shrunk.certificate.verdict == "exact"
    assert model.a.weight.shape == model.mask.shape == (WIDTH // 2, 6)
    assert shrunk.graph.group("a.weight[0]").size == WIDTH


def structured(model: nn.Sequential) -> None:
    prune.ln_structured(model[0], "weight", 0.5, n=2, dim=0)


def mixed(model: nn.Sequential) -> None:
    prune.l1_unstructured(model[0], "weight", 0.3)
    prune.random_structured(model[0], "weight", 0.3, dim=1)
    prune.l1_unstructured(model[0], "bias", 0.3)
    prune.identity(model[2], "weight")


@pytest.mark.parametrize("masking", [structured, mixed], ids=lambda function: function.__name__)
def test_models_masked_by_torch_prune(masking: Callable[[nn.Sequential], None]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    ).eval()  # fmt: skip
    masking(model)
    shrunk = prunus.shrink(model, IMAGES, ratio=0.5)
    assert shrunk.certificate.verdict == "exact"
    first = model[0]
    for tensor in (first.weight, first.weight_orig, first.weight_mask):
        assert tensor.shape == (6, 3, 3, 3)
    with torch.no_grad():
        expected = model(IMAGES)
    for layer, name in ((model[0], "weight"), (model[2], "weight"), (model[0], "bias")):
        if prune.is_pruned(layer) and hasattr(layer, f"{name}_mask"):
            prune.remove(layer, name)
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), expected)
