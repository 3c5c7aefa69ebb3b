"""PyTorch's attention fast path: a setting in which a model may answer otherwise.

``nn.TransformerEncoder`` with a padding mask drops the padded positions there, and fills them
with zeros at the end.  A trace runs without it, and so does a pruned ``nn.MultiheadAttention``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prunus.graph.program import state_of
from prunus.tracer.copies import duplicate
from prunus.verifier.case import Case, tolerance
from prunus.verifier.comparison import Comparison, compare_with
from prunus.verifier.permutation import relative_error

_FAST = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)

_FIX = "torch.backends.mha.set_fastpath_enabled(False) makes both answer alike"


def fast_path_matters(case: Case, enabled: bool) -> bool:
    """Whether the model at full size answers otherwise with the fast path, where that is on."""
    if not enabled or not any(isinstance(module, _FAST) for module in case.original.modules()):
        return False
    with case.blaming_the_model():
        fast = case.run(case.original, fast_path=True)
    outputs = {name: case.dense[name] for name in case.graph.kept_outputs}
    return not relative_error(outputs, fast) <= tolerance(case.dtype)


def compare_on_fast_path(case: Case) -> Comparison:
    """The pruned model on the fast path, against the original there with its units zeroed.

    Zeroing every row and column of a removed unit is the masked original where nothing mixes the
    units; a norm or softmax over them would see the zeros.
    """
    mixed = [group.name for group in case.touched if group.mixing]
    if mixed:
        return Comparison(
            float("inf"),
            "the model answers otherwise on PyTorch's attention fast path (padded positions are "
            f"zero there), which can't be verified where a norm reads the units of {mixed[0]}; "
            + _FIX,
        )
    zeroed = case.run(_zeroed(case), fast_path=True)
    outputs = {name: zeroed[name] for name in case.graph.kept_outputs}
    found = compare_with(outputs, case, fast_path=True)
    if found.reason or found.rel_err <= tolerance(case.dtype):
        return found
    return Comparison(
        found.rel_err,
        "on PyTorch's attention fast path the model answers otherwise (padded positions are zero "
        f"there), and the pruned one does not follow: the outputs differ by {found.rel_err:.1e}; "
        + _FIX,
    )


def _zeroed(case: Case) -> nn.Module:
    """A copy with zeros at every position that the plan removes."""
    model = duplicate(case.original)
    state: dict[str, Tensor] = state_of(model)[0]
    with torch.no_grad():
        for axis, stay in case.plan.keep.items():
            tensor = state[axis.tensor]
            gone = torch.ones(tensor.shape[axis.dim], dtype=torch.bool)
            gone[list(stay)] = False
            tensor.index_fill_(axis.dim, gone.nonzero().flatten().to(tensor.device), 0)
    return model
