"""Plans from strangers: data, and nothing that a plan has no business with is reached."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunus
from prunus.errors import PrunusError
from prunus.graph.plan_records import Edit, kind_of_edit
from prunus.graph.plans import Plan
from prunus.tracer.inputs import rebuild_inputs
from tests.snapshots import same, snapshot


class Net(nn.Module):
    """Holds what a stranger would like to reach."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
        self._norm_layer, self.norm_layer = nn.BatchNorm2d, nn.BatchNorm2d
        self.log = logging.getLogger("net")
        self.function = rebuild_inputs
        self.config = SimpleNamespace(width=8, log=self.log, kind=nn.BatchNorm2d, flag=True)
        self.table = torch.arange(8)
        self.size = 6

    @property
    def doubled(self) -> int:
        """Writing it has an effect."""
        return 2 * self.size

    @doubled.setter
    def doubled(self, value: int) -> None:
        Path("doubled").touch()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu() + self.table)

    def export(self, path: str, text: str = "") -> None:
        """As ``save_pretrained`` and ``to_onnx`` do."""
        Path(path).write_text(text)


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def build() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def document() -> dict[str, Any]:
    model = build()
    plan = prunus.plan(prunus.trace(model, X), model, ratio=0.3)
    found: dict[str, Any] = json.loads(plan.to_json())
    return found


DOCUMENT = document()

USES: dict[str, Callable[[Plan, nn.Module], Any]] = {
    "apply": lambda plan, model: prunus.apply(plan, model),
    "verify": lambda plan, model: prunus.verify(plan, model),
    "mask": lambda plan, model: _masked(plan, model),
}


def _masked(plan: Plan, model: nn.Module) -> None:
    with prunus.mask(plan, model):
        model(X)


def refused(changed: dict[str, Any], model: nn.Module, use: str) -> PrunusError:
    """The error, which is ours; the model is as it was."""
    before = snapshot(model)
    with pytest.raises(PrunusError) as caught:
        USES[use](Plan.from_json(json.dumps(changed)), model)
    assert same(before, snapshot(model))
    return caught.value


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    ("method", "args"),
    [
        ("export", ["written", "text"]),
        ("load_state_dict", [{"dict": {}}]),
        ("requires_grad_", [False]),
        ("__setattr__", ["secret", "x"]),
        ("half", []),
        ("zero_grad", []),
        ("forward", []),
    ],
)
def test_a_plan_names_no_method_that_is_run(in_tmp: Path, use: str, method: str, args: Any) -> None:
    changed = copy.deepcopy(DOCUMENT)
    changed["origin"]["traced"].update(
        forward_fn={"method": method}, inputs={"args": args, "kwargs": {}}
    )
    error = refused(changed, build(), use)
    assert any(text in str(error) for text in ("taken from the caller only", "give args="))


def test_a_string_from_a_file_is_no_argument(in_tmp: Path) -> None:
    """It may be the name of a file; the plan itself is applied."""
    changed = copy.deepcopy(DOCUMENT)
    changed["origin"]["traced"]["inputs"] = {"args": ["written"], "kwargs": {"text": "x"}}
    plan = Plan.from_json(json.dumps(changed))
    assert plan.traced is not None
    assert plan.traced.inputs is None
    model = build()
    model.forward = model.export  # type: ignore[method-assign, assignment]
    prunus.apply(plan, model)
    with pytest.raises(PrunusError, match="give args="):
        prunus.verify(plan, build())


T = {"args": [{"tensor": [5, 4], "dtype": "float32"}], "kwargs": {}}
O = {"output": [5, 3]}  # noqa: E741


def _one(**tensor: Any) -> dict[str, Any]:
    given = {"tensor": [5, 4], "dtype": "int64", **tensor}
    return {"inputs": {"args": [given], "kwargs": {}}, "outputs": O}


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return {"inputs": {"args": [value], "kwargs": {}}, "outputs": O}


