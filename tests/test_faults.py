"""No planted fault may end in *exact*, and without it the same model must."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.faults import FAULTS, Fault, Injector
from tests.pipeline import Judgement, judge

LEAST = 40


def _input(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@functools.cache
def _honest(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> Judgement:
    return judge(build, _input(shape))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_is_caught(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = _honest(fault.build, fault.shape)
    assert honest.caught_by == "", honest
    if honest.testimony is not None:
        assert honest.testimony.verdict in ("agrees", "undecided")

    injector = Injector(monkeypatch)
    fault.plant(injector)
    judged = judge(fault.build, _input(fault.shape))
    assert injector.calls, "the fault was never exercised"
    assert judged.caught_by == fault.caught_by, judged


def test_the_faults_are_many_and_every_instrument_is_needed() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= LEAST
    instruments = Counter(fault.caught_by for fault in FAULTS)
    assert set(instruments) == {"verify", "unverified", "witness", "exchange"}


def test_an_injector_puts_everything_back() -> None:
    fault = FAULTS[0]
    with pytest.MonkeyPatch.context() as patch:
        fault.plant(Injector(patch))
        assert judge(fault.build, _input(fault.shape)).caught_by
    assert not judge(fault.build, _input(fault.shape)).caught_by
