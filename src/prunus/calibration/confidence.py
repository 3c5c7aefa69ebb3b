"""How sure attention is: the largest probability of every query, by head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._ops import OpOverload

from prunus.graph.axis import Label
from prunus.graph.program import Program
from prunus.tracer.registry import bind

_SOFTMAX = ("aten::_softmax", "aten::_safe_softmax")
_FUSED = "aten::_scaled_dot_product_"


@dataclass(eq=False)
class Heads:
    """A dim of the attention probabilities on which units stand: sums per position.

    ``count`` queries were seen at each of the ``n`` positions; ``total`` is the sum of their
    largest probabilities, shape ``(n,)``.
    """

    module: str
    dim: int
    label: Label = field(repr=False)
    count: int = 0
    total: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0), repr=False)

    def __post_init__(self) -> None:
        self.total = np.zeros(len(self.label))

    def merge(self, other: Heads) -> None:
        """Add what was seen of other samples."""
        self.count += other.count
        self.total += other.total


class Confidence:
    """Sums of the largest attention probabilities (Voita et al., 2019, section 4).

    A recorded softmax over keys is found again by its module and by its place among those of
    the module.  Kernels that hide the probabilities have them computed beside, a sample at a
    time.
    """

    def __init__(self, program: Program) -> None:
        self._expected: dict[str, list[tuple[Heads, ...]]] = {}
        self._seen: Counter[str] = Counter()
        for node in program.nodes:
            if not _attends(node.target, node.args, lambda ref: len(program.shapes[ref.value])):
                continue
            fused = node.target._schema.name.startswith(_FUSED)
            operand = node.args["query" if fused else "self"]
            lead = len(program.shapes[operand.value]) - 2
            found = []
            for dim in range(lead):
                label = program.value_label(operand, dim)
                if label is not None:
                    found.append(Heads(node.module, dim - lead, label))
            self._expected.setdefault(node.module, []).append(tuple(found))
        self.heads = [h for sites in self._expected.values() for found in sites for h in found]

    def begin(self) -> None:
        """Another forward starts."""
        self._seen.clear()

    def look(
        self,
        module: str,
        func: OpOverload,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        out: Any,
    ) -> None:
        """Take down an operator if it is the softmax of an attention."""
        name = func._schema.name
        if name not in _SOFTMAX and not name.startswith(_FUSED):
            return
        bound = bind(func, args, kwargs)
        if not _attends(func, bound, lambda tensor: tensor.dim()):
            return
        index = self._seen[module]
        self._seen[module] += 1
        expected = self._expected.get(module, [])
        if index >= len(expected) or not expected[index]:
            return
        largest = _largest(bound) if name.startswith(_FUSED) else out.amax(-1)
        largest = (largest.cpu() if largest.device.type == "mps" else largest).double()
        largest = largest.nan_to_num(0.0)  # of a query to which every key is hidden
        for heads in expected[index]:
            dim = largest.dim() - 1 + heads.dim
            if largest.shape[dim] != len(heads.label):
                continue
            sums = largest.movedim(dim, -1).reshape(-1, largest.shape[dim])
            heads.count += len(sums)
            heads.total += sums.sum(0).cpu().numpy()


def _attends(func: OpOverload, bound: Mapping[str, Any], rank: Callable[[Any], int]) -> bool:
    """Whether this is a fused attention, or a softmax over the last of three dims or more."""
    name = func._schema.name
    if name.startswith(_FUSED):
        return True
    if name not in _SOFTMAX:
        return False
    dims: int = rank(bound["self"])
    dim: int = bound["dim"]
    return dims > 2 and dim % dims == dims - 1


def _largest(bound: Mapping[str, Any]) -> Tensor:
    """The largest probability of every query, shape ``(…, L)``, of a fused operator's arguments."""
    query, key = bound["query"], bound["key"]
    mask = bound.get("attn_mask")
    mask = bound.get("attn_bias") if mask is None else mask
    scale = bound.get("scale")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    shared = query.shape[-3] // key.shape[-3] if query.dim() > 2 else 1
    wide = torch.promote_types(query.dtype, torch.float32)
    found = []
    for index in range(query.shape[0]):
        keys = key[index].to(wide)
        if shared > 1:
            keys = keys.repeat_interleave(shared, -3)
        logits = query[index].to(wide) @ keys.transpose(-2, -1) * scale
        if bound.get("is_causal"):
            later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
            logits = logits.masked_fill(later, float("-inf"))
        if mask is not None:
            own = mask[index % len(mask)] if mask.dim() == query.dim() else mask
            if own.dtype == torch.bool:
                logits = logits.masked_fill(~own, float("-inf"))
            else:
                logits = logits + own
        found.append(logits.softmax(-1).amax(-1))
    return torch.stack(found)
