"""Let torchvision be imported where its compiled operators cannot be loaded.

Imports nothing of Prunus: a process that does without it may load this file alone.
"""

from __future__ import annotations

import functools
import sys

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def declare_missing_ops() -> None:
    """Declare the operators without which ``import torchvision`` fails on a CPU torch.

    The torchvision wheel is built against CUDA. Beside a CPU build of torch its library does
    not load, and importing it ends in ``operator torchvision::nms does not exist``, because it
    registers shape functions for ``nms`` and ``qnms`` without looking whether they are there
    (pytorch/vision#9085; seen with 0.28). Only the schemas are declared: models and transforms
    work, while calling ``torchvision.ops.nms`` still says that the compiled operators are
    missing. May go once torchvision imports without its library.

    Call it before importing anything that imports torchvision (timm, ultralytics). It does
    nothing the second time, where torchvision imports as it is, and where it is absent.

    Examples
    --------
    >>> declare_missing_ops()
    >>> declare_missing_ops()
    """
    if "torchvision" in sys.modules or hasattr(torch.ops.torchvision, "nms"):
        return
    try:
        import torchvision  # noqa: F401
    except ImportError:  # absent or broken in another way: its first real importer will tell
        return
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
        _forget_half_imported()
        _declare()


@functools.cache
def _declare() -> torch.library.Library:
    """Declare the schemas; the cache keeps the library, which undoes them when collected."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    return library


def _forget_half_imported() -> None:
    """Drop the submodules that the failed import left behind, so that the next starts anew."""
    for name in [name for name in sys.modules if name.startswith("torchvision.")]:
        del sys.modules[name]
