"""Modules that can't be cut as they are, and the equivalents that can.

``nn.MultiheadAttention`` takes its inner width and its softmax scale from ``embed_dim``, deep
inside a function, so it can have neither fewer nor smaller heads than its residual stream is
wide.  Its equivalent here states all of that in attributes.  A module changes its class in
place: it stays the same object, with the same parameters, hooks and names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from prunus.errors import ApplyError

Kind = str | tuple[str, float]
"""What a plan calls a class: its name, and for an equivalent the softmax scale that it keeps."""

SLIM = "prunus.SlimMultiheadAttention"


class SlimMultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` whose heads may be fewer and smaller than its stream is wide.

    The interface and the names of the tensors are those of PyTorch's module.  Queries and keys
    are ``num_heads * head_dim`` wide; values are as wide as ``out_proj`` reads.
    ``softmax_scale`` stays what it was when the head dims shrink.
    """

    in_proj_weight: Tensor | None  # type: ignore[assignment]
    softmax_scale: float
    origin: type[nn.MultiheadAttention] = nn.MultiheadAttention

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """False tells nn.TransformerEncoderLayer to keep off its fused kernel."""
        return False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See :class:`torch.nn.MultiheadAttention`."""
        causal = is_causal and key_padding_mask is None and not need_weights
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        batched = query.dim() == 3
        q, k, v = (self._batch_first(x, batched=batched) for x in self._project(query, key, value))
        length = k.shape[1]
        k, v = self._extend(k, self.bias_k), self._extend(v, self.bias_v)
        mask = None if causal else self._merge(attn_mask, key_padding_mask, q, k.shape[1] - length)
        q = q.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        k = k.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        v = v.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        mixed, weights = self._attend(q, k, v, mask, causal=causal, explicit=need_weights)
        out = mixed.transpose(1, 2).flatten(2)
        out = F.linear(out, self.out_proj.weight, self.out_proj.bias)
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        return self._as_given(out, batched=batched), weights

    def _batch_first(self, x: Tensor, *, batched: bool) -> Tensor:
        if not batched:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _as_given(self, x: Tensor, *, batched: bool) -> Tensor:
        if not batched:
            return x.squeeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        inner = self.num_heads * self.head_dim
        widths = [inner, inner, self.out_proj.weight.shape[1]]
        bias: Tensor | None = self.in_proj_bias
        weights: Sequence[Tensor]
        if self.in_proj_weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key and key is value:
            whole: Sequence[Tensor] = F.linear(query, self.in_proj_weight, bias).split(widths, -1)
            return whole
        else:
            weights = self.in_proj_weight.split(widths)
        biases = (None, None, None) if bias is None else bias.split(widths)
        inputs = (query, key, value)
        return [F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]

    def _extend(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """One more position of a learned bias, one more of zeros."""
        if bias is not None:
            x = torch.cat([x, bias.expand(x.shape[0], 1, -1)], 1)
        return F.pad(x, (0, 0, 0, 1)) if self.add_zero_attn else x

    def _merge(
        self, attn_mask: Tensor | None, padding: Tensor | None, query: Tensor, more: int
    ) -> Tensor | None:
        """Both masks as one that is added to the logits; ``more`` positions are always seen."""
        mask = _additive(attn_mask, query.dtype)
        padding = _additive(padding, query.dtype)
        if mask is not None and mask.dim() == 3:
            mask = mask.unflatten(0, (query.shape[0], self.num_heads))
        if padding is not None:
            padding = padding[..., None, None, :]
            mask = padding if mask is None else mask + padding
        return mask if mask is None or not more else F.pad(mask, (0, more))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool, explicit: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Mixed values, and the attention weights if they are to be ``explicit``."""
        rate, scale = self.dropout if self.training else 0.0, self.softmax_scale
        if not explicit:
            return F.scaled_dot_product_attention(q, k, v, mask, rate, causal, scale=scale), None
        logits = (q * scale) @ k.transpose(-2, -1)
        weights = (logits if mask is None else logits + mask).softmax(-1)
        if rate:
            weights = F.dropout(weights, rate)
        return weights @ v, weights

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class may be made on the fly: copies and pickles name the one it was made of."""
        return (_revive, (self.origin,), *tuple(super().__reduce_ex__(protocol))[2:])


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


_SLIM: dict[type[nn.Module], type[SlimMultiheadAttention]] = {
    nn.MultiheadAttention: SlimMultiheadAttention
}


def _slim(kind: type[nn.MultiheadAttention]) -> type[SlimMultiheadAttention]:
    """The equivalent of a class that adds nothing to the forward."""
    if kind not in _SLIM:
        bases = (SlimMultiheadAttention, kind)
        _SLIM[kind] = type(f"Slim{kind.__name__}", bases, {"origin": kind})
    return _SLIM[kind]


def _revive(kind: type[nn.MultiheadAttention]) -> SlimMultiheadAttention:
    made = _slim(kind)
    return made.__new__(made)


def slim_kind(module: nn.MultiheadAttention) -> Kind:
    """What a module becomes before it is cut; what it is if it has an own forward, or is slim.

    >>> slim_kind(nn.MultiheadAttention(8, 2))
    ('prunus.SlimMultiheadAttention', 0.5)
    """
    return (SLIM, float(module.head_dim**-0.5)) if _is_plain(module) else kind_of(module)


def kind_of(module: nn.Module) -> Kind:
    """What a plan calls a module's class."""
    if isinstance(module, SlimMultiheadAttention):
        return SLIM, module.softmax_scale
    return type(module).__name__


def become(module: nn.Module, kind: Kind) -> None:
    """Switch a module to its equivalent, or back to the class that it had before.

    Raises
    ------
    ApplyError
        If it can't become that; nothing was changed.
    """
    before = kind_of(module)
    if isinstance(module, nn.MultiheadAttention) and _is_plain(module) and kind[0] == SLIM:
        _change(module, _slim(type(module)))
        vars(module)["softmax_scale"] = kind[1]
    elif isinstance(module, SlimMultiheadAttention) and kind == module.origin.__name__:
        del module.softmax_scale
        _change(module, module.origin)
    elif kind != before:
        raise ApplyError(
            f"a {before} can't become a {kind}",
            why="there is an equivalent of nn.MultiheadAttention with PyTorch's own forward only",
            fix="trace and plan the model as it is now",
        )


def _change(module: nn.Module, kind: type[nn.Module]) -> None:
    """Parametrizations of PyTorch do the same: a module of another class, the same object."""
    object.__setattr__(module, "__class__", kind)


def _is_plain(module: nn.Module) -> bool:
    """Whether the forward is PyTorch's own."""
    return (
        isinstance(module, nn.MultiheadAttention)
        and type(module).forward is nn.MultiheadAttention.forward
        and "forward" not in vars(module)
        and not is_parametrized(module)
    )


@contextmanager
def adapted(model: nn.Module) -> Iterator[None]:
    """The model with every module that has an equivalent as its equivalent; put back afterwards."""
    plain = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention) and _is_plain(m)]
    kinds = [kind_of(module) for module in plain]
    try:
        for module in plain:
            become(module, slim_kind(module))
        yield
    finally:
        for module, kind in zip(plain, kinds, strict=True):
            become(module, kind)
