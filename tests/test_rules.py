"""Every rule against brute force, and the validator against planted faults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prunus.graph.axis import Axis
from prunus.graph.program import Effect
from prunus.tracer import registry
from prunus.tracer.registry import Call, Rule, find_overload, find_rule, rule
from prunus.tracer.rules.pointwise import broadcast
from prunus.tracer.trace import trace
from prunus.verifier.permutation import relative_error
from prunus.verifier.replay import Replay
from tests import rule_validator
from tests.rule_table import ROWS, I, Row, X, case, pointwise_rows
from tests.rule_validator import Finding, missing, report, validate

RIGHT = ("OK", "PINNED")
TAGGED = pointwise_rows()


@pytest.mark.filterwarnings("ignore:index_reduce.* is in beta")
@pytest.mark.parametrize("row", [*ROWS, *TAGGED], ids=lambda row: row.overload)
def test_rule(row: Row) -> None:
    finding = validate(row)
    assert finding.status in RIGHT, f"{finding.status}: {finding.detail}"


def test_every_rule_has_a_row() -> None:
    assert missing([*ROWS, *TAGGED]) == []


def test_the_tag_covers_what_it_should() -> None:
    names = {row.overload for row in TAGGED}
    assert len(names) > 300
    assert {"add.Tensor", "mul_.Scalar", "gelu", "where.self", "silu_"} <= names
    assert {finding.overload for finding in missing(ROWS)} == names


def test_no_overload_is_overlooked_because_nothing_used_it() -> None:
    names = {row.overload for row in TAGGED}
    rare = {"float_power.Scalar", "float_power.Tensor_Tensor", "polygamma_"}
    assert rare | {"float_power.Tensor_Scalar", "rrelu"} <= names
    assert "equal" not in names


class Compared(nn.Module):
    """Its forward asks whether two tensors are equal."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x if torch.equal(x, x.relu()) else 2 * x)


def test_what_returns_no_tensor_reads_values() -> None:
    """``equal`` is tagged pointwise."""
    equal = find_overload("equal")
    assert torch.Tag.pointwise in equal.tags
    assert find_rule(equal) is None
    graph = trace(Compared(), torch.randn(2, 6), real=True)
    assert graph.unknown == {"aten.equal.default": 1}
    assert Axis("first.weight", 0) not in graph.labels


# -- the validator can fail ------------------------------------------------------------------------


def without(name: str) -> Callable[[str], Rule]:
    """The right rule, with a part of its effect left out."""
    return lambda overload: lambda call: replace(real(overload)(call), **{name: ()})


def real(overload: str) -> Rule:
    found = find_rule(find_overload(overload))
    assert found is not None
    return found


def passes(call: Call) -> Effect:
    """Whatever happens, the first argument's labels come out."""
    return Effect((call.labels(call.target._schema.arguments[0].name),) * len(call.outputs))


def swapped_merge(call: Call) -> Effect:
    labels, shape = call.labels("self"), call.args["self"].shape
    flat = call.algebra.merge(labels[::-1], shape[::-1])
    return Effect(((flat,),), sizes={"size": [(call.outputs[0].shape[0], flat)]})


def swapped_split(call: Call) -> Effect:
    rows, columns = call.outputs[0].shape
    why = call.why("")
    b, a = call.algebra.split(call.labels("self")[0], (columns, rows), why)
    return Effect(((a, b),), sizes={"size": [(rows, a), (columns, b)]})


def offset_cat(call: Call) -> Effect:
    first, second = (call.labels("tensors", index) for index in (0, 1))
    sizes = [tensor.shape[0] for tensor in call.args["tensors"]]
    whole = call.algebra.cat((second[0], first[0]), sizes[::-1])
    return Effect(((whole, call.unify(first[1], second[1])),))


def free_blocks(call: Call) -> Effect:
    """A grouped convolution whose blocks may lose different places."""
    weight, image = call.labels("weight"), call.labels("input")
    for label in (*image[2:], *weight[2:]):
        call.pin(label, "")
    return Effect(((image[0], weight[0], None, None),))


