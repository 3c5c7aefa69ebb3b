"""Surgery: what stays as it is, what follows, and that it is all or nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import prunus
from prunus.errors import ApplyError, PlanError
from prunus.graph.axis import Axis, Mask
from prunus.graph.coupling import CouplingGraph
from prunus.graph.plans import Plan
from prunus.graph.program import state_of, tensors_of
from prunus.surgeon import apply
from prunus.surgeon.apply import slice_tensor
from prunus.tracer.trace import trace
from prunus.verifier.permutation import relative_error
from prunus.verifier.replay import Replay
from prunus.verifier.verify import verify
from tests import faults
from tests.faults import Net, conv, head
from tests.pipeline import cut, plan_for, thin
from tests.snapshots import same, snapshot

IMAGE = (2, 3, 8, 8)


def planned(model: nn.Module, *args: Tensor, seed: int = 0) -> Plan:
    graph = trace(model, args)
    return plan_for(graph, model, thin(graph, seed=seed))


# --- what stays -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_dtype_stays(dtype: torch.dtype) -> None:
    model = faults.residual().eval().to(dtype)
    apply(planned(model, torch.randn(IMAGE, dtype=dtype)), model)
    floating = [t for t in model.state_dict().values() if t.is_floating_point()]
    assert all(t.dtype == dtype for t in floating)
    assert model(torch.randn(IMAGE, dtype=dtype)).dtype == dtype


def test_device_stays() -> None:
    with torch.device("meta"):
        model, x = faults.residual().eval(), torch.randn(IMAGE)
    plan = planned(model, x)
    apply(plan, model)
    assert all(t.device.type == "meta" for t in model.state_dict().values())
    assert {n: tuple(t.shape) for n, t in model.state_dict().items()} == plan.resulting_shapes()


def test_identity_flags_modes_and_hooks_stay() -> None:
    model = faults.residual()
    plan = planned(model, torch.randn(IMAGE))
    model.conv2.weight.requires_grad_(False)
    model.train()
    model.bn1.eval()
    seen: list[str] = []
    model.conv1.register_forward_hook(lambda *_: seen.append("module"))
    model.conv1.weight.register_hook(lambda grad: seen.append(f"tensor {tuple(grad.shape)}"))
    model.conv3.weight.register_post_accumulate_grad_hook(lambda _: seen.append("accumulated"))
    parameters = dict(model.named_parameters())
    flags = {name: p.requires_grad for name, p in parameters.items()}
    modes = {name: m.training for name, m in model.named_modules()}

    assert apply(plan, model) is model
    after = dict(model.named_parameters())
    assert all(after[name] is parameters[name] for name in parameters)
    assert {name: p.requires_grad for name, p in after.items()} == flags
    assert {name: m.training for name, m in model.named_modules()} == modes
    seen.clear()
    model(torch.randn(IMAGE)).sum().backward()
    assert sorted(seen) == ["accumulated", "module", f"tensor {tuple(model.conv1.weight.shape)}"]


def test_tied_weights_stay_tied() -> None:
    model = faults.tied()
    plan = planned(model, torch.randn(IMAGE))
    weight = model.embed.weight
    apply(plan, model)
    assert model.embed.weight is weight is model.out.weight
    assert weight.shape[1] == model.embed.embedding_dim == model.out.in_features < 12
    assert model(torch.randn(IMAGE)).shape == (2, 3, 20)


def test_a_buffer_under_two_names_stays_one() -> None:
    model = faults.Buffered()
    model.first.register_buffer("too", model.gain)
    apply(planned(model, torch.randn(IMAGE)), model)
    assert model.first.too is model.gain
    assert model.gain.shape[0] == model.first.out_channels < 12


def test_memory_format_stays() -> None:
    weight = torch.randn(8, 6, 3, 3).contiguous(memory_format=torch.channels_last)
    small = slice_tensor(weight, {0: torch.tensor([1, 4, 5]), 1: torch.tensor([0, 2, 3])})
    assert small.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(small, weight[[1, 4, 5]][:, [0, 2, 3]])
    assert slice_tensor(weight.contiguous(), {0: torch.tensor([0])}).is_contiguous()


def test_attributes_follow() -> None:
    model = faults.depthwise()
    plan = planned(model, torch.randn(IMAGE))
    apply(plan, model)
    width = len(plan.keep[Axis("expand.weight", 0)])
    assert model.expand.out_channels == width < 12
    assert (model.filter.in_channels, model.filter.out_channels) == (width, width)
    assert model.filter.groups == model.bn.num_features == model.project.in_channels == width
    assert repr(width) in repr(model.filter)


# --- training goes on -----------------------------------------------------------------------


def _learn(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(torch.randn(IMAGE)), torch.tensor([1, 2])).backward()
    optimizer.step()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    ],
    ids=["adam", "sgd"],
)
def test_the_optimizer_goes_on(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    model = faults.residual().train()
    plan = planned(model, torch.randn(IMAGE))
    optimizer = make(model.parameters())
    _learn(model, optimizer)
    moments = {
        name: {k: v.clone() for k, v in optimizer.state[p].items() if isinstance(v, Tensor)}
        for name, p in model.named_parameters()
    }
    apply(plan, model, optimizer=optimizer)
    for name, parameter in model.named_parameters():
        own = {
            d: torch.tensor(plan.keep[Axis(name, d)])
            for d in range(parameter.dim())
            if Axis(name, d) in plan.keep
        }
        for key, before in moments[name].items():
            after = optimizer.state[parameter][key]
            expected = before if before.dim() == 0 else slice_tensor(before, own)
            assert torch.equal(after, expected), (name, key)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    _learn(model, optimizer)
    for name, parameter in model.named_parameters():
        if name not in ("conv1.bias", "conv2.bias"):  # a batch norm takes them off again
            assert not torch.equal(parameter, before[name]), f"{name} does not learn any more"


def test_gradients_are_cut_along() -> None:
    model = faults.residual()
    plan = planned(model, torch.randn(IMAGE))
    model(torch.randn(IMAGE)).sum().backward()
    model.conv2.bias.grad = None
    before = {n: p.grad for n, p in model.named_parameters()}
    apply(plan, model)
    for name, parameter in model.named_parameters():
        old = before[name]
        if old is None:
            assert parameter.grad is None
            continue
        own = {
            d: torch.tensor(plan.keep[Axis(name, d)])
            for d in range(old.dim())
            if Axis(name, d) in plan.keep
        }
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, slice_tensor(old, own))


# --- all or nothing -------------------------------------------------------------------------


class Asserting(nn.Module):
    """Its forward insists on a width that nothing on the module says."""

    def __init__(self, insist: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.first, self.bn, self.second = conv(3, 12), nn.BatchNorm2d(12), conv(12, 8)
        self.head, self.insist = head(8), insist
        self.register_buffer("gain", torch.rand(12, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.first(x)) * self.gain
        self.insist(x)
        out: Tensor = self.head(self.second(x))
        return out


def _assert_width(x: Tensor) -> None:
    assert int(x.shape[1]) == 12, "12 channels, please"


def _fixed_view(x: Tensor) -> None:
    x.as_strided((2, 12, 64), (768, 64, 1))
    if x.shape[1] * 64 != 768:
        raise IndexError("not 768")


@pytest.mark.parametrize("insist", [_assert_width, _fixed_view])
@pytest.mark.parametrize("optimised", [False, True])
def test_a_forward_that_breaks_puts_everything_back(
    insist: Callable[[Tensor], None], optimised: bool
) -> None:
    model = Asserting(lambda x: None)
    plan = planned(model, torch.randn(IMAGE))
    assert Axis("first.weight", 0) in plan.keep
    model.insist = insist
    model.train()
    optimizer = torch.optim.Adam(model.parameters())
    _learn(model, optimizer)
    moments = copy.deepcopy(optimizer.state_dict())
    before = snapshot(model)
    with pytest.raises(ApplyError, match="does not run") as caught:
        apply(plan, model, optimizer=optimizer if optimised else None)
    assert caught.value.__cause__ is not None
    assert same(snapshot(model), before)
    assert same(optimizer.state_dict()["state"], moments["state"])
    _learn(model, optimizer)


def test_an_output_of_another_shape_puts_everything_back() -> None:
    class Sizes(Asserting):
        def forward(self, x: Tensor) -> Any:
            x = self.bn(self.first(x))
            width = math.gcd(x.shape[1], 0)  # which gives a plain integer
            return self.head(self.second(x)), torch.ones(width) * self.offset

        offset = 1.0

    model = Sizes(lambda x: None)
    plan = planned(model, torch.randn(IMAGE))
    before = snapshot(model)
    with pytest.raises(ApplyError, match=r"output '1' has shape \[\d+\], it should be \[12\]"):
        apply(plan, model)
    assert same(snapshot(model), before)


def test_a_plan_for_another_model() -> None:
    plan = planned(faults.residual(), torch.randn(IMAGE))
    for other, told in ((faults.depthwise(), "has no conv1.weight"), (nn.Sequential(), "has no")):
        before = snapshot(other)
        with pytest.raises(PlanError, match="plan for another model") as caught:
            apply(plan, other)
        assert told in str(caught.value)
        assert same(snapshot(other), before)


def test_applied_twice() -> None:
    model = faults.residual()
    plan = planned(model, torch.randn(IMAGE))
    apply(plan, model)
    before = snapshot(model)
    with pytest.raises(PlanError, match="applied to it already"):
        apply(plan, model)
    assert same(snapshot(model), before)


def test_attributes_that_were_changed_since() -> None:
    model = faults.depthwise()
    plan = planned(model, torch.randn(IMAGE))
    model.bn.num_features = 99
    before = snapshot(model)
    with pytest.raises(ApplyError, match="num_features is 99, the plan expects 12"):
        apply(plan, model)
    assert same(snapshot(model), before)


# --- odd models -----------------------------------------------------------------------------


def test_a_nan_weight() -> None:
    """It is cut like any number, and no certificate calls the result exact."""
    model = faults.residual().eval()
    plan = planned(model, torch.randn(IMAGE))
    row = plan.keep[Axis("conv3.weight", 0)][0]
    model.conv3.weight.data[row] = float("nan")
    certificate = verify(plan, model)
    assert certificate.verdict == "inexact"
    assert certificate.rel_err == float("inf")
    apply(plan, model)
    assert bool(model.conv3.weight[0].isnan().all())
    assert not bool(model.conv3.weight[1:].isnan().any())


class OwnError(Exception):
    """The user's."""


