"""Tables of results: rows are replaced by their key, kept in order, and name their commit."""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(os.environ.get("PRUNUS_RESULTS", ROOT / "benchmarks" / "results"))
"""Where tables are read and written; ``make bench-quick`` sets the variable to a folder of out/."""

MISSING = "this benchmark needs "

Row = Mapping[str, Any]


class MissingError(SystemExit):
    """Data, weights or a device that are not there; ``make bench-quick`` skips the benchmark."""

    def __init__(self, what: str) -> None:
        super().__init__(MISSING + what)


@cache
def commit() -> str:
    """The short hash of HEAD, with a ``+`` where sources, benchmarks or judges differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(
            ("git", *words), cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()

    changed = git("status", "--porcelain", "--", "src", "benchmarks/*.py", "tests/shadow.py")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


@dataclass(frozen=True)
class Table:
    """A file of rows, one for each value of the columns of ``key``.

    Parameters
    ----------
    order
        Sorts the rows; without it they stay in the order in which their keys were first written.
    """

    name: str
    fields: tuple[str, ...]
    key: tuple[str, ...]
    order: Callable[[Row], Any] | None = None
    folder: Path = RESULTS

    @property
    def path(self) -> Path:
        return self.folder / self.name

    def at(self, path: str | Path) -> Table:
        """The same table in another file."""
        return replace(self, folder=Path(path).parent, name=Path(path).name)

    def read(self) -> list[dict[str, str]]:
        """All rows; none where there is no table yet."""
        if not self.path.exists():
            return []
        with self.path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def key_of(self, row: Row) -> tuple[str, ...]:
        """The values of its key, as they are in the file."""
        return tuple(str(row.get(name, "")) for name in self.key)

    def done(self, *, by: str | None = None) -> set[tuple[str, ...]]:
        """The keys of the rows that there are, or of those that a commit made."""
        return {self.key_of(row) for row in self.read() if by in (None, row.get("commit"))}

    def add(self, *rows: Row) -> None:
        """Write rows over those of the same key, and print them; the old file is whole until then.

        What is in no column of the table is only printed.
        """
        table: dict[tuple[str, ...], Row] = {self.key_of(row): row for row in self.read()}
        for row in rows:
            table[self.key_of(row)] = row
            print(*(f"{name}={row[name]}" for name in row if row[name] != ""), flush=True)
        self.write(sorted(table.values(), key=self.order) if self.order else table.values())

    def write(self, rows: Iterable[Row]) -> None:
        """Write these rows and no others."""
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".tmp")
        with draft.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(
                file, self.fields, restval="", extrasaction="ignore", lineterminator="\n"
            )
            writer.writeheader()
            writer.writerows(rows)
        os.replace(draft, self.path)

    def pivot(self, columns: Sequence[str], by: str, value: str) -> str:
        """A line for every setting of some columns, and for each value of another one a cell.

        The cell is the mean of the values, with their standard deviation where there are more.
        """
        rows = [row for row in self.read() if row[value]]
        heads = list(dict.fromkeys(row[by] for row in rows))
        lines = [f"{value:60}" + "".join(f"{head:>15}" for head in heads)]
        for setting in dict.fromkeys(tuple(row[name] for name in columns) for row in rows):
            own = [row for row in rows if tuple(row[name] for name in columns) == setting]
            cells = ""
            for head in heads:
                found = [float(row[value]) for row in own if row[by] == head]
                spread = f" ± {stdev(found):.2f}" if len(found) > 1 else ""
                cells += f"{f'{mean(found):.4g}{spread}' if found else '':>15}"
            lines.append(f"{' '.join(setting):60}{cells}")
        return "\n".join(lines)

    def parser(self, text: str | None) -> argparse.ArgumentParser:
        """A command line whose help is a module's docstring; ``table`` is the one to write to."""
        parser = argparse.ArgumentParser(
            description=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument(
            "--out", dest="table", type=self.at, default=self, metavar="FILE",
            help="another file than the committed one",
        )  # fmt: skip
        return parser
