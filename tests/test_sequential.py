"""Compensation layer after layer, against least squares on features that are really laid out."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import prunus
from prunus.calibration.moments import CrossMoments
from prunus.calibration.sites import kept_units
from prunus.errors import DataError, ModelError, PlanError
from prunus.graph.axis import Axis
from prunus.recovery.sequential import find_changed
from prunus.tracer.copies import duplicate
from tests.snapshots import same, snapshot
from tests.test_compensation import READERS
from tests.test_compensation import build as build_reader

CLOSE: Any = {"rtol": 1e-6, "atol": 1e-8}
RIDGE = 0.02


def noisy(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def half(
    model: nn.Module, x: Tensor, only: tuple[str, ...] = ()
) -> tuple[prunus.CouplingGraph, prunus.Plan]:
    """Half of every group, or of those that some weights make."""
    graph = prunus.trace(model, x)
    hold = [g.name for g in graph.groups if only and g.name not in {f"{n}.weight[0]" for n in only}]
    return graph, prunus.plan(graph, model, ratio=0.5, importance="random", seed=1, hold=hold)


def kept(plan: prunus.Plan, tensor: str, dim: int, size: int) -> list[int]:
    return list(plan.keep.get(Axis(tensor, dim), range(size)))


class Chain(nn.Module):
    """Three linear layers that read what others give; the middle one has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 14), nn.Linear(14, 12, bias=False)
        self.c, self.d = nn.Linear(12, 10), nn.Linear(10, 3)

    layers = ("b", "c", "d")

    def read(self, x: Tensor) -> dict[str, Tensor]:
        """What each layer reads, as rows."""
        h = torch.tanh(self.a(x))
        g = F.gelu(self.b(h))
        return {"b": h, "c": g, "d": torch.relu(self.c(g))}

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.d(self.read(x)["d"])
        return y


