"""Proofs compare float32 with float32, whatever a GPU makes of it by default."""

from __future__ import annotations

from queue import SimpleQueue
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunus
from prunus.tracer.precision import full_precision
from tests import witness

BACKENDS: Any = torch.backends


def stated() -> list[str]:
    settings = (
        BACKENDS.cuda.matmul, BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn,
        BACKENDS.mkldnn.matmul, BACKENDS.mkldnn.conv, BACKENDS.mkldnn.rnn,
    )  # fmt: skip
    return [setting.fp32_precision for setting in settings]


def test_what_was_set_comes_back() -> None:
    before = stated()
    assert "tf32" in before  # the default of convolutions
    with pytest.raises(ZeroDivisionError), full_precision():
        assert 1 / ("tf32" in stated())
    assert stated() == before
    assert BACKENDS.cudnn.allow_tf32  # the older name for it can still be read


seen: SimpleQueue[str] = SimpleQueue()  # lists are put back after a run


def see(module: nn.Module, _: Any) -> None:
    for setting in stated():
        seen.put(setting)


def taken() -> set[str]:
    found = set()
    while not seen.empty():
        found.add(seen.get())
    return found


class Telling(nn.Module):
    """Keeps what it ran under."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 3, 1)
        self.first.register_forward_pre_hook(see)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.first(x).relu())
        return found


def test_proof_and_witness_run_in_full_precision() -> None:
    model, x = Telling().eval(), torch.randn(2, 2, 5, 5)
    plan = prunus.plan(prunus.trace(model, x), model, ratio=0.5)
    pruned = prunus.apply(plan, Telling().eval())
    taken()
    assert prunus.verify(plan, model, x).verdict == "exact"
    assert taken() == {"ieee"}
    witness.testify(plan, model, pruned, x)
    assert taken() == {"ieee"}
