"""Parameters that the traced forward never read: experts without tokens, spare heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunus


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.norm(x)).relu())


class Mixture(nn.Module):
    """Every token goes to the expert that its first entry says."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(4, 16), nn.Linear(16, 3)
        self.experts = nn.ModuleList(Expert() for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[:, 0].long()
        h = self.inp(x)
        for number, expert in enumerate(self.experts):
            rows = torch.where(chosen == number)[0]
            if len(rows):
                h = h.index_add(0, rows, expert(h[rows]))
        return self.out(h)


def tokens(*experts: int) -> Tensor:
    x = torch.randn(len(experts), 4)
    x[:, 0] = torch.tensor(experts)
    return x


@pytest.mark.parametrize("visited", [(0, 1, 0), (2, 2, 2)])
def test_an_expert_that_no_token_visits_is_cut_as_the_others(visited: Any) -> None:
    torch.manual_seed(0)
    model = Mixture(4).eval()
    graph = prunus.trace(model, tokens(*visited))
    assert not graph.why_pinned("inp.weight[0]")
    plan = prunus.plan(graph, model, ratio=0.5, importance="random")
    assert plan.traced is not None
    unread = set(plan.traced.unread)
    assert "experts.3.up.weight" in unread
    assert f"experts.{visited[0]}.up.weight" not in unread
    assert set(prunus.verify(plan, model, tokens(*visited)).unread) == unread
    with prunus.mask(plan, model), torch.no_grad():
        wanted = model(tokens(*visited))
    assert wanted.shape == (3, 3)
    prunus.apply(plan, model)
    assert model.experts[3].up.in_features == model.inp.out_features == 8
    assert model.experts[3].up.out_features == 24
    assert model(tokens(0, 1, 2, 3)).shape == (4, 3)


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out, self.spare = nn.Linear(4, 16), nn.Linear(16, 3), nn.Linear(16, 5)
        self.hidden = nn.Linear(3, 20)
        self.last = nn.Linear(20, 2)

    def forward(self, x: Tensor, spare: bool = False) -> Tensor:
        h = self.inp(x).relu()
        if spare:
            return self.spare(h)
        return self.last(self.hidden(self.out(h)).relu())


def test_what_a_spare_head_may_read_stays_whole() -> None:
    torch.manual_seed(0)
    model, x = Branch().eval(), torch.randn(2, 4)
    result = prunus.shrink(model, x, ratio=0.5, recover="none")
    assert result.certificate.unread == ("spare.weight", "spare.bias")
    assert any("spare" in str(pin) for _, pin in result.graph.why_pinned("inp.weight[0]"))
    assert model.hidden.out_features == 10
    assert model(x, spare=True).shape == (2, 5)


class Encoding(nn.Module):
    """A part of it, another model, and a head that only the forward reads."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out, self.head = nn.Linear(4, 16), nn.Linear(16, 3), nn.Linear(16, 5)
        self.part = Branch()

    def encode(self, x: Tensor) -> Tensor:
        return self.out(self.inp(x).relu()).sum(1) + self.part(x).sum(1)

    def encode_by_forward(self, x: Tensor) -> Tensor:
        return self.forward(x, spare=False)

    def forward(self, x: Tensor, spare: bool = True) -> Tensor:
        return self.head(self.inp(x).relu()) if spare else self.encode(x)


def encoded(model: Any, x: Tensor) -> Tensor:
    out: Tensor = model.encode(x)
    return out


@pytest.mark.parametrize("entry", ["encode", encoded])
def test_what_only_an_unused_forward_reads_holds_nothing(entry: Any) -> None:
    torch.manual_seed(0)
    model, x = Encoding().eval(), torch.randn(2, 4)
    result = prunus.shrink(model, x, ratio=0.5, recover="none", forward_fn=entry)
    assert result.certificate.verdict == "exact"
    assert model.inp.out_features == 8
    assert model.part.inp.out_features == 16  # its own forward ran, which may read the spare head
    assert {"head.weight", "part.spare.weight"} <= set(result.certificate.unread)


@pytest.mark.parametrize("entry", ["encode_by_forward", lambda m, x: m(x, spare=False)])
@pytest.mark.parametrize("patched", [False, True])
def test_a_forward_that_an_entry_calls_may_read_its_other_parts(entry: Any, patched: bool) -> None:
    model, x = Encoding().eval(), torch.randn(2, 4)
    if patched:
        forward = model.forward
        model.forward = lambda *a, **k: forward(*a, **k)  # type: ignore[method-assign]
    graph = prunus.trace(model, x, forward_fn=entry)
    assert any("head" in str(pin) for _, pin in graph.why_pinned("inp.weight[0]"))


class Auxiliary(nn.Module):
    """A head for training alone, deep enough that no size beside it says what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 16), nn.ReLU())
        self.second = nn.Sequential(nn.Sequential(nn.Linear(16, 20)))
        self.third = nn.Linear(20, 3)
        self.aux = nn.Sequential(nn.Sequential(nn.Linear(16, 7)), nn.Linear(7, 3))

    def forward(self, x: Tensor) -> Any:
        h = self.first(x)
        y = self.third(self.second(h).relu())
        return (y, self.aux(h)) if self.training else y


def test_a_head_for_training_still_runs_there() -> None:
    torch.manual_seed(0)
    model, x = Auxiliary().eval(), torch.randn(2, 4)
    result = prunus.shrink(model, x, ratio=0.5, recover="none")
    assert result.certificate.verdict == "exact"
    assert "aux.1.weight" in result.certificate.unread
    assert any("training mode" in why for why in result.held.values())
    assert tuple(model.second[0][0].weight.shape) == (10, 16)
    model.train()(x)
