"""A model that is written with its config refuses that while the config says other widths."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn

from prunus.errors import ModelError
from prunus.surgeon.layer_count import build_from

NAME = "save_pretrained"


def guard_saving(model: nn.Module) -> None:
    """Put a check in front of this model's ``save_pretrained``, if its class has one.

    What it writes is read by building the class from its config, which fails much later, and
    elsewhere.  Only this object is changed; a pickle or a checkpoint of it knows nothing of it.
    """
    if callable(getattr(type(model), NAME, None)) and "config" in vars(model):
        vars(model)[NAME] = MethodType(save_pretrained, model)


def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The class's own method, unless the config builds tensors of other shapes.

    Raises
    ------
    ModelError
        If it does; the message names one, and says how the model can be written.
    """
    built = build_from(self, self.config)
    own = {name: list(tensor.shape) for name, tensor in self.state_dict().items()}
    wrong = [
        f"{name} is {own[name]}, and its config says {list(tensor.shape)}"
        for name, tensor in ({} if built is None else built.state_dict()).items()
        if own.get(name, list(tensor.shape)) != list(tensor.shape)
    ]
    if wrong:
        raise ModelError(
            "save_pretrained would write a folder that can't be loaded",
            why=f"{wrong[0]}, and {len(wrong) - 1} more tensors" if wrong[1:] else wrong[0],
            fix="prunus.integrations.hf.save(model, folder) writes it for hf.load(folder); "
            'shrink(model, mode="uniform") makes models that from_pretrained loads',
        )
    return getattr(type(self), NAME)(self, *args, **kwargs)
