"""Replicas of what users reported failing in other engines, each with the number of its case.

The blocks are those of the libraries where the case names one, else written out as its users did.
They are small, have random weights, and run on a CPU in milliseconds.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, rnn

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

IMAGE = (2, 3, 8, 8)


@dataclass(frozen=True)
class Case:
    """One row of the table: a replica, and what of it can be pruned.

    ``prunable``: tensors whose first dim loses units.  ``pinned``: tensor → a word of the reason
    for which its first dim loses none.  ``by_witness`` is false where the second witness can't
    judge: the consumers' weights are computed, or an attention's products read what is removed.
    """

    number: str
    name: str
    build: Callable[[], nn.Module]
    prunable: Sequence[str] = ("first.weight",)
    pinned: tuple[tuple[str, str], ...] = ()
    shape: tuple[int, ...] = IMAGE
    inputs: Callable[[], Inputs] | None = None
    by_witness: bool = True

    def example(self) -> Inputs:
        """The arguments of the forward, by place and by name."""
        return ((torch.randn(self.shape),), {}) if self.inputs is None else self.inputs()


CASES: list[Case] = []


def case(number: str, *prunable: str, **options: Any) -> Callable[[Any], Any]:
    """Register the function that builds a replica."""

    def register(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        names = prunable or ("first.weight",)
        CASES.append(Case(number, build.__name__, build, names, **options))
        return build

    return register


class Net(nn.Module):
    """Layers by name, and a function as their forward."""

    def __init__(self, run: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Any:  # torch.fx can't take *args apart
        return self.run(self, x)


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def head(inputs: int) -> nn.Sequential:
    """From channels to ten numbers."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


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
    parametrizations.spectral_norm(model.get_submodule("second"))
    return model


@case("63", "first.weight", by_witness=False)
def orthogonal() -> nn.Module:
    model = simple(F.relu)
    parametrizations.orthogonal(model.get_submodule("third"))
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


# The blocks of YOLO, from ultralytics itself.


def _ultralytics(module: str) -> Any:
    return importlib.import_module(f"ultralytics.nn.modules.{module}")


def _behind(block: nn.Module, width: int, outputs: int) -> nn.Module:
    """A block between a convolution and a head."""

    def run(m: Any, x: Tensor) -> Tensor:
        out: Tensor = m.head(m.block(F.silu(m.first(x))))
        return out

    return Net(run, first=conv(3, width), block=block, head=head(outputs))


@case("1", "first.weight", "block.cv1.conv.weight", "block.cv2.conv.weight")
def ultralytics_c2f() -> nn.Module:
    return _behind(_ultralytics("block").C2f(12, 16, 2, True), 12, 16)


@case(
    "3", "first.weight", "block.attn.qkv.conv.weight", "block.ffn.0.conv.weight", by_witness=False
)
def ultralytics_psa() -> nn.Module:
    return _behind(_ultralytics("block").PSA(256, 256), 256, 256)


@case(
    "3",
    "first.weight",
    "block.m.0.attn.qkv.conv.weight",
    "block.m.0.ffn.0.conv.weight",
    by_witness=False,
)
def ultralytics_c2psa() -> nn.Module:
    return _behind(_ultralytics("block").C2PSA(256, 256), 256, 256)


@case(
    "4", "first.weight", "block.m.0.0.mlp.0.conv.weight",
    pinned=(("block.m.0.0.attn.qkv.conv.weight", "the code computes with this size"),),
)  # fmt: skip
def ultralytics_area_attention() -> nn.Module:
    return _behind(_ultralytics("block").A2C2f(64, 64, 1, True, 4), 64, 64)


@case("5", "first.weight", "block.cv1.conv.weight", "block.cv2.0.cv1.conv.weight")
def ultralytics_gelan() -> nn.Module:
    return _behind(_ultralytics("block").RepNCSPELAN4(12, 20, 16, 12, 1), 12, 20)