def test_an_error_in_the_forward_is_shown_as_it_is() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        raise OwnError("my own words")

    model = Net(run, first=conv(3, 4))
    before = snapshot(model)
    with pytest.raises(OwnError, match="my own words"):
        prunus.trace(model, torch.randn(IMAGE))
    assert same(snapshot(model), before)
    with pytest.raises(RuntimeError, match="expected input"):
        prunus.trace(faults.residual(), torch.randn(2, 5, 8, 8))


def test_an_unknown_operator_pins_and_is_reported() -> None:
    model = faults.mirrored()
    graph = trace(model, torch.randn(IMAGE))
    assert graph.unknown == {"prunus_faults.mirror.default": 1}
    assert Axis("first.weight", 0) not in graph.labels
    assert Axis("second.weight", 0) in graph.labels
    ((axis, pin), *_) = graph.why_pinned("first.weight")
    assert axis == Axis("first.weight", 0)
    assert "no rule for prunus_faults.mirror" in pin.reason
    assert "tests/faults.py" in pin.source
    assert all(
        axis.tensor != "first.weight" or axis.dim
        for axis in planned(model, torch.randn(IMAGE)).keep
    )


# --- properties -----------------------------------------------------------------------------

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (faults.residual, IMAGE),
    "concatenation": (faults.two_branches, IMAGE),
    "depthwise": (faults.depthwise, IMAGE),
    "grouped": (faults.grouped, IMAGE),
    "chunk": (faults.thirds, IMAGE),
    "group norm": (faults.group_norm, IMAGE),
    "layer norm": (faults.mixed_mlp, (4, 8)),
    "tied": (faults.tied, IMAGE),
    "attention": (faults.Attention, (3, 6, 12)),
    "flatten": (faults.flattened, (2, 3, 6, 6)),
}


