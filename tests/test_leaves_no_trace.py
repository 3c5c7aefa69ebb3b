"""Whatever runs a model leaves it, its hooks, its file and every cache as they were."""

from __future__ import annotations

import copy
import functools
import gc
import sys
import types
from collections import defaultdict, deque
from types import FrameType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

import prunus
from prunus.tracer.copies import duplicate, stand_in
from prunus.tracer.provenance import Provenance, listeners

FEATURES: list[Tensor] = []
BY_NAME: dict[str, list[Tensor]] = defaultdict(list)
TABLES: dict[Any, Tensor] = {}
LAST: Any = None


_OLD: list[int] = []


@pytest.fixture(autouse=True)
def _cold() -> Any:
    _OLD[:] = [id(one) for one in _traced()]
    yield
    for held in (FEATURES, BY_NAME, TABLES, Classy.tables):
        held.clear()
    Registry.table = None
    for cached in (_positions, _unbounded, _split, _recipe, Classy.table_of):
        cached.cache_clear()


def _traced() -> list[Any]:
    gc.collect()
    return [one for one in gc.get_objects() if type(one) in (FakeTensor, Provenance)]


def survivors() -> list[str]:
    """Fake tensors and traced integers that this test has left anywhere in the process.

    Those of a test that failed before live on in its traceback.
    """
    return [type(one).__name__ for one in _traced() if id(one) not in _OLD]


@functools.lru_cache
def _positions(n: int, width: int) -> Tensor:
    return torch.arange(n * width).view(n, width).float().sin()


@functools.lru_cache(None)
def _unbounded(n: int, width: int) -> tuple[Tensor, int]:
    return torch.arange(n * width).view(n, width).float().cos(), n


@functools.lru_cache(256)
def _split(shape: tuple[int, ...], heads: int) -> tuple[int, ...]:
    return (*shape[:-1], heads, shape[-1] // heads)


@functools.lru_cache(256)
def _recipe(pattern: str, names: tuple[tuple[str, int], ...], rank: int) -> tuple[Any, ...]:
    """As einops does: what a pattern comes to, for these sizes of its names."""
    return pattern, dict(names), rank


def rearrange(x: Tensor, pattern: str, **sizes: int) -> Tensor:
    _, known, _ = _recipe(pattern, tuple(sizes.items()), x.dim())
    return x.reshape(_split(tuple(x.shape), known["h"]))


class Classy(nn.Module):
    """Keeps tables in an attribute of the class, and in a cached method."""

    tables: ClassVar[dict[Any, Tensor]] = {}
    calls = 0

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.last = nn.Linear(4, 12), nn.Linear(12, 3)
        self.runs, self.seen = 0, []
        self.held = types.SimpleNamespace(shape=None, deep=types.SimpleNamespace(x=None))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    @staticmethod
    @functools.lru_cache(8)
    def table_of(n: int) -> Tensor:
        return torch.arange(n * 4.0).view(n, 4).cos()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x + _WAYS[self.kind](self, x)).relu())


def by_class(self: Any, x: Tensor) -> Tensor:
    type(self).calls += 1
    if x.shape[1] not in self.tables:
        self.tables[x.shape[1]] = torch.arange(x.shape[1] * 4.0).view(-1, 4).cos()
    return self.tables[x.shape[1]]


def by_name(self: Any, x: Tensor) -> Tensor:
    global LAST
    if "table" not in TABLES:
        TABLES["table"] = torch.arange(20.0).view(5, 4).cos()
    LAST = x
    return TABLES["table"]


def by_attribute(self: Any, x: Tensor) -> Tensor:
    self.runs += 1
    self.count += 1
    self.seen.append(x)
    self.held.shape, self.held.deep.x = x.shape, x
    self.left = x * 2
    return self.left


def by_size(self: Any, x: Tensor) -> Tensor:
    if x.shape[1] not in TABLES:
        TABLES[x.shape[1]] = torch.arange(x.shape[1] * 4.0).view(-1, 4).cos()
    return TABLES[x.shape[1]]


class Tables(dict[str, Any]):
    """Answers with an instance of what it holds, as tables of activations do."""

    def __getitem__(self, name: str) -> Any:
        return super().__getitem__(name)()


ACTIVATIONS = Tables(relu=nn.ReLU)


def by_table(self: Any, x: Tensor) -> Tensor:
    h: Tensor = ACTIVATIONS["relu"](x)
    return h


def test_a_container_that_answers_with_something_else_is_left_alone() -> None:
    prunus.trace(Classy("table").eval(), torch.randn(2, 5, 4))
    assert dict(ACTIVATIONS.items()) == {"relu": nn.ReLU}


