"""A pass over calibration data that goes on where it was stopped: its sums, kept in a file.

The file is safetensors with JSON in its metadata, and reading it runs no code.  It tells what its
sums are of (weights, graph, needs, options, the batches that they count), so that sums are never
added to those of something else.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves

from prunus.calibration.sums import Sums, differences
from prunus.errors import FileError, FormatError
from prunus.files import check_target, replace_file
from prunus.graph.coupling import CouplingGraph

VERSION = "1"
"""Of the file; one of another version is refused."""

SECONDS = 30.0
"""Between one writing and the next, at least."""

_PATIENCE = 10
"""How often as long as writing takes is waited for the next, so that it stays in the background."""

_KEY = "prunus_statistics"
_FIX = "give another path, or delete the file to begin anew"


class Keeper:
    """Keeps the sums of a pass while they grow; takes up what a file has of them.

    Parameters
    ----------
    path
        Of the file, which need not be there.
    sums
        Sums of nothing, which those of the file are filled into.
    source
        What the sums are made of, as JSON; see :func:`describe_source`.
    device
        Where second moments are summed up.

    Raises
    ------
    FormatError
        If the file holds something else, or is damaged.
    FileError
        If no file can be there, or it can't be read.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        sums: Sums,
        source: Mapping[str, Any],
        device: torch.device,
    ) -> None:
        self._path, self._sums = Path(path), sums
        self._source = {**source, **sums.kind()}
        self._seen, self._held, self._held_data = 0, 0, ""
        self._data = hashlib.sha256()
        self._took = 0.0
        check_target(path)
        if self._path.exists():
            self._held, self._held_data = _read(self._path, sums, self._source, device)
        elif not self._path.parent.is_dir():  # or it would be noticed after minutes of work
            raise FileError(f"{path} can't be written", fix="create the folder first")
        self._written = time.monotonic()

    def holds(self, batch: Any) -> bool:
        """Whether the sums count this batch, the next of the data, already.

        Raises
        ------
        FormatError
            If the batches that they count were others.
        """
        self._seen += 1
        for leaf in tree_leaves(batch):
            _feed(self._data, leaf)
        if self._seen == self._held and self._data.hexdigest() != self._held_data:
            raise FormatError(
                f"{self._path} holds statistics of other data",
                why=f"its first {self._held} batches are not those of now; a loader that shuffles "
                "or augments at random gives others every time",
                fix=f"give the same batches in the same order; or {_FIX}",
            )
        return self._seen <= self._held

    def step(self) -> None:
        """A batch was added: write, if the last time is long enough ago."""
        if time.monotonic() - self._written >= max(SECONDS, _PATIENCE * self._took):
            self._write()

    def finish(self) -> None:
        """The data has ended: write what is new.

        Raises
        ------
        FormatError
            If the file counts more batches than there are.
        """
        if self._seen < self._held:
            raise FormatError(
                f"{self._path} holds statistics of other data",
                why=f"it counts {self._held} batches, and now there are {self._seen}",
                fix=_FIX,
            )
        if self._seen > self._held and self._sums.samples:
            self._write()

    def _write(self) -> None:
        began = time.monotonic()
        document = {
            "source": self._source,
            "batches": self._seen,
            "data": self._data.hexdigest(),
            **self._sums.counts(),
        }
        metadata = {_KEY: VERSION, "document": json.dumps(document, allow_nan=False)}
        tensors = _tensors_of(self._sums)

        def write(draft: Path) -> None:
            try:
                save_file(tensors, draft, metadata)
            except SafetensorError as error:  # how it tells that the disk is full
                raise OSError(str(error)) from error

        replace_file(self._path, write)
        self._held, self._written = self._seen, time.monotonic()
        self._took = self._written - began


def describe_source(
    graph: CouplingGraph, tensors: Mapping[str, Tensor], options: Mapping[str, Any]
) -> dict[str, Any]:
    """What sums are made of beside the data, as JSON; functions are known by their names.

    Parameters
    ----------
    tensors
        The model's, by name.
    options
        Those of the pass that results hang on.
    """
    weights, groups = hashlib.sha256(), hashlib.sha256()
    for name, tensor in tensors.items():
        weights.update(f"{name} ".encode())
        _feed(weights, tensor)
    for group in graph.groups:
        groups.update(f"{group.name} {group.size} ".encode())
    for axis, label in graph.labels.items():
        groups.update(f"{axis} {graph.roles.get(axis)} ".encode())
        groups.update(np.ascontiguousarray(label, dtype="<i8").data)
    groups.update(repr(graph.kept_outputs).encode())
    return {
        "model": weights.hexdigest()[:32],
        "graph": groups.hexdigest()[:32],
        "forward_fn": _named(graph.forward_fn),
        **{name: _named(value) for name, value in options.items()},
    }