def untied(call: Call) -> Effect:
    image, weight = call.labels("self"), call.labels("mat2")
    return Effect(((image[0], weight[1]),), contracted=((("self",), 1), (("mat2",), 0)))


def free_pieces(call: Call) -> Effect:
    """Pieces that each keep what they like."""
    label, rest = call.labels("self")
    size = call.outputs[0].shape[0]
    pieces = range(len(call.outputs))
    return Effect(tuple((label[n * size : (n + 1) * size], rest) for n in pieces))


def free_mask(call: Call) -> Effect:
    effect = real("_scaled_dot_product_attention_math")(
        Call(
            call.target,
            {**call.args, "attn_mask": None},
            call.outputs,
            call.algebra,
            call.labels_of,
            call.context,
        )
    )
    return effect


def short(call: Call) -> Effect:
    label, *rest = call.labels("self")
    return Effect(((None if label is None else label[:-1], *rest),))


def crashes(call: Call) -> Effect:
    raise KeyError("self")


VIEW = Row("view", (case("?", X(4, 6), [24]),))
UNVIEW = Row("view", (case("?", X(24), [4, 6]),))
CAT = Row("cat", (case("?", [X(2, 3), X(4, 3)]),))


def row_of(overload: str) -> Row:
    return next(row for row in [*ROWS, *TAGGED] if row.overload == overload)


PLANTED: list[tuple[str, Row, Rule]] = [
    ("a roll that passes", row_of("roll"), passes),
    ("a flip that passes", row_of("flip"), passes),
    ("a transposition that passes", row_of("transpose.int"), passes),
    ("a sort that passes", row_of("sort"), passes),
    ("a gather that passes", row_of("gather"), passes),
    ("a pool that passes", row_of("avg_pool2d"), passes),
    ("a product that sums over what is gone", row_of("mm"), without("contracted")("mm")),
    ("a convolution likewise", row_of("convolution"), without("contracted")("convolution")),
    ("attention likewise", row_of(ATTENTION := "_scaled_dot_product_attention_math"),
     without("contracted")(ATTENTION)),
    ("a product whose operands are not tied", row_of("mm"), untied),
    ("a layer norm over what is gone", row_of("native_layer_norm"),
     without("mixing")("native_layer_norm")),
    ("a softmax over what is gone", row_of("_softmax"), without("mixing")("_softmax")),
    ("a sum over what is gone", row_of("sum.dim_IntList"), without("mixing")("sum.dim_IntList")),
    ("a view with a swapped merge", VIEW, swapped_merge),
    ("a view with a swapped split", UNVIEW, swapped_split),
    ("a concatenation with a wrong offset", CAT, offset_cat),
    ("a grouped convolution with unequal blocks", row_of("convolution"), free_blocks),
    ("pieces that are not tied", row_of("split.Tensor"), free_pieces),
    ("an attention bias that is not tied", row_of(ATTENTION), free_mask),
    ("an addition that ties nothing", row_of("add.Tensor"), passes),
    ("a label that is too short", row_of("relu"), short),
    ("no labels at all", row_of("relu"), lambda call: Effect(())),
    ("a label too many", row_of("relu"), lambda call: Effect(((*call.labels("self"), None),))),
    ("a place that is none", row_of("relu"),
     lambda call: Effect((call.labels("self"),), mixing=((("self",), 2),))),
    ("a rule that crashes", row_of("relu"), crashes),
]  # fmt: skip


@pytest.mark.parametrize(("row", "wrong"), [p[1:] for p in PLANTED], ids=[p[0] for p in PLANTED])
def test_a_wrong_rule_is_incorrect(row: Row, wrong: Rule) -> None:
    finding = validate(row, wrong)
    assert finding.status == "INCORRECT", finding
    assert finding.detail


def test_pinning_too_much_is_unexpected() -> None:
    def pins(call: Call) -> Effect:
        call.pin_all("to be on the safe side")
        return Effect(call.unlabelled())

    finding = validate(row_of("relu"), pins)
    assert finding.status == "UNEXPECTED"
    assert finding.detail == "sample 0 gives '. . -> . .', not 'a b -> a b'"