class Registry:
    """Not a module: a class that functions name, and that keeps what they made."""

    table: ClassVar[Any] = None


def by_another_class(self: Any, x: Tensor) -> Tensor:
    if Registry.table is None:
        Registry.table = torch.arange(20.0).view(5, 4).cos()
    return Registry.table


def _remembering() -> Any:
    table = None

    def by_closure(self: Any, x: Tensor) -> Tensor:
        nonlocal table
        if table is None:
            table = torch.arange(20.0).view(5, 4).cos()
        return table

    return by_closure


_WAYS: dict[str, Any] = {
    "another class": by_another_class,
    "closure": _remembering(),
    "table": by_table,
    "lru_cache": lambda self, x: _positions(x.shape[1], 4),
    "unbounded": lambda self, x: _unbounded(x.shape[1], 4)[0],
    "method": lambda self, x: self.table_of(x.shape[1]),
    "class": by_class,
    "global": by_size,
    "name": by_name,
    "attribute": by_attribute,
}


def described(model: Any) -> Any:
    """All that a run could change, in words."""
    own = [(n, {k: repr(v) for k, v in vars(m).items()}) for n, m in model.named_modules()]
    outside = [
        FEATURES,
        dict(BY_NAME),
        TABLES,
        LAST,
        dict(vars(Classy)),
        Registry.table,
        _positions.cache_info()[3],
    ]
    state = {n: (t.clone(), t.stride(), t.data_ptr()) for n, t in model.state_dict().items()}
    return repr((own, vars(model.held), outside, state))


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("kind", _WAYS)
def test_a_trace_leaves_no_trace(kind: str, warm: bool) -> None:
    torch.manual_seed(0)
    model, x = Classy(kind).eval(), torch.randn(2, 5, 4)
    want = model(x) if warm else None
    before = described(model)
    graph = prunus.trace(model, x)
    if kind not in ("lru_cache", "unbounded", "method"):  # a cache may be cleared
        assert described(model) == before
    assert survivors() == []
    assert [(g.name, g.size) for g in graph.groups] == [("first.weight[0]", 12)]
    assert want is None or torch.equal(model(x), want)
    shrunk = prunus.shrink(model, x, ratio=0.4, recover="none")
    assert shrunk.certificate is not None
    assert shrunk.certificate.verdict == "exact"
    assert survivors() == []
    assert type(model(x)) is Tensor


@pytest.mark.parametrize("kind", _WAYS)
def test_nor_does_a_failure(kind: str) -> None:
    model, x = Classy(kind).eval(), torch.randn(2, 5, 4)
    before = described(model)
    model.last.register_forward_hook(_fail)
    with pytest.raises(ZeroDivisionError):
        prunus.trace(model, x)
    model.last._forward_hooks.clear()
    model.last._forward_hooks_always_called.clear()
    if kind not in ("lru_cache", "unbounded", "method"):
        assert described(model) == before
    assert survivors() == []


def _fail(*_: Any) -> None:
    raise ZeroDivisionError


class Heads(nn.Module):
    def __init__(self, width: int = 16, heads: int = 4, *, imitate: bool = False) -> None:
        super().__init__()
        self.h, self.imitate = heads, imitate
        self.a, self.q, self.o = nn.Linear(4, width), nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.q(self.a(x).relu())
        if self.imitate:
            return self.o(rearrange(y, "b n (h d) -> b n h d", h=self.h).relu().flatten(2))
        return self.o(y.view(_split(y.shape, self.h)).relu().flatten(2))


@pytest.mark.parametrize("imitate", [False, True])
def test_the_graph_is_the_same_whatever_ran_before(imitate: bool) -> None:
    x = torch.randn(2, 5, 4)

    def groups(model: nn.Module) -> Any:
        graph = prunus.trace(model, x)
        return [(g.name, g.size) for g in graph.groups], list(map(str, graph.equations))

    def build(several: bool) -> nn.Module:
        if not several:
            return Heads(imitate=imitate).eval()
        parts = Heads(imitate=imitate), nn.Linear(3, 4), Heads(imitate=imitate)
        return nn.Sequential(*parts).eval()

    for several in (False, True):
        cold = groups(build(several))
        assert len(cold[0]) >= (7 if several else 3)
        assert groups(build(several)) == cold  # after the same model
        build(several)(x)
        assert groups(build(several)) == cold  # in a process that uses the model
        Heads(24, 4, imitate=imitate)(x)
        prunus.shrink(build(several), x, ratio=0.4)
        assert groups(build(several)) == cold  # after another
        _split.cache_clear()
        _recipe.cache_clear()


