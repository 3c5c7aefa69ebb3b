"""Tensors that a forward keeps for the next one never go stale."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import prunus


class Biased(nn.Module):
    """Attention whose bias is gathered once and kept, in a dict or in an attribute."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.heads, self.size = 4, 8
        self.qkv = nn.Linear(16, 3 * 32)
        self.proj = nn.Linear(32, 16)
        self.table = nn.Parameter(torch.randn(4, 9))
        self.head = nn.Linear(16, 3)
        self.where = where
        self.kept: dict[str, Tensor] = {}
        self.last: Tensor | None = None

    def bias(self, index: Tensor) -> Tensor:
        if self.where == "dict":
            if "cpu" not in self.kept:
                self.kept["cpu"] = self.table[:, index]
            return self.kept["cpu"]
        if self.last is None:
            self.last = self.table[:, index]
        return self.last

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, self.size).permute(2, 0, 3, 1, 4).unbind(0)
        index = torch.arange(n)[:, None] - torch.arange(n)[None] + n - 1
        scores = (q @ k.transpose(-2, -1) + self.bias(index)).softmax(-1)
        out = (scores @ v).transpose(1, 2).reshape(b, n, self.heads * self.size)
        return self.head(self.proj(out))


def test_what_was_kept_before_is_not_used_after() -> None:
    for where in ("dict", "attribute"):
        for warm in (False, True):
            torch.manual_seed(0)
            model = Biased(where).eval()
            x = torch.randn(2, 5, 16)
            with torch.no_grad():
                if warm and where == "dict":
                    model(x)
                kept = copy.deepcopy((model.kept, model.last))
                graph = prunus.trace(model, x)
                assert str(model.kept.keys()) == str(kept[0].keys())
                plan = prunus.plan(graph, model, ratio=0.3, importance="random")
                assert any("table[0]" in str(axis) for axis in plan.keep)
                assert prunus.verify(plan, model, x).verdict == "exact"
                model(x)
                prunus.apply(plan, model)
                assert model(x).shape == (2, 5, 3)
                source = model.kept["cpu"] if where == "dict" else model.last
                assert source is not None
                assert source.shape[0] == model.heads < 4


def test_listening_forgets_what_old_weights_made() -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
            self.bias = nn.Parameter(torch.zeros(6))
            self.cache: dict[str, Tensor] = {}

        def forward(self, x: Tensor) -> Tensor:
            if "bias" not in self.cache:
                self.cache["bias"] = self.bias * 1
            out: Tensor = self.last(self.first(x) + self.cache["bias"])
            return out

    model, x = Cached().eval(), torch.randn(2, 4)
    with torch.no_grad():
        model(x)
        prunus.verifier.randomize(model, (x,), {})
        model(x)
    assert torch.equal(model.cache["bias"], model.bias)
    assert model.bias.any()
