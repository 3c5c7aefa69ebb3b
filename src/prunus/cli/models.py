"""Find the model that a reference means, its example inputs, and calibration data."""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunus.errors import DataError, ModelError, require

_REFERENCE = "write zoo:NAME, timm:NAME or path/to/file.py:FUNCTION"
_BATCH = 64
"""Samples in a batch that is cut from an array."""


@dataclass(frozen=True)
class Loaded:
    """A model, and what its forward is called with."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def load_model(options: argparse.Namespace) -> Loaded:
    """The model that ``options.model`` refers to; :class:`~prunus.errors.ModelError` if none.

    An error in the user's own code is raised as it is.
    """
    reference: str = options.model
    torch.manual_seed(options.seed)
    kind, _, rest = reference.partition(":")
    if kind == "zoo":
        loaded = _from_zoo(rest, options)
    elif kind == "timm":
        loaded = _from_timm(rest, options)
    else:
        loaded = _from_file(reference, options)
    if options.input_shape:
        random = torch.Generator().manual_seed(options.seed)
        args = tuple(torch.randn(shape, generator=random) for shape in options.input_shape)
        return Loaded(loaded.model, args, {})
    return loaded


def load_data(reference: str) -> Iterable[Any]:
    """Calibration batches from ``file.py:FUNCTION``, or from an array in an ``.npz`` file."""
    if reference.endswith(".npz"):
        return _array_batches(Path(reference))
    batches = _function(reference, DataError, "write path/to/file.py:FUNCTION or FILE.npz")()
    if not isinstance(batches, Iterable):
        raise DataError(
            f"{reference} returned a {type(batches).__name__}",
            why="calibration data is an iterable of batches",
            fix="return a DataLoader or a list of batches",
        )
    return batches


def _from_zoo(name: str, options: argparse.Namespace) -> Loaded:
    import models_zoo

    try:
        model = models_zoo.build(name, pretrained=options.pretrained)
    except ValueError as error:  # unknown, or without trained weights
        raise ModelError(str(error), where=options.model) from error
    return Loaded(model, tuple(models_zoo.example_inputs(name)), {})


def _from_timm(name: str, options: argparse.Namespace) -> Loaded:
    from prunus.integrations.torchvision_ops import declare_missing_ops

    declare_missing_ops()
    timm = require("timm", "timm")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ModelError(
            f"timm has no model {name!r}",
            where=options.model,
            fix=f"did you mean {' or '.join(near)}?" if near else "see timm.list_models()",
        )
    model = timm.create_model(name, pretrained=options.pretrained)
    size = model.pretrained_cfg["input_size"]
    random = torch.Generator().manual_seed(options.seed)
    return Loaded(model, (torch.randn(1, *size, generator=random),), {})


def _from_file(reference: str, options: argparse.Namespace) -> Loaded:
    factory = _function(reference, ModelError, _REFERENCE)
    if options.pretrained:
        raise ModelError(
            "--pretrained is for models of the zoo and of timm",
            where=reference,
            fix="let the function load its weights",
        )
    model = factory()
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{reference} returned a {type(model).__name__}",
            why="a model is a torch.nn.Module",
            fix="return the model from the function",
        )
    if options.input_shape:
        return Loaded(model, (), {})
    examples = getattr(sys.modules[factory_module(reference)], "example_inputs", None)
    if examples is None:
        raise ModelError(
            "there are no example inputs",
            where=reference,
            why="the file has no function example_inputs()",
            fix="add one, or give --input-shape 1,3,224,224, say",
        )
    found = examples()
    if isinstance(found, Mapping):
        return Loaded(model, (), dict(found))
    return Loaded(model, (found,) if isinstance(found, Tensor) else tuple(found), {})


def factory_module(reference: str) -> str:
    """The name under which a reference's file is imported: one that no package has."""
    return "prunus_file:" + str(Path(reference.rpartition(":")[0]).resolve())


def _function(
    reference: str, problem: type[ModelError] | type[DataError], fix: str
) -> Callable[[], Any]:
    file, _, name = reference.rpartition(":")
    path = Path(file)
    if not file or not name.isidentifier() or path.suffix != ".py":
        raise problem(f"{reference!r} is no reference", fix=fix)
    if not path.is_file():
        raise problem(f"there is no file {file}", where=reference, fix=fix)
    module = _import_file(path, factory_module(reference))
    function = getattr(module, name, None)
    if not callable(function):
        own = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise problem(
            f"{file} has no function {name!r}",
            where=reference,
            why=f"it has {', '.join(own)}" if own else "it defines none",
            fix=f"did you mean {near[0]!r}?"
            if (near := difflib.get_close_matches(name, own, n=1))
            else fix,
        )
    return function  # type: ignore[no-any-return]


def _import_file(path: Path, name: str) -> ModuleType:
    """Run a file as Python runs a script: its folder can be imported from."""
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _array_batches(path: Path) -> list[Tensor]:
    """Batches of the array ``inputs``, or of the only one; float64 becomes float32."""
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = list(arrays.files)
            chosen = "inputs" if "inputs" in names else names[0] if len(names) == 1 else ""
            array = arrays[chosen] if chosen else None
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path} can't be read", why=str(error)) from error
    if array is None:
        raise DataError(
            f"{path} has several arrays and none is called 'inputs'",
            why=f"it has {', '.join(names)}" if names else "it is empty",
            fix="save it with numpy.savez(file, inputs=…)",
        )
    if array.ndim == 0 or array.dtype.kind not in "fi":
        raise DataError(
            f"the array {chosen!r} is {array.dtype} of shape {array.shape}",
            where=str(path),
            why="it is fed to the model as it is, in batches along its first dim",
            fix="save floats, or ids as signed integers, prepared as the model wants them",
        )
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    return list(torch.from_numpy(array).split(_BATCH)) if len(array) else []
