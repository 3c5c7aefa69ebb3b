"""Batches of a calibration loader: how the model is called on one, and its single samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from prunus.errors import DataError, ModelError, PlanError
from prunus.graph.coupling import CouplingGraph
from prunus.graph.progress import counted
from prunus.tracer.adapters import adapted
from prunus.tracer.forward_fn import ForwardFn, entered_by
from prunus.tracer.outputs import answer_of
from prunus.tracer.trace import follow_modules, plain_kernels, quiet_run


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


def run_all(
    model: nn.Module,
    data: Iterable[Any],
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    *,
    keep: int = 0,
    stage: str = "running the model",
) -> list[dict[str, Tensor]]:
    """Call the model on all batches; what it answered to the first ones, as many as are kept.

    Raises
    ------
    DataError
        If there is no batch.
    """
    found, done = [], 0
    for done, batch in enumerate(counted(data, stage), start=1):
        output = (forward_fn or run_batch)(model, batch)
        if done <= keep:
            found.append(outputs_of(output))
    if not done:
        raise no_data()
    return found


def _copied(value: Any, device: torch.device) -> Any:
    return value.to(device, copy=True) if isinstance(value, Tensor) else value


def outputs_of(result: Any) -> dict[str, Tensor]:
    """What a model answered, by name: tensors of fractions alone, detached."""
    answer = answer_of(result).items()
    return {name: t.detach().clone() for name, t in answer if t.is_floating_point()}


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


def no_data(
    why: str = "the iterable gave no batch (an iterator can be used only once)",
) -> DataError:
    """The error for calibration data without samples."""
    fix = "give a DataLoader or a list of batches"
    return DataError("the calibration data is empty", why=why, fix=fix)


SAMPLES = 512
"""How many samples are taken of calibration data, unless somebody says otherwise."""


class Batches:
    """The first samples of calibration data, in whole batches, which can be read several times.

    They are taken once and kept, so that a loader which shuffles gives the same ones to every
    reader.  More than :data:`SAMPLES` are read again each time from data that has a length.

    Parameters
    ----------
    data
        Any iterable of batches; others of this class are taken as they are.
    samples
        After so many samples no further batch is taken.

    Attributes
    ----------
    samples
        How many there are; of data that is read again, as many as the last reader saw.

    Examples
    --------
    >>> taken = Batches((torch.zeros(200, 3) for _ in range(9)))
    >>> len(taken.first(2)), taken.samples, len(list(taken))
    (2, 600, 3)
    """

    def __init__(self, data: Iterable[Any], samples: int = SAMPLES) -> None:
        self._data, self._most, self.samples = data, samples, 0
        if isinstance(data, Batches):
            self._data, self._most, self.samples = data._data, data._most, data.samples
        elif samples <= SAMPLES or not hasattr(data, "__len__"):
            self._data = list(self)

    def __length_hint__(self) -> int:
        return len(self._data) if isinstance(self._data, list) else NotImplemented

    def __iter__(self) -> Iterator[Any]:
        samples = 0
        for batch in self._data:
            yield batch
            samples += count_samples(batch)
            if samples >= self._most:
                break
        self.samples = samples

    def first(self, count: int) -> list[Any]:
        """As many batches as that, but of several no more than half; refused if there is none."""
        found = list(islice(self, 2 * count))
        if not found:
            raise no_data()
        return found[: -(-len(found) // 2)]


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


def check_traced(graph: CouplingGraph, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors of another model than the graph's, or without values, or here and there."""
    for name in graph.shapes:
        if name not in tensors or tuple(tensors[name].shape) != tuple(graph.shapes[name]):
            raise PlanError(
                "the graph is that of another model",
                why=f"{name} has shape {tuple(graph.shapes[name])} there, and here "
                f"{tuple(tensors[name].shape) if name in tensors else 'is missing'}",
                fix="trace this model",
            )
    places: dict[str, str] = {}
    for name, tensor in tensors.items():
        if name in graph.parameters:
            places.setdefault(str(tensor.device), name)
    if "meta" in places:
        raise ModelError(
            f"{places['meta']} has a shape but no values",
            why="it is on the meta device, and statistics are taken from a model that runs",
            fix="load the weights first",
        )
    if len(places) > 1:
        places_text = ", ".join(f"{name} on {place}" for place, name in sorted(places.items()))
        raise ModelError(
            f"the model lies on {len(places)} devices",
            why=f"batches are moved to one device, and there are {places_text}",
            fix='move it to one: model.to("cpu"), say',
        )


@contextmanager
def as_traced(model: nn.Module, forward_fn: ForwardFn | None) -> Iterator[list[str]]:
    """Within the context the model runs what it ran when it was traced.

    The path of the running module is on top of the list.  Kernels that hide what they consist of
    are replaced, where the model has any: that costs time.
    """
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    stack = [""]
    with (
        entered_by(model, forward_fn),
        quiet_run(model),
        adapted(model),
        plain_kernels() if recurrent else nullcontext(),
        follow_modules(model, stack),
    ):
        yield stack
