"""Whether config.json can say what was cut, so that the unmodified library builds it.

Nothing is known of any architecture.  Integers of the config are changed in the proportion in
which tensors shrank, as long as that brings the model that the library would build (on the meta
device, which costs no memory) nearer to the cut one; what is found is accepted when all shapes
agree, and when saved, when the outputs do.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from prunus.errors import ModelError, PlanError, checks_options
from prunus.graph.coupling import CouplingGraph
from prunus.graph.groups import Lockstep
from prunus.graph.plans import Plan
from prunus.planner.allocate import select
from prunus.structures import Structure, find_structures
from prunus.surgeon import apply
from prunus.surgeon.attributes import find_edits
from prunus.surgeon.snapshot import applied_plan

Shapes = Mapping[str, tuple[int, ...]]
Pairs = frozenset[tuple[int, int]]
"""Sizes before and after."""

Place = tuple[str, ...]
"""Names of nested configs and of an entry."""

_BUILDS = 400
"""Models that are built on the meta device, at most, before a search is given up."""

CLOSE = 1e-5
"""Largest relative difference between the outputs of the cut model and of the library's own."""

_NAMED = 3


@checks_options
def uniform(
    graph: CouplingGraph, model: nn.Module, kwargs: Mapping[str, Any]
) -> tuple[CouplingGraph, dict[str, str]]:
    """The graph, restricted to what config.json can say, and the groups to hold, with the reason.

    Layers of one stack lose equally many units of a kind.  A kind is tried by taking half of its
    units everywhere: where no change of the config makes the library build that model, it has to
    stay whole.
    """
    by_kind: dict[tuple[str, str], list[Structure]] = {}
    for part in find_structures(graph).structures:
        stack = part.layer.rpartition(".")[0]
        by_kind.setdefault((part.kind, stack if part.layer else part.group), []).append(part)
    held: dict[str, str] = {}
    ties: list[Lockstep] = []
    for (kind, _), parts in by_kind.items():
        sets = tuple(graph.group(part.group).units for part in parts)
        reason = f"config.json has one number for the {kind} of all layers"
        unlike = len({len(units) for units in sets}) > 1
        tied = replace(
            graph, constraints=(*graph.constraints, Lockstep("equal count", sets, reason))
        )
        why = "layers differ to begin with" if unlike else _try(tied, model, sets, kwargs)
        if why:
            held.update((part.group, why) for part in parts)
        elif len(sets) > 1:
            ties.append(Lockstep("equal count", sets, reason))
    return replace(graph, constraints=(*graph.constraints, *ties)), held


def _try(
    graph: CouplingGraph, model: nn.Module, sets: Iterable[Any], kwargs: Mapping[str, Any]
) -> str:
    """Why the config can't say that half of some units is gone; empty where it can."""
    scores = np.full(graph.unit_count + 1, np.inf)
    for units in sets:
        scores[units] = 1.0
    kept = select(graph, scores, {}, ratios=0.5).kept
    if kept.all():
        return "none can be removed in every layer"
    try:
        trial = Plan.from_mask(graph, kept)
        cut = apply(replace(trial, edits=find_edits(model, graph, kept)), copy.deepcopy(model))
        fitting_config(cut, kwargs)
    except (PlanError, ModelError) as error:
        return error.why or error.what
    return ""


@checks_options
def fitting_config(model: nn.Module, kwargs: Mapping[str, Any]) -> Any:
    """The config from which the library builds the cut model, with the same answers.

    Parameters
    ----------
    kwargs
        Inputs for the comparison.

    Raises
    ------
    ModelError
        If there is none; the message names tensors that the library would build otherwise, or
        how far its answers are off.
    """
    plan = applied_plan(model)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    search = _Search(model, wanted, frozenset() if plan is None else _pairs(plan), kwargs)
    return search.run()


