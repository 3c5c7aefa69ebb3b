"""Pruned models against masked ones that were written by hand, for groups whose units mix.

A norm sees all channels at once, a softmax all keys: the second witness can't say what silencing
means there.  So the forward is written out here on the dense weights, from a few masks that are
read off the producers of the plan; nothing of the tracer, the replay or the surgeon takes part.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunus
from prunus.graph.axis import Axis
from prunus.graph.plans import Plan


class Masks:
    """Which positions of a dense tensor the plan keeps, as ones and zeros in float64."""

    def __init__(self, plan: Plan, model: nn.Module) -> None:
        self._plan = plan
        self.dense = {name: value.double() for name, value in model.state_dict().items()}

    def __call__(self, tensor: str, dim: int = 0) -> Tensor:
        mask = torch.ones(self.dense[tensor].shape[dim], dtype=torch.float64)
        kept = self._plan.keep.get(Axis(tensor, dim))
        if kept is not None:
            mask.zero_()
            mask[list(kept)] = 1
        return mask


def linear(masks: Masks, name: str, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """A dense layer by its dense weights; ``mask`` are the outputs that are there."""
    out = F.linear(x, masks.dense[f"{name}.weight"], masks.dense.get(f"{name}.bias"))
    return out if mask is None else out * mask


def layer_norm(masks: Masks, name: str, x: Tensor, there: Tensor, eps: float) -> Tensor:
    """Mean and variance over the channels that are there."""
    count = there.sum()
    mean = (x * there).sum(-1, keepdim=True) / count
    centred = (x - mean) * there
    variance = centred.square().sum(-1, keepdim=True) / count
    normal = centred / (variance + eps).sqrt()
    return (normal * masks.dense[f"{name}.weight"] + masks.dense[f"{name}.bias"]) * there


def rms_norm(masks: Masks, name: str, x: Tensor, there: Tensor, eps: float) -> Tensor:
    mean = (x * there).square().sum(-1, keepdim=True) / there.sum()
    return x * there / (mean + eps).sqrt() * masks.dense[f"{name}.weight"]


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """Heads in dim 1, the scale that of the dense head dim."""
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        logits = logits.masked_fill(torch.ones(logits.shape[-2:]).triu(1).bool(), -math.inf)
    return logits.softmax(-1) @ v


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def llama() -> tuple[nn.Module, Any, Callable[[Masks, Any], Tensor]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4, head_dim=8, attn_implementation="sdpa",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()

    def by_hand(masks: Masks, inputs: Any) -> Tensor:
        ids = inputs["input_ids"]
        there = masks("model.embed_tokens.weight", 1)
        x = masks.dense["model.embed_tokens.weight"][ids] * there
        angles = torch.arange(ids.shape[1]).double()[:, None] * (
            10000.0 ** (-torch.arange(4).double() / 4)
        )
        cos, sin = angles.cos(), angles.sin()

        def turn(value: Tensor) -> Tensor:
            a, b = value[..., :4], value[..., 4:]
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        for layer in range(2):
            name = f"model.layers.{layer}"
            y = rms_norm(masks, f"{name}.input_layernorm", x, there, config.rms_norm_eps)
            rows = {p: masks(f"{name}.self_attn.{p}_proj.weight") for p in "qkv"}
            q, k, v = (linear(masks, f"{name}.self_attn.{p}_proj", y, rows[p]) for p in "qkv")
            q, k, v = turn(heads(q, 8)), turn(heads(k, 4)), heads(v, 4)
            k, v = (value.repeat_interleave(2, 1) for value in (k, v))
            alive = heads(rows["q"][None, None], 8).amax((2, 3))[:, :, None, None]
            mixed = attention(q, k, v, causal=True) * alive
            mixed = mixed.transpose(1, 2).flatten(2)
            x = x + linear(masks, f"{name}.self_attn.o_proj", mixed, there)
            y = rms_norm(masks, f"{name}.post_attention_layernorm", x, there, config.rms_norm_eps)
            hidden = masks(f"{name}.mlp.gate_proj.weight")
            gate = F.silu(linear(masks, f"{name}.mlp.gate_proj", y))
            up = linear(masks, f"{name}.mlp.up_proj", y)
            x = x + linear(masks, f"{name}.mlp.down_proj", gate * up * hidden, there)
        return linear(masks, "lm_head", rms_norm(masks, "model.norm", x, there, 1e-6))

    return model, {"input_ids": torch.randint(0, 61, (2, 9)), "use_cache": False}, by_hand


def bert() -> tuple[nn.Module, Any, Callable[[Masks, Any], Tensor]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, num_labels=5,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()

    def by_hand(masks: Masks, inputs: Any) -> Tensor:
        ids, eps = inputs["input_ids"], config.layer_norm_eps
        table = "bert.embeddings.{}_embeddings.weight".format
        there = masks(table("word"), 1)
        x = masks.dense[table("word")][ids] + masks.dense[table("token_type")][0]
        x = (x + masks.dense[table("position")][: ids.shape[1]]) * there
        x = layer_norm(masks, "bert.embeddings.LayerNorm", x, there, eps)
        for layer in range(2):
            name = f"bert.encoder.layer.{layer}"
            parts = ("query", "key", "value")
            rows = {p: masks(f"{name}.attention.self.{p}.weight") for p in parts}
            q, k, v = (
                heads(linear(masks, f"{name}.attention.self.{p}", x, rows[p]), 4) for p in parts
            )
            mixed = attention(q, k, v).transpose(1, 2).flatten(2)
            mixed = mixed * rows["value"]
            y = linear(masks, f"{name}.attention.output.dense", mixed, there)
            x = layer_norm(masks, f"{name}.attention.output.LayerNorm", x + y, there, eps)
            inner = masks(f"{name}.intermediate.dense.weight")
            y = F.gelu(linear(masks, f"{name}.intermediate.dense", x)) * inner
            y = linear(masks, f"{name}.output.dense", y, there)
            x = layer_norm(masks, f"{name}.output.LayerNorm", x + y, there, eps)
        pooled = linear(masks, "bert.pooler.dense", x[:, 0]).tanh()
        return linear(masks, "classifier", pooled * masks("bert.pooler.dense.weight"))

    return model, {"input_ids": torch.randint(0, 61, (2, 9))}, by_hand


def vit() -> tuple[nn.Module, Any, Callable[[Masks, Any], Tensor]]:
    timm = pytest.importorskip("timm")
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=5
    ).eval()

    def by_hand(masks: Masks, inputs: Any) -> Tensor:
        image = inputs["x"].double()
        there = masks("patch_embed.proj.weight")
        patches = F.conv2d(
            image, masks.dense["patch_embed.proj.weight"], masks.dense["patch_embed.proj.bias"], 8
        )
        x = patches.flatten(2).transpose(1, 2)
        x = torch.cat([masks.dense["cls_token"].expand(len(x), -1, -1), x], 1)
        x = (x + masks.dense["pos_embed"]) * there
        for layer in range(2):
            name = f"blocks.{layer}"
            y = layer_norm(masks, f"{name}.norm1", x, there, 1e-6)
            rows = masks(f"{name}.attn.qkv.weight")
            parts = linear(masks, f"{name}.attn.qkv", y, rows).chunk(3, -1)
            mixed = attention(*(heads(part, 4) for part in parts)).transpose(1, 2).flatten(2)
            x = x + linear(masks, f"{name}.attn.proj", mixed, there)
            y = layer_norm(masks, f"{name}.norm2", x, there, 1e-6)
            inner = masks(f"{name}.mlp.fc1.weight")
            y = F.gelu(linear(masks, f"{name}.mlp.fc1", y)) * inner
            x = x + linear(masks, f"{name}.mlp.fc2", y, there)
        return linear(masks, "head", layer_norm(masks, "norm", x, there, 1e-6)[:, 0])

    return model, {"x": torch.randn(2, 3, 16, 16)}, by_hand


class Grouped(nn.Module):
    """A GroupNorm between convolutions: whole groups go, or the same places of every group."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 24, 3), nn.GroupNorm(4, 24)
        self.b = nn.Conv2d(24, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x)).relu()).mean((2, 3))