class Keyed(nn.Module):
    """Looks a width up in a dict; a traced integer that hashes apart misses it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 12), nn.Linear(12, 3)
        self.how, self.scales = how, {12: 3.0, 8: 2.0}

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        if self.how == "item":
            h = h * self.scales[h.shape[-1]]
        elif self.how == "get":
            h = h * self.scales.get(h.shape[-1], 1.0)
        elif h.shape[-1] in frozenset((12, 16)):
            h = h.flip(-1)
        return self.last(h)


@pytest.mark.parametrize("how", ["item", "get", "set"])
def test_a_dict_keyed_by_a_width_is_read_as_the_model_reads_it(how: str) -> None:
    model, x = Keyed(how).eval(), torch.randn(2, 4)
    graph = prunus.trace(model, x)
    with torch.no_grad():
        want = model(x)
    assert not graph.groups  # the code computes with the width
    replayed = prunus.verifier.replay.Replay(graph, dict(model.named_parameters()), [x])
    assert torch.allclose(replayed.run(graph.all_kept)["output"], want, atol=1e-6)
    assert survivors() == []


class Collector:
    """A hook that is an object."""

    def __init__(self) -> None:
        self.kept: deque[Tensor] = deque(maxlen=3)
        self.calls = 0

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.kept.append(output)
        self.calls += 1


def _to_globals(module: nn.Module, args: Any, output: Tensor) -> None:
    global LAST
    FEATURES.append(output)
    BY_NAME["a"].append(output)
    LAST = output


def hooked() -> tuple[nn.Module, dict[str, Any], Collector]:
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    held: dict[str, Any] = {"all": [], "set": set(), "calls": 0}
    counted = 0

    def hook(module: nn.Module, args: Any, output: Tensor, store: Any = held) -> None:
        nonlocal counted
        counted += 1
        held["last"] = output
        held["calls"] = counted
        store["all"].append(output)
        store["set"].add(output)

    collector = Collector()
    model[1].register_forward_hook(hook)
    model[1].register_forward_hook(_to_globals)
    model[1].register_forward_hook(collector)
    model[2].register_forward_pre_hook(lambda m, args: held["all"].append(args[0]))
    return model, held, collector


@pytest.mark.parametrize("verb", ["trace", "shrink", "fails"])
def test_what_hooks_collect_is_what_the_user_ran(verb: str) -> None:
    model, held, collector = hooked()
    x = torch.randn(4, 6)
    model(x)
    before = repr((held, collector.calls, list(collector.kept), FEATURES, dict(BY_NAME), LAST))
    if verb == "trace":
        prunus.trace(model, x)
        prunus.trace(model, x, real=True)
    elif verb == "shrink":
        prunus.shrink(model, x, ratio=0.5)
    else:
        with pytest.raises(RuntimeError):
            prunus.trace(model, torch.randn(4, 7))
    after = repr((held, collector.calls, list(collector.kept), FEATURES, dict(BY_NAME), LAST))
    assert before == after
    assert survivors() == []
    model(x)
    assert held["calls"] == 2


def patched(kind: str) -> nn.Module:
    """A model whose own forward is a function that refers to it, in one way or another."""
    model: Any = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    model.scale = nn.Parameter(torch.full((16,), 2.0))

    def method(self: Any, x: Tensor) -> Tensor:
        return self[2](self[1](self[0](x)) * self.scale)

    def closure(x: Tensor) -> Tensor:
        return method(model, x)

    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output * model.scale

    if kind == "method":
        model.forward = types.MethodType(method, model)
    elif kind == "closure":
        model.forward = closure
    elif kind == "partial":
        model.forward = functools.partial(method, model)
    elif kind == "wrapper":
        inner = model.forward
        model.forward = lambda x: inner(x) + model[2](model[0](x).relu() * model.scale)
    elif kind == "hook":
        model[1].register_forward_hook(hook)
    else:
        model[1].register_forward_hook(_by_global)
        MODELS["it"] = model
    return model


MODELS: dict[str, Any] = {}


def _scale() -> Tensor:
    return MODELS["it"].scale


def _by_global(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    return output * _scale()


KINDS = ["method", "closure", "partial", "wrapper", "hook", "global"]


@pytest.mark.parametrize("kind", KINDS)
def test_closures_over_the_model_verify_like_anything_else(kind: str) -> None:
    torch.manual_seed(0)
    model, x = patched(kind), torch.randn(4, 6)
    for copied in (duplicate(model), stand_in(model).model):
        assert torch.equal(copied(x), model(x))
    copied = duplicate(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(2)
        assert not torch.allclose(copied(x), model(x))
    graph = prunus.trace(model, x)
    assert [(g.name, g.size) for g in graph.groups] in (
        [("0.weight[0]", 16)], [("scale[0]", 16)])  # fmt: skip
    shrunk = prunus.shrink(model, x, ratio=0.5, recover="none")
    assert shrunk.certificate is not None
    assert shrunk.certificate.verdict == "exact"
    assert model.scale.shape[0] == model[0].out_features == 8
    assert model(x).shape == (4, 3)
    assert survivors() == []


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor, more: dict[str, Tensor]) -> Tensor:
        more["y"].mul_(0.5)
        return self.b(self.a(x.sub_(0.5) + more["y"]).relu())


class Cache:
    """An object among the inputs that grows with every run, as a cache of keys and values."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.total = torch.zeros(12)