def _detector(kind: str, *settings: Any) -> nn.Module:
    """A head of YOLOv8 behind two levels of features."""

    def run(m: Any, x: Tensor) -> Any:
        x = F.silu(m.first(x))
        decoded, raw = m.detect([x, F.silu(m.second(x))])
        # The features come back as they went in, and as outputs they would have to stay.
        return decoded, {name: value for name, value in raw.items() if name != "feats"}

    detect = getattr(_ultralytics("head"), kind)(5, *settings, ch=(16, 24))
    detect.stride = torch.tensor([8.0, 16.0])
    return Net(run, first=conv(3, 16), second=conv(16, 24, stride=2), detect=detect)


@case("6", "first.weight", "second.weight", "detect.cv4.0.0.conv.weight", by_witness=False)
def ultralytics_pose_head() -> nn.Module:
    return _detector("Pose", (7, 3))


@case("6", "first.weight", "second.weight", "detect.cv4.0.0.conv.weight", by_witness=False)
def ultralytics_segment_head() -> nn.Module:
    return _detector("Segment", 8, 16)


@case("6", "first.weight", "second.weight", "detect.cv4.0.0.conv.weight", by_witness=False)
def ultralytics_obb_head() -> nn.Module:
    return _detector("OBB", 1)


class AnchoredDetect(nn.Module):
    """YOLOv5's, as its repository has it: anchors in a buffer, the last dim split in four."""

    def __init__(self, classes: int, anchors: Sequence[Sequence[float]], ch: Sequence[int]) -> None:
        super().__init__()
        self.nc, self.no, self.nl = classes, classes + 5, len(anchors)
        self.na = len(anchors[0]) // 2
        self.stride = torch.tensor([8.0, 16.0])
        self.register_buffer("anchors", torch.tensor(anchors).float().view(self.nl, -1, 2))
        self.m = nn.ModuleList(nn.Conv2d(x, self.no * self.na, 1) for x in ch)

    def forward(self, x: list[Tensor]) -> Tensor:
        z = []
        for i in range(self.nl):
            y = self.m[i](x[i])
            bs, _, ny, nx = y.shape
            y = y.view(bs, self.na, self.no, ny, nx).permute(0, 1, 3, 4, 2).contiguous()
            grid, anchor_grid = self._make_grid(nx, ny, i)
            xy, wh, conf = y.sigmoid().split((2, 2, self.nc + 1), 4)
            xy = (xy * 2 + grid) * self.stride[i]
            wh = (wh * 2) ** 2 * anchor_grid
            z.append(torch.cat((xy, wh, conf), 4).view(bs, self.na * nx * ny, self.no))
        return torch.cat(z, 1)

    def _make_grid(self, nx: int, ny: int, i: int) -> tuple[Tensor, Tensor]:
        shape = 1, self.na, ny, nx, 2
        yv, xv = torch.meshgrid(torch.arange(ny).float(), torch.arange(nx).float(), indexing="ij")
        grid = torch.stack((xv, yv), 2).expand(shape) - 0.5
        anchors: Any = self.anchors
        return grid, (anchors[i] * self.stride[i]).view((1, self.na, 1, 1, 2)).expand(shape)


@case("8", "first.weight", "second.weight")
def yolov5_detect_with_anchors() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = F.silu(m.first(x))
        out: Tensor = m.detect([x, F.silu(m.second(x))])
        return out

    anchors = ((10, 13, 16, 30, 33, 23), (30, 61, 62, 45, 59, 119))
    detect = AnchoredDetect(4, anchors, (16, 24))
    return Net(run, first=conv(3, 16), second=conv(16, 24, stride=2), detect=detect)


# PyTorch's own recurrent modules, attention and norms of weights.

SEQUENCE = (3, 4, 6)


