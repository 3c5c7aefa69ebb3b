"""Compensation against brute force: least squares on features that are really laid out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import prunus
from prunus.calibration.im2col import (
    Window,
    columns_of,
    find_sources,
    matrix_of,
    sample_positions,
    weight_of,
    window_of,
)
from prunus.calibration.sites import Site, kept_units
from prunus.graph.axis import Axis, kept_positions
from prunus.planner.widths import plan_of_mask
from prunus.recovery.compensate import repair_all

CLOSE: Any = {"rtol": 1e-6, "atol": 1e-8}


def noisy(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class Chain(nn.Module):
    """A convolution whose channels are read by another, and by nothing else."""

    def __init__(self, reader: nn.Module, rank: int = 2, channels: int = 8) -> None:
        super().__init__()
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        self.first, self.reader = kind(3, channels, 3, padding=1), reader

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.reader(F.gelu(self.first(x)))
        return y


class Mlp(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.first, self.reader = nn.Linear(5, 9), nn.Linear(9, 4, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.reader(F.gelu(self.first(x)))
        return y


READERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (Mlp, (30, 7, 5)),
    "linear without bias": (lambda: Mlp(bias=False), (30, 7, 5)),
    "1x1": (lambda: Chain(nn.Conv2d(8, 5, 1)), (12, 3, 6, 5)),
    "3x3": (lambda: Chain(nn.Conv2d(8, 5, 3, padding=1)), (12, 3, 6, 5)),
    "3x3 without bias": (lambda: Chain(nn.Conv2d(8, 5, 3, bias=False)), (12, 3, 6, 5)),
    "5x3 strided": (
        lambda: Chain(nn.Conv2d(8, 5, (5, 3), (2, 1), (2, 0))),
        (30, 3, 7, 6),
    ),
    "dilated": (lambda: Chain(nn.Conv2d(8, 5, 3, dilation=2, padding=2)), (12, 3, 6, 5)),
    "circular": (
        lambda: Chain(nn.Conv2d(8, 5, 3, padding=1, padding_mode="circular")),
        (12, 3, 6, 5),
    ),
    "grouped": (lambda: Chain(nn.Conv2d(8, 6, 3, padding=1, groups=2)), (12, 3, 6, 5)),
    "1d": (lambda: Chain(nn.Conv1d(8, 5, 3, stride=2), 1), (40, 3, 12)),
    "3d": (lambda: Chain(nn.Conv3d(8, 5, 2), 3), (8, 3, 4, 5, 4)),
    "transposed": (lambda: Chain(nn.ConvTranspose2d(8, 5, 3, 2, 1, 1)), (12, 3, 5, 4)),
    "transposed 2x2": (lambda: Chain(nn.ConvTranspose2d(8, 5, 2, 2)), (20, 3, 5, 4)),
    "transposed, dilated": (
        lambda: Chain(nn.ConvTranspose2d(8, 5, 3, dilation=2, padding=1)),
        (12, 3, 5, 4),
    ),
    "transposed, grouped": (
        lambda: Chain(nn.ConvTranspose2d(8, 6, 3, 2, groups=2)),
        (12, 3, 5, 4),
    ),
}


def build(name: str) -> tuple[nn.Module, Tensor, prunus.CouplingGraph, prunus.Plan]:
    torch.manual_seed(0)
    make, shape = READERS[name]
    model = make().double().eval()
    x = noisy(shape)
    graph = prunus.trace(model, x)
    return model, x, graph, prunus.plan(graph, model, ratio=0.4, importance="random", seed=1)


def everywhere(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the reader reads, shape ``(batch, channels, …)``, and gives, on all positions."""
    h = F.gelu(model.first(x))
    return h, model.reader(h)


