"""Importances: every weight that a unit owns counts once per axis, exactly and in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prunus.errors import ModelError, PlanError
from prunus.graph.axis import Axis, Label, Role
from prunus.graph.coupling import CouplingGraph
from prunus.graph.groups import Group, form_groups
from prunus.importance import Context, importance, names, registry, score
from prunus.importance.magnitude import reduce_axes


def make_graph(
    shapes: dict[str, tuple[int, ...]],
    labels: dict[Axis, Label],
    producers: set[Axis],
    buffers: set[str] = frozenset(),  # type: ignore[assignment]
) -> CouplingGraph:
    count = max(int(label.max()) for label in labels.values())
    roles = {a: Role.PRODUCER if a in producers else Role.CONSUMER for a in labels}
    return CouplingGraph(
        shapes=shapes,
        parameters=frozenset(shapes) - buffers,
        aliases={},
        labels=labels,
        roles=roles,
        groups=form_groups(labels, roles, count, np.zeros(count + 1, dtype=bool)),
        unit_count=count,
        constraints=(),
        width_labels=(),
        costs={},
        couplings=(),
        pins=(),
        kept_outputs=(),
        unknown={},
    )


@pytest.fixture
def graph() -> CouplingGraph:
    """Two producers concatenated in a consumer; heads × dims; a buffer that rides along."""
    a, b = np.arange(1, 5)[:, None], np.arange(5, 8)[:, None]
    head, dim = np.arange(8, 10)[:, None], np.arange(10, 13)[:, None]
    inner = np.concatenate([np.repeat(head, 3, axis=0), np.tile(dim, (2, 1))], axis=1)
    both = np.concatenate([a, np.zeros((2, 1), dtype=np.int64), b])
    labels = {
        Axis("a.weight", 0): a,
        Axis("a.bias", 0): a,
        Axis("norm.running_var", 0): a,
        Axis("b.weight", 0): b,
        Axis("c.weight", 1): both,
        Axis("v.weight", 0): inner,
    }
    shapes = {
        "a.weight": (4, 3, 3),
        "a.bias": (4,),
        "norm.running_var": (4,),
        "b.weight": (3, 5),
        "c.weight": (2, 9, 2),
        "v.weight": (6, 4),
    }
    producers = {Axis(f"{name}.weight", 0) for name in "abv"}
    return make_graph(shapes, labels, producers, {"norm.running_var"})


@pytest.fixture
def tensors(graph: CouplingGraph) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, shape in graph.shapes.items()}


def by_hand(graph: CouplingGraph, tensors: dict[str, torch.Tensor], power: int) -> np.ndarray:
    found = np.zeros(graph.unit_count + 1)
    for axis, label in graph.labels.items():
        if axis.tensor in graph.parameters:
            values = tensors[axis.tensor].double().numpy()
            for position, units in enumerate(label):
                weights = np.take(values, position, axis=axis.dim)
                for unit in set(units.tolist()):
                    found[unit] += (np.abs(weights) ** power).sum()
    found = found ** (1 / power)
    found[0] = np.inf
    return found


@pytest.mark.parametrize(("name", "power"), [("l1", 1), ("l2", 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_magnitudes_equal_the_sum_over_all_that_a_unit_owns(
    graph: CouplingGraph,
    tensors: dict[str, torch.Tensor],
    name: str,
    power: int,
    dtype: torch.dtype,
) -> None:
    tensors = {key: value.to(dtype) for key, value in tensors.items()}
    found = score(graph, tensors, name)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, by_hand(graph, tensors, power), rtol=1e-12)


def test_half_precision_is_summed_without_overflow() -> None:
    axis = Axis("w", 0)
    graph = make_graph({"w": (2, 4)}, {axis: np.array([[1], [2]])}, {axis})
    found = score(graph, {"w": torch.full((2, 4), 6e4, dtype=torch.float16)}, "l2")
    assert found[1] == found[2] == pytest.approx(2 * 6e4, rel=1e-3)


def test_a_unit_in_two_columns_of_a_position_counts_once() -> None:
    axis = Axis("w", 0)
    graph = make_graph({"w": (2, 1)}, {axis: np.array([[1, 1], [2, 1]])}, {axis})
    found = score(graph, {"w": torch.tensor([[1.0], [10.0]])}, "l1")
    assert found[1:].tolist() == [11.0, 10.0]


def test_chunks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(7, 5, 3)
    axes = [Axis("w", dim) for dim in range(3)]
    whole = reduce_axes(axes, values, 2)
    for axis, sums in zip(axes, whole, strict=True):
        others = [dim for dim in range(3) if dim != axis.dim]
        np.testing.assert_allclose(sums, values.double().square().sum(others), rtol=1e-12)
        np.testing.assert_allclose(sums, reduce_axes([axis], values, 2)[0], rtol=1e-12)
    monkeypatch.setattr("prunus.importance.magnitude._CHUNK", 30)
    parts = reduce_axes(axes, values, 2)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_every_axis_is_read_once(
    graph: CouplingGraph, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Axis] = []

    def counting(axes: list[Axis], values: torch.Tensor, power: int) -> list[np.ndarray]:
        read.extend(axes)
        return reduce_axes(axes, values, power)

    monkeypatch.setattr("prunus.importance.magnitude.reduce_axes", counting)
    score(graph, tensors, "l2")
    assert len(read) == len(set(read)) == len(graph.labels) - 1


def test_nothing_that_was_given_changes(
    graph: CouplingGraph, tensors: dict[str, torch.Tensor]
) -> None:
    before = {name: value.clone() for name, value in tensors.items()}
    labels = {axis: label.copy() for axis, label in graph.labels.items()}
    score(graph, tensors, "l2")
    assert all(torch.equal(before[name], tensors[name]) for name in before)
    assert all(np.array_equal(labels[axis], graph.labels[axis]) for axis in labels)


def test_random_hangs_on_seed_and_group_alone(graph: CouplingGraph) -> None:
    first = score(graph, {}, "random", seed=1)
    assert np.array_equal(first, score(graph, {}, "random", seed=1))
    assert not np.array_equal(first, score(graph, {}, "random", seed=2))
    axis = Axis("a.weight", 0)
    alone = make_graph({"a.weight": (4, 3, 3)}, {axis: graph.labels[axis]}, {axis})
    assert np.array_equal(first[:5], score(alone, {}, "random", seed=1))
    assert len(set(first.tolist())) == graph.unit_count + 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named_and_counted(
    graph: CouplingGraph, tensors: dict[str, torch.Tensor], bad: float
) -> None:
    tensors["c.weight"][0, 3] = bad
    with pytest.raises(ModelError, match=r"c.weight has 2 values of 36 that are NaN or infinite"):
        score(graph, tensors, "l1")


def test_missing_and_meta_tensors_are_named(
    graph: CouplingGraph, tensors: dict[str, torch.Tensor]
) -> None:
    meta = {**tensors, "b.weight": torch.empty(3, 5, device="meta")}
    with pytest.raises(ModelError, match=r"b.weight has a shape but no values(.|\n)*random"):
        score(graph, meta, "l2")
    del tensors["b.weight"]
    with pytest.raises(ModelError, match=r"there are no values for b\.weight"):
        score(graph, tensors, "l2")


def test_unknown_names_get_a_suggestion(graph: CouplingGraph) -> None:
    with pytest.raises(
        PlanError, match=r"'randon'(.|\n)*l1, l2, lamp, obs, random(.|\n)*mean 'random'\?"
    ):
        score(graph, {}, "randon")


def test_a_function_will_do_and_is_checked(graph: CouplingGraph) -> None:
    def size(group: Group, context: Context) -> np.ndarray:
        return np.full(group.size, float(group.size))

    assert score(graph, {}, size)[1:8].tolist() == [4.0] * 4 + [3.0] * 3

    def short(group: Group, context: Context) -> np.ndarray:
        return np.zeros(1)

    with pytest.raises(PlanError, match=r"'short' returned shape \(1,\)(.|\n)*a.weight\[0\]"):
        score(graph, {}, short)
    with pytest.raises(PlanError, match=r"returned \d NaN among \d scores"):
        score(graph, {}, lambda group, context: np.full(group.size, np.nan))


def test_names_are_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_known", dict(registry._known))

    @importance("sizes")
    def sizes(group: Group, context: Context) -> np.ndarray:
        return np.ones(group.size)

    assert "sizes" in names()
    with pytest.raises(PlanError, match="'sizes' exists already"):
        importance("sizes")(sizes)