def _wrapped(module: nn.Module, run: Callable[..., Any], width: int, outputs: int) -> nn.Module:
    """A module between two linear layers; ``run`` calls it."""

    def forward(m: Any, x: Tensor) -> Any:
        return m.last(run(m.module, m.first(x)))

    first, last = nn.Linear(6, width), nn.Linear(outputs, 5)
    return Net(forward, first=first, module=module, last=last)


def _first_output(module: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = module(x)[0]
    return out


def _packed(module: nn.Module, x: Tensor) -> Tensor:
    lengths = torch.tensor([3, 4, 2])
    sequence = rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    return rnn.pad_packed_sequence(module(sequence)[0], batch_first=True)[0]


@case("18", "first.weight", "module.weight_ih_l0", shape=SEQUENCE, by_witness=False)
def lstm_deep_both_ways() -> nn.Module:
    lstm = nn.LSTM(16, 12, 2, batch_first=True, bidirectional=True)
    return _wrapped(lstm, _first_output, 16, 24)


@case(
    "18",
    "first.weight",
    "module.weight_ih_l0",
    "module.weight_hr_l0",
    shape=SEQUENCE,
    by_witness=False,
)
def lstm_projected() -> nn.Module:
    return _wrapped(nn.LSTM(16, 12, proj_size=6, batch_first=True), _first_output, 16, 6)


@case("18", "first.weight", "module.weight_ih_l0", shape=SEQUENCE, by_witness=False)
def lstm_packed() -> nn.Module:
    return _wrapped(nn.LSTM(16, 12, batch_first=True), _packed, 16, 12)


@case("19", "first.weight", "module.weight_ih_l0", shape=SEQUENCE, by_witness=False)
def gru_deep_both_ways() -> nn.Module:
    gru = nn.GRU(16, 12, 2, batch_first=True, bidirectional=True)
    return _wrapped(gru, _first_output, 16, 24)


@case("19", "first.weight", "module.weight_ih_l0", shape=SEQUENCE, by_witness=False)
def gru_packed() -> nn.Module:
    return _wrapped(nn.GRU(16, 12, batch_first=True), _packed, 16, 12)


@case("20", "first.weight", "module.in_proj_weight", shape=SEQUENCE, by_witness=False)
def multihead_attention() -> nn.Module:
    module = nn.MultiheadAttention(16, 4, batch_first=True)
    return _wrapped(module, lambda m, x: x + m(x, x, x)[0], 16, 16)


@case(
    "20", "first.weight", "module.layers.0.self_attn.in_proj_weight",
    "module.layers.0.linear1.weight", shape=SEQUENCE,
    by_witness=False,
)  # fmt: skip
def transformer_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    module = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return _wrapped(module, lambda m, x: m(x), 16, 16)


@case("39", "first.weight", shape=SEQUENCE, by_witness=False)
def weight_norm_along_a_kernel() -> nn.Module:
    """wav2vec2's positional convolution, the norm as a parametrization."""
    layer = nn.Conv1d(16, 16, 4, padding=2, groups=4)
    module = parametrizations.weight_norm(layer, name="weight", dim=2)

    def run(m: nn.Module, x: Tensor) -> Tensor:
        return x + F.gelu(m(x.transpose(1, 2))[:, :, :-1].transpose(1, 2))

    return _wrapped(module, run, 16, 16)


# Attention, as several libraries and many users write it.


def _timm_module(name: str) -> Any:
    return importlib.import_module(f"timm.{name}")


@case(
    "21",
    "first.weight",
    "module.attn.qkv.weight",
    "module.mlp.fc1.weight",
    shape=SEQUENCE,
    by_witness=False,
)
def timm_block() -> nn.Module:
    module = _timm_module("models.vision_transformer").Block(16, 4, qkv_bias=True)
    return _wrapped(module, lambda m, x: m(x), 16, 16)


class EinsumAttention(nn.Module):
    """Heads by a view with stored sizes, the products by einsum."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.dim = heads, width // heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, self.heads, self.dim) for layer in (self.q, self.k, self.v))
        weights = torch.einsum("bnhd,bmhd->bhnm", q, k) / self.dim**0.5
        y = torch.einsum("bhnm,bmhd->bnhd", weights.softmax(-1), v)
        out: Tensor = self.out(y.reshape(b, n, self.heads * self.dim))
        return out


@case("22", "first.weight", "module.q.weight", "module.v.weight", shape=SEQUENCE, by_witness=False)
def einsum_attention() -> nn.Module:
    return _wrapped(EinsumAttention(16, 4), lambda m, x: x + m(x), 16, 16)


class GroupedQueryAttention(nn.Module):
    """Two query heads for every key head, the keys repeated in one of two ways."""

    def __init__(self, width: int, expanded: bool) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim, self.expanded = 8, 4, 4, expanded
        self.wq = nn.Linear(width, self.n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(width, self.n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(width, self.n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(self.n_heads * self.head_dim, width, bias=False)

    def repeat(self, x: Tensor) -> Tensor:
        times = self.n_heads // self.n_kv_heads
        if not self.expanded:
            return x.repeat_interleave(times, dim=2)
        b, n, heads, dim = x.shape
        return x[:, :, :, None].expand(b, n, heads, times, dim).reshape(b, n, heads * times, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.wq(x).view(b, n, self.n_heads, self.head_dim)
        k = self.repeat(self.wk(x).view(b, n, self.n_kv_heads, self.head_dim))
        v = self.repeat(self.wv(x).view(b, n, self.n_kv_heads, self.head_dim))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.wo(y.transpose(1, 2).reshape(b, n, -1))
        return out


@case(
    "23", "first.weight", "module.wq.weight", "module.wk.weight", shape=SEQUENCE, by_witness=False
)
def gqa_by_repeat_interleave() -> nn.Module:
    return _wrapped(GroupedQueryAttention(16, False), lambda m, x: x + m(x), 16, 16)


@case(
    "23", "first.weight", "module.wq.weight", "module.wk.weight", shape=SEQUENCE, by_witness=False
)
def gqa_by_expand() -> nn.Module:
    return _wrapped(GroupedQueryAttention(16, True), lambda m, x: x + m(x), 16, 16)


class PatchMerging(nn.Module):
    """Swin's: the four pixels of a patch, by strided slices, side by side in the channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        out: Tensor = self.reduction(self.norm(torch.cat(parts, -1)))
        return out


@case("24", "first.weight", "merge.reduction.weight")
def swin_patch_merging() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.merge(F.gelu(m.first(x)).permute(0, 2, 3, 1))
        out: Tensor = m.last(F.gelu(x).mean((1, 2)))
        return out

    return Net(run, first=conv(3, 12), merge=PatchMerging(12), last=nn.Linear(24, 5))


class TimedBlock(nn.Module):
    """A residual block of a diffusion U-Net: group norms, and the time added to the channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, inputs), conv(inputs, outputs)
        self.time = nn.Linear(12, outputs)
        self.norm2, self.conv2 = nn.GroupNorm(4, outputs), conv(outputs, outputs)
        self.skip = conv(inputs, outputs, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(F.silu(t))[:, :, None, None]
        out: Tensor = self.skip(x) + self.conv2(F.silu(self.norm2(h)))
        return out


class TimedUNet(nn.Module):
    """Down, up, and a shortcut by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 12))
        self.first = conv(3, 8)
        self.down, self.middle = TimedBlock(8, 16), TimedBlock(16, 16)
        self.up, self.last = TimedBlock(32, 8), conv(8, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        steps = t[:, None] * 2.0 ** torch.arange(4)
        emb = self.embed(torch.cat([steps.sin(), steps.cos()], -1))
        high = self.down(self.first(x), emb)
        low = F.interpolate(self.middle(F.avg_pool2d(high, 2), emb), scale_factor=2)
        out: Tensor = self.last(F.silu(self.up(torch.cat([low, high], 1), emb)))
        return out


@case(
    "25", "embed.0.weight", "down.conv1.weight", "middle.conv1.weight",
    inputs=lambda: ((torch.randn(2, 3, 8, 8), torch.tensor([0.3, 0.7])), {}),
)  # fmt: skip
def unet_with_time() -> nn.Module:
    return TimedUNet()


# Whole models of transformers, made small.

_TEXT = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 32,
}  # fmt: skip
_DECODER = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8, "use_cache": False,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
_IMAGES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
           "intermediate_size": 48, "image_size": 16, "patch_size": 4}  # fmt: skip


