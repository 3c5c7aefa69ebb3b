"""How often one ``shrink`` traces, and how many copies of the model are alive at once."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import nn

import prunus
from prunus.tracer import copies
from prunus.tracer.capture import Recorder

TRACES, COPIES = 2, 2
"""Caps for an encoder and data: one trace of the example inputs, one of the inputs of another shape
on which the plan is compared; the model as it is or randomized, and its pruned copy."""


@dataclass(frozen=True)
class Counted:
    """Traces, and the most deep copies of the model that were alive at the same time."""

    traces: int
    copies: int


def count_in_shrink() -> Counted:
    """Of one ``shrink`` on an encoder of two layers, with data and the default recovery."""
    traces, most = 0, 0
    alive: list[weakref.ref[nn.Module]] = []
    record, duplicate = Recorder.__init__, copies._Copier.made

    def counted_record(self, *args, **kwargs) -> None:
        nonlocal traces
        traces += 1
        record(self, *args, **kwargs)

    def counted_duplicate(self) -> copies.Copy:
        nonlocal most
        made = duplicate(self)
        if self._make is not copies._alias:  # a stand-in has no memory of its own
            alive[:] = [there for there in alive if there() is not None]
            alive.append(weakref.ref(made.model))
            most = max(most, len(alive))
        return made

    Recorder.__init__ = counted_record
    copies._Copier.made = counted_duplicate
    try:
        data = [torch.randn(4, 6, 12) for _ in range(4)]
        prunus.shrink(encoder(), data[0], budget=prunus.Budget(macs=0.5), data=data)
    finally:
        Recorder.__init__ = record
        copies._Copier.made = duplicate
    return Counted(traces, most)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(12, 16), layers, nn.Flatten(), nn.Linear(6 * 16, 4)).eval()


def test_shrink_traces_and_copies_no_more_than_it_did() -> None:
    counted = count_in_shrink()
    assert 1 <= counted.traces <= TRACES
    assert 1 <= counted.copies <= COPIES