GARBAGE: list[Any] = [
    5,
    [],
    "text",
    {"inputs": None},
    {"inputs": 5, "outputs": O},
    {"inputs": T},
    {"inputs": T, "outputs": 5},
    {"inputs": T, "outputs": {"output": 7}},
    {"inputs": T, "outputs": {"output": [5, -3]}},
    {"inputs": T, "outputs": O, "more": 1},
    {"inputs": {"args": []}, "outputs": O},
    {"inputs": {"args": [], "kwargs": {}, "x": 1}, "outputs": O},
    _one(dtype="nn"),
    _one(dtype="qint8"),
    _one(dtype="float32", tensor=[10**9, 10**9]),
    _one(tensor=[1 << 14, 1 << 14]),
    _one(tensor=[0, 1 << 62]),
    _one(tensor=[-5]),
    _one(tensor=["a"]),
    _one(tensor=[1] * 70),
    _one(values=[1, 2, 3]),
    _one(low=3),
    _one(low=3, high=2),
    _one(low=0, high=1 << 70),
    _one(more=1),
    {"inputs": {"args": [{"dict": 5}], "kwargs": {}}, "outputs": O},
    _nested(100),
    {"inputs": T, "outputs": O, "forward_fn": 5},
    {"inputs": T, "outputs": O, "forward_fn": {"method": 5}},
    {"inputs": T, "outputs": O, "forward_fn": {"code": "x"}},
    {"inputs": T, "outputs": O, "caches": 5},
    {"inputs": T, "outputs": O, "unread": [5]},
]