@pytest.mark.parametrize("name", MODELS)
def test_cut_twice_is_one_plan(name: str) -> None:
    build, shape = MODELS[name]
    model, x = build().eval(), torch.randn(shape)
    once = copy.deepcopy(model)
    first = planned(model, x, seed=1)
    apply(first, model)
    second = planned(model, x, seed=2)
    apply(second, model)
    both = first.then(second)
    apply(both, once)
    assert Plan.from_json(both.to_json()) == both
    left, right = state_of(model)[0], state_of(once)[0]
    assert left.keys() == right.keys()
    for name_, tensor in left.items():
        torch.testing.assert_close(tensor, right[name_], rtol=1e-6, atol=0, msg=name_)
    assert [vars(m).get("out_channels") for m in model.modules()] == [
        vars(m).get("out_channels") for m in once.modules()
    ]
    with torch.no_grad():
        torch.testing.assert_close(model(x), once(x))


_PREPARED: dict[str, tuple[nn.Module, Tensor, CouplingGraph]] = {}


def _prepared(name: str) -> tuple[nn.Module, Tensor, CouplingGraph]:
    if name not in _PREPARED:
        torch.manual_seed(0)
        build, shape = MODELS[name]
        model, x = build().eval(), torch.randn(shape)
        _PREPARED[name] = model, x, trace(model, x)
    return _PREPARED[name]


