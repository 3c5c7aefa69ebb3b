"""A third witness: the user's forward at full size, every tensor with a mask beside it.

All it takes of a plan is which entries of the parameters and buffers are gone.  From there a mask
travels with each tensor, entry by entry: what moves values moves masks, a product or a sum over
entries leaves out those that are gone, a norm counts those that are there.  There are no labels,
no units and no index maps, and nothing is taken from the tracer, the replay or the surgeon.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from prunus.graph.axis import Axis

Handler = Callable[..., Any]

MOVES = frozenset((
    "view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t",
    "unsqueeze", "squeeze", "expand", "slice", "select", "split", "split_with_sizes",
    "unsafe_split", "unsafe_split_with_sizes", "unbind", "cat", "stack", "clone", "contiguous",
    "alias", "detach", "flip", "roll", "index_select", "index", "repeat", "pixel_shuffle",
    "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "unfold", "as_strided",
    "diagonal", "lift_fresh", "lift_fresh_copy", "gather", "embedding", "upsample_nearest2d",
    "max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d",
    "transpose_", "t_", "squeeze_", "unsqueeze_", "repeat_interleave", "movedim", "view_as",
    "detach_", "narrow", "max_pool2d",
))  # fmt: skip

FRESH = frozenset((
    "zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty",
    "zeros_like", "ones_like", "full_like", "empty_like", "arange", "scalar_tensor", "randn",
    "rand", "eye", "empty_strided", "new_empty_strided",
))  # fmt: skip

SILENT = frozenset((
    "_local_scalar_dense", "sym_size", "is_same_size", "_assert_async",
))  # fmt: skip


class UndecidedError(Exception):
    """The shadow does not know an operator."""


class Shadow(TorchDispatchMode):
    """Runs operators with the gone entries left out."""

    def __init__(self) -> None:
        super().__init__()
        self._masks = WeakTensorKeyDictionary()

    def set(self, tensor: Tensor, mask: Tensor) -> None:
        """Let a tensor have a mask: ones where its entries stay, zeros elsewhere."""
        self._masks[tensor] = mask

    def mask(self, tensor: Tensor) -> Tensor:
        """The mask of a tensor, all ones for one that was never seen."""
        if tensor not in self._masks:
            self._masks[tensor] = torch.ones_like(tensor, dtype=torch.float64)
        return self._masks[tensor]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if name in SILENT:
            return func(*args, **kwargs)
        handler = HANDLERS.get(name)
        if handler is not None:
            return handler(self, func, *args, **kwargs)
        if name in FRESH:
            if name.endswith("_like") and not self.mask(args[0]).all():
                # A slice of what stays is as long as one of the whole: which of them are there?
                raise UndecidedError(f"{func} of a tensor of which something is gone")
            return func(*args, **kwargs)
        if name in MOVES:
            return self._move(func, args, kwargs)
        if torch.Tag.pointwise in func.tags or name in POINTWISE:
            return self._pointwise(func, args, kwargs)
        raise UndecidedError(name)

    def _move(self, func: Any, args: Any, kwargs: Any) -> Any:
        masks = [self._float_mask(value) for value in args]
        result = func(*args, **kwargs)
        moved = self._without_gone_indices(func, args, _movable(func, masks, kwargs))
        for value, mask in zip(tree_leaves(result), tree_leaves(moved), strict=True):
            if isinstance(value, Tensor) and mask.is_floating_point():
                self.set(value, mask)
        return result

    def _without_gone_indices(self, func: Any, args: Any, moved: Any) -> Any:
        """The mask of what is read; of what a gone index reads nothing is there."""
        gone = [
            leaf
            for leaf in tree_leaves(args)
            if isinstance(leaf, Tensor) and leaf.dtype == torch.int64 and not self.mask(leaf).all()
        ]
        if not gone:
            return moved
        name = func._schema.name.partition("::")[2]
        if name == "index_select":
            dim, line = args[1] % moved.dim(), self.mask(args[2])
        elif name == "index" and sum(index is not None for index in args[1]) == 1:
            dim = next(d for d, index in enumerate(args[1]) if index is not None)
            line = self.mask(args[1][dim])
        elif name in MOVES and gone == [args[0]]:
            return func(self.mask(args[0]), *args[1:])
        else:
            raise UndecidedError(f"{func} by an index of which something is gone")
        return moved * line.reshape(*line.shape, *(1,) * (moved.dim() - dim - line.dim()))

    def _float_mask(self, value: Any) -> Any:
        """Masks in place of tensors, but not of the indices that say what moves where."""
        return tree_map(
            lambda v: (
                self.mask(v)
                if isinstance(v, Tensor) and (v.is_floating_point() or v.dtype == torch.bool)
                else v
            ),
            value,
        )

    def _pointwise(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        masks = [self.mask(tensor) for tensor in tensors]
        result = func(*args, **kwargs)
        joined = masks[0]
        for mask in masks[1:]:
            joined = joined * mask
        for value in tree_leaves(result):
            if any(value is tensor for tensor in tensors):
                self.mask(value).copy_(joined.expand_as(value))
            else:
                self.set(value, joined.expand(value.shape).clone())
        return result

    def there(self, tensor: Tensor, filling: float = 0.0) -> Tensor:
        """The tensor with its gone entries filled."""
        mask = self.mask(tensor)
        return tensor if mask.all() else torch.where(mask > 0, tensor, filling)


def _movable(func: Any, masks: Any, kwargs: Any) -> Any:
    try:
        return func(*masks, **kwargs)
    except RuntimeError:  # the mask lies otherwise in memory than its tensor
        if "view" not in func._schema.name:
            raise
        return masks[0].reshape(masks[1])


HANDLERS: dict[str, Handler] = {}


def handles(*names: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


POINTWISE = frozenset((
    "masked_fill", "masked_fill_", "fill_", "zero_", "gelu_", "silu_", "_prelu_kernel",
    "hardswish", "lerp", "fill", "where", "log_sigmoid_forward", "bernoulli", "dropout", "tril",
    "triu", "tril_", "triu_",
))  # fmt: skip


@handles("copy_")
def copied(s: Shadow, func: Any, own: Tensor, source: Tensor, *rest: Any) -> Tensor:
    s.mask(own).copy_(s.mask(source).expand_as(own))
    return func(own, source, *rest)


@handles("_to_copy")
def converted(s: Shadow, func: Any, own: Tensor, **kwargs: Any) -> Tensor:
    result = func(own, **kwargs)
    s.set(result, s.mask(own).clone())
    return result


@handles("constant_pad_nd")
def padded(s: Shadow, func: Any, own: Tensor, pad: Any, value: Any = 0) -> Tensor:
    """New positions are there wherever any of the old ones beside them is."""
    result = func(own, pad, value)
    mask = s.mask(own)
    dims = [own.dim() - 1 - n for n in range(len(pad) // 2) if any(pad[2 * n : 2 * n + 2])]
    beside = mask.amax(dims, keepdim=True) if dims else mask
    fresh = func(torch.zeros_like(mask), pad, 1.0)
    s.set(result, func(mask, pad, 0.0) + fresh * beside)
    return result


@handles("im2col")
def columns(s: Shadow, func: Any, own: Tensor, *rest: Any) -> Tensor:
    result, mask = func(own, *rest), s.mask(own)
    s.set(result, 1 - func(1 - mask, *rest))
    return result


@handles("upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d",
         "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")  # fmt: skip
def resampled(s: Shadow, func: Any, own: Tensor, *rest: Any) -> Tensor:
    """Of images of which all or nothing is gone."""
    dims, mask = list(range(2, own.dim())), s.mask(own)
    if not torch.equal(mask.amin(dims), mask.amax(dims)):
        raise UndecidedError(f"{func} of an image of which a part is gone")
    result = func(own, *rest)
    s.set(result, mask.amax(dims, True).expand(result.shape).clone())
    return result


@handles("mm", "bmm", "mv", "dot")
def product(s: Shadow, func: Any, a: Tensor, b: Tensor) -> Tensor:
    result = func(s.there(a), s.there(b))
    s.set(result, (func(s.mask(a), s.mask(b)) > 0).double())
    return result


@handles("addmm", "baddbmm", "addmv")
def product_and_sum(s: Shadow, func: Any, c: Tensor, a: Tensor, b: Tensor, **kwargs: Any) -> Tensor:
    result = func(c, s.there(a), s.there(b), **kwargs)
    reached = s.mask(a) @ s.mask(b) > 0
    s.set(result, reached.double() * s.mask(c))
    return result


@handles("convolution", "_convolution")
def convolved(s: Shadow, func: Any, x: Tensor, w: Tensor, b: Any, *rest: Any) -> Tensor:
    result = func(s.there(x), s.there(w), b, *rest)
    reached = (func(s.mask(x), s.mask(w), None, *rest) > 1e-9).double()
    if b is not None:
        reached = reached * s.mask(b).view(-1, *(1,) * (reached.dim() - 2))
    s.set(result, reached)
    return result


def dims_of(own: Tensor, dim: Any) -> list[int]:
    if dim is None or dim == []:
        return list(range(own.dim()))
    return [dim] if isinstance(dim, int) else list(dim)


def left_by(mask: Tensor, dim: Any, keepdim: bool) -> Tensor:
    return mask.amax(dims_of(mask, dim), keepdim) if mask.dim() else mask


@handles("sum", "linalg_vector_norm", "prod", "amax", "amin", "logsumexp", "norm", "any", "all")
def reduced(s: Shadow, func: Any, own: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    name = func._schema.name.partition("::")[2]
    bound = {a.name: v for a, v in zip(func._schema.arguments[1:], args, strict=False)} | kwargs
    dim, keepdim = bound.get("dim"), bool(bound.get("keepdim", False))
    neutral = {"prod": 1.0, "all": 1.0, "amax": -torch.inf, "logsumexp": -torch.inf,
               "amin": torch.inf}.get(name, 0.0)  # fmt: skip
    result = func(s.there(own, neutral), *args, **kwargs)
    s.set(result, left_by(s.mask(own), dim, keepdim))
    return result


@handles("mean")
def mean(s: Shadow, func: Any, own: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    dims, mask = dims_of(own, dim), s.mask(own)
    result = s.there(own).sum(dims, keepdim) / mask.sum(dims, keepdim).clamp(min=1)
    s.set(result, left_by(mask, dim, keepdim))
    return result


@handles("var", "std", "var_mean", "std_mean")
def variance(
    s: Shadow, func: Any, own: Tensor, dim: Any = None, *, correction: Any = 1, keepdim: Any = False
) -> Any:
    name, dims, mask = func._schema.name, dims_of(own, dim), s.mask(own)
    count = mask.sum(dims, True)
    average = s.there(own).sum(dims, True) / count.clamp(min=1)
    spread = torch.where(mask > 0, (own - average).square(), 0.0)
    found = spread.sum(dims, True) / (count - correction)
    found = found.sqrt() if "std" in name else found
    result = [part if keepdim else part.squeeze(dims) for part in (found, average)]
    for part in result:
        s.set(part, left_by(mask, dim, keepdim))
    return tuple(result) if "mean" in name else result[0]


@handles("max", "min")
def extreme(s: Shadow, func: Any, own: Tensor, dim: Any = None, keepdim: bool = False) -> Any:
    filling = -torch.inf if func._schema.name == "aten::max" else torch.inf
    if dim is None:
        return func(s.there(own, filling))
    result = func(s.there(own, filling), dim, keepdim)
    for part in result:
        s.set(part, left_by(s.mask(own), dim, keepdim))
    return result


@handles("_softmax", "_log_softmax", "_safe_softmax")
def softmax(s: Shadow, func: Any, own: Tensor, *rest: Any) -> Tensor:
    result = func(s.there(own, -torch.inf), *rest)
    s.set(result, s.mask(own).clone())
    return result


@handles("cumsum")
def cumulated(s: Shadow, func: Any, own: Tensor, *rest: Any) -> Tensor:
    result = func(s.there(own), *rest)
    s.set(result, s.mask(own).clone())
    return result


@handles("sort", "topk", "argsort", "argmax", "argmin", "median", "kthvalue")
def ordered(s: Shadow, func: Any, own: Tensor, *rest: Any, **kwargs: Any) -> Any:
    """Along a dim of which nothing is gone."""
    bound = {a.name: v for a, v in zip(func._schema.arguments[1:], rest, strict=False)} | kwargs
    dim, mask = bound.get("dim", -1), s.mask(own)
    if not torch.equal(mask.amin(dim), mask.amax(dim)):
        raise UndecidedError(f"{func} along a dim of which something is gone")
    result = func(own, *rest, **kwargs)
    for part in tree_leaves(result):
        one = mask.amax(dim, keepdim=True)
        one = one if part.dim() == own.dim() else one.squeeze(dim)
        s.set(part, one.expand(part.shape).clone())
    return result


def normalised(x: Tensor, mask: Tensor, dims: list[int], eps: float) -> Tensor:
    count = mask.sum(dims, True).clamp(min=1)
    centred = (x - (x * mask).sum(dims, True) / count) * mask
    return centred / ((centred.square().sum(dims, True) / count) + eps).sqrt()


@handles("native_layer_norm")
def layer_norm(s: Shadow, func: Any, x: Tensor, shape: Any, w: Any, b: Any, eps: float) -> Any:
    dims, mask = [-1 - i for i in range(len(shape))], s.mask(x)
    out = normalised(s.there(x), mask, dims, eps)
    return scaled(s, out, mask, w, b), None, None


def scaled(s: Shadow, out: Tensor, mask: Tensor, w: Any, b: Any) -> Tensor:
    if w is not None:
        out, mask = out * w, mask * s.mask(w)
    if b is not None:
        out, mask = out + b, mask * s.mask(b)
    s.set(out, mask.clone())
    return out


@handles("_fused_rms_norm")
def rms_norm(s: Shadow, func: Any, x: Tensor, shape: Any, w: Any, eps: Any) -> Any:
    dims, mask = [-1 - i for i in range(len(shape))], s.mask(x)
    power = s.there(x).square().sum(dims, True) / mask.sum(dims, True).clamp(min=1)
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    return scaled(s, s.there(x) / (power + eps).sqrt(), mask, w, None), None


@handles("native_group_norm")
def group_norm(
    s: Shadow, func: Any, x: Tensor, w: Any, b: Any, n: int, c: int, hw: int, g: int, eps: float
) -> Any:
    blocks = (n, g, (c // g) * hw)
    mask = s.mask(x)
    out = normalised(s.there(x).reshape(blocks), mask.reshape(blocks), [2], eps).reshape(x.shape)
    return per_channel(s, out, mask, w, b), None, None


def per_channel(s: Shadow, out: Tensor, mask: Tensor, w: Any, b: Any) -> Tensor:
    shape = (-1, *(1,) * (out.dim() - 2))
    if w is not None:
        out, mask = out * w.view(shape), mask * s.mask(w).view(shape)
    if b is not None:
        out, mask = out + b.view(shape), mask * s.mask(b).view(shape)
    s.set(out, mask.clone())
    return out


@handles("native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit",
         "_batch_norm_impl_index", "cudnn_batch_norm", "_batch_norm_no_update")  # fmt: skip
def batch_norm(s: Shadow, func: Any, x: Tensor, w: Any, b: Any, *rest: Any) -> Any:
    mask, shape = s.mask(x), (1, -1, *(1,) * (x.dim() - 2))
    statistics = [value for value in rest if isinstance(value, Tensor)]
    eps = [value for value in rest if isinstance(value, float)][-1]
    if statistics and True not in [value for value in rest if isinstance(value, bool)]:
        average, power = (value.view(shape) for value in statistics)
        out = (x - average) / (power + eps).sqrt()
        mask = mask * s.mask(statistics[0]).view(shape)
    else:
        out = normalised(s.there(x), mask, [0, *range(2, x.dim())], eps)
    result = per_channel(s, out, mask, w, b)
    return (result, *[x.new_empty(0)] * (len(func._schema.returns) - 1))


@handles("glu")
def gated(s: Shadow, func: Any, own: Tensor, dim: int = -1) -> Tensor:
    left, right = s.mask(own).chunk(2, dim)
    result = func(own, dim)
    s.set(result, left * right)
    return result


def weight_norm(s: Shadow) -> Any:
    """Weight norm, under which kept weights keep their values: the magnitude makes up for the cut.

    PyTorch computes it by one operator or by several, so it is caught before.
    """
    plain = torch._weight_norm

    def normed(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
        with torch.utils._python_dispatch._disable_current_modes():
            result = plain(v, g, dim)
            s.set(result, (s.mask(v) * s.mask(g)).expand(result.shape).clone())
        return result

    return mock.patch.object(torch, "_weight_norm", normed)


def masks_of(model: nn.Module, keep: Mapping[Axis, Any]) -> dict[str, Tensor]:
    """By name of a tensor: ones where the plan keeps its entries."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    masks: dict[str, Tensor] = {}
    for axis, stay in keep.items():
        tensor = named[axis.tensor]
        line = torch.zeros(tensor.shape[axis.dim], dtype=torch.float64)
        line[list(stay)] = 1
        shape = [1] * tensor.dim()
        shape[axis.dim] = -1
        whole = masks.get(axis.tensor, torch.ones(tensor.shape, dtype=torch.float64))
        masks[axis.tensor] = whole * line.view(shape)
    return masks