class Images(nn.Module):
    """Convolutions with a stride, a batch norm behind one, and a linear layer at the end."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 10, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(10) if norm else nn.Identity()
        self.c, self.d = nn.Conv2d(10, 6, 3), nn.Linear(6, 3)
        if isinstance(self.norm, nn.BatchNorm2d):
            self.norm.running_mean.uniform_(-0.5, 0.5)
            self.norm.running_var.uniform_(0.5, 2)

    layers = ("b", "c", "d")

    def maps(self, x: Tensor) -> dict[str, Tensor]:
        h = F.gelu(self.a(x))
        g = F.gelu(self.norm(self.b(h)))
        return {"b": h, "c": g, "d": torch.tanh(self.c(g)).mean((2, 3))}

    def read(self, x: Tensor) -> dict[str, Tensor]:
        """What each layer reads, as rows of columns ordered by channel, then by tap."""
        maps = self.maps(x)
        unfolded = {
            "b": F.unfold(maps["b"], 3, padding=1, stride=2),
            "c": F.unfold(maps["c"], 3),
        }
        rows = {name: u.transpose(1, 2).flatten(0, 1) for name, u in unfolded.items()}
        return {**rows, "d": maps["d"]}

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.d(self.maps(x)["d"])
        return y


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (Chain, (200, 5)),
    "convolutions": (lambda: Images(norm=False), (16, 3, 8, 8)),
    "batch norm": (lambda: Images(norm=True), (16, 3, 8, 8)),
}


def build(name: str) -> tuple[nn.Module, Tensor, prunus.CouplingGraph, prunus.Plan]:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model, x = make().double().eval(), noisy(shape)
    return model, x, *half(model, x)


def ridge_by_lstsq(y: Tensor, g: Tensor, start: Tensor, share: float) -> Tensor:
    """argmin over V of mean (y − V g)² + λ (V − start)² with λ = share · mean g², by rows added
    to the design."""
    scale = (share * g.square().mean() * len(g)).sqrt()
    design = torch.cat([g, scale * torch.eye(g.shape[1], dtype=g.dtype)])
    return torch.linalg.lstsq(design, torch.cat([y, scale * start.mT])).solution.mT


def both_ways(name: str, **options: Any) -> list[tuple[nn.Module, prunus.recovery.Compensation]]:
    """A model whose only reader reads an exact prefix, repaired at once and in order."""
    model, x, graph, plan = build_reader(name)
    found = []
    for method in ("least_squares", "sequential"):
        small = copy.deepcopy(model)
        options = {
            "positions": 10,
            "ridge": RIDGE,
            **options,
            "method": method,
        }
        found.append(
            (small, prunus.recovery.compensate(small, plan, graph, [x[:5], x[5:]], **options))
        )
    return found


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("new_biases", [True, False])
def test_behind_an_exact_prefix_it_is_the_plain_method(name: str, new_biases: bool) -> None:
    (plain, told), (small, found) = both_ways(name, new_biases=new_biases)
    assert dict(found.plan.keep) == dict(told.plan.keep)
    for tensor, wanted in plain.state_dict().items():
        torch.testing.assert_close(small.state_dict()[tensor], wanted, **CLOSE)
    (one,), (other,) = told.repairs, found.repairs
    assert (one.kept, one.columns, one.samples) == (other.kept, other.columns, other.samples)
    for field in ("ridge", "spread", "cut", "shifted", "left"):
        assert getattr(other, field) == pytest.approx(getattr(one, field), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "limit"), [("3x3", 15_000), ("3x3", 4000), ("grouped", 12_000), ("linear", 400)]
)
def test_with_little_memory_taps_or_columns_are_fitted_apart(name: str, limit: int) -> None:
    """Among the columns of a tap, or with squares alone, as the plain method does."""
    (plain, told), (small, found) = both_ways(name, memory_limit=limit)
    assert not told.repairs[0].exact
    assert not found.repairs[0].exact
    for tensor, wanted in plain.state_dict().items():
        torch.testing.assert_close(small.state_dict()[tensor], wanted, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("new_biases", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_every_layer_is_the_ridge_solution_on_what_the_repaired_prefix_gives(
    name: str, new_biases: bool
) -> None:
    """The prefix of the model that comes out is the one on which each layer was fitted."""
    model, x, graph, plan = build(name)
    small = copy.deepcopy(model)
    done = prunus.recovery.compensate(
        *(small, plan, graph, [x[:10], x[10:]]),
        method="sequential",
        ridge=RIDGE,
        positions=10_000,
        new_biases=new_biases,
    )
    dense_rows, rows = model.read(x), small.read(x)
    assert [report.tensor for report in done.repairs] == [f"{n}.weight" for n in model.layers]
    for layer, report in zip(model.layers, done.repairs, strict=True):
        before, now = getattr(model, layer), getattr(small, layer)
        h, g = dense_rows[layer], rows[layer]
        out = kept(plan, report.tensor, 0, before.weight.shape[0])
        into = kept(plan, report.tensor, 1, before.weight.shape[1])
        assert len(into) < before.weight.shape[1]
        start = before.weight[out][:, into].flatten(1)
        y = h @ before.weight[out].flatten(1).mT
        centred = bool(report.place)
        means = (y.mean(0), g.mean(0)) if centred else (0 * y[0], 0 * g[0])
        wanted = ridge_by_lstsq(y - means[0], g - means[1], start, RIDGE)
        torch.testing.assert_close(now.weight.flatten(1), wanted, **CLOSE)
        constant = means[0] - wanted @ means[1]
        if report.place in ("bias", "new bias"):
            old = 0 if before.bias is None else before.bias[out]
            torch.testing.assert_close(now.bias, old + constant, **CLOSE)
        error = (g @ wanted.mT + constant - y).square().mean(0).sum()
        assert report.left == pytest.approx(float(error), rel=1e-5)
        assert report.cut == pytest.approx(
            float((g @ start.mT - y).square().mean(0).sum()), rel=1e-5
        )
        assert report.exact


@torch.no_grad()
def test_batch_norms_are_measured_before_what_lies_behind_them_is_fitted() -> None:
    """On one batch the cumulative average is what the batch has."""
    model, x, graph, plan = build("batch norm")
    small = copy.deepcopy(model)
    prunus.recovery.compensate(small, plan, graph, [x], method="sequential", positions=10_000)
    outputs = small.b(small.maps(x)["b"]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(small.norm.running_mean, outputs.mean(1), **CLOSE)
    torch.testing.assert_close(small.norm.running_var, outputs.var(1), **CLOSE)
    twin = copy.deepcopy(small)
    prunus.recovery.recalibrate(twin, [x])
    assert torch.equal(twin(x), small(x))


class Branched(nn.Module):
    """A stem that nothing changes, a block on it with two branches, and a head behind the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.a, self.b = nn.Conv2d(6, 10, 1), nn.Conv2d(10, 6, 3, padding=1)
        self.c, self.e = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 6, 1)
        self.late, self.head = nn.Conv2d(6, 6, 1), nn.Linear(6, 4)
        self.norm.running_mean.uniform_(-0.5, 0.5)

    def trunk(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.stem(x)))
        h.flatten(2).add_(self.b(F.gelu(self.a(h))).flatten(2))
        return h + self.e(F.gelu(self.c(h)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.trunk(x)
        y: Tensor = self.head((h + torch.tanh(self.late(h))).mean((2, 3)))
        return y


def branched(*only: str) -> tuple[nn.Module, Tensor, prunus.CouplingGraph, prunus.Plan]:
    torch.manual_seed(0)
    model, x = Branched().double().eval(), noisy((12, 3, 6, 6))
    return model, x, *half(model, x, only)


def test_what_runs_before_all_that_is_removed_stays_as_it_was() -> None:
    model, x, graph, plan = branched("a")
    before = copy.deepcopy(model.state_dict())
    done = prunus.recovery.compensate(model, plan, graph, [x], method="sequential")
    fitted = [report.tensor for report in done.repairs]
    assert fitted == ["b.weight", "c.weight", "e.weight", "late.weight", "head.weight"]
    after = model.state_dict()
    changed = {name for name, old in before.items() if not torch.equal(old, after[name])
               if old.shape == after[name].shape}  # fmt: skip
    behind = {f"{layer}.{own}" for layer in ("c", "e", "late", "head") for own in
              ("weight", "bias")}  # fmt: skip
    assert changed == behind | {"b.bias"}


def test_where_nothing_is_removed_nothing_changes() -> None:
    model, x, graph, _ = branched("a")
    whole = prunus.Plan.from_mask(graph, graph.all_kept)
    before = copy.deepcopy(model.state_dict())
    done = prunus.recovery.compensate(model, whole, graph, [x], method="sequential")
    assert not done.repairs
    assert all(torch.equal(old, model.state_dict()[name]) for name, old in before.items())


@torch.no_grad()
def test_what_reads_the_sum_of_branches_comes_after_both() -> None:
    """``b`` adds to a view of what ``c`` reads then, so ``c`` waits for it."""
    model, x, graph, plan = branched("a", "c")
    weights, norms = find_changed(graph, kept_units(graph, plan))
    assert weights == {f"{name}.weight" for name in ("b", "c", "e", "late", "head")}
    assert not norms
    told: list[tuple[str, int, int | None]] = []
    small = copy.deepcopy(model)
    repairs = prunus.recovery.compensate(
        *(small, plan, graph, [x[:6], x[6:]]),
        method="sequential",
        positions=10_000,
        ridge=0.0,
        progress=lambda *stage: told.append(stage),
    ).repairs
    fitted = [f"fitting {name}.weight" for name in ("b", "c", "e", "late", "head")]
    done = [(stage, n, total) for stage, n, total in told if stage in fitted and n]
    assert sorted(done) == sorted((stage, n, 2) for stage in fitted for n in (1, 2))
    late = next(report for report in repairs if report.tensor == "late.weight")
    read, now = (m.trunk(x).movedim(1, -1).flatten(0, -2) for m in (model, small))
    y = model.late(read[..., None, None])[..., 0, 0]
    design = torch.cat([now, torch.ones_like(now[:, :1])], 1)
    best = design @ torch.linalg.lstsq(design, y).solution
    torch.testing.assert_close(small.late(now[..., None, None])[..., 0, 0], best, **CLOSE)
    assert late.left == pytest.approx(float((best - y).square().mean(0).sum()), rel=1e-5)


class Parallel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(4, 12), nn.Linear(12, 6), nn.Linear(12, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.stem(x))
        y: Tensor = self.head(torch.tanh(self.a(h) + self.b(h)))
        return y


def test_weights_that_read_the_same_values_share_sums() -> None:
    model, x = Parallel().double().eval(), noisy((50, 4))
    graph, plan = half(model, x, ("stem",))
    weights, _ = find_changed(graph, kept_units(graph, plan))
    assert weights == {"a.weight", "b.weight", "head.weight"}
    twin = copy.deepcopy(model)
    repairs = prunus.recovery.compensate(model, plan, graph, [x], method="sequential").repairs
    plain = prunus.recovery.compensate(twin, plan, graph, [x]).repairs
    assert [r.tensor for r in repairs] == ["a.weight", "b.weight", "head.weight"]
    assert [r.left for r in repairs[:2]] == pytest.approx([r.left for r in plain], rel=1e-6)


class Overwriting(nn.Module):
    """Forgets in place what a layer has read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        y: Tensor = self.b(h)
        return y + h.mul_(0).sum()


def test_what_was_read_counts_and_not_what_became_of_it() -> None:
    model, x = Overwriting().double().eval(), noisy((50, 4))
    graph, plan = half(model, x)
    twin = copy.deepcopy(model)
    (found,) = prunus.recovery.compensate(model, plan, graph, [x], method="sequential").repairs
    (wanted,) = prunus.recovery.compensate(twin, plan, graph, [x]).repairs
    assert found.left == pytest.approx(wanted.left, rel=1e-6)
    torch.testing.assert_close(model.b.weight, twin.b.weight, **CLOSE)


@torch.no_grad()
def test_a_deep_net_of_half_the_width_is_nearer_than_with_the_plain_method() -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(7):
        layers += [nn.Linear(32, 32), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(32, 8)).double().eval()
    for layer in layers[::2]:
        layer.weight.mul_(2)
    x, fresh = noisy((2000, 32)), noisy((1000, 32), seed=1)
    graph, plan = half(model, x[:4])
    assert len(plan.keep) == 7 * 3
    errors = []
    for method in ("least_squares", "sequential"):
        small = copy.deepcopy(model)
        prunus.recovery.compensate(
            small,
            plan,
            graph,
            list(x.split(500)),
            method=method,
        )
        errors.append(float((small(fresh) - model(fresh)).square().mean()))
    assert errors[1] < 0.8 * errors[0]


class Block(nn.Module):
    """A transformer block with heads, norms and a residual stream, and a head behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.second = nn.Linear(5, 16), nn.LayerNorm(16), nn.LayerNorm(16)
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.up, self.down, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 4)
        self.dim, self.value_dim = 8, 8

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        n = self.first(h)
        q, k = (
            layer(n).unflatten(-1, (-1, self.dim)).transpose(1, 2) for layer in (self.q, self.k)
        )
        v = self.v(n).unflatten(-1, (-1, self.value_dim)).transpose(1, 2)
        mixed = (q @ k.mT / 2).softmax(-1) @ v
        h = h + self.out(mixed.transpose(1, 2).flatten(2))
        h = h + self.down(F.gelu(self.up(self.second(h))))
        y: Tensor = self.head(h)
        return y


def block() -> tuple[nn.Module, Tensor, prunus.CouplingGraph]:
    torch.manual_seed(0)
    model, x = Block().double().eval(), 2 * noisy((150, 6, 5))
    return model, x, prunus.trace(model, x[:2])


@torch.no_grad()
@pytest.mark.parametrize("held", ["stream", "none"])
def test_bases_of_heads_change_first(held: str) -> None:
    """Dims of queries, keys and values go, the hidden width, and perhaps the residual stream."""
    model, x, graph = block()
    stream = [group.name for group in graph.groups if group.name.startswith("embed")]
    heads = [group.name for group in graph.groups if group.size == 2]
    hold = [*heads, *(stream if held == "stream" else [])]
    plan = prunus.plan(graph, model, ratio=0.4, hold=hold)
    assert Axis("q.weight", 0) in plan.keep
    errors = {}
    for sequential, method in enumerate(("least_squares", "sequential")):
        small = copy.deepcopy(model)
        done = prunus.recovery.compensate(small, plan, graph, [x], method=method)
        errors[sequential] = float((small(x) - model(x)).square().mean())
        mixed = [report for report in done.repairs if "·" in report.tensor]
        assert len(mixed) == 1
        assert small.v.out_features < 16
        done.undo()
        assert torch.equal(small(x), model(x))
    assert errors[True] < errors[False]


@torch.no_grad()
def test_queries_and_keys_get_their_basis_and_their_inputs_at_once() -> None:
    """Behind an exact prefix they are those of the plain method, which mixes repaired weights."""
    model, x, _ = block()
    model.first = nn.Identity()
    graph = prunus.trace(model, x[:2])
    heads = [group.name for group in graph.groups if group.size == 2]
    plan = prunus.plan(graph, model, ratio=0.4, hold=heads)
    assert {Axis("q.weight", dim) for dim in (0, 1)} <= set(plan.keep)
    states = []
    for method in ("least_squares", "sequential"):
        small = copy.deepcopy(model)
        prunus.recovery.compensate(small, plan, graph, [x], method=method)
        states.append(small.state_dict())
    for name in (f"{layer}.{own}" for layer in "qkv" for own in ("weight", "bias")):
        torch.testing.assert_close(states[1][name], states[0][name], **CLOSE)
    assert not torch.allclose(states[1]["up.weight"], states[0]["up.weight"])


@torch.no_grad()
def test_queries_whose_scores_alone_change_are_followed_by_what_reads_the_answer() -> None:
    """No column of ``out`` goes, and it is the ridge solution on what the heads answer now."""
    model, x, graph = block()
    others = [group.name for group in graph.groups if group.name != "q.weight[0]/2"]
    plan = prunus.plan(graph, model, ratio=0.5, hold=others)
    done = prunus.recovery.compensate(model, plan, graph, [x], method="sequential")
    fitted = [report for report in done.repairs if "·" not in report.tensor]
    assert [r.tensor for r in fitted] == ["out.weight", "up.weight", "down.weight", "head.weight"]
    assert all(report.left < report.cut for report in fitted)
    assert fitted[0].kept == fitted[0].columns


@pytest.mark.parametrize("name", MODELS)
def test_undo_puts_the_model_back(name: str) -> None:
    model, x, graph, plan = build(name)
    before = snapshot(model)
    done = prunus.recovery.compensate(model, plan, graph, [x], method="sequential")
    assert model.d.weight.shape[1] < 10
    done.undo()
    assert same(snapshot(model), before)


class Drawing(nn.Module):
    """Reads more rows of smaller inputs, as a detector does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        found = self.b(h[h.sum(1) > 2] if len(x) > 8 else h)
        return found if len(x) <= 8 else found.new_zeros(1, 4)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({}, DataError, "needs calibration data"),
        ({"data": []}, DataError, "empty"),
        ({"data": iter([])}, DataError, "empty"),
        ({"data": [torch.zeros(0, 5, dtype=torch.float64)]}, DataError, "empty"),
        ({"data": [torch.full((2, 5), torch.nan, dtype=torch.float64)]}, DataError, "NaN"),
        ({"data": [noisy((20, 5))], "memory_limit": 10}, DataError, "memory_limit"),
        ({"data": [noisy((20, 5))], "ridge": -1.0}, PlanError, "ridge"),
    ],
)
def test_bad_input_leaves_the_model_alone(options: Any, error: Any, said: str) -> None:
    model, _, graph, plan = build("linear")
    before = snapshot(model)
    with pytest.raises(error, match=said):
        prunus.recovery.compensate(model, plan, graph, method="sequential", **options)
    assert same(snapshot(model), before)


def test_statistics_are_refused_since_they_are_of_dense_inputs() -> None:
    model, x, graph, plan = build("linear")
    statistics = prunus.importance.collect(model, graph, [x], "second_moment")
    with pytest.raises(DataError, match=r"statistics(.|\n)*give data="):
        prunus.recovery.compensate(model, plan, graph, statistics=statistics, method="sequential")


def test_weights_that_are_not_loaded_are_refused() -> None:
    model, x, graph, plan = build("linear")
    model.d.to("meta")
    with pytest.raises(ModelError, match="no values"):
        prunus.recovery.compensate(model, plan, graph, [x], method="sequential")


def test_models_that_read_other_rows_when_they_are_cut_are_told() -> None:
    torch.manual_seed(0)
    model, few, many = Drawing().double().eval(), noisy((4, 5)), noisy((50, 5))
    graph, plan = half(model, few)
    before = snapshot(model)
    with pytest.raises(DataError, match="other rows"):
        prunus.recovery.compensate(model, plan, graph, [many], method="sequential")
    assert same(snapshot(model), before)


def test_an_iterator_serves_every_pass() -> None:
    model, x, graph, plan = build("linear")
    twin = copy.deepcopy(model)
    prunus.recovery.compensate(model, plan, graph, iter([x[:90], x[90:]]), method="sequential")
    prunus.recovery.compensate(twin, plan, graph, [x[:90], x[90:]], method="sequential")
    assert torch.equal(model(x), twin(x))


@pytest.mark.parametrize("name", MODELS)
def test_shrink_does_it_and_tells(name: str) -> None:
    model, x, _, _ = build(name)
    twin = copy.deepcopy(model)
    budget = prunus.Budget(params=0.5)
    done = prunus.shrink(model, x[:2], budget=budget, data=iter([x]), recover="sequential")
    assert [step.name for step in done.recovery] == ["cut", "least squares in sequence"]
    assert done.recovery[1].error < done.recovery[0].error
    graph = prunus.trace(twin, x[:2])
    plan = prunus.plan(graph, twin, budget=budget)
    prunus.recovery.compensate(twin, plan, graph, [x], method="sequential")
    torch.testing.assert_close(model(x), twin(x))


class Locked(Chain):
    """Runs under locks of its own, catches everything, and notes down what it is at."""

    def __init__(self) -> None:
        super().__init__()
        self.lock, self.again, self.notes = threading.Lock(), threading.RLock(), {}

    def forward(self, x: Tensor) -> Tensor:
        with self.lock, self.again:
            self.shift = x.mean()
            self.notes["x"] = x
            try:
                h = self.read(self.notes["x"])["c"]
            except:  # noqa: E722, as bad models do
                h = self.read(x)["c"]
            h = torch.relu(self.c(h)) + self.shift
            y: Tensor = self.d(h + self.notes["x"].mean())
        return y


def test_forwards_that_wait_do_not_mix_what_they_note_down() -> None:
    torch.manual_seed(0)
    model, x = Locked().double().eval(), noisy((60, 5))
    parts = [x[:20] + 3, x[20:40] - 3, x[40:]]
    graph, plan = half(model, x)
    small = duplicate(model)
    done = prunus.recovery.compensate(small, plan, graph, parts, method="sequential")
    last = done.repairs[-1]
    with torch.no_grad():
        error = torch.cat([small(part) - model(part) for part in parts]).square().mean(0).sum()
    assert last.tensor == "d.weight"
    assert last.left == pytest.approx(float(error), rel=1e-6)
    bad = [parts[0], parts[1] * torch.nan]
    with pytest.raises(DataError, match="NaN"):
        prunus.recovery.compensate(duplicate(model), plan, graph, bad, method="sequential")


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + super().forward(x)
        return y


def test_another_way_into_the_model_and_dropped_blocks() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
            self.blocks = nn.ModuleList(
                Residual(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.GELU(), nn.Linear(12, 8))
                for _ in range(3)
            )

        def encode(self, x: Tensor) -> Tensor:
            h = self.stem(x)
            for one in self.blocks:
                h = one(h)
            y: Tensor = self.head(h)
            return y

    torch.manual_seed(0)
    model, x = Stack().double().eval(), noisy((80, 5))
    dense = copy.deepcopy(model).encode(x)
    done = prunus.shrink(
        *(model, x),
        budget=prunus.Budget(params=0.5),
        drop=["blocks.1"],
        data=[x],
        recover="sequential",
        forward_fn="encode",
    )
    assert len(model.blocks) == 2
    errors = [step.error for step in done.recovery]
    assert errors[1] < errors[0]
    off = (model.encode(x) - dense).detach().norm() / dense.detach().norm()
    assert errors[1] == pytest.approx(float(off), rel=1e-6)


def test_sums_of_pairs_are_those_of_the_rows() -> None:
    """Two groups of which one keeps more, in two parts; columns by tap, then by channel."""
    stay = torch.tensor([[True, False, True], [False, False, True]])
    h, g = noisy((2, 40, 6)), noisy((2, 40, 6), seed=1)
    sums = CrossMoments(stay, taps=2)
    for rows in (slice(0, 15), slice(15, 40)):
        sums.add(h[:, rows], g[:, rows])
    for group in range(2):
        (part,) = sums.pairings(group)
        there = stay[group].repeat(2).nonzero()[:, 0]
        assert torch.equal(part.kept, there)
        own, other = h[group], g[group][:, there]
        torch.testing.assert_close(part.means, (own.mean(0), other.mean(0)))
        a, b = own - own.mean(0), other - other.mean(0)
        for found, (left, right) in zip(
            (part.dense, part.cross, part.inner), [(a, a), (a, b), (b, b)], strict=True
        ):
            torch.testing.assert_close(found, left.mT @ right / 40)
