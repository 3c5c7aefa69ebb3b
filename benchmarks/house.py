"""The size and shape of the source tree, beside its targets; ``results/house.csv``.

    python benchmarks/house.py           # ten seconds
    python benchmarks/house.py --dry     # print the table and write nothing

Code lines are counted by radon, without docstrings, comments and blank lines; a package's target
is its cap in ``tests/test_layers.py``, whose parser reads the imports as well.  Complexity is
radon's, of functions, methods and closures.  Traces and deep copies are counted in one ``shrink``
of a small encoder with data (``tests/test_traces_and_copies.py``).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.table
from radon.complexity import cc_visit
from rich.console import Console

from benchmarks.rows import ROOT, Table
from tests import test_layers, test_traces_and_copies

TABLE = Table("house.csv", ("measure", "value", "target"), ("measure",))
SOURCE = ROOT / "src" / "prunus"
APART = ("training", "sparsity", "exporters")
"""Packages of later issues, which the total does not count."""

TOTAL = 15_500


@dataclass(frozen=True)
class Function:
    """One function of the source tree."""

    name: str
    complexity: int


@dataclass(frozen=True)
class Measure:
    """One line of the table; without a target it is only told."""

    measure: str
    value: float | str
    target: float | None = None

    @property
    def met(self) -> bool:
        """Whether the value is at most the target; what was not to be had is not met."""
        return self.target is None or (
            not isinstance(self.value, str) and self.value <= self.target
        )


def functions(path: Path) -> Iterator[Function]:
    """Every function of a file, methods and closures as well."""

    def visit(blocks: Any) -> Iterator[Function]:
        for block in blocks:
            if not hasattr(block, "methods"):  # a class: its methods are listed beside it
                yield Function(f"{path.stem}.{block.name}", block.complexity)
                yield from visit(block.closures)

    yield from visit(cc_visit(path.read_text(encoding="utf-8")))


def parameters(path: Path) -> Iterator[int]:
    """How many parameters every function of a file has."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            own = node.args
            named = len(own.posonlyargs) + len(own.args) + len(own.kwonlyargs)
            yield named + (own.vararg is not None) + (own.kwarg is not None)


def sizes() -> Iterator[Measure]:
    """Files and code lines, in total and by package."""
    lines = test_layers.code_lines(SOURCE)
    files = [p for p in SOURCE.rglob("*.py") if p.relative_to(SOURCE).parts[0] not in APART]
    yield Measure("files", len(files), 150)
    yield Measure("code lines", sum(n for name, n in lines.items() if name not in APART), TOTAL)
    for name, count in lines.items():
        yield Measure(f"code lines: {name}", count, test_layers.CODE_LINES.get(name, 0))


def structure() -> Iterator[Measure]:
    """What the imports and the top of the package show."""
    broken = len(list(test_layers.layer_violations(ROOT)))
    levels = f"{broken} imports upwards" if broken else len(test_layers.LEVELS)
    loose = list(SOURCE.glob("*.py"))
    yield Measure("loose files", len(loose), 5)
    yield Measure("import levels", levels, 9)
    yield Measure("import cycles", len(list(test_layers.cycle_violations(ROOT))), 0)
    yield Measure("public names", len(test_layers.public_names(SOURCE / "__init__.py")), 16)


def complexity() -> Iterator[Measure]:
    """How hard the functions are to read."""
    paths = sorted(SOURCE.rglob("*.py"))
    found = [function for path in paths for function in functions(path)]
    over = sum(function.complexity > 10 for function in found)
    worst = max(found, key=lambda function: function.complexity)
    yield Measure("functions", len(found))
    yield Measure("functions over complexity 10 (%)", round(100 * over / len(found), 2), 3)
    yield Measure("worst complexity", worst.complexity, 15)
    yield Measure("most parameters", max(n for path in paths for n in parameters(path)), 12)


def costs() -> Iterator[Measure]:
    """What one ``shrink`` of an encoder takes."""
    counted = test_traces_and_copies.count_in_shrink()
    yield Measure("traces in a shrink, on two input shapes", counted.traces, 2)
    yield Measure("deep copies at once in a shrink", counted.copies, 2)


def main() -> None:
    """Measure, print, and write the table."""
    parser = TABLE.parser(__doc__)
    parser.add_argument("--dry", action="store_true", help="write nothing")
    options = parser.parse_args()
    measures = [*sizes(), *structure(), *complexity(), *costs()]
    table = rich.table.Table("measure", "value", "target", "")
    for found in measures:
        target = "" if found.target is None else f"{found.target:g}"
        table.add_row(found.measure, str(found.value), target, "" if found.met else "missed")
    Console().print(table)
    if not options.dry:
        options.table.write(map(vars, measures))


if __name__ == "__main__":
    main()
