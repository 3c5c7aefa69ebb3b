"""Values of tensors that come back in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def remember(tensors: Iterable[Tensor]) -> Callable[[], None]:
    """What puts the values of tensors back, in place.

    >>> weight = torch.ones(2)
    >>> put_back = remember([weight])
    >>> weight += 1
    >>> put_back()
    >>> weight.tolist()
    [1.0, 1.0]
    """
    saved = [(tensor, tensor.detach().clone()) for tensor in tensors]

    def put_back() -> None:
        with torch.no_grad():
            for tensor, values in saved:
                tensor.copy_(values)

    return put_back
