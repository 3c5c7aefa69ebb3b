"""An average of the weights is cut with the model: by structure, wholly or not at all."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import prunus
from prunus.errors import ApplyError
from prunus.surgeon import applied_plan
from prunus.surgeon.ema import Average
from tests.interrupts import Interrupted, fingerprint, lines_of
from tests.snapshots import same, snapshot

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.norm(self.conv(x)).relu()
        return out


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.layers = nn.Sequential(Block(), Block(), Block())
        self.up, self.head = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.norm(self.stem(x)).relu()).mean((2, 3))
        out: Tensor = self.head(self.up(x).relu())
        return out


def timm_v2(model: nn.Module) -> Any:
    return pytest.importorskip("timm.utils").ModelEmaV2(model, decay=0.9)


def timm_v3(model: nn.Module) -> Any:
    return pytest.importorskip("timm.utils").ModelEmaV3(model, decay=0.9)


def ultralytics(model: nn.Module) -> Any:
    return pytest.importorskip("ultralytics.utils.torch_utils").ModelEMA(model, decay=0.9, tau=1)


def averaged(model: nn.Module) -> Any:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)


class Shadow:
    """A user's own, on another precision, which knows the model as well."""

    def __init__(self, model: nn.Module) -> None:
        self.online, self.shadow = [model], copy.deepcopy(model).double()

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for old, new in zip(self.shadow.parameters(), model.parameters(), strict=True):
            old.lerp_(new.double(), 0.1)


KINDS: dict[str, tuple[Callable[[nn.Module], Any], Callable[[Any], nn.Module]]] = {
    "timm v2": (timm_v2, lambda ema: ema.module),
    "timm v3": (timm_v3, lambda ema: ema.module),
    "ultralytics": (ultralytics, lambda ema: ema.ema),
    "swa_utils": (averaged, lambda ema: ema.module),
    "a user's": (Shadow, lambda ema: ema.shadow),
}


class Run:
    """A model in training with its average."""

    def __init__(self, kind: str, wrap: Callable[[nn.Module], nn.Module] = lambda m: m) -> None:
        torch.manual_seed(0)
        self.model = Net()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 5)
        make, inside = KINDS[kind]
        self.ema, self.inside = make(wrap(self.model)), inside
        self.steps(3)

    @property
    def twin(self) -> nn.Module:
        return self.inside(self.ema)

    def steps(self, count: int) -> None:
        self.model.train()
        for _ in range(count):
            self.optimizer.zero_grad()
            self.model(X).square().mean().backward()
            self.optimizer.step()
            self.scheduler.step()
            self.average()

    def average(self) -> None:
        if isinstance(self.ema, AveragedModel):
            self.ema.update_parameters(self.model)
        else:
            self.ema.update(self.model)

    def plan(self, **options: Any) -> prunus.Plan:
        graph = prunus.trace(self.model, X)
        return prunus.plan(graph, self.model, **(options or {"ratio": 0.5}))

    def distance(self) -> float:
        pairs = zip(self.twin.parameters(), self.model.parameters(), strict=True)
        with torch.no_grad():
            return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_average_is_cut_by_the_same_plan_and_goes_on(kind: str, drop: bool) -> None:
    run = Run(kind)
    plan = run.plan(ratio=0.5, drop=["layers.1"]) if drop else run.plan()
    wanted, parameter = copy.deepcopy(run.twin), run.twin.head.weight
    prunus.apply(plan, wanted, check=False)
    prunus.apply(plan, run.model, optimizer=run.optimizer, ema=run.ema, scheduler=run.scheduler)
    assert run.twin.up.out_features == 8
    assert run.twin.head.weight is parameter
    assert same(run.twin.state_dict(), wanted.state_dict())
    assert same(applied_plan(run.twin).keep, plan.keep)
    run.steps(2)
    before = run.distance()
    for _ in range(60):  # at rest, the average comes to the model
        run.average()
    assert before > 1e-3
    assert run.distance() < 1e-2 * before


