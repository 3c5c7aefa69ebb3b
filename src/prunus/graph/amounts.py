"""What may be asked to be removed, by structure: the structures, and shares or counts of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

from prunus.errors import PlanError

Kind = Literal[
    "heads", "kv groups", "query heads", "head dims", "qk dims", "vo dims",
    "ffn", "experts", "routing groups", "hidden", "channels", "other",
]  # fmt: skip
"""What the units of a group are.

*heads* of an attention, or *kv groups* where several query heads share keys and values, and the
*query heads* that lie at the same place of every KV group; *head dims* where queries, keys and
values lose the same, else *qk dims* and *vo dims* (pairs where a rotary embedding ties two);
*ffn*, the inner width of a feed-forward block of a layer; *experts*, with their rows of the router,
one of each of the *routing groups* where the router chooses among groups first; *hidden*, a
residual stream; *channels* of convolutions; *other* widths, of a classifier say.
"""


Amount = float | int | str
"""A share in [0, 1), as 0.3 or ``"30%"``, or a count, as 2; ``1`` is one unit."""

Remove = Mapping[str, Amount | Mapping[int | str, Amount]]
"""Amounts by structure: one for every layer, or amounts by the layer's number or path."""

LAYERS = "layers"


@dataclass(frozen=True)
class Removable:
    """A structure that can be named: the kinds of its groups, and what is removed of it."""

    kinds: tuple[Kind, ...]
    text: str


REMOVABLE: Mapping[str, Removable] = {
    "heads": Removable(
        ("heads", "query heads"), "attention heads, the same number of every KV group"
    ),
    "kv_groups": Removable(("kv groups",), "key and value heads, with the query heads they serve"),
    "ffn": Removable(("ffn",), "inner width of feed-forward blocks"),
    "experts": Removable(("experts",), "whole experts, with their rows of the router"),
    "hidden": Removable(("hidden",), "width of the residual stream"),
    LAYERS: Removable((), "whole layers, those of least influence"),
}
"""The structures by the names of ``remove=`` and of the flags of the command line."""


def read_amount(value: Any) -> float | int | None:
    """A share as a float, a count as an int; None for what is neither.

    >>> [read_amount(value) for value in ("25%", "0.3", "2", 1, 1.0, "100%", True)]
    [0.25, 0.3, 2, 1, None, None, None]
    """
    if isinstance(value, str):
        value = _read(value.strip())
    if isinstance(value, bool) or not isinstance(value, Real) or value < 0:
        return None
    if isinstance(value, Integral):
        return int(value)
    return float(value) if float(value) < 1 else None


def _read(text: str) -> float | int | None:
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        return int(text) if text.isascii() and text.isdigit() else float(text)
    except ValueError:
        return None


def check_remove(remove: Mapping[Any, Any]) -> None:
    """Refuse structures that there are not, and amounts that are no share and no count.

    Raises
    ------
    PlanError
        The message names the structures, or says what an amount is.
    """
    for name, asked in remove.items():
        if name not in REMOVABLE:
            raise PlanError(
                f"no structure is called {name!r}",
                where="remove=",
                why=f"the structures are {', '.join(REMOVABLE)}",
            )
        for where, amount in _amounts(f"remove[{name!r}]", asked):
            if read_amount(amount) is None:
                raise PlanError(
                    f"{where}={amount!r} is no amount to remove",
                    why="a float or a percentage is a share below 1, an int is a count",
                    fix="0.3 or '30%' is a share of every layer, 2 is two of every layer",
                )


def _amounts(option: str, asked: Any) -> Iterator[tuple[str, Any]]:
    for layer, amount in asked.items() if isinstance(asked, Mapping) else [(None, asked)]:
        if isinstance(layer, bool) or not isinstance(layer, int | str | None):
            raise PlanError(
                f"{layer!r} is no layer", where=option, fix="name a layer by its number or path"
            )
        yield option if layer is None else f"{option}[{layer!r}]", amount