@pytest.mark.parametrize("traced", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_in_what_was_traced_is_refused_with_its_place(traced: Any) -> None:
    for origin in ({"traced": traced}, {"steps": [{"traced": traced}, {}]}):
        changed = {**DOCUMENT, "origin": origin}
        with pytest.raises(PrunusError, match=r"no plan, or a damaged(.|\n)*where: origin.*traced"):
            Plan.from_json(json.dumps(changed))


@pytest.mark.parametrize("origin", [{"steps": 5}, {"steps": [5]}, {"stopped": 5}, {"stopped": [1]}])
def test_an_origin_of_another_form_is_refused(origin: Any) -> None:
    with pytest.raises(PrunusError, match=r"where: origin"):
        Plan.from_json(json.dumps({**DOCUMENT, "origin": origin}))


def test_a_bias_that_a_plan_adds_is_nothing_that_a_forward_leaves() -> None:
    changed = copy.deepcopy(DOCUMENT)
    changed["biases"] = {"b.bias": 0}
    changed["origin"]["traced"]["written"] = ["b.bias", "b.weight"]
    plan = Plan.from_json(json.dumps(changed))
    assert plan.written == {"b.weight"}
    model = build()
    prunus.apply(plan, model)
    assert model.a.weight.shape == (6, 4)


ATTACKS: list[tuple[str, str, Any, Any]] = [
    ("", "_norm_layer._version", 2, 1),
    ("", "norm_layer._version", 2, 1),
    ("", "norm_layer.dump_patches", False, True),
    ("", "log.manager.disable", 50, 10),
    ("", "log.root.level", 30, 10),
    ("", "log.level", 30, 10),
    ("", "config.log.level", 30, 10),
    ("", "config.kind._version", 2, 1),
    ("", "config.__class__.width", 8, 4),
    ("", "function.__code__.co_argcount", 2, 1),
    ("", "training", True, False),
    ("a", "training", True, False),
    ("a", "training", 1, 1),
    ("", "config.flag", True, False),
    ("", "config.flag", 1, 1),
    ("a", "weight.requires_grad", True, False),
    ("", "table.requires_grad", True, False),
    ("", "table.data", 8, 4),
    ("", "_parameters", [], []),
    ("", "_modules.a", 8, 4),
    ("", "_forward_hooks", ["x"], []),
    ("a", "_buffers", 8, 4),
    ("a", "weight", 8, 4),
    ("a", "bias", 8, 4),
    ("", "a.out_features", 8, 4),
    ("", "doubled", 12, 6),
    ("", "size", 6, 7),
    ("", "size", 6, 0),
    ("", "size", 6, -1),
    ("", "size", 6, 3.5),
    ("", "size", 6, "6"),
    ("", "size", 5, 4),
    ("a", "in_features", 4, 1 << 40),
    ("", "__class__", "Net", "Linear"),
    ("", "__class__", "Net", ["prunus.SlimMultiheadAttention", 0.5]),
    ("", "__dict__.size", 6, 3),
    ("", "use_nested_tensor", True, False),
    ("", "forward", "x", "y"),
    ("nobody", "size", 6, 3),
    ("", "", 6, 3),
    ("", "size\nx", 6, 3),
]


@pytest.mark.parametrize(("module", "attribute", "before", "after"), ATTACKS)
def test_an_edit_reaches_nothing_but_settings(
    in_tmp: Path, module: str, attribute: str, before: Any, after: Any
) -> None:
    changed = copy.deepcopy(DOCUMENT)
    edit = {"module": module, "attribute": attribute, "before": before, "after": after}
    changed["edits"].append(edit)
    outside = _outside()
    for use in USES if attribute in ("size", "_modules.a") else ["apply"]:
        if use != "mask":  # which sets no attributes
            refused(changed, build(), use)
    assert _outside() == outside
    # What was made in this process is held to the same rule, and so is a file of it.
    model = build()
    plan = Plan.from_json(json.dumps(DOCUMENT))
    evil = replace(plan, edits=(*plan.edits, Edit(module, attribute, before, after)))
    with pytest.raises(PrunusError):
        prunus.apply(evil, model)
    prunus.apply(plan, model)
    with pytest.raises(PrunusError):
        prunus.save(model, in_tmp / "m.safetensors", evil)


def _outside() -> tuple[Any, ...]:
    root = logging.getLogger()
    disable = root.manager.disable
    return nn.BatchNorm2d._version, nn.BatchNorm2d.dump_patches, disable, root.level


def test_what_a_plan_may_do() -> None:
    assert kind_of_edit("sizes", (8, 3), (8, 4)) is None
    assert kind_of_edit("sizes", (8, 3), (8,)) == "subsequence"
    assert kind_of_edit("types", ("a", "b", "c"), ("a", "c")) == "subsequence"
    assert kind_of_edit("types", ("a", "b", "c"), ("c", "a")) is None
    assert kind_of_edit("types", ("a", "b"), ("x",)) is None
    assert kind_of_edit("types", ("a", "b"), ()) is None
    assert kind_of_edit("__class__", "MultiheadAttention", ("x", float("inf"))) is None
    model = build()
    changed = copy.deepcopy(DOCUMENT)
    for attribute, before, after in [("config.width", 8, 5), ("size", 6, 6)]:
        edit = {"module": "", "attribute": attribute, "before": before, "after": after}
        changed["edits"].append(edit)
    prunus.apply(Plan.from_json(json.dumps(changed)), model)
    assert (model.config.width, model.size) == (5, 6)


@pytest.mark.parametrize(
    "cache",
    ["a:_parameters", "a:_forward_hooks", "a:bias", ":training", ":config", "nobody:x", "", ":a"],
)
def test_only_dicts_of_tensors_are_emptied_as_caches(cache: str) -> None:
    changed = copy.deepcopy(DOCUMENT)
    changed["origin"]["traced"]["caches"] = [cache]
    model = build()
    handle = model.a.register_forward_hook(lambda *_: None)
    prunus.apply(Plan.from_json(json.dumps(changed)), model)
    assert model.a.bias is not None
    assert model.a.weight.shape == (6, 4)
    assert model.config.width == 8
    assert list(model.a._forward_hooks) == [handle.id]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("keep", [True, False])
def test_blocks_that_the_model_needs_are_not_dropped(use: str, keep: bool) -> None:
    """A plan may drop any child of a list: where the rest does not fit, the error is ours."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

    model = make()
    changed = json.loads(prunus.plan(prunus.trace(model, X), model, ratio=0.3).to_json())
    changed["drops"] = ["0"]
    changed["shapes"] = {"1.weight": [3, 8], "1.bias": [3]}
    changed |= {"edits": [], "groups": [], "keep": {"1.weight[1]": [[0, 6]]} if keep else {}}
    error = refused(changed, model, use)
    assert "run" in str(error)
