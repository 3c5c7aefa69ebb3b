"""Processes of ``torch.distributed`` agree: on a plan, on sums, and on the weights after a repair.

Nothing happens where no process group is initialised, or where it has one process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import distributed as dist
from torch import nn

from prunus.graph.program import state_of

Made = TypeVar("Made")


def are_several() -> bool:
    """Whether there are other processes to agree with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def device_of_group() -> torch.device:
    """Where tensors have to be that are sent."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def made_by_rank_0(make: Callable[[], Made]) -> Made:
    """What rank 0 made, in every process; all of them make it, since that may sum over them.

    An error that rank 0 met is raised in every process.
    """
    if not are_several():
        return make()
    outcome: list[Any] = [None, None]
    try:
        outcome[0] = make()
    except Exception as error:  # whichever it is, the others must not wait for a plan
        outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    made: Made = outcome[0]
    return made


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """The sums over all processes, entry by entry."""
    if not are_several():
        return list(values)
    whole = torch.tensor(values, dtype=torch.float64, device=device_of_group())
    dist.all_reduce(whole)
    return [float(value) for value in whole]


def share_weights(model: nn.Module) -> None:
    """Rank 0's parameters and buffers, in every process.

    A repair fits some of them to the data of one process.  They go into new memory, so that the
    old can be put back.
    """
    if not are_several():
        return
    for tensor in state_of(model)[0].values():
        given = tensor.detach().to(device_of_group(), copy=True)
        dist.broadcast(given, src=0)
        if not torch.equal(given.to(tensor.device), tensor):
            tensor.data = given.to(tensor)
