"""Plans as data: from a mask, to JSON and back, composed, compared, and refused."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunus.errors import PlanError
from prunus.graph.axis import Axis, Role
from prunus.graph.coupling import CouplingGraph
from prunus.graph.groups import form_groups
from prunus.graph.plan_json import VERSION, read_ranges, to_ranges
from prunus.graph.plan_records import Edit, GroupChoice, Scaling
from prunus.graph.plans import Plan
from prunus.graph.polynomial import Monomial, Polynomial


def chain(*widths: int) -> CouplingGraph:
    """Linear layers with biases: 5 features in, 7 out."""
    labels, roles, shapes, terms = {}, {}, {}, []
    count, before = 0, 5
    own = np.zeros((0, 1), dtype=np.int64)
    for index, width in enumerate((*widths, 7)):
        shapes[f"l{index}.weight"], shapes[f"l{index}.bias"] = (width, before), (width,)
        if index:
            labels[Axis(f"l{index}.weight", 1)] = own
            roles[Axis(f"l{index}.weight", 1)] = Role.CONSUMER
        if index < len(widths):
            own = np.arange(count + 1, count + width + 1)[:, None]
            count += width
            for tensor, role in (("weight", Role.PRODUCER), ("bias", Role.CARRIER)):
                labels[Axis(f"l{index}.{tensor}", 0)] = own
                roles[Axis(f"l{index}.{tensor}", 0)] = role
        last = index == len(widths)
        constant = (1 if index else 5) * (7 if last else 1)
        both = (*((index - 1,) if index else ()), *(() if last else (index,)))
        terms.append(Monomial(constant, both))
        before = width
    return CouplingGraph(
        shapes=shapes,
        parameters=frozenset(shapes),
        aliases={},
        labels=labels,
        roles=roles,
        groups=form_groups(labels, roles, count, np.zeros(count + 1, dtype=bool)),
        unit_count=count,
        constraints=(),
        width_labels=tuple(labels[Axis(f"l{i}.weight", 0)] for i in range(len(widths))),
        costs={"macs": Polynomial(0, tuple(terms))},
        couplings=(),
        pins=(),
        kept_outputs=(),
        unknown={},
    )


def mask(graph: CouplingGraph, *gone: int) -> np.ndarray:
    kept = graph.all_kept
    kept[list(gone)] = False
    return kept


GRAPH = chain(6, 8)
PLAN = replace(
    Plan.from_mask(
        GRAPH,
        mask(GRAPH, 2, 3, 9, 14),
        edits=[Edit("l0", "out_features", 6, 4), Edit("norm", "normalized_shape", (8,), (6,))],
        origin={"importance": "l2", "budget": {"macs": 0.5}, "seed": 0, "include": None},
    ),
    scalings=(Scaling("l0.bias", 0, (0, 1, 5), 0.5),),
)


def test_a_mask_becomes_positions_groups_and_costs() -> None:
    assert PLAN.keep == {
        Axis("l0.weight", 0): (0, 3, 4, 5),
        Axis("l0.bias", 0): (0, 3, 4, 5),
        Axis("l1.weight", 1): (0, 3, 4, 5),
        Axis("l1.weight", 0): (0, 1, 3, 4, 5, 6),
        Axis("l1.bias", 0): (0, 1, 3, 4, 5, 6),
        Axis("l2.weight", 1): (0, 1, 3, 4, 5, 6),
    }
    assert PLAN.groups == (
        GroupChoice("l0.weight[0]", 6, (1, 2)),
        GroupChoice("l1.weight[0]", 8, (2, 7)),
    )
    assert PLAN.costs == {"macs": (5 * 6 + 6 * 8 + 8 * 7, 5 * 4 + 4 * 6 + 6 * 7)}
    assert PLAN.resulting_shapes()["l1.weight"] == (6, 4)


@pytest.mark.parametrize("bad", [np.ones(3, dtype=bool), np.ones(15), np.zeros(15, dtype=bool)])
def test_what_is_no_mask_is_refused(bad: np.ndarray) -> None:
    with pytest.raises(PlanError, match=r"no mask(.|\n)*bool array of shape \(15,\)"):
        Plan.from_mask(GRAPH, bad)


def test_a_mask_that_empties_an_axis_is_refused() -> None:
    with pytest.raises(PlanError, match=r"nothing would stay of l0.weight\[0\], l0.bias\[0\]"):
        Plan.from_mask(GRAPH, mask(GRAPH, *range(1, 7)))


def test_tied_names_are_not_among_the_shapes() -> None:
    tied = replace(GRAPH, shapes={**GRAPH.shapes, "tied": (6, 5)}, aliases={"tied": "l0.weight"})
    assert "tied" not in Plan.from_mask(tied, tied.all_kept).shapes


class TestJson:
    def test_round_trip_is_identity_and_bytes_repeat(self) -> None:
        text = PLAN.to_json()
        assert Plan.from_json(text) == PLAN
        assert Plan.from_json(text).to_json() == text
        shuffled = Plan(
            keep=dict(reversed(PLAN.keep.items())),
            shapes=dict(reversed(PLAN.shapes.items())),
            edits=PLAN.edits,
            scalings=PLAN.scalings,
            groups=PLAN.groups,
            costs=PLAN.costs,
            origin=dict(reversed(PLAN.origin.items())),
        )
        assert shuffled.to_json() == text

    def test_indices_are_written_as_ranges(self) -> None:
        document = json.loads(PLAN.to_json())
        assert document["prunus_plan"] == VERSION == 2
        assert document["keep"]["l0.weight[0]"] == [[0, 1], [3, 6]]
        assert document["edits"][1]["after"] == [6]

    @given(st.sets(st.integers(0, 60)))
    def test_ranges_are_inverted(self, chosen: set[int]) -> None:
        indices = tuple(sorted(chosen))
        ranges = to_ranges(indices)
        assert read_ranges(ranges, 61, "") == indices
        assert all(a[1] < b[0] for a, b in pairwise(ranges))

    def test_save_and_load(self, tmp_path: Path) -> None:
        path = tmp_path / "plan.json"
        PLAN.save(path)
        assert Plan.load(path) == PLAN
        assert path.read_text() == PLAN.to_json()
        assert os.listdir(tmp_path) == ["plan.json"]

    def test_a_failed_save_leaves_the_old_file_and_nothing_else(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "plan.json"
        path.write_text("old")

        def fail(*_: Any) -> None:
            raise OSError("disk full")

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            PLAN.save(path)
        assert path.read_text() == "old"
        assert os.listdir(tmp_path) == ["plan.json"]

    def test_load_names_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "plan.json"
        path.write_text("{}")
        with pytest.raises(PlanError, match=r"where: .*plan.json"):
            Plan.load(path)
        path.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(PlanError, match=r"this is no plan(.|\n)*plan.json"):
            Plan.load(path)
        with pytest.raises(FileNotFoundError):
            Plan.load(tmp_path / "absent.json")

    @pytest.mark.parametrize(
        ("path", "value", "message"),
        [
            (["prunus_plan"], 3, "plan of version 3"),
            (["prunus_plan"], "1", "plan of version '1'"),
            (["prunus_plan"], True, "plan of version True"),
            (["keep"], [], "keep(.|\n)*Expected `object`, got `array`"),
            (["keep"], None, "missing required field `keep`"),
            (["shapes"], None, "missing required field `shapes`"),
            (["edits"], None, "missing required field `edits`"),
            (["groups"], None, "missing required field `groups`"),
            (["costs"], None, "missing required field `costs`"),
            (["origin"], 3, "origin(.|\n)*Expected `object`, got `int`"),
            (["more"], 3, "unknown field `more`"),
            (["shapes", "l0.weight"], "6x5", "shapes.l0.weight(.|\n)*Expected `array`, got `str`"),
            (["shapes", "l0.weight"], [6, 5.0], "Expected `int`, got `float`"),
            (["shapes", "l0.weight"], [6, -5], "Expected `int` >= 0"),
            (["shapes", "l0.weight"], [True, 5], "Expected `int`, got `bool`"),
            (
                ["keep", "l0.weight[0]"],
                [[0, 7]],
                r"keep.l0.weight\[0\](.|\n)*out of range: 6 exist",
            ),
            (["keep", "l0.weight[0]"], [[3, 5], [0, 2]], "begins before 5: not sorted"),
            (["keep", "l0.weight[0]"], [[0, 3], [2, 5]], "begins before 3: not sorted"),
            (["keep", "l0.weight[0]"], [[2, 2]], "is empty"),
            (["keep", "l0.weight[0]"], [[4, 2]], "is empty"),
            (["keep", "l0.weight[0]"], [[-1, 2]], "Expected `int` >= 0"),
            (["keep", "l0.weight[0]"], [0, 1], "Expected `array`, got `int`"),
            (["keep", "l0.weight[0]"], [[0, 1, 2]], "Expected `array` of length 2"),
            (["keep", "l0.weight[0]"], [], "it keeps nothing"),
            (["keep", "l0.weight[2]"], [[0, 1]], "no such axis"),
            (["keep", "other.weight[0]"], [[0, 1]], "no such axis"),
            (["keep", "l0.weight"], [[0, 1]], "an axis is written as"),
            (["keep", "l0.weight[-1]"], [[0, 1]], "an axis is written as"),
            (["keep", "l0.weight[x]"], [[0, 1]], "an axis is written as"),
            (["edits", 0], [], r"edits\[0\](.|\n)*Expected `object`, got `array`"),
            (["edits", 0, "module"], 3, r"edits\[0\].module(.|\n)*Expected `str`"),
            (["edits", 0, "after"], None, "missing required field `after`"),
            (["scalings", 0, "factor"], "2", r"scalings\[0\].factor(.|\n)*Expected `float`"),
            (["scalings", 0, "factor"], 0, r"scalings\[0\].factor(.|\n)*Expected `float` > 0"),
            (["scalings", 0, "factor"], -1.5, "Expected `float` > 0"),
            (["scalings", 0, "dim"], 1, r"scalings\[0\](.|\n)*no such axis"),
            (["scalings", 0, "positions"], [[0, 7]], "out of range: 6 exist"),
            (["groups", 1, "size"], "8", r"groups\[1\].size(.|\n)*Expected `int`"),
            (["groups", 1, "removed"], [[0, 9]], "out of range: 8 exist"),
            (["groups", 1, "name"], 5, r"groups\[1\].name(.|\n)*Expected `str`"),
            (["costs", "macs"], [1], "Expected `array` of length 2"),
            (["costs", "macs"], [1, 0.5], "Expected `int`, got `float`"),
        ],
    )
    def test_damage_is_found_and_placed(self, path: list[Any], value: object, message: str) -> None:
        """A None in the table takes the field out."""
        document: Any = json.loads(PLAN.to_json())
        place = document
        for key in path[:-1]:
            place = place[key]
        if value is None:
            del place[path[-1]]
        else:
            place[path[-1]] = value
        with pytest.raises(PlanError, match=message):
            Plan.from_json(json.dumps(document))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "it is not JSON"),
            ("{", "it is not JSON"),
            ("[" * 100_000, "Expected `object`, got `array`"),
            ('{"prunus_plan": ' + "[" * 100_000, "it is not JSON"),
            ("[]", "Expected `object`, got `array`"),
            ("{}", "missing required field `prunus_plan`"),
            ('{"prunus_plan": NaN}', "it is not JSON"),
        ],
    )
    def test_other_texts_are_refused(self, text: str, message: str) -> None:
        with pytest.raises(PlanError, match=message):
            Plan.from_json(text)

    @pytest.mark.parametrize("bad", [float("nan"), {1: 2}, object(), {"a": {3}}])
    def test_what_is_not_json_gets_into_no_plan(self, bad: object) -> None:
        with pytest.raises(PlanError, match="can't be part of a plan"):
            Edit("m", "a", 1, bad)
        with pytest.raises(PlanError, match="can't be part of a plan"):
            Plan({}, {}, origin={"x": bad})


class TestThen:
    @given(st.integers(0, 2**14 - 1), st.integers(0, 2**14 - 1))
    def test_equals_the_union(self, first: int, second: int) -> None:
        """Cut twice equals cut once with the union."""
        bits = np.arange(14)
        one, two = (np.flatnonzero(n >> bits & 1) + 1 for n in (first, second))
        # Two units of each group always stay, so that no axis is emptied.
        one, two = (n[~np.isin(n, (1, 2, 7, 8))] for n in (one, two))
        left = np.setdiff1d(np.arange(1, 15), one)
        smaller = chain(*(int((left < 7).sum()), int((left > 6).sum())))
        again = np.flatnonzero(np.isin(left, two)) + 1
        union = Plan.from_mask(GRAPH, mask(GRAPH, *one, *two))
        composed = Plan.from_mask(GRAPH, mask(GRAPH, *one)).then(
            Plan.from_mask(smaller, mask(smaller, *again))
        )
        assert composed.keep == union.keep
        assert composed.groups == union.groups
        assert composed.costs == union.costs
        assert composed.shapes == union.shapes
        assert Plan.from_json(composed.to_json()) == composed

    def test_edits_reach_from_the_first_before_to_the_last_after(self) -> None:
        shapes = PLAN.resulting_shapes()
        later = Plan(
            {},
            shapes,
            edits=(
                Edit("l0", "out_features", 4, 3),
                Edit("norm", "normalized_shape", [6], [8]),
                Edit("l9", "groups", 2, 1),
            ),
        )
        assert PLAN.then(later).edits == (
            Edit("l0", "out_features", 6, 3),
            Edit("l9", "groups", 2, 1),
        )

    def test_scalings_name_positions_of_the_original(self) -> None:
        later = Plan({}, PLAN.resulting_shapes(), scalings=(Scaling("l0.bias", 0, (1, 3), 2.0),))
        both = PLAN.then(later).scalings
        assert both == (*PLAN.scalings, Scaling("l0.bias", 0, (3, 5), 2.0))

    def test_origins_make_a_list_of_steps(self) -> None:
        later = [Plan({}, PLAN.resulting_shapes(), origin={"seed": n}) for n in (1, 2)]
        both = PLAN.then(later[0]).then(later[1])
        assert both.origin == {"steps": (PLAN.origin, {"seed": 1}, {"seed": 2})}
        assert both == PLAN.then(later[0].then(later[1]))

    def test_costs_that_do_not_chain_are_left_out(self) -> None:
        first = Plan({}, {"w": (2,)}, costs={"params": (10, 8), "macs": (100, 80)})
        later = Plan({}, {"w": (2,)}, costs={"params": (8, 4), "macs": (320, 160)})
        assert first.then(later).costs == {"params": (10, 4)}

    def test_a_plan_for_another_state_is_refused(self) -> None:
        with pytest.raises(PlanError, match=r"not for the model(.|\n)*l0.weight: \(4, 5\) and"):
            PLAN.then(PLAN)


def test_costs_before_and_after_by_name() -> None:
    before, after = PLAN.costs["macs"]
    cost = PLAN.cost("macs")
    assert (cost.before, cost.after, cost.share) == (before, after, after / before)
    assert PLAN.cost() == {"macs": (before, after)}
    with pytest.raises(PlanError, match=r"no cost called 'flops'(.|\n)*it counts macs"):
        PLAN.cost("flops")


def test_a_width_is_that_of_the_axis_heads_times_dim() -> None:
    qkv = Axis("qkv.weight", 0)
    plan = Plan(
        {qkv: (0, 1, 2, 6, 7, 8)},
        {"qkv.weight": (12, 4)},
        groups=(GroupChoice("qkv.weight[0]", 4, (1, 3)), GroupChoice("qkv.weight[0]/2", 3, ())),
    )
    assert [plan.width(choice) for choice in plan.groups] == [(12, 6), (12, 6)]
    assert plan.width(GroupChoice("by hand", 4, (1,))) == (4, 3)


def test_another_model_is_told_by_its_tensors() -> None:
    shapes = dict(PLAN.shapes)
    PLAN.check_model(shapes)
    PLAN.check_model({**shapes, "tied.weight": (3,)})
    PLAN.check_model({**shapes, "cache": (3,)}, parameters=shapes)
    with pytest.raises(PlanError, match=r"for another model(.|\n)*more than the plan has: more.w"):
        PLAN.check_model({**shapes, "more.w": (3,)}, parameters=[*shapes, "more.w"])
    with pytest.raises(
        PlanError, match=r"another model(.|\n)*l0.weight \(6, 9\) where .* \(6, 5\)"
    ):
        PLAN.check_model({**shapes, "l0.weight": (6, 9)})
    with pytest.raises(PlanError, match=r"no l0\.weight, l0\.bias, l1\.weight and 3 more"):
        PLAN.check_model({})
    with pytest.raises(PlanError, match="applied to it already"):
        PLAN.check_model(PLAN.resulting_shapes())