def compare(
    model: nn.Module, pruned: nn.Module, keep: Mapping[Axis, Any], args: Any, kwargs: Any
) -> float:
    """Largest relative difference of a pruned model in float64 over the outputs that are whole.

    Raises
    ------
    UndecidedError
        If an operator is not known, or no output is whole.
    """
    expected, there = _run(model, keep, *args, **kwargs)
    with torch.no_grad():
        answer = tree_leaves(pruned.eval()(*as_double(args), **as_double(kwargs)))
    answer = [leaf for leaf in answer if isinstance(leaf, Tensor)]
    if not all(bool(leaf.isfinite().all()) for leaf in expected if leaf.is_floating_point()):
        raise UndecidedError("the model itself overflows in float64")
    if len(answer) != len(expected):
        return float("inf")
    pairs = [(a, b) for a, b, whole in zip(expected, answer, there, strict=True)
               if whole and a.numel()]  # fmt: skip
    if not pairs:
        raise UndecidedError("no output is whole")
    return max(_gap(a, b) for a, b in pairs)


def _gap(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    gap = float((a.double() - b.double()).abs().max() / a.double().abs().max().clamp_min(1e-30))
    return gap if gap == gap else float("inf")


def as_double(values: Any) -> Any:
    def cast(v: Any) -> Any:
        return v.double() if isinstance(v, Tensor) and v.is_floating_point() else v

    return tree_map(cast, values)


def run(model: nn.Module, keep: Mapping[Axis, Any], *args: Any, **kwargs: Any) -> tuple[Any, bool]:
    """The model's answer in float64 without the entries that are gone; whether all of it is there.

    Raises
    ------
    UndecidedError
        If an operator is not known.
    """
    leaves, there = _run(model, keep, *args, **kwargs)
    return leaves, all(there)


def _run(
    model: nn.Module, keep: Mapping[Axis, Any], *args: Any, **kwargs: Any
) -> tuple[list[Tensor], list[bool]]:
    own = copy.deepcopy(model).double().eval()
    masks = masks_of(own, keep)
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        stack.enter_context(torch.no_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.callback(torch._C._set_mkldnn_enabled, torch._C._get_mkldnn_enabled())
        torch._C._set_mkldnn_enabled(False)  # its recurrent kernels are one operator
        shadow = stack.enter_context(Shadow())
        stack.enter_context(weight_norm(shadow))
        with torch.utils._python_dispatch._disable_current_modes():
            for name, tensor in (*own.named_parameters(), *own.named_buffers()):
                if name in masks:
                    shadow.set(tensor, masks[name])
        answer = own(*as_double(args), **as_double(kwargs))
        with torch.utils._python_dispatch._disable_current_modes():
            leaves = [leaf for leaf in tree_flatten(answer)[0] if isinstance(leaf, Tensor)]
            there = [bool(shadow.mask(leaf).all()) for leaf in leaves]
    return leaves, there
