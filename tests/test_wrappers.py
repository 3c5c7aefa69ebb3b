"""Wrappers around a model: what is inside is traced and cut, a stale one is named."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

import prunus
from prunus.errors import ModelError
from tests.snapshots import same

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(1)
    ).eval()


@pytest.fixture
def group(tmp_path) -> Iterator[None]:
    if not dist.is_available():
        pytest.skip("this build of PyTorch has no process groups")
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def test_a_distributed_model_is_unwrapped_and_the_old_wrapper_named(group: None) -> None:
    plain, wrapped = net(), DistributedDataParallel(net())
    wanted = prunus.shrink(plain, X, ratio=0.5)
    with pytest.warns(UserWarning, match="wrap the model anew"):
        done = prunus.shrink(wrapped, X, ratio=0.5)
    assert done.model is wrapped.module
    assert done.plan.keep == wanted.plan.keep
    assert not done.graph.unknown
    assert done.certificate.verdict == "exact"
    assert same(done.model.state_dict(), plain.state_dict())
    again = DistributedDataParallel(done.model)
    again(X).sum().backward()
    again(X).sum().backward()


def test_a_wrapper_that_holds_a_part_is_found(group: None) -> None:
    body = net()
    wrapper = DistributedDataParallel(nn.Sequential(body, nn.Linear(64, 2)))
    graph = prunus.trace(body, X)
    plan = prunus.plan(graph, body, ratio=0.5)
    with pytest.warns(UserWarning, match="DistributedDataParallel holds parameters"):
        prunus.apply(plan, body)
    assert wrapper.module[0] is body


def test_no_warning_for_other_models(group: None) -> None:
    other = DistributedDataParallel(net())
    prunus.shrink(net(), X, ratio=0.5)
    assert other.module[0].out_channels == 8


@pytest.mark.parametrize(
    "wrap", [DataParallel, lambda m: torch.compile(m, backend="eager")], ids=["parallel", "compile"]
)
def test_wrappers_that_go_on(wrap) -> None:
    model = net()
    wrapped = wrap(model)
    wrapped(X)  # compiled for the dense shapes
    graph = prunus.trace(wrapped, X)
    assert [g.name for g in graph.groups] == [g.name for g in prunus.trace(net(), X).groups]
    plan = prunus.plan(graph, wrapped, ratio=0.5)
    assert prunus.verify(plan, wrapped, X).verdict == "exact"
    with prunus.mask(plan, wrapped):
        masked = model(X)
    assert prunus.apply(plan, wrapped) is model
    torch.testing.assert_close(model(X), masked)
    torch.testing.assert_close(wrapped(X), masked)


class Inner(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.module(x)
        return out


def test_a_module_that_only_has_one_inside_is_no_wrapper() -> None:
    names = {axis.tensor for axis in prunus.trace(Inner(net()), X).labels}
    assert all(name.startswith("module.") for name in names)


def test_sharded_models_are_refused_by_name(group: None) -> None:
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(copy.deepcopy(net()), mesh=dist.init_device_mesh("cpu", (1,)))
    for call in (
        lambda: prunus.trace(model, X),
        lambda: prunus.shrink(model, X, ratio=0.5),
    ):
        with pytest.raises(
            ModelError, match=r"sharded \(FSDPModule\)(.|\n)*prune before fully_shard"
        ):
            call()


def test_parameters_that_are_spread_by_hand_are_refused(group: None) -> None:
    from torch.distributed.tensor import distribute_tensor

    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    mesh = dist.init_device_mesh("cpu", (1,))
    model[1].weight = nn.Parameter(distribute_tensor(model[1].weight.detach(), mesh))
    with pytest.raises(ModelError, match=r"sharded \(DTensor\)(.|\n)*prune before fully_shard"):
        prunus.trace(model, torch.randn(1, 4))


def test_what_accelerate_prepared_is_unwrapped() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = net().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    ready = accelerate.Accelerator(cpu=True)
    model, optimizer, schedule = ready.prepare(model, optimizer, schedule)

    def step() -> None:
        optimizer.zero_grad()
        ready.backward(model(X).square().mean())
        optimizer.step()
        schedule.step()

    step()
    prunus.shrink(model, X, ratio=0.5, optimizer=optimizer, scheduler=schedule)
    weight = ready.unwrap_model(model)[0].weight
    assert optimizer.optimizer.state[weight]["exp_avg"].shape == weight.shape == (4, 3, 3, 3)
    before = weight.detach().clone()
    step()
    assert not torch.equal(weight, before)
    assert schedule.get_last_lr() == [0.0025]
