"""Whatever is raised, wherever: the model, its optimizer and the process are as they were."""

from __future__ import annotations

import copy
import dataclasses
import gc
import itertools
import random
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

import prunus
from prunus.graph.plan_records import Edit
from prunus.surgeon.reach import own_copies
from prunus.surgeon.snapshot import all_or_nothing
from prunus.surgeon.switches import Switches, signals_deferred
from prunus.surgeon.tensors import slice_tensor
from prunus.tracer import registry
from tests.interrupts import (
    Interrupted,
    fingerprint,
    lines_of,
    seconds_of,
    signal_after,
    switches,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm", "ignore:.*kept input channels")


@dataclasses.dataclass
class Config:
    heads: int = 4
    depth: int = 3
    widths: list[int] = dataclasses.field(default_factory=lambda: [16, 24])


class Attention(nn.Module):
    """Heads by the config, a norm with running statistics, PyTorch's own attention, a counter."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        width = config.widths[0]
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm = nn.BatchNorm1d(width)
        self.own = nn.MultiheadAttention(width, 4, batch_first=True)
        self.up = nn.utils.weight_norm(nn.Linear(width, config.widths[1]))
        self.down = nn.Linear(config.widths[1], width)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.tables: dict[str, Tensor] = {}
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        batch, length, _ = x.shape
        q, k, v = (
            one(x).view(batch, length, self.config.heads, -1).transpose(1, 2)
            for one in (self.q, self.k, self.v)
        )
        x = x + self.o(
            F.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2).flatten(2)
        )
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.own(x, x, x, need_weights=False)[0]
        out: Tensor = x + self.down(self.up(x).relu())
        return out


class Block(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.up, self.down = nn.Linear(6, 10, bias=False), nn.Linear(10, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(self.up(x).tanh())
        return out


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = Config(widths=[0, 0, 0])
        self.depth = 3
        self.layers = nn.ModuleList(Block(place) for place in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3, bias=False))


class Case(NamedTuple):
    model: nn.Module
    x: Tensor
    optimizer: torch.optim.Optimizer
    plan: prunus.Plan


def case(build: Callable[[], nn.Module], *shape: int, **options: Any) -> Case:
    """A model that has learned a step, so that there are gradients and momenta."""
    torch.manual_seed(0)
    model, x = build(), torch.randn(shape)
    optimizer = torch.optim.Adam(model.parameters())
    model(x).sum().backward()
    optimizer.step()
    model.register_forward_hook(lambda *_: None)
    model.eval()
    plan = prunus.plan(prunus.trace(model, x), model, **options)
    return Case(model, x, optimizer, plan)


MODELS: dict[str, Callable[[], Case]] = {
    "attention": lambda: case(lambda: Attention(Config()), 3, 5, 16, ratio=0.4),
    "blocks": lambda: case(Blocks, 4, 6, drop=["layers.1"], ratio=0.4),
    "perceptron": lambda: case(perceptron, 16, 4, ratio=0.4),
}

VERBS: dict[str, Callable[[Case], Any]] = {
    "apply": lambda c: prunus.apply(c.plan, c.model, optimizer=c.optimizer),
    "compensate": lambda c: prunus.recovery.compensate(
        c.model, c.plan, data=[c.x] * 2, optimizer=c.optimizer
    ),
    "sequential": lambda c: prunus.recovery.compensate(
        c.model, c.plan, data=[c.x] * 2, method="sequential"
    ),
    "shrink": lambda c: prunus.shrink(c.model, c.x, ratio=0.4, data=[c.x], optimizer=c.optimizer),
    "shrink without data": lambda c: prunus.shrink(c.model, c.x, ratio=0.4, each_group=False),
    "recalibrate": lambda c: prunus.recovery.recalibrate(c.model, [c.x]),
    "drop": lambda c: prunus.drop_layers(c.model, [1], c.x),
}

POINTS = [
    ("attention", "apply", 12),
    ("blocks", "apply", 8),
    ("perceptron", "compensate", 8),
    ("perceptron", "sequential", 6),
    ("perceptron", "shrink", 10),
    ("perceptron", "shrink without data", 5),
    ("perceptron", "recalibrate", 4),
    ("blocks", "drop", 5),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "verb", "points"), POINTS)
def test_an_error_at_any_line(name: str, verb: str, points: int) -> None:
    run = VERBS[verb]
    counted = [MODELS[name](), MODELS[name]()]  # the first one fills caches of Python's functions
    lines = [lines_of(lambda one=one: run(one)) for one in counted][-1]
    tried = MODELS[name]()
    before = fingerprint(tried.model, tried.optimizer)
    failed = 0
    chosen = random.Random(verb).sample(range(1, lines), points - 2)
    for line in (*chosen, lines - 1, lines):  # the last are behind the cut
        error = MemoryError if line == chosen[0] else KeyboardInterrupt
        try:
            with Interrupted(line, error):
                run(tried)
        except (KeyboardInterrupt, MemoryError, prunus.PrunusError):
            failed += 1
            assert fingerprint(tried.model, tried.optimizer) == before, (line, error)
        else:  # a run on fake tensors may fail, and the real one goes on
            tried = MODELS[name]()
            before = fingerprint(tried.model, tried.optimizer)
    assert failed >= points - 2
    run(tried)
    assert fingerprint(tried.model, tried.optimizer) != before


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "verb"), [("attention", "apply"), ("perceptron", "shrink")])
def test_a_signal_at_any_moment(name: str, verb: str) -> None:
    """Ctrl-C falls into PyTorch's and Python's own code as well, and between two bytecodes."""
    run = VERBS[verb]
    tried = MODELS[name]()
    before = fingerprint(tried.model, tried.optimizer)
    seconds = min(seconds_of(lambda: run(MODELS[name]())) for _ in range(2))
    interrupted = 0
    for share in range(10):
        done = False
        try:
            with signal_after(seconds * (share + 0.5) / 12):
                run(tried)
                done = True
        except KeyboardInterrupt:
            pass
        if done:
            tried = MODELS[name]()
            before = fingerprint(tried.model, tried.optimizer)
        else:
            interrupted += 1
            assert fingerprint(tried.model, tried.optimizer) == before
    assert interrupted > 2


def test_an_interrupt_while_another_error_is_undone() -> None:
    tried = MODELS["attention"]()
    wrong = {**tried.plan.origin["traced"], "outputs": {"output": [1]}}
    tried = tried._replace(plan=dataclasses.replace(tried.plan, origin={"traced": wrong}))
    before = fingerprint(tried.model, tried.optimizer)

    def run() -> None:
        with pytest.raises(prunus.PrunusError, match="it should be"):
            VERBS["apply"](tried)

    lines = lines_of(run)
    chosen = random.Random(0).sample(range(lines - 600, lines), 12)
    for line in chosen:
        with pytest.raises(BaseException), Interrupted(line):  # noqa: B017, PT011
            VERBS["apply"](tried)
        assert fingerprint(tried.model, tried.optimizer) == before


def test_signals_wait_while_a_model_is_put_back() -> None:
    """Handlers of every signal, not only of Ctrl-C; what came then comes afterwards."""
    came: list[str] = []

    def late(number: int, _: Any) -> None:
        came.append("handled")
        raise TimeoutError(number)

    def interrupt_a_restoration() -> None:
        with signals_deferred():
            signal.raise_signal(signal.SIGUSR1)
            came.append("within")

    before = signal.signal(signal.SIGUSR1, late)
    try:
        with pytest.raises(TimeoutError):
            interrupt_a_restoration()
        assert signal.getsignal(signal.SIGUSR1) is late
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert came == ["within", "handled"]


# --- what the check of apply leaves -----------------------------------------------------------


class Memory(nn.Module):
    """Reads values, so that it runs on real tensors; writes buffers, an attribute, its input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 12), nn.Linear(12, 3)
        self.words = nn.Embedding(5, 4, max_norm=0.1)
        self.register_buffer("bank", torch.zeros(8, 4))
        self.register_buffer("n", torch.zeros((), dtype=torch.long))
        self.log: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.bank[int(self.n) % 8] = x[0]
        self.n += 1
        self.log.append(int(self.n))
        x = x.sub_(0.5) + self.words(torch.tensor([1, 2, 3]))
        out: Tensor = self.b(self.a(x + self.bank.mean(0)).relu())
        return out