def _transformers(kind: str, **settings: Any) -> nn.Module:
    """A model of a class and the settings of its config."""
    found = getattr(importlib.import_module("transformers"), kind)
    model: nn.Module = found(found.config_class(**settings))
    return model


def _ids() -> Inputs:
    return (), {"input_ids": torch.randint(3, 60, (2, 7))}


def _pixels(side: int = 16) -> Callable[[], Inputs]:
    return lambda: ((), {"pixel_values": torch.randn(2, 3, side, side)})


@case(
    "40–47", "bert.encoder.layer.0.attention.self.query.weight",
    "bert.encoder.layer.0.intermediate.dense.weight", inputs=_ids,
    by_witness=False,
)  # fmt: skip
def hf_bert() -> nn.Module:
    return _transformers("BertForSequenceClassification", **_TEXT)


@case(
    "40–47",
    "transformer.h.0.attn.c_attn.bias",
    "transformer.h.0.mlp.c_fc.bias",
    inputs=_ids,
    by_witness=False,
)
def hf_gpt2() -> nn.Module:
    return _transformers(
        "GPT2LMHeadModel", vocab_size=60, n_embd=32, n_layer=1, n_head=4, n_positions=32,
        use_cache=False,
    )  # fmt: skip


@case(
    "40–47", "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight",
    inputs=_ids,
    by_witness=False,
)  # fmt: skip
def hf_llama() -> nn.Module:
    return _transformers("LlamaForCausalLM", **_DECODER)


