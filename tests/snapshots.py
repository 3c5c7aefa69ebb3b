"""What a model is, byte for byte, to tell that nothing touched it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prunus.graph.program import state_of


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that surgery may touch: bytes, identities, attributes, modes."""
    return {
        "state": {name: (id(t), t.clone(), t.stride()) for name, t in state_of(model)[0].items()},
        "grads": {
            n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()
        },
        "plain": {
            name: {k: v for k, v in vars(m).items() if isinstance(v, (bool, int, float, tuple))}
            for name, m in model.named_modules()
        },
        "hooks": {
            name: [len(v) for k, v in vars(m).items() if k.endswith("_hooks")]
            for name, m in model.named_modules()
        },
    }


def same(a: Any, b: Any) -> bool:
    """Equal down to the bits, NaN included."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape) and _bits(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def _bits(a: Tensor, b: Tensor) -> bool:
    one, other = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(one, other)
