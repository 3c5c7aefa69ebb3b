"""The comparison once more on inputs of another shape: what only looked right at one shows there.

A slice that was whole, a comparison of sizes, a window as long as the example, a table that the
forward rebuilds for longer inputs: another number of samples, and another resolution or length,
take another path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from prunus.graph.coupling import CouplingGraph
from prunus.graph.expressions import Attribute, Expression, Width
from prunus.graph.program import Ref
from prunus.tracer.inputs import samples_in
from prunus.tracer.outputs import answer_of
from prunus.tracer.rerun import tied_nodes
from prunus.tracer.sources import find_line
from prunus.tracer.trace import quiet_run
from prunus.verifier.case import Case
from prunus.verifier.depth import compare_depth
from prunus.verifier.differences import other_path, other_positions
from prunus.verifier.judgement import Judgement, judge
from prunus.verifier.second_inputs import Inputs, other_inputs

MOST_TRIES = 6
"""Shapes that are tried; a model refuses most of them at once."""

REACH = 4
"""Sequences up to so many times as long are run to pass a threshold; longer ones are traced."""

MOST_FAR = 3
"""Thresholds out of reach that are traced."""


@dataclass(frozen=True)
class Elsewhere:
    """What another shape said.

    Attributes
    ----------
    rel_err
        As of the first comparison; 0 where there was none.
    reason
        Why the two do not agree; empty if they do, or were not compared.
    inputs
        A line for each input that was compared, or why there is none.
    unread
        Parameters that the forward did not read there; None where it did not run.
    """

    rel_err: float
    reason: str
    inputs: tuple[str, ...]
    unread: tuple[str, ...] | None = None

    def still(self, names: Sequence[str]) -> tuple[str, ...]:
        """Which parameters that the first forward did not read this one did not either."""
        return tuple(n for n in names if self.unread is None or n in self.unread)


NOWHERE = Elsewhere(0.0, "", ())
"""Where no other shape was compared."""


def compare_elsewhere(case: Case) -> Elsewhere:
    """Compare on one more batch size and, where the model takes it, resolution or length.

    The pruned model says whether the inputs are taken; that at full size is asked only where it
    refuses them, or where they can't be compared.
    """
    near, far = find_thresholds(case.graph)
    found: list[tuple[Case, Judgement | Exception]] = []
    second, why = _first_taken(
        case, [n + 1 for n in near], lambda inputs: _compared_at(case, inputs, found)
    )
    if second is None:
        return Elsewhere(0.0, "", (why,))
    other, judged = found[-1]
    try:
        error, reason = _what_differs(other, judged)
    except Exception as failure:
        return Elsewhere(0.0, "", (f"not compared at {second}: {failure}",))
    if not reason:
        second, reason = _far(case, far) or (second, "")
    said = f"at {second}: {reason}" if reason else ""
    lines = filter(None, ("" if reason else str(second), why))
    return Elsewhere(error, said, tuple(lines), tuple(other.graph.traced["unread"]))


def _what_differs(case: Case, judged: Judgement | Exception) -> tuple[float, str]:
    """The error, and what is wrong; raises what the comparison raised."""
    if isinstance(judged, Exception):
        raise judged
    reason = _other_couplings(case) or other_path(case) or judged.reason
    if not reason and not judged.exact:
        reason = f"the outputs differ by {judged.rel_err:.1e}"
    return judged.rel_err, reason


def _compared_at(
    case: Case, inputs: Inputs, found: list[tuple[Case, Judgement | Exception]]
) -> str:
    """Compare on other inputs where the model takes them; why they are refused, if they are."""
    other = _at(case, inputs)
    answer, said = _asked(case.pruned, case, inputs)
    said = said and _refusal(case.original, case, inputs)
    if said:
        return said
    try:
        if answer and not tied_nodes(other.graph.program):
            other.answer = answer
        found.append((other, judge(other)))
        said = _no_answer(case, inputs, other.masked)
    except Exception as failure:  # what a model does at another shape may be beyond the tracer
        found.append((other, failure))
        said = "not compared"
    return said and _refusal(case.original, case, inputs)


def depth_elsewhere(original: nn.Module, without: nn.Module, case: Case) -> Elsewhere:
    """Compare a model without blocks with the one that skips them, on one more shape."""
    second, why = _first_taken(case, (), lambda inputs: _refusal(original, case, inputs))
    if second is None:
        return Elsewhere(0.0, "", (why,))
    names = case.plan.drops
    depth = compare_depth(
        original, without, names, second.args, second.kwargs, outputs=case.outputs, each=False
    )
    return Elsewhere(
        depth.rel_err,
        f"at {second}: {depth.wrong}" if depth.wrong else "",
        tuple(filter(None, (str(second), why))),
    )


def _first_taken(
    case: Case, lengths: Sequence[int], refusal: Callable[[Inputs], str]
) -> tuple[Inputs | None, str]:
    """The first other inputs that are not refused, and what was said of better ones."""
    why = ""
    candidates = other_inputs(case.args, dict(case.kwargs), lengths)
    for _, inputs in zip(range(MOST_TRIES), candidates, strict=False):
        said = refusal(inputs)
        if not said:
            return inputs, why
        why = why or f"not compared at {inputs.what}: {said}"
    return None, why or "not compared at another shape: the inputs have no dim that may change"


def _refusal(model: nn.Module, case: Case, inputs: Inputs) -> str:
    """Why a model itself does not take the inputs; empty if it does."""
    return _asked(model, case, inputs)[1]


def _asked(model: nn.Module, case: Case, inputs: Inputs) -> tuple[dict[str, Tensor], str]:
    """What a model answers, and why that is none."""
    try:
        with quiet_run(model):
            found = answer_of(model(*inputs.args, **inputs.kwargs))
    except Exception as failure:  # a forward may raise anything at what it doesn't take
        place = find_line(failure)
        said = f"the model itself raises {type(failure).__name__}"
        return {}, f"{said} at {place}" if place else said
    return found, _no_answer(case, inputs, found)


def _no_answer(case: Case, inputs: Inputs, found: Mapping[str, Tensor]) -> str:
    """Why outputs say nothing, though the model ran; empty if they do.

    ``view(-1, 9 * channels)`` takes images of other sizes, and makes several samples of each.
    """
    if not all(map(_is_finite, found.values())):
        return "the model's outputs are not finite"
    before = case.plan.traced.outputs if case.plan.traced else {}
    samples = samples_in(case.args, case.kwargs), samples_in(inputs.args, inputs.kwargs)
    for name, tensor in found.items():
        shape = before.get(name, ())
        if shape and tensor.dim() and shape[0] == samples[0] and tensor.shape[0] != samples[1]:
            return f"the model answers for {tensor.shape[0]} samples, and is given {samples[1]}"
    return ""


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _at(case: Case, inputs: Inputs) -> Case:
    other = replace(case, args=inputs.args, kwargs=inputs.kwargs, traced=None)
    other.pruned = case.pruned
    return other


def _other_couplings(case: Case) -> str:
    """Where a plan fits these inputs' couplings not, with what pins there; empty if it does."""
    reason = other_positions(case, elsewhere=True)
    if reason:
        implied = dict(case.graph.positions(case.kept))
        for axis in case.plan.keep:
            pins = case.graph.why_pinned(axis) if axis not in implied else ()
            if pins:
                return f"{reason}: {pins[0][1]}"
    return reason


