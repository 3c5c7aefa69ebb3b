"""Two processes: one plan, the same weights, the scores of one process; and FSDP2 after a cut."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch import nn

import prunus

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="there are no process groups")

HEAD = """
import os, sys, warnings
import torch
from torch import distributed as dist, nn
from torch.nn.parallel import DistributedDataParallel
import prunus
from tests.test_ranks import build

rank, folder = int(os.environ["RANK"]), sys.argv[1]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
"""

PLANS = """
data = torch.load(f"{folder}/data.pt")
own = [data[rank::2]]
found = {}

model = build()
graph = prunus.trace(model, data)
needs = prunus.importance.needs_of("taylor")
statistics = prunus.importance.collect(model, graph, own, needs)
tensors = dict(model.state_dict())
found["scores"] = prunus.importance.score(graph, tensors, "taylor", statistics=statistics)

def of_rank(group, context):  # no two processes agree on these scores
    return torch.arange(len(group.units)).numpy() * (1.0 - 2.0 * rank)

found["plans"] = [
    prunus.plan(graph, model, ratio=0.5, importance=how, data=given).to_json()
    for how, given in (("taylor", own), (of_rank, None))
]
def fails(group, context):
    if rank == 0:
        raise ValueError("on rank 0")
    return torch.ones(len(group.units)).numpy()

try:
    prunus.plan(graph, model, ratio=0.5, importance=fails)
except ValueError as error:
    found["error"] = str(error)

found["weights"] = []
for recover in ("auto", "sequential", "recalibrate"):
    wrapped = DistributedDataParallel(build())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = prunus.shrink(wrapped, data[:4], ratio=0.5, data=own, recover=recover)
    found["warned"] = [str(one.message) for one in caught]
    found["weights"].append(done.model.state_dict())
    assert done.model is wrapped.module
    again = DistributedDataParallel(done.model)
    optimizer = torch.optim.SGD(again.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        again(own[0]).square().mean().backward()
        optimizer.step()
    found["weights"].append({n: p.detach() for n, p in done.model.named_parameters()})
torch.save(found, f"{folder}/found-{rank}.pt")
"""

SHARDS = """
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, set_model_state_dict,
)
from torch.distributed.fsdp import fully_shard

data = torch.load(f"{folder}/data.pt")
mesh = dist.init_device_mesh("cpu", (2,))

def sharded(model):
    for child in (model[0], model[5]):
        fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh)

model = build(norm=False)
plan = prunus.plan(prunus.trace(model, data), model, ratio=0.5)
try:
    prunus.apply(plan, sharded(build(norm=False)))
except prunus.PrunusError as error:
    refused = str(error)
model = sharded(prunus.apply(plan, model))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
losses = []
for _ in range(2):
    optimizer.zero_grad()
    loss = model(data[rank::2]).square().mean()
    loss.backward()
    optimizer.step()
    losses.append(float(loss))
full = StateDictOptions(full_state_dict=True, cpu_offload=True)
state = get_model_state_dict(model, options=full)
if rank == 0:
    torch.save({"plan": plan.to_json(), "model": state}, f"{folder}/saved.pt")
dist.barrier()

saved = torch.load(f"{folder}/saved.pt")
fresh = prunus.apply(prunus.Plan.from_json(saved["plan"]), build(norm=False))
fresh = sharded(fresh)
set_model_state_dict(
    fresh, saved["model"], options=StateDictOptions(full_state_dict=True)
)
with torch.no_grad():
    same = bool(torch.equal(fresh(data), model(data)))
torch.save({"losses": losses, "refused": refused, "same": same}, f"{folder}/found-{rank}.pt")
"""

TAIL = """
dist.barrier()
dist.destroy_process_group()
"""


def build(*, norm: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3),
        nn.Flatten(1),
        nn.Linear(64, 6),
    ).eval()


def processes(folder: Path, body: str) -> list[dict[str, Any]]:
    """What two processes found that ran the same program."""
    torch.save(torch.randn(16, 3, 8, 8), folder / "data.pt")
    started = [
        subprocess.Popen(
            [sys.executable, "-c", HEAD + body + TAIL, str(folder)],
            env={**os.environ, "RANK": str(rank)},
            cwd=Path(__file__).parents[1],
        )
        for rank in range(2)
    ]
    assert [one.wait(timeout=240) for one in started] == [0, 0]
    return [torch.load(folder / f"found-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.slow
def test_two_processes_make_one_plan_and_the_same_weights(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first, second = processes(tmp_path, PLANS)
    assert first["plans"] == second["plans"]
    assert first["plans"][0] != first["plans"][1]
    assert first["error"] == second["error"] == "on rank 0"
    for one, other in zip(first["weights"], second["weights"], strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert any("wrap the model anew" in text for text in first["warned"])
    data = torch.load(tmp_path / "data.pt")
    model = build()
    graph = prunus.trace(model, data)
    needs = prunus.importance.needs_of("taylor")
    halves = [data[0::2], data[1::2]]
    statistics = prunus.importance.collect(model, graph, halves, needs)
    wanted = prunus.importance.score(
        graph, dict(model.state_dict()), "taylor", statistics=statistics
    )
    for found in (first, second):
        np.testing.assert_allclose(found["scores"], wanted, rtol=1e-6)


@pytest.mark.slow
def test_a_pruned_model_is_sharded_trained_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(1)
    for found in processes(tmp_path, SHARDS):
        assert "prune before fully_shard" in found["refused"]
        assert found["losses"][1] < found["losses"][0]
        assert found["same"]
