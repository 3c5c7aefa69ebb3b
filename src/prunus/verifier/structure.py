"""What a forward does not notice: index maps that disagree, stale attributes, lost ties."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import is_parametrized

from prunus.graph.axis import Axis
from prunus.graph.program import stored
from prunus.tracer.trace import quiet_run
from prunus.verifier.case import Case

_STATED: tuple[tuple[Any, Callable[[Any], tuple[int, ...]]], ...] = (
    (nn.Linear, lambda m: (m.out_features, m.in_features)),
    (_ConvTransposeNd, lambda m: (m.in_channels, m.out_channels // m.groups)),
    (_ConvNd, lambda m: (m.out_channels, m.in_channels // m.groups)),
    (_NormBase, lambda m: (m.num_features,)),
    (nn.GroupNorm, lambda m: (m.num_channels,)),
    ((nn.LayerNorm, nn.RMSNorm), lambda m: tuple(m.normalized_shape)),
    (nn.Embedding, lambda m: (m.num_embeddings, m.embedding_dim)),
    (nn.PReLU, lambda m: (m.num_parameters,)),
)
"""What standard modules say of the first dims of their weight, or of their running mean."""


def other_positions(case: Case, *, elsewhere: bool = False) -> str:
    """Why the plan's index maps are no consistent choice of units; empty if they are.

    ``elsewhere``: the case's inputs are others than the plan's.  What they leave unused is then
    no contradiction: a recurrent weight reads only zeros in the first of one step.
    """
    keep, implied = case.plan.keep, dict(case.graph.positions(case.kept))
    for axis in (*keep, *implied):
        asked, want = keep.get(axis), implied.get(axis)
        if elsewhere and want is None and _is_unused(case, axis):
            continue
        if asked is None or want is None or list(asked) != list(want):
            return f"the plan keeps other positions on {axis} than its couplings demand"
    return ""


def _is_unused(case: Case, axis: Axis) -> bool:
    """Whether nothing on these inputs labels an axis, and nothing pins it either."""
    label = case.graph.labels.get(axis)
    return (label is None or not label.any()) and not case.graph.why_pinned(axis)


def stale_attribute(case: Case) -> str:
    """A standard module of the pruned model that says another size than its tensors have."""
    modules = dict(case.pruned.named_modules())
    with _reading(case.original), _reading(case.pruned):
        for name, before in case.original.named_modules():
            said, shape = _stated(modules.get(name))
            said_before, shape_before = _stated(before)
            if said_before == shape_before and said != shape:
                return f"{name} says {said} of a tensor of shape {shape}: an attribute is stale"
    return ""


def other_count(case: Case) -> str:
    """Whether the cut removed as many parameters as the couplings say; tied ones come apart."""
    models = (case.original, case.pruned)
    counts = [sum(p.numel() for p in model.parameters()) for model in models]
    removed = case.graph.cost("params") - case.graph.cost("params", case.kept)
    if counts[0] - counts[1] != removed:
        return f"the cut removed {counts[0] - counts[1]} parameters, its couplings say {removed}"
    return ""


def _reading(model: nn.Module) -> AbstractContextManager[None]:
    """Reading a computed weight may change state, which is then put back."""
    return quiet_run(model) if any(map(is_parametrized, model.modules())) else nullcontext()


def _stated(module: nn.Module | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    stated = next((stated for kind, stated in _STATED if isinstance(module, kind)), None)
    if module is None or stated is None:
        return (), ()
    read = getattr if is_parametrized(module) else stored
    named = (read(module, name) for name in ("weight", "running_mean"))
    tensor = next((value for value in named if isinstance(value, Tensor)), None)
    if tensor is None:
        return (), ()
    said = stated(module)
    return said, tuple(tensor.shape[: len(said)])
