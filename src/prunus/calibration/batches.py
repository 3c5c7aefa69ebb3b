"""Batches of a calibration loader: how the model is called on one, and its single samples."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from prunus.errors import DataError


def run_batch(model: nn.Module, batch: Any) -> Any:
    """Call the model on a copy of one batch of a loader, on the model's device.

    A forward may write into its input, and batches are read several times.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(batch, dict):
        return model(**{k: _copied(v, device) for k, v in batch.items()})
    if isinstance(batch, (list, tuple)):
        if not batch:
            raise DataError("a calibration batch is empty", fix="give at least the input")
        batch = batch[0]
    if not isinstance(batch, Tensor):
        raise DataError(
            f"a calibration batch is a {type(batch).__name__}",
            why="a batch is a tensor, a tuple whose first entry is one, or a mapping of keywords",
            fix="give forward_fn=lambda model, batch: model(...)",
        )
    return model(_copied(batch, device))


def _copied(value: Any, device: torch.device) -> Any:
    return value.to(device, copy=True) if isinstance(value, Tensor) else value


def labels_of(batch: Any) -> Tensor | None:
    """What a batch says that the output should be: its entry ``labels``, or that after the input.

    >>> labels_of((torch.zeros(2, 3), torch.tensor([1, 0]))).tolist()
    [1, 0]
    """
    if isinstance(batch, dict):
        found = batch.get("labels")
    else:
        found = batch[1] if isinstance(batch, (list, tuple)) and len(batch) > 1 else None
    return found if isinstance(found, Tensor) else None


def first_batches(data: Iterable[Any], count: int) -> list[Any]:
    """As many batches as there are, up to a number; :class:`~prunus.errors.DataError` for none."""
    found = list(islice(iter(data), count))
    if not found:
        raise no_data()
    return found


def no_data(
    why: str = "the iterable gave no batch (an iterator can be used only once)",
) -> DataError:
    """The error for calibration data without samples."""
    fix = "give a DataLoader or a list of batches"
    return DataError("the calibration data is empty", why=why, fix=fix)


SAMPLES = 512
"""How many samples are taken of calibration data of unknown length."""


def bounded(data: Iterable[Any]) -> Iterable[Any]:
    """Calibration data that ends and can be read several times.

    What has a length is returned as it is; of anything else a list of the first batches, up to 512
    samples.

    Warns
    -----
    UserWarning
        If there were more, with the number of batches that were taken.

    >>> bounded([1, 2]), len(list(bounded(torch.zeros(2, 3) for _ in range(4))))
    ([1, 2], 4)
    """
    if has_length(data):
        return data
    taken = list(found := Limited(data))
    found.warn(stacklevel=4)
    return taken


def has_length(data: Iterable[Any]) -> bool:
    """Whether an iterable says how long it is, so that it ends."""
    try:
        len(data)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError, AttributeError):
        return False
    return True


class Limited:
    """The same batches as of :func:`bounded`, for one pass: each is read when it is needed."""

    def __init__(self, data: Iterable[Any]) -> None:
        self._data = data
        self._cut: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[Any]:
        if has_length(self._data):
            yield from self._data
            return
        samples, more = 0, iter(self._data)
        for taken, batch in enumerate(more, start=1):
            yield batch
            samples += count_samples(batch)
            if samples >= SAMPLES:
                self._cut = None if next(more, more) is more else (taken, samples)
                return

    def warn(self, stacklevel: int) -> None:
        """After the pass: say how much was taken, if that was not all."""
        if self._cut is not None:
            taken, samples = self._cut
            warnings.warn(
                f"the calibration data has no length: its first {taken} batches "
                f"({samples} samples) were taken; give a list or a DataLoader for another number",
                stacklevel=stacklevel,
            )


def count_samples(batch: Any) -> int:
    """The length of dim 0 of the batch's first tensor; 1 where there is none."""
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()]
    return len(tensors[0]) if tensors else 1


def samples_of(batch: Any) -> Iterator[Any]:
    """Batches of one sample each: every tensor as long as the first is cut along dim 0.

    Anything else (a flag, a table that all samples share) goes along whole.

    >>> [part["x"].tolist() for part in samples_of({"x": torch.tensor([[1], [2]]), "flag": True})]
    [[[1]], [[2]]]
    """
    count = count_samples(batch)

    def cut(value: Any, index: int) -> Any:
        whole = not isinstance(value, Tensor) or not value.dim() or len(value) != count
        return value if whole else value[index : index + 1]

    for index in range(count):
        yield tree_map(lambda value, index=index: cut(value, index), batch)


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


def _feed(digest: Any, leaf: Any) -> None:
    """Add a tensor, or a plain value, to a digest."""
    if not isinstance(leaf, Tensor):
        digest.update(repr(leaf if isinstance(leaf, (str, int, float)) else type(leaf)).encode())
        return
    digest.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
    if leaf.layout == torch.strided:
        plain = leaf.detach().cpu().resolve_conj().resolve_neg().contiguous()
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
