"""Every tensor that leaves a forward keeps its shape, whatever it leaves in."""

from __future__ import annotations

import weakref
from collections import ChainMap, OrderedDict, UserDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import (
    Categorical,
    Independent,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
)
from torch.distributions.transforms import TanhTransform
from torch.nn.utils.rnn import pack_padded_sequence

import prunus
from prunus.errors import TraceError
from prunus.tracer.outputs import answer_of, find_outputs, select_outputs

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two hidden layers; what is made of the output and the second one is what it returns."""

    def __init__(self, result: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(4, 16), nn.Linear(16, 12), nn.Linear(12, 3)
        self.result = result

    def forward(self, x: Tensor) -> Any:
        h = self.b(self.a(x).relu()).tanh()
        return self.result(self.c(h), h)


class Boxes:
    """Tensors in attributes and in a dict; it refers to itself, and a property of it raises."""

    def __init__(self, h: Tensor) -> None:
        self.bbox, self.extra, self.me = h, {"scores": h * 2}, self

    @property
    def area(self) -> Tensor:
        raise RuntimeError("no area yet")


class Slotted:
    __slots__ = ("__hidden", "unset")

    def __init__(self, h: Tensor) -> None:
        self.__hidden = h


class Magic:
    def __init__(self, h: Tensor) -> None:
        self.__dict__["_h"] = h

    def __getattr__(self, name: str) -> Any:
        return self


@dataclass
class Inner:
    h: Tensor


@dataclass
class Outer:
    y: Tensor
    inner: Inner
    note: str = "none"


Pair = namedtuple("Pair", "y h")


class Tagged(list):
    """A list with a tensor of its own beside its items."""


def tagged(y: Tensor, h: Tensor) -> Tagged:
    made = Tagged([y])
    made.h = h
    return made


def packed(y: Tensor, h: Tensor) -> Any:
    lengths = torch.tensor([2, 2, 1])
    return y, pack_padded_sequence(h[:, None].expand(-1, 2, -1), lengths, batch_first=True)


HIDDEN_LEAVES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "normal": lambda y, h: (y, Normal(h, h.exp())),
    "independent": lambda y, h: (y, Independent(Normal(h, h.exp()), 1)),
    "categorical": lambda y, h: (y, Categorical(logits=h)),
    "transformed": lambda y, h: (
        y,
        TransformedDistribution(Normal(h, h.exp()), [TanhTransform()]),
    ),
    "multivariate": lambda y, h: (y, MultivariateNormal(h, torch.eye(12))),
    "object": lambda y, h: (y, Boxes(h)),
    "slots": lambda y, h: (y, Slotted(h)),
    "getattr": lambda y, h: (y, Magic(h)),
    "dataclasses": lambda y, h: Outer(y, Inner(h)),
    "namedtuple": Pair,
    "namespace": lambda y, h: SimpleNamespace(y=y, h=h),
    "list with attributes": tagged,
    "packed sequence": packed,
    "values": lambda y, h: {"y": y, "h": h}.values(),
    "items": lambda y, h: {"y": y, "h": h}.items(),
    "proxy": lambda y, h: MappingProxyType({"y": y, "h": h}),
    "user dict": lambda y, h: UserDict(y=y, h=h),
    "chain": lambda y, h: ChainMap({"y": y}, {"h": h}),
    "default dict": lambda y, h: defaultdict(list, y=[y], h=[h]),
    "deque": lambda y, h: deque([y, h]),
    "set of one": lambda y, h: (y, {h}),
    "keys": lambda y, h: (y, {h: 1}),
    "generator": lambda y, h: (t * 1 for t in (y, h)),
    "map": lambda y, h: map(torch.relu, (y, h)),
    "closure": lambda y, h: (y, lambda z: z * h),
    "partial": lambda y, h: (y, partial(torch.add, h)),
    "method": lambda y, h: (y, h.add),
    "object array": lambda y, h: (y, np.array([h, None], dtype=object)),
    "array": lambda y, h: (y, h.numpy()),
    "asarray": lambda y, h: (y, np.asarray(h)),
    "array beyond PyTorch": lambda y, h: (y, h.numpy() * 2),
    "list of numbers": lambda y, h: (y, h.tolist()),
    "own cell_states": lambda y, h: {"y": y, "cell_states": h},
    "own hidden_states": lambda y, h: {"y": y, "hidden_states": (h,)},
    "own past_key_values": lambda y, h: OrderedDict(y=y, past_key_values=[(h, h)]),
}


@pytest.mark.parametrize("name", HIDDEN_LEAVES)
def test_what_leaves_keeps_its_width(name: str) -> None:
    net = Net(HIDDEN_LEAVES[name]).eval()
    graph = prunus.trace(net, X)
    assert [(group.name, group.size) for group in graph.groups] == [("a.weight[0]", 16)]
    plan = prunus.plan(graph, net, ratio=0.5)
    assert prunus.verify(plan, net, X).verdict == "exact"
    with torch.no_grad():
        before = {name: list(t.shape) for name, t in answer_of(net(X)).items()}
        prunus.apply(plan, net)
        after = {name: list(t.shape) for name, t in answer_of(net(X)).items()}
    assert before == after
    assert net.a.out_features == 8


def test_an_array_that_shares_memory_is_compared() -> None:
    net = Net(lambda y, h: (y, h.numpy())).eval()
    assert prunus.trace(net, X).kept_outputs == ("0", "1")


def test_an_array_computed_outside_is_named() -> None:
    net = Net(lambda y, h: {"y": y, "scores": h.numpy() * 2}).eval()
    plan = prunus.plan(prunus.trace(net, X), net, ratio=0.5)
    (named,) = plan.traced.released
    assert named.startswith("scores (an array")
    assert prunus.verify(plan, net, X).released == (named,)


@pytest.mark.parametrize(
    "result",
    [
        lambda y, h: (y, weakref.ref(h)),
        lambda y, h: (None, y, True, "text", 3, h.shape[0], torch.float32, b"", Ellipsis),
        lambda y, h: (y, [y, (y,)]),
        lambda y, h: (y, torch.relu, nn.Identity()),
    ],
)
def test_what_holds_no_hidden_tensor_pins_nothing(result: Callable[..., Any]) -> None:
    graph = prunus.trace(Net(result).eval(), X)
    assert {group.size for group in graph.groups} == {16, 12}


def test_input_returned_as_it_is() -> None:
    class Same(Net):
        def forward(self, x: Tensor) -> Any:
            return x, self.c(self.b(self.a(x).relu()).tanh())

    net = Same(Pair).eval()
    plan = prunus.plan(prunus.trace(net, X), net, ratio=0.5)
    assert prunus.verify(plan, net, X).verdict == "exact"


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (lambda y, h: {y, h}, "a set of tensors"),
        (lambda y, h: (y, torch.futures.Future()), "Future"),
    ],
)
def test_what_cannot_be_searched_is_refused_by_type(result: Any, said: str) -> None:
    net = Net(result).eval()
    with pytest.raises(TraceError, match="can't be searched for tensors") as refused:
        prunus.trace(net, X)
    assert said in refused.value.why
    assert "outputs=" in refused.value.fix


def test_what_cannot_be_searched_is_named_where_outputs_are_chosen() -> None:
    net = Net(lambda y, h: {"y": y, "later": torch.futures.Future()}).eval()
    graph = prunus.trace(net, X, outputs="y")
    assert graph.traced["released"] == ["later"]


def test_endless_iterator_is_refused() -> None:
    def endless(y: Tensor, h: Tensor) -> Any:
        while True:
            yield y

    with pytest.raises(TraceError, match="iterator of more than"):
        prunus.trace(Net(endless).eval(), X)


def test_outputs_named_by_the_user_let_the_others_go() -> None:
    net = Net(lambda y, h: {"y": y, "hidden[0]": Boxes(h)}).eval()
    graph = prunus.trace(net, X, outputs="y")
    assert {group.size for group in graph.groups} == {16, 12}
    assert graph.traced["released"] == ["hidden[0].bbox", "hidden[0].extra.scores"]
    whole = prunus.trace(net, X)
    again = prunus.trace(net, X, outputs=list(whole.kept_outputs))  # by their names, not as globs
    assert again.kept_outputs == whole.kept_outputs


def test_features_kept_on_a_module_are_no_outputs() -> None:
    class Keeps(Net):
        def forward(self, x: Tensor) -> Any:
            self.features = h = self.b(self.a(x).relu()).tanh()
            return self.c(h)

    graph = prunus.trace(Keeps(Pair).eval(), X)
    assert {group.size for group in graph.groups} == {16, 12}


def _bert() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        vocab_size=40,
        max_position_embeddings=20,
        num_labels=3,
    )
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config).eval()


IDS = torch.randint(1, 40, (2, 6), generator=torch.Generator().manual_seed(0))


def test_transformers_side_outputs_may_shrink_and_are_listed() -> None:
    model = _bert()
    graph = prunus.trace(model, IDS, {"output_hidden_states": True})
    assert graph.kept_outputs == ("logits",)
    assert graph.traced["released"] == ["hidden_states"]
    plan = prunus.plan(graph, model, ratio=0.25)
    certificate = prunus.verify(plan, model, IDS, {"output_hidden_states": True})
    assert (certificate.verdict, certificate.released) == ("exact", ("hidden_states",))


def test_the_same_names_in_ones_own_dict_are_outputs() -> None:
    model = _bert()

    def plain(model: nn.Module, ids: Tensor) -> Any:
        return dict(model(ids, output_hidden_states=True))

    graph = prunus.trace(model, IDS, forward_fn=plain)
    assert graph.traced["released"] == []
    assert "hidden_states.0" in graph.kept_outputs


def test_own_fields_of_a_subclass_are_outputs_and_nested_side_outputs_are_not() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")

    @dataclass
    class Mine(outputs.ModelOutput):
        logits: Any = None
        hidden_states: Any = None
        encoder: Any = None

    t = torch.ones(2)
    inner = outputs.BaseModelOutputWithPast(last_hidden_state=t, hidden_states=(t, t))
    found = find_outputs(Mine(logits=t, hidden_states=(t,), encoder=inner))
    chosen, released = select_outputs(found, None)
    assert [name for name, _ in chosen] == [
        *("logits", "hidden_states.0", "encoder.last_hidden_state")
    ]
    assert released == ["encoder.hidden_states"]


def test_caches_of_transformers_are_released_wherever_they_stand() -> None:
    transformers = pytest.importorskip("transformers")
    cache = transformers.DynamicCache()
    cache.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), 0)
    found = find_outputs((torch.ones(2), cache))
    assert [name for name, _ in found.tensors] == ["0"]
    assert select_outputs(found, None)[1] == ["1"]


class Writes(nn.Module):
    """Leaves a hidden tensor in what it was given."""

    def __init__(self, write: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.write = write
        self.a, self.b, self.c = nn.Linear(4, 16), nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor, into: Any) -> Tensor:
        hidden = self.b(self.a(x).relu())
        self.write(into, hidden)
        return self.c(hidden)


@pytest.mark.parametrize(
    ("write", "into", "left"),
    [
        (lambda into, h: into.update(h=h), {"k": X}, lambda into: into["h"]),
        (lambda into, h: into.append([h]), [], lambda into: into[0][0]),
        (lambda into, h: setattr(into, "h", h), SimpleNamespace(k=X), lambda into: into.h),
        (lambda into, h: into["deep"].append(h * 2), {"deep": []}, lambda into: into["deep"][0]),
    ],
    ids=["dict", "list", "object", "nested"],
)
def test_what_a_forward_leaves_in_its_inputs_keeps_its_width(
    write: Callable[..., Any], into: Any, left: Callable[[Any], Tensor]
) -> None:
    model = Writes(write)
    shrunk = prunus.shrink(model, (X, into), ratio=0.5)
    assert shrunk.certificate.verdict == "exact"
    assert (model.a.out_features, model.b.out_features) == (8, 12)
    model(X, into)
    assert left(into).shape == (3, 12)


def test_outputs_named_by_the_user_let_go_what_is_left_in_inputs() -> None:
    model = Writes(lambda into, h: into.append(h))
    prunus.shrink(model, (X, []), ratio=0.5, outputs="output")
    assert model.b.out_features == 6


def test_an_iterator_that_a_forward_takes_is_not_consumed() -> None:
    given = iter([X])
    model = Writes(lambda *_: None)
    prunus.trace(model, (X, given))
    assert next(given) is X


@pytest.mark.parametrize("rows", [5, 0])
def test_where_nothing_comes_out_nothing_is_verified(rows: int) -> None:
    """As of a detector that finds no boxes; the model is not blamed for it."""

    class Filtered(Net):
        def forward(self, x: Tensor) -> Tensor:
            scores = super().forward(x)
            return scores[scores[:, 0] > 1e6]

    model = Filtered(lambda output, hidden: output)
    x = torch.randn(rows, 4)
    certificate = prunus.shrink(model, x, ratio=0.5).certificate
    assert certificate.verdict == "not verified"
    assert model(x).shape == (0, 3)


def test_a_width_among_the_outputs_stays() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner = nn.Linear(4, 12), nn.Linear(12, 10)
            self.last = nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Any:
            h = self.first(x).relu()
            return {"y": self.last(self.inner(h).relu()), "width": h.shape[1]}

    model, x = Sized().eval(), torch.randn(2, 4)
    prunus.shrink(model, x, ratio=0.4, recover="none")
    assert (model.first.out_features, model.inner.out_features) == (12, 6)
    assert model(x)["width"] == 12
