"""What transformers makes of a config with other integers in it: shapes, demands, answers.

Models are built on the meta device, which costs no memory.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import combinations
from typing import Any

import torch
from torch import nn

from prunus.errors import ModelError
from prunus.surgeon.layer_count import silence
from prunus.tracer.precision import same_draws

Shapes = Mapping[str, tuple[int, ...]]

Pairs = frozenset[tuple[int, int]]
"""Sizes before and after."""

Place = tuple[str, ...]
"""Names of nested configs and of an entry."""

Changes = Mapping[Place, int]
"""Values that entries get."""

_BUILDS = 400
"""Models that are built, at most, before a search is given up."""

_ANSWERS = 8
"""Settings with the right shapes of which the answers are asked, at most, each time."""

_UNLIKELY = 7
"""A size that no tensor has where nothing is derived from it."""

_NAMED = 3


class OtherAnswersError(ModelError):
    """The library builds these shapes, and computes something else with them."""


class Library:
    """The model class of a model, and its config.

    Attributes
    ----------
    stated
        Entries that are unset, of which the library derives a size, and that size: saying it
        changes nothing, and then it can stay while others change (``head_dim``).
    """

    def __init__(self, model: nn.Module) -> None:
        self.kind: Any = type(model)
        self.config: Any = copy.deepcopy(model.config)
        self._known: dict[frozenset[tuple[Place, int]], Shapes | None] = {}
        self._builds = 0
        self.stated: dict[Place, int] = {}
        self.stated.update(self._derived())

    @property
    def name(self) -> str:
        """Of the config's class."""
        return type(self.config).__name__

    def config_with(self, changes: Changes) -> Any:
        """The config with other values, as it is when it has been written and read again.

        Raises whatever the library's own validation raises.
        """
        config = copy.deepcopy(self.config)
        for place, value in changes.items():
            write(config, place, value)
        made = type(config).from_dict(config.to_dict())
        made._attn_implementation = config._attn_implementation
        if hasattr(made, "validate"):
            made.validate()
        return made

    def build(self, changes: Changes) -> nn.Module:
        """The model without values that the library makes of it."""
        with same_draws(), torch.device("meta"), silence():
            made: nn.Module = self.kind(self.config_with(changes))
        return made

    def shapes(self, changes: Changes) -> Shapes | None:
        """Shapes of the tensors that it makes; None where it refuses these values."""
        key = frozenset(changes.items())
        if key not in self._known:
            self._builds += 1
            try:
                self._known[key] = shapes_of(self.build(changes))
            except Exception:  # whatever a config or a constructor says of inconsistent values
                self._known[key] = None
        return self._known[key]

    def entries(self) -> dict[Place, int]:
        """The integers above 1, the stated ones included."""
        return {**dict(_integers(self.config)), **self.stated}

    def gap(self, changes: Changes, cut: nn.Module, kwargs: Mapping[str, Any]) -> float:
        """The largest relative difference to the answers of a model with the same tensors."""
        device = next(cut.parameters()).device
        with same_draws(), torch.device(device), silence():
            own = self.kind(self.config_with(changes)).eval()
        own.load_state_dict(cut.state_dict(), assign=True)
        for name, buffer in cut.named_buffers():  # a state dict lacks those of frequencies
            path, _, last = name.rpartition(".")
            own.get_submodule(path)._buffers[last] = own.get_buffer(name).to(buffer.dtype)
        training = cut.training
        cut.eval()
        try:
            with torch.no_grad(), same_draws():
                answers = [_floats(one(**kwargs)) for one in (cut, own)]
        finally:
            cut.train(training)
        pairs = zip(*answers, strict=True)
        return max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) for a, b in pairs)

    def search(
        self, wanted: Shapes, pairs: Pairs, accept: Callable[[Changes], float], close: float
    ) -> dict[Place, int]:
        """Changes with which the library builds these shapes, and answers the same.

        Parameters
        ----------
        pairs
            Integers may change in these proportions.
        accept
            The difference of the answers with some changes, which may be as large as ``close``.

        Raises
        ------
        ModelError
            If there are none; an :class:`OtherAnswersError` where only the answers differ.
        """
        gaps: list[float] = []
        self._builds = 0

        def answers(chosen: dict[Place, int]) -> bool:
            gaps.append(accept(chosen))
            return gaps[-1] <= close

        def descend(chosen: dict[Place, int], wrong: Mapping[str, Any]) -> dict[Place, int] | None:
            """Each entry is changed once, the most helpful first; dead ends are left."""
            trials = []
            for place, value in _candidates(self.entries(), pairs):
                if self.stated.get(place) == chosen.get(place) and self._builds < _BUILDS:
                    left = self.differences({**chosen, place: value}, wanted)
                    if left is not None and len(left) < max(len(wrong), 1):
                        trials.append((len(left), place, value, left))
            trials.sort(key=lambda trial: trial[:3])
            if not wrong:
                more = [{place: value} for _, place, value, _ in trials]
                more += [{**a, **b} for a, b in combinations(more, 2)]
                several = ({**chosen, **some} for some in ({}, *more[:_ANSWERS]))
                return next(filter(answers, several), None)
            for _, place, value, left in trials:
                found = descend({**chosen, place: value}, left)
                if found is not None:
                    return found
            return None

        base = dict(self.stated)
        wrong = self.differences(base, wanted)
        if wrong is None:
            raise ModelError(f"{self.kind.__name__} can't be built from its config")
        found = descend(base, wrong)
        if found is None:
            raise unsaid(wrong, wanted, gaps)
        return self.without_needless(found, wanted)

    def without_needless(self, changes: Changes, wanted: Shapes) -> dict[Place, int]:
        """The changes without entries that the library derives as they are stated."""
        found = dict(changes)
        for place in self.stated:
            less = {other: value for other, value in found.items() if other != place}
            if place in found and self.shapes(less) == wanted:
                found = less
        return found

    def differences(self, changes: Changes, wanted: Shapes) -> dict[str, Any] | None:
        """Tensors that the library would build otherwise, with its shapes; None if it refuses."""
        state = self.shapes(changes)
        if state is None:
            return None
        found: dict[str, Any] = {n: s for n, s in state.items() if wanted.get(n) != s}
        return found | {name: None for name in wanted if name not in state}

    def divisors(self) -> set[tuple[Place, Place]]:
        """Pairs of entries of which the config or a constructor asks whether one divides another.

        They are found by watching them: integers that note what they are divided by.
        """
        config = copy.deepcopy(self.config)
        found: set[tuple[Place, Place]] = set()
        for place, value in _integers(config):
            write(config, place, _Watched(value, place, found))
        with suppress(Exception), silence():
            config.validate()
        with suppress(Exception), same_draws(), torch.device("meta"), silence():
            self.kind(config)
        return found

    def _derived(self) -> Iterator[tuple[Place, int]]:
        """Entries that are unset, and of which the library derives a size."""
        plain = self.shapes({})
        if plain is None:
            return
        sizes = sorted({size for shape in plain.values() for size in shape if size > 1})
        for prefix, config in _configs(self.config):
            heads = getattr(config, "num_attention_heads", None)
            hidden = getattr(config, "hidden_size", None)
            whole = isinstance(heads, int) and isinstance(hidden, int)
            likely = hidden // heads if whole else _UNLIKELY  # type: ignore[operator]
            for place in ((*prefix, name) for name in _unset(config)):
                if self.shapes({place: 2 * likely}) in (None, plain):
                    continue
                value = next((n for n in (likely, *sizes) if self.shapes({place: n}) == plain), 0)
                if value:
                    yield place, value


