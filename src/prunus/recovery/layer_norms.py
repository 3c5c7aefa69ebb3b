"""LayerNorms and RMSNorms that lost positions say again what they said over all of them.

A norm divides by a statistic of its whole axis.  Over the positions S that stay the statistic is
another, so that everything behind the norm is scaled, row by row.  The mean of that factor goes
into the weight: with the dense model's inputs x of an RMSNorm, ``γ' = γ_S · E[rms(x_S) / rms(x)]``;
of a LayerNorm likewise with std, and ``β' = β_S + γ_S · E[(mean x_S − mean x) / std x]``.  As the
normalised rows are all of the same length, no other factor is nearer in the least squares where
γ is the same everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prunus.graph.axis import Axis
from prunus.graph.plans import Plan
from prunus.graph.program import state_of
from prunus.surgeon.snapshot import own_data

TOLERANCE = 1e-3
"""How far, relative to its outputs, a module may be from a formula that describes it."""


@dataclass(frozen=True)
class Correction:
    """What makes up for the statistic that a norm takes over fewer positions.

    Attributes
    ----------
    weight, bias
        Names of its parameters; the bias is empty where there is none.
    offset
        What the norm adds to its weight before it multiplies: 1 in Gemma's kind, else 0.
    scale
        E[s_S / s], with the rms or the std of a row over what stays, and over all.
    shift
        E[(mean x_S − mean x) / std x]; 0 for an RMSNorm.
    """

    weight: str
    bias: str
    offset: int
    scale: float
    shift: float


@contextmanager
def watching(model: nn.Module, plan: Plan | None) -> Iterator[list[_Watch]]:
    """While the dense model runs within the context, see how norms that a plan shortens change.

    A norm is what computes one: a module whose one or two parameters (weight, bias) are as long as
    the last dim of its input, or as dim 1, and whose outputs are ``γ x / rms(x) + β``, or that of a
    LayerNorm, or either with ``1 + γ`` for γ.  What fits no formula, or several, is passed over;
    so is a norm that shares its parameters with another module.  Means are over all rows
    (samples × positions).  The list is empty where the plan shortens no such axis.
    """
    watches = [] if plan is None else list(_watches(model, plan))
    hooks = [watch.module.register_forward_hook(watch, with_kwargs=True) for watch in watches]
    try:
        yield watches
    finally:
        for hook in hooks:
            hook.remove()


def unseen(watches: Sequence[_Watch]) -> bool:
    """Whether there are norms to watch, and none ran."""
    return bool(watches) and not any(watch.seen for watch in watches)


def corrections_of(watches: Iterable[_Watch]) -> tuple[Correction, ...]:
    """What was seen, for :func:`correct_norms`."""
    return tuple(found for watch in watches if (found := watch.correction()) is not None)


@torch.no_grad()
def correct_norms(model: nn.Module, corrections: Iterable[Correction]) -> None:
    """Write corrections into the parameters of the model that was cut, in place."""
    state, _ = state_of(model)
    for one in corrections:
        weight = state[one.weight]
        factor = weight.double() + one.offset
        if one.bias:
            bias = state[one.bias]
            own_data(bias).copy_(bias.double() + factor * one.shift)
        own_data(weight).copy_(factor * one.scale - one.offset)


class _Form(NamedTuple):
    """A formula: whether rows are centred, what is added to γ, and the dim of the rows."""

    centred: bool
    offset: int
    dim: int


_FORMS = tuple(_Form(*values) for values in product((False, True), (0, 1), (-1, 1)))


class _Watch:
    """A hook on one module: the formulas that still fit, each with its sums over the rows."""

    def __init__(self, module: nn.Module, names: list[str], stay: tuple[int, ...]) -> None:
        self.module = module
        self.names = names
        self.values = [p for p in module._parameters.values() if p is not None]
        self.stay = torch.as_tensor(stay, device=self.values[0].device)
        self.seen = False
        self.open = {form: torch.zeros(3, dtype=torch.float64) for form in _forms_of(module)}

    def __call__(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.seen = True
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if len(given) != 1 or not isinstance(output, Tensor) or output.shape != given[0].shape:
            self.open.clear()
            return
        for form in list(self.open):
            found = self._read(form, given[0], output)
            if found is None:
                del self.open[form]
            else:
                self.open[form] += found

    def _read(self, form: _Form, given: Tensor, output: Tensor) -> Tensor | None:
        """Rows, and sums of s_S / s and of (mean x_S − mean x) / s; None if it does not fit."""
        size = len(self.values[0])
        if given.dim() < 2 + (form.dim == 1) or given.shape[form.dim] != size:
            return None  # a matrix has dim 1 last
        wide = torch.promote_types(given.dtype, torch.float32)
        x, y = (tensor.to(wide).movedim(form.dim, -1) for tensor in (given, output))
        eps = _eps_of(self.module, given.dtype)
        centre, spread = _statistics(x, form, eps)
        said = (x - centre) / spread * (self.values[0].to(wide) + form.offset)
        said = said + self.values[1].to(wide) if len(self.values) > 1 else said
        allowed = max(TOLERANCE, torch.finfo(output.dtype).eps)
        if not bool((y - said).norm() <= allowed * said.norm()):
            return None
        inner, narrow = _statistics(x.index_select(-1, self.stay), form, eps)
        ratio, moved = (narrow / spread).double(), ((inner - centre) / spread).double()
        return torch.stack([ratio.new_tensor(ratio.numel()), ratio.sum(), moved.sum()]).cpu()

    def correction(self) -> Correction | None:
        """What was found, where one formula is left of which there are rows."""
        if len(self.open) != 1:
            return None
        ((form, sums),) = self.open.items()
        rows, ratio, moved = sums.tolist()
        if not rows:
            return None
        bias = self.names[1] if len(self.names) > 1 else ""
        return Correction(self.names[0], bias, form.offset, ratio / rows, moved / rows)


def _statistics(x: Tensor, form: _Form, eps: float) -> tuple[Tensor, Tensor]:
    """What is subtracted from each row, and what it is divided by."""
    centre = x.mean(-1, keepdim=True) if form.centred else x.new_zeros(())
    return centre, ((x - centre).square().mean(-1, keepdim=True) + eps).sqrt()


def _watches(model: nn.Module, plan: Plan) -> Iterator[_Watch]:
    """Modules whose parameters look like those of a norm over an axis that loses positions."""
    _, aliases = state_of(model)
    shared = {*aliases, *aliases.values()}
    for path, module in model.named_modules():
        names = [f"{path}.{name}" if path else name for name in _vectors_of(module)]
        if names and shared.isdisjoint(names):
            stay, *others = {plan.keep.get(Axis(name, 0)) for name in names}
            if stay is not None and not others:
                yield _Watch(module, names, stay)


def _vectors_of(module: nn.Module) -> list[str]:
    """Its one or two parameters, if they are vectors and it is no norm over each channel alone."""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    norm = len(own) in (1, 2) and all(p.dim() == 1 for p in own.values())
    return list(own) if norm and not isinstance(module, nn.modules.batchnorm._NormBase) else []


def _forms_of(module: nn.Module) -> tuple[_Form, ...]:
    """The formulas that a module may compute: one, where its forward is that of PyTorch."""
    for kind, centred in ((nn.LayerNorm, True), (nn.RMSNorm, False)):
        if type(module).forward is kind.forward:
            return (_Form(centred, 0, -1),)
    return _FORMS


def _eps_of(module: nn.Module, dtype: torch.dtype) -> float:
    """What is added to the mean square; libraries call it eps, epsilon or variance_epsilon."""
    for name, value in vars(module).items():
        if "eps" in name and (value is None or isinstance(value, float)):
            return torch.finfo(dtype).eps if value is None else value
    return 0.0
