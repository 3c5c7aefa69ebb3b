"""The oracle: its verdicts, the replay against the mask, and the model it leaves as it was."""

from __future__ import annotations

import copy
import importlib
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunus.api import shrink
from prunus.errors import VerifyError
from prunus.graph.axis import Axis
from prunus.graph.coupling import CouplingGraph
from prunus.graph.plan_records import Edit
from prunus.graph.plans import Plan
from prunus.graph.program import state_of, tensors_of
from prunus.surgeon import apply, mask
from prunus.tracer.trace import trace
from prunus.verifier.case import gradients_of
from prunus.verifier.judgement import DOUBTFUL
from prunus.verifier.permutation import relative_error
from prunus.verifier.randomize import randomize
from prunus.verifier.replay import Replay
from prunus.verifier.verify import verify
from tests import faults
from tests.faults import Net, conv, head
from tests.pipeline import cut, plan_for, thin

IMAGE = (2, 3, 8, 8)


def chosen(model: nn.Module, *args: Tensor) -> tuple[CouplingGraph, Plan]:
    graph = trace(model, args)
    return graph, plan_for(graph, model, thin(graph))


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-4), (torch.float64, 1e-6)], ids=str
)
def test_exact(dtype: torch.dtype, limit: float) -> None:
    model = faults.residual().eval().to(dtype)
    x = torch.randn(IMAGE, dtype=dtype)
    graph, plan = chosen(model, x)
    certificate = verify(plan, model, x)
    assert certificate.verdict == "exact"
    assert certificate.rel_err <= limit
    assert certificate.moved > 0.01
    assert not certificate.unverified
    assert set(certificate.moved_alone) == {group.name for group in graph.groups}
    assert certificate.dtype == str(dtype).removeprefix("torch.")
    assert certificate.params == plan.costs["params"]
    assert certificate.outputs == ("output",)
    assert certificate.to_json()["verdict"] == "exact"


class Dead(nn.Module):
    """The branch that can be pruned is multiplied by a buffer of zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(3, 8), conv(8, 3)
        self.out = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
        self.register_buffer("gate", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(x + self.gate * self.second(F.relu(self.first(x))))
        return out


def test_not_verified_where_nothing_moves() -> None:
    model = Dead().eval()
    _, plan = chosen(model, torch.randn(IMAGE))
    certificate = verify(plan, model, torch.randn(IMAGE))
    assert certificate.verdict == "not verified"
    assert certificate.rel_err == 0
    assert certificate.unverified == ("first.weight[0]",)


def test_a_silent_group_is_listed_beside_others() -> None:
    model = faults.ZeroInit().eval()
    _, plan = chosen(model, torch.randn(IMAGE))
    quiet = verify(plan, model, torch.randn(IMAGE), randomise=False)
    assert quiet.unverified == ("one.weight[0]",)
    assert verify(plan, model, torch.randn(IMAGE)).unverified == ()


def test_inexact_where_the_plan_is_inconsistent() -> None:
    model = faults.residual().eval()
    _, plan = chosen(model, torch.randn(IMAGE))
    axis = Axis("conv3.weight", 1)
    shifted = tuple(sorted((index + 1) % 10 for index in plan.keep[axis]))
    certificate = verify(replace(plan, keep={**plan.keep, axis: shifted}), model)
    assert certificate.verdict == "inexact"
    assert "than its couplings demand" in certificate.reason

    without = {a: stay for a, stay in plan.keep.items() if a != axis}
    certificate = verify(replace(plan, keep=without), model)
    assert certificate.verdict == "inexact"
    assert certificate.rel_err == float("inf")


def test_inexact_where_an_attribute_is_stale() -> None:
    """Nothing in a forward reads ``BatchNorm2d.num_features``; whoever rebuilds the model does."""
    model = faults.residual().eval()
    _, plan = chosen(model, torch.randn(IMAGE))
    edits = tuple(e for e in plan.edits if (e.module, e.attribute) != ("bn1", "num_features"))
    assert len(edits) == len(plan.edits) - 1
    certificate = verify(replace(plan, edits=edits), model)
    assert certificate.verdict == "inexact"
    assert "bn1 says (10,) of a tensor of shape (7,)" in certificate.reason

    wrong = tuple(
        Edit(e.module, e.attribute, e.before, 5) if e.attribute == "out_channels" else e
        for e in plan.edits
    )
    assert "stale" in verify(replace(plan, edits=wrong), model).reason


def amplifying(depth: int = 11) -> nn.Module:
    """A sum so wide that float32 rounds it otherwise when cut, and depth that makes it matter."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        for layer in m.deep:
            x = torch.sin(6 * layer(x))
        out: Tensor = m.last(x)
        return out

    deep = nn.ModuleList(nn.Linear(64 if index else 1200, 64) for index in range(depth))
    return Net(run, first=nn.Linear(8, 1200), deep=deep, last=nn.Linear(64, 10))


