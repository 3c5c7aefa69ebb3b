"""What only a GPU can show: proofs, repairs and latency on CUDA; ``results/gpu.csv``.

    python -m benchmarks.exactness.gpu   # all, a few minutes; needs a GPU
    python -m benchmarks.exactness.gpu --check exactness

* *exactness*: 30 % of every group of a model on the GPU, proven there, and cut there and on the
  CPU by one plan; ``value`` is the relative error of the proof, ``other`` how far the two differ.
* *recovery*: the zoo's Fashion-MNIST network at half of its MACs, repaired on the GPU and on the
  CPU; ``value`` and ``other`` are the relative errors of the outputs that are left.
* *latency*: ``value`` is the measured part of the dense time, by a clock on the wall around
  synchronised forwards in turn, of a plan for the part asked for; ``other`` is the part that a
  MACs plan of the same importance takes whose MACs are that part.
* *two devices*: a model half of which lies on the CPU; what collecting says.

Where other versions of PyTorch are pinned than the GPU's machine has, ``--commit`` names the
sources, and the row says the version.
"""

from __future__ import annotations

import copy
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import models_zoo
import prunus
from benchmarks.rows import MissingError, Table, commit

TABLE = Table(
    "gpu.csv",
    (
        "check", "model", "setting", "verdict", "value", "other", "seconds", "gpu", "torch",
        "commit",
    ),
    ("check", "model", "setting"),
)  # fmt: skip
PAIRS = 21
CUDA = torch.device("cuda")
ZOO = (
    "resnet50", "mobilenetv2", "hrnet_w18_small", "yolov8n", "yolov3_tiny", "vit_tiny",
    "bert_tiny", "llama_tiny",
)  # fmt: skip


class Recurrent(nn.Module):
    """A recurrent layer whose cell is fused on a GPU, between two linear ones."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 20), nn.Linear(24, 5)
        self.middle = kind(20, 24, num_layers=2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.middle(self.first(x).relu())[0])
        return found


class Transposed(nn.Module):
    """Grouped and transposed convolutions, norms of groups and instances."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 24, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(24, 48, 3, padding=1, groups=4)
        self.norm = nn.GroupNorm(6, 48)
        self.up = nn.ConvTranspose2d(48, 16, 4, stride=2, padding=1)
        self.last = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.grouped(self.down(x).relu())).relu()
        found: Tensor = self.last(self.up(x).relu())
        return found


class Attending(nn.Module):
    """The encoder layer of PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
        self.last = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.encoder(x))
        return found


SMALL: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "lstm": lambda: (Recurrent(nn.LSTM), (torch.randn(3, 7, 12),)),
    "gru": lambda: (Recurrent(nn.GRU), (torch.randn(3, 7, 12),)),
    "rnn": lambda: (Recurrent(nn.RNN), (torch.randn(3, 7, 12),)),
    "transposed": lambda: (Transposed(), (torch.randn(2, 3, 16, 16),)),
    "encoder": lambda: (Attending(), (torch.randn(3, 7, 32),)),
}


def exactness() -> Iterator[dict[str, Any]]:
    """Every model proven on the GPU, and the cut on both devices compared."""
    for name in (*SMALL, *ZOO):
        torch.manual_seed(0)
        if name in SMALL:
            model, args = SMALL[name]()
        else:
            model, args = models_zoo.build(name), models_zoo.example_inputs(name)
        yield {"model": name, "setting": "30 % of every group"} | tried(prove, model.eval(), args)


def prove(model: nn.Module, args: Sequence[Any]) -> dict[str, Any]:
    there = copy.deepcopy(model).to(CUDA)
    inputs = tuple(a.to(CUDA) if isinstance(a, Tensor) else a for a in args)
    graph = prunus.trace(there, inputs)
    plan = prunus.plan(graph, there, ratio=0.3, importance="random")
    if not any(choice.removed for choice in plan.groups):
        return {"verdict": f"nothing to remove: {'; '.join(map(str, graph.unknown))}"}
    proof = prunus.verify(plan, there, inputs)
    cut, here = prunus.apply(plan, there), prunus.apply(plan, model)
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        answers = [leaves(cut(*inputs)), leaves(here(*args))]
    other = max(distance(a.cpu(), b) for a, b in zip(*answers, strict=True))
    said = proof.verdict + (f": {proof.reason}" if proof.reason else "")
    return {"verdict": said, "value": f"{proof.rel_err:.1e}", "other": f"{other:.1e}"}


def recovery() -> Iterator[dict[str, Any]]:
    """What ``shrink`` leaves of the output's error on either device."""
    yield {"model": "resnet_fmnist", "setting": "0.5 of MACs, recover=auto"} | tried(repair)