def unfold_by_torch(h: Tensor, reader: nn.Module) -> Tensor:
    """Features of every channel: its contribution to every output under unit weights.

    Shape ``(rows, channels, taps)``: the reader's own kernel, run with one tap of one channel.
    """
    if isinstance(reader, nn.Linear):
        return h.flatten(0, -2)[..., None]
    probe = copy.deepcopy(reader)
    groups, transposed = reader.groups, isinstance(reader, nn.ConvTranspose2d)
    if isinstance(probe.bias, Tensor):
        nn.init.zeros_(probe.bias)
    taps = reader.weight[0, 0].numel()
    features = []
    with torch.no_grad():
        for channel in range(h.shape[1]):
            group, inner = divmod(channel, h.shape[1] // groups)
            for tap in range(taps):
                probe.weight.zero_()
                if transposed:
                    probe.weight.flatten(2)[channel, 0, tap] = 1
                    out = group * reader.weight.shape[1]
                else:
                    out = group * (reader.weight.shape[0] // groups)
                    probe.weight.flatten(2)[out, inner, tap] = 1
                features.append(probe(h)[:, out].flatten())
    return torch.stack(features, 1).unflatten(1, (h.shape[1], taps))


@pytest.mark.parametrize("name", READERS)
def test_least_squares_equal_lstsq_on_materialised_features(name: str) -> None:
    """Without ridge the new outputs are the best that the kept features can say."""
    model, x, graph, plan = build(name)
    with torch.no_grad():
        h, y = everywhere(model, x)
        features = unfold_by_torch(h, model.reader)
    kept = kept_units(graph, plan)
    small = copy.deepcopy(model)
    done = prunus.recovery.compensate(small, plan, graph, [x], ridge=0.0, positions=10_000)
    with torch.no_grad():
        found = small(x)
    (site,) = prunus.importance.collect(model, graph, [x], "second_moment", plan=plan).sites
    stay = kept_positions(site.label, kept)
    channel_last = isinstance(model.reader, nn.Linear)
    rows = y.flatten(0, -2) if channel_last else y.movedim(1, -1).flatten(0, -2)
    groups = getattr(model.reader, "groups", 1)
    width = len(site.label) // groups
    best = torch.empty_like(rows)
    for group in range(groups):
        own = stay[stay // width == group]
        outputs = slice(group * rows.shape[1] // groups, (group + 1) * rows.shape[1] // groups)
        columns = features[:, own].flatten(1)
        design = torch.cat([columns, torch.ones_like(columns[:, :1])], 1)
        best[:, outputs] = design @ torch.linalg.lstsq(design, rows[:, outputs]).solution
    given = found.flatten(0, -2) if channel_last else found.movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(given, best, **CLOSE)
    (report,) = done.repairs
    assert report.left == pytest.approx(float((best - rows).square().mean(0).sum()), rel=1e-5)
    assert 0 < report.left < report.shifted < report.spread


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("method", ["least_squares", "bias"])
@pytest.mark.parametrize("new_biases", [True, False])
def test_predicted_error_is_the_measured_one(name: str, method: Any, new_biases: bool) -> None:
    """On the positions that were looked at, with dense inputs; with a ridge, biases or none."""
    model, x, graph, plan = build(name)
    limit = 10
    cut_model, small = prunus.apply(plan, copy.deepcopy(model)), copy.deepcopy(model)
    done = prunus.recovery.compensate(
        *(small, plan, graph, [x[:5], x[5:]]),
        method=method,
        ridge=0.05,
        positions=limit,
        new_biases=new_biases,
    )
    (report,) = done.repairs
    errors = [mean_square(model(x) - other(x), limit) for other in (cut_model, small)]
    assert report.cut == pytest.approx(errors[0], rel=1e-5)
    assert report.left == pytest.approx(errors[1], rel=1e-5)
    silent = "without bias" in name and not new_biases
    assert report.place == ("" if silent else "new bias" if "without bias" in name else "bias")
    assert report.exact


@torch.no_grad()
def mean_square(error: Tensor, limit: int) -> float:
    """Σ over outputs of the mean square; of images, at the positions that are sampled."""
    if error.dim() == 3 and error.shape[-1] == 4:  # (batch, tokens, features)
        return float(error.square().mean((0, 1)).sum())
    flat = error.flatten(2)
    at = sample_positions(flat.shape[2], torch.arange(len(flat)), limit)
    picked = flat.gather(2, at[:, None].expand(-1, flat.shape[1], -1))
    return float(picked.square().mean((0, 2)).sum())


@pytest.mark.parametrize("name", [n for n in READERS if "linear" not in n])
def test_columns_times_matrix_is_the_convolution(name: str) -> None:
    model, x, _, _ = build(name)
    with torch.no_grad():
        h, y = everywhere(model, x)
    reader = model.reader
    if reader.bias is not None:
        y = y - reader.bias.detach().view(1, -1, *[1] * (y.dim() - 2))
    if reader.padding_mode == "circular":
        h = F.pad(h, (1, 1, 1, 1), mode="circular")
    window = window_of(
        {
            "stride": reader.stride,
            "padding": (0,) if reader.padding_mode == "circular" else reader.padding,
            "dilation": reader.dilation,
            "output_padding": reader.output_padding,
            "groups": reader.groups,
            "transposed": reader.transposed,
        },
        reader.weight.shape,
    )
    columns = torch.cat(list(columns_of(h, window, first=0, limit=7)), 1)
    made = (columns @ matrix_of(reader.weight.detach(), window).mT).transpose(0, 1).flatten(1)
    at = sample_positions(y.flatten(2).shape[2], torch.arange(len(y)), 7)
    wanted = y.flatten(2).gather(2, at[:, None].expand(-1, y.shape[1], -1))
    torch.testing.assert_close(made, wanted.transpose(1, 2).flatten(0, 1))
    again = weight_of(matrix_of(reader.weight, window), window, reader.weight.shape)
    assert torch.equal(again, reader.weight)


def test_positions_are_ascending_in_range_and_even_over_images() -> None:
    at = sample_positions(50, torch.arange(500), 8)
    assert at.shape == (500, 8)
    assert bool((at.diff(dim=1) > 0).all())
    assert int(at.min()) == 0
    assert int(at.max()) == 49
    counts = at.flatten().bincount(minlength=50)
    assert counts.min() > 0.8 * counts.float().mean()
    assert torch.equal(at[7:9], sample_positions(50, torch.tensor([7, 8]), 8))


def test_padding_reads_nothing() -> None:
    window = Window((3, 3), (1, 1), (1, 1), (1, 1))
    sources = find_sources(window, (2, 2), torch.tensor([0]))
    assert sources.tolist() == [[-1, -1, -1, -1, 0, 1, -1, 2, 3]]


class Branches(nn.Module):
    """Three readers of one axis, one behind a depthwise convolution, one before a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.b = nn.Conv2d(8, 5, 1, bias=False), nn.Conv2d(8, 5, 1)
        self.depthwise, self.c = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 5, 1)
        self.norm = nn.BatchNorm2d(5)
        self.norm.running_mean.uniform_(-1, 1)
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x))
        mixed = self.norm(self.a(h)) + self.b(h)
        return mixed + self.c(F.relu(self.depthwise(h)))


@torch.no_grad()
@pytest.mark.parametrize("new_biases", [True, False])
def test_several_consumers_share_moments_and_each_is_repaired(new_biases: bool) -> None:
    torch.manual_seed(1)
    model = Branches().double().eval()
    x = noisy((20, 3, 6, 6))
    graph = prunus.trace(model, x)
    plan = prunus.plan(graph, model, ratio=0.4, importance="random")
    statistics = prunus.importance.collect(model, graph, [x], "second_moment")
    sites: dict[str, Site] = {site.tensor: site for site in statistics.sites}
    assert sites["a.weight"].moments is sites["b.weight"].moments
    assert sites["a.weight"].moments is not sites["c.weight"].moments
    reports = prunus.recovery.compensate(
        small := copy.deepcopy(model), plan, graph, statistics=statistics, new_biases=new_biases
    ).repairs
    places = {report.tensor: report.place for report in reports}
    assert places == {"a.weight": "running mean", "b.weight": "bias", "c.weight": "bias"}
    assert small.a.bias is None
    h = F.relu(model.first(x))
    stay = list(plan.keep[Axis("a.weight", 1)])
    for report, name in zip(reports, "abc", strict=True):
        before, now = getattr(model, name), getattr(small, name)
        read = F.relu(model.depthwise(h)) if name == "c" else h
        dense, left = before(read), now(read[:, stay])
        if name == "a":
            dense, left = model.norm(dense), small.norm(left)
            scale = model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()
            dense, left = (out / scale.view(1, -1, 1, 1) for out in (dense, left))
        error = (dense - left).square().mean((0, 2, 3)).sum()
        assert report.left == pytest.approx(float(error), rel=1e-6)


def test_what_is_constant_costs_nothing() -> None:
    """A channel that never changes is a constant, which the bias takes up."""
    model = Mlp().double().eval()
    with torch.no_grad():
        model.first.weight[:5] = 0
    x = noisy((40, 5))
    graph = prunus.trace(model, x)
    kept = graph.all_kept
    kept[graph.group("first.weight[0]").units[:5]] = False
    plan = plan_of_mask(graph, model, kept, {"traced": graph.traced})
    small = copy.deepcopy(model)
    (report,) = prunus.recovery.compensate(small, plan, graph, [x], method="bias").repairs
    assert report.cut > 1e-3
    assert report.left < 1e-12
    torch.testing.assert_close(small(x), model(x))


def test_statistics_are_taken_of_what_loses_something_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    model = model.double().eval()
    x = noisy((30, 4))
    graph = prunus.trace(model, x)
    plan = prunus.plan(
        graph, model, budget=prunus.Budget(params=0.9), include="0.weight", importance="l2"
    )
    assert {axis.tensor for axis in plan.keep} == {"0.weight", "0.bias", "2.weight"}
    found = prunus.importance.collect(model, graph, [x], "second_moment", plan=plan)
    assert [site.tensor for site in found.sites if site.moments is not None] == ["2.weight"]
    every = prunus.importance.collect(model, graph, [x], "second_moment")
    assert all(site.moments is not None for site in every.sites)
    alone, _ = repair_all(model, plan, graph, found)
    whole, _ = repair_all(model, plan, graph, every)
    assert [new.report for _, new in alone] == [new.report for _, new in whole]


def test_predicting_changes_nothing() -> None:
    model, x, graph, plan = build("3x3")
    before = copy.deepcopy(model.state_dict())
    repair_all(model, plan, graph, prunus.importance.collect(model, graph, [x], "second_moment"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["linear without bias", "3x3 without bias"])
def test_a_new_bias_is_part_of_the_plan(name: str, tmp_path) -> None:
    model, x, graph, plan = build(name)
    small = copy.deepcopy(model)
    grown = prunus.recovery.compensate(small, plan, graph, [x]).plan
    assert dict(grown.biases) == {"reader.bias": 0}
    assert prunus.Plan.from_json(grown.to_json()) == grown
    costs = prunus.report.measure_costs(small, x)
    assert grown.costs["params"][1] == costs["params"]
    assert grown.costs["bytes"][1] == costs["bytes"]
    assert not plan.biases
    assert "biases" not in plan.to_json()
    other = prunus.apply(grown, copy.deepcopy(model))
    assert not other.reader.bias.any()
    torch.testing.assert_close(other(x), prunus.apply(plan, copy.deepcopy(model))(x))
    with prunus.mask(grown, model):
        masked = model(x)
    torch.testing.assert_close(masked, other(x))
    assert model.reader.bias is None
    assert prunus.verify(grown, model, x).verdict == "exact"
    assert model.reader.bias is None
    prunus.save(small, tmp_path / "small.safetensors")
    again = prunus.load(tmp_path / "small.safetensors", build=READERS[name][0])
    assert torch.equal(again(x), small(x))
    later_graph = prunus.trace(small, x)
    later = prunus.plan(later_graph, small, ratio=0.3)
    composed = grown.then(later)
    prunus.apply(later, small)
    assert composed.resulting_shapes() == later.resulting_shapes()
    prunus.save(small, tmp_path / "smaller.safetensors")
    again = prunus.load(tmp_path / "smaller.safetensors", build=READERS[name][0])
    assert torch.equal(again(x), small(x))


def test_two_compensated_cuts_compose() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 8, bias=False)
            self.c = nn.Linear(8, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))
            return y

    model = Three().double().eval()
    x = noisy((64, 4))
    original, plans = copy.deepcopy(model), []
    for include in ("b.weight", "a.weight"):
        graph = prunus.trace(model, x)
        plan = prunus.plan(
            graph, model, budget=prunus.Budget(params=0.8), include=f"{include}[[]0]"
        )
        plans.append(prunus.recovery.compensate(model, plan, graph, [x]).plan)
    assert [list(plan.biases) for plan in plans] == [["c.bias"], ["b.bias"]]
    both = plans[0].then(plans[1])
    assert both.shapes["b.bias"] == (8,)
    other = prunus.apply(both, original)
    shapes = [{n: t.shape for n, t in m.state_dict().items()} for m in (other, model)]
    assert shapes[0] == shapes[1]


def test_undo_puts_the_model_back() -> None:
    model, x, graph, plan = build("linear without bias")
    before = copy.deepcopy(model.state_dict())
    prunus.recovery.compensate(model, plan, graph, [x]).undo()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert model.reader.in_features == 9