def own_path(path: str | os.PathLike[str], index: int, count: int) -> Path:
    """The file of one process among several.

    >>> own_path("sums.safetensors", 0, 1).name, own_path("sums.safetensors", 0, 4).name
    ('sums.safetensors', 'sums-1-of-4.safetensors')
    """
    path = Path(path)
    return path if count == 1 else path.with_stem(f"{path.stem}-{index + 1}-of-{count}")


def digest_of(batches: Iterable[Any]) -> str:
    """A hash of batches: of the tensors and plain values in them, in their order.

    >>> x = torch.ones(4)
    >>> digest_of([x, x]) == digest_of([x + 0, x + 0]), digest_of([x, x]) == digest_of([x])
    (True, False)
    """
    digest = hashlib.sha256()
    for batch in batches:
        leaves = tree_leaves(batch)
        digest.update(f"{len(leaves)} ".encode())
        for leaf in leaves:
            _feed(digest, leaf)
    return digest.hexdigest()


def _named(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return hashlib.sha256(np.ascontiguousarray(value).data).hexdigest()[:32]
    if value is None or not callable(value):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)


def _feed(digest: Any, leaf: Any) -> None:
    """Add a tensor, or a plain value, to a digest."""
    if not isinstance(leaf, Tensor):
        digest.update(repr(leaf if isinstance(leaf, (str, int, float)) else type(leaf)).encode())
        return
    digest.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
    if leaf.layout == torch.strided:
        plain = leaf.detach().cpu().resolve_conj().resolve_neg().contiguous()
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)


def _tensors_of(sums: Sums) -> dict[str, Tensor]:
    """Every array that there is, by a name that says where it belongs."""
    found = {f"units.{name}": torch.from_numpy(values) for name, values in sums.units.items()}
    for index, site in enumerate(sums.sites):
        found[f"site.{index}.total"] = torch.from_numpy(site.total)
        found[f"site.{index}.square"] = torch.from_numpy(site.square)
        for number, part in enumerate(sorted(site.weights)):
            found[f"site.{index}.weights.{number}"] = torch.from_numpy(site.weights[part])
    for index, moments in enumerate(sums.moments):
        if moments.shift is not None:
            found[f"moments.{index}.shift"] = moments.shift
            found[f"moments.{index}.total"] = moments.total
            found[f"moments.{index}.product"] = moments.product
    found.update({f"heads.{n}": torch.from_numpy(h.total) for n, h in enumerate(sums.heads)})
    # A copy only where it has to be: second moments may take gigabytes.
    return {name: tensor.cpu().contiguous() for name, tensor in found.items()}


def _read(
    path: Path, sums: Sums, source: Mapping[str, Any], device: torch.device
) -> tuple[int, str]:
    """Fill in the sums of a file; how many batches they count, and the digest of those."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get(_KEY) != VERSION:
                raise ValueError(f"it has no {_KEY}={VERSION} in its metadata")
            document = json.loads(metadata["document"])
            found = differences(document["source"], source, ("there", "here"))
            if not found:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                _fill(sums, document, tensors, device)
                return int(document["batches"]), str(document["data"])
    except OSError as error:
        raise FileError(f"{path} can't be read", why=error.strerror or str(error)) from error
    except (
        SafetensorError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise FormatError(
            f"{path} is no file of statistics, or damaged", why=str(error), fix=_FIX
        ) from error
    raise FormatError(f"{path} holds statistics of another pass", why="\n".join(found), fix=_FIX)


def _fill(
    sums: Sums, document: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device
) -> None:
    """Put counts and arrays where they belong."""

    def take(name: str, *shape: int) -> Tensor:
        tensor = tensors[name]
        if tensor.dtype != torch.float64 or tensor.shape != shape:
            raise ValueError(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}")
        return tensor.clone()  # the file may be mapped into memory, and go

    sums.samples, sums.losses = int(document["samples"]), float(document["losses"])
    for name in document["units"]:
        sums.units[name] = take(f"units.{name}", sums.unit_count + 1).numpy()
    for index, site in enumerate(sums.sites):
        n = len(site.label)
        site.count = int(document["sites"][index])
        site.total = take(f"site.{index}.total", n).numpy()
        site.square = take(f"site.{index}.square", n).numpy()
        for number, (start, size) in enumerate(document["parts"][index]):
            site.weights[start, size] = take(f"site.{index}.weights.{number}", n).numpy()
    for index, moments in enumerate(sums.moments):
        moments.count = int(document["moments"][index])
        if not moments.count:
            continue
        groups, blocks = moments.groups, moments.blocks
        size = moments.columns // blocks
        shape = (groups, moments.columns)
        moments.shift = take(f"moments.{index}.shift", *shape).to(device)
        moments.total = take(f"moments.{index}.total", *shape).to(device)
        moments.product = take(f"moments.{index}.product", groups, blocks, size, size).to(device)
    for index, heads in enumerate(sums.heads):
        heads.count = int(document["heads"][index])
        heads.total = take(f"heads.{index}", len(heads.label)).numpy()
