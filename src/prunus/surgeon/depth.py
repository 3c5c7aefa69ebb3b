"""Take whole blocks out of their lists, with all that counts or numbers them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from prunus.errors import ApplyError, ModelError, PlanError
from prunus.surgeon.layer_count import find_counts
from prunus.surgeon.numbering import find_numbers
from prunus.surgeon.own_copies import own_dicts
from prunus.surgeon.snapshot import Snapshot


def drop_blocks(model: nn.Module, names: Sequence[str]) -> None:
    """Remove children of lists and sequences of modules, in place.

    The children that stay close up.  What follows: integers that number them (``layer_idx``, by
    which a cache is indexed), and in configs the number of layers and the lists that have an entry
    for each.  Either all of it happens or nothing.

    Parameters
    ----------
    names
        Module paths in the model as it is.

    Raises
    ------
    PlanError
        If the model has no such child, a name is given twice, nothing would stay of a list, or
        the code computes with numbers of layers that a cache needs renumbered.
    ApplyError
        If its children are named in a way that can't close up.
    """
    stacks = find_places(model, names)
    for path, gone in stacks.items():
        counts = [*find_counts(model, path, gone)]
        lists = {change.key for change in counts if type(change.value) is not int}
        container = model.get_submodule(path)
        changes = [*find_numbers(model, container, gone, lists), *counts]
        _close_up(container, gone, path)
        owned = own_dicts(model, [change.holder for change in changes])
        for change in changes:
            owned.get(id(change.holder), change.holder)[change.key] = change.value


@contextmanager
def without_blocks(model: nn.Module, names: Sequence[str]) -> Iterator[nn.Module]:
    """Within the context the model lacks the blocks; nothing is copied."""
    if not names:
        yield model
        return
    before = Snapshot(model)
    try:
        drop_blocks(model, names)
        yield model
    finally:
        before.restore()


def find_places(model: nn.Module, names: Sequence[str]) -> dict[str, list[int]]:
    """Ascending places of the children that go, by the path of their list.

    Raises
    ------
    PlanError
        As :func:`drop_blocks`.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, list[int]] = {}
    for name in names:
        path, _, key = name.rpartition(".")
        container = modules.get(path)
        if not isinstance(container, (nn.ModuleList, nn.Sequential)) or name not in modules:
            raise PlanError(
                f"the model has no block {name!r}",
                why="a block is a child of a ModuleList or a Sequential",
                fix="`prunus.trace(model, inputs).blocks` lists those that can be dropped",
            )
        places = found.setdefault(path, [])
        place = list(container._modules).index(key)
        if place in places:
            raise PlanError(f"the block {name!r} is to be dropped twice", fix="name it once")
        places.append(place)
    for path, places in found.items():
        _check_places(path, places, names, len(modules[path]._modules))
    return {path: sorted(places) for path, places in found.items()}


def _check_places(path: str, places: Sequence[int], names: Sequence[str], size: int) -> None:
    outer = next((name for name in names if f"{path}.".startswith(f"{name}.")), None)
    if outer is not None:
        raise PlanError(
            f"blocks of {path!r} are to be dropped, and all of {outer!r} as well",
            fix="name the outer block alone",
        )
    if len(places) == size:
        raise PlanError(
            f"nothing would stay of {path!r}",
            why=f"all of its {len(places)} blocks are to be dropped",
            fix="keep one of them",
        )


def _close_up(container: nn.Module, gone: Sequence[int], path: str) -> None:
    """Take children out; those that are called by their place move up."""
    children = container._modules
    saved = dict(children)
    kept = [(key, child) for place, (key, child) in enumerate(saved.items()) if place not in gone]
    if any(key.isdecimal() for key in saved):
        if list(saved) != [str(place) for place in range(len(saved))]:
            raise ApplyError(
                f"the children of {path!r} can't close up",
                where=path,
                why=f"some are called by a number that is not their place: {', '.join(saved)}",
                fix="name all of them by their place, or none by a number",
            )
        kept = [(str(place), child) for place, (_, child) in enumerate(kept)]

    children.clear()
    children.update(kept)


def refuse_quantized(model: nn.Module) -> None:
    """:class:`~prunus.errors.ModelError` if weights are stored packed or as integers.

    PyTorch's own quantized layers keep packed parameters or quantized tensors; bitsandbytes,
    GPTQ and AWQ keep integers in the place of weights.
    """
    for path, module in model.named_modules():
        if _is_quantized(module):
            raise ModelError(
                "the model is quantized",
                where=path or type(module).__name__,
                why=f"{type(module).__name__} stores its weights packed or as integers, of which "
                "nothing can be scored or verified",
                fix="load the model in floating point, prune it, and quantize what is left",
            )


def _is_quantized(module: nn.Module) -> bool:
    stores = (vars(module), module._modules, module._parameters, module._buffers)
    if any(name in store for store in stores for name in ("_packed_params", "qweight")):
        return True
    held = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    integers = any(isinstance(one, nn.Parameter) and not is_continuous(one) for one in held)
    return integers or any(tensor.is_quantized for tensor in held)


def is_continuous(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
