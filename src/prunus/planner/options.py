"""The options of a plan: one frozen record, of which signatures, flags and checks are read.

An option is a field of :class:`PlanOptions`, with its type, its default, and what a value must be;
the docstring of the record says what it means.  :func:`prunus.plan`, :func:`prunus.shrink` and the
searches take the same names (:class:`PlanKeywords` lists them for type checkers), the command line
makes flags of them, and a plan records them.  Nothing heavy is imported, so that ``prunus --help``
is quick.
"""

# ruff: noqa: RUF009, ``option`` is a field specifier as ``dataclasses.field`` is

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypedDict

from prunus.errors import PlanError
from prunus.graph.amounts import LAYERS, Remove, check_remove
from prunus.graph.budget import Budget
from prunus.planner.option_values import (
    Drop,
    Globs,
    Normalise,
    Scope,
    check_count,
    check_each,
    check_ratio,
    check_scope,
    check_share,
    is_batches,
    is_bool,
    is_drop,
    is_names,
    is_real,
    is_whole,
    option,
    spell_budget,
)

if TYPE_CHECKING:
    from prunus.calibration.gradients import Loss
    from prunus.importance import Importance, Statistics

_GLOBS = "a glob over names of groups and their tensors, or a list of globs"


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """Which units of a group are removed first, and which groups are meant.

    Attributes
    ----------
    importance
        Score of a unit.  Of the weights: ``l1``, ``l2`` (default), ``lamp``, ``fpgm``,
        ``bn_scale``, ``random``; of calibration data: ``taylor``, ``fisher``, ``head_gradient``,
        ``activation``, ``wanda``, ``flap``, ``obs``, and of experts ``reap``.

        Or a :class:`prunus.importance.Movement`, an importance of Torch-Pruning, or a function of
        a group and a context.
    data
        Calibration batches, for importances, the influence of blocks, and repair.

        Without them the influence of blocks is measured on random inputs of the traced shapes.
    samples
        Samples of ``data`` that are used: the first ones, in whole batches (default: 512).

        They are taken once and kept in memory; more are read again for every pass.
    statistics
        What :func:`prunus.importance.collect` made of ``data`` for this graph; it may serve
        several plans.
    loss
        For gradients; see :func:`prunus.importance.collect`.
    include
        Only these groups, by globs over their names and those of their tensors.
    exclude
        Not these groups, by globs over their names and those of their tensors.
    seed
        Seed of everything that is random (default: 0).
    """

    importance: str | Importance = option(
        "l2",
        lambda value: isinstance(value, str) or callable(value),
        "a name, as 'l2', or a function of a group and a context",
        recorded=True,
    )
    data: Iterable[Any] | None = option(
        None, is_batches, "an iterable of batches, as a DataLoader is"
    )
    samples: int = option(512, lambda value: is_whole(value) and value >= 1, "an int ≥ 1")
    statistics: Statistics | None = option(
        None, lambda value: hasattr(value, "unit_count"), "what prunus.importance.collect returns"
    )
    loss: Loss | None = option(None, callable, "a function of the outputs and a batch")
    include: Globs | None = option(None, is_names, _GLOBS)
    exclude: Globs = option((), is_names, _GLOBS)
    seed: int = option(0, is_whole, "an int", recorded=True)

    def check(self) -> None:
        """Refuse values that an option can't have.

        Raises
        ------
        PlanError
            The message names the option, and says why it is refused.
        """
        for one in fields(self):
            value = getattr(self, one.name)
            if value is not one.default and not one.metadata["fits"](value):
                fix = f"budget={spell_budget(value)}" if one.name == "budget" else ""
                raise PlanError(
                    f"{one.name} must be {one.metadata['wanted']}; got {value!r}", fix=fix
                )
        if isinstance(self.importance, str):
            from prunus.importance import needs_of

            needs_of(self.importance)