@case(
    "40–47", "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight",
    inputs=_ids,
    by_witness=False,
)  # fmt: skip
def hf_qwen3() -> nn.Module:
    return _transformers("Qwen3ForCausalLM", **_DECODER)


def _ids_of_both() -> Inputs:
    ids = torch.randint(3, 60, (2, 9))
    return (), {"input_ids": ids, "decoder_input_ids": ids[:, :5], "use_cache": False}


@case(
    "40–47", "encoder.block.0.layer.0.SelfAttention.q.weight",
    "decoder.block.0.layer.2.DenseReluDense.wi.weight", inputs=_ids_of_both,
    by_witness=False,
)  # fmt: skip
def hf_t5() -> nn.Module:
    return _transformers(
        "T5ForConditionalGeneration", vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=1,
        num_decoder_layers=1, num_heads=4, decoder_start_token_id=0,
    )  # fmt: skip


@case(
    "40–47", "swin.encoder.layers.0.blocks.0.attention.q_proj.weight",
    "swin.encoder.layers.0.downsample.reduction.weight", inputs=_pixels(32),
    by_witness=False,
)  # fmt: skip
def hf_swin() -> nn.Module:
    return _transformers(
        "SwinForImageClassification", embed_dim=16, depths=[1, 1], num_heads=[2, 4],
        window_size=4, image_size=32, patch_size=4,
    )  # fmt: skip


@case("40–47", "decode_head.linear_fuse.weight", inputs=_pixels(64), by_witness=False)
def hf_segformer() -> nn.Module:
    return _transformers(
        "SegformerForSemanticSegmentation", depths=[1, 1, 1, 1], hidden_sizes=[16, 24, 32, 48],
        num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=32, num_labels=5,
    )  # fmt: skip


