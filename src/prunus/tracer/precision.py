"""What belongs to the whole process: precision of float32, random state, and who may set them.

The fast path of attention, oneDNN, cuDNN, the random state, the collector and warnings are the
process's.  Two threads that each put back what they found would leave them changed for good.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

LOCK = threading.RLock()
"""Held while switches of the process are set, so that one thread at a time sets them."""


def owns_lock() -> bool:
    """Whether this thread is in a context that holds the lock."""
    lock: Any = LOCK
    return bool(lock._is_owned())  # which threading.Condition asks as well


def let_go_of_lock() -> None:
    """Release the lock however often this thread holds it.

    A context manager that an interrupt left suspended may hold it until the collector ends it,
    which may be in another thread, where a lock can't be released any more.
    """
    while owns_lock():
        LOCK.release()


@contextmanager
def same_draws() -> Iterator[None]:
    """Python's, NumPy's and PyTorch's random numbers go on afterwards where they stood before."""
    with LOCK:
        python, arrays = random.getstate(), np.random.get_state()
        try:
            with torch.random.fork_rng(devices=[]):
                yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)


@contextmanager
def full_precision() -> Iterator[None]:
    """Without TF32 and its like, in which float32 has the ten bits of half precision.

    On recent GPUs that is the default of convolutions, and kernels differ by 1e-3 there.
    """
    backends: Any = torch.backends
    settings = [
        backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn,
        backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn,
    ]  # fmt: skip
    with LOCK:
        before = [setting.fp32_precision for setting in settings]
        try:
            for setting in settings:
                setting.fp32_precision = "ieee"
            yield
        finally:
            for setting, precision in zip(settings, before, strict=True):
                setting.fp32_precision = precision
