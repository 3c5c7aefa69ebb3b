"""Models and data out of the ordinary: handled, or refused with what to do."""

from __future__ import annotations

import itertools
import logging
import queue
import re
import socket
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunus
from prunus.calibration.batches import Batches
from prunus.errors import ModelError, TraceError
from prunus.tracer.wrappers import warn_untested

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two hidden layers, of which a subclass may let the second one out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(4, 16), nn.Linear(16, 12), nn.Linear(12, 3)

    def hidden(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu()).tanh()

    def forward(self, x: Tensor) -> Any:
        return self.c(self.hidden(x))


def sizes(model: nn.Module) -> dict[str, int]:
    return {group.name: group.size for group in prunus.trace(model, X).groups}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, X)])
def test_compiled_models_are_refused(make: Callable[[nn.Module], Any]) -> None:
    with pytest.raises(TraceError, match="the model is a ScriptModule") as refused:
        prunus.shrink(
            make(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))), X, ratio=0.5
        )
    assert "prune the Python model" in refused.value.fix


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "make", [torch.jit.script, lambda m: torch.jit.trace(m, torch.randn(3, 16))]
)
def test_compiled_parts_keep_their_widths(make: Callable[[nn.Module], Any]) -> None:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(16, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 16))
    ends = [nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, 16)], [nn.Linear(16, 10), nn.Linear(10, 3)]
    model = nn.Sequential(*ends[0], make(inner.eval()), *ends[1]).eval()
    graph = prunus.trace(model, X)
    assert {group.name: group.size for group in graph.groups} == {
        "0.weight[0]": 24,
        "4.weight[0]": 10,
    }
    why = {str(axis): pin.reason for axis, pin in graph.pins}
    assert "ScriptModule" in why["2.weight[0]"]
    shrunk = prunus.shrink(model, X, ratio=0.5)
    assert shrunk.certificate.verdict == "exact"
    assert (model[0].out_features, model[2].out_features) == (12, 16)


@pytest.mark.parametrize("lazy", [nn.LazyLinear(16), nn.LazyBatchNorm1d()])
def test_lazy_modules_are_refused_until_they_have_run(lazy: nn.Module) -> None:
    model = Net().eval()
    model.a = nn.Sequential(nn.Linear(4, 16), lazy) if "Norm" in type(lazy).__name__ else lazy
    with pytest.raises(TraceError, match="lazy modules") as refused:
        prunus.trace(model, X)
    assert refused.value.where.startswith("a.")
    assert "run the model once" in refused.value.fix
    model.train()(X)
    assert prunus.shrink(model.eval(), X, ratio=0.5).certificate.verdict == "exact"


def test_nested_tensors_are_refused_with_their_line() -> None:
    class Nested(Net):
        def forward(self, x: Tensor) -> Any:
            h = self.hidden(x)
            return self.c(h), torch.nested.nested_tensor([h[0], h[1]])

    with pytest.raises(TraceError, match="makes a nested tensor") as refused:
        prunus.trace(Nested().eval(), X)
    assert "test_refusals.py:" in refused.value.where


