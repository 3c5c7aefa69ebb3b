"""Progress: one callback for every long call, and a bar on the terminal where none is given.

A call that may take seconds runs within :func:`following`, and says how far it is to what that
returns.  Calls inside of others report to the callback of the outermost one.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from operator import length_hint
from typing import Any, TypeVar

T = TypeVar("T")
Call = TypeVar("Call", bound=Callable[..., Any])

Progress = Callable[[str, int, "int | None"], None]
"""Called with a stage, how much of it is done, and of how much (None where nobody knows)."""

DELAY = 2.0
"""Seconds after which a call shows a bar."""

_current: ContextVar[Progress | None] = ContextVar("prunus_progress", default=None)
_in_stage: ContextVar[bool] = ContextVar("prunus_stage", default=False)


@contextmanager
def following(
    progress: Progress | None = None, *, delay: float | None = None
) -> Iterator[Progress]:
    """Where a call says how far it is.

    Parameters
    ----------
    progress
        The caller's callback; without one it is that of the call around this one, or a bar on
        stderr where that is a terminal.
    delay
        Seconds until the bar appears, by default two.
    """
    outer, bar = _current.get(), None
    if progress is None and outer is None and _on_terminal():
        progress = bar = _Bar(DELAY if delay is None else delay)
    callback = progress or outer
    if callback is None:
        yield _ignore
        return
    token = _current.set(callback)
    try:
        yield callback
    finally:
        _current.reset(token)
        if bar is not None:
            bar.close()


def shows(stage: str) -> Callable[[Call], Call]:
    """Let a function run within :func:`following`, as one stage; so is all that it calls."""

    def decorate(call: Call) -> Call:
        @functools.wraps(call)
        def within(*args: Any, **options: Any) -> Any:
            if _in_stage.get():
                return call(*args, **options)
            token = _in_stage.set(True)
            try:
                with following() as tell:
                    tell(stage, 0, None)
                    return call(*args, **options)
            finally:
                _in_stage.reset(token)

        return within  # type: ignore[return-value]

    return decorate


def counted(items: Iterable[T], stage: str) -> Iterator[T]:
    """The items; each counts as done once the reader comes back for the next one."""
    tell = _current.get() or _ignore
    hint = length_hint(items, -1)  # -1: an iterator, or a loader over an iterable data set
    total = None if hint < 0 else hint
    tell(stage, 0, total)
    for done, item in enumerate(items, start=1):
        yield item
        tell(stage, done, total)


def _ignore(stage: str, done: int = 0, total: int | None = None) -> None:
    """Nobody watches."""


def _on_terminal() -> bool:
    return sys.stderr is not None and (sys.stderr.isatty() or bool(os.environ.get("FORCE_COLOR")))


class _Bar:
    """A bar that appears when a call takes long, and leaves nothing behind."""

    def __init__(self, delay: float) -> None:
        self._lock = threading.Lock()
        self._state: tuple[str, int, int | None] = ("starting", 0, None)
        self._bar: Any = None
        self._task: Any = None
        self._timer = threading.Timer(delay, self._open)
        self._timer.daemon = True
        if delay > 0:
            self._timer.start()
        else:
            self._open()

    def __call__(self, stage: str, done: int = 0, total: int | None = None) -> None:
        with self._lock:
            self._state = (stage, done, total)
            self._draw()

    def close(self) -> None:
        self._timer.cancel()
        with self._lock:
            self._timer.finished.set()
            if self._bar is not None:
                self._bar.stop()

    def _open(self) -> None:
        from rich import progress
        from rich.console import Console

        with self._lock:
            if self._bar is not None or self._timer.finished.is_set():
                return
            self._bar = progress.Progress(
                progress.SpinnerColumn(),
                progress.TextColumn("{task.description}", markup=False),
                progress.BarColumn(),
                progress.TimeElapsedColumn(),
                console=Console(stderr=True, highlight=False, markup=False),
                transient=True,
                redirect_stdout=False,  # no object of another is touched from this thread
                redirect_stderr=False,
            )
            self._task = self._bar.add_task(self._state[0], total=None)
            self._bar.start()
            self._draw()

    def _draw(self) -> None:
        if self._bar is not None:
            stage, done, total = self._state
            self._bar.update(self._task, description=stage, completed=done, total=total)
