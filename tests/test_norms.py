"""Norms after a cut: the formulas by hand, what counts as a norm, and the way back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models_zoo
import prunus
from models_zoo import data as fashion
from prunus.calibration.batches import Batches
from prunus.graph.axis import Axis
from prunus.recovery import LOOKED_AT, answers_of, distance, recover, refresh
from prunus.recovery.layer_norms import Correction, correct_norms, corrections_of, watching
from prunus.surgeon.snapshot import all_or_nothing
from tests.snapshots import same, snapshot

WIDTH, EPS = 12, 1e-3


class HandRMS(nn.Module):
    """As libraries of language models write it, with a factor and an addend to plant faults."""

    def __init__(self, factor: float = 1.0, addend: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.variance_epsilon = EPS
        self.factor, self.addend = factor, addend

    def forward(self, hidden: Tensor) -> Tensor:
        square = hidden.square().mean(-1, keepdim=True)
        normed = hidden * torch.rsqrt(square + self.variance_epsilon)
        return (self.weight + self.addend) * normed * self.factor


class HandLayer(nn.Module):
    """A LayerNorm that is none of PyTorch's; over any dim."""

    def __init__(self, dim: int = -1, addend: float = 0.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.lift = nn.Parameter(torch.randn(WIDTH))
        self.dim, self.addend = dim, addend

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(self.dim, -1)
        x = (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True, correction=0)
        return ((self.gain + self.addend) * x + self.lift).movedim(-1, self.dim)


class ByMax(HandRMS):
    """Divides by the largest entry."""

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * hidden / hidden.abs().amax(-1, keepdim=True)


class ByGroup(nn.LayerNorm):
    """Called a LayerNorm, and divides by the largest entry as well."""

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * hidden / hidden.abs().amax(-1, keepdim=True) + self.bias


class Scale(HandRMS):
    """Norms nothing."""

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * hidden


def layer(**options: Any) -> nn.LayerNorm:
    norm = nn.LayerNorm(WIDTH, eps=EPS, **options)
    if norm.bias is not None:  # else the shift can't be made up for, and may hide what the scale is
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    return norm


def rms() -> nn.RMSNorm:
    norm = nn.RMSNorm(WIDTH, eps=EPS)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    return norm


def net(make: Callable[[], nn.Module]) -> nn.Sequential:
    """A norm over channels whose scales and means differ, eight to one."""
    torch.manual_seed(0)
    norm, first = make(), nn.Linear(6, WIDTH)
    with torch.no_grad():
        first.weight *= torch.linspace(0.25, 2, WIDTH)[:, None]
        first.bias.copy_(torch.linspace(-0.5, 1, WIDTH))
    return nn.Sequential(first, norm, nn.Linear(WIDTH, 3)).double().eval()


def rows() -> list[Tensor]:
    """Batches of different sizes, samples × positions × features."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 5, 6, generator=generator, dtype=torch.float64) for n in (16, 3)]


def measure_norms(
    model: nn.Module, plan: prunus.Plan, data: Iterable[Any]
) -> tuple[Correction, ...]:
    """How norms have to change, in one pass over the data."""
    with watching(model, plan) as watches:
        if watches:
            answers_of(model, data)
    return corrections_of(watches)


def planned(model: nn.Module, x: Tensor | None = None, **options: Any) -> prunus.Plan:
    x = rows()[0] if x is None else x
    return prunus.plan(prunus.trace(model, x), model, **({"ratio": 0.5} | options))


def by_hand(x: Tensor, stay: list[int], *, centred: bool, eps: float) -> tuple[float, float]:
    """The two means, row by row."""
    ratios, moves = [], []
    for row in x.reshape(-1, WIDTH):
        part = row[stay]
        centre = row.mean() if centred else 0.0
        narrow = part.var(correction=0) if centred else part.square().mean()
        wide = row.var(correction=0) if centred else row.square().mean()
        ratios.append(((narrow + eps) / (wide + eps)).sqrt())
        moves.append((part.mean() - centre) / (wide + eps).sqrt() if centred else 0.0)
    return float(sum(ratios) / len(ratios)), float(sum(moves) / len(moves))


NORMS: dict[str, tuple[Callable[[], nn.Module], bool, float]] = {
    "LayerNorm": (layer, True, EPS),
    "LayerNorm without bias": (lambda: layer(bias=False), True, EPS),
    "RMSNorm": (rms, False, EPS),
    "RMSNorm by hand": (HandRMS, False, EPS),
    "1 + γ": (lambda: HandRMS(addend=1.0), False, EPS),
    "LayerNorm by hand": (HandLayer, True, 0.0),
    "LayerNorm of 1 + γ": (lambda: HandLayer(addend=1.0), True, 0.0),
}


@pytest.mark.parametrize("name", NORMS)
@torch.no_grad()
def test_a_norm_comes_nearer_to_what_it_said_by_the_formula(name: str) -> None:
    make, centred, eps = NORMS[name]
    model = net(make)
    plan = planned(model)
    (found,) = measure_norms(model, plan, rows())
    x = torch.cat([model[0](batch) for batch in rows()])
    stay = list(plan.keep[Axis(found.weight, 0)])
    scale, shift = by_hand(x, stay, centred=centred, eps=eps)
    assert found.scale == pytest.approx(scale, rel=1e-9)
    assert found.shift == pytest.approx(shift, rel=1e-9) if centred else found.shift == 0
    assert abs(scale - 1) > 0.03

    wanted = model[1](x)[..., stay]
    first = [p.clone()[stay] for p in model[1].parameters()]
    prunus.apply(plan, model)
    before = (model[1](x[..., stay]) - wanted).square().mean()
    correct_norms(model, [found])
    after = (model[1](x[..., stay]) - wanted).square().mean()
    assert after < before
    offset = 1.0 if "1 + γ" in name else 0.0
    weight, *bias = model[1].parameters()
    assert torch.allclose(weight, (first[0] + offset) * scale - offset, rtol=1e-9)
    for now, was in zip(bias, first[1:], strict=True):
        assert torch.allclose(now, was + (first[0] + offset) * shift, rtol=1e-9)


def test_of_channels_first_the_norm_is_over_dim_1() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, WIDTH, 3), HandLayer(dim=1), nn.Conv2d(WIDTH, 2, 1)).eval()
    x = torch.randn(4, 3, 7, 7)
    plan = planned(model, x)
    (found,) = measure_norms(model, plan, [x])
    stay = list(plan.keep[Axis("1.gain", 0)])
    with torch.no_grad():
        scale, _ = by_hand(model[0](x).movedim(1, -1), stay, centred=True, eps=0.0)
    assert found.scale == pytest.approx(scale, rel=1e-5)


def test_half_the_digits_are_enough_to_know_a_norm() -> None:
    model = net(HandRMS).bfloat16()
    data = [batch.bfloat16() for batch in rows()]
    (found,) = measure_norms(model, planned(model, data[0]), data)
    (exact,) = measure_norms(net(HandRMS), planned(net(HandRMS)), rows())
    assert found.scale == pytest.approx(exact.scale, rel=1e-2)


@pytest.mark.parametrize(
    "make",
    [
        *(lambda: HandRMS(factor=1.01), ByMax, Scale, lambda: ByGroup(WIDTH)),
        *(lambda: nn.PReLU(WIDTH), lambda: HandRMS(addend=0.5)),
    ],
)
def test_what_only_looks_like_a_norm_is_passed_over(make: Callable[[], nn.Module]) -> None:
    model = net(make)
    data = [batch.flatten(0, 1) for batch in rows()]  # PReLU has its channels in dim 1
    plan = planned(model, data[0])
    names = [name for name, _ in model[1].named_parameters()]
    assert all(Axis(f"1.{name}", 0) in plan.keep for name in names)
    assert measure_norms(model, plan, data) == ()


def test_what_two_formulas_fit_is_passed_over() -> None:
    """On rows whose mean is zero an RMSNorm says what a LayerNorm says; PyTorch's is known."""
    for make, count in ((HandRMS, 0), (rms, 1)):
        model = net(make)
        plan = planned(model)
        with torch.no_grad():
            model[0].weight -= model[0].weight.mean(0)
            model[0].bias -= model[0].bias.mean()
        assert len(measure_norms(model, plan, rows())) == count


def test_a_norm_that_shares_its_weight_is_left_alone() -> None:
    torch.manual_seed(0)
    first, second = layer(), layer()
    second.weight = first.weight
    model = nn.Sequential(nn.Linear(6, WIDTH), first, nn.ReLU(), second, nn.Linear(WIDTH, 3))
    model = model.double().eval()
    assert measure_norms(model, planned(model), rows()) == ()
    second.weight = nn.Parameter(first.weight.detach().clone())
    assert len(measure_norms(model, planned(model), rows())) == 2


def test_a_norm_over_an_axis_that_loses_nothing_stays_and_no_data_are_read() -> None:
    torch.manual_seed(0)
    hidden = nn.Sequential(nn.Linear(WIDTH, 20), nn.ReLU(), nn.Linear(20, 3))
    model = nn.Sequential(nn.Linear(6, WIDTH), layer(), *hidden).double().eval()
    budget = prunus.Budget(params=0.7)
    plan = planned(model, ratio=None, budget=budget, exclude="0.weight[0]")
    assert plan.keep

    def unread() -> Iterator[Any]:
        raise AssertionError("the data were read")
        yield

    assert measure_norms(model, plan, unread()) == ()
    norm = copy.deepcopy(model[1])
    done = prunus.shrink(model, rows()[0], budget=budget, data=rows(), exclude="0.weight[0]")
    assert [step.name for step in done.recovery] == ["cut", "least squares"]
    assert all(map(torch.equal, model[1].parameters(), norm.parameters()))


def test_the_dense_model_is_only_read() -> None:
    model = net(layer).train()
    before = snapshot(model)
    assert measure_norms(model, planned(model), rows())
    assert same(snapshot(model), before)
    assert not model[1]._forward_hooks


class Classifier(nn.Module):
    """A BERT whose stream is no output, so that it can lose channels."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = models_zoo.build("bert_tiny")
        self.head = nn.Linear(128, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.bert(ids)[1])


@pytest.mark.parametrize("make", [Classifier, lambda: models_zoo.build("llama_tiny")])
def test_end_to_end_no_step_makes_the_outputs_worse(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    dense = make().eval()
    data = [torch.randint(1, 500, (8, 16)) for _ in range(LOOKED_AT)]
    with torch.no_grad():  # an untrained stream has channels that are all alike
        for name, parameter in dense.named_parameters():
            if "embed" in name:
                parameter *= torch.linspace(0.1, 2, parameter.shape[-1])
    model = copy.deepcopy(dense)
    budget = prunus.Budget(params=0.7)
    done = prunus.shrink(model, data[0], budget=budget, data=data, each_group=False)
    assert [step.name for step in done.recovery] == ["cut", "least squares", "norms"]
    kept = [step.error for step in done.recovery if step.kept]
    assert kept == sorted(kept, reverse=True)
    assert done.recovery[-1].kept
    assert kept[-1] < 0.99 * kept[-2]
    seen = Batches(data).first(LOOKED_AT)
    assert distance(answers_of(dense, seen), answers_of(model, seen)) == pytest.approx(kept[-1])


def test_what_makes_the_outputs_worse_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted, model = net(rms), net(rms)
    budget = prunus.Budget(params=0.5)
    prunus.shrink(fitted, rows()[0], budget=budget, data=rows(), recover="least_squares")
    wrong = Correction("1.weight", "", 0, 9.0, 3.0)
    monkeypatch.setattr(recover, "corrections_of", lambda _: (wrong,))
    done = prunus.shrink(model, rows()[0], budget=budget, data=rows())
    assert [(s.name, s.kept) for s in done.recovery][1:] == [
        ("least squares", True),
        ("norms", False),
    ]
    assert all(map(torch.equal, model.parameters(), fitted.parameters()))


def test_what_is_fitted_behind_a_norm_is_judged_with_the_norm_corrected() -> None:
    """Here least squares alone are worse than the cut, and with the norm twice as good."""
    dense, model = net(layer), net(layer)
    done = prunus.shrink(model, rows()[0], budget=prunus.Budget(params=0.7), data=rows())
    cut, fitted, corrected = done.recovery
    assert fitted.kept
    assert corrected.kept
    assert fitted.error > cut.error > 2 * corrected.error
    seen = Batches(rows()).first(LOOKED_AT)
    error = distance(answers_of(dense, seen), answers_of(model, seen))
    assert error == pytest.approx(corrected.error)


@pytest.mark.parametrize("fails_at", range(1, 6))
def test_a_failure_at_any_comparison_leaves_the_model_whole(
    fails_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the cut, least squares, norms and batch norms; what is left is undone as well.

    The batch norm loses nothing, so that a cut leaves its buffers where they are.
    """
    torch.manual_seed(0)
    last = nn.BatchNorm1d(3)
    model = nn.Sequential(nn.Linear(6, WIDTH), layer(), nn.Linear(WIDTH, 3), last).eval()
    before = snapshot(model)
    data = [batch.flatten(0, 1).float() for batch in rows()]
    graph = prunus.trace(model, data[0])
    plan = prunus.plan(graph, model, ratio=0.5)
    count = 0

    def nearer_each_time(*_: Any, **__: Any) -> float:
        nonlocal count
        count += 1
        if count == fails_at:
            raise KeyboardInterrupt
        return 1 / count

    monkeypatch.setattr(recover, "distance", nearer_each_time)
    if fails_at < 5:
        with pytest.raises(KeyboardInterrupt):
            all_or_nothing(recover.cut_and_recover)(model, plan, graph, data)
        assert same(snapshot(model), before)
    else:
        _, steps = recover.cut_and_recover(model, plan, graph, data)
        assert [step.name for step in steps][2:] == ["norms", "batch norms"]
        assert not torch.equal(last.running_var, torch.ones(3))


def convolutions() -> nn.Sequential:
    """Two batch norms with statistics of pictures that are no standard normal numbers."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    )
    for norm in (model[1], model[4]):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    prunus.recovery.recalibrate(model, [0.3 + 1.5 * torch.randn(16, 3, 10, 10) for _ in range(4)])
    return model.eval()


PICTURES = torch.zeros(2, 3, 10, 10)


@torch.no_grad()
def read_by_second(model: nn.Sequential, pictures: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance of what the second batch norm reads, where the first normalises anew."""
    norm, found = model[1], []
    for x in pictures:
        x = nn.functional.batch_norm(
            model[0](x), None, None, norm.weight, norm.bias, training=True, eps=norm.eps
        )
        found.append(model[3](x.relu()))
    rows = torch.cat(found).movedim(1, 0).flatten(1).double()
    return rows.mean(1), rows.var(1, correction=0)


def test_there_are_two_random_inputs_of_the_traced_shape() -> None:
    model = convolutions()
    plan = prunus.plan(prunus.trace(model, torch.zeros(3, 3, 10, 10)), model, ratio=0.5)
    (first,), (second,) = (args for args, _ in refresh.random_calls(plan, model))
    assert first.shape == second.shape == (3, 3, 10, 10)
    assert not torch.equal(first, second)


def test_looking_at_random_inputs_leaves_the_model_as_it_was() -> None:
    model = convolutions().train()
    before = snapshot(model)
    seen = refresh.look(model, [((torch.randn(2, 3, 10, 10),), {})])
    assert same(snapshot(model), before)
    assert not torch.equal(seen.statistics["1"][0], model[1].running_mean)


def test_batch_norms_follow_random_inputs_by_the_formula() -> None:
    dense, model = convolutions(), convolutions()
    done = prunus.shrink(model, PICTURES, budget=prunus.Budget(macs=0.5), seed=3)
    assert [(s.name, s.kept) for s in done.recovery] == [
        ("cut", True),
        ("batch norms (no data)", True),
    ]
    assert done.recovery[1].error < done.recovery[0].error
    pictures = [args[0] for args, _ in refresh.random_calls(done.plan, dense, seed=3)]
    stay = list(done.plan.keep[Axis("4.running_mean", 0)])
    factors = []
    for picture in pictures:
        _, variance = read_by_second(dense, [picture])
        _, spread = read_by_second(model, [picture])
        factors.append((spread / variance[stay]).log())
    found, error = (factors[0] + factors[1]) / 2, (factors[0] - factors[1]) / 2
    noise = float(error.square().mean() / found.var(correction=0))
    factor = found.mean() + max(1 - noise, 0) * (found - found.mean())
    stored, norm = dense[4].running_var[stay].double(), model[4]
    assert torch.allclose(norm.running_var.double(), stored * factor.exp(), rtol=1e-4)
    first = list(done.plan.keep[Axis("1.running_mean", 0)])
    assert torch.equal(model[1].running_mean, dense[1].running_mean[first])  # nothing went before
    # E relu(y) of a normal y with the mean β and the spread γ.
    beta, gamma = (values.detach().double() for values in (dense[1].bias, dense[1].weight.abs()))
    normal = torch.distributions.Normal(0, 1)
    inside = normal.log_prob(beta / gamma).exp() * gamma + beta * normal.cdf(beta / gamma)
    inside[first] = 0
    lost = dense[3].weight.detach().double().sum((2, 3)) @ inside
    wanted = dense[4].running_mean[stay].double() - lost[stay]
    # The engine takes a few quantiles of the normal in place of the integral.
    assert torch.allclose(norm.running_mean.double(), wanted, rtol=1e-2, atol=1e-3)


class Mixed(nn.Module):
    """Branches that are added, concatenated and split between batch norms; and a gate."""

    def __init__(self) -> None:
        super().__init__()
        for number, (inputs, outputs) in enumerate(((3, 8), (3, 8), (16, 12), (12, 6), (6, 4))):
            self.add_module(f"c{number}", nn.Conv2d(inputs, outputs, 1))
            norm = nn.BatchNorm2d(outputs)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
            self.add_module(f"n{number}", norm)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.n0(self.c0(x)).relu(), self.n1(self.c1(x))
        both = torch.cat([nn.functional.silu(b) * 2, a + b], 1)
        c = self.n2(self.c2(both))
        left, _ = c.split(6, 1)
        d = self.n3(self.c3(c)) + left
        return self.n4(self.c4(d * d.mean((2, 3), keepdim=True).sigmoid()))


def test_means_are_followed_through_sums_concatenations_and_splits() -> None:
    """Against means over many normal values behind the first batch norms."""
    torch.manual_seed(0)
    model = Mixed().eval()
    graph = prunus.trace(model, torch.zeros(1, 3, 4, 4))
    plan = prunus.plan(graph, model, ratio=0.5, importance="random")
    found = refresh.lost_means(graph, model, plan)
    assert set(found) == {"n2.running_mean", "n3.running_mean"}  # what a gate does is not known
    values = {n: torch.randn(1, 8, 400, 400) * model.get_submodule(n).weight.view(-1, 1, 1)
              + model.get_submodule(n).bias.view(-1, 1, 1) for n in ("n0", "n1")}  # fmt: skip
    a, b = values["n0"].relu(), values["n1"]
    inside = torch.cat([nn.functional.silu(b) * 2, a + b], 1).mean((0, 2, 3))
    inside[list(plan.keep[Axis("c2.weight", 1)])] = 0
    wanted = -model.c2.weight.flatten(1) @ inside
    assert torch.allclose(found["n2.running_mean"].float(), wanted, atol=0.02)


def test_without_data_a_trained_network_gets_most_of_its_accuracy_back() -> None:
    images, labels = (values[:500] for values in fashion.test())
    inputs = models_zoo.example_inputs("resnet_fmnist")[0]
    found = {}
    for recovery in ("none", "auto"):
        model = models_zoo.build("resnet_fmnist", pretrained=True)
        options: Any = {"recover": recovery, "each_group": False, "verified": False}
        prunus.shrink(model, inputs, budget=prunus.Budget(macs=0.7), **options)
        found[recovery] = fashion.accuracy(model, images, labels)
    assert found["none"] < 65
    assert found["auto"] > 85


def test_dropped_blocks_count_as_part_of_what_the_cut_changed() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    one = torch.ones(2, dtype=torch.float64)
    dense = {"0": (7 * one, 3 * one), "1": (7 * one, 3 * one), "2": (0 * one, one)}
    plan = prunus.Plan({}, {}, drops=("1",))
    refresh.move_statistics(refresh.moves_of(model, plan, [dense], [{"1": (one, 4 * one)}], {}))
    assert model[1].running_mean.tolist() == [1, 1]
    assert model[1].running_var.tolist() == [4, 4]
    assert model[0].running_var.tolist() == [1, 1]


def test_channels_on_which_random_inputs_say_nothing_stay_as_they_are() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    numbers = [torch.tensor(v, dtype=torch.float64) for v in ((1, 0), (1, 0), (3, 3), (1e9, 1))]
    mean, variance, moved, spread = numbers
    seen = [{"0": (mean, variance)}], [{"0": (moved, spread)}]
    refresh.move_statistics(refresh.moves_of(model, prunus.Plan({}, {}), *seen, {}))
    assert model[0].running_mean.tolist() == [2, 0]
    assert model[0].running_var.tolist() == pytest.approx([refresh.MOST, 1])


def spoil(moves: list[refresh.Move]) -> None:
    moves[1].norm.running_var.fill_(1e-9)


def test_statistics_that_make_the_outputs_worse_are_taken_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, cut = convolutions(), convolutions()
    options: Any = {"budget": prunus.Budget(macs=0.5), "each_group": False}
    prunus.shrink(cut, PICTURES, recover="none", **options)
    monkeypatch.setattr(recover, "move_statistics", spoil)
    done = prunus.shrink(model, PICTURES, **options)
    assert not done.recovery[-1].kept
    assert all(map(torch.equal, model.buffers(), cut.buffers()))


def test_a_failure_without_data_leaves_the_model_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = convolutions().train()
    before = snapshot(model)

    def fail(moves: list[refresh.Move]) -> None:
        spoil(moves)
        raise KeyboardInterrupt

    monkeypatch.setattr(recover, "move_statistics", fail)
    with pytest.raises(KeyboardInterrupt):
        prunus.shrink(model, PICTURES, budget=prunus.Budget(macs=0.5))
    assert same(snapshot(model), before)


def test_where_random_inputs_help_nothing_the_model_is_only_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    normless = nn.Sequential(nn.Linear(6, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2))
    assert prunus.shrink(normless, torch.zeros(1, 6), ratio=0.5).recovery == ()

    def refuse(*_: Any) -> None:
        raise ArithmeticError("the model's own error")

    monkeypatch.setattr(recover, "look", refuse)
    model = convolutions()
    done = prunus.shrink(model, PICTURES, budget=prunus.Budget(macs=0.5))
    assert done.recovery == ()
    assert model[0].out_channels < 16


def test_one_value_per_channel_says_nothing_of_variances() -> None:
    """In training mode PyTorch refuses it, and normalised by itself it would be zero."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(6, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU()),
        *(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2)),
    ).eval()
    done = prunus.shrink(model, torch.zeros(1, 6), ratio=0.5)
    assert [step.name for step in done.recovery] == ["cut", "batch norms (no data)"]
    assert torch.equal(model[4].running_var, torch.ones(len(model[4].running_var)))