def _far(case: Case, thresholds: Sequence[int]) -> tuple[Inputs, str] | None:
    """What a trace alone says beyond thresholds that are too far to run: nothing is computed."""
    for threshold in thresholds[:MOST_FAR]:
        length = f"length {threshold + 1}"
        for inputs in other_inputs(case.args, dict(case.kwargs), [threshold + 1]):
            if inputs.what.startswith(length):
                other = _at(case, inputs)
                try:
                    reason = _other_couplings(other)
                except Exception:  # the model takes no such length
                    continue
                if reason:
                    return inputs, reason
    return None


def find_thresholds(graph: CouplingGraph) -> tuple[list[int], list[int]]:
    """Lengths beyond which the code may do something else, those within reach and the others.

    Sizes of tables and attributes with which a plain int is compared, and the lengths of tables
    that no parameter is, of which the beginning is taken.
    """
    found: set[tuple[int, int]] = set(_tables(graph))
    for condition in graph.conditions:
        if condition.op == "==":
            continue
        for one, other in ((condition.left, condition.right), (condition.right, condition.left)):
            value = _size_of(graph, one)
            if isinstance(other, int) and value is not None and value >= other > 1:
                found.add((value, other))
    near = {value for value, length in found if value <= REACH * length}
    return sorted(near), sorted({value for value, _ in found} - near)


def _size_of(graph: CouplingGraph, expression: Expression) -> int | None:
    if isinstance(expression, Attribute):
        return graph.attributes.get(expression)
    return expression.size if isinstance(expression, Width) else None


def _tables(graph: CouplingGraph) -> Iterator[tuple[int, int]]:
    """Lengths of tables, and how much of each was taken."""
    program = graph.program
    for node in program.nodes:
        source = node.args.get("self")
        if node.target is not torch.ops.aten.slice.Tensor or not isinstance(source, Ref):
            continue
        name = program.state.get(source.value)
        own = name is not None and name not in graph.parameters
        if own or source.value in program.constants:
            size = program.shapes[source.value][node.args["dim"]]
            taken = node.args["end"] or size
            if node.args["start"] in (None, 0) and 1 < taken < size <= REACH * taken:
                yield size, taken
