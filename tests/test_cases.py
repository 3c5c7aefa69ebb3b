"""Cases that users reported failing in other engines: convolutional ones, by their numbers.

Every row ends *exact*, or keeps what it can't prune and says why, by operator and source line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunus.graph.coupling import CouplingGraph
from prunus.plans import Plan
from prunus.surgeon import apply
from prunus.tracer.trace import trace
from tests.faults import Net, conv, head
from tests.pipeline import judge, plan_for, thin

IMAGE = (2, 3, 8, 8)


@dataclass(frozen=True)
class Case:
    """One row of the table: a replica, and what of it can be pruned.

    ``prunable``: tensors whose first dim loses units.  ``pinned``: tensor → a word of the reason
    for which its first dim loses none.  ``by_witness`` is false where the second witness can't
    judge, because the consumers' weights are computed.
    """

    number: str
    build: Callable[[], nn.Module]
    prunable: Sequence[str] = ("first.weight",)
    pinned: tuple[tuple[str, str], ...] = ()
    shape: tuple[int, ...] = IMAGE
    by_witness: bool = True


CASES: list[Case] = []


def case(number: str, *prunable: str, **options: Any) -> Callable[[Any], Any]:
    """Register the function that builds a replica."""

    def register(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        names = prunable or ("first.weight",)
        CASES.append(Case(f"{number} {build.__name__}", build, names, **options))
        return build

    return register


def simple(act: Callable[[Tensor], Tensor], width: int = 12, after: int = 12) -> nn.Module:
    """A convolution, something done to its channels, two more."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.second(act(m.first(x))))
        out: Tensor = m.head(F.relu(m.third(x)))
        return out

    return Net(run, first=conv(3, width), second=conv(after, 8), third=conv(8, 8), head=head(8))


class C2f(nn.Module):
    """YOLOv8's block, the halves taken by chunk or by split with the stored width."""

    def __init__(self, chunked: bool) -> None:
        super().__init__()
        self.c = 8
        self.first, self.cv2 = conv(3, 16, 1), conv(32, 12, 1)
        self.m = nn.ModuleList(conv(8, 8) for _ in range(2))
        self.head, self.chunked = head(12), chunked

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.first(x))
        y = list(x.chunk(2, 1)) if self.chunked else list(x.split((self.c, self.c), 1))
        for block in self.m:
            y.append(y[-1] + F.silu(block(y[-1])))
        out: Tensor = self.head(F.silu(self.cv2(torch.cat(y, 1))))
        return out


@case("1", "first.weight", "cv2.weight", "m.0.weight")
def c2f_with_chunk() -> nn.Module:
    return C2f(chunked=True)


@case("2", "first.weight", "cv2.weight", "m.0.weight")
def c2f_with_stored_width() -> nn.Module:
    return C2f(chunked=False)


@case("10")
def pixel_shuffle() -> nn.Module:
    return simple(lambda x: F.pixel_shuffle(x, 2), width=24, after=6)


@case("10")
def pixel_unshuffle() -> nn.Module:
    return simple(lambda x: F.pixel_unshuffle(x, 2), width=12, after=48)


@case("11", "first.weight")
def spatial_gate() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.first(x))
        out: Tensor = m.head(F.relu(m.second(torch.sigmoid(m.gate(x)) * x)))
        return out

    return Net(run, first=conv(3, 12), gate=conv(12, 1), second=conv(12, 9), head=head(9))


@case("12")
def the_same_tensor_twice() -> nn.Module:
    return simple(lambda x: torch.cat([x, x], 1), after=24)


@case("14", "first.weight", "wide.weight", shape=(2, 3, 6, 6))
def flatten() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        out: Tensor = m.last(F.relu(m.wide(F.relu(m.first(x)).flatten(1))))
        return out

    return Net(run, first=conv(3, 8), wide=nn.Linear(288, 12), last=nn.Linear(12, 5))


@case("15", "first.weight", "wide.weight", shape=(2, 3, 6, 6))
def flatten_channels_last() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.first(x)).permute(0, 2, 3, 1)
        x = F.relu(m.wide(x.reshape(x.shape[0], -1)))
        out: Tensor = m.last(x)
        return out

    return Net(run, first=conv(3, 8), wide=nn.Linear(288, 12), last=nn.Linear(12, 5))


@case("16", "first.weight", "up.weight", shape=(2, 10))
def linear_to_transposed_convolution() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.first(x)).view(-1, m.width, 4, 4)
        out: Tensor = m.last(F.relu(m.up(x)))
        return out

    model = Net(
        run,
        first=nn.Linear(10, 12 * 16),
        up=nn.ConvTranspose2d(12, 8, 2, 2),
        last=conv(8, 3),
    )
    model.width = 12  # type: ignore[assignment]
    return model


@case("26", "first.weight", "reduce.weight", "grouped.weight")
def resnext_block() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.first(x))
        y = F.relu(m.bn(m.grouped(F.relu(m.reduce(x)))))
        out: Tensor = m.head(F.relu(x + m.expand(y)))
        return out

    return Net(
        run,
        first=conv(3, 12),
        reduce=conv(12, 16, 1),
        grouped=conv(16, 16, groups=4),
        bn=nn.BatchNorm2d(16),
        expand=conv(16, 12, 1),
        head=head(12),
    )