def test_rounding_that_depth_amplifies_is_no_fault() -> None:
    model, x = amplifying().eval(), torch.randn(4, 8)
    _, plan = chosen(model, x)
    certificate = verify(plan, model, x)
    assert certificate.verdict == "exact"
    assert certificate.dtype == "float64"
    assert certificate.rel_err <= 1e-6
    assert certificate.rel_err32 is not None
    assert 1e-4 < certificate.rel_err32 < 1e-2
    assert certificate.to_json()["rel_err32"] == certificate.rel_err32
    clear = verify(plan, model.double(), x.double())
    assert clear.rel_err32 is None
    assert "rel_err32" not in clear.to_json()


def test_a_model_whose_own_rounding_is_as_large_is_judged_in_float64(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = amplifying(depth=18).eval(), torch.randn(4, 8)
    _, plan = chosen(model, x)
    certificate = verify(plan, model, x)
    assert certificate.verdict == "exact"
    assert certificate.rel_err32 is not None
    assert certificate.rel_err32 > DOUBTFUL

    def misapply(plan: Plan, model: Any) -> Any:
        changed = apply(plan, model, check=False)
        model.last.bias.data += 1e-3
        return changed

    monkeypatch.setattr("prunus.verifier.case.cut_own", misapply)
    assert verify(plan, model, x).verdict == "inexact"


class NearTies(nn.Module):
    """Chooses among tokens that differ by rounding, as detectors choose their queries."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(16, 64)
        self.score = nn.Linear(64, 1)
        self.table = nn.Parameter(torch.randn(64, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(x).relu()
        best = self.score(hidden).squeeze(-1).topk(1, dim=1).indices
        return self.table[best.squeeze(1)], hidden.mean((1, 2))


@pytest.mark.parametrize("seed", [5, 11, 22, 26, 27])
def test_a_choice_among_near_ties_is_judged_in_float64(seed: int) -> None:
    torch.manual_seed(seed)
    model, x = NearTies().eval(), torch.randn(1, 1, 16) + 1e-7 * torch.randn(2, 12, 16)
    _, plan = chosen(model, x)
    assert verify(plan, model, x).verdict == "exact"
    model.table.data[:] += torch.arange(64.0)[:, None]  # so that a wrong choice shows

    class Wrong(NearTies):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            rows, mean = super().forward(x)
            return (rows + 0.5 if self.hidden.out_features < 64 else rows), mean

    model.__class__ = Wrong
    assert verify(plan, model, x).verdict == "inexact"


class Single(nn.Module):
    """Runs in float32 only."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise RuntimeError("float32 only")
        out: Tensor = self.inner(x)
        return out


def test_what_float64_cannot_confirm_stays_inexact() -> None:
    model, x = Single(amplifying()).eval(), torch.randn(4, 8)
    _, plan = chosen(model, x)
    certificate = verify(plan, model, x)
    assert certificate.verdict == "inexact"
    assert certificate.dtype == "float32"
    assert certificate.rel_err32 is None


def weight_off_by(factor: float) -> Any:
    """A surgeon that changes one weight of many a little."""
    surgeon = importlib.import_module("prunus.surgeon.apply")
    right = surgeon.slice_tensor

    def faulty(tensor: Tensor, keep: Any) -> Tensor:
        sliced: Tensor = right(tensor, keep)
        return sliced * factor if tuple(tensor.shape) == (12, 10, 3, 3) else sliced

    return surgeon, faulty


@pytest.mark.parametrize("factor", [1 + 5e-4, 1 + 3e-3, 1 - 1e-3])
def test_a_small_difference_that_float64_keeps_is_inexact(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = faults.residual().eval(), torch.randn(IMAGE)
    _, plan = chosen(model, x)
    surgeon, faulty = weight_off_by(factor)
    monkeypatch.setattr(surgeon, "slice_tensor", faulty)
    certificate = verify(plan, model, x)
    assert certificate.verdict == "inexact"
    assert certificate.dtype == "float32"
    assert 1e-4 < certificate.rel_err < 1e-2, "a difference that is compared again"


def test_inputs_come_from_the_plan_or_are_asked_for() -> None:
    model = faults.residual().eval()
    _, plan = chosen(model, torch.randn(IMAGE))
    assert verify(plan, model, each_group=False).verdict == "exact"
    assert verify(plan, model, each_group=False).moved_alone == {}
    with pytest.raises(VerifyError, match="no inputs to verify with"):
        verify(replace(plan, origin={}), model)


SMALL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (faults.residual, IMAGE),
    "concatenation": (faults.two_branches, IMAGE),
    "depthwise": (faults.depthwise, IMAGE),
    "gate": (faults.squeeze_excite, IMAGE),
    "grouped": (faults.grouped, IMAGE),
    "group norm": (faults.group_norm, IMAGE),
    "layer norm": (faults.mixed_mlp, (4, 8)),
    "tied": (faults.tied, IMAGE),
    "softmax": (faults.between(lambda x: x.softmax(1)), IMAGE),
    "flatten": (faults.flattened, (2, 3, 6, 6)),
    "transposed": (faults.transposed, IMAGE),
}


@pytest.mark.parametrize("name", SMALL)
def test_mask_and_replay_and_cut_agree(name: str) -> None:
    build, shape = SMALL[name]
    model, x = build().eval(), torch.randn(shape)
    randomize(model, (x,), {})
    graph, plan = chosen(model, x)
    kept = thin(graph)
    state, _ = state_of(model)
    replayed = Replay(graph, state, [x]).run(kept)
    with mask(plan, model) as masked:
        answer = dict(tensors_of(masked(x)))
        other = torch.randn(5, *shape[1:])
        larger = dict(tensors_of(masked(other)))
    small = cut(plan, model)
    with torch.no_grad():
        assert relative_error(replayed, answer) < 1e-5
        assert relative_error(replayed, dict(tensors_of(small(x)))) < 1e-4
        assert relative_error(larger, dict(tensors_of(small(other)))) < 1e-4
        assert relative_error(dict(tensors_of(model(x))), answer) > 1e-3


@pytest.mark.parametrize("name", SMALL)
def test_replay_of_everything_is_the_model(name: str) -> None:
    build, shape = SMALL[name]
    model, x = build().eval(), torch.randn(shape)
    graph = trace(model, x)
    replayed = Replay(graph, state_of(model)[0], [x]).run(graph.all_kept)
    with torch.no_grad():
        assert relative_error(dict(tensors_of(model(x))), replayed) < 1e-6


def test_relative_error() -> None:
    ones = {"a": torch.ones(3), "b": torch.ones(0)}
    assert relative_error(ones, ones) == 0
    assert relative_error(ones, {**ones, "a": torch.full((3,), 1.5)}) == 0.5
    assert relative_error({"a": torch.zeros(2)}, {"a": torch.ones(2)}) == 1
    assert relative_error(ones, {"a": torch.ones(4), "b": torch.ones(0)}) == float("inf")
    assert relative_error(ones, {"a": torch.ones(3)}) == float("inf")
    assert relative_error(ones, {**ones, "a": torch.tensor([1, 1, np.nan])}) == float("inf")


def test_listen_fills_what_initialisation_left_empty() -> None:
    model = faults.ZeroInit()
    model.register_parameter("scale", nn.Parameter(torch.full((10,), 1e-6)))
    nn.init.zeros_(model.two.weight)
    model.train()
    x = torch.randn(IMAGE)
    randomize(model, (x,), {})
    assert model.training
    for tensor in (model.bn2.weight, model.bn2.bias, model.two.weight, model.scale):
        assert tensor.std() > 0
    assert model.scale.abs().min() > 0.1
    assert model.bn1.running_mean is not None
    assert model.bn1.running_mean.std() > 0
    assert not any(m._forward_pre_hooks for m in model.modules())
    again = faults.ZeroInit()
    again.load_state_dict(copy.deepcopy(model.state_dict()), strict=False)
    randomize(again, (x,), {}, seed=3)
    assert torch.equal(again.two.weight, model.two.weight), "what speaks already is left alone"


def _fingerprint(model: nn.Module) -> tuple[bytes, Any]:
    """Bytes of the state, and everything else that hangs on the modules."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    rest = {
        name: {
            key: list(value) if isinstance(value, dict) else value
            for key, value in vars(module).items()
            if not isinstance(value, Tensor)
        }
        for name, module in model.named_modules()
    }
    identities = {
        name: (id(p), id(p.grad), p.requires_grad) for name, p in model.named_parameters()
    }
    return buffer.getvalue(), (rest, identities)


def _verify_it(plan: Plan, model: nn.Module, x: Tensor) -> None:
    verify(plan, model, x)


def _trace_it(plan: Plan, model: nn.Module, x: Tensor) -> None:
    trace(model, x)
    trace(model, x, real=True)


def _mask_it(plan: Plan, model: nn.Module, x: Tensor) -> None:
    with mask(plan, model) as masked:
        masked(x)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("act", [_verify_it, _trace_it, _mask_it])
def test_the_model_is_left_as_it_was(
    act: Callable[[Plan, nn.Module, Tensor], None], training: bool
) -> None:
    model, x = faults.residual(), torch.randn(IMAGE)
    _, plan = chosen(model, x)
    model(x).sum().backward()
    model.train(training)
    model.bn1.eval()
    model.conv1.weight.requires_grad_(False)
    model.conv2.register_forward_hook(lambda *_: None)
    before, random = _fingerprint(model), torch.get_rng_state()
    fast, onednn = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    act(plan, model, x)
    after = _fingerprint(model)
    assert after[0] == before[0]
    assert after[1] == before[1]
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert torch._C._get_mkldnn_enabled() == onednn


def test_a_model_that_fails_is_left_as_it_was() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        m.first(x)
        raise LookupError("mine")

    model = Net(run, first=conv(3, 4), head=head(4))
    before = _fingerprint(model)
    with pytest.raises(LookupError, match="mine"):
        trace(model, torch.randn(IMAGE))
    assert _fingerprint(model) == before


class ByValue(nn.Module):
    """Visits the rows that a layer's outputs choose: how many depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(6, 12), nn.Linear(12, 1), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        out = self.last(x)
        for row in (self.gate(x)[:, 0] > 0).nonzero()[:, 0].unbind():
            out[row] = out[row] * 2
        return out


def test_a_path_that_hangs_on_values_is_refused_with_its_line() -> None:
    torch.manual_seed(3)
    model, x = ByValue().eval(), torch.randn(40, 6)
    before = copy.deepcopy(model.state_dict())
    options: Any = {"ratio": 0.6, "importance": "random"}
    with pytest.raises(VerifyError, match="depends on values") as caught:
        shrink(model, x, **options)
    assert "test_oracle.py" in caught.value.where
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_randomise_returns_is_what_the_model_answers() -> None:
    """Statistics that were drawn in a run of ours have to outlive it."""
    torch.manual_seed(0)
    norms = nn.BatchNorm2d(8), nn.BatchNorm2d(6)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), norms[0], nn.ReLU(), nn.Conv2d(8, 6, 3), norms[1], nn.Flatten(1)
    ).eval()
    x = torch.randn(2, 3, 8, 8)
    answer = randomize(model, (x,), {}).answer
    assert answer is not None
    assert all(norm.running_mean.any() for norm in norms)
    torch.testing.assert_close(answer["output"], model(x))