def test_tying_too_much_is_unexpected() -> None:
    def ties(call: Call) -> Effect:
        labels = call.labels("self")
        tied = call.unify(*labels) if call.outputs[0].shape[0] == 4 else labels[0]
        return Effect(((tied, tied),))

    finding = validate(Row("relu", (case("a b -> a b", X(4, 4)),)), ties)
    assert finding.status == "UNEXPECTED"


def test_a_rule_without_row_is_missing() -> None:
    (finding,) = missing(ROWS, [find_overload("mm"), find_overload("sinc")])
    assert finding == Finding("sinc", "MISSING", "a rule without a row")


def test_a_row_without_rule_is_missing() -> None:
    assert validate(Row("bincount", (case("?", I(4, 6)),))).status == "MISSING"
    assert validate(Row("no_such_operator", ())).status == "MISSING"


def test_the_report_is_a_table() -> None:
    findings = [
        validate(row_of("mm")),
        validate(row_of("arange")),
        *missing([], [find_overload("relu")]),
    ]
    text = report(findings)
    assert "a b, b c -> a c" in text
    assert text.endswith("3 overloads: 1 MISSING, 1 OK, 1 PINNED")


def test_the_program_fails_where_a_rule_does(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(rule_validator, "pointwise_rows", list)
    monkeypatch.setattr(rule_validator, "missing", lambda rows: [])
    monkeypatch.setattr(rule_validator, "ROWS", [row_of("mm")])
    assert rule_validator.main() == 0
    monkeypatch.setattr(rule_validator, "ROWS", [Row("mm", (case("? -> ?", X(2, 3), X(3, 2)),))])
    assert rule_validator.main() == 1
    assert "UNEXPECTED" in capsys.readouterr().out


# -- adding an operator ----------------------------------------------------------------------------

GATE = "prunus_test::gate"


@cache
def declare_gate() -> None:
    """An operator that PyTorch knows of and Prunus does not."""

    @torch.library.custom_op(GATE, mutates_args=())
    def gate(x: Tensor, scale: Tensor) -> Tensor:
        return x * torch.sigmoid(scale) + 1

    gate.register_fake(lambda x, scale: torch.empty_like(x))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.scale = nn.Parameter(torch.randn(8))
        self.second = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.ops.prunus_test.gate(self.first(x), self.scale))


def test_adding_an_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    declare_gate()
    monkeypatch.setattr(registry, "_RULES", registry.registered())
    model, x = Gated(), torch.randn(2, 6)

    # Unknown: everything that it touches is pinned, and it is reported.
    before = trace(model, x)
    assert before.unknown == {"prunus_test.gate.default": 1}
    assert Axis("first.weight", 0) not in before.labels
    (_, pin), *_ = before.why_pinned("first.weight")
    assert str(pin).startswith("no rule for prunus_test.gate.default")

    # What it takes: one rule ...
    @rule(GATE)
    def gate(call: Call) -> Effect:
        """One scale per column."""
        out = call.outputs[0]
        return Effect((broadcast(call, out.dim(), out.shape),))

    assert [f.overload for f in missing([*ROWS, *TAGGED])] == [GATE]

    # ... and one row.
    row = Row(GATE, (case("a b, b -> a b", X(4, 6), X(6)),))
    assert validate(row).status == "OK"

    after = trace(model, x)
    assert after.unknown == {}
    group = after.group("first.weight[0]")
    assert group.size == 8
    kept = after.all_kept
    kept[group.units[:3]] = False
    state = dict(model.named_parameters())
    masked = Replay(after, state, [x]).run(kept)
    small = {name: tensor.detach() for name, tensor in state.items()}
    for axis, stay in after.positions(kept):
        index = torch.as_tensor(np.asarray(stay))
        small[axis.tensor] = small[axis.tensor].index_select(axis.dim, index)
    assert {name: tuple(t.shape) for name, t in small.items()} == {
        "first.weight": (5, 6),
        "first.bias": (5,),
        "scale": (5,),
        "second.weight": (3, 5),
        "second.bias": (3,),
    }
    pruned = {"output": torch.func.functional_call(model, small, (x,)).detach()}
    assert relative_error(masked, pruned) < 1e-5
    assert relative_error({"output": model(x).detach()}, masked) > 1e-2
