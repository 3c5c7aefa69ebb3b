"""Threads that prune do not get in each other's way, nor in that of threads that use a model."""

from __future__ import annotations

import gc
import logging
import threading
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunus
from prunus.tracer.precision import LOCK, full_precision


def mlp() -> tuple[nn.Module, Tensor]:
    layers = nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    return nn.Sequential(*layers), torch.randn(5, 6)


def encoder() -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(16, 4, 20, batch_first=True, dropout=0.0).eval()
    return layer, torch.randn(2, 5, 16)


def recurrent() -> tuple[nn.Module, Tensor]:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(4, 8, batch_first=True), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0][:, -1])

    return Last(), torch.randn(2, 3, 4)


def switches() -> tuple[Any, ...]:
    """All that PyTorch and Python keep for the whole process."""
    return (
        torch.backends.mha.get_fastpath_enabled(),
        torch._C._get_mkldnn_enabled(),
        torch._C._get_cudnn_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.mkldnn.matmul.fp32_precision,
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
        gc.isenabled(),
        list(warnings.filters),
        logging.root.manager.disable,
        logging.getLogger("torch._subclasses.fake_tensor").disabled,
        len(nn.modules.module._global_forward_hooks),
        len(nn.modules.module._global_forward_pre_hooks),
    )


def test_an_interrupt_leaves_the_lock_to_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    suspended: list[Any] = []

    def interrupted(*_: Any, **__: Any) -> Any:
        suspended.append(full_precision())  # and not ended, as by an interrupt behind its start
        suspended[-1].__enter__()
        raise KeyboardInterrupt

    monkeypatch.setattr(prunus.api, "plan_verified", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prunus.shrink(*mlp(), ratio=0.4, recover="none")
    monkeypatch.undo()
    found: list[bool] = []

    def ask() -> None:
        found.append(LOCK.acquire(timeout=5))
        LOCK.release()

    asking = threading.Thread(target=ask)
    asking.start()
    asking.join()
    with pytest.raises(RuntimeError, match="un-acquired"):
        suspended.pop().__exit__(None, None, None)
    assert found == [True]


def test_many_shrinks_at_once() -> None:
    told: Counter[str] = Counter()
    models = [make() for make in (mlp, encoder, recurrent, mlp) for _ in range(2)]
    prunus.shrink(
        *mlp(), ratio=0.4, recover="none"
    )  # imports libraries, which add warnings' filters
    before = switches()

    def job(model: nn.Module, x: Tensor) -> None:
        try:
            done = prunus.shrink(model, x, ratio=0.4, recover="none")
            told[done.certificate.verdict if done.certificate else ""] += 1
            told["right shape"] += model(x).shape[0] == x.shape[0]
        except BaseException as error:
            told[f"{type(error).__name__}: {error}"] += 1

    threads = [threading.Thread(target=job, args=each) for each in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told == {"exact": len(models), "right shape": len(models)}
    assert switches() == before


def test_a_model_answers_while_it_is_traced() -> None:
    model, x = encoder()
    tables: dict[int, Tensor] = {}

    class Served(nn.Module):
        """Has all that a trace could get hold of: counters, a table, attributes, a hook."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.width, self.calls = model, 16, 0
            self.kept: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if x.shape[1] not in tables:
                tables[x.shape[1]] = torch.arange(5.0)[None, :, None]
            self.kept = self.inner(x + tables[x.shape[1]]).reshape(-1, 5, self.width)
            return self.kept

    served, seen, stop = Served().eval(), Counter[str](), threading.Event()
    with torch.no_grad():
        want = served(x)
    plan = prunus.plan(prunus.trace(served, x), served, ratio=0.4)

    def serve() -> None:
        while not stop.is_set():
            try:
                with torch.no_grad():
                    answer = served(x)
                right = type(answer) is Tensor and torch.allclose(answer, want, atol=1e-5)
                seen["right" if right else "wrong"] += 1
            except Exception as error:
                seen[f"{type(error).__name__}: {error}"] += 1

    thread = threading.Thread(target=serve)
    thread.start()
    for _ in range(4):
        prunus.trace(served, x)
        prunus.trace(served, x, forward_fn=lambda m, x: m(x) * 2)
        prunus.trace(served, x, real=True)
    prunus.verify(plan, served, x)
    stop.set()
    thread.join()
    assert set(seen) == {"right"}
    assert type(served.kept) is Tensor
