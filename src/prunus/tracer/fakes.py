"""Run operators on fake tensors: shapes, types and devices, and nothing computed.

PyTorch's fake mode alone takes some 200 µs for an operator, and ten times that for one that gets
a real tensor.  So tensors are converted once, and an operator that is met again with arguments
of the same shapes is not asked again.

Small tensors of known content (anchors, strides, index tables) are computed beside their fakes,
so that ``.item()`` can answer.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from prunus.tracer.outside import Watch
from prunus.tracer.precision import LOCK

_PLAIN = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
}  # fmt: skip

_KINDS = (FakeTensor, nn.Parameter, Tensor)

_NOT_BY_SHAPE = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


class _Layout(NamedTuple):
    """All that is known of a plain fake tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Fakes:
    """A fake mode, the fake of every tensor that it has met, and what operators returned."""

    def __init__(self, watch: Watch | None = None) -> None:
        self.watch = watch or Watch()
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._known: dict[int, tuple[Tensor, Tensor]] = {}
        self._results: dict[Any, tuple[_Layout, ...] | None] = {}

    def of(self, tensor: Tensor) -> Tensor:
        """The fake of a tensor; always the same one for the same tensor."""
        if isinstance(tensor, FakeTensor):
            return tensor
        known = self._known.get(id(tensor))
        if known is None:
            known = self._known[id(tensor)] = tensor, self._convert(tensor)
        return known[1]

    def run(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        """What an operator returns for the fakes of its arguments."""
        if func is torch.ops.prim.device.default and type(args[0]) is FakeTensor:
            return args[0].fake_device
        key = _key_of(func, args, kwargs)
        layouts = self._results.get(key)
        if layouts is None and func is torch.ops.aten.native_batch_norm.default:
            layouts = _batch_norm_in_eval(args)
        if layouts is None:
            args = [self._all_of(value) for value in args]
            kwargs = {name: self._all_of(value) for name, value in kwargs.items()}
            return self._ask(func, args, kwargs, key)
        if not layouts:
            return self.of(args[0])
        outputs = tuple(map(self._make, layouts))
        return outputs if len(outputs) > 1 else outputs[0]

    def _ask(self, func: OpOverload, args: Any, kwargs: Any, key: Any) -> Any:
        """What PyTorch's own fake kernel says, remembered for the same shapes."""
        with self._mode:
            result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, FakeTensor):
                self.watch.add(leaf)
        if key is not None:
            self._results[key] = _layouts_of(result, args, kwargs, key)
        return result

    def _convert(self, tensor: Tensor) -> Tensor:
        if type(tensor) in _KINDS and _is_plain(tensor):
            return self._make(_layout_of(tensor))
        fake: Tensor = self._mode.from_tensor(tensor)
        self.watch.add(fake)
        return fake

    def _make(self, layout: _Layout) -> Tensor:
        meta = torch.empty_strided(layout.shape, layout.stride, dtype=layout.dtype, device="meta")
        fake: Tensor = FakeTensor(self._mode, meta, layout.device)
        self.watch.add(fake)
        return fake

    def _all_of(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.of(value)
        if isinstance(value, (list, tuple)):
            return type(value)([self._all_of(item) for item in value])
        return value


@contextmanager
def unlogged() -> Iterator[None]:
    """Without PyTorch's account of every fake kernel that fails: a run on real tensors decides."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    with LOCK:
        before = logger.disabled
        try:
            logger.disabled = True
            yield
        finally:
            logger.disabled = before


class FakeRun(TorchDispatchMode):
    """Whatever runs within runs on fakes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fakes = Fakes()

    @property
    def watch(self) -> Watch:
        """Every fake tensor that was made."""
        return self._fakes.watch

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return self._fakes.run(func, args, kwargs or {})


class Shadows:
    """The content of small tensors, by their fakes."""

    LARGEST = 1 << 16
    """The most elements that a tensor has whose content is computed."""

    def __init__(self) -> None:
        self._known = WeakIdKeyDictionary()
        self._stale: set[int] = set()

    def keep(self, fake: Tensor, tensor: Tensor) -> None:
        """What is known of a fake tensor."""
        self._known[fake] = tensor

    def of(self, tensor: Tensor) -> Tensor | None:
        """The content of a tensor: itself if it is real and small; None where it isn't known."""
        if isinstance(tensor, FakeTensor):
            known: Tensor | None = self._known.get(tensor) if self._known else None
            return None if known is None or storage_of(tensor) in self._stale else known
        small = tensor.numel() <= self.LARGEST and tensor.device.type != "meta"
        return tensor if small and not isinstance(tensor, nn.Parameter) else None

    def run(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        """The real result, where all tensors that go in are small and known; else None."""
        if any(isinstance(value, Tensor) and self.of(value) is None for value in args):
            return None
        leaves, spec = tree_flatten((args, kwargs))
        real = [self.of(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        if not _has_values(func, kwargs) or not self._are_known(func, leaves, real):
            return None
        args, kwargs = tree_unflatten(real, spec)
        try:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        except (RuntimeError, NotImplementedError, IndexError, ValueError):
            return None

    def _are_known(self, func: OpOverload, leaves: list[Any], real: list[Any]) -> bool:
        """Whether all that goes in is known, and nothing of the model's would be written to."""
        pairs = [pair for pair in zip(leaves, real, strict=True) if isinstance(pair[0], Tensor)]
        if not pairs:
            return self._is_small_factory(func, leaves)
        written = func._schema.is_mutable
        return all(own is not None and not (written and own is leaf) for leaf, own in pairs)

    def ran(self, func: OpOverload, inputs: Any, out: Any, known: Any) -> None:
        """What an operator returned, beside what :meth:`run` did; else it is stale."""
        if known is not None:
            for tensor, shadow in zip(tree_leaves(out), tree_leaves(known), strict=False):
                if isinstance(tensor, Tensor) and isinstance(shadow, Tensor):
                    self._known[tensor] = shadow
        elif func._schema.is_mutable:
            written = (leaf for leaf in tree_leaves(inputs) if isinstance(leaf, FakeTensor))
            self._stale.update(map(storage_of, written))

    def _is_small_factory(self, func: OpOverload, leaves: list[Any]) -> bool:
        if "empty" in func._schema.name:
            return False
        sizes = (abs(leaf) for leaf in leaves if isinstance(leaf, (int, float)) and leaf)
        return bool(prod(sizes) <= self.LARGEST)


def _has_values(func: OpOverload, kwargs: Any) -> bool:
    """Whether the result of an operator is the same in every run, and holds values at all."""
    device = kwargs.get("device")
    meta = device is not None and torch.device(device).type == "meta"
    return not meta and torch.Tag.nondeterministic_seeded not in func.tags


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is strided, fills a storage of its own, and has no lazy bits."""
    if tensor.layout != torch.strided or tensor.dtype not in _PLAIN or tensor.is_neg():
        return False
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def _layout_of(tensor: Tensor) -> _Layout:
    return _Layout(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)


_ITSELF: dict[bool, tuple[_Layout, ...]] = {True: ()}


def _layouts_of(result: Any, args: Any, kwargs: Any, key: Any) -> tuple[_Layout, ...] | None:
    """What to make such a result from: () for the first argument itself, None if nothing will do.

    Only fresh plain tensors can be made again.
    """
    if args and result is args[0]:
        return _ITSELF.get(_part_of(result) == key[2])
    tensors = result if isinstance(result, tuple) else (result,)
    if not all(isinstance(tensor, FakeTensor) and _is_plain(tensor) for tensor in tensors):
        return None
    made = set(map(storage_of, tensors))
    given = filter(torch.is_tensor, tree_leaves((args, kwargs)))
    return tuple(map(_layout_of, tensors)) if made.isdisjoint(map(storage_of, given)) else None


def _batch_norm_in_eval(args: Sequence[Any]) -> tuple[_Layout, ...] | None:
    """What PyTorch takes 3 ms to find for every new shape; None for what this doesn't cover."""
    data, training = args[0], args[5]
    if training or not _is_plain(data) or not _is_dense(data):
        return None
    nothing = _Layout((0,), (1,), data.dtype, data.device)
    return _layout_of(data), nothing, nothing


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or (
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    )


def storage_of(tensor: Tensor) -> int:
    """Equal for tensors of one memory."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return id(tensor)


@functools.lru_cache(1 << 12)
def _goes_by_shape(func: OpOverload) -> bool:
    """Whether shapes in determine shapes out, and nothing but the first argument is written to."""
    schema = func._schema
    question = schema.name.startswith("prim::")
    if question or not _NOT_BY_SHAPE.isdisjoint(func.tags):
        return False
    shared = any(one.alias_info for one in schema.returns)
    if (shared and not schema.is_mutable) or not _writes_to_first(schema):
        return False
    return all(isinstance(one.type, torch.TensorType) for one in schema.returns)


def _writes_to_first(schema: Any) -> bool:
    """Whether no argument but the first is shared with a result, and that one if written to."""
    given = [(n, one.alias_info) for n, one in enumerate(schema.arguments) if one.alias_info]
    return all(n == 0 and info.is_write == schema.is_mutable for n, info in given)


def _key_of(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Equal for calls that return the same shapes; None where that can't be told."""
    if not _goes_by_shape(func):
        return None
    try:
        parts = [*map(_part_of, args), *((name, _part_of(kwargs[name])) for name in kwargs)]
        key = (func, torch.get_default_dtype(), *parts)
        hash(key)
    except (TypeError, ValueError):
        return None
    return key


def _part_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        known = type(value) in _KINDS and value.layout == torch.strided
        if not known or value.dtype not in _PLAIN or value.is_neg():
            raise ValueError("not a plain tensor")
        return (tuple(value.shape), value.stride(), value.dtype, value.device)
    if isinstance(value, (list, tuple)):
        return tuple(map(_part_of, value))
    return type(value), value
