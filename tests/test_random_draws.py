"""Forwards that draw random numbers: verified with the draws tied, or refused with the line."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunus
from prunus.errors import VerifyError
from prunus.verifier import case
from prunus.verifier.permutation import Draws

WIDTH = 16
X = torch.randn(4, 6)
TURNS = itertools.count(1)
Run = Callable[[Any, Tensor], Tensor]


class Drawing(nn.Module):
    """Two layers, and a function of the model between them."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.last, self.run = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 3), run
        if "b" in run.__code__.co_names:  # a layer that no forward reads pins what may be tied
            self.b = nn.Linear(6, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.run(self, x))
        return out


def sampled(m: Any, x: Tensor) -> Tensor:
    """A variational autoencoder's middle."""
    return m.a(x) + torch.randn_like(m.a(x)) * (m.b(x) / 2).exp()


def distribution(m: Any, x: Tensor) -> Tensor:
    out: Tensor = torch.distributions.Normal(m.a(x), m.b(x).exp()).rsample()
    return out


def shaken(m: Any, x: Tensor) -> Tensor:
    """Stochastic depth, drawn by Python."""
    h: Tensor = m.a(x)
    return h + (m.b(x) if random.random() < 0.5 else m.b(x).relu())


RUNS: dict[str, Run] = {
    "dropout": lambda m, x: F.dropout(m.a(x), 0.3, training=True),
    "dropout of channels": lambda m, x: F.dropout1d(m.a(x)[None], 0.3, training=True)[0],
    "alpha dropout": lambda m, x: F.alpha_dropout(m.a(x), 0.3, training=True),
    "autoencoder": sampled,
    "distribution": distribution,
    "by shape": lambda m, x: m.a(x) + torch.randn(m.a(x).shape),
    "uniform": lambda m, x: m.a(x) * torch.empty_like(m.a(x)).uniform_(),
    "gumbel": lambda m, x: F.gumbel_softmax(m.a(x), dim=1),
    "a sample of probabilities": lambda m, x: m.b(x) * torch.bernoulli(m.a(x).sigmoid()),
    "a mean and a deviation": lambda m, x: torch.normal(m.a(x), m.b(x).exp()),
    "a generator": lambda m, x: (
        m.a(x) * torch.rand(m.a(x).shape, generator=torch.Generator().manual_seed(1))
    ),
    "order of the batch": lambda m, x: m.a(x)[torch.randperm(4)],
    "depth": lambda m, x: m.a(x) + m.b(x) * torch.empty(4, 1).bernoulli_(0.5),
    "depth by Python": shaken,
    "noise by NumPy": lambda m, x: m.a(x) * float(np.random.default_rng(0).random()),
    "a category": lambda m, x: m.a(x) * (1 + torch.multinomial(m.b(x).exp(), 1)),
}


@pytest.mark.parametrize("name", RUNS)
def test_verified_with_the_draws_tied(name: str) -> None:
    torch.manual_seed(7)
    model = Drawing(RUNS[name]).eval()
    state = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    shrunk = prunus.shrink(model, X, ratio=0.5)
    assert (shrunk.certificate.verdict, dict(shrunk.held)) == ("exact", {})
    assert model.a.out_features == WIDTH // 2
    assert torch.equal(torch.random.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert (np.random.get_state()[1] == state[2]).all()


def test_blocks_are_dropped_with_the_draws_tied() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + F.dropout(self.down(self.up(x).relu()), 0.2, training=True)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(*(Block() for _ in range(4))), nn.Linear(6, 3)).eval()
    certificate = prunus.shrink(model, X, drop=["0.1"], ratio=0.3).certificate
    assert (certificate.verdict, certificate.reason) == ("exact", "")


def test_other_positions_of_the_draws_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = case.kept_positions
    monkeypatch.setattr(case, "kept_positions", lambda label, mask: kept(label, mask)[::-1].copy())
    with pytest.raises(VerifyError, match=r"draws random numbers: aten\.bernoulli_") as refused:
        prunus.shrink(Drawing(RUNS["dropout"]).eval(), X, ratio=0.5)
    assert "test_random_draws.py:" in str(refused.value)
    assert "report" not in str(refused.value)


def test_what_goes_into_a_draw_is_compared() -> None:
    """The draws of another run hide nothing: an error in the probabilities shows."""
    model = Drawing(RUNS["a sample of probabilities"]).eval()
    program = prunus.trace(model, X).program
    with torch.no_grad(), Draws(program) as first:
        expected = model(X)
    with torch.no_grad(), Draws(program, first.drawn, lambda label: np.arange(len(label))):
        torch.testing.assert_close(model(X), expected)
    with torch.no_grad(), Draws(program, first.drawn, lambda label: np.arange(len(label))) as other:
        model.a.bias.add_(1.0)
        model(X)
    assert not torch.equal(other.drawn[0].outputs[0], first.drawn[0].outputs[0])


def test_a_forward_with_another_number_of_draws_is_refused() -> None:
    def by_count(m: Any, x: Tensor) -> Tensor:
        h: Tensor = m.a(x)
        for _ in range(next(TURNS)):
            h = h + torch.rand(1)
        return h

    with pytest.raises(VerifyError) as refused:
        prunus.shrink(Drawing(by_count).eval(), X, ratio=0.5)
    assert "the forward draws random numbers: aten.rand" in str(refused.value)
    assert "test_random_draws.py:" in str(refused.value)