@dataclass(frozen=True, kw_only=True)
class PlanOptions(ScoreOptions):
    """What a plan can be asked.

    Attributes
    ----------
    budget
        Upper bounds on ``params``, ``macs``, ``bytes``, peak ``activation`` memory and
        ``latency``, as fractions of the dense cost or absolute, of the whole model and (except
        memory and latency) of parts of it; several hold at once.

        A bound on latency is met within 2 % by the clock: copies are cut by plans for a bound on
        MACs and for multiples of widths, and timed in turn with the dense model.  Of the plans
        that meet the time the one is taken whose outputs on the data are nearest to the dense
        model's after repair; without data, the one that keeps the most importance.
        ``plan.origin["latency"]`` says what was measured.
    ratio
        In place of a budget: the share of units that every group loses, whatever that costs.
    ratios
        The share of its units that a group loses, exactly, by globs over names of groups and
        their tensors; alone, or with a budget, which takes nothing else of these groups.

        ``{"layer3.*": 0.3}``, say.  Exactly: the nearest number of units that lockstep and
        rounding allow.
    remove
        How much to remove, by structure: ``heads``, ``kv_groups``, ``ffn``, ``experts``,
        ``hidden``, ``layers``; alone, or with a budget, which takes nothing else of these groups.

        ``{"heads": 0.3, "ffn": "25%", "layers": 2}``, say.  A float below 1 or a percentage is a
        share of every layer, rounded to the nearest number of units; an int is a count per layer
        (of ``layers`` in all); a mapping has an amount by the layer's number or path.  Heads that
        share keys and values are removed equally from every KV group.  Where the scope is not
        local, a share is one of all layers together.
    part
        Path of a module, as ``model.language_model``: only groups and blocks that lie inside of it
        as a whole, and a budget is of its cost; peak memory and latency are those of the model.
    scope
        Which units compete: those of one group (``local``, the default: each loses the same
        ratio), of groups of one shape (``isomorphic``), all (``global``), or those of the groups
        that one of several globs fits: ``backbone.*``, ``head.*``.

        Or ``measured``, with data: units of what ``remove`` says as a share are removed a few at a
        time, each time from the layers where that moves the outputs least, the weights that read
        them fitted again by least squares; the rest competes globally.  It runs a few batches once
        for each layer in at most 12 rounds; ``importance="obs"`` suits it.

        Classes made by globs lose the same ratio each; a group that no glob fits is a class.  In
        the global scope ``plan.origin`` has the part of all scores that the plan ``retained``, and
        the ``bound`` that no choice of units exceeds.
    normalise
        How scores of different groups are made comparable: divided by their ``mean`` (default),
        ``max`` or ``sum``; ``standardised``; ``lamp``; or ``none`` (the default for obs in the
        global scope).

        ``standardised`` is less the mean, over the deviation; ``lamp`` the square over the sum of
        the squares that are no less.  Scores of ``obs`` are curves of error versus width, and
        share the budget out as they are.
    min_width
        Units that every group keeps; one number, or numbers by globs over names of groups and
        their tensors.
    max_ratio
        The largest share of its units that a group may lose; one number, or numbers by globs
        over names of groups and their tensors (default: 0.8 for a budget in the global scope, so
        that no layer collapses, else 1).
    round_to
        Widths are multiples of it; a number, or numbers by kind of layer and by globs, as linear:
        32, conv: 8, ``head.*``: 1, ``*``: 4 (default: 8 for channels and FFNs of 32 and more, less
        where a step of 8 would miss a bound by more than 2 %; for a bound on latency what is best
        of 1, 8, 16 and 32; 1 rounds nothing).

        ``plan.origin["round_to"]`` says what the default was.  Heads, experts, blocks and what
        ``ratios`` says are never rounded by default.  A group narrower than twice the number is
        rounded to half of it, and so on, down to 16: 32 is for groups at least 64 wide.  Where
        several globs fit a group, the most specific one decides.
    hold
        Names of groups that are kept whole (where blocks are dropped: names in the model without
        them).
    drop
        Residual blocks to drop: how many, those of least influence, or their module paths; then a
        bound is not needed.

        See :func:`prunus.importance.block_influence`.
    protect_ends
        Whether the first and last block of every stack are kept when ``drop`` is a number.
    """

    budget: Budget | None = option(
        None, lambda value: isinstance(value, Budget), "a Budget", recorded=True
    )
    ratio: float | None = option(None, is_real, "a number between 0 and 1", recorded=True)
    ratios: Mapping[str, float] | None = option(
        None,
        lambda value: isinstance(value, Mapping),
        "a mapping, as {'layer3.*': 0.3}",
        recorded=True,
    )
    remove: Remove | None = option(
        None,
        lambda value: isinstance(value, Mapping),
        "a mapping, as {'heads': 0.3, 'layers': 2}",
        recorded=True,
    )
    part: str | None = option(None, lambda value: isinstance(value, str), "the path of a module")
    scope: Scope = option("local", recorded=True, beside_ratio="local")
    normalise: Normalise | None = option(None, recorded=True, beside_ratio=None)
    min_width: int | Mapping[str, int] = option(1, recorded=True)
    max_ratio: float | Mapping[str, float] | None = option(None, recorded=True)
    round_to: int | Mapping[str, int] | None = option(None, recorded=True)
    hold: Collection[str] = option(
        (),
        lambda value: not isinstance(value, str) and is_names(value),
        "a list of names of groups",
        recorded=True,
    )
    drop: Drop = option((), is_drop, "an int ≥ 1, or the names of blocks as in graph.blocks")
    protect_ends: bool = option(True, is_bool, "True or False")

    def check(self) -> None:
        """Refuse values that an option can't have, and options that contradict one another.

        It happens before anything is traced or read, so that an option is refused whether or not
        the rest of the call would ever look at it.

        Raises
        ------
        PlanError
            The message names the option, and says why it is refused.
        """
        super().check()
        check_scope(self.scope, self.normalise)
        check_each("min_width", self.min_width, check_count)
        if self.max_ratio is not None:
            check_each("max_ratio", self.max_ratio, check_ratio)
        if self.round_to is not None:
            check_each("round_to", self.round_to, check_count)
        check_each("ratios", self.ratios or {}, check_share)
        check_remove(self.remove or {})
        if self.scope == "measured" and not self.remove:
            raise PlanError(
                "scope='measured' chooses among the layers of what remove= says",
                fix="remove={'heads': 0.3}, say, or scope='global'",
            )
        if LAYERS in (self.remove or {}) and self.drop != ():
            raise PlanError("drop and remove['layers'] were given", fix="leave out one of them")
        self._check_amount()
        if self.ratio is not None:
            self._check_beside_ratio()
        if self.drops:
            self._check_beside_drops()

    def _check_amount(self) -> None:
        """Refuse a call that doesn't say how much to remove, or says it twice."""
        given = {"a budget": self.budget, "ratios": self.ratios, "remove": self.remove}
        several = [name for name, value in given.items() if value is not None]
        fix = "give budget=Budget(macs=0.5), say, or ratio=0.3, or remove={'heads': 0.3}"
        why = "a ratio is taken from every group, whatever it costs"
        if self.ratio is not None and several:
            raise PlanError(f"{' and '.join(several)} and a ratio were given", why=why, fix=fix)
        if self.ratio is None and not several and not self.drops:
            raise PlanError("nothing says how much to remove", why=why, fix=fix)
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise PlanError(
                f"a ratio of {self.ratio} removes nothing or everything",
                fix="give a number between 0 and 1: the share of units that every group loses",
            )

    def _check_beside_ratio(self) -> None:
        """Every group loses the ratio, so which units compete would change nothing."""
        given = []
        for one in fields(self):
            silent, value = one.metadata["beside_ratio"], getattr(self, one.name)
            if silent is ... or value == one.default or value == silent:
                continue
            given.append(one.name)
        if given:
            raise PlanError(
                f"{', '.join(given)} can't be combined with ratio=",
                why="a ratio is taken from every group alike",
                fix="give a budget, as budget=Budget(macs=0.5)",
            )

    def _check_beside_drops(self) -> None:
        """Refuse what was measured, or would be, on the model with all its blocks."""
        if self.statistics is not None:
            raise PlanError(
                "statistics can't be given where blocks are dropped",
                why="they were collected on the model that has these blocks",
                fix="give data=, and they are collected on what is left",
            )
        if self.budget is not None and self.budget.latency is not None:
            raise PlanError(
                "a latency budget can't be combined with dropping blocks",
                why="the clock compares with the model that has all its blocks",
                fix="drop the blocks first (prunus.drop_layers), then plan what is left",
            )

    @property
    def cuts_widths(self) -> bool:
        """Whether more is asked than blocks to drop."""
        return bool(self.budget or self.ratio or self.ratios or {*(self.remove or {})} - {LAYERS})

    @property
    def drops(self) -> bool:
        """Whether blocks are dropped."""
        return self.drops_least or len(self.drop) > 0  # type: ignore[arg-type]

    @property
    def drops_least(self) -> bool:
        """Whether the blocks that are dropped are those of least influence."""
        return isinstance(self.drop, int) or LAYERS in (self.remove or {})

    def record(self) -> dict[str, Any]:
        """What a plan says of the options it was made with, as JSON values."""
        from prunus.importance import name_of

        said = {f.name: getattr(self, f.name) for f in fields(self) if f.metadata["recorded"]}
        return {
            **said,
            "importance": name_of(self.importance),
            "budget": None if self.budget is None else self.budget.requested,
            "hold": sorted(self.hold),
            **({} if self.part is None else {"part": self.part}),
            "remove": None if self.remove is None else _spelt(self.remove),
        }


def _spelt(amounts: Mapping[Any, Any]) -> dict[str, Any]:
    """The same with keys as JSON has them."""
    return {
        str(key): _spelt(value) if isinstance(value, Mapping) else value
        for key, value in amounts.items()
    }


class ScoreKeywords(TypedDict, total=False):
    """The names and types of :class:`ScoreOptions`, for type checkers and editors."""

    importance: str | Importance
    data: Iterable[Any] | None
    samples: int
    statistics: Statistics | None
    loss: Loss | None
    include: Globs | None
    exclude: Globs
    seed: int


class PlanKeywords(ScoreKeywords, total=False):
    """The names and types of :class:`PlanOptions`, for type checkers and editors."""

    budget: Budget | None
    ratio: float | None
    ratios: Mapping[str, float] | None
    remove: Remove | None
    part: str | None
    scope: Scope
    normalise: Normalise | None
    min_width: int | Mapping[str, int]
    max_ratio: float | Mapping[str, float] | None
    round_to: int | Mapping[str, int] | None
    hold: Collection[str]
    drop: Drop
    protect_ends: bool
