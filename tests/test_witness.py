"""The second witness: agrees with right cuts, disagrees with wrong ones, and says when it can't."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models_zoo
from prunus import errors
from prunus.graph.axis import Axis
from prunus.graph.plans import Plan
from prunus.tracer import precision
from prunus.tracer.trace import trace
from prunus.verifier.randomize import randomize
from tests import faults, hearing, witness  # not ``testify``, which pytest takes for a test
from tests.faults import Net, conv, head
from tests.pipeline import cut, plan_for, thin, without_mixing


def prepared(
    build: Callable[[], nn.Module], x: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Plan, nn.Module]:
    """A plan that touches nothing mixing, and the model it is for."""
    model = build().eval().to(dtype)
    randomize(model, (x,), {})
    graph = trace(model, x)
    return plan_for(graph, model, without_mixing(graph, thin(graph))), model


def shared() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.first(x))
        x = F.relu(m.twice(F.relu(m.twice(x))))
        out: Tensor = m.head(x)
        return out

    return Net(run, first=conv(3, 10), twice=conv(10, 10), head=head(10))


def many_outputs() -> nn.Module:
    def run(m: Any, x: Tensor) -> dict[str, Any]:
        x = F.relu(m.first(x))
        return {"a": [m.second(x), m.third(x)], "b": m.head(x)}

    return Net(run, first=conv(3, 10), second=conv(10, 4), third=conv(10, 5), head=head(10))


def across_the_batch() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.first(x))
        out: Tensor = m.head(x - x.mean(0))
        return out

    return Net(run, first=conv(3, 10), head=head(10))


def position_table() -> nn.Module:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = conv(3, 10), conv(10, 9), head(9)
            self.place = nn.Parameter(torch.randn(1, 10, 8, 8))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(F.relu(self.second(self.first(x) + self.place)))
            return out

    return Table()


SMALL = {
    "residual": faults.residual,
    "concatenation": faults.two_branches,
    "depthwise": faults.depthwise,
    "squeeze and excite": faults.squeeze_excite,
    "grouped": faults.grouped,
    "transposed": faults.transposed,
    "chunk": faults.thirds,
    "embedding": faults.embedded,
    "tied": faults.tied,
    "shared module": shared,
    "many outputs": many_outputs,
    "batch statistics": across_the_batch,
    "position table": position_table,
}
IMAGE = (2, 3, 8, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_agrees_with_right_cuts(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(IMAGE, dtype=dtype)
    plan, model = prepared(SMALL[name], x, dtype)
    told = witness.testify(plan, model, cut(plan, model), x)
    assert told.verdict == "agrees", told
    assert told.rel_err <= (1e-4 if dtype is torch.float32 else 1e-6)
    assert told.consumers


@pytest.mark.parametrize("build", [faults.flattened, faults.flattened_last])
def test_agrees_behind_a_flatten(build: Callable[[], nn.Module]) -> None:
    x = torch.randn(2, 3, 6, 6)
    plan, model = prepared(build, x)
    told = witness.testify(plan, model, cut(plan, model), x)
    assert told.verdict == "agrees", told
    assert len(told.consumers["wide"]) == 36 * (6 - len(plan.keep[Axis("first.weight", 0)]))


@pytest.mark.parametrize(
    ("name", "options"),
    [("resnet20", {}), ("mobilenetv2", {"width": 0.35, "num_classes": 10}), ("yolov8n", {})],
)
def test_agrees_on_the_zoo(name: str, options: dict[str, Any]) -> None:
    (x,) = models_zoo.example_inputs(name)
    plan, model = prepared(lambda: models_zoo.build(name, **options), x)
    told = witness.testify(plan, model, cut(plan, model), x)
    assert told.verdict == "agrees", told
    assert len(told.consumers) >= 20


def test_finds_the_columns_that_the_plan_removes() -> None:
    x = torch.randn(IMAGE)
    plan, model = prepared(faults.residual, x)
    told = witness.testify(plan, model, cut(plan, model), x)
    assert set(told.consumers) == {"conv2", "conv3", "head.2"}
    for name in ("conv2", "conv3", "head.2"):
        gone = set(range(plan.shapes[f"{name}.weight"][1])) - set(
            plan.keep[Axis(f"{name}.weight", 1)]
        )
        assert set(told.consumers[name]) == gone


def test_finds_grouped_and_transposed_columns() -> None:
    for build, name, dim in ((faults.grouped, "middle", None), (faults.transposed, "up", 0)):
        x = torch.randn(IMAGE)
        plan, model = prepared(build, x)
        told = witness.testify(plan, model, cut(plan, model), x)
        before = plan.keep[Axis("first.weight", 0)]
        gone = sorted(set(range(plan.shapes["first.weight"][0])) - set(before))
        assert told.consumers[name] == tuple(gone), (name, dim)


def _roll(name: str, dim: int = 0) -> Callable[[nn.Module], None]:
    def spoil(model: nn.Module) -> None:
        tensor = dict(model.named_parameters())[name]
        tensor.data = tensor.data.roll(1, dim)

    return spoil


def _narrow(model: nn.Module) -> None:
    head: Any = model.get_submodule("head.2")
    head.weight.data = head.weight.data[:9]
    head.bias.data = head.bias.data[:9]


def _break(model: nn.Module) -> None:
    model.get_parameter("conv3.weight").data = torch.randn(9, 3, 3, 3)


@pytest.mark.parametrize(
    "spoil",
    [_roll("conv1.weight"), _roll("conv3.weight", 1), _roll("bn2.bias"), _narrow, _break],
    ids=["rows", "columns", "carrier", "output shape", "forward fails"],
)
def test_disagrees_with_wrong_cuts(spoil: Callable[[nn.Module], None]) -> None:
    x = torch.randn(IMAGE)
    plan, model = prepared(faults.residual, x)
    pruned = cut(plan, model)
    spoil(pruned)
    told = witness.testify(plan, model, pruned, x)
    assert told.verdict == "disagrees"
    assert told.rel_err > 1e-3


def test_disagrees_with_a_missed_union() -> None:
    """Rows of the two addends of a residual sum go at different places: no error, no shape."""
    x = torch.randn(IMAGE)
    plan, model = prepared(faults.residual, x)
    rows = plan.keep[Axis("conv2.weight", 0)]
    other = tuple(sorted((row + 1) % 10 for row in rows))
    assert other != rows
    branch = {Axis(name, 0) for name in plan.shapes if name.startswith(("conv2.", "bn2."))}
    keep = {axis: other if axis in branch else stay for axis, stay in plan.keep.items()}
    wrong = replace(plan, keep=keep)
    assert witness.testify(wrong, model, cut(wrong, model), x).verdict == "disagrees"


def _matmul(m: Any, x: Tensor) -> Tensor:
    out: Tensor = m.head(F.conv2d(F.relu(m.first(x)), m.second.weight))
    return out


def _normed(m: Any, x: Tensor) -> Tensor:
    x = m.norm(m.first(x).mean((2, 3)))
    out: Tensor = m.last(x)
    return out


def _random(m: Any, x: Tensor) -> Tensor:
    m.calls = m.calls + 1
    out: Tensor = m.head(m.first(x)) + m.calls
    return out


def functional() -> nn.Module:
    return Net(_matmul, first=conv(3, 10), second=conv(10, 9), head=head(9))


def normed() -> nn.Module:
    return Net(_normed, first=conv(3, 10), norm=nn.LayerNorm(10), last=nn.Linear(10, 4))


def forgetful() -> nn.Module:
    net = Net(_random, first=conv(3, 10), head=head(10))
    net.register_buffer("calls", torch.zeros(()))
    return net


def parametrized() -> nn.Module:
    model = faults.residual()
    nn.utils.parametrizations.weight_norm(model.get_submodule("conv3"))
    return model


@pytest.mark.parametrize(
    ("build", "rows", "reason"),
    [
        (functional, {"first.weight": 10}, "convolution, which is no layer, reads a removed unit"),
        (normed, {"first.weight": 10}, "native_layer_norm, which is no layer"),
        (forgetful, {"first.weight": 10}, "does not answer the same twice"),
        (parametrized, {"conv1.weight": 10}, "conv3 reads removed units, and its weight"),
        (faults.residual, {"bn1.weight": 10}, "removes no row of a layer"),
        (faults.residual, {"head.2.weight": 10}, "reaches an output past all layers"),
        (faults.Ordered, {"order": 12}, "holds indices"),
    ],
)
def test_says_when_it_cannot_tell(
    build: Callable[[], nn.Module], rows: dict[str, int], reason: str
) -> None:
    """The pruned model is the original: nothing of it may be taken for agreement."""
    model = build().eval()
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    keep = {Axis(name, 0): tuple(range(size - 3)) for name, size in rows.items()}
    told = witness.testify(Plan(keep, shapes), model, model, torch.randn(IMAGE))
    assert told.verdict == "undecided"
    assert reason in told.reason


def _overwritten(m: Any, x: Tensor) -> Tensor:
    x = m.first(x).flatten(2).transpose(1, 2).clone()
    x[:, 0] = 0.3
    out: Tensor = m.token(x[:, 0]) + m.rest(x[:, 1:]).mean(1)
    return out


def overwritten() -> nn.Module:
    return Net(_overwritten, first=conv(3, 10), token=nn.Linear(10, 4), rest=nn.Linear(10, 4))


def test_a_constant_over_a_unit_is_no_objection() -> None:
    """Noise never reaches the layer that reads the constant, though it loses columns."""
    x = torch.randn(IMAGE)
    plan, model = prepared(overwritten, x)
    pruned = cut(plan, model)
    told = witness.testify(plan, model, pruned, x)
    assert told.verdict == "undecided"
    assert "token reads a constant" in told.reason


def test_a_wrong_column_is_no_constant() -> None:
    """The layer that reads moving units loses others than those that go: an objection still."""
    x = torch.randn(IMAGE)
    plan, model = prepared(overwritten, x)
    axis = Axis("rest.weight", 1)
    wrong = replace(plan, keep={**plan.keep, axis: tuple((i + 1) % 10 for i in plan.keep[axis])})
    pruned = cut(replace(wrong, keep={**wrong.keep, axis: tuple(sorted(wrong.keep[axis]))}), model)
    del wrong.keep[Axis("token.weight", 1)]  # what reads the constant says nothing here
    assert witness.testify(wrong, model, pruned, x).verdict == "disagrees"


def test_nothing_moves() -> None:
    model = faults.residual().eval()
    model.get_parameter("head.2.weight").data.zero_()
    plan = Plan({Axis("conv3.weight", 0): (0, 1, 2)}, {"conv3.weight": (12, 10, 3, 3)})
    told = witness.testify(plan, model, model, torch.randn(IMAGE))
    assert told.verdict == "undecided"


def test_outputs_may_be_chosen() -> None:
    x = torch.randn(IMAGE)
    plan, model = prepared(many_outputs, x)
    pruned = cut(plan, model)
    pruned.get_parameter("second.bias").data += 1
    assert witness.testify(plan, model, pruned, x).verdict == "disagrees"
    assert witness.testify(plan, model, pruned, x, outputs=["b", "a.1"]).verdict == "agrees"


def test_changes_nothing() -> None:
    x = torch.randn(IMAGE)
    plan, model = prepared(position_table, x)
    pruned = cut(plan, model)
    pruned.train()
    before = [copy.deepcopy(m.state_dict()) for m in (model, pruned)]
    random = torch.get_rng_state()
    witness.testify(plan, model, pruned, x)
    assert torch.equal(torch.get_rng_state(), random)
    for subject, saved in zip((model, pruned), before, strict=True):
        assert all(torch.equal(subject.state_dict()[name], saved[name]) for name in saved)
        hooks = [m._forward_hooks or m._forward_pre_hooks for m in subject.modules()]
        assert not any(hooks)
    assert pruned.training
    assert not model.training


def test_knows_nothing_of_the_tracer() -> None:
    def imported(module: ModuleType) -> set[str]:
        tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
        found = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
        return {name for name in found if name.startswith("prunus")}

    own = {"errors", "graph.axis", "graph.plans", "tracer.precision"}
    assert imported(witness) == {f"prunus.{name}" for name in own}
    assert imported(hearing) == {"prunus.tracer.precision"}
    assert imported(errors) == imported(precision) == set()
