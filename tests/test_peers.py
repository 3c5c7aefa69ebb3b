"""The judge of the other engines: it has to acquit what is right, and to convict what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers import engines
from benchmarks.peers.judge import judge, recover

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


def narrow(layer: Any, dim: int, stay: list[int]) -> None:
    """Cut a linear layer, or a norm, as an engine would."""
    index = torch.tensor(stay)
    layer.weight = nn.Parameter(layer.weight.detach().index_select(dim, index))
    if dim == 0:
        layer.bias = nn.Parameter(layer.bias.detach()[index])
    if isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = (len(stay),)


class Mlp(nn.Module):
    """A norm between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 12), nn.LayerNorm(12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(F.relu(self.norm(self.a(x))))
        return out


def cut(producer: list[int], consumer: list[int]) -> Callable[[Any], nn.Module]:
    def prune(model: Any) -> nn.Module:
        narrow(model.a, 0, producer)
        narrow(model.norm, 0, producer)
        narrow(model.b, 1, consumer)
        model.a.out_features = model.b.in_features = len(producer)
        return model  # type: ignore[no-any-return]

    return prune


STAY = [0, 3, 4, 7, 10]


def test_a_right_cut_is_exact() -> None:
    found = judge(Mlp(), (X,), {}, cut(STAY, STAY))
    assert (found.status, found.verdict, found.reason) == ("ok", "exact", "")
    assert found.moved > 1e-2
    assert found.param_ratio < 0.5


def test_a_cut_that_reads_other_positions_is_inexact() -> None:
    found = judge(Mlp(), (X,), {}, cut(STAY, [0, 3, 5, 7, 10]))
    assert (found.status, found.verdict) == ("ok", "inexact")
    assert found.reason.startswith("cut across couplings: ")
    assert found.rel_err > 1e-2


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_other_values_are_not_judged(scale: float) -> None:
    def prune(model: Any) -> nn.Module:
        cut(STAY, STAY)(model).b.weight.data.mul_(scale)  # type: ignore[union-attr]
        return model  # type: ignore[no-any-return]

    found = judge(Mlp(), (X,), {}, prune)
    assert (found.verdict, found.reason) == ("not judged", "b.weight has other values, not fewer")


def test_what_is_not_a_success_says_so() -> None:
    def fails(model: Any) -> nn.Module:
        raise IndexError("no such channel")

    def breaks(model: Any) -> nn.Module:
        narrow(model.a, 0, STAY)
        narrow(model.b, 0, [0, 1, 2])
        return model  # type: ignore[no-any-return]

    def reshapes(model: Any) -> nn.Module:
        cut(STAY, STAY)(model)
        narrow(model.b, 0, [0, 2])
        return model  # type: ignore[no-any-return]

    failed, broken, reshaped, nothing = (
        judge(Mlp(), (X,), {}, prune) for prune in (fails, breaks, reshapes, lambda m: m)
    )
    assert failed.status == "failed"
    assert failed.reason.startswith("IndexError: no such channel [test_peers.py:")
    assert (broken.status, reshaped.status) == ("broken forward", "shape changed")
    assert (nothing.status, nothing.reason) == ("too little removed", "nothing was removed")


class Grouped(nn.Module):
    """A group norm, of which our own couplings see no more than they must."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv1d(6, 12, 1), nn.GroupNorm(3, 12), nn.Conv1d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(F.relu(self.norm(self.a(x))))
        return out


@pytest.mark.parametrize(
    ("stay", "verdict"),
    [
        ([0, 1, 5, 6, 10, 11], "exact"),  # two of each group, at other places in each
        ([0, 1, 2, 5, 10, 11], "inexact"),  # three of one, one of another
    ],
)
def test_a_group_norm_sees_the_groups_that_there_were(stay: list[int], verdict: str) -> None:
    found = judge(Grouped(), (torch.randn(2, 6, 5),), {}, cut_groups(stay))
    assert found.verdict == verdict, found


def cut_groups(stay: list[int]) -> Callable[[Any], nn.Module]:
    def prune(model: Any) -> nn.Module:
        for layer, dim in ((model.a, 0), (model.norm, 0), (model.b, 1)):
            narrow(layer, dim, stay)
        model.norm.num_channels = len(stay)
        return model  # type: ignore[no-any-return]

    return prune


def test_positions_are_read_off_the_values() -> None:
    x = torch.randn(5, 6, 2)
    assert recover(x, x[[0, 3]][:, [1, 2, 5]]) == {0: (0, 3), 1: (1, 2, 5)}
    assert recover(x, x.clone()) == {}
    assert recover(x, x[[3, 0]]) is None
    assert recover(x, 2 * x[[0, 3]]) is None
    assert recover(torch.ones(4), torch.ones(2)) is None


def test_the_layers_of_the_outputs_are_found() -> None:
    assert engines.find_output_layers(Mlp(), (X,), {}) == ["b"]


def test_heads_are_found_by_the_names_of_counts_and_layers() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.n_heads, self.n_kv_heads = 4, 2
            self.q_proj, self.k_proj, self.out = (nn.Linear(8, w) for w in (16, 8, 8))

    model = Attention()
    found = {layer: hint.count for layer, hint in engines.find_heads(model).items()}
    assert found == {model.q_proj: 4, model.k_proj: 2}
