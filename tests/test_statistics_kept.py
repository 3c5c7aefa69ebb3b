"""Statistics of parts are those of the whole: merged, stopped and taken up, shared by processes."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import prunus
from prunus.calibration import keeping
from prunus.calibration.activations import Site
from prunus.calibration.confidence import Heads
from prunus.calibration.second_moments import Moments
from prunus.calibration.sharing import share
from prunus.calibration.sums import Sums
from prunus.errors import DataError, FileError, FormatError, PlanError

GRADIENTS = ["gradient", "head_gradient"]
INPUTS = ["activation", "second_moment"]


class Conv(nn.Module):
    """Two readers of the same values, and fewer positions looked at than an image has."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 4, 3, padding=1)
        self.b, self.c = nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.a(x)) + 50  # a mean that is large beside the spread
        return self.head(torch.tanh(self.b(x) + self.c(x)).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(6, 8, bias=False), nn.Linear(6, 8, bias=False)
        self.value, self.out = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (-1, 2)).transpose(1, 2) for m in self.projections())
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def projections(self) -> tuple[nn.Module, ...]:
        return self.query, self.key, self.value


def free() -> nn.Module:
    """Outputs that are no classes, so that the loss draws for every sample."""
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Unflatten(1, (5, 1, 1)))


# A model, the shape of a sample, what may be collected.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str]]] = {
    "conv": (Conv, (2, 6, 6), GRADIENTS + INPUTS),
    "conv, inputs alone": (Conv, (2, 6, 6), INPUTS),
    "attention": (Attention, (5, 6), [*GRADIENTS, *INPUTS, "attention"]),
    "free": (free, (3,), GRADIENTS),
}


def build(name: str) -> tuple[nn.Module, prunus.CouplingGraph, list[Tensor], dict[str, Any]]:
    """Model, graph, batches of 3, 2, 3, 1, 2 samples, options of ``collect``."""
    make, shape, needs = CASES[name]
    model = make().double().eval()
    data = [torch.randn(n, *shape, dtype=torch.float64) for n in (3, 2, 3, 1, 2)]
    data[1] = data[1] + 3
    return model, prunus.trace(model, data[0]), data, {"needs": needs}


def arrays(found: prunus.Statistics) -> dict[str, Any]:
    """All that statistics say, by name."""
    told: dict[str, Any] = {"samples": found.samples, "loss": found.loss, **found.units}
    for index, site in enumerate(found.sites):
        told |= {f"{index} {name}": getattr(site, name) for name in ("count", "total", "square")}
        told[f"{index} weight"] = site.weight
        if site.moments is not None:
            told[f"{index} rows"] = site.moments.count
            told[f"{index} mean"] = site.moments.mean.numpy()
            told[f"{index} covariance"] = site.moments.covariance().numpy()
    for index, heads in enumerate(found.heads):
        told |= {f"{index} queries": heads.count, f"{index} surest": heads.total}
    return told


def check_equal(found: prunus.Statistics, wanted: prunus.Statistics, rtol: float = 1e-11) -> None:
    left, right = arrays(found), arrays(wanted)
    assert left.keys() == right.keys()
    for name, value in right.items():
        size = float(np.abs(value).max()) if np.size(value) else 0.0
        atol = 0.0 if np.isnan(size) else rtol * size
        np.testing.assert_allclose(left[name], value, rtol=0, atol=atol, err_msg=name)


def check_same(found: prunus.Statistics, wanted: prunus.Statistics) -> None:
    """To the last bit."""
    check_equal(found, wanted, rtol=0.0)


# -- merging ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CASES if name != "free"])
def test_merged_parts_are_one_pass_over_all(name: str) -> None:
    model, graph, data, options = build(name)
    options["positions"] = 36  # all of an image: which of fewer hangs on the number of the sample
    whole = prunus.collect(model, graph, data, **options)
    first = prunus.collect(model, graph, data[:2], **options)
    rest = prunus.collect(model, prunus.trace(model, data[3]), data[2:], **options)
    before = [{k: np.array(v) for k, v in arrays(one).items()} for one in (first, rest)]
    check_equal(first.merge(rest), whole)
    check_equal(rest.merge(first), whole)
    for one, saved in zip((first, rest), before, strict=True):
        for key, value in arrays(one).items():
            np.testing.assert_array_equal(value, saved[key])


