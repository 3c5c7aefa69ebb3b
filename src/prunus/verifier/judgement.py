"""The checks of one case, in order, and what they come to.

The pruned model's own forward is compared with the masked original, with PyTorch's settings as
they are; a difference in float32 that may be rounding is looked at again in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prunus.errors import PrunusError, checks_options
from prunus.graph.program import state_of
from prunus.tracer.copies import duplicate
from prunus.tracer.sources import find_line
from prunus.verifier.case import MOVED, Case, tolerance
from prunus.verifier.differences import (
    other_attributes,
    other_count,
    other_path,
    other_positions,
    other_tensors,
    other_ties,
    stale_attribute,
)
from prunus.verifier.permutation import relative_error, to_double

Verdict = Literal["exact", "inexact", "not verified"]


@checks_options
@dataclass(frozen=True)
class Certificate:
    """What was compared, and the verdict.

    Attributes
    ----------
    rel_err
        Largest ‖pruned − masked‖∞ / ‖masked‖∞ over the outputs, in ``dtype``.
    exchanged
        The same measure between the original and itself with the units of every touched group in
        another order (:mod:`prunus.verifier.permutation`).
    moved
        The same measure between the masked and the untouched original.
    moved_alone
        The same with each touched group removed alone, and each dropped block skipped alone.
    unverified
        Groups and blocks whose removal alone moves no output by more than 1e-3.
    rel_err32
        The error in float32, where it was above 1e-4 and float64 showed that it is rounding.
    inputs
        A line for each input on which the pruned model and the masked original were compared.
    unread
        Parameters that no compared forward read: nothing is verified of them.
    renormalised
        Groups whose removal changes kept weights (weights computed from weights, as in spectral
        norm), with the relative distance of the outputs to plain silencing.
    released
        Outputs that may shrink: caches and the side outputs of transformers' output classes.
    stale
        Integers of modules that equal a removed width and that no run forward reads, and other
        forwards of a module that no longer compute what the traced one does.
    """

    verdict: Verdict
    rel_err: float
    exchanged: float
    moved: float
    moved_alone: Mapping[str, float]
    unverified: tuple[str, ...]
    dtype: str
    params: tuple[int, int]
    outputs: tuple[str, ...]
    reason: str = ""
    rel_err32: float | None = None
    inputs: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    renormalised: Mapping[str, float] = field(default_factory=dict)
    released: tuple[str, ...] = ()
    stale: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.verdict == "inexact":
            return f"inexact: {self.reason or f'the outputs differ by {self.rel_err:.1e}'}"
        if self.verdict == "not verified":
            return f"not verified: {self.reason or 'no measurable effect on the outputs'}"
        return (
            f"verified (exact): max relative error {self.rel_err:.1e} against the masked model; "
            f"pruning changed the outputs by {self.moved:.1e}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data; what was added after the first format only where there is something."""
        found = asdict(self)
        for name in ("rel_err32", "inputs", "unread", "renormalised", "released", "stale"):
            if not found[name] and found[name] != 0:
                del found[name]
        return found


def verdict_of(reason: str, moved: float) -> Verdict:
    """What a reason, if there is one, and how far removal moved the outputs come to."""
    return "inexact" if reason else "exact" if moved > MOVED else "not verified"


STRUCTURE: tuple[Callable[[Case], str], ...] = (
    stale_attribute,
    other_count,
    other_path,
    other_ties,
    other_tensors,
    other_attributes,
)
"""What is compared without running anything; each says what is wrong, or nothing."""


@dataclass(frozen=True)
class Judgement:
    """The largest relative error of the outputs in ``dtype``, and why a case is not exact.

    ``rel_err32`` is the error in float32 where float64 showed that it is rounding.
    """

    rel_err: float
    dtype: torch.dtype
    reason: str = ""
    rel_err32: float | None = None

    @property
    def exact(self) -> bool:
        """Whether the outputs agree and nothing else is wrong."""
        return not self.reason and self.rel_err <= tolerance(self.dtype)


def judge(case: Case, *, fast_path: bool = False) -> Judgement:
    """The pruned model's own forward, against the replay with units silenced.

    Whether a difference in float32 is rounding shows in float64.

    Raises
    ------
    PrunusError
        If the masked original can't be computed, the plan can't be applied, or the model itself
        does not run on these inputs either.
    """
    found = _compare(case, case.masked, fast_path)
    if not found.reason and not found.exact and found.dtype == torch.float32:
        double = error_in_float64(case, found.rel_err)
        if double is not None:
            return Judgement(double, torch.float64, "", found.rel_err)
    return found


def judge_as_users_run(case: Case, fast_path: bool) -> Judgement:
    """The same with PyTorch's settings as they are, and everything that needs no run.

    Where the attention fast path changes what the model answers, both ways are compared.
    """
    consistent = other_positions(case)
    found = None
    if fast_path_matters(case, fast_path):
        found, fast_path = _judge_on_fast_path(case), False
    if found is None or found.exact:
        found = judge(case, fast_path=fast_path)
    reasons = (reason for check in STRUCTURE if (reason := check(case)))
    return replace(found, reason=consistent or found.reason or next(reasons, ""))