@pytest.mark.parametrize("verb", ["apply", "shrink without data", "compensate"])
def test_a_forward_that_writes_leaves_nothing(verb: str) -> None:
    torch.manual_seed(0)
    model, x = Memory().eval(), torch.randn(3, 4)
    given = x.clone()
    plan = prunus.plan(prunus.trace(model, x), model, ratio=0.4)
    tried = Case(model, x, torch.optim.SGD(model.parameters()), plan)
    words = model.words.weight.detach().clone()
    VERBS[verb](tried)
    assert model.a.out_features < 12
    assert int(model.n) == 0
    assert not model.bank.any()
    assert model.log == []
    assert torch.equal(model.words.weight, words)
    assert torch.equal(x, given)


# --- memory formats -------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_strides_keep_their_order(order: tuple[int, ...]) -> None:
    back = sorted(range(3), key=order.__getitem__)
    tensor = torch.randn([(5, 4, 3)[dim] for dim in order]).permute(back)
    sliced = slice_tensor(tensor, {0: torch.tensor([0, 2]), 2: torch.tensor([1, 2])})
    assert torch.equal(sliced, tensor[[0, 2]][..., [1, 2]])
    assert sorted(range(3), key=lambda dim: -sliced.stride(dim)) == list(order)
    assert sliced.permute(order).is_contiguous()


