"""What the layers of a model hear of noise on some rows of what makes channels.

The second witness (:mod:`tests.witness`) listens with it: every layer is given what it read in a
run without noise, so that noise gets no further than to the layers that read it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prunus.tracer.precision import same_draws

CONTRACTIONS = {
    *("mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "convolution"),
    *(
        "_grouped_mm",
        "mkldnn_rnn_layer",
        "native_layer_norm",
        "_fused_rms_norm",
        "native_group_norm",
    ),
    *("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention"),
    *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"),
}
"""Operators that read channels into others; outside of a layer they may not meet a removed one."""

LAYERS = (nn.Linear, _ConvNd, nn.Embedding)


class UndecidedError(Exception):
    """The witness can't tell, for the reason given."""


@dataclass(frozen=True)
class Gone:
    """What a plan removes of whatever makes channels.

    ``rows``: module path → output channels of a layer.  ``tables``: tensor → positions of its
    dims, for tensors that belong to no layer (position tables, query embeddings, gains).
    """

    rows: Mapping[str, NDArray[np.int64]]
    tables: Mapping[str, Mapping[int, NDArray[np.int64]]]


def carries(module: nn.Module) -> bool:
    """Whether each output channel reads one input channel: depthwise, both ways."""
    grouped = isinstance(module, _ConvNd) and module.groups > 1
    return grouped and module.in_channels == module.groups


def carries_one(module: nn.Module) -> bool:
    """Whether it has one output channel for every input channel, so that none is its own."""
    return carries(module) and bool(module.out_channels == module.in_channels)


@dataclass
class Heard:
    """One run: what every layer read, and what contractions outside of layers read."""

    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    operands: list[list[Tensor]] = field(default_factory=list)
    moved: dict[str, NDArray[np.bool_]] = field(default_factory=dict)
    patchy: set[str] = field(default_factory=set)
    ran: set[str] = field(default_factory=set)
    answer: Any = None


def run_noisily(
    model: nn.Module,
    gone: Gone,
    noise: Noise | None,
    clean: Heard | None,
    args: Any,
    kwargs: Any,
) -> Heard:
    """Run with noise on the rows; where a clean run is given, every layer reads what it read then.

    So noise never gets past a layer that reads it, and each is judged by itself.
    """
    heard = Heard()
    guard = _Guard(heard, clean)
    handles: list[Any] = []
    for name, module in model.named_modules():
        if not isinstance(module, LAYERS):
            continue
        if not carries(module) and not isinstance(module, nn.Embedding):
            ear = _Ear(name, heard, clean)
            handles.append(module.register_forward_pre_hook(ear, with_kwargs=True))
        handles.append(module.register_forward_pre_hook(partial(guard.enter, name)))
        handles.append(module.register_forward_hook(guard.leave, always_call=True))
    try:
        with noise.on(model, gone) if noise else nullcontext(), quiet(model), guard:
            heard.answer = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return heard


class _Ear:
    """Compares what a layer reads with what it read in the clean run, and gives it the latter.

    In the clean run a layer gets a copy as well: a kernel rounds differently on a slice of a
    larger tensor than on a tensor of its own, and runs are compared bit for bit.
    """

    def __init__(self, name: str, heard: Heard, clean: Heard | None) -> None:
        self._name, self._heard, self._clean = name, heard, clean

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        values = args[0] if args else kwargs["input"]
        calls = self._heard.inputs.setdefault(self._name, [])
        calls.append(values.clone())
        if self._clean is None:
            return _given(values.clone(), args, kwargs)
        known = self._clean.inputs.get(self._name, [])
        if len(known) < len(calls) or known[len(calls) - 1].shape != values.shape:
            raise UndecidedError(f"noise changes how often {self._name} runs")
        reference = known[len(calls) - 1]
        weight: Any = module.weight
        channel = values.dim() + 1 - weight.dim()
        others = [dim for dim in range(values.dim()) if dim != channel]
        differs = differ(values, reference)
        if any(_is_patchy(differs, dim) for dim in others):
            self._heard.patchy.add(self._name)
        differs = differs.any(dim=others) if others else differs
        before = self._heard.moved.get(self._name, np.False_)
        self._heard.moved[self._name] = before | differs.cpu().numpy()
        return _given(reference.clone(), args, kwargs)


