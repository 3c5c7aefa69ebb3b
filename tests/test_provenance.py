"""Integers that remember where they come from, and the attributes that follow the axes."""

from __future__ import annotations

import copy
import math
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import models_zoo
import prunus
from prunus.graph.axis import Axis
from prunus.graph.expressions import Attribute, Operation, Solution, Width, evaluate
from prunus.surgeon import attributes as attributes_room
from prunus.surgeon.reach import read_attribute, write_attribute
from prunus.tracer.provenance import Provenance

A = Attribute("block", "size")


def test_arithmetic_keeps_the_expression_and_the_value() -> None:
    size = Provenance(12, A)
    for made, plain in [
        (size + 3, 15), (3 + size, 15), (size - 2, 10), (20 - size, 8), (size * 2, 24),
        (2 * size, 24), (size // 5, 2), (25 // size, 2), (size % 5, 2), (-size, -12),
    ]:  # fmt: skip
        assert made == plain
        assert isinstance(made, Provenance)
        assert evaluate(made.expression, lambda _: 12, lambda w: w.size) == plain
    assert divmod(size, 5) == (2, 2)


def test_it_is_an_int_like_any_other() -> None:
    size = Provenance(12, A)
    assert hash(size) == hash(12)
    assert f"{size}" == "12"
    assert type(copy.copy(size)) is type(copy.deepcopy(size)) is int
    assert type(pickle.loads(pickle.dumps(size))) is int
    assert size == 12 < 13
    assert isinstance(size / 5, float)
    assert math.sqrt(Provenance(16, A)) == 4.0
    assert torch.zeros(size).shape == (12,)
    assert list(range(size))[-1] == 11


class Heads(nn.Module):
    """Attention with its integers wherever people keep them."""

    def __init__(self, style: str, groups: int = 1) -> None:
        super().__init__()
        self.style, self.rep = style, groups
        heads, size = 4, 6
        self.query = nn.Linear(20, heads * size)
        self.key = nn.Linear(20, heads * size // groups)
        self.value = nn.Linear(20, heads * size // groups)
        self.out = nn.Linear(heads * size, 20)
        self.head = nn.Linear(20, 3)
        self.shape: Any = None
        if style == "attributes":
            self.heads, self.size, self.kv = heads, size, heads // groups
        elif style == "tuple":
            self.shape = (heads, size, heads // groups)
        elif style == "dict":
            self.shape = {"heads": heads, "size": size, "kv": heads // groups}
        elif style == "config":
            self.config = SimpleNamespace(heads=heads, size=size, kv=heads // groups)

    def sizes(self) -> tuple[int, int, int]:
        if self.style == "attributes":
            return self.heads, self.size, self.kv
        if self.style == "tuple":
            return self.shape
        if self.style == "dict":
            return self.shape["heads"], self.shape["size"], self.shape["kv"]
        return self.config.heads, self.config.size, self.config.kv

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        heads, size, kv = self.sizes()
        q = self.query(x).view(b, n, heads, size).transpose(1, 2)
        k = self.key(x).view(b, n, kv, size).transpose(1, 2)
        v = self.value(x).view(b, n, kv, size).transpose(1, 2)
        if self.rep > 1:
            k, v = (
                t[:, :, None].expand(b, kv, self.rep, n, size).reshape(b, kv * self.rep, n, size)
                for t in (k, v)
            )
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.head(self.out(out.reshape(b, n, heads * size)))


def prove(model: nn.Module, *args: Tensor, ratio: float = 0.3) -> tuple[prunus.Plan, Any]:
    """Cut a third of every group, prove it, and apply it for real."""
    model.eval()
    graph = prunus.trace(model, args)
    plan = prunus.plan(graph, model, ratio=ratio, importance="random")
    certificate = prunus.verify(plan, model, args)
    return plan, certificate


@pytest.mark.parametrize("style", ["attributes", "tuple", "dict", "config"])
@pytest.mark.parametrize("groups", [1, 2])
def test_heads_and_head_dims_go_wherever_the_integers_are_kept(style: str, groups: int) -> None:
    torch.manual_seed(0)
    model, x = Heads(style, groups), torch.randn(2, 5, 20)
    plan, certificate = prove(model, x)
    assert certificate.verdict == "exact", certificate
    assert certificate.params[1] < 0.75 * certificate.params[0]
    assert any("heads" in e.attribute or "shape" in e.attribute for e in plan.edits)
    again = prunus.Plan.from_json(plan.to_json())
    prunus.apply(again, model)
    heads, size, _ = model.sizes()
    assert heads * size == model.query.out_features < 24


def test_a_stale_head_count_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(equations: Any, current: Any, kept: Any) -> Solution:
        return Solution(current, ())

    torch.manual_seed(0)
    model, x = Heads("attributes").eval(), torch.randn(2, 5, 20)
    graph = prunus.trace(model, x)
    monkeypatch.setattr(attributes_room, "solve", stale)
    plan = prunus.plan(graph, model, ratio=0.3, importance="random")
    assert prunus.verify(plan, model, x).verdict == "inexact"


class Pieces(nn.Module):
    """Channels taken apart at positions that attributes, shapes or numbers say."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.style = style
        self.first, self.sizes = 8, [8, 16]
        self.up = nn.Conv2d(3, 24, 1)
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.down = nn.Conv2d(24, 12, 1)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x).relu()
        if self.style == "split":
            a, b = x.split(self.sizes, dim=1)
        elif self.style == "slice":
            a, b = x[:, : self.first], x[:, self.first :]
        elif self.style == "rest":
            a, b = torch.split(x, [self.first, x.shape[1] - self.first], dim=1)
        else:
            a, b = x[:, :8], x[:, 8:]
        x = torch.cat([self.left(a), self.right(b)], 1)
        return self.head(self.down(x).relu().mean((2, 3)))


@pytest.mark.parametrize("style", ["split", "slice", "rest", "number"])
def test_pieces_follow_what_states_their_sizes(style: str) -> None:
    torch.manual_seed(0)
    model = Pieces(style).eval()
    x = torch.randn(2, 3, 6, 6)
    graph = prunus.trace(model, x)
    whole = graph.why_pinned("up.weight[0]")
    plan, certificate = prove(model, x)
    assert certificate.verdict == "exact", certificate
    if style == "number":
        assert any("code fixes" in pin.reason for _, pin in whole)
        assert Axis("left.weight", 1) not in plan.keep
    else:
        assert not whole
        assert Axis("left.weight", 1) in plan.keep


class Divided(nn.Module):
    """``C // heads`` in the forward: the width of the stream says how long a head is."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.embed = nn.Linear(10, 24)
        self.qkv = nn.Linear(24, 72)
        self.out = nn.Linear(24, 24)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)
        return self.head(x + self.out(out))


def test_a_width_that_is_divided_by_an_attribute_stays_divisible() -> None:
    torch.manual_seed(0)
    _, certificate = prove(Divided(), torch.randn(2, 5, 10))
    assert certificate.verdict == "exact", certificate
    assert certificate.params[1] < 0.7 * certificate.params[0]


class Escaping(Heads):
    """The head dim also scales the scores, so it may not change."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (
            layer(x).view(b, n, self.heads, self.size).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(self.size)
        out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, self.heads * self.size)
        return self.head(self.out(out))


def test_a_number_that_the_code_computes_with_is_pinned_with_its_line() -> None:
    torch.manual_seed(0)
    model, x = Escaping("attributes"), torch.randn(2, 5, 20)
    plan, certificate = prove(model, x)
    assert certificate.verdict == "exact", certificate
    prunus.apply(plan, model)
    assert model.size == 6
    assert model.heads == 3
    graph = prunus.trace(Escaping("attributes").eval(), x)
    assert any("computes with" in p.reason and "test_prov" in p.source for _, p in graph.pins)


def test_tracing_leaves_integers_and_containers_as_they_were() -> None:
    for style in ("attributes", "tuple", "dict", "config"):
        model = Heads(style).eval()
        holders = (model.shape, getattr(model, "config", None))
        before = repr((vars(model), holders))
        prunus.trace(model, torch.randn(2, 5, 20))
        assert repr((vars(model), holders)) == before
        assert type(model.rep) is int
        assert (model.shape, getattr(model, "config", None)) == holders


def test_attributes_are_read_and_written_by_path() -> None:
    module = nn.Module()
    module.sizes, module.table = (3, [4, 5]), {"a": 6}  # type: ignore[assignment]
    module.config = SimpleNamespace(width=7)  # type: ignore[assignment]
    for path, old in [("sizes[0]", 3), ("sizes[1][1]", 5), ("table.a", 6), ("config.width", 7)]:
        assert read_attribute(module, path) == old
        write_attribute(module, path, old + 10)
        assert read_attribute(module, path) == old + 10
    assert module.sizes == (13, [4, 15])
    with pytest.raises(AttributeError):
        read_attribute(module, "sizes[7]")


def test_an_expression_of_widths_is_evaluated() -> None:
    half = Operation("//", Width(10, None), 2)
    assert evaluate(half, lambda _: 0, lambda w: w.size) == 5


class Shared(Heads):
    """Grouped queries in the fused operator, which repeats the keys by itself."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (
            layer(x).view(b, n, -1, self.size).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)
        return self.head(self.out(out.reshape(b, n, -1)))


@pytest.mark.parametrize("build", [Heads, Shared])
def test_a_mask_answers_like_the_pruned_model_at_any_batch_and_length(build: Any) -> None:
    torch.manual_seed(0)
    model, x = build("attributes", 2).eval(), torch.randn(2, 5, 20)
    graph = prunus.trace(model, x)
    plan = prunus.plan(graph, model, ratio=0.3, importance="random")
    assert prunus.verify(plan, model, x).verdict == "exact"
    pruned = prunus.apply(plan, copy.deepcopy(model))
    assert pruned.query.out_features < model.query.out_features
    for shape in [(2, 5, 20), (1, 5, 20), (3, 9, 20)]:
        other = torch.randn(shape)
        with torch.no_grad(), prunus.mask(plan, model):
            masked = model(other)
        with torch.no_grad():
            assert torch.allclose(masked, pruned(other), atol=1e-5)


class Checked(nn.Module):
    """Compares a width with what it keeps, before it goes on."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.channels = width
        self.first, self.last = nn.Linear(6, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if x.shape[-1] != self.channels:
            raise ValueError("channels are not those of the configuration")
        out: Tensor = self.last(x.relu())
        return out


def test_an_attribute_that_is_compared_with_a_width_follows() -> None:
    model, x = Checked().eval(), torch.randn(2, 6)
    plan = prunus.plan(prunus.trace(model, x), model, ratio=0.5)
    assert prunus.verify(plan, model, x).verdict == "exact"
    prunus.apply(plan, model)
    assert model.channels == 6


class Multiple(nn.Module):
    """Values as wide as a multiple of the keys, and nothing says it but the product."""

    def __init__(self, ratio: int = 2, key_dim: int = 6) -> None:
        super().__init__()
        self.heads, self.key_dim, self.ratio = 2, key_dim, ratio
        self.qkv = nn.Linear(10, 2 * (2 + ratio) * key_dim)
        self.last = nn.Linear(2 * ratio * key_dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (
            self.qkv(x)
            .view(b, n, self.heads, -1)
            .split([self.key_dim, self.key_dim, self.ratio * self.key_dim], dim=3)
        )
        mixed = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).softmax(-1) @ v.transpose(1, 2)
        out: Tensor = self.last(mixed.transpose(1, 2).flatten(2))
        return out


def test_a_multiple_of_another_size_goes_with_it() -> None:
    model, x = Multiple().eval(), torch.randn(2, 5, 10)
    graph = prunus.trace(model, x)
    plan = prunus.plan(graph, model, ratio=0.34, importance="random")
    assert prunus.verify(plan, model, x).verdict == "exact"
    prunus.apply(plan, model)
    assert model.key_dim < 6
    assert model.ratio == 2
    assert model.last.in_features == model.heads * 2 * model.key_dim


def test_it_is_unlike_what_is_no_int() -> None:
    size = Provenance(12, A)
    for other in (None, 2.5, "a", 13):
        assert size != other
        assert not size == other  # noqa: SIM201 - both operators are tried
    assert not size != 12  # noqa: SIM202


class Free(nn.Module):
    """A size that two others multiply to, each of which may change, and a square."""

    def __init__(self, a: int = 4, b: int = 6) -> None:
        super().__init__()
        self.a, self.b = a, b
        self.p, self.q, self.r = nn.Linear(5, a), nn.Linear(5, b), nn.Linear(5, a * b)
        self.s, self.last = nn.Linear(5, a * a), nn.Linear(a + b + a * b + a * a, 3)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        parts = [
            self.p(x).view(n, self.a),
            self.q(x).view(n, self.b),
            self.r(x).view(n, self.a * self.b),
            self.s(x).view(n, self.a * self.a),
        ]
        out: Tensor = self.last(torch.cat(parts, 1).relu())
        return out


def test_what_no_tie_can_mend_is_pinned() -> None:
    model, x = Free().eval(), torch.randn(2, 5)
    graph = prunus.trace(model, x)
    with pytest.raises(prunus.PrunusError, match="a size that can't follow"):
        prunus.plan(graph, model, ratio=0.4, importance="random")
    assert any("can't follow" in pin.reason for _, pin in graph.pins)


class Blur(nn.Module):
    """A fixed filter over channels, as many groups as an attribute or as the code says."""

    def __init__(self, fixed: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 4, 1)
        self.channels, self.fixed = 12, fixed
        self.register_buffer("filt", torch.rand(12, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        groups = 12 if self.fixed else self.channels
        x = F.conv2d(self.first(x), self.filt, None, 1, 0, 1, groups)
        out: Tensor = self.last(x).mean((2, 3))
        return out


def test_the_groups_of_a_convolution_follow_or_are_fixed() -> None:
    x = torch.randn(2, 3, 9, 9)
    model = Blur(fixed=False).eval()
    plan = prunus.plan(prunus.trace(model, x), model, ratio=0.5)
    assert prunus.verify(plan, model, x).verdict == "exact"
    prunus.apply(plan, model)
    assert model.channels == 6
    graph = prunus.trace(Blur(fixed=True).eval(), x)
    assert not graph.groups
    pins = [pin for _, pin in graph.why_pinned("first.weight")]
    assert any("the code fixes this size" in p.reason and "test_prov" in p.source for p in pins)


class Packed(nn.Module):
    """Layers that slice a packed projection by products of a shared config's heads."""

    class Layer(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.config, self.size = config, 6
            self.qkv = nn.Linear(10, 3 * config.heads * self.size)
            self.out = nn.Linear(config.heads * self.size, 10)

        def forward(self, x: Tensor) -> Tensor:
            b, n, _ = x.shape
            end = self.config.heads * self.size
            parts = self.qkv(x)
            q, k, v = parts[..., :end], parts[..., end : 2 * end], parts[..., 2 * end :]
            q, k, v = (t.view(b, n, -1, 6).transpose(1, 2) for t in (q, k, v))
            mixed = F.scaled_dot_product_attention(q, k, v, scale=0.4)
            out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
            return x + out

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(heads=4)
        self.layers = nn.ModuleList(Packed.Layer(self.config) for _ in range(2))
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.head(x.mean(1))
        return out


def test_layers_that_share_a_factor_never_disagree_about_it() -> None:
    """Widths that the layers slice alike are known to none of them alone, so all of it stays."""
    model, x = Packed().eval(), torch.randn(2, 5, 10)
    graph = prunus.trace(model, x)
    for layer in (0, 1):
        pins = [str(pin) for _, pin in graph.why_pinned(f"layers.{layer}.qkv.weight")]
        assert any("a size that can't follow" in pin for pin in pins), pins
    assert not graph.groups
    with pytest.raises(prunus.PrunusError, match=r"removes nothing[^$]*a size that can't follow"):
        prunus.plan(graph, model, ratio=0.4)


class SinglePiece(nn.Module):
    """Splits into the pieces of a list that holds one size."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = [12]
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        (piece,) = self.first(x).split(self.sizes, dim=1)
        out: Tensor = self.last(piece.relu())
        return out


def test_a_single_piece_states_its_size_as_well() -> None:
    model, x = SinglePiece().eval(), torch.randn(2, 6)
    plan = prunus.plan(prunus.trace(model, x), model, ratio=0.5)
    assert prunus.verify(plan, model, x).verdict == "exact"
    prunus.apply(plan, model)
    assert model.sizes == [6]


def test_no_trial_leaves_a_dim_empty_and_pins_for_it() -> None:
    """Two KV heads: a selection without either would divide by zero, and no plan makes one."""
    model = models_zoo.build("llama_tiny").eval()
    graph = prunus.trace(model, models_zoo.example_inputs("llama_tiny"))
    assert not [pin for _, pin in graph.pins if "can't follow" in pin.reason]
