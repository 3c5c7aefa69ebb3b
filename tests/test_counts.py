"""Sizes that become numbers: a model with silenced units counts as many as before.

Every model is ``first → step → last``; the reference masks the hidden units by hand and keeps all
sizes.  *Exact* has to be right against it, and what can't follow is pinned with a reason.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunus
from prunus.errors import BudgetError
from tests.pipeline import cut

WIDTH = 12


class Net(nn.Module):
    """``step`` gets the hidden state (B, 12), and returns (B, anything)."""

    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 3)
        self.step = [step]
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).sigmoid()
        if self.kept is not None:
            h = h * self.kept
        answer: Tensor = self.last(h) + self.step[0](h).reshape(len(x), -1).mean(1, keepdim=True)
        return answer


COUNTED: dict[str, Callable[[Tensor], Tensor]] = {
    "repeat": lambda h: h.repeat(h.shape[1], 1).sum(0).sum() * torch.ones(len(h), 1),
    "repeat, viewed": lambda h: h.repeat(h.shape[1], 1).view(h.shape[1], len(h), -1).sum(0),
    "repeat, of a part": lambda h: h.sum(1, keepdim=True).repeat(1, h.shape[1]).sum(1),
    "tile": lambda h: h.sum(1, keepdim=True).tile(1, h.shape[1]).sum(1),
    "expand": lambda h: h.unsqueeze(1).expand(-1, h.shape[1], -1).sum(1),
    "expand_as": lambda h: h.sum(1, keepdim=True).expand_as(h).sum(1),
    "broadcast_to": lambda h: torch.broadcast_to(h.sum(1, keepdim=True), h.shape).sum(1),
    "repeat_interleave": lambda h: h.sum(1, keepdim=True).repeat_interleave(h.shape[1], 1).sum(1),
    "cat of a list": lambda h: torch.cat([h] * h.shape[1], 0).sum() * torch.ones(len(h), 1),
    "stack of a loop": lambda h: torch.stack([h.sum(1) for _ in range(h.shape[1])]).sum(0),
    "pad": lambda h: F.pad(h.sum(1, keepdim=True), (0, h.shape[1]), value=1.0).sum(1),
    "zeros": lambda h: torch.zeros(len(h), h.shape[1]).exp().sum(1),
    "ones": lambda h: torch.ones(len(h), h.shape[1]).sum(1),
    "new_ones": lambda h: h.new_ones(len(h), h.shape[1]).sum(1),
    "new_full": lambda h: h.new_full((len(h), h.shape[1]), 0.5).sum(1),
    "ones_like": lambda h: torch.ones_like(h).sum(1),
    "ones_like, twice": lambda h: (torch.ones_like(h) + torch.zeros_like(h)).sum(1),
    "ones in a cat": lambda h: torch.cat([h.new_ones(len(h), h.shape[1]), h], 1).sum(1),
    "ones in a product": lambda h: h.new_ones(len(h), h.shape[1]) @ h.new_ones(h.shape[1], 2),
    "softmax of zeros": lambda h: torch.zeros(len(h), h.shape[1]).softmax(1).square().amax(1),
    "arange": lambda h: torch.arange(h.shape[1]).sum() * torch.ones(len(h), 1),
    "linspace": lambda h: torch.linspace(0, 1, h.shape[1]).sum() * torch.ones(len(h), 1),
    "eye": lambda h: torch.eye(h.shape[1]).sum() * torch.ones(len(h), 1),
    "one_hot": lambda h: (
        F.one_hot(torch.zeros(len(h), dtype=torch.long), h.shape[1]).float().exp().sum(1)
    ),
    "topk": lambda h: h.topk(h.shape[1] // 2, 1)[0].sum(1),
    "topk of the input": lambda h: torch.arange(50.0).topk(h.shape[1])[0].sum().repeat(len(h), 1),
    "unfold": lambda h: torch.arange(50.0).unfold(0, h.shape[1], 1).sum() * h.new_ones(len(h), 1),
    "randperm": lambda h: torch.randperm(h.shape[1]).sum() * torch.ones(len(h), 1),
    "tril_indices": lambda h: torch.tril_indices(h.shape[1], 2).sum() * torch.ones(len(h), 1),
    "percent s": lambda h: torch.ones(len(h), 1) * float("%s" % h.shape[1]),  # noqa: UP031
    "f-string": lambda h: torch.ones(len(h), 1) * float(f"{h.shape[1]}"),
    "format": lambda h: torch.ones(len(h), 1) * float(f"{h.shape[1]:d}"),
    "str": lambda h: torch.ones(len(h), 1) * float(str(h.shape[1])),
    "repr": lambda h: torch.ones(len(h), 1) * float(repr(h.shape[1])),
    "sqrt": lambda h: torch.ones(len(h), 1) * math.sqrt(h.shape[1]),
    "bit_length": lambda h: torch.ones(len(h), 1) * h.shape[1].bit_length(),
    "bit_count": lambda h: torch.ones(len(h), 1) * (h.shape[1] + 3).bit_count(),
    "to_bytes": lambda h: torch.ones(len(h), 1) * h.shape[1].to_bytes(2, "big")[1],
    "real": lambda h: torch.ones(len(h), 1) * h.shape[1].real,
    "conjugate": lambda h: torch.ones(len(h), 1) * h.shape[1].conjugate(),
    "numerator": lambda h: torch.ones(len(h), 1) * h.shape[1].numerator,
    "as_integer_ratio": lambda h: torch.ones(len(h), 1) * h.shape[1].as_integer_ratio()[0],
}  # fmt: skip

UNSEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "percent": lambda h: torch.ones(len(h), 1) * float("%d" % h.shape[1]),  # noqa: UP031
    "index": lambda h: h.new_tensor(0.1) * operator.index(h.shape[1]) * torch.ones(len(h), 1),
    "list": lambda h: torch.ones(len(h), 1) * list(range(40))[h.shape[1]],
    "part of a list": lambda h: torch.ones(len(h), 1) * sum(list(range(40))[: h.shape[1]]),
    "letter of a text": lambda h: torch.ones(len(h), 1) * ord("abcdefghijklmnopqrst"[h.shape[1]]),
    "gcd": lambda h: torch.ones(len(h), 1) * math.gcd(h.shape[1], 24),
    "isqrt": lambda h: torch.ones(len(h), 1) * math.isqrt(h.shape[1]),
    "comb": lambda h: torch.ones(len(h), 1) * math.comb(h.shape[1], 2),
    "numel of a shape": lambda h: torch.ones(len(h), 1) * (1 if h.shape.numel() > 30 else 2),
}  # fmt: skip
"""Python tells nobody of these; the comparison of outputs does."""

FOLLOWED: dict[str, Callable[[Tensor], Tensor]] = {
    "expand, times": lambda h: (h.sum(1, keepdim=True).expand(-1, h.shape[1]) * h).sum(1),
    "ones, times": lambda h: (torch.ones(len(h), h.shape[1]) * h).sum(1),
    "ones_like, plus": lambda h: (torch.zeros_like(h) + h).sum(1),
    "zeros in where": lambda h: torch.where(h > 0.5, h, torch.zeros_like(h)).sum(1),
    "a product": lambda h: h @ h.new_ones(h.shape[1], 2),
    "a narrow slice of all": lambda h: h[:, : h.shape[1]].sum(1),
    "view": lambda h: h.view(len(h), h.shape[1], 1).sum(1),
}


def outcome(step: Callable[[Tensor], Tensor]) -> tuple[str, float, Any]:
    """How pruning ends, the largest difference from the mask by hand, and the graph."""
    model, x = Net(step).eval(), torch.randn(4, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = prunus.trace(model, x)
        try:
            plan = prunus.plan(graph, model, ratio=0.5, importance="random")
            verdict = prunus.verify(plan, model, x).verdict
        except BudgetError:
            return "untouched", 0.0, graph
        pruned = cut(plan, model)
    kept = next((s for a, s in plan.keep.items() if a.tensor == "last.weight"), range(WIDTH))
    model.kept = torch.zeros(WIDTH).index_fill(0, torch.tensor(list(kept)), 1.0)
    worst = 0.0
    with torch.no_grad():
        for batch in (x, torch.randn(7, 6)):
            worst = max(worst, float((model(batch) - pruned(batch)).abs().max()))
    return verdict, worst, graph


@pytest.mark.parametrize("name", COUNTED)
def test_what_counts_units_is_pinned_with_its_line(name: str) -> None:
    verdict, error, graph = outcome(COUNTED[name])
    assert verdict == "untouched", (verdict, error)
    assert any("test_counts.py:" in pin.source for _, pin in graph.pins), graph.pins


@pytest.mark.parametrize("name", FOLLOWED)
def test_sizes_that_meet_the_units_follow_them(name: str) -> None:
    verdict, error, _ = outcome(FOLLOWED[name])
    assert verdict == "exact"
    assert error < 1e-5


@pytest.mark.parametrize("name", UNSEEN)
def test_what_nobody_hears_of_is_not_exact(name: str) -> None:
    assert outcome(UNSEEN[name])[0] == "inexact"
