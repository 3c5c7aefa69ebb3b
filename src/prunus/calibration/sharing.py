"""One pass over calibration data by several processes: each has a part, and in the end all sums."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from prunus.calibration.sums import Sums, differences
from prunus.errors import PlanError

Documents = Sequence[Mapping[str, Any]]
"""What each process said, in order."""


class Processes(Protocol):
    """Processes that add up tensors: an ``accelerate.Accelerator``, or anything like it.

    A ``device``, if there is one, is where tensors have to lie to be added up.
    """

    @property
    def num_processes(self) -> int:
        """How many there are."""

    @property
    def process_index(self) -> int:
        """Which this one is, from 0."""

    def reduce(self, tensor: Tensor, reduction: str = "sum") -> Tensor:
        """The sum of what all have given, for all; what was given stays as it was."""


class Alone:
    """A process that shares with none.

    >>> Alone().reduce(torch.ones(2)).tolist()
    [1.0, 1.0]
    """

    num_processes, process_index = 1, 0

    def reduce(self, tensor: Tensor, reduction: str = "sum") -> Tensor:
        return tensor


class _Distributed:
    """The default group of ``torch.distributed``."""

    def __init__(self) -> None:
        self.num_processes, self.process_index = dist.get_world_size(), dist.get_rank()
        self.device = torch.device("cpu")
        if dist.get_backend() == "nccl":  # which knows no other device
            self.device = torch.device("cuda", torch.cuda.current_device())

    def reduce(self, tensor: Tensor, reduction: str = "sum") -> Tensor:
        whole = tensor.clone()
        dist.all_reduce(whole)
        return whole


def processes_of(accelerator: Processes | Literal["distributed"] | None) -> Processes:
    """Those of an accelerator, or of ``torch.distributed``; without one, this one.

    Raises
    ------
    PlanError
        If the processes of ``torch.distributed`` don't know of one another yet.
    """
    if accelerator is None:
        return Alone()
    if accelerator != "distributed":
        return accelerator
    if not (dist.is_available() and dist.is_initialized()):
        raise PlanError(
            'accelerator="distributed", and torch.distributed was not initialised',
            fix="call torch.distributed.init_process_group(…) first, or leave it out",
        )
    return _Distributed()


def share(sums: Sums, processes: Processes, device: torch.device | None = None) -> None:
    """Make the sums of this process those of all; all have to call it.

    Parameters
    ----------
    device
        Where second moments are wanted; without it they lie where they were added up.

    Raises
    ------
    PlanError
        If they are not of one kind; every process raises it.
    """
    if processes.num_processes == 1:
        return
    said = _exchange({"kind": sums.kind(), **sums.counts()}, processes)
    _check_alike(said)
    _share_arrays(sums, said, processes)
    for index, moments in enumerate(sums.moments):
        counts = [one["moments"][index] for one in said]
        if not any(counts):
            continue
        # Sums around different shifts can't be added: that of the first who has rows is for all.
        leads = next(rank for rank, count in enumerate(counts) if count)
        shift = torch.zeros(moments.groups, moments.columns, dtype=torch.float64)
        if leads == processes.process_index and moments.shift is not None:
            shift = moments.shift
        shift = _add_up(shift, processes)
        around = moments.around(shift)
        moments.count, moments.shift = sum(counts), shift.to(device)
        moments.total = _add_up(around.total, processes).to(device)
        moments.product = _add_up(around.product, processes).to(device)
    sums.samples = sum(one["samples"] for one in said)
    sums.losses = sum(one["losses"] for one in said)
    for index, site in enumerate(sums.sites):
        site.count = sum(one["sites"][index] for one in said)
    for index, heads in enumerate(sums.heads):
        heads.count = sum(one["heads"][index] for one in said)


def _share_arrays(sums: Sums, said: Documents, processes: Processes) -> None:
    """Add up all arrays that are as long as a dim, at once: a call for each would take long."""
    for name in sorted({name for one in said for name in one["units"]}):
        sums.units.setdefault(name, np.zeros(sums.unit_count + 1))
    for index, site in enumerate(sums.sites):
        owners: dict[tuple[int, int], int] = {}
        for rank, one in enumerate(said):
            for start, size in one["parts"][index]:
                owners.setdefault((start, size), rank)
        # Weights are no data: one of those who have seen a part tells it, once.
        mine = processes.process_index
        site.weights = {
            part: site.weights[part] if owners[part] == mine else np.zeros(len(site.label))
            for part in sorted(owners)
        }
    arrays = [sums.units[name] for name in sorted(sums.units)]
    for site in sums.sites:
        arrays += [site.total, site.square, *site.weights.values()]
    arrays += [heads.total for heads in sums.heads]
    if not arrays:
        return
    whole = _add_up(torch.from_numpy(np.concatenate(arrays)), processes).cpu().numpy()
    ends = np.cumsum([len(array) for array in arrays])[:-1]
    for array, part in zip(arrays, np.split(whole, ends), strict=True):
        array[:] = part


def _add_up(tensor: Tensor, processes: Processes) -> Tensor:
    return processes.reduce(tensor.to(getattr(processes, "device", "cpu")), reduction="sum")


def _exchange(document: Mapping[str, Any], processes: Processes) -> Documents:
    """What every process says: sums of numbers are all that they have in common."""
    mine, count = processes.process_index, processes.num_processes
    content = np.frombuffer(json.dumps(document).encode(), dtype=np.uint8)
    sizes = torch.zeros(count, dtype=torch.int64)
    sizes[mine] = len(content)
    sizes = _add_up(sizes, processes).cpu()
    table = torch.zeros(count, int(sizes.max()), dtype=torch.int32)
    table[mine, : len(content)] = torch.from_numpy(content.astype(np.int32))
    rows = _add_up(table, processes).cpu().numpy().astype(np.uint8)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def _check_alike(said: Documents) -> None:
    for rank, one in enumerate(said):
        found = differences(said[0]["kind"], one["kind"], ("in process 0", f"in process {rank}"))
        if found:
            raise PlanError(
                "the processes do not collect the same",
                why="\n".join(found),
                fix="call collect in all with the same model, graph, needs, plan and options",
            )