def group_norm() -> tuple[nn.Module, Any, Callable[[Masks, Any], Tensor]]:
    def by_hand(masks: Masks, inputs: Any) -> Tensor:
        there = masks("a.weight")[:, None, None]
        x = F.conv2d(inputs["x"].double(), masks.dense["a.weight"], masks.dense["a.bias"]) * there
        blocks, alive = x.unflatten(1, (4, 6)), there.reshape(4, 6, 1, 1)
        count = (alive.sum(1, keepdim=True) * x.shape[2] * x.shape[3]).clamp(min=1)
        mean = blocks.sum((2, 3, 4), keepdim=True) / count
        centred = (blocks - mean) * alive
        variance = centred.square().sum((2, 3, 4), keepdim=True) / count
        x = (centred / (variance + 1e-5).sqrt()).flatten(1, 2)
        weight, bias = (masks.dense[f"norm.{n}"][:, None, None] for n in ("weight", "bias"))
        x = ((x * weight + bias) * there).relu()
        return F.conv2d(x, masks.dense["b.weight"], masks.dense["b.bias"]).mean((2, 3))

    return Grouped().eval(), {"x": torch.randn(2, 3, 7, 7)}, by_hand


class CrossCovariance(nn.Module):
    """Attention between channels, as in XCiT: the softmax runs over what is pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, 20) for _ in range(3))
        self.out = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).transpose(1, 2) for part in (self.q, self.k, self.v))
        weights = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(1, 2)).softmax(-1)
        return self.out((weights @ v).transpose(1, 2))


def cross_covariance() -> tuple[nn.Module, Any, Callable[[Masks, Any], Tensor]]:
    def by_hand(masks: Masks, inputs: Any) -> Tensor:
        x = inputs["x"].double()
        q, k, v = (linear(masks, name, x).transpose(1, 2) for name in "qkv")
        logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(1, 2)
        logits = logits.masked_fill(masks("k.weight") == 0, -math.inf)
        mixed = (logits.softmax(-1) @ v).transpose(1, 2) * masks("q.weight")
        return linear(masks, "out", mixed)

    return CrossCovariance().eval(), {"x": torch.randn(2, 6, 12)}, by_hand


MODELS = [llama, bert, vit, group_norm, cross_covariance]


def compare(build: Callable[..., Any], seed: int) -> tuple[float, Plan]:
    """Largest relative difference between the pruned model and the one written by hand."""
    torch.manual_seed(seed)
    model, inputs, by_hand = build()
    prunus.verifier.randomize(model, (), inputs)
    plan = prunus.plan(
        prunus.trace(model, (), inputs), model, ratio=0.3, importance="random", seed=seed
    )
    masks = Masks(plan, model)
    pruned = prunus.apply(plan, copy.deepcopy(model)).double()
    wide = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    with torch.no_grad():
        answer = pruned(**wide)
        ours = answer if isinstance(answer, Tensor) else answer.logits
        theirs = by_hand(masks, inputs)
    return float((ours - theirs).abs().max() / theirs.abs().max()), plan


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_the_pruned_model_is_the_one_written_by_hand(build, seed) -> None:
    error, plan = compare(build, seed)
    assert error < 1e-6
    assert plan.keep


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_the_dense_model_is_the_one_written_by_hand(build) -> None:
    """With nothing removed; so that the masks are all that the other test is about."""
    torch.manual_seed(0)
    model, inputs, by_hand = build()
    with torch.no_grad():
        answer = model(**inputs)
        ours = answer if isinstance(answer, Tensor) else answer.logits
        nothing = Plan({}, {name: tuple(t.shape) for name, t in model.state_dict().items()})
        theirs = by_hand(Masks(nothing, model), inputs)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)