class _Watched(int):
    """An integer of a config that notes which others divide it."""

    place: Place
    log: set[tuple[Place, Place]]

    def __new__(cls, value: int, place: Place = (), log: Any = None) -> _Watched:
        made = super().__new__(cls, value)
        made.place, made.log = place, log
        return made

    def __mod__(self, other: int) -> int:
        rest = int(self) % int(other)
        if isinstance(other, _Watched) and not rest and self.log is not None:
            self.log.add((self.place, other.place))
        return rest

    def __deepcopy__(self, memo: Any) -> _Watched:
        return self


def unsaid(wrong: Mapping[str, Any], wanted: Shapes, gaps: list[float]) -> ModelError:
    """The error for a config that can't describe a model with the ``wanted`` shapes."""
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
    return (OtherAnswersError if gaps else ModelError)(
        "config.json can't describe the cut model",
        why=why,
        fix='save it with mode="free", or shrink with mode="uniform"',
    )


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all that a state dict holds."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def write(config: Any, place: Place, value: int) -> None:
    """Set an entry, without asking the library about it."""
    for name in place[:-1]:
        config = getattr(config, name)
    vars(config)[place[-1]] = value


def _candidates(entries: Changes, pairs: Pairs) -> Iterator[tuple[Place, int]]:
    """Integers of the config and what they may become."""
    for place, value in entries.items():
        changed = {
            value * after // before
            for before, after in pairs
            if before % value == 0 and value * after % before == 0
        }
        yield from ((place, new) for new in sorted(changed - {value, 0}))


def _configs(config: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """A config and those in it."""
    yield place, config
    for name, value in vars(config).items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _configs(value, (*place, name))


def _integers(config: Any) -> Iterator[tuple[Place, int]]:
    for prefix, one in list(_configs(config)):
        for name, value in list(vars(one).items()):
            if type(value) is int and value > 1:
                yield (*prefix, name), value


def _unset(config: Any) -> list[str]:
    """Entries that may be integers and are None; and ``head_dim``, which many classes read."""
    fields = dataclasses.fields(config) if dataclasses.is_dataclass(config) else ()
    found = [
        one.name
        for one in fields
        if "int" in str(one.type)
        and vars(config).get(one.name, 0) is None
        and not one.name.endswith(("_id", "_ids"))
    ]
    return found if hasattr(config, "head_dim") else [*found, "head_dim"]


def _floats(output: Any) -> list[torch.Tensor]:
    values = output.values() if isinstance(output, Mapping) else output
    return [v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()]