class _Search:
    """Changes integers of a copy of the config until the library builds what was cut."""

    def __init__(
        self, model: nn.Module, wanted: Shapes, pairs: Pairs, kwargs: Mapping[str, Any]
    ) -> None:
        self._model, self._wanted, self._pairs, self._kwargs = model, wanted, pairs, kwargs
        self._kind: Any = type(model)
        self._config = copy.deepcopy(model.config)
        self._builds = _BUILDS
        self._gaps: list[float] = []

    def run(self) -> Any:
        wrong = self._differences()
        if wrong is None:
            raise ModelError(f"{self._kind.__name__} can't be built from its config")
        changed = self._descend(wrong, {})
        if changed is None:
            raise _unsaid(wrong, self._wanted, self._gaps)
        for place, value in changed.items():
            _write(self._config, place, value)
        return self._config

    def _descend(
        self, wrong: Mapping[str, Any], chosen: Mapping[Place, int]
    ) -> dict[Place, int] | None:
        """Values for entries, each changed once, the most helpful first; dead ends are left."""
        if not wrong:
            self._gaps.append(compare_answers(self._model, self._config, self._kwargs))
            return dict(chosen) if self._gaps[-1] <= CLOSE else None
        trials: list[tuple[int, Place, int, dict[str, Any]]] = []
        for place, value in _candidates(self._config, self._pairs):
            if place in chosen or not self._builds:
                continue
            self._builds -= 1
            with _set(self._config, place, value):
                left = self._differences()
            if left is not None and len(left) < len(wrong):
                trials.append((len(left), place, value, left))
        for _, place, value, wrong in sorted(trials, key=lambda trial: trial[:3]):
            with _set(self._config, place, value):
                found = self._descend(wrong, {**chosen, place: value})
            if found is not None:
                return found
        return None

    def _differences(self) -> dict[str, Any] | None:
        """Tensors that the library would build otherwise, with its shapes; None if it fails."""
        try:
            with torch.device("meta"):
                built = self._kind(copy.deepcopy(self._config))
        except Exception:  # whatever a constructor says of an inconsistent config
            return None
        state = {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}
        found: dict[str, Any] = {n: s for n, s in state.items() if self._wanted.get(n) != s}
        return found | {name: None for name in self._wanted if name not in state}


def _unsaid(wrong: Mapping[str, Any], wanted: Shapes, gaps: Sequence[float]) -> ModelError:
    stated = [
        f"{name} would be {list(shape) if shape else 'missing'}"
        f" and is {list(wanted[name]) if name in wanted else 'gone'}"
        for name, shape in list(wrong.items())[:_NAMED]
    ]
    more = f" and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
    why = (
        f"with other integers in it the shapes agree and the outputs differ by {min(gaps):.1e}: "
        "something is computed from them that the cut model has kept, a scale or frequencies"
        if gaps
        else f"with what it says {'; '.join(stated)}{more}, and no other integers in it make these "
        "right: a size that is computed from others, as hidden ÷ heads, can't change alone"
    )
    return ModelError(
        "config.json can't describe the cut model",
        why=why,
        fix='save it with mode="free", or shrink with mode="uniform"',
    )


def _candidates(config: Any, pairs: Pairs) -> Iterator[tuple[Place, int]]:
    """Integers of the config and what they may become."""
    for place, value in _integers(config):
        changed = {
            value * after // before
            for before, after in pairs
            if before % value == 0 and value * after % before == 0
        }
        yield from ((place, new) for new in sorted(changed - {value, 0}))


def _integers(config: Any, place: Place = ()) -> Iterator[tuple[Place, int]]:
    for name, value in vars(config).items():
        if type(value) is int and value > 1:
            yield (*place, name), value
        elif hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _integers(value, (*place, name))


@contextmanager
def _set(config: Any, place: Place, value: int) -> Iterator[None]:
    before = dict(_integers(config))[place]
    _write(config, place, value)
    try:
        yield
    finally:
        _write(config, place, before)


def _write(config: Any, place: Place, value: int) -> None:
    for name in place[:-1]:
        config = getattr(config, name)
    setattr(config, place[-1], value)


def _pairs(plan: Plan) -> Pairs:
    after = plan.resulting_shapes()
    dims = {
        pair for name, shape in plan.shapes.items() for pair in zip(shape, after[name], strict=True)
    }
    groups = {(choice.size, choice.size - len(choice.removed)) for choice in plan.groups}
    return frozenset((a, b) for a, b in dims | groups if 0 < b < a)


@checks_options
def compare_answers(model: nn.Module, config: Any, kwargs: Mapping[str, Any]) -> float:
    """How far the answers are off of what the library builds from a config, with these weights."""
    kind: Any = type(model)
    own = kind(copy.deepcopy(config)).to(dtype=model.dtype).eval()
    own.load_state_dict(model.state_dict())
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            answers = [_floats(one(**kwargs)) for one in (model, own)]
    finally:
        model.train(training)
    pairs = zip(*answers, strict=True)
    return max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) for a, b in pairs)


def _floats(output: Any) -> list[torch.Tensor]:
    values = output.values() if isinstance(output, Mapping) else output
    return [v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()]