@pytest.mark.parametrize("to", [Tensor.to_sparse, Tensor.to_sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_outputs_keep_their_shape(to: Callable[[Tensor], Tensor]) -> None:
    class Sparse(Net):
        def forward(self, x: Tensor) -> Any:
            h = self.hidden(x)
            return self.c(h), to(h.relu())

    model = Sparse().eval()
    assert sizes(model) == {"a.weight[0]": 16}
    shrunk = prunus.shrink(model, X, ratio=0.5)
    assert shrunk.certificate.verdict == "exact"
    assert model(X)[1].shape == (3, 12)


NAMES = ("weight", "bias", "running_mean", "running_var", "groups", "config", "device", "dtype")
NAMES += ("in_features", "max_norm", "embed_dim", "num_heads", "is_quantized", "original", "data")


def test_properties_that_raise_are_never_read() -> None:
    def refuse(self: Any) -> Any:
        raise RuntimeError("not ready yet")

    kind = type("Raising", (Net,), {name: property(refuse) for name in NAMES})
    part = type("Part", (nn.Sequential,), {name: property(refuse) for name in NAMES})
    model: Any = kind()
    model.b = part(nn.Linear(16, 12), nn.BatchNorm1d(12))
    model.eval()
    shrunk = prunus.shrink(model, X, ratio=0.5, data=[X])
    assert shrunk.certificate.verdict == "exact"
    assert model.a.out_features == 8


def test_getattr_of_anything_is_never_asked() -> None:
    class Magic(Net):
        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return lambda *args, **kwargs: None

    model = Magic().eval()
    assert prunus.shrink(model, X, ratio=0.5).certificate.verdict == "exact"


@pytest.mark.parametrize("kind", [ValueError, KeyError])
def test_the_users_own_error_comes_as_it_is(kind: type[Exception]) -> None:
    class Fails(Net):
        def forward(self, x: Tensor) -> Any:
            self.hidden(x)
            raise kind("only trained for images")

    for call in (prunus.trace, lambda m, x: prunus.shrink(m, x, ratio=0.5)):
        with pytest.raises(kind, match="only trained for images"):
            call(Fails().eval(), X)


class Endless:
    """A loader without a length that never ends, and can be read again."""

    def __iter__(self) -> Iterator[Tensor]:
        return (torch.randn(64, 4) for _ in itertools.count())


class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[Tensor]:
        return (torch.randn(4) for _ in itertools.count())


ENDLESS: dict[str, Callable[[], Any]] = {
    "generator": lambda: iter(Endless()),
    "object": Endless,
    "loader": lambda: torch.utils.data.DataLoader(Stream(), batch_size=64),
    "cycle": lambda: itertools.cycle([torch.randn(64, 4)]),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_endless_data_is_taken_in_part_and_that_is_said(name: str) -> None:
    model = Net().eval()
    shrunk = prunus.shrink(model, X, ratio=0.5, importance="obs", data=ENDLESS[name]())
    assert shrunk.samples == 512
    assert shrunk.certificate.verdict == "exact"
    assert len(shrunk.recovery) > 1


@pytest.mark.parametrize(
    "use",
    [
        lambda m, g, data: prunus.plan(g, m, ratio=0.5, importance="obs", data=data),
        lambda m, g, data: prunus.importance.collect(m, g, data, "activation"),
        lambda m, g, data: prunus.recovery.compensate(m, prunus.plan(g, m, ratio=0.5), g, data),
        lambda m, g, data: prunus.recovery.compensate(
            m, prunus.plan(g, m, ratio=0.5), g, data, method="sequential"
        ),
        lambda m, g, data: prunus.recovery.recalibrate(m, data),
    ],
)
def test_every_reader_of_data_stops(use: Callable[..., Any]) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).eval()
    use(model, prunus.trace(model, X), iter(Endless()))


@pytest.mark.parametrize("kind", [list, iter])
def test_the_first_samples_of_data_are_taken_in_whole_batches(kind: Any) -> None:
    def taken(sizes: list[int], *samples: int) -> list[int]:
        batches = Batches(kind([torch.ones(n, 2) for n in sizes]), *samples)
        assert sum(len(batch) for batch in batches) == batches.samples
        return [len(batch) for batch in batches]  # for the third time

    assert taken([100] * 5) == [100] * 5
    assert taken([600] * 3) == [600]
    assert taken([100] * 9) == [100] * 6
    assert taken([100] * 9, 100) == [100]
    assert taken([100] * 9, 700) == [100] * 7
    assert taken([100] * 9, 10_000) == [100] * 9


class Guarded(Net):
    """Runs under a lock of its own, through a pool, and keeps what can't be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock, self.pool = threading.RLock(), ThreadPoolExecutor(1)
        self.me, self.log = weakref.ref(self), logging.getLogger("guarded")
        self.kept = {"lock": [threading.Lock()], "socket": socket.socket(), "counter": count()}
        self.random, self.stream = torch.Generator(), iter([1])
        self.file = tempfile.TemporaryFile()  # noqa: SIM115
        self.queue: Any = queue.Queue()

    def forward(self, x: Tensor) -> Any:
        with self.lock:
            self.pool.submit(int, 3).result(10)
            next(self.kept["counter"])
            return self.me().c(self.hidden(x))  # type: ignore[union-attr]

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("there is one of these only")


def test_locks_pools_streams_and_generators_as_attributes() -> None:
    model = Guarded().eval()
    held = {name: value for name, value in vars(model).items() if not name.startswith("_")}
    shrunk = prunus.shrink(model, X, ratio=0.5)
    assert shrunk.certificate.verdict == "exact"
    assert all(vars(model)[name] is value for name, value in held.items())
    model.pool.shutdown()
    model.file.close()
    model.kept["socket"].close()


def test_a_compiled_part_is_refused() -> None:
    model = Net().eval()
    model.b.compile()
    with pytest.raises(TraceError, match="a part of the model is compiled") as refused:
        prunus.trace(model, X)
    assert refused.value.where == "b"


def test_tensors_in_an_object_that_a_forward_takes() -> None:
    @dataclass
    class Batch:
        x: Tensor

    class Takes(Net):
        def forward(self, batch: Batch) -> Any:  # type: ignore[override]
            return super().forward(batch.x)

    shrunk = prunus.shrink(Takes().eval(), (Batch(X),), ratio=0.5)
    assert shrunk.certificate.verdict == "exact"


@pytest.mark.filterwarnings("ignore")
def test_a_coroutine_is_refused() -> None:
    class Later(Net):
        async def forward(self, x: Tensor) -> Any:
            return self.c(self.hidden(x))

    with pytest.raises(TraceError, match="can't be searched") as refused:
        prunus.trace(Later().eval(), X)
    assert "coroutine" in refused.value.why


@pytest.mark.parametrize("model", ["resnet50", lambda x: x, {"state": X}])
@pytest.mark.parametrize("verb", [prunus.trace, partial(prunus.shrink, ratio=0.5)])
def test_what_is_no_module_is_refused(verb: Callable[..., Any], model: Any) -> None:
    with pytest.raises(ModelError, match=f"the model is a {type(model).__name__}") as caught:
        verb(model, X)
    assert "forward_fn=" in caught.value.fix


@pytest.mark.parametrize(
    ("args", "said"),
    [({"x": X}, "kwargs="), (X.numpy(), "torch.from_numpy"), ("x", "args="), (None, "args=")],
    ids=["mapping", "array", "string", "None"],
)
def test_example_inputs_that_are_no_sequence_are_refused(args: Any, said: str) -> None:
    keep = partial(prunus.api.keep, group="a.weight[0]", units=[0])
    for verb in (prunus.trace, partial(prunus.shrink, ratio=0.5), keep):
        with pytest.raises(TraceError, match="the example inputs are a") as caught:
            verb(Net(), args=args)
        assert said in caught.value.fix


def test_inference_mode_around_a_call_changes_nothing() -> None:
    """Tensors made in there can't be trained, and operators are not taken apart."""
    plan = prunus.plan(prunus.trace(Net(), X), model=Net(), ratio=0.5)
    applied, shrunk, plain = Net(), Net(), Net()
    prunus.shrink(plain, X, ratio=0.5, recover="none")
    with torch.inference_mode():
        prunus.apply(plan, applied)
        assert prunus.verify(plan, shrunk, X).verdict == "exact"
        assert prunus.shrink(shrunk, X, ratio=0.5, recover="none").certificate.verdict == "exact"
        assert torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    torch.testing.assert_close(shrunk.eval()(X), plain.eval()(X))
    for model in (applied, shrunk):
        assert not any(tensor.is_inference() for tensor in model.state_dict().values())
        model.train()(X).sum().backward()


@pytest.mark.parametrize("kind", [BaseException, KeyboardInterrupt])
def test_grad_mode_is_as_before_where_a_call_fails(kind: type[BaseException]) -> None:
    class Raising(Net):
        def forward(self, x: Tensor) -> Tensor:
            raise kind

    model = Raising()
    with torch.inference_mode():
        with pytest.raises(kind):
            prunus.shrink(model, X, ratio=0.5)
        assert torch.is_inference_mode_enabled()
        assert not torch.is_grad_enabled()


def test_a_model_made_in_inference_mode_is_refused() -> None:
    plan = prunus.plan(prunus.trace(Net(), X), Net(), ratio=0.5)
    with torch.inference_mode():
        made = Net()
    verbs = (
        lambda m: prunus.apply(plan, m),
        lambda m: prunus.verify(plan, m, X),
        lambda m: prunus.trace(m, X),
    )
    for verb in verbs:
        with pytest.raises(ModelError, match=r"made in torch\.inference_mode") as caught:
            verb(made)
        assert caught.value.where.startswith("a.weight")


def test_a_masked_model_runs_in_inference_mode() -> None:
    model = nn.Sequential(Net(), nn.Flatten(), nn.Linear(3, 2)).eval()
    plan = prunus.plan(prunus.trace(model, X), model, ratio=0.5)
    with prunus.mask(plan, model):
        masked = model(X)
    with prunus.mask(plan, model), torch.inference_mode():
        torch.testing.assert_close(model(X), masked)
        torch.testing.assert_close(model(X * 1.0), masked)  # an input that was made in there
        assert torch.is_inference_mode_enabled()
    with torch.inference_mode(), prunus.mask(plan, model):
        torch.testing.assert_close(model(X), masked)
        with pytest.raises(RuntimeError):
            model(X[:, 1:])
        assert torch.is_inference_mode_enabled()
        torch.testing.assert_close(model(X), masked)
    prunus.apply(plan, model)
    torch.testing.assert_close(model(X), masked)


def test_a_newer_pytorch_is_warned_of() -> None:
    for version in ("2.9.1", "2.14.1+cpu", "2.14.0a0+git1234"):
        warn_untested(version)
    for version in ("2.99.0", "3.0.0.dev20270101+cu130"):
        with pytest.warns(UserWarning, match=rf"PyTorch {re.escape(version)} is newer than 2\."):
            warn_untested(version)