def _shuffle(x: Tensor, groups: int = 3) -> Tensor:
    batch, channels, height, width = x.shape
    x = x.view(batch, groups, channels // groups, height, width)
    return x.transpose(1, 2).contiguous().view(batch, channels, height, width)


@case("27")
def channel_shuffle_by_views() -> nn.Module:
    return simple(_shuffle)


@case("27")
def channel_shuffle_as_a_module() -> nn.Module:
    return simple(nn.ChannelShuffle(4))


@case("27", "first.weight", "left.weight")
def shuffle_unit() -> nn.Module:
    """ShuffleNetV2: split in halves, convolve one, join, shuffle; twice."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.first(x))
        for layer in (m.left, m.right):
            a, b = x.chunk(2, 1)
            x = _shuffle(torch.cat([a, F.relu(layer(b))], 1), 2)
        out: Tensor = m.head(F.relu(m.last(x)))
        return out

    return Net(
        run,
        first=conv(3, 24),
        left=conv(12, 12),
        right=conv(12, 12),
        last=conv(24, 9),
        head=head(9),
    )


@case("28")
def one_output_channel() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        out: Tensor = m.one(F.relu(m.second(F.relu(m.first(x)))))
        return out

    return Net(run, first=conv(3, 10), second=conv(10, 8), one=conv(8, 1))


@case("29", "first.weight", "twice.weight")
def a_module_used_twice() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.first(x))
        x = F.relu(m.twice(F.relu(m.twice(x))))
        out: Tensor = m.head(x)
        return out

    return Net(run, first=conv(3, 12), twice=conv(12, 12), head=head(12))


@case("30", "first.weight", "second.weight")
def frozen_backbone() -> nn.Module:
    model = simple(F.relu)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head"))
    return model


class FrozenBatchNorm2d(nn.Module):
    """Detectron's and torchvision's: four buffers, no parameter."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.rand(size) + 0.5)
        self.register_buffer("bias", torch.randn(size))
        self.register_buffer("running_mean", torch.randn(size))
        self.register_buffer("running_var", torch.rand(size) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
        scale = weight * (self.running_var.reshape(1, -1, 1, 1) + 1e-5).rsqrt()
        return x * scale + (bias - self.running_mean.reshape(1, -1, 1, 1) * scale)


@case("31")
def frozen_batch_norm() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        out: Tensor = m.head(F.relu(m.second(F.relu(m.norm(m.first(x))))))
        return out

    return Net(run, first=conv(3, 12), norm=FrozenBatchNorm2d(12), second=conv(12, 9), head=head(9))


class ConvNeXtBlock(nn.Module):
    """Depthwise 7×7, layer norm and an MLP over channels last, LayerScale, a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.filter = conv(width, width, 7, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(1e-6 * torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.filter(x).permute(0, 2, 3, 1))
        y = self.gamma * self.down(F.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


@case("32", "0.weight", "1.up.weight")
def convnext_block() -> nn.Module:
    return nn.Sequential(conv(3, 12), ConvNeXtBlock(12), head(12))


class OwnActivation(torch.autograd.Function):
    """A memory-saving SiLU, as many repositories carry one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate = x.sigmoid()
        return grads[0] * gate * (1 + x * (1 - gate))


@case("33")
def own_autograd_function() -> nn.Module:
    return simple(OwnActivation.apply)


class PartialConvolution(nn.Module):
    """FasterNet's: a quarter of the channels is convolved, the rest passes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.touched, self.rest = width // 4, width - width // 4
        self.part = conv(self.touched, self.touched, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.split(x, [self.touched, self.rest], 1)
        return torch.cat([self.part(a), b], 1)


@case("34", "first.weight", "second.weight")
def partial_convolution() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        x = x + m.last(F.relu(m.second(m.partial(x))))
        out: Tensor = m.head(x)
        return out

    return Net(
        run,
        first=conv(3, 16),
        partial=PartialConvolution(16),
        second=conv(16, 20, 1),
        last=conv(20, 16, 1),
        head=head(16),
    )


@case("36", "first.weight", "expand.weight", "down.weight")
def mobilenet_v3_block() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = F.hardswish(m.first(x))
        y = F.hardswish(m.norm(m.filter(F.hardswish(m.expand(x)))))
        gate = F.hardsigmoid(m.up(F.relu(m.down(F.adaptive_avg_pool2d(y, 1)))))
        out: Tensor = m.head(x + m.project(gate * y))
        return out

    return Net(
        run,
        first=conv(3, 10),
        expand=conv(10, 20, 1),
        filter=conv(20, 20, groups=20),
        norm=nn.BatchNorm2d(20),
        down=conv(20, 8, 1),
        up=conv(8, 20, 1),
        project=conv(20, 10, 1),
        head=head(10),
    )


@case("37", "first.weight", "lower.weight", "high.weight")
def hrnet_exchange() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        high = F.relu(m.first(x))
        low = F.relu(m.lower(high))
        high, low = F.relu(m.high(high)), F.relu(m.low(low))
        fused = high + F.interpolate(m.up(low), scale_factor=2, mode="nearest")
        lower = low + m.down(high)
        out: Tensor = m.head(torch.cat([F.relu(fused), F.interpolate(F.relu(lower), (8, 8))], 1))
        return out

    return Net(
        run,
        first=conv(3, 10),
        lower=conv(10, 14, stride=2),
        high=conv(10, 10),
        low=conv(14, 14),
        up=conv(14, 10, 1),
        down=conv(10, 14, stride=2),
        head=head(24),
    )


class CausalConv3d(nn.Module):
    """Padded on the past side of time only, with the first frame."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, 3, padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x[:, :, :1].expand(-1, -1, 2, -1, -1), x], 2)
        out: Tensor = self.conv(F.pad(x, (0, 0, 0, 0, 0, 0)))
        return out


@case("38", "first.conv.weight", shape=(2, 3, 4, 6, 6))
def causal_conv3d() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = F.silu(m.second(F.silu(m.norm(m.first(x)))))
        out: Tensor = m.last(x.mean((2, 3, 4)))
        return out

    return Net(
        run,
        first=CausalConv3d(3, 12),
        norm=nn.BatchNorm3d(12),
        second=CausalConv3d(12, 9),
        last=nn.Linear(9, 5),
    )


@case("61", "second.weight", pinned=(("first.weight", "rolled"),))
def roll_along_channels() -> nn.Module:
    return simple(lambda x: torch.roll(x, 5, 1))


@case("61")
def flip_along_channels() -> nn.Module:
    return simple(lambda x: x.flip(1))


@case("61")
def roll_over_space() -> nn.Module:
    return simple(lambda x: torch.roll(x, (1, 2), (2, 3)))


class PlainLinear(nn.Linear):
    """Adds nothing."""


class PlainConv(nn.Conv2d):
    """Adds nothing."""


@case("62", "first.weight", "wide.weight")
def subclasses_that_add_nothing() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        out: Tensor = m.last(F.relu(m.wide(F.relu(m.first(x)).mean((2, 3)))))
        return out

    return Net(run, first=PlainConv(3, 12, 3), wide=PlainLinear(12, 16), last=PlainLinear(16, 5))


@case("63", "first.weight", pinned=(), by_witness=False)
def spectral_norm() -> nn.Module:
    model = simple(F.relu)
    nn.utils.parametrizations.spectral_norm(model.get_submodule("second"))
    return model


@case("63", "first.weight", by_witness=False)
def orthogonal() -> nn.Module:
    model = simple(F.relu)
    nn.utils.parametrizations.orthogonal(model.get_submodule("third"))
    return model


@torch.library.custom_op("prunus_cases::sort_channels", mutates_args=())
def sort_channels(x: Tensor) -> Tensor:
    """Neither elementwise nor known."""
    return x.sort(1).values


@sort_channels.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@case("64", "second.weight", pinned=(("first.weight", "no rule for prunus_cases.sort_channels"),))
def operator_of_torch_library() -> nn.Module:
    return simple(sort_channels)


def _graph(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> tuple[CouplingGraph, Plan]:
    model = build().eval()
    graph = trace(model, torch.randn(shape))
    return graph, plan_for(graph, model, thin(graph))


@pytest.mark.parametrize("row", CASES, ids=lambda row: row.number)
def test_case(row: Case) -> None:
    judged = judge(row.build, torch.randn(row.shape))
    assert judged.caught_by == "", judged
    if row.by_witness and judged.testimony is not None:
        assert judged.testimony.verdict == "agrees", judged.testimony


@pytest.mark.parametrize("row", CASES, ids=lambda row: row.number)
def test_case_is_pruned_or_says_why(row: Case) -> None:
    graph, plan = _graph(row.build, row.shape)
    cut = {
        axis.tensor for axis in plan.keep if axis.dim == (1 if axis.tensor.startswith("up.") else 0)
    }
    assert set(row.prunable) <= cut
    for name, reason in row.pinned:
        assert name not in cut
        pins = graph.why_pinned(name)
        assert any(reason in pin.reason for _, pin in pins), pins
        assert any("tests/test_cases.py" in pin.source for _, pin in pins), pins


def test_twice_the_same_tensor_iteratively() -> None:
    """Case 12: prune, trace what is left, prune again, three times."""
    model, x = the_same_tensor_twice().eval(), torch.randn(IMAGE)
    widths = []
    for seed in range(3):
        graph = trace(model, x)
        apply(plan_for(graph, model, thin(graph, seed=seed)), model)
        widths.append(model.get_parameter("first.weight").shape[0])
        assert model.get_parameter("second.weight").shape[1] == 2 * widths[-1]
        assert model(x).shape == (2, 10)
    assert widths == sorted(set(widths), reverse=True)


def test_frozen_parameters_stay_frozen() -> None:
    """Case 30."""
    model = frozen_backbone().eval()
    graph = trace(model, torch.randn(IMAGE))
    apply(plan_for(graph, model, thin(graph)), model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "head.2.weight",
        "head.2.bias",
    }