class Attention(nn.Module):
    """Fused, with more groups than are removed one by one, in layers that may share weights."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        layers = [nn.ModuleDict({n: nn.Linear(8, 8) for n in "qkvom"}) for _ in range(4)]
        self.layers = nn.ModuleList([layers[0]] * 4 if shared else layers)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            q, k, v = (layer[n](x).unflatten(-1, (2, 4)).transpose(1, 2) for n in "qkv")
            found = nn.functional.scaled_dot_product_attention(q, k, v)
            x = x + layer["m"](layer["o"](found.transpose(1, 2).flatten(2)).relu())
        return self.head(x)


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_of_the_sharpening_run_are_those_of_the_sharpened_model(shared: bool) -> None:
    torch.manual_seed(0)
    model, x = Attention(shared).eval(), torch.randn(2, 5, 8)
    before = model.layers[0]["q"].weight.clone()
    graph = trace(model, x)
    known = randomize(model, (x,), {}, graph=graph, gated=True)
    assert not torch.allclose(before, model.layers[0]["q"].weight)
    if shared:
        assert known.gradients is None
        return
    replay = Replay(graph, state_of(model)[0], [x])
    gradients, outputs = gradients_of(replay)
    assert outputs is not None
    assert known.replayed is not None
    assert known.gradients is not None
    torch.testing.assert_close(outputs["output"], model(x))
    torch.testing.assert_close(known.replayed["output"], model(x))
    torch.testing.assert_close(known.gradients, gradients)
    assert known.gradients.any()