def _is_patchy(differs: Tensor, dim: int) -> bool:
    """Whether some positions of a dim differ and others don't."""
    hit = differs.movedim(dim, 0).flatten(1).any(1)
    return bool(hit.any()) and not bool(hit.all())


def _given(values: Tensor, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return ((values, *args[1:]), kwargs) if args else (args, {**kwargs, "input": values})


class _Guard(TorchDispatchMode):
    """Watches contractions outside of layers: none may read a removed unit."""

    def __init__(self, heard: Heard, clean: Heard | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._heard, self._clean, self._depth = heard, clean, 0

    def enter(self, name: str, module: nn.Module, args: Any) -> None:
        """A layer begins to run."""
        self._heard.ran.add(name)
        self._depth += 1

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """A layer has run."""
        self._depth -= 1

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name.partition("::")[2]
        if not self._depth and name in CONTRACTIONS:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            if self._clean is None:
                self._heard.operands.append([tensor.clone() for tensor in tensors])
            else:
                self._compare(name, tensors)
        return func(*args, **(kwargs or {}))

    def _compare(self, name: str, tensors: list[Tensor]) -> None:
        assert self._clean is not None
        self._heard.operands.append([])
        index = len(self._heard.operands) - 1
        known = self._clean.operands[index] if index < len(self._clean.operands) else []
        same = [tensor.shape for tensor in known] == [tensor.shape for tensor in tensors]
        if not same or any(differ(a, b).any() for a, b in zip(known, tensors, strict=True)):
            raise UndecidedError(f"{name}, which is no layer, reads a removed unit")


@dataclass(frozen=True)
class Noise:
    """Noise on what is gone, in standard deviations of what it is added to.

    Half of it is the same for a whole channel, which moves windows and means as well.
    """

    scale: float
    seed: int

    @contextmanager
    def on(self, model: nn.Module, gone: Gone) -> Iterator[None]:
        """Within the context the model runs with noise."""
        handles = [
            model.get_submodule(name).register_forward_hook(self._hook(rows, stream))
            for stream, (name, rows) in enumerate(gone.rows.items())
        ]
        tables = {name: fetch(model, name) for name in gone.tables}
        before = {name: tensor.detach().clone() for name, tensor in tables.items()}
        try:
            with torch.no_grad():
                for stream, (name, tensor) in enumerate(tables.items()):
                    for dim, positions in gone.tables[name].items():
                        shaken = self._added(tensor, dim, positions, 500 + stream)
                        tensor.copy_(shaken.abs().copysign(tensor))  # a variance stays one
            yield
        finally:
            with torch.no_grad():
                for name, tensor in tables.items():
                    tensor.copy_(before[name])
            for handle in handles:
                handle.remove()

    def _hook(self, rows: NDArray[np.int64], stream: int) -> Any:
        def add(module: Any, args: Any, output: Tensor) -> Tensor:
            return self._added(output, output.dim() + 1 - module.weight.dim(), rows, stream)

        return add

    def _added(self, tensor: Tensor, dim: int, positions: NDArray[np.int64], stream: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self.seed + stream)
        shape = list(tensor.shape)
        shape[dim] = len(positions)
        noise = torch.randn(shape, generator=generator)
        noise = noise + torch.randn(
            [n if d == dim else 1 for d, n in enumerate(shape)], generator=generator
        )
        spread = tensor.std(correction=0).item() or 1.0
        index = torch.as_tensor(positions, device=tensor.device)
        shaken = tensor.index_add(dim, index, noise.to(tensor), alpha=self.scale * spread)
        # Kernels round differently in another memory format, and runs are compared bit for bit.
        return torch.empty_like(tensor).copy_(shaken)


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, no fused encoder; the models that run here are our own copies."""
    model.eval()
    with same_draws(), torch.no_grad():
        fused = torch.backends.mha.get_fastpath_enabled()
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            torch.manual_seed(0)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)


def fetch(model: nn.Module, name: str) -> Any:
    prefix, _, own = name.rpartition(".")
    return getattr(model.get_submodule(prefix), own)


def differ(a: Tensor, b: Tensor) -> Tensor:
    return (a != b) & ~(a.isnan() & b.isnan())
