"""Float32 that is float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from prunus.tracer.alone import alone


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
    with alone():
        before = [setting.fp32_precision for setting in settings]
        try:
            for setting in settings:
                setting.fp32_precision = "ieee"
            yield
        finally:
            for setting, precision in zip(settings, before, strict=True):
                setting.fp32_precision = precision