@pytest.mark.parametrize(
    ("layer", "form", "shape"),
    [
        (lambda: nn.Conv2d(2, 8, 3), torch.channels_last, (1, 2, 5, 5)),
        (lambda: nn.Conv2d(2, 8, 1), torch.channels_last, (1, 2, 5, 5)),
        (lambda: nn.Conv3d(2, 8, 3), torch.channels_last_3d, (1, 2, 5, 5, 5)),
        (lambda: nn.Conv3d(2, 8, 1), torch.channels_last_3d, (1, 2, 5, 5, 5)),
    ],
)
def test_channels_last_stays(layer: Callable[[], nn.Module], form: Any, shape: Any) -> None:
    torch.manual_seed(0)
    first = layer().to(memory_format=form)
    last: Any = type(first)(8, 4, 1)
    model, x = nn.Sequential(first, last), torch.randn(shape)
    was = last.weight.stride()
    prunus.apply(prunus.plan(prunus.trace(model, x), model, ratio=0.4), model)
    strides = first.weight.stride()
    assert strides[1] == 1
    assert strides[0] == first.weight[0].numel()
    assert first.weight.is_contiguous(memory_format=form)
    assert last.weight.is_contiguous()
    assert len(was) == last.weight.dim()


# --- configs that two models share ------------------------------------------------------------


class Nested:
    """A config in a config, a dict and a list."""

    def __init__(self) -> None:
        self.text = Config()
        self.all = {"text": self.text, "list": [self.text]}
        self.itself = self


class Tower(nn.Module):
    def __init__(self, config: Any, read: Callable[[Any], int]) -> None:
        super().__init__()
        self.config, self.read = config, read
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.inner = nn.Module()
        self.inner.config = config

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            one(x).view(*x.shape[:2], self.read(self.config), -1).transpose(1, 2)
            for one in (self.q, self.k, self.v)
        )
        out: Tensor = x + self.o(
            F.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2).flatten(2)
        )
        return out


SHARED: dict[str, tuple[Callable[[], Any], Callable[[Any], int]]] = {
    "object": (Config, lambda c: c.heads),
    "dict": (lambda: {"heads": 4}, lambda c: c["heads"]),
    "list": (lambda: [1, 4], lambda c: c[1]),
    "tuple of dicts": (lambda: ({"heads": 4},), lambda c: c[0]["heads"]),
    "namespace": (lambda: types.SimpleNamespace(heads=4), lambda c: c.heads),
}


@pytest.mark.parametrize("name", SHARED)
def test_a_config_that_two_models_share(name: str) -> None:
    make, read = SHARED[name]
    torch.manual_seed(0)
    config = make()
    teacher, student = Tower(config, read).eval(), Tower(config, read).eval()
    x = torch.randn(2, 5, 16)
    before = teacher(x)
    done = prunus.shrink(student, x, ratio=0.4, recover="none")
    assert done.certificate.verdict == "exact"
    assert torch.equal(teacher(x), before)
    assert teacher.config is teacher.inner.config is config
    assert read(config) == 4
    assert read(student.config) < 4
    assert student.config is student.inner.config
    assert student.config is not config


