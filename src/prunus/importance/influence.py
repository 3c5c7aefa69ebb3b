"""How much a block changes what it is given: the importance of whole blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prunus.calibration.batches import Batches, run_all
from prunus.calibration.ranks import sum_over_ranks
from prunus.errors import DataError, PlanError, checks_options
from prunus.graph.coupling import Block, CouplingGraph
from prunus.tracer.blocks import main_input, main_tensor
from prunus.tracer.forward_fn import entered_by
from prunus.tracer.trace import quiet_run

_TINY = 1e-30
"""So that a vector of zeros has a cosine."""


@checks_options
def block_influence(
    model: nn.Module,
    graph: CouplingGraph,
    data: Iterable[Any],
    *,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
) -> dict[str, float]:
    """1 − mean cosine between what each block takes and what it returns; the least may go first.

    The mean runs over all tokens (or pixels) of all samples, the cosine over the features.  Sums
    are kept in float64, activations are not kept.  Padding counts like any other token.

    Parameters
    ----------
    model, graph
        The model and its trace: ``graph.blocks`` are measured.
    data
        Batches: a tensor, or a tuple or list whose first entry is the input, or a mapping of
        keyword arguments.
    forward_fn
        Called as ``forward_fn(model, batch)`` in place of the above; by default the model is
        called as it was when it was traced.

    Returns
    -------
    dict
        Module path → influence in [0, 2], in the order of ``graph.blocks``.

    Raises
    ------
    PlanError
        If the model has no block that can be dropped.
    DataError
        If the data holds no batch, or leads to values that are not finite.

    Notes
    -----
    The block influence of ShortGPT (Men et al., 2024): BI = 1 − E[xᵀy / (‖x‖ ‖y‖)].
    """
    if not graph.blocks:
        raise PlanError(
            "the model has no block that can be dropped",
            why="no child of its lists and sequences of modules is a residual block",
            fix="`graph.obstacles` says of each why it is none",
        )
    sums = {block.name: 0.0 for block in graph.blocks}
    counts = dict.fromkeys(sums, 0)
    measured = _measure(model, graph.blocks, sums, counts)
    with entered_by(model, graph.forward_fn), quiet_run(model), measured:
        run_all(model, Batches(data), forward_fn)
    totals = sum_over_ranks([*sums.values(), *counts.values()])
    found = {
        name: 1.0 - total / max(count, 1)
        for name, total, count in zip(sums, totals, totals[len(sums) :], strict=False)
    }
    wrong = [name for name, value in found.items() if not abs(value) < float("inf")]
    if wrong:
        raise DataError(
            "the influence of blocks is not finite",
            where=wrong[0],
            why="the data holds NaN or infinite values, or the model makes them",
            fix="clean the data",
        )
    return found


@contextmanager
def _measure(
    model: nn.Module, blocks: Iterable[Block], sums: dict[str, float], counts: dict[str, int]
) -> Iterator[None]:
    """Add up the cosines of every block while the model runs."""
    handles: list[Any] = []

    def attach(block: Block) -> None:
        given: list[Tensor | None] = []

        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            found = main_input(args, kwargs)
            given.append(None if found is None else found.clone())  # a block may work in place

        def leave(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before, after = given.pop(), main_tensor(output)
            if before is not None and after is not None and before.shape == after.shape:
                cosines = _cosines(before.double(), after.double(), block.dim)
                sums[block.name] += float(cosines.sum())
                counts[block.name] += cosines.numel()

        module = model.get_submodule(block.name)
        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave, with_kwargs=True))

    try:
        for block in blocks:
            attach(block)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _cosines(a: Tensor, b: Tensor, dim: int) -> Tensor:
    lengths = torch.linalg.vector_norm(a, dim=dim) * torch.linalg.vector_norm(b, dim=dim)
    cosines: Tensor = (a * b).sum(dim) / lengths.clamp_min(_TINY)
    return cosines