def test_merged_sites_share_moments_as_before() -> None:
    model, graph, data, options = build("conv")
    whole = prunus.collect(model, graph, data, **options)
    twice = whole.merge(whole)

    def groups(found: prunus.Statistics) -> list[int]:
        ids = [id(site.moments) for site in found.sites]
        return [ids.index(one) for one in ids]

    assert len(set(groups(whole))) < len(whole.sites)
    assert groups(twice) == groups(whole)
    assert not {id(site.moments) for site in twice.sites} & {id(s.moments) for s in whole.sites}


def test_parts_of_a_weight_that_both_have_used_count_once() -> None:
    a, b = (Site("experts", "", np.array([[1], [2]])) for _ in range(2))
    a.weights = {(0, 4): np.array([1.0, 2.0]), (32, 4): np.array([10.0, 20.0])}
    b.weights = {(32, 4): np.array([10.0, 20.0]), (64, 4): np.array([100.0, 200.0])}
    a.merge(b)
    assert a.weight.tolist() == [111.0, 222.0]
    assert b.weight.tolist() == [110.0, 220.0]


def test_an_expert_is_weighed_once_however_often_it_is_used() -> None:
    class Experts(nn.Module):
        """Which part of one tensor is read hangs on how many samples there are."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.experts = nn.Linear(3, 4), nn.Parameter(torch.randn(2, 5, 4))

        def forward(self, x: Tensor) -> Tensor:
            x = F.linear(torch.relu(self.a(x)), self.experts[len(x) % 2])
            return x

    model = Experts().double()
    graph = prunus.trace(model, torch.zeros(2, 3, dtype=torch.float64))
    odd, even = (torch.randn(n, 3, dtype=torch.float64) for n in (3, 2))
    parts = [prunus.collect(model, graph, [x, x], "activation") for x in (odd, even)]
    (site,) = parts[0].merge(parts[1]).sites
    whole = prunus.collect(model, graph, [odd, even, odd], "activation").sites[0].weight
    np.testing.assert_allclose(site.weight, model.experts.detach().square().sum((0, 1)))
    np.testing.assert_array_equal(site.weight, whole)


def test_statistics_of_something_else_are_not_merged() -> None:
    model, graph, data, options = build("conv")
    found = prunus.collect(model, graph, data, **options)

    def refused(other: prunus.Statistics, text: str) -> None:
        with pytest.raises(DataError, match=rf"can't be added up(.|\n)*{text}(.|\n)*same graph"):
            found.merge(other)

    refused(prunus.collect(model, graph, data, GRADIENTS), "needs: activation, gradient, .* there")
    coarse = prunus.collect(model, graph, data, memory_limit=5_000, **options)
    refused(coarse, r"sites: b\.weight.*in 1 blocks here, .*in 9 blocks there")
    wide = Conv().double()
    wide.head = nn.Linear(6, 4).double()
    other = prunus.collect(wide, prunus.trace(wide, data[0]), data, **options)
    check_equal(found.merge(other), found.merge(other))  # classes are no units
    wide.b, wide.c = nn.Conv2d(4, 7, 3).double(), nn.Conv2d(4, 7, 3).double()
    wide.head = nn.Linear(7, 3).double()
    other = prunus.collect(wide, prunus.trace(wide, data[0]), data, **options)
    refused(other, "head.weight, 6 positions.* here, head.weight, 7 positions(.|\n)*units: 10 here")


# -- stopping and going on -------------------------------------------------------------------------


def stopped(data: list[Tensor], after: int) -> Iterator[Tensor]:
    """A loader that is killed."""
    yield from data[:after]
    raise KeyboardInterrupt


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums are written after every batch."""
    monkeypatch.setattr(keeping, "SECONDS", 0.0)
    monkeypatch.setattr(keeping, "_PATIENCE", 0)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", CASES)