class Caching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        h = self.first(x).relu()
        cache.seen.append(h)
        cache.total += h.detach().sum(0).mean()
        return self.last(h * len(cache.seen))


def test_objects_among_the_inputs_are_as_they_were() -> None:
    torch.manual_seed(0)
    model, x, cache = Caching().eval(), torch.randn(2, 4), Cache()
    graph = prunus.trace(model, (x, cache), outputs="output")  # what the cache holds may shrink
    plan = prunus.plan(graph, model, ratio=0.4)
    assert prunus.verify(plan, model, (x, cache)).verdict == "exact"
    shrunk = prunus.shrink(model, (x, cache), ratio=0.4, recover="none", outputs="output")
    assert shrunk.certificate is not None
    assert shrunk.certificate.verdict == "exact"
    assert cache.seen == []
    assert not cache.total.any()


def test_example_inputs_are_as_they_were() -> None:
    model = InPlace().eval()
    x, more = torch.randn(3, 4), {"y": torch.randn(3, 4)}
    before = copy.deepcopy((x, more))
    for real in (False, True):
        prunus.trace(model, (x, more), real=real)
    shrunk = prunus.shrink(model, (x, more), ratio=0.4, recover="none")
    assert shrunk.certificate is not None
    assert shrunk.certificate.verdict == "exact"
    assert torch.equal(x, before[0])
    assert torch.equal(more["y"], before[1]["y"])


def test_memory_format_and_counters_are_as_they_were() -> None:
    layout = torch.channels_last_3d
    model = nn.Sequential(nn.Conv3d(2, 8, 3), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 4, 1))
    model = model.to(memory_format=layout).train()
    x = torch.randn(1, 2, 4, 4, 4)
    before = {n: (t.stride(), t.data_ptr()) for n, t in model.state_dict().items()}
    prunus.trace(model, x)
    prunus.verify(prunus.plan(prunus.trace(model, x), model, ratio=0.4), model, x)
    assert {n: (t.stride(), t.data_ptr()) for n, t in model.state_dict().items()} == before
    assert int(model[1].num_batches_tracked) == 0
    assert model.training


def test_what_can_not_be_released_makes_the_trace_run_on_real_tensors() -> None:
    """A generator that is suspended holds what nobody can take out of it."""

    def keep() -> Any:
        held = []
        while True:
            held.append((yield))

    kept = keep()
    next(kept)

    class Sends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).relu()
            kept.send(h)
            return self.b(h)

    graph = prunus.trace(Sends(), torch.randn(2, 4))
    assert [g.size for g in graph.groups] == [12]
    assert survivors() == []


class AtModes:
    """Raises an error at the n-th line of the tracer around the forward that it watches."""

    def __init__(self, line: int) -> None:
        self._left = line

    def call(self, frame: FrameType, event: str, _: Any) -> Any:
        file = frame.f_code.co_filename
        near = frame.f_code.co_name in {"__enter__", "__exit__", "_forward"}
        return self.each if near and "prunus/tracer" in file else None

    def each(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            self._left -= 1
            if not self._left:
                raise KeyboardInterrupt
        return self.each


def test_an_interrupted_trace_leaves_no_mode_of_torch() -> None:
    net, before = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), sys.gettrace()
    for line in range(1, 60):
        sys.settrace(AtModes(line).call)
        try:
            prunus.trace(net, torch.ones(1, 3))
        except KeyboardInterrupt:
            assert torch.overrides._get_current_function_mode_stack() == []
            assert torch.utils._python_dispatch._get_current_dispatch_mode_stack() == []
            continue
        finally:
            sys.settrace(before)
            listeners.clear()  # where the line that takes one away was the one interrupted
        assert line > 1
        return
    raise AssertionError("a trace enters modes at more lines than expected")
