"""One experiment: groups lose shares of their units, and a metric says what is left."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from prunus.errors import DataError, PlanError
from prunus.graph.axis import Mask
from prunus.graph.coupling import CouplingGraph
from prunus.graph.groups import Group
from prunus.graph.plans import Plan
from prunus.graph.program import state_of
from prunus.importance import Context, Importance, collect, name_of, needs_of
from prunus.importance.torch_pruning import adapt
from prunus.planner.allocate import select
from prunus.planner.culprits import tell_groups, tell_pins
from prunus.planner.filters import excluded_groups
from prunus.planner.options import PlanOptions, ScoreOptions
from prunus.planner.widths import plan_of_mask, plan_widths, score_units
from prunus.surgeon.mask import mask

Metric = Callable[[nn.Module], float]


@dataclass(frozen=True, eq=False)
class Experiment:
    """A model of which groups lose given shares of their units; it is not modified.

    Attributes
    ----------
    importance, scores
        Which units are removed first; all plans are made of the same scores.
    """

    graph: CouplingGraph
    model: nn.Module
    asked: ScoreOptions
    importance: Importance
    scores: NDArray[np.float64]
    _traces: dict[Any, CouplingGraph] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, graph: CouplingGraph, model: nn.Module, asked: ScoreOptions) -> Experiment:
        """Score the units once."""
        asked.check()
        importance = adapt(asked.importance, model)
        needs = needs_of(importance)
        if asked.statistics is None and asked.data is not None and needs:
            options: Any = {"loss": asked.loss, "seed": asked.seed, "samples": asked.samples}
            statistics = collect(model, graph, asked.data, needs, **options)
            asked = replace(asked, statistics=statistics)
        scores = score_units(graph, model, replace(asked, importance=importance))

        def settled(group: Group, _: Context) -> NDArray[np.float64]:
            return scores[group.units]

        settled.__name__ = name_of(importance)
        return cls(graph, model, asked, settled, scores)

    def kept(self, ratios: Mapping[str, float]) -> Mask:
        """The units that are kept where groups lose these shares.

        Raises
        ------
        PlanError
            If a group can't lose as many.
        """
        return select(self.graph, self.scores, {}, ratios=ratios).kept

    def plan(self, ratios: Mapping[str, float]) -> Plan:
        """The plan where groups lose these shares."""
        asked = PlanOptions(importance=self.importance, ratios=ratios)
        return plan_widths(self.graph, self.model, asked, {}, may_remove_nothing=True)

    def value(self, metric: Metric, kept: Mask, where: str) -> float:
        """The metric of the masked model, in eval mode; ``where`` names the plan in an error.

        Raises
        ------
        DataError
            If that is no finite number.
        """
        plan = plan_of_mask(self.graph, self.model, kept, {"traced": self.graph.traced})
        modes = {module: module.training for module in self.model.modules()}
        forward_fn = self.graph.forward_fn
        with mask(plan, self.model, forward_fn=forward_fn, traces=self._traces), torch.no_grad():
            self.model.eval()
            try:
                found: Any = metric(self.model)
            finally:
                for module, mode in modes.items():
                    module.training = mode
        try:
            value = float(found)
        except (TypeError, ValueError):
            value = math.nan
        if math.isfinite(value):
            return value
        kind = f"{value}" if isinstance(found, (int, float)) else f"a {type(found).__name__}"
        raise DataError(
            f"the metric returned {kind}",
            where=where,
            why="it has to be a finite number, of which more is better",
            fix="return float(…), bounded: -min(loss, 1e6), say",
        )

    def rows(self, ratios: Sequence[float]) -> dict[str, float]:
        """Groups that can lose units, each with the largest of the ratios that it can lose.

        Of groups that lose units together only the first is there: it stands for all of them.

        Raises
        ------
        PlanError
            If there is none.
        """
        left_out = excluded_groups(self.graph, self.asked.include, self.asked.exclude)
        together: set[str] = set()
        found: dict[str, float] = {}
        for group in self.graph.groups:
            if group.name in left_out or group.name in together:
                continue
            for ratio in sorted(ratios, reverse=True):
                touched = self._touched(group.name, ratio)
                if group.name in touched:
                    found[group.name] = ratio
                    together |= touched
                    break
        if not found:
            whole = (
                f"of {len(self.graph.groups)} groups {len(left_out)} are left out, the others are "
                f"whole at a ratio of {max(ratios):g}"
            )
            raise PlanError(
                "no group can lose units",
                why="\n".join([whole, *tell_groups(left_out), *tell_pins(self.graph)]),
                fix="let more groups be pruned, or give larger ratios",
            )
        return found

    def _touched(self, name: str, ratio: float) -> set[str]:
        """Groups that lose units when one does; none where it can't lose as many."""
        try:
            kept = self.kept({name: ratio})
        except PlanError:  # the scores are there already: what is left to refuse is this ratio
            return set()
        return {group.name for group in self.graph.groups if not kept[group.units].all()}

    def fingerprint(self) -> str:
        """A hash of groups, scores and weights: other ones make other numbers."""
        digest = hashlib.sha256(self.scores.tobytes())
        digest.update(repr([(group.name, group.size) for group in self.graph.groups]).encode())
        for name, tensor in state_of(self.model)[0].items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            content = tensor.detach().contiguous().cpu().view(-1).view(torch.uint8)
            digest.update(content.numpy().data)
        return digest.hexdigest()


def check_ratios(ratios: Sequence[float]) -> tuple[float, ...]:
    """The ratios, ascending.

    Raises
    ------
    PlanError
        If there are none, or one is not in (0, 1).
    """
    given: list[Any] = list(ratios)
    wrong = [r for r in given if not isinstance(r, (int, float)) or not 0 < r < 1]
    if wrong or not given:
        raise PlanError(
            f"ratios={given!r} are no shares of units",
            why=f"{wrong[0]!r} is not between 0 and 1" if wrong else "there are none",
            fix="give numbers between 0 and 1: ratios=(0.25, 0.5, 0.75), say",
        )
    return tuple(sorted({float(ratio) for ratio in given}))