def test_parts_of_a_copied_config_are_the_same_object_wherever_they_are() -> None:
    shared = Nested()
    model = Tower(shared, lambda c: c.text.heads).eval()
    model.inner.text, model.inner.pair = shared.text, (shared.all, 1)
    own_copies(model, [Edit("", "config.text.heads", 4, 2)])
    config = model.config
    assert config is not shared
    assert config.text is not shared.text
    assert config.text is config.all["text"] is config.all["list"][0] is model.inner.text
    assert config.itself is config
    assert model.inner.pair[0] is config.all
    assert shared.all["text"] is shared.text
    assert shared.itself is shared


def test_a_shared_config_is_back_after_a_failure() -> None:
    torch.manual_seed(0)
    config = Config()
    model, x = Tower(config, lambda c: c.heads).eval(), torch.randn(2, 5, 16)
    plan = prunus.plan(prunus.trace(model, x), model, ratio=0.4)
    plan.origin["traced"]["outputs"]["output"] = [1]
    with pytest.raises(prunus.PrunusError, match="it should be"):
        prunus.apply(plan, model)
    assert model.config is model.inner.config is config
    assert config == Config()


def test_dropped_blocks_leave_a_shared_config(tmp_path: Path) -> None:
    x, first = torch.randn(4, 6), Blocks().eval()
    second = Blocks().eval()
    second.config = first.config
    prunus.drop_layers(second, [1], x)
    assert first.config == Config(widths=[0, 0, 0])
    assert second.config is not first.config


def test_loading_leaves_a_shared_config(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Config()
    whole = Tower(config, lambda c: c.heads).eval()
    small, x = copy.deepcopy(whole), torch.randn(2, 5, 16)
    prunus.shrink(small, x, ratio=0.4, recover="none")
    prunus.save(small, tmp_path / "small.safetensors")
    before = whole(x)
    loaded = prunus.load(
        tmp_path / "small.safetensors", build=lambda: Tower(config, lambda c: c.heads).eval()
    )
    assert config.heads == 4
    assert torch.equal(whole(x), before)
    assert torch.equal(loaded(x), small(x))


class Single(Config):
    copies = True

    def __reduce_ex__(self, protocol: Any) -> Any:
        if not type(self).copies:
            raise TypeError("there is one")
        return super().__reduce_ex__(protocol)


def test_what_can_not_be_copied_is_not_written(monkeypatch) -> None:
    config = Single()
    model = Tower(config, lambda c: c.heads).eval()
    plan = prunus.plan(prunus.trace(model, torch.randn(2, 5, 16)), model, ratio=0.4)
    before = fingerprint(model)
    monkeypatch.setattr(Single, "copies", False)
    with pytest.raises(prunus.PrunusError, match="heads is in an object that can't be copied"):
        prunus.apply(plan, model)
    assert fingerprint(model) == before
    assert config.heads == 4


def test_modes_that_an_interrupt_left_on_are_taken_off() -> None:
    class Mode(TorchDispatchMode):
        pass

    class Function(TorchFunctionMode):
        pass

    with FakeTensorMode(), Mode() as users:
        before, found = switches(), Switches()
        FakeTensorMode().__enter__()
        Mode().__enter__()
        Function().__enter__()
        gc.disable()
        found.restore()
        found.restore()
        assert switches() == before
        assert _get_current_dispatch_mode() is users
    assert gc.isenabled()


_INTERRUPTED = """
import sys, signal
import prunus.tracer.registry as registry

def stop(frame, event, argument):
    if "rules" in frame.f_code.co_filename and frame.f_lineno > 40:
        sys.settrace(None)
        raise KeyboardInterrupt
    return stop

sys.settrace(stop)
try:
    registry.registered()
except KeyboardInterrupt:
    print("interrupted")
print(len(registry.registered()))
"""


def test_an_interrupt_while_rules_are_imported_loses_none() -> None:
    found = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED], capture_output=True, text=True, check=True
    )
    ours = [r for r in registry.registered().values() if r.__module__.startswith("prunus.")]
    assert found.stdout.split() == ["interrupted", str(len(ours))]


def test_an_interrupt_that_pytorch_failed_over_comes_out_as_one() -> None:
    source = "try:\n    raise KeyboardInterrupt\nexcept KeyboardInterrupt:\n    raise RuntimeError"

    @all_or_nothing
    def verb(model: nn.Module, file: str) -> None:
        exec(compile(source, file, "exec"))

    with pytest.raises(KeyboardInterrupt):
        verb(nn.Linear(2, 2), torch.__file__)
    with pytest.raises(RuntimeError):  # which is the user's own
        verb(nn.Linear(2, 2), "model.py")
