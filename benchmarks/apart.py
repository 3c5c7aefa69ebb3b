"""Functions that run in a process of their own, under a limit of time, memory, or both."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Literal

Start = Literal["spawn", "fork"]


class StoppedError(Exception):
    """The time was up; the message says how much it was."""


class FailedError(Exception):
    """What was raised in the process, in one line, or how the process died."""


class Process:
    """One call in a process of its own.

    Parameters
    ----------
    start
        ``"fork"`` where importing the libraries anew takes longer than the call: the parent has
        them.
    seconds
        On the clock on the wall, from the start on.
    processor_seconds, gigabytes
        Of processor time and of address space.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *args: Any,
        start: Start = "spawn",
        seconds: float | None = None,
        processor_seconds: int | None = None,
        gigabytes: float | None = None,
    ) -> None:
        context = multiprocessing.get_context(start)
        self._started, self._seconds = time.perf_counter(), seconds
        self._pipe, sender = context.Pipe(duplex=False)
        limits = (processor_seconds, gigabytes)
        self._process = context.Process(
            target=_child, args=(sender, limits, function, args), daemon=True
        )
        self._process.start()
        sender.close()

    def ready(self, wait: float = 0.2) -> bool:
        """Whether it has answered, died, or had its time."""
        return self._pipe.poll(wait) or self._left() <= 0

    def _left(self) -> float:
        if self._seconds is None:
            return float("inf")
        return self._seconds - (time.perf_counter() - self._started)

    def result(self) -> Any:
        """What the function returns.

        Raises
        ------
        StoppedError
            If the time was up.
        FailedError
            If it raised, or the process died.
        """
        try:
            while not self.ready(5):
                pass
            if not self._pipe.poll():
                raise StoppedError(f"stopped after {self._seconds:g} s")
            good, found = self._pipe.recv()
        except EOFError:  # it died before it could answer
            self._process.join()
            code = self._process.exitcode
            if code == -signal.SIGXCPU:
                raise StoppedError("stopped after its processor time") from None
            raise FailedError(f"the process died: {code}") from None
        finally:
            self._process.kill()
            self._process.join()
        if good:
            return found
        raise FailedError(found)


def run_apart(function: Callable[..., Any], *args: Any, **limits: Any) -> Any:
    """Call a function in a process of its own and wait for it; ``limits`` as of Process."""
    return Process(function, *args, **limits).result()


def limit_processor_time(seconds: int | None) -> None:
    """End this process after that much more processor time; without a number, never."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = hard if seconds is None else int(used.ru_utime + used.ru_stime) + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def peak_mb() -> float:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _child(
    pipe: Connection,
    limits: tuple[int | None, float | None],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    processor_seconds, gigabytes = limits
    if gigabytes is not None:
        size = int(gigabytes * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    if processor_seconds is not None:
        limit_processor_time(processor_seconds)
    try:
        answer = (True, function(*args))
    except BaseException as error:  # whatever is raised: the parent is told
        answer = (False, " ".join(f"{type(error).__name__}: {error}".split()))
    pipe.send(answer)
    pipe.close()
    os._exit(0)  # what libraries registered to run at exit is the parent's to run
