"""Tensors that modules remember from one forward to the next, and that a cut makes stale.

An attention bias gathered once and kept in a dict is no state of the model: the forward makes
it anew when it is missing.  So it is taken away while tracing, and again when a plan is applied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def clear_caches(model: nn.Module) -> None:
    """Empty every plain dict of tensors that a module keeps, in place; the caller restores it."""
    for module in model.modules():
        for name, value in vars(module).items():
            if _is_cache(name, value):
                value.clear()


def find_caches(model: nn.Module, before: dict[str, dict[str, Any]]) -> list[str]:
    """Dicts of tensors that a forward has filled, and attributes that it has set from None.

    Parameters
    ----------
    before
        What :func:`remember_attributes` saw before the forward.

    Returns
    -------
    list of str
        ``"path.of.module:attribute"``.
    """
    return [f"{path}:{name}" for path, name in _filled(model, before)]


def remember_attributes(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The modules' attributes by path."""
    return {path: dict(vars(module)) for path, module in model.named_modules()}


def drop_caches(model: nn.Module, names: Sequence[str]) -> None:
    """Empty the dicts of tensors and reset the tensor attributes of that name, in place.

    The names may be a stranger's: nothing that PyTorch keeps on a module itself is among them.
    """
    modules = dict(model.named_modules())
    for text in names:
        path, _, name = text.rpartition(":")
        own: Any = vars(modules[path]) if path in modules else {}
        if _is_cache(name, own.get(name)):
            own[name].clear()
        elif name not in _OF_EVERY_MODULE and isinstance(own.get(name), Tensor):
            own[name] = None


def _filled(model: nn.Module, before: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str]]:
    for path, module in model.named_modules():
        old = before.get(path, {})
        for name, value in vars(module).items():
            fresh = isinstance(value, Tensor) and name in old and old[name] is None
            if fresh or _is_cache(name, value):
                yield path, name


def _is_cache(name: str, value: Any) -> bool:
    return (
        type(value) is dict
        and bool(value)
        and name not in _OF_EVERY_MODULE
        and all(isinstance(item, Tensor) for item in value.values())
    )
