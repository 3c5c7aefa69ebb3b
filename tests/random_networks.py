"""Random networks, drawn from a seed or by hypothesis, from blocks that real forwards are made of.

A network is built from a recipe, which is plain data: it can be printed, shrunk and kept as a
test.  A block is ``(name, option, inner blocks)``; a block that does not fit the tensor it would
get is left out, so that every recipe builds.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

Block = tuple[str, int, tuple[Any, ...]]
Made = Any
Choose = Callable[[Sequence[Any]], Any]

LARGEST = 30_000
"""A tensor with more elements ends the growth: the next block is left out."""

WIDEST = 64


@dataclass(frozen=True)
class Recipe:
    """All that there is to choose about a network.

    ``source`` is what the network reads: an image, tokens, or ids of tokens.
    """

    source: str = "image"
    width: int = 8
    image: tuple[Block, ...] = ()
    bridge: str = "pool"
    tokens: tuple[Block, ...] = ()
    head: str = "linear"
    output: str = "tensor"


class Part(nn.Module):
    """A function as the forward, and everything that it reads as an attribute."""

    def __init__(self, run: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            if type(part) is Tensor:
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *inputs: Any) -> Any:
        return self.run(self, *inputs)


class Chain(nn.Module):
    """Blocks one after another."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


class Network(nn.Module):
    """A stem, blocks on images, a bridge, blocks on tokens, a head."""

    def __init__(self, stages: Sequence[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.stages, self.head = nn.ModuleList(stages), head

    def forward(self, x: Tensor) -> Any:
        for stage in self.stages:
            x = stage(x)
        return self.head(x)


IMAGE: dict[str, Callable[..., Made]] = {}
TOKENS: dict[str, Callable[..., Made]] = {}
NESTED = ("residual", "concatenate", "gate_by", "parallel")


def block(*rooms: dict[str, Callable[..., Made]]) -> Callable[[Any], Any]:
    """Register a builder: from a sample of its input and an option to a module or None."""

    def register(build: Callable[..., Made]) -> Callable[..., Made]:
        for room in rooms:
            room[build.__name__.rstrip("_")] = build
        return build

    return register


def pick(options: Sequence[Any], k: int) -> Any:
    return options[k % len(options)]


def divisors(n: int) -> list[int]:
    """Those between 2 and n / 2; else 1."""
    return [d for d in range(2, n // 2 + 1) if n % d == 0][:4] or [1]


def channel_dim(x: Tensor) -> int:
    return 1 if x.dim() == 4 else -1


def shaped(value: Tensor, x: Tensor) -> Tensor:
    """A vector of channels, so that it broadcasts against the tensor."""
    return value[:, None, None] if x.dim() == 4 else value


def act(x: Tensor, k: int) -> Tensor:
    return pick([F.relu, F.silu, torch.tanh, lambda v: v, F.gelu], k)(x)


def project(x: Tensor, outputs: int, inputs: int | None = None) -> nn.Module:
    """A layer over the channels alone."""
    c = x.shape[channel_dim(x)] if inputs is None else inputs
    return nn.Conv2d(c, outputs, 1) if x.dim() == 4 else nn.Linear(c, outputs)


# Images only.


@block(IMAGE)
def conv(x: Tensor, k: int) -> Made:
    c = x.shape[1]
    out, size = pick([c, 12, 8, 16], k), pick([3, 1], k // 4)
    layer = nn.Conv2d(c, out, size, padding=size // 2, bias=k % 3 != 2)
    norm = pick([nn.Identity, lambda n: nn.BatchNorm2d(n), lambda n: nn.GroupNorm(4, n)], k // 2)
    if norm is not nn.Identity and out % 4:
        norm = nn.BatchNorm2d
    return Part(lambda m, v: act(m.norm(m.conv(v)), m.k), conv=layer, norm=norm(out), k=k)


@block(IMAGE)
def depthwise(x: Tensor, k: int) -> Made:
    c = x.shape[1]
    return nn.Conv2d(c, c * pick([1, 1, 2], k), 3, padding=1, groups=c)


@block(IMAGE)
def grouped(x: Tensor, k: int) -> Made:
    c = x.shape[1]
    g = pick(divisors(c), k)
    return nn.Conv2d(c, pick([c, 2 * g, 4 * g], k // 2), pick([1, 3], k), padding="same", groups=g)


@block(IMAGE)
def transposed(x: Tensor, k: int) -> Made:
    c = x.shape[1]
    g = pick([1, *divisors(c), c], k)
    return nn.ConvTranspose2d(c, pick([2 * g, 4 * g], k), 2, 2, groups=g)


@block(IMAGE)
def image_norm(x: Tensor, k: int) -> Made:
    c = x.shape[1]
    makers = [
        lambda: nn.BatchNorm2d(c),
        lambda: nn.GroupNorm(pick(divisors(c), k // 2), c),
        lambda: nn.InstanceNorm2d(c, affine=True),
        lambda: nn.InstanceNorm2d(c),
        lambda: nn.GroupNorm(1, c),
        lambda: nn.GroupNorm(c, c),
    ]
    return pick(makers, k)() if x.shape[2] * x.shape[3] > 1 else None


@block(IMAGE)
def norm_channels_last(x: Tensor, k: int) -> Made:
    c = x.shape[1]
    norm = pick([nn.LayerNorm, nn.RMSNorm], k)(c)
    return Part(lambda m, v: m.norm(v.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), norm=norm)


@block(IMAGE)
def norm_by_hand(x: Tensor, k: int) -> Made:
    def run(m: Any, v: Tensor) -> Tensor:
        u = v.mean(1, keepdim=True)
        s = (v - u).pow(2).mean(1, keepdim=True) if k % 2 else v.var(1, keepdim=True, correction=0)
        return (v - u) / torch.sqrt(s + 1e-2) * m.weight[:, None, None] + m.bias.view(1, -1, 1, 1)

    c = x.shape[1]
    return Part(run, weight=nn.Parameter(torch.ones(c)), bias=nn.Parameter(torch.zeros(c)))


@block(IMAGE)
def pixel_shuffle(x: Tensor, k: int) -> Made:
    if k % 2:
        return nn.PixelUnshuffle(2) if x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0 else None
    return nn.PixelShuffle(2) if x.shape[1] % 4 == 0 else None


@block(IMAGE)
def space_to_depth_by_views(x: Tensor, k: int) -> Made:
    def run(m: Any, v: Tensor) -> Tensor:
        b, c, h, w = v.shape
        v = v.view(b, c, h // 2, 2, w // 2, 2)
        order = (0, 3, 5, 1, 2, 4) if k % 2 else (0, 1, 3, 5, 2, 4)
        return v.permute(*order).reshape(b, c * 4, h // 2, w // 2)

    return Part(run) if x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0 else None


@block(IMAGE)
def patch_merging(x: Tensor, k: int) -> Made:
    def run(m: Any, v: Tensor) -> Tensor:
        v = v.permute(0, 2, 3, 1)
        corners = [v[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
        return m.reduction(m.norm(torch.cat(corners, -1))).permute(0, 3, 1, 2)

    c = x.shape[1]
    if x.shape[2] % 2 or x.shape[3] % 2:
        return None
    return Part(run, norm=nn.LayerNorm(4 * c), reduction=nn.Linear(4 * c, pick([8, 12, c], k)))


@block(IMAGE)
def pool(x: Tensor, k: int) -> Made:
    if min(x.shape[2:]) < 2:
        return nn.Upsample(scale_factor=2)
    return pick([nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2)], k)


@block(IMAGE)
def weight_standardised(x: Tensor, k: int) -> Made:
    def run(m: Any, v: Tensor) -> Tensor:
        w = m.conv.weight
        if k % 2:
            w = w - w.mean((1, 2, 3), keepdim=True)
            w = w / (w.std((1, 2, 3), keepdim=True) + 1e-3)
        else:
            w = F.batch_norm(
                w.reshape(1, m.conv.out_channels, -1), None, None, m.gain, training=True
            ).reshape_as(w)
        return F.conv2d(v, w, m.conv.bias, padding=1)

    out = pick([x.shape[1], 12], k // 2)
    gain = nn.Parameter(torch.ones(out))
    return Part(run, conv=nn.Conv2d(x.shape[1], out, 3, padding=1), gain=gain)


@block(IMAGE)
def tied_autoencoder(x: Tensor, k: int) -> Made:
    def run(m: Any, v: Tensor) -> Tensor:
        return F.conv_transpose2d(act(m.conv(v), k), m.conv.weight, m.bias, padding=1)

    c = x.shape[1]
    conv = nn.Conv2d(c, pick([8, 12], k), 3, padding=1)
    return Part(run, conv=conv, bias=nn.Parameter(torch.randn(c)) if k % 3 else None)


@block(IMAGE)
def unfolded(x: Tensor, k: int) -> Made:
    def run(m: Any, v: Tensor) -> Tensor:
        b, _, h, w = v.shape
        return m.layer(F.unfold(v, 3, padding=1).transpose(1, 2)).transpose(1, 2).view(b, -1, h, w)

    return Part(run, layer=nn.Linear(9 * x.shape[1], pick([8, 12], k)))


@block(IMAGE)
def dynamic_kernel(x: Tensor, k: int) -> Made:
    """A depthwise convolution whose kernels are computed, over the batch as groups."""

    def run(m: Any, v: Tensor) -> Tensor:
        b, c, h, w = v.shape
        kernel = m.make(v.mean((2, 3))).view(b * c, 1, 3, 3)
        return F.conv2d(v.reshape(1, b * c, h, w), kernel, padding=1, groups=b * c).view(b, c, h, w)

    c = x.shape[1]
    return Part(run, make=nn.Linear(c, 9 * c)) if c <= 24 else None


@block(IMAGE)
def conv_along_one_side(x: Tensor, k: int) -> Made:
    """The channels become the image's side and back: space over channels."""
    c, h = x.shape[1], x.shape[2]
    layer = nn.Conv2d(h, pick([h, 2 * h], k), 1)
    return Part(lambda m, v: m.conv(v.transpose(1, 2)).transpose(1, 2), conv=layer, c=c)


# Tokens only.


@block(TOKENS)
def token_norm(x: Tensor, k: int) -> Made:
    c = x.shape[-1]
    return pick([nn.LayerNorm(c), nn.RMSNorm(c), nn.LayerNorm(c, elementwise_affine=False)], k)


@block(TOKENS)
def rms_by_hand(x: Tensor, k: int) -> Made:
    def run(m: Any, v: Tensor) -> Tensor:
        return m.weight * v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + 1e-3)

    return Part(run, weight=nn.Parameter(torch.ones(x.shape[-1])))


class Attention(nn.Module):
    """Written as people write it, in the ways that an option chooses between."""

    def __init__(self, c: int, k: int) -> None:
        super().__init__()
        self.heads = pick([2, 4, 3, 1], k)
        self.shared = pick([1, 1, 2], k // 4) if self.heads % 2 == 0 else 1
        self.head_dim = pick([4, 6], k // 2)
        self.config = {"heads": self.heads, "sizes": [self.heads, self.head_dim]}
        self.k, self.joint = k, k % 5 in (0, 3)
        inner = self.heads * self.head_dim
        few = inner // self.shared
        if self.joint:
            self.shared = 1
            self.qkv = nn.Linear(c, 3 * inner, bias=k % 2 == 0)
        else:
            self.q, self.k_, self.v = nn.Linear(c, inner), nn.Linear(c, few), nn.Linear(c, few)
        self.norm = nn.LayerNorm(self.head_dim) if k % 7 == 3 else nn.Identity()
        self.scale = self.head_dim**-0.5
        self.proj = nn.Linear(inner, c)

    def split(self, x: Tensor) -> list[Tensor]:
        b, t, _ = x.shape
        if not self.joint:
            return [
                part(x).view(b, t, -1, self.config["sizes"][1]).transpose(1, 2)
                for part in (self.q, self.k_, self.v)
            ]
        way = self.k // 5 % 4
        if way == 0:
            whole = self.qkv(x).reshape(b, t, 3, self.heads, self.head_dim)
            return list(whole.permute(2, 0, 3, 1, 4).unbind(0))
        if way == 1:
            parts = self.qkv(x).chunk(3, dim=-1)
            return [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts]
        if way == 2:  # heads first, then q, k and v of each
            whole = self.qkv(x).view(b, t, self.config["heads"], 3 * self.head_dim)
            return list(whole.transpose(1, 2).split(self.head_dim, -1))
        whole = self.qkv(x).view(b, t, self.heads, -1, 3).permute(4, 0, 2, 1, 3)
        return [whole[0], whole[1], whole[2]]

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.split(x)
        q, k = self.norm(q), self.norm(k)
        if self.shared > 1 and self.k % 2:
            k, v = (part.repeat_interleave(self.shared, 1) for part in (k, v))
        elif self.shared > 1:
            k, v = (
                p[:, :, None].expand(b, p.shape[1], self.shared, t, p.shape[3]).reshape(
                    b, p.shape[1] * self.shared, t, p.shape[3]
                )
                for p in (k, v)
            )  # fmt: skip
        if self.k % 3 == 0:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.k % 2 == 0)
        elif self.k % 3 == 1:
            y = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        else:
            weights = torch.einsum("bhid,bhjd->bhij", q, k) / q.shape[-1] ** 0.5
            y = torch.einsum("bhij,bhjd->bhid", weights.softmax(-1), v)
        return self.proj(y.transpose(1, 2).reshape(b, t, -1))


@block(TOKENS)
def attention(x: Tensor, k: int) -> Made:
    return Attention(x.shape[-1], k)


@block(TOKENS)
def fused_attention(x: Tensor, k: int) -> Made:
    heads = pick(divisors(x.shape[-1]), k)
    layer = nn.MultiheadAttention(x.shape[-1], heads, batch_first=True, bias=k % 2 == 0)
    return Part(lambda m, v: v + m.attn(v, v, v, need_weights=k % 3 == 0)[0], attn=layer)


@block(TOKENS)
def encoder_layer(x: Tensor, k: int) -> Made:
    c = x.shape[-1]
    return nn.TransformerEncoderLayer(
        c, pick(divisors(c), k), 12, batch_first=True, norm_first=k % 2 == 0
    )


@block(TOKENS)
def linear_attention(x: Tensor, k: int) -> Made:
    def run(m: Any, v: Tensor) -> Tensor:
        q, key, value = (part(v) for part in (m.q, m.k, m.v))
        q, key = (q.softmax(-1), key.softmax(1)) if k % 2 else (F.elu(q) + 1, F.elu(key) + 1)
        return m.out(q @ (key.transpose(1, 2) @ value))

    c = x.shape[-1]
    q, key, v = (nn.Linear(c, n) for n in (10, 10, 6))
    return Part(run, q=q, k=key, v=v, out=nn.Linear(6, pick([c, 8], k)))


@block(TOKENS)
def rotary(x: Tensor, k: int) -> Made:
    """Rotated halves or pairs, then logits between positions."""

    def run(m: Any, v: Tensor) -> Tensor:
        def turn(u: Tensor) -> Tensor:
            if k % 2:
                a, b = u[..., : u.shape[-1] // 2], u[..., u.shape[-1] // 2 :]
                return u * m.cos + torch.cat([-b, a], -1) * m.sin
            a, b = u[..., ::2], u[..., 1::2]
            return u * m.cos + torch.stack([-b, a], -1).flatten(-2) * m.sin

        b, t, _ = v.shape
        q, key = (turn(part(v).view(b, t, m.heads, -1).transpose(1, 2)) for part in (m.q, m.k))
        y = (q @ key.transpose(-1, -2) * 0.5).softmax(-1) @ m.v(v).view(b, 1, t, -1)
        return m.out(y.transpose(1, 2).flatten(2))

    c, t = x.shape[-1], x.shape[1]
    angles = torch.arange(t)[:, None] * torch.tensor([1.0, 0.5, 0.25])
    whole = torch.cat([angles, angles], -1) if k % 2 else angles.repeat_interleave(2, -1)
    return Part(
        run,
        q=nn.Linear(c, 18),
        k=nn.Linear(c, 18),
        v=nn.Linear(c, 5),
        out=nn.Linear(15, c),
        cos=whole.cos(),
        sin=whole.sin(),
        heads=3,
    )


@block(TOKENS)
def recurrent(x: Tensor, k: int) -> Made:
    kind, c = pick([nn.LSTM, nn.GRU, nn.RNN], k), x.shape[-1]
    layer = kind(c, pick([6, c, 9], k // 3), num_layers=pick([1, 2], k // 2), batch_first=True,
                 bidirectional=k % 4 == 1)  # fmt: skip
    return Part(lambda m, v: m.rnn(v)[0], rnn=layer)


@block(TOKENS)
def conv1d(x: Tensor, k: int) -> Made:
    c = x.shape[-1]
    layer = nn.Conv1d(c, pick([c, 12], k), 3, padding=1, groups=pick([1, divisors(c)[0]], k // 2))
    if layer.out_channels % layer.groups:
        return None
    return Part(lambda m, v: m.conv(v.transpose(1, 2)).transpose(1, 2), conv=layer)


@block(TOKENS)
def token_mixing(x: Tensor, k: int) -> Made:
    t = x.shape[1]
    layers = nn.Sequential(nn.Linear(t, 10), nn.GELU(), nn.Linear(10, pick([t, t + 2], k)))
    return Part(lambda m, v: m.mix(v.transpose(1, 2)).transpose(1, 2), mix=layers)


@block(TOKENS)
def class_token(x: Tensor, k: int) -> Made:
    def run(m: Any, v: Tensor) -> Tensor:
        token = m.token.expand(v.shape[0], -1, -1) if k % 2 else m.token.repeat(v.shape[0], 1, 1)
        return torch.cat([token, v], 1) + m.positions

    t, c = x.shape[1:]
    positions = nn.Parameter(torch.randn(1, t + 1, c))
    return Part(run, token=nn.Parameter(torch.randn(1, 1, c)), positions=positions)


@block(TOKENS)
def ordered_tokens(x: Tensor, k: int) -> Made:
    """Tokens summed up, sorted, chosen by a score, or rolled."""

    def run(m: Any, v: Tensor) -> Tensor:
        way = k % 6
        if way == 0:
            return v.cumsum(1)
        if way == 1:
            return v.roll(1, 1)
        if way == 2:
            return v.sort(1).values
        if way == 3:
            return v.topk(2, 1).values
        score = m.score(v)
        if way == 4:
            order = score.topk(3, 1).indices.expand(-1, -1, v.shape[-1])
            return v.gather(1, order)
        index = score[..., 0].argsort(1)
        return torch.stack([row[at] for row, at in zip(v, index, strict=True)])

    c = x.shape[-1]
    return Part(run, score=nn.Linear(c, 1)) if x.shape[1] > 3 else None


@block(TOKENS)
def pooled_query(x: Tensor, k: int) -> Made:
    """Learned queries attend to the tokens."""

    def run(m: Any, v: Tensor) -> Tensor:
        return (m.queries @ m.key(v).transpose(1, 2)).softmax(-1) @ v

    return Part(run, queries=nn.Parameter(torch.randn(4, 7)), key=nn.Linear(x.shape[-1], 7))


@block(TOKENS)
def bilinear(x: Tensor, k: int) -> Made:
    def run(m: Any, v: Tensor) -> Tensor:
        if k % 2:
            return torch.einsum("bti,oij,btj->bto", m.a(v), m.core, m.b(v))
        return m.last((m.a(v)[..., :, None] * m.b(v)[..., None, :]).flatten(-2))

    c = x.shape[-1]
    core = nn.Parameter(torch.randn(6, 4, 5))
    last = nn.Linear(20, 6)
    return Part(run, a=nn.Linear(c, 4), b=nn.Linear(c, 5), core=core, last=last)


# Both.


@block(IMAGE, TOKENS)
def mlp(x: Tensor, k: int) -> Made:
    c = x.shape[channel_dim(x)]
    first, last = project(x, pick([12, 16, 9], k)), None
    last = project(x, pick([c, 8], k // 3), pick([12, 16, 9], k))
    return Part(lambda m, v: m.last(act(m.first(v), k)), first=first, last=last)


@block(IMAGE, TOKENS)
def gated(x: Tensor, k: int) -> Made:
    """SwiGLU and its kin: two layers, or the halves of one."""

    def run(m: Any, v: Tensor) -> Tensor:
        d = channel_dim(v)
        if k % 3 == 0:
            return m.last(F.silu(m.first(v)) * m.second(v))
        if k % 3 == 1:
            a, b = m.both(v).chunk(2, d)
        else:
            a, b = m.both(v).split(m.sizes, d) if k % 2 else m.both(v).split([10, 10], d)
        return m.last(a * b.sigmoid())

    c = x.shape[channel_dim(x)]
    parts = {"last": project(x, c, 10), "sizes": [10, 10]}
    if k % 3 == 0:
        return Part(run, first=project(x, 10), second=project(x, 10), **parts)
    return Part(run, both=project(x, 20), **parts)


@block(IMAGE, TOKENS)
def glu(x: Tensor, k: int) -> Made:
    c = x.shape[channel_dim(x)]
    return (
        Part(lambda m, v: F.glu(v, channel_dim(v)) if k % 2 else _halves(v)) if c % 2 == 0 else None
    )


def _halves(v: Tensor) -> Tensor:
    a, b = v.chunk(2, channel_dim(v))
    return a + b.tanh()


@block(IMAGE, TOKENS)
def unequal_split(x: Tensor, k: int) -> Made:
    def run(m: Any, v: Tensor) -> Tensor:
        d = channel_dim(v)
        if k % 3 == 0:
            a, b = v.split([m.rest, v.shape[d] - m.rest], d)
        elif k % 3 == 1:
            a, b = v.split([3, m.last.get("n")], d)
        else:
            a, b = v.narrow(d, 0, m.rest), v.narrow(d, m.rest, v.shape[d] - m.rest)
        return torch.cat([a, m.layer(b)] if k % 2 else [m.layer(b), a], d)

    c = x.shape[channel_dim(x)]
    if c <= 6:
        return None
    return Part(run, rest=3, last={"n": c - 3}, layer=project(x, 7, c - 3))


@block(IMAGE, TOKENS)
def shuffle(x: Tensor, k: int) -> Made:
    def run(m: Any, v: Tensor) -> Tensor:
        d = channel_dim(v)
        shape = v.shape
        if d == 1:
            v = v.view(shape[0], m.g, -1, *shape[2:]).transpose(1, 2)
        else:
            v = v.unflatten(-1, (m.g, shape[-1] // m.g)).transpose(-1, -2)
        return v.reshape(shape) if k % 2 else v.flatten(*((1, 2) if d == 1 else (-2, -1)))

    return Part(run, g=pick(divisors(x.shape[channel_dim(x)]), k // 2))


@block(IMAGE, TOKENS)
def heads_in_views(x: Tensor, k: int) -> Made:
    """Channels as heads × dims, something done per head, and back."""

    def run(m: Any, v: Tensor) -> Tensor:
        d = channel_dim(v)
        rest = v.shape[2:] if d == 1 else ()
        lead = v.shape[:1] if d == 1 else v.shape[:2]
        heads = m.sizes[0] if k % 2 else m.config["heads"]
        u = v.view(*lead, heads, m.dim if k % 3 else -1, *rest)
        at = len(lead)
        way = k // 2 % 6
        if way == 0:
            u = u * m.gain.view(-1, *(1,) * (u.dim() - at - 1))
        elif way == 1:
            u = F.normalize(u, dim=at + 1)
        elif way == 2:
            u = u.softmax(at)
        elif way == 3:
            u = u - u.mean(at, keepdim=True)
        elif way == 4:
            return u.amax(at)
        else:
            return u.sum(at + 1)
        return u.reshape(*lead, heads * u.shape[at + 1], *rest)

    c = x.shape[channel_dim(x)]
    h = pick(divisors(c), k // 3)
    gain = nn.Parameter(torch.randn(h))
    return Part(run, sizes=[h], config={"heads": h}, dim=c // h, gain=gain)


@block(IMAGE, TOKENS)
def hard_coded_view(x: Tensor, k: int) -> Made:
    c = x.shape[channel_dim(x)]
    g = pick(divisors(c), k)

    def run(m: Any, v: Tensor) -> Tensor:
        if v.dim() == 4:
            return v.view(-1, g, c // g, *v.shape[2:]).mean(1 + k % 2)
        return v.view(*v.shape[:-1], g, c // g).transpose(-1, -2).flatten(-2)

    return Part(run)


@block(IMAGE, TOKENS)
def gate(x: Tensor, k: int) -> Made:
    """Squeeze and excite, by a layer or by a little convolution over the channels."""

    def run(m: Any, v: Tensor) -> Tensor:
        s = v.mean((2, 3), keepdim=True) if v.dim() == 4 else v.mean(1, keepdim=True)
        if k % 3 == 2 and v.dim() == 4:
            s = m.small(s.squeeze(-1).transpose(1, 2)).transpose(1, 2).unsqueeze(-1)
            return v * s.sigmoid()
        return v * m.up(F.relu(m.down(s))).sigmoid().expand_as(v)

    c = x.shape[channel_dim(x)]
    if k % 3 == 2 and x.dim() == 4:
        return Part(run, small=nn.Conv1d(1, 1, 3, padding=1))
    return Part(run, down=project(x, 5), up=project(x, c, 5))


@block(IMAGE, TOKENS)
def by_parameter(x: Tensor, k: int) -> Made:
    c = x.shape[channel_dim(x)]
    value = nn.Parameter(torch.rand(c) + 0.5)
    ways: list[Any] = [
        lambda m, v: v * shaped(m.value, v),
        lambda m, v: v + shaped(m.value, v) * m.scalar,
        lambda m, v: v / (1 + shaped(m.value, v).abs()),
        lambda m, v: torch.where(v > shaped(m.value, v), v, 0.1 * v),
        lambda m, v: v * shaped(m.value.softmax(0), v),
        lambda m, v: torch.lerp(v, v.tanh(), shaped(m.value.sigmoid(), v)),
    ]
    return Part(pick(ways, k), value=value, scalar=nn.Parameter(torch.tensor(0.7)))


@block(IMAGE, TOKENS)
def prelu(x: Tensor, k: int) -> Made:
    return nn.PReLU(x.shape[1]) if x.dim() == 4 else nn.PReLU()


@block(IMAGE, TOKENS)
def over_channels(x: Tensor, k: int) -> Made:
    """What lets every channel see the others."""
    d = channel_dim(x)
    ways: list[Any] = [
        lambda m, v: v.softmax(d) * 3,
        lambda m, v: v * v.mean(d, keepdim=True),
        lambda m, v: v - v.amax(d, keepdim=True),
        lambda m, v: F.normalize(v, dim=d),
        lambda m, v: v.cumsum(d),
        lambda m, v: v / (v.std(d, keepdim=True) + 0.1),
        lambda m, v: v * (v.max(d, keepdim=True)[0] - v.min(d, keepdim=True).values),
        lambda m, v: v - torch.logsumexp(v, d, keepdim=True),
        lambda m, v: v.log_softmax(d),
        lambda m, v: v * v.square().sum(d, keepdim=True).rsqrt().clamp(max=3),
        lambda m, v: v * (v.argmax(d, keepdim=True) > 1),
        lambda m, v: v / v.shape[d] ** 0.5,
        lambda m, v: v.sum(d, keepdim=True) / v.shape[d] + v,
        lambda m, v: v.sort(d).values,
        lambda m, v: (
            v
            * torch.cat([v.mean(d, keepdim=True), v.amax(d, keepdim=True)], d)
            .mean(d, keepdim=True)
            .sigmoid()
        ),
        lambda m, v: v.softmax(d).cumsum(1 if d == -1 else 2),
        lambda m, v: v - v.median(d, keepdim=True).values,
        lambda m, v: v * v.norm(dim=d, keepdim=True),
    ]
    return Part(pick(ways, k))


@block(IMAGE, TOKENS)
def rearranged(x: Tensor, k: int) -> Made:
    """Channels moved, dropped, doubled, padded."""
    d, c = channel_dim(x), x.shape[channel_dim(x)]
    low = torch.arange(c)[:: pick([2, 1], k)].flip(0)
    padding = (0, 0, 0, 0, 2, 1) if d == 1 else (2, 1)
    ways: list[Any] = [
        lambda m, v: v.roll(2, d),
        lambda m, v: v.flip(d),
        lambda m, v: F.pad(v, padding),
        lambda m, v: v[:, ::2] if d == 1 else v[..., 1::2],
        lambda m, v: v.index_select(d, m.index),
        lambda m, v: v[:, m.index] if d == 1 else v[..., m.index],
        lambda m, v: v.repeat_interleave(2, d),
        lambda m, v: v.repeat(1, 2, 1, 1) if d == 1 else v.repeat(1, 1, 2),
        lambda m, v: torch.cat([v, v.relu()], d),
        lambda m, v: v[:, : c // 2] if d == 1 else v[..., c // 2 :],
        lambda m, v: v[:, : m.half] if d == 1 else v[..., -m.half :],
        lambda m, v: torch.stack([v, v.tanh()], 2 if d == 1 else -1).flatten(
            *((1, 2) if d == 1 else (-2, -1))
        ),
        lambda m, v: v.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2) if d == 1
        else v.unsqueeze(-2).expand(-1, -1, 2, -1).flatten(2),
        lambda m, v: torch.cat([v[:, 2:], v[:, :2]], 1) if d == 1
        else torch.cat([v[..., m.half :], v[..., : m.half]], -1),
        lambda m, v: v.unfold(d, 3, 2).mean(-1) if d == 2 else v + v.flip(d),
        lambda m, v: sum(v.chunk(2, d)) if c % 2 == 0 else v,
        lambda m, v: torch.cat([p.relu() for p in v.chunk(3, d)][::-1], d),
        lambda m, v: v * torch.cat([m.ones, -m.ones]).view(-1, *(1,) * (2 if d == 1 else 0))
        if c % 2 == 0 else v,
        lambda m, v: torch.cat([v, v.new_zeros(v.shape[0], 3, *v.shape[2:])], 1) if d == 1
        else torch.cat([v, torch.zeros_like(v[..., :2])], -1),
        lambda m, v: v + m.ones.repeat(2).view(-1, 1, 1) if d == 1 and c % 2 == 0 else v,
    ]  # fmt: skip
    return Part(pick(ways, k), index=low, half=c // 2, ones=torch.rand(c // 2) + 0.5)


@block(IMAGE, TOKENS)
def einsum(x: Tensor, k: int) -> Made:
    c = x.shape[channel_dim(x)]
    g = pick(divisors(c), k // 2)
    whole = nn.Parameter(torch.randn(9, c) / c**0.5)
    blocks = nn.Parameter(torch.randn(g, c // g, 3) / (c // g) ** 0.5)

    def run(m: Any, v: Tensor) -> Tensor:
        if v.dim() == 4:
            if k % 2:
                u = torch.einsum("bgchw,gcd->bgdhw", v.unflatten(1, (m.g, -1)), m.blocks)
                return u.flatten(1, 2)
            return torch.einsum("bchw,oc->bohw", v, m.whole)
        if k % 2:
            return torch.einsum("btgc,gcd->btgd", v.unflatten(-1, (m.g, -1)), m.blocks).flatten(2)
        return v @ m.whole.t() if k % 3 else torch.matmul(v, m.whole.transpose(0, 1))

    return Part(run, g=g, whole=whole, blocks=blocks)


@block(IMAGE, TOKENS)
def channel_attention(x: Tensor, k: int) -> Made:
    """A product of two computed tensors: channels with channels, or places with places."""

    def run(m: Any, v: Tensor) -> Tensor:
        u = v.flatten(2) if v.dim() == 4 else v.transpose(1, 2)
        q = F.normalize(u, dim=-1) if k % 3 == 0 else u
        if k % 2:
            u = (q @ u.transpose(1, 2) * m.scale).softmax(-1) @ u
        else:
            u = u @ (q.transpose(1, 2) @ u * m.scale).softmax(-1)
        return u.reshape(v.shape) if v.dim() == 4 else u.transpose(1, 2)

    return Part(run, scale=x.shape[channel_dim(x)] ** -0.5)


@block(IMAGE, TOKENS)
def reused(x: Tensor, k: int) -> Made:
    """One module twice, or two that share a weight."""
    c = x.shape[channel_dim(x)]
    layer, other = project(x, c), project(x, c)
    if k % 3 == 0:
        return Part(lambda m, v: m.layer(act(m.layer(v), k)), layer=layer)
    other.weight = layer.weight  # type: ignore[assignment]
    if k % 3 == 1:
        return Part(lambda m, v: m.layer(v) + m.other(v.tanh()), layer=layer, other=other)

    def run(m: Any, v: Tensor) -> Tensor:
        w = m.layer.weight
        return F.linear(v, w.t()) if v.dim() == 3 else F.conv2d(v, w.transpose(0, 1))

    narrow = project(x, 6, c)
    both = Part(lambda m, v: run(m, m.layer(v).relu()), layer=narrow)
    return both


@block(IMAGE, TOKENS)
def low_rank(x: Tensor, k: int) -> Made:
    """A weight that is computed: a product, a mask, a normalised direction."""
    c = x.shape[channel_dim(x)]
    a, b = nn.Parameter(torch.randn(10, 4) / 2), nn.Parameter(torch.randn(4, c) / c**0.5)

    def run(m: Any, v: Tensor) -> Tensor:
        w = m.a @ m.b
        if k % 3 == 1:
            w = F.normalize(w, dim=k % 2)
        elif k % 3 == 2:
            w = torch.cat([m.a, m.a.flip(1)], 1).sum(1, keepdim=True) * w
        return F.linear(v, w) if v.dim() == 3 else F.conv2d(v, w[:, :, None, None])

    return Part(run, a=a, b=b)


@block(IMAGE, TOKENS)
def parametrized(x: Tensor, k: int) -> Made:
    layer = project(x, pick([8, 12], k))
    return torch.nn.utils.parametrizations.weight_norm(layer, dim=k % 2)


@block(IMAGE, TOKENS)
def in_place(x: Tensor, k: int) -> Made:
    def run(m: Any, v: Tensor) -> Tensor:
        v = m.layer(v)
        if k % 4 == 0:
            v += v.mean(channel_dim(v), keepdim=True)
        elif k % 4 == 1:
            part = v[:, :3] if v.dim() == 4 else v[..., :3]
            part.mul_(2)
        elif k % 4 == 2:
            v = v.clone()
            v[:, 0] = 0.3
        else:
            v.clamp_(min=0).add_(shaped(m.bias, v))
        return v

    return Part(run, layer=project(x, 9), bias=nn.Parameter(torch.randn(9)))


def nested(name: str, inner: nn.Module, x: Tensor, y: Tensor) -> nn.Module | None:
    """A block around others; ``y`` is what the others make of ``x``."""
    d = channel_dim(x)
    if name == "residual":
        if x.shape == y.shape:
            return Part(lambda m, v: v + m.inner(v), inner=inner)
        if x.shape[:d] == y.shape[:d] and x.shape[d:][1:] == y.shape[d:][1:]:
            skip = project(x, y.shape[d])
            return Part(lambda m, v: m.skip(v) + m.inner(v), inner=inner, skip=skip)
        return inner
    same = (x.dim() == 4 and x.shape[2:] == y.shape[2:]) or (
        x.dim() == 3 and x.shape[1] == y.shape[1]
    )
    if name == "concatenate" and same:
        return Part(lambda m, v: torch.cat([v, m.inner(v)], channel_dim(v)), inner=inner)
    if name == "gate_by" and same:
        back = project(y, x.shape[d])
        return Part(lambda m, v: v * m.back(m.inner(v)).sigmoid(), inner=inner, back=back)
    if name == "parallel" and x.shape == y.shape:
        layer = project(x, x.shape[d])
        return Part(lambda m, v: torch.maximum(m.inner(v), m.layer(v)), inner=inner, layer=layer)
    return inner


def make(blocks: Sequence[Block], x: Tensor, room: Any) -> tuple[nn.Module, Tensor]:
    """Modules for the blocks that fit, and what they make of a sample."""
    parts: list[nn.Module] = []
    for name, k, inner in blocks:
        if x.numel() > LARGEST or x.shape[channel_dim(x)] > WIDEST:
            wide = x.shape[channel_dim(x)] > WIDEST
            small = project(x, 8) if wide or x.dim() == 3 else nn.AdaptiveAvgPool2d(4)
            x, _ = small(x), parts.append(small)
        if name in NESTED:
            module, y = make(inner, x, room)
            made = nested(name, module, x, y) if inner else None
        else:
            made = room[name](x, k)
        if made is not None:
            y = made.eval()(x.clone())
            if y.numel():
                x, _ = y, parts.append(made)
    return Chain(parts), x


BRIDGES = ("pool", "max_pool", "flatten", "flatten_last", "both_pools", "tokens", "tokens_last")
HEADS = ("linear", "mean", "first", "flat", "tied", "attended")
OUTPUTS = ("tensor", "dict", "tuple", "nested")


def bridge(name: str, x: Tensor) -> nn.Module:
    """From images to vectors or tokens."""
    c = x[0].numel()
    if name == "pool":
        return Part(lambda m, v: v.mean((2, 3)))
    if name == "max_pool":
        return nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten())
    if name == "flatten":
        return nn.Sequential(nn.Flatten(), nn.Linear(c, 14), nn.ReLU())
    if name == "flatten_last":
        layer = nn.Linear(c, 14)
        return Part(lambda m, v: m.fc(v.permute(0, 2, 3, 1).flatten(1)), fc=layer)
    if name == "both_pools":
        return Part(lambda m, v: torch.cat([v.mean((2, 3)), v.amax((2, 3))], 1))
    if name == "tokens":
        return Part(lambda m, v: v.flatten(2).transpose(1, 2))
    return Part(lambda m, v: v.permute(0, 2, 3, 1).reshape(v.shape[0], -1, v.shape[1]))


def head(recipe: Recipe, x: Tensor, stem: nn.Module) -> nn.Module:
    """From vectors or tokens to the outputs."""
    c, name = x.shape[-1], recipe.head
    table = stem.weight if recipe.source == "ids" and name == "tied" else None
    if name == "attended" and x.dim() == 3:
        pool: Any = Part(lambda m, v: (m.score(v).softmax(1) * v).sum(1), score=nn.Linear(c, 1))
    elif name in ("mean", "tied") and x.dim() == 3:
        pool = Part(lambda m, v: v.mean(1))
    elif name == "first" and x.dim() == 3:
        pool = Part(lambda m, v: v[:, 0])
    elif name == "flat" and x.dim() == 3:
        pool, c = nn.Flatten(), x[0].numel()
    else:
        pool = nn.Identity()
    last: Any = nn.Linear(c, 10)
    if isinstance(table, Tensor) and table.shape[1] == c:
        last = nn.Linear(c, table.shape[0], bias=False)
        last.weight = table
    if recipe.output == "tensor":
        return Part(lambda m, v: m.last(m.pool(v)), pool=pool, last=last)
    aux = nn.Linear(x.shape[-1], 3)

    def run(m: Any, v: Tensor) -> Any:
        a, b = m.last(m.pool(v)), m.aux(v)
        if recipe.output == "dict":
            return {"logits": a, "aux": b}
        return (a, b) if recipe.output == "tuple" else {"out": [a, {"aux": (b, b.sum(-1))}]}

    return Part(run, pool=pool, last=last, aux=aux)


def build(recipe: Recipe, seed: int = 0) -> tuple[nn.Module, Callable[[int], Tensor]]:
    """The network in eval mode, and inputs for it at any batch size."""

    def inputs(batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed + 1000 * batch)
        if recipe.source == "image":
            return torch.randn(batch, 3, 8, 8, generator=generator)
        if recipe.source == "tokens":
            return torch.randn(batch, 6, 5, generator=generator)
        return torch.randint(0, 17, (batch, 6), generator=generator)

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        x = inputs(2)
        stems = {
            "image": lambda: nn.Conv2d(3, recipe.width, 3, padding=1),
            "tokens": lambda: nn.Linear(5, recipe.width),
            "ids": lambda: nn.Embedding(17, recipe.width),
        }
        stem = stems[recipe.source]()
        stages, x = [stem], stem(x)
        if recipe.source == "image":
            module, x = make(recipe.image, x, IMAGE)
            stages += [module, between := bridge(recipe.bridge, x)]
            x = between(x)
        if x.dim() == 3:
            module, x = make(recipe.tokens, x, TOKENS)
            stages.append(module)
        model = Network(stages, head(recipe, x, stem)).eval()
    return model, inputs


def _blocks(choose: Choose, names: Sequence[str], most: int, depth: int) -> tuple[Block, ...]:
    found = []
    for _ in range(choose(range(most + 1))):
        name = choose([*names, *(NESTED * 3 if depth else ())])
        inner = _blocks(choose, names, 2, depth - 1) if name in NESTED else ()
        found.append((name, 0 if name in NESTED else choose(range(24)), inner))
    return tuple(found)


def draw_recipe(choose: Choose) -> Recipe:
    """A recipe, every choice made by ``choose`` from a sequence whose simplest entry is first."""
    source = choose(("image", "tokens", "ids"))
    image = _blocks(choose, tuple(IMAGE), 4, 2) if source == "image" else ()
    between = choose(BRIDGES) if source == "image" else "pool"
    has_tokens = source != "image" or between.startswith("tokens")
    tokens = _blocks(choose, tuple(TOKENS), 4, 2) if has_tokens else ()
    width = choose((8, 12, 16, 6))
    return Recipe(source, width, image, between, tokens, choose(HEADS), choose(OUTPUTS))


def from_seed(seed: int) -> Recipe:
    """The recipe of a seed."""
    return draw_recipe(random.Random(seed).choice)


@st.composite
def recipes(draw: Any) -> Recipe:
    """The same for hypothesis, which then shrinks what it finds."""
    return draw_recipe(lambda options: draw(st.sampled_from(list(options))))
