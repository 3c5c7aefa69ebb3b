"""Forwards that stop on their way, so that a weight can be changed before they go on.

Every forward runs in a thread of its own, and only one of them at a time: while the others wait,
the caller reads what they stopped at.  So one forward of each batch is enough where every layer
depends on what was decided of the layers before it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

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
