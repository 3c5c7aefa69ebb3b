"""Blocks that are skipped while the model runs: what a model without them has to compute.

This knows nothing of lists that close up, of numbers or of configs.  A block runs as ever, so that
a cache or whatever else it feeds is in order, and what it returns is what it was given.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunus.tracer.blocks import main_input, main_tensor
from prunus.tracer.outputs import answer_of, find_outputs, select_outputs
from prunus.tracer.sources import find_line
from prunus.tracer.trace import quiet_run, same_draws
from prunus.verifier.case import tolerance
from prunus.verifier.permutation import relative_error

NOT_SKIPPED = "without the blocks the model does not compute what it does when they are skipped"


@contextmanager
def skip(model: nn.Module, names: Sequence[str]) -> Iterator[nn.Module]:
    """Within the context the blocks of these paths return their main input.

    That is the first floating-point tensor among their arguments; it takes the place of the first
    one among what they return, in whatever containers.
    """
    handles: list[Any] = []

    def attach(block: nn.Module) -> None:
        given: list[tuple[Tensor | None, ExitStack]] = []

        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            found = main_input(args, kwargs)
            drawing = ExitStack()
            drawing.enter_context(same_draws())  # nobody draws where the block is absent
            # A block may work in place.
            given.append((None if found is None else found.clone(), drawing))

        def leave(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            found, drawing = given.pop()
            drawing.close()
            return output if found is None else _replaced(output, found)

        handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(block.register_forward_hook(leave, with_kwargs=True))

    try:
        for name in names:
            attach(model.get_submodule(name))
        yield model
    finally:
        for handle in handles:
            handle.remove()


def _replaced(structure: Any, tensor: Tensor) -> Any:
    """The same containers with another main tensor."""
    if isinstance(structure, Tensor):
        return tensor
    if isinstance(structure, (list, tuple)):
        items = [*structure]
        place = _main_key(enumerate(items))
        items[place] = _replaced(items[place], tensor)
        named = hasattr(structure, "_fields")
        return type(structure)(*items) if named else type(structure)(items)
    changed = copy.copy(structure)
    if isinstance(structure, Mapping):
        key = _main_key(structure.items())
        changed[key] = _replaced(structure[key], tensor)
    else:
        key = _main_key((name, getattr(structure, name)) for name in structure.__dataclass_fields__)
        setattr(changed, key, _replaced(getattr(structure, key), tensor))
    return changed


def _main_key(items: Iterable[tuple[Any, Any]]) -> Any:
    return next(key for key, item in items if main_tensor(item) is not None)


@dataclass(frozen=True)
class DepthComparison:
    """A model without blocks beside the original that skips them.

    Attributes
    ----------
    rel_err
        Largest ‖without − skipping‖∞ / ‖skipping‖∞ over the outputs, those of a second round on
        the memory of the first included.
    moved, moved_alone
        The same measure between the skipping and the untouched original, for all blocks and for
        each of them alone.
    reason
        Why there is nothing to compare; empty if there is.
    """

    rel_err: float
    moved: float
    moved_alone: Mapping[str, float]
    dtype: torch.dtype
    outputs: tuple[str, ...]
    reason: str = ""

    @property
    def wrong(self) -> str:
        """Why the two do not agree; empty if they do."""
        return self.reason if self.rel_err <= tolerance(self.dtype) else self.reason or NOT_SKIPPED


def compare_depth(
    original: nn.Module,
    without: nn.Module,
    names: Sequence[str],
    args: Any,
    kwargs: Mapping[str, Any],
    *,
    outputs: str | Sequence[str] | None = None,
    each: bool = True,
) -> DepthComparison:
    """Compare a model that has lost the blocks ``names`` with the original that skips them.

    A model with a memory (a KV cache) answers twice, the second time to the same inputs as what
    comes next: a block that goes on writing where another one was shows there.
    """
    with quiet_run(original):
        torch.default_generator.manual_seed(0)  # so that every run draws the same
        dense = dict(select_outputs(find_outputs(original(*args, **kwargs)), outputs)[0])
        with skip(original, names):
            wanted, memory = _first_round(original, args, kwargs)
            wanted = {name: wanted[name].clone() for name in dense}
            try:
                more = _second_round(original, args, kwargs, memory)
            except Exception:  # an attention mask is too short for two rounds, say
                more = {}
        alone = {}
        for name in names if each else ():
            with skip(original, [name]):
                torch.default_generator.manual_seed(0)
                alone[name] = relative_error(dense, answer_of(original(*args, **kwargs)))
    error, reason = float("inf"), ""
    try:
        with quiet_run(without):
            answer, memory = _first_round(without, args, kwargs)
            error = relative_error(wanted, answer)
            if more:
                more = {name: more[name] for name in dense if name in more}
                error = max(
                    error, relative_error(more, _second_round(without, args, kwargs, memory))
                )
    except Exception as failure:  # the model's own forward may raise anything
        reason = (
            f"without the blocks the model's forward raised {type(failure).__name__} "
            f"at {find_line(failure)}: {failure}"
        )
    dtype = next(iter(wanted.values())).dtype
    moved = relative_error(dense, wanted)
    return DepthComparison(error, moved, alone, dtype, tuple(dense), reason)


def _first_round(
    model: nn.Module, args: Any, kwargs: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a model answers, and its memory.

    That is whatever it returns under a name under which its forward takes it again, and that is
    an object of its own kind (``past_key_values``).
    """
    torch.default_generator.manual_seed(0)
    taken = inspect.signature(model.forward).parameters
    asked = {"use_cache": True} if "use_cache" in taken else {}
    answer = model(*args, **{**asked, **kwargs})
    memory = {
        name: value
        for name in taken
        if name not in kwargs and _is_memory(value := _entry(answer, name))
    }
    return answer_of(answer), {**asked, **memory} if memory else {}


def _second_round(
    model: nn.Module, args: Any, kwargs: Mapping[str, Any], memory: Mapping[str, Any]
) -> dict[str, Tensor]:
    return answer_of(model(*args, **{**kwargs, **memory})) if memory else {}


def _is_memory(value: Any) -> bool:
    plain = (Tensor, bool, int, float, str, list, tuple, Mapping)
    return value is not None and not isinstance(value, plain)


def _entry(answer: Any, name: str) -> Any:
    if isinstance(answer, Mapping):
        return answer.get(name)
    return getattr(answer, name, None) if hasattr(answer, "__dataclass_fields__") else None
