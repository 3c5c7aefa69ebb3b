"""The models that Prunus is tested and measured on, by name.

>>> import models_zoo
>>> model = models_zoo.build("resnet_fmnist", pretrained=True)
>>> model(*models_zoo.example_inputs("resnet_fmnist")).shape
torch.Size([2, 10])
"""

from __future__ import annotations

import difflib
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["build", "example_inputs", "names"]

WEIGHTS = Path(__file__).with_name("weights")


class _Entry(NamedTuple):
    """Where a model is defined (its function has the model's name) and what it takes.

    ``image`` is the shape of one image; models without one take ids below ``vocabulary``.
    """

    module: str
    image: tuple[int, int, int] | None = None
    vocabulary: int = 0
    padding_mask: bool = False


_ENTRIES = {
    "bert_base": _Entry("bert", vocabulary=30522, padding_mask=True),
    "bert_tiny": _Entry("bert", vocabulary=1000, padding_mask=True),
    "hrnet_w18": _Entry("hrnet", (3, 64, 64)),
    "hrnet_w18_small": _Entry("hrnet", (3, 64, 64)),
    "llama_tiny": _Entry("llama", vocabulary=512),
    "mobilenetv2": _Entry("mobilenetv2", (3, 64, 64)),
    "resnet18": _Entry("resnet", (3, 64, 64)),
    "resnet20": _Entry("resnet", (3, 32, 32)),
    "resnet50": _Entry("resnet", (3, 64, 64)),
    "resnet56": _Entry("resnet", (3, 32, 32)),
    "resnet_fmnist": _Entry("resnet", (1, 28, 28)),
    "vit_tiny": _Entry("vit", (3, 64, 64)),
    "yolov3_tiny": _Entry("yolov3_tiny", (3, 96, 96)),
    "yolov8n": _Entry("yolov8", (3, 96, 96)),
}
_BATCH, _TOKENS = 2, 16


def names() -> list[str]:
    """Return the names of all models, sorted."""
    return sorted(_ENTRIES)


def build(name: str, pretrained: bool = False, **overrides: Any) -> nn.Module:
    """Build a model in eval mode.

    Parameters
    ----------
    name
        One of ``names()``.
    pretrained
        Load the trained weights that ship with the zoo; without it the weights are random.
    overrides
        Arguments of the model's function, such as ``num_classes``.
    """
    module = importlib.import_module(f"{__name__}.{_entry(name).module}")
    path = WEIGHTS / f"{name}.safetensors"
    if pretrained and not path.exists():
        trained = ", ".join(sorted(file.stem for file in WEIGHTS.glob("*.safetensors")))
        raise ValueError(f"no trained weights ship for {name!r}, only for: {trained}")
    model: nn.Module = getattr(module, name)(**overrides)
    if pretrained:
        from safetensors.torch import load_file

        model.load_state_dict(load_file(path))
    return model.eval()


def example_inputs(name: str) -> tuple[Tensor, ...]:
    """Return small inputs for ``build(name)``: batch 2, the same values at every call.

    Images are float32 [2, C, H, W]. Text models get ids [2, 16], BERT also a mask [2, 16] in
    which the last quarter of the second row is padding.
    """
    import torch

    entry = _entry(name)
    random = torch.Generator().manual_seed(0)
    if entry.image is not None:
        return (torch.randn(_BATCH, *entry.image, generator=random),)
    ids = torch.randint(1, entry.vocabulary, (_BATCH, _TOKENS), generator=random)
    if not entry.padding_mask:
        return (ids,)
    mask = torch.ones_like(ids)
    mask[1, -_TOKENS // 4 :] = 0
    return ids, mask


def _entry(name: str) -> _Entry:
    if name in _ENTRIES:
        return _ENTRIES[name]
    close = difflib.get_close_matches(name, _ENTRIES, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(f"the zoo has no model {name!r}; {hint}it has: {', '.join(names())}")
