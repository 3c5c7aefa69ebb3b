"""Plans as short tables of plain text: costs and groups, before and after."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from prunus.graph.plan_diff import Cost

_SHOWN = 20
"""Groups that a table lists before it only counts them."""

_FIRST = ("params", "macs", "bytes")
_NAMES = {"macs": "MACs"}


def costs_lines(costs: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    """One line for each cost: before, after, and the share that is left."""
    order = [*(n for n in _FIRST if n in costs), *sorted(set(costs) - set(_FIRST))]
    rows = [
        (_NAMES.get(name, name), *map(spell_count, costs[name]), f"{Cost(*costs[name]).share:.0%}")
        for name in order
    ]
    if rows:
        yield from _aligned([("", "before", "after", "share"), *rows])


def groups_lines(groups: Sequence[tuple[str, int, int]]) -> Iterator[str]:
    """One line for each group: its name, its units, and how many of them are kept."""
    rows = [(name, str(size), str(kept), f"{kept / max(size, 1):.0%}")
            for name, size, kept in groups[:_SHOWN]]  # fmt: skip
    if rows:
        yield from _aligned([("group", "units", "kept", "share"), *rows])
    if len(groups) > _SHOWN:
        yield f"… and {len(groups) - _SHOWN} more groups"


def spell_count(number: int) -> str:
    """A number in three or four digits.

    >>> [spell_count(n) for n in (999, 41_886, 173_842, 25_557_032, 6_700_000_000)]
    ['999', '41.9 k', '174 k', '25.6 M', '6.70 G']
    """
    scaled, suffixes = float(number), iter(("", " k", " M", " G", " T", " P"))
    suffix = next(suffixes)
    while scaled >= 999.5 and suffix != " P":
        scaled, suffix = scaled / 1000, next(suffixes)
    if not suffix:
        return str(number)
    digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
    return f"{scaled:.{digits}f}{suffix}"


def _aligned(rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Rows as lines: the first column to the left, the others to the right."""
    cells = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for first, *rest in cells:
        numbers = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        yield "  ".join([first.ljust(widths[0]), *numbers])
