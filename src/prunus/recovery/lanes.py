"""Forwards that stop on their way, so that a weight can be changed before they go on.

Every forward runs in a thread of its own, and only one of them at a time: while the others wait,
the caller reads what they stopped at.  So one forward of each batch is enough where every layer
depends on what was decided of the layers before it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from prunus.calibration.batches import as_traced, count_samples, no_data, run_batch
from prunus.calibration.sites import Read, Site, Sites, Watch, storage_of
from prunus.errors import DataError
from prunus.graph.coupling import CouplingGraph
from prunus.graph.program import state_of
from prunus.tracer.copies import stand_in
from prunus.tracer.quiet import follow_modules
from prunus.tracer.registry import bind

_LOCKS = (type(threading.Lock()), type(threading.RLock()))
Norm = nn.modules.batchnorm._BatchNorm

END = 1 << 62
"""Where a lane is that has run to its end."""


class _ClosedError(BaseException):
    """Ends a forward that nobody waits for; no ``except Exception`` of a model catches it."""


class Lane:
    """One forward that can wait.

    Parameters
    ----------
    work
        What is run; it is given the lane, and may call :meth:`stop`.

    Attributes
    ----------
    at
        The number of the stop at which it waits; :data:`END` at last.
    value
        What it said there.
    """

    def __init__(self, work: Callable[[Lane], None]) -> None:
        self._work, self._here = work, _settings()
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._error: BaseException | None = None
        self._closed = False
        self.at = -1
        self.value: Any = None

    def advance(self) -> None:
        """Run to the next stop, or to the end; an error of the work is raised here."""
        self.value = None
        if not self._thread.is_alive():
            self._thread.start()
        self._go.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def stop(self, at: int, value: Any) -> None:
        """Wait here, if that lies ahead of where the lane waited before; called by the work."""
        if self._closed:  # an ``except:`` of the model has caught what ended it
            raise _ClosedError
        if at <= self.at:
            return
        self.at, self.value = at, value
        self._back.release()
        self._go.acquire()
        if self._closed:
            raise _ClosedError

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._closed:
                with self._here():
                    self._work(self)
        except _ClosedError:
            pass
        except BaseException as error:
            self._error = error
        self.at = END
        self._back.release()

    def close(self) -> None:
        """End the work where it waits; to be called once nothing of it is wanted any more."""
        self._closed = True
        if self._thread.is_alive():
            self._go.release()
            self._thread.join()


def _settings() -> Callable[[], Any]:
    """What PyTorch keeps for every thread apart, as it is in this one."""
    kinds = [kind for kind in ("cpu", "cuda", "mps") if torch.is_autocast_enabled(kind)]
    casts = {kind: torch.get_autocast_dtype(kind) for kind in kinds}
    gradients, device = torch.is_grad_enabled(), torch.get_default_device()

    @contextmanager
    def same() -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(gradients))
            if device.type != "cpu":
                stack.enter_context(device)
            for kind, dtype in casts.items():
                stack.enter_context(torch.autocast(kind, dtype=dtype))
            yield

    return same


class Pair(NamedTuple):
    """One batch in both models; ``first`` is the number of its first sample."""

    first: int
    dense: Lane
    smaller: Lane

    @property
    def places(self) -> tuple[int, int]:
        """Where both wait."""
        return self.dense.at, self.smaller.at


def _advance(pairs: Sequence[Pair], at: int) -> int:
    """Let all go on that wait at a stop; the next one."""
    lanes = [lane for pair in pairs for lane in (pair.dense, pair.smaller)]
    for lane in lanes:
        if lane.at == at:
            lane.advance()
    return min(lane.at for lane in lanes)


class Race:
    """The dense model and a smaller one over all batches, from stop to stop.

    Parameters
    ----------
    stops
        Places of products before which both wait.
    norms
        Batch norms before which the smaller one waits, by place.
    """

    def __init__(
        self,
        graph: CouplingGraph,
        dense: nn.Module,
        smaller: nn.Module,
        sites: Sites,
        stops: Sequence[int],
        norms: Mapping[int, Norm],
    ) -> None:
        self._graph, self._models, self._sites = graph, (dense, smaller), sites
        self._stops, self._norms = frozenset(stops), norms
        self._stack = ExitStack()

    def __enter__(self) -> Race:
        with ExitStack() as stack:
            for model in self._models:
                stack.enter_context(as_traced(model, self._graph.forward_fn))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def _lane(self, model: nn.Module, batch: Any, norms: Mapping[int, Norm]) -> Lane:
        """One forward, on a copy of the modules: what they note down is of this batch alone."""
        twin, stack = stand_in(model).model, [""]
        for module in twin.modules():  # a forward that waits must not keep others out
            locks = [name for name, value in vars(module).items() if isinstance(value, _LOCKS)]
            vars(module).update(dict.fromkeys(locks, threading.RLock()))
        self._stack.enter_context(follow_modules(twin, stack))
        work = partial(_run, twin, batch, self._sites, stack, self._stops, norms)
        lane = Lane(work)
        self._stack.callback(lane.close)
        return lane

    def run(self, data: Iterable[Any]) -> Iterator[tuple[int, list[Pair]]]:
        """Every stop in the order of the program, with the batches that wait there."""
        pairs = list(self._pairs(data))
        if not pairs:
            raise no_data("there is no batch, or batches hold no sample")
        at = -1  # where all of them are before they start
        while (at := _advance(pairs, at)) < END:
            here = [pair for pair in pairs if at in pair.places]
            if at not in self._norms and any(pair.places != (at, at) for pair in here):
                raise reads_otherwise()
            yield at, here

    def _pairs(self, data: Iterable[Any]) -> Iterator[Pair]:
        """The forwards of every batch that has samples."""
        first, (dense, smaller) = 0, self._models
        for batch in data:
            if count := count_samples(batch):
                lanes = self._lane(dense, batch, {}), self._lane(smaller, batch, self._norms)
                yield Pair(first, *lanes)
                first += count


def _run(
    model: nn.Module,
    batch: Any,
    sites: Sites,
    stack: list[str],
    stops: frozenset[int],
    norms: Mapping[int, Norm],
    lane: Lane,
) -> None:
    """One forward that stops."""

    def hear(site: Site, read: Read, _: tuple[int, int]) -> None:
        if site.place in stops:
            lane.stop(site.place, read)

    state, _ = state_of(model)
    with _Stopping(sites, state, stack, hear, lane, norms):
        run_batch(model, batch)


class _Stopping(Watch):
    """Also stops before batch norms."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args[:-2])
        self._lane, norms = args[-2:]
        self._places = {storage_of(norm.running_mean): at for at, norm in norms.items()}

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if "batch_norm" in func._schema.name:
            bound = bind(func, args, kwargs or {})
            mean = bound.get("running_mean")
            if isinstance(mean, Tensor) and storage_of(mean) in self._places:
                self._lane.stop(self._places[storage_of(mean)], bound["input"])
        return super().__torch_dispatch__(func, types, args, kwargs)


def reads_otherwise() -> DataError:
    """The error for two models that can't be compared."""
    return DataError(
        "the smaller model reads other rows than the dense one",
        why="its forward takes another path, or draws at random",
        fix='repair with method="least_squares"',
    )