def _features_of_sound() -> Inputs:
    ids = torch.randint(3, 60, (2, 5))
    return (), {
        "input_features": torch.randn(2, 16, 32), "decoder_input_ids": ids, "use_cache": False,
    }  # fmt: skip


@case("40–47", "model.encoder.layers.0.fc1.weight", inputs=_features_of_sound, by_witness=False)
def hf_whisper() -> nn.Module:
    return _transformers(
        "WhisperForConditionalGeneration", vocab_size=60, d_model=32, encoder_layers=1,
        decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=16, max_source_positions=16,
        max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip


@case("40–47", "backbone.layers.0.mixer.in_proj.weight", inputs=_ids, by_witness=False)
def hf_mamba() -> nn.Module:
    model = _transformers(
        "MambaForCausalLM", vocab_size=60, hidden_size=32, state_size=4, num_hidden_layers=1,
        use_cache=False,
    )  # fmt: skip
    with torch.no_grad():  # at initialisation the state has next to no say in the outputs
        model.get_parameter("backbone.layers.0.mixer.x_proj.weight").mul_(20)
    return model


@case(
    "48",
    "vit.layers.0.attention.q_proj.weight",
    "vit.layers.0.mlp.fc1.weight",
    inputs=_pixels(),
    by_witness=False,
)
def hf_vit() -> nn.Module:
    return _transformers("ViTForImageClassification", **_IMAGES)


@case(
    "48", "dinov2.encoder.layer.0.attention.q_proj.weight",
    "dinov2.encoder.layer.0.mlp.fc1.weight", inputs=_pixels(),
    by_witness=False,
)  # fmt: skip
def hf_dinov2() -> nn.Module:
    return _transformers("Dinov2ForImageClassification", **_IMAGES)


@case(
    "48", "vision_model.encoder.layers.0.self_attn.k_proj.weight",
    "vision_model.encoder.layers.0.mlp.fc1.weight", inputs=_pixels(),
    by_witness=False,
)  # fmt: skip
def hf_clip_vision() -> nn.Module:
    return _transformers("CLIPVisionModelWithProjection", **_IMAGES, projection_dim=24)


# Larger designs, written out.


class Queries(nn.Module):
    """DETR's: queries of the model's own look at features; class and box of each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = conv(3, 20, stride=2)
        self.project = conv(20, width, 1)
        self.query_embed = nn.Embedding(5, width)
        layer = nn.TransformerDecoderLayer(width, 4, 24, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 1)
        self.class_embed = nn.Linear(width, 4)
        self.bbox_embed = nn.Sequential(nn.Linear(width, 14), nn.ReLU(), nn.Linear(14, 4))
        self.pos = nn.Parameter(torch.randn(16, width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.project(F.relu(self.first(x))).flatten(2).transpose(1, 2) + self.pos
        query = self.query_embed.weight.unsqueeze(0).repeat(x.shape[0], 1, 1)
        y = self.decoder(query, x)
        return self.class_embed(y), self.bbox_embed(y).sigmoid()


@case(
    "54", "first.weight", "bbox_embed.0.weight", "decoder.layers.0.linear1.weight", by_witness=False
)
def detr_decoder() -> nn.Module:
    return Queries(16)


class Pyramid(nn.Module):
    """RetinaNet's design: lateral convolutions, a top-down path, one head for all levels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (
            conv(3, 12),
            conv(12, 16, stride=2),
            conv(16, 20, stride=2),
        )
        self.lateral = nn.ModuleList(conv(width, 14, 1) for width in (12, 16, 20))
        self.smooth = nn.ModuleList(conv(14, 14) for _ in range(3))
        self.tower = nn.Sequential(conv(14, 14), nn.ReLU(), conv(14, 14), nn.ReLU())
        self.score, self.box = conv(14, 2 * 3), conv(14, 2 * 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        levels = [F.relu(self.first(x))]
        for layer in (self.second, self.third):
            levels.append(F.relu(layer(levels[-1])))
        merged = [layer(level) for layer, level in zip(self.lateral, levels, strict=True)]
        for i in (1, 0):
            merged[i] = merged[i] + F.interpolate(merged[i + 1], scale_factor=2, mode="nearest")
        scores, boxes = [], []
        for layer, level in zip(self.smooth, merged, strict=True):
            y = self.tower(layer(level))
            scores.append(self.score(y).permute(0, 2, 3, 1).reshape(y.shape[0], -1, 3))
            boxes.append(self.box(y).permute(0, 2, 3, 1).reshape(y.shape[0], -1, 4))
        return torch.cat(scores, 1), torch.cat(boxes, 1)


@case("55", "first.weight", "third.weight", "lateral.0.weight", "tower.0.weight")
def pyramid_with_shared_heads() -> nn.Module:
    return Pyramid()


class RearrangingViT(nn.Module):
    """vit-pytorch's, each of einops' rearrangements as the reshape and permute that it does."""

    def __init__(self, dim: int = 16, heads: int = 4, dim_head: int = 6, side: int = 4) -> None:
        super().__init__()
        self.heads, self.scale, self.side = heads, dim_head**-0.5, side
        self.to_patch = nn.Sequential(
            nn.LayerNorm(3 * side**2), nn.Linear(3 * side**2, dim), nn.LayerNorm(dim)
        )
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embedding = nn.Parameter(torch.randn(1, 5, dim))
        self.norm = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, heads * dim_head * 3, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim)
        self.ff = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 24), nn.GELU(), nn.Linear(24, dim)
        )
        self.head = nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        p, h, w = self.side, height // self.side, width // self.side
        # rearrange(x, "b c (h p1) (w p2) -> b (h w) (p1 p2 c)")
        x = x.reshape(b, c, h, p, w, p).permute(0, 2, 4, 3, 5, 1).reshape(b, h * w, p * p * c)
        x = torch.cat([self.cls_token.expand(b, -1, -1), self.to_patch(x)], 1) + self.pos_embedding
        q, k, v = (
            # rearrange(t, "b n (h d) -> b h n d")
            t.reshape(b, t.shape[1], self.heads, -1).permute(0, 2, 1, 3)
            for t in self.to_qkv(self.norm(x)).chunk(3, dim=-1)
        )
        y = (q @ k.transpose(-1, -2) * self.scale).softmax(-1) @ v
        # rearrange(y, "b h n d -> b n (h d)")
        x = x + self.to_out(y.permute(0, 2, 1, 3).reshape(b, y.shape[2], -1))
        x = x + self.ff(x)
        out: Tensor = self.head(x[:, 0])
        return out


@case("56", "to_qkv.weight", "ff.1.weight", "to_patch.1.weight", by_witness=False)
def vit_of_rearrangements() -> nn.Module:
    return RearrangingViT()


class TiedModel(nn.Module):
    """The embedding is the LM head as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.lm_head = nn.Linear(16, 30, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        out: Tensor = self.lm_head(x + self.down(F.gelu(self.up(x))))
        return out


@case(
    "59", "up.weight", "down.weight",
    inputs=lambda: ((torch.randint(0, 30, (2, 7)),), {}),
)  # fmt: skip
def tied_embeddings() -> nn.Module:
    return TiedModel()


@case("60", "first.weight")
def compiled() -> nn.Module:
    """``torch.compile``d, by the backend that needs no C++ compiler."""
    model: Any = torch.compile(simple(F.relu), backend="eager")
    return model  # type: ignore[no-any-return]


@case(
    "60", "first.weight", inputs=lambda: ((torch.randn(IMAGE).bfloat16(),), {}),
)  # fmt: skip
def in_bfloat16() -> nn.Module:
    return simple(F.relu).bfloat16()
