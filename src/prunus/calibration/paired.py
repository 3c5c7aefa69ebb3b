"""Two models run side by side over calibration data, and what both read at the same places."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from prunus.calibration.activations import Site, Watch, contracted_in, not_finite, rows_of
from prunus.calibration.batches import count_samples, run_batch
from prunus.calibration.cross import CrossMoments
from prunus.calibration.im2col import columns_of
from prunus.calibration.readings import SecondMoments
from prunus.calibration.statistics import traceable
from prunus.errors import DataError
from prunus.graph.axis import kept_positions
from prunus.graph.coupling import CouplingGraph
from prunus.graph.program import state_of
from prunus.tracer.adapters import adapted
from prunus.tracer.forward_fn import entered_by
from prunus.tracer.trace import follow_modules, quiet_run

Hear = Callable[[int, Tensor, Mapping[str, Any], bool], None]
"""Called with the number of a site, what is read there, the product's arguments, and whether that
is the first of the factors."""


class Tap(Watch):
    """Hands on what is read at the sites of a model, in the order in which it is.

    Parameters
    ----------
    graph
        What was traced: of this model, or of the one that it was cut from.
    shapes
        Of the tensors of the model that was traced, by name.
    """

    def __init__(
        self,
        graph: CouplingGraph,
        model: nn.Module,
        shapes: Mapping[str, tuple[int, ...]],
        options: SecondMoments,
        hear: Hear,
    ) -> None:
        self.model, self.stack, self._hear = model, [""], hear
        super().__init__(
            graph.program,
            state_of(model)[0],
            self.stack,
            inputs=False,
            moments=options,
            shapes=shapes,
        )
        self._numbers = {id(site): number for number, site in enumerate(self.sites)}

    def owner(self, site: Site) -> int:
        """The number of the first site that reads the same values in the same way."""
        return self._numbers[id(self._owners[id(site.moments)])]

    def _take(self, site: Site, data: Tensor, bound: Mapping[str, Any], *, first: bool) -> None:
        self._hear(self._numbers[id(site)], data, bound, first)


class Pair:
    """A dense model, and beside it what it is becoming, cut already.

    Parameters
    ----------
    graph
        Of the dense model.
    options
        Which sites are looked at, and at how many positions of an image.
    """

    def __init__(self, graph: CouplingGraph, dense: nn.Module, options: SecondMoments) -> None:
        self._graph, self._options = graph, options
        self._shapes = {name: tuple(t.shape) for name, t in state_of(dense)[0].items()}
        self._dense = Tap(graph, dense, self._shapes, options, self._remember)
        self._taps = [self._dense]
        self._wanted: dict[int, CrossMoments] = {}
        self._heard: dict[int, list[Tensor]] = {}
        self._first = 0

    def join(self, smaller: nn.Module) -> None:
        """From now on this model runs beside the dense one; its tensors stay where they are."""
        self._taps = [
            self._dense,
            Tap(self._graph, smaller, self._shapes, self._options, self._compare),
        ]

    @property
    def sites(self) -> list[Site]:
        """Where weights read; with moments (that stay empty) if the place is looked at."""
        return self._dense.sites

    def owner(self, site: Site) -> int:
        """The number of what a site reads; sites that read the same values share one."""
        return self._dense.owner(site)

    def sums_of(self, site: Site) -> CrossMoments:
        """Sums for what a site reads, without any rows yet."""
        if self._options.kept is None or site.moments is None:
            raise AssertionError(f"{site.tensor} is not looked at")
        stay = torch.zeros(len(site.label), dtype=torch.bool)
        stay[kept_positions(site.label, self._options.kept)] = True
        taps = site.window.taps
        by_tap = site.moments.blocks == taps > 1  # too many columns for all products
        return CrossMoments(stay.view(site.window.groups, -1), taps, taps if by_tap else 1)

    def run(
        self,
        data: Iterable[Any],
        wanted: Mapping[int, CrossMoments],
        progress: Callable[[], None] | None,
    ) -> None:
        """Run both models over the data, and add up what they read, by number.

        Raises
        ------
        DataError
            If there are no data, or what is read is not finite, or both read differently often.
        """
        self._wanted, self._first = dict(wanted), 0
        with ExitStack() as stack:
            for tap in self._taps:
                model = tap.model
                for context in (
                    entered_by(model, self._graph.forward_fn),
                    quiet_run(model),
                    adapted(model),
                    traceable(model),
                    follow_modules(model, tap.stack),
                ):
                    stack.enter_context(context)
            for batch in data:
                self._take(batch)
                if progress is not None:
                    progress()
        if not self._first:
            raise DataError(
                "the calibration data is empty",
                why="there is no batch, or batches hold no sample",
                fix="give a DataLoader or a list of batches",
            )

    def _take(self, batch: Any) -> None:
        samples = count_samples(batch)
        if not samples:
            return
        self._heard = {number: [] for number in self._wanted}
        for tap in self._taps:
            tap.begin(self._first)
            with tap:
                run_batch(tap.model, batch)
        if any(self._heard.values()):
            raise self._differently()
        self._first += samples

    def _remember(self, number: int, data: Tensor, bound: Mapping[str, Any], first: bool) -> None:
        if number in self._wanted:
            self._heard[number].append(self._features(number, data, bound, first=first))

    def _compare(self, number: int, data: Tensor, bound: Mapping[str, Any], first: bool) -> None:
        if number not in self._wanted:
            return
        site, sums = self.sites[number], self._wanted[number]
        if sums.whole:
            stay = sums.stay.flatten().nonzero()[:, 0].to(data.device)
            dim = 1 if site.window.kernel else contracted_in(data, first=first)
            shape = list(data.shape)
            shape[dim] = len(site.label)
            data = data.new_zeros(shape).index_copy_(dim, stay, data)
        smaller = self._features(number, data, bound, first=first)
        if not self._heard[number]:
            raise self._differently()
        dense = self._heard[number].pop(0)
        if dense.shape[1] != smaller.shape[1]:
            raise self._differently()
        sums.add(dense, smaller)
        if not bool(torch.isfinite(sums.joint.total).all()):
            raise not_finite(site)

    def _features(
        self, number: int, data: Tensor, bound: Mapping[str, Any], *, first: bool
    ) -> Tensor:
        """What is read, as rows of columns; a copy, since the model may go on in place."""
        window = self.sites[number].window
        if not window.kernel:
            return rows_of(data, bound, first=first)[None].clone()
        limit = self._options.positions
        return torch.cat(list(columns_of(data, window, first=self._first, limit=limit)), 1)

    def _differently(self) -> DataError:
        return DataError(
            "the smaller model reads other rows than the dense one",
            why="its forward takes another path, or draws at random",
            fix="repair without sequential=True",
        )