def _random_mask(graph: CouplingGraph, seed: int, ratio: float) -> Mask:
    return thin(graph, ratio, seed)


@settings(max_examples=30)
@given(name=st.sampled_from(sorted(MODELS)), seed=st.integers(0, 999), ratio=st.floats(0.05, 0.9))
def test_masked_equals_cut(name: str, seed: int, ratio: float) -> None:
    model, x, graph = _prepared(name)
    kept = _random_mask(graph, seed, ratio)
    small = cut(plan_for(graph, model, kept), model)
    masked = Replay(graph, state_of(model)[0], [x]).run(kept)
    with torch.no_grad():
        assert relative_error(masked, dict(tensors_of(small(x)))) <= 1e-4


@settings(max_examples=20)
@given(name=st.sampled_from(sorted(MODELS)), seed=st.integers(0, 999))
def test_the_plan_says_what_comes_out(name: str, seed: int) -> None:
    model, x, graph = _prepared(name)
    plan = plan_for(graph, model, _random_mask(graph, seed, 0.4))
    small = cut(plan, model)
    shapes = {n: tuple(t.shape) for n, t in state_of(small)[0].items()}
    assert shapes == plan.resulting_shapes()
    again = trace(small, x)
    assert again.cost("params") == plan.costs["params"][1]
    assert again.cost("macs") == plan.costs["macs"][1]
    assert sum(p.numel() for p in small.parameters()) == plan.costs["params"][1]


@settings(max_examples=20)
@given(name=st.sampled_from(sorted(MODELS)), seed=st.integers(0, 999))
def test_a_saved_plan_cuts_alike(name: str, seed: int) -> None:
    model, _, graph = _prepared(name)
    plan = plan_for(graph, model, _random_mask(graph, seed, 0.4))
    left, right = cut(plan, model), cut(Plan.from_json(plan.to_json()), model)
    assert same(left.state_dict(), right.state_dict())


def test_the_order_of_axes_does_not_matter() -> None:
    model, _, graph = _prepared("grouped")
    plan = plan_for(graph, model, _random_mask(graph, 3, 0.4))
    order = np.random.default_rng(0).permutation(len(plan.keep))
    entries = list(plan.keep.items())
    other = Plan({entries[i][0]: entries[i][1] for i in order}, plan.shapes, plan.edits[::-1])
    assert same(cut(plan, model).state_dict(), cut(other, model).state_dict())