def largest_errors(judged: Sequence[Judgement]) -> tuple[torch.dtype, float, float | None]:
    """The type in which was judged, the largest error in it, and that in float32 if it is wider."""
    wide = [one for one in judged if one.rel_err32 is not None]
    dtype = (wide or judged)[-1].dtype
    error = max(one.rel_err for one in judged if one.dtype == dtype or not one.exact)
    if not wide:
        return dtype, error, None
    return dtype, error, max(one.rel_err32 or one.rel_err for one in judged)


def _compare(case: Case, masked: Mapping[str, Tensor], fast_path: bool) -> Judgement:
    """The pruned model's own forward beside outputs of a masked original."""
    try:
        answer = case.run(case.pruned, fast_path=True) if fast_path else case.answer
    except PrunusError:
        raise
    except Exception as failure:  # the pruned model's own forward may raise anything
        with case.blaming_the_model():
            case.run(case.original, fast_path=fast_path)
        return Judgement(
            float("inf"),
            case.dtype,
            f"the pruned model's forward raised {type(failure).__name__} "
            f"at {find_line(failure)}: {failure}",
        )
    return Judgement(relative_error(masked, answer), case.dtype)


DOUBTFUL = 1e-2
"""A float32 difference below this may be rounding that depth amplified; float64 decides."""

AMPLIFIED = 10.0
"""So may a greater one, up to this many times what rounding changes in the masked original."""

JITTERS = 4
"""Runs of the masked original on weights that are moved by rounding; a near tie may hold in one."""


def error_in_float64(case: Case, error: float) -> float | None:
    """The error in float64 where that shows the error in float32 to be rounding; else None.

    That needs a model that runs the same operators in float64.
    """
    wide = _in_double(case)
    if wide is None:
        return None
    try:
        found = _compare(wide, wide.masked, fast_path=False)
        same = not any(check(wide) for check in (other_positions, stale_attribute, other_count))
        if not (same and found.exact and wide.dtype == torch.float64):
            return None
        if error >= DOUBTFUL and not _rounding_moves(case, wide.masked, error / AMPLIFIED):
            return None
    except Exception:  # an operator, or the cut model's forward, may insist on its type
        return None
    return found.rel_err


def _rounding_moves(case: Case, exact: Mapping[str, Tensor], error: float) -> bool:
    """Whether rounding alone moves the masked original in float32 by more than an error.

    A choice among near ties (``topk``, ``sort``, ``argmax``) turns rounding into another answer.
    ``exact`` are its outputs in float64.  They may choose as float32 does where the pruned model's
    order of summation does not, so it also runs on weights that are off by a few units in the last
    place.
    """
    if relative_error(exact, case.masked) > error:
        return True
    generator = torch.Generator().manual_seed(case.seed)
    for _ in range(JITTERS):
        moved = {name: _jittered(tensor, generator) for name, tensor in case.state[0].items()}
        outputs = case.replay_of(case.graph, moved).run(case.kept)
        if relative_error(case.masked, outputs) > error:
            return True
    return False


def _jittered(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """A tensor whose every entry is off by up to four times the machine epsilon, relatively."""
    if tensor.dtype != torch.float32:
        return tensor
    noise = torch.rand(tensor.shape, generator=generator).to(tensor.device) * 2 - 1
    return tensor * (1 + 4 * torch.finfo(torch.float32).eps * noise)


def _in_double(case: Case) -> Case | None:
    """The same case with weights and inputs in float64; None where it runs other operators."""
    try:
        original = duplicate(case.original).double()
        source = original if case.source is case.original else duplicate(case.source).double()
        args, kwargs = to_double((case.args, case.kwargs))
        outputs = case.graph.kept_outputs
        wide = replace(
            case,
            original=original,
            source=source,
            args=args,
            kwargs=kwargs,
            outputs=outputs,
            traced=None,
        )
        same = _operators(wide) == _operators(case)
    except Exception:  # a forward that insists on its own type may raise anything
        return None
    return wide if same else None


def _operators(case: Case) -> list[Any]:
    """The operators of the program, without conversions, which other types need elsewhere."""
    nodes = case.graph.program.nodes
    return [n.target for n in nodes if n.target is not torch.ops.aten._to_copy.default]


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


def _judge_on_fast_path(case: Case) -> Judgement:
    """The pruned model on the fast path, against the original there with its units zeroed.

    Zeroing every row and column of a removed unit is the masked original where nothing mixes the
    units; a norm or softmax over them would see the zeros.
    """
    mixed = [group.name for group in case.touched if group.mixing]
    if mixed:
        return Judgement(
            float("inf"),
            case.dtype,
            "the model answers otherwise on PyTorch's attention fast path (padded positions are "
            f"zero there), which can't be verified where a norm reads the units of {mixed[0]}; "
            + _FIX,
        )
    zeroed = case.run(_zeroed(case), fast_path=True)
    outputs = {name: zeroed[name] for name in case.graph.kept_outputs}
    found = _compare(case, outputs, fast_path=True)
    if found.reason or found.exact:
        return found
    return replace(
        found,
        reason="on PyTorch's attention fast path the model answers otherwise (padded positions are "
        f"zero there), and the pruned one does not follow: the outputs differ by "
        f"{found.rel_err:.1e}; {_FIX}",
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
