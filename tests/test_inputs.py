"""Inputs as plain data: what is known of them at the trace, and what is built again from that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunus
from prunus.tracer.inputs import FEW, describe_inputs, rebuild_inputs


class Reader(nn.Module):
    """Rows of tables by several operators; a mask and lengths, which are no rows."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.kinds = nn.Embedding(30, 8), nn.Embedding(4, 8)
        self.places = nn.Parameter(torch.randn(50, 8))
        self.register_buffer("bands", torch.randn(8, 6))
        self.hidden, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(
        self, ids: Tensor, mask: Tensor, lengths: Tensor, *, kinds: Tensor, places: Tensor
    ) -> Tensor:
        x = self.tokens(ids.long()) + self.kinds(kinds[:, :7]) + self.places[places]
        x = x + self.bands[:, lengths.clamp(max=5)].sum() + (lengths > 3).sum()
        out: Tensor = self.out((self.hidden(x) * mask[..., None]).sum(1) / lengths[:, None])
        return out


def described(ids: Tensor, mask: Tensor, lengths: Tensor, **kwargs: Tensor) -> Any:
    return prunus.trace(Reader(), (ids, mask, lengths), kwargs).traced["inputs"]


def test_row_numbers_are_bounded_by_their_table_and_other_integers_are_kept() -> None:
    torch.manual_seed(0)
    spec = described(
        torch.randint(0, 3, (2, 7), dtype=torch.int32),
        torch.ones(2, 7, dtype=torch.bool),
        torch.tensor([7, 3]),
        kinds=torch.zeros(2, 9, dtype=torch.int64),
        places=torch.arange(7)[None],
    )
    ids, mask, lengths = spec["args"]
    assert ids == {"tensor": [2, 7], "dtype": "int32", "low": 0, "high": 29}
    assert mask["values"] == [1] * 14
    assert lengths["values"] == [7, 3]
    assert spec["kwargs"]["kinds"]["high"] == 3
    assert spec["kwargs"]["places"]["high"] == 49
    (ids, mask, lengths), kwargs = rebuild_inputs(spec, Reader(), seed=1)
    assert ids.dtype == torch.int32
    assert len(ids.unique()) > 5
    assert int(ids.max()) > 3
    assert mask.dtype == torch.bool
    assert bool(mask.all())
    assert lengths.tolist() == [7, 3]
    assert Reader()(ids, mask, lengths, **kwargs).shape == (2, 3)
    plain, _ = rebuild_inputs(spec, Reader(), varied=False)
    assert not plain[0].any()


def test_many_integers_become_random_ones_between_the_least_and_the_greatest() -> None:
    long = torch.arange(FEW + 1) % 5 + 2
    spec = describe_inputs((long, torch.ones(FEW + 1, dtype=torch.int64)), {})
    assert spec["args"][0] == {"tensor": [FEW + 1], "dtype": "int64", "low": 2, "high": 6}
    (numbers, ones), _ = rebuild_inputs(spec, nn.Linear(1, 1))
    assert set(numbers.tolist()) == {2, 3, 4, 5, 6}
    assert bool((ones == 1).all())


@pytest.mark.parametrize("values", [[1, 2, 3], ["a"], [[1], [2, 3]]])
def test_a_damaged_description_is_refused(values: Any) -> None:
    spec = {"args": [{"tensor": [2], "dtype": "int64", "values": values}], "kwargs": {}}
    with pytest.raises(prunus.PrunusError, match="damaged"):
        rebuild_inputs(spec, nn.Linear(1, 1))
