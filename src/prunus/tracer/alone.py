"""One thread at a time where PyTorch's and Python's switches are those of the whole process.

The fast path of attention, oneDNN, cuDNN, the random state, the collector and warnings belong to
the process.  Two threads that each put back what they found would leave them changed for good.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

LOCK = threading.RLock()


@contextmanager
def alone() -> Iterator[None]:
    """Within the context, and as a decorator, no other thread is in such a context."""
    with LOCK:
        yield


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