@pytest.mark.parametrize("recover", ["least_squares", "recalibrate"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_average_follows_a_repair(kind: str, recover: Any) -> None:
    """Parameters move by what the repair changed, buffers become what it measured."""
    run = Run(kind)
    twin, model = copy.deepcopy(run.twin), copy.deepcopy(run.model)
    done = prunus.shrink(run.model, X, ratio=0.5, data=[X], recover=recover, ema=run.ema)
    prunus.apply(done.plan, twin, check=False)
    prunus.apply(done.plan, model)
    moved = set()
    for name, repaired in run.model.state_dict().items():
        cut, found = model.state_dict()[name], run.twin.state_dict()[name]
        if torch.equal(repaired, cut):
            assert torch.equal(found, twin.state_dict()[name])
            continue
        moved.add(name)
        buffer = name in dict(run.model.named_buffers())
        wanted = repaired if buffer else twin.state_dict()[name] + (repaired - cut)
        torch.testing.assert_close(found, wanted, check_dtype=False)
        assert found.data_ptr() != repaired.data_ptr()
    assert ("head.weight" if recover == "least_squares" else "norm.running_mean") in moved
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.01)
    run.scheduler = torch.optim.lr_scheduler.StepLR(run.optimizer, 5)
    run.steps(2)


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupt_leaves_model_and_average_as_they_were(kind: str) -> None:
    run = Run(kind)
    plan = run.plan()

    def call() -> None:
        prunus.apply(plan, run.model, optimizer=run.optimizer, ema=run.ema, scheduler=run.scheduler)

    def state() -> list[Any]:
        held = {k: v for k, v in vars(run.ema).items() if k != "decay"}
        found = [fingerprint(run.model, run.optimizer), fingerprint(run.twin)]
        return [*found, {k: str(v) for k, v in held.items()}]

    other = Run(kind)
    lines = lines_of(
        lambda: prunus.apply(plan, other.model, optimizer=other.optimizer, ema=other.ema)
    )
    before = state()
    chosen = [*random.Random(0).sample(range(1, lines), 9), *range(lines - 60, lines - 10, 10)]
    for line in chosen:
        with pytest.raises((KeyboardInterrupt, MemoryError)), Interrupted(line):
            call()
        assert state() == before, line
    call()
    assert run.twin.up.out_features == run.model.up.out_features == 8


def test_a_failing_check_leaves_both() -> None:
    run = Run("timm v2")
    plan = run.plan()
    plan.origin["traced"]["outputs"]["output"] = [1]
    before = snapshot(run.model), snapshot(run.twin)
    with pytest.raises(ApplyError, match="it should be"):
        prunus.apply(plan, run.model, ema=run.ema)
    assert same((snapshot(run.model), snapshot(run.twin)), before)


def test_the_average_of_another_model_is_refused() -> None:
    run = Run("timm v2")
    plan, before = run.plan(), snapshot(run.model)
    for other in (nn.Linear(3, 4), object(), timm_v2(nn.Linear(2, 2)), {"head.weight": X}):
        with pytest.raises(ApplyError, match=r"ema= \(\w+\) holds no module of the model's"):
            prunus.apply(plan, run.model, ema=other)
    assert same(snapshot(run.model), before)


def test_the_scheduler_of_another_optimizer_is_refused() -> None:
    run = Run("timm v2")
    other = torch.optim.SGD(Net().parameters(), lr=0.1)
    wrong = torch.optim.lr_scheduler.StepLR(other, 1)
    several = torch.optim.lr_scheduler.SequentialLR(other, [wrong], [])
    for scheduler in (wrong, several):
        with pytest.raises(ApplyError, match="drives another optimizer"):
            prunus.apply(run.plan(), run.model, optimizer=run.optimizer, scheduler=scheduler)
    assert run.model.up.out_features == 16


@pytest.mark.parametrize("verb", ["heads", "layers"])
def test_heads_and_layers(verb: str) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 4, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    ema, x = AveragedModel(model), torch.randn(2, 5, 8)
    if verb == "heads":
        prunus.prune_heads(model, {0: [1, 2]}, x, ema=ema)
        assert ema.module.layers[0].self_attn.num_heads == 2
    else:
        prunus.drop_layers(model, [1], x, ema=ema)
        assert len(ema.module.layers) == 2
    torch.testing.assert_close(ema.module.eval()(x), model(x))


def test_a_tied_weight_follows_its_repair_once() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    twin = copy.deepcopy(model)
    average = Average(model, twin, repaired=True)
    before = twin[0].weight.detach().clone()
    first.weight.data = first.weight.detach() + 1
    average.add_repair()
    torch.testing.assert_close(twin[0].weight.detach(), before + 1)
    assert twin[1].weight is twin[0].weight


def test_what_a_holder_caches_of_a_dropped_layer_is_gone() -> None:
    run = Run("a user's")
    run.ema.watched = run.model.layers[1].conv.weight.detach()
    run.ema.kept = run.model.layers[0].conv.weight.detach()
    prunus.drop_layers(run.model, [1], X, ema=run.ema)
    assert not hasattr(run.ema, "watched")
    assert run.ema.kept.shape == (8, 8, 3, 3)