def repair() -> dict[str, Any]:
    from models_zoo.data import calibration, normalise

    model = models_zoo.build("resnet_fmnist", pretrained=True).eval()
    images = normalise(calibration().images)
    errors = []
    for device in (CUDA, torch.device("cpu")):
        dense = copy.deepcopy(model).to(device)
        batches = [batch.to(device) for batch in images.split(64)]
        smaller = copy.deepcopy(dense)
        prunus.shrink(
            smaller, batches[0][:2], budget=prunus.Budget(macs=0.5), importance="obs",
            data=batches, recover="auto",
        )  # fmt: skip
        with torch.no_grad():
            answers = [torch.cat([m(x) for x in batches]) for m in (dense, smaller)]
        errors.append(distance(*answers))
    return {"verdict": "repaired", "value": f"{errors[0]:.4f}", "other": f"{errors[1]:.4f}"}


def latency() -> Iterator[dict[str, Any]]:
    """Budgets of latency of ResNet-50 in batches that a GPU is busy with."""
    for dtype, batch in ((torch.float32, 64), (torch.float16, 256)):
        torch.manual_seed(0)
        model = models_zoo.build("resnet50").eval().to(CUDA)
        images = torch.randn(batch, 3, 224, 224, device=CUDA)
        prunus.recovery.recalibrate(model, [images])
        model, images = model.to(dtype), images.to(dtype)
        graph = prunus.trace(model, images)
        for share in (0.75, 0.5):
            setting = f"batch {batch}, {str(dtype).removeprefix('torch.')}, {share}"
            row = {"model": "resnet50", "setting": setting}
            yield row | tried(keep_time, model, images, graph, share)


def keep_time(model: nn.Module, images: Tensor, graph: Any, share: float) -> dict[str, Any]:
    ratios = []
    for budget in (prunus.Budget(latency=share), prunus.Budget(macs=share)):
        plan = prunus.plan(graph, model, budget=budget, scope="global")
        ratios.append(race(model, prunus.apply(plan, copy.deepcopy(model)), images))
    return {"verdict": "timed", "value": f"{ratios[0]:.4f}", "other": f"{ratios[1]:.4f}"}


def race(dense: nn.Module, pruned: nn.Module, images: Tensor) -> float:
    """Median of pruned ÷ dense, in turn."""
    found = []
    with torch.inference_mode():
        for _ in range(PAIRS + 2):
            taken = []
            for model in (dense, pruned):
                torch.cuda.synchronize()
                started = time.perf_counter()
                model(images)
                torch.cuda.synchronize()
                taken.append(time.perf_counter() - started)
            found.append(taken[1] / taken[0])
    return median(found[2:])


def two_devices() -> Iterator[dict[str, Any]]:
    """Calibration of a model that is spread over two devices."""
    yield {"model": "two linear layers", "setting": "one on the CPU"} | tried(spread)


def spread() -> dict[str, Any]:
    class Spread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4).to(CUDA)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.last(self.first(x).relu().to(CUDA))
            return found

    model, x = Spread(), torch.randn(5, 6)
    graph = prunus.trace(model, x)
    plan = prunus.plan(graph, model, ratio=0.5)
    verdict = prunus.verify(plan, model, x).verdict
    try:
        prunus.importance.collect(model, graph, [x], "second_moment")
    except prunus.PrunusError as error:
        return {"verdict": f"proof {verdict}; collect: {str(error).splitlines()[0]}"}
    return {"verdict": f"proof {verdict}; collected"}


def tried(make: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """The rest of a row, or what was raised."""
    started = time.perf_counter()
    try:
        row = make(*args)
    except Exception as error:  # the other checks go on
        traceback.print_exc()
        row = {"verdict": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    return row | {"seconds": f"{time.perf_counter() - started:.1f}"}


def leaves(answer: Any) -> list[Tensor]:
    """The tensors of an answer."""
    found = torch.utils._pytree.tree_leaves(answer)
    return [leaf for leaf in found if isinstance(leaf, Tensor)]


def distance(a: Tensor, b: Tensor) -> float:
    """‖b − a‖ ÷ ‖a‖."""
    return float((b.double() - a.double()).norm() / a.double().norm().clamp_min(1e-30))


CHECKS: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
    "exactness": exactness, "recovery": recovery, "latency": latency, "two devices": two_devices,
}  # fmt: skip


def main() -> None:
    """Run the checks, and replace their rows."""
    parser = TABLE.parser(__doc__)
    parser.add_argument("--check", action="append", choices=CHECKS)
    parser.add_argument("--commit", help="what to write where this is no repository")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise MissingError("a GPU")
    told = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": options.commit or commit(),
    }
    for check in options.check or CHECKS:
        for row in CHECKS[check]():
            options.table.add({"check": check} | row | told)


if __name__ == "__main__":
    main()