def test_a_killed_pass_goes_on_as_if_nothing_had_happened(name: str, tmp_path: Path) -> None:
    model, graph, data, options = build(name)
    options |= {"positions": 5, "path": tmp_path / "sums.safetensors"}
    wanted = prunus.collect(model, graph, data, **{**options, "path": None})
    for after in (0, 2, 3):
        with pytest.raises(KeyboardInterrupt):
            prunus.collect(model, graph, stopped(data, after), **options)
    ran: list[int] = []
    other = prunus.trace(model, data[3])
    found = prunus.collect(model, other, data, progress=ran.append, **options)
    assert ran == [4, 5]
    check_same(found, wanted)
    assert os.listdir(tmp_path) == ["sums.safetensors"]


@pytest.mark.usefixtures("eager")
def test_what_a_half_done_batch_added_is_not_kept(tmp_path: Path) -> None:
    model, graph, data, _ = build("conv")
    calls = 0

    def loss(output: Tensor, batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 7:  # the second sample of the third batch
            raise KeyboardInterrupt
        return output.square().sum()

    options = {"needs": GRADIENTS + INPUTS, "loss": loss}
    path = tmp_path / "sums.safetensors"
    with pytest.raises(KeyboardInterrupt):
        prunus.collect(model, graph, data, path=path, **options)
    found = prunus.collect(model, graph, data, path=path, **options)
    check_same(found, prunus.collect(model, graph, data, **options))


def test_a_finished_pass_runs_no_more_and_grows_with_its_data(tmp_path: Path) -> None:
    model, graph, data, options = build("attention")
    path = str(tmp_path / "sums.safetensors")
    first = prunus.collect(model, graph, data[:3], path=path, **options)
    ran: list[int] = []
    again = prunus.collect(model, graph, data[:3], path=path, progress=ran.append, **options)
    check_same(again, first)
    assert ran == []
    found = prunus.collect(model, graph, data, path=path, progress=ran.append, **options)
    assert ran == [4, 5]
    check_same(found, prunus.collect(model, graph, data, **options))


def test_sums_are_written_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph, data, options = build("free")
    now, written = 0.0, []

    def passes(done: int) -> None:
        nonlocal now
        now += 20.0

    monkeypatch.setattr(keeping, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(keeping, "replace_file", lambda path, write: written.append(now))
    path = tmp_path / "sums.safetensors"
    prunus.collect(model, graph, data, path=path, progress=passes, **options)
    assert written == [40.0, 80.0]
    prunus.collect(model, graph, data[:4], path=path, progress=passes, **options)
    assert written[2:] == [140.0, 180.0]


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    model, graph, data, options = build("conv")
    path = tmp_path / "sums.safetensors"
    prunus.collect(model, graph, data, path=path, **options)
    content = path.read_bytes()
    plan = prunus.plan(graph, model, ratio=0.5)

    def refused(text: str, **other: Any) -> None:
        with pytest.raises(FormatError, match=rf"(.|\n)*{text}(.|\n)*give another path"):
            prunus.collect(model, graph, **{"data": data, "path": path, **options, **other})
        assert path.read_bytes() == content

    refused("why:   needs: activation, .* there, activation here", needs="activation")
    refused("why:   seed: 0 there, 3 here", seed=3)
    refused("split: True there, False here", split=False)
    refused("positions: 64 there, 9 here", positions=9)
    refused("plan: None there, [0-9a-f]{32} here", plan=plan)
    refused("loss: None there, .*<lambda> here", loss=lambda output, batch: output.sum())
    refused("first 5 batches are not those of now", data=data[::-1])
    refused("first 5 batches are not those of now", data=[*data[:-1], data[-1] + 1e-9])
    refused("it counts 5 batches, and now there are 4", data=data[:-1])
    with torch.no_grad():
        model.head.bias[0] += 1e-9
    refused("why:   model: [0-9a-f]{32} there, [0-9a-f]{32} here\n")


def broken(content: bytes) -> dict[str, bytes]:
    total = b'"site.0.total":{"dtype":'
    return {
        "cut short": content[:-8],
        "empty": b"",
        "a pickle": pickle.dumps({"units": 3}),
        "of another version": content.replace(b'_statistics":"1"', b'_statistics":"2"'),
        "no JSON": content.replace(b'"document":"{', b'"document":"!'),
        "without an array": content.replace(b'"site.0.total"', b'"site.9.total"'),
        "of whole numbers": content.replace(total + b'"F64"', total + b'"I64"'),
    }


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    model, graph, data, options = build("conv, inputs alone")
    path = tmp_path / "sums.safetensors"
    prunus.collect(model, graph, data, path=path, **options)
    content = path.read_bytes()
    for name, damaged in broken(content).items():
        assert damaged != content, name
        path.write_bytes(damaged)
        with pytest.raises(FormatError, match="is no file of statistics, or damaged"):
            prunus.collect(model, graph, data, path=path, **options)


def test_a_place_where_nothing_can_be_written_is_told_before_the_pass(tmp_path: Path) -> None:
    model, graph, data, options = build("free")
    ran: list[int] = []
    for path in (tmp_path / "none" / "sums.safetensors", Path(os.devnull), tmp_path):
        with pytest.raises((FileError, FormatError)):
            prunus.collect(model, graph, data, path=path, progress=ran.append, **options)
    assert ran == []
    with pytest.raises(DataError, match="data is empty"):
        prunus.collect(model, graph, [], path=tmp_path / "sums.safetensors", **options)
    assert os.listdir(tmp_path) == []


# -- sharing ---------------------------------------------------------------------------------------


class Threads:
    """Stands in for processes: each of several threads has one of these."""

    def __init__(self, index: int, table: list[Any], barrier: threading.Barrier) -> None:
        self.num_processes, self.process_index = len(table), index
        self._table, self._barrier = table, barrier

    def reduce(self, tensor: Tensor, reduction: str = "sum") -> Tensor:
        assert reduction == "sum"
        self._table[self.process_index] = tensor
        self._barrier.wait(timeout=20)
        shapes = {(one.shape, one.dtype) for one in self._table}
        assert len(shapes) == 1
        whole = torch.stack(self._table).sum(0, dtype=tensor.dtype)
        self._barrier.wait(timeout=20)
        return whole


def in_threads(parts: list[Sums]) -> list[BaseException | None]:
    """Share these sums; what each thread has raised."""
    barrier, table = threading.Barrier(len(parts)), [None] * len(parts)
    raised: list[BaseException | None] = [None] * len(parts)

    def work(index: int) -> None:
        try:
            share(parts[index], Threads(index, table, barrier))
        except BaseException as error:
            raised[index] = error

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


@pytest.mark.parametrize("name", [name for name in CASES if name != "free"])
def test_shared_sums_are_those_of_one_pass(name: str) -> None:
    model, graph, data, options = build(name)
    options["positions"] = 36
    whole = prunus.collect(model, graph, data, **options)
    first, last = (prunus.collect(model, graph, part, **options) for part in (data[:2], data[2:]))
    # The first of three has no data, so that the shift is not always that of process 0.
    sums = [first._sums().blank(), last._sums(), first._sums()]
    assert in_threads(sums) == [None] * 3
    for one in sums:
        check_equal(prunus.Statistics._of(one), whole)


def test_parts_of_a_weight_are_told_by_one_of_those_who_have_used_them() -> None:
    label = np.array([[1], [2]])
    sums = [Sums(frozenset(["activation"]), 2, (Site("experts", "", label),)) for _ in range(2)]
    sums[0].sites[0].weights = {(0, 4): np.array([1.0, 2.0]), (32, 4): np.array([10.0, 20.0])}
    sums[1].sites[0].weights = {(64, 4): np.array([3.0, 4.0]), (32, 4): np.array([10.0, 20.0])}
    assert in_threads(sums) == [None, None]
    assert [one.sites[0].weight.tolist() for one in sums] == [[14.0, 26.0]] * 2


def test_processes_that_differ_are_all_told() -> None:
    needs, label = frozenset(["second_moment", "attention"]), np.array([[1], [2]])
    sums = []
    for columns in (2, 2, 1):
        site = Site("a", "", label, moments=Moments(1, 2, columns))
        sums.append(Sums(needs, 2, (site,), (Heads("b", -3, label),)))
    text = "do not collect the same\n.*sites: a, .*in 2 blocks in process 0, a, .* in process 2"
    for error in in_threads(sums):
        assert isinstance(error, PlanError)
        with pytest.raises(PlanError, match=text):
            raise error


def test_processes_draw_differently_and_the_first_as_one_alone() -> None:
    model, graph, data, options = build("free")

    def draws(index: int | None) -> np.ndarray:
        one = None if index is None else SimpleNamespace(num_processes=1, process_index=index)
        return prunus.collect(model, graph, data, accelerator=one, **options).units["head_gradient"]

    np.testing.assert_array_equal(draws(0), draws(None))
    assert (draws(1) != draws(0))[1:].all()


WORKER = """
import os, sys
import torch
from torch import distributed as dist
import prunus

rank, folder = int(os.environ["RANK"]), sys.argv[1]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
model, data = torch.load(f"{folder}/given.pt", weights_only=False)
graph = prunus.trace(model, data[0])
needs, path = ["gradient", "activation", "second_moment"], f"{folder}/sums.safetensors"
ran = []
assert prunus.collect(model, graph, data[:1], needs).samples == len(data[0])  # alone unless asked
first = prunus.collect(
    model, graph, data[:2] if rank else [], needs, path=path, accelerator="distributed"
)
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
for number, shared in enumerate(("distributed", accelerator)):
    found = prunus.collect(
        model, graph, data[:2] if rank else data[2:], needs, progress=ran.append, path=path,
        accelerator=shared,
    )
    (site,) = found.sites
    told = {
        "samples": found.samples,
        "loss": found.loss,
        "rows": site.moments.count,
        "fisher": torch.tensor(found.units["fisher"]),
        "square": torch.tensor(site.square),
        "weight": torch.tensor(site.weight),
        "second": site.moments.second(),
    }
    torch.save([first.samples, ran, told], f"{folder}/found-{rank}-{number}.pt")
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes_share_a_pass(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    data = [torch.randn(n, 4, dtype=torch.float64) + n for n in (3, 2, 3, 1)]
    torch.save([model, data], tmp_path / "given.pt")
    place = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path)],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for worker in workers:
        _, told = worker.communicate(timeout=240)
        assert worker.returncode == 0, told
    graph = prunus.trace(model, data[0])
    needs = ["gradient", "activation", "second_moment"]
    wanted = prunus.collect(model, graph, data, needs)
    (site,) = wanted.sites
    assert site.moments is not None
    for rank in range(2):
        for given in range(2):
            saved = torch.load(tmp_path / f"found-{rank}-{given}.pt")
            # Of its own file each knows what it has done, and nothing of the other's.
            assert saved[:2] == [5, [] if rank else [1, 2]]
            found = saved[2]
            assert (found["samples"], found["rows"]) == (9, 9)
            assert found["loss"] == pytest.approx(wanted.loss, rel=1e-12)
            for name, value in (
                ("fisher", wanted.units["fisher"]),
                ("square", site.square),
                ("weight", site.weight),
                ("second", site.moments.second()),
            ):
                np.testing.assert_allclose(found[name], value, rtol=1e-10, atol=1e-14)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == ["sums-1-of-2.safetensors", "sums-2-of-2.safetensors"]
