"""Rows of the committed tables: replaced by their key, kept in order, with their commit."""

from __future__ import annotations

import csv
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Row = Mapping[str, Any]


@cache
def commit() -> str:
    """The short hash of HEAD, with a ``+`` where sources, benchmarks or judges differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(
            ("git", *words), cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()

    changed = git("status", "--porcelain", "--", "src", "benchmarks/*.py", "tests/shadow.py")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a table; none where there is no table yet."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def replace(path: Path, fields: Sequence[str], key: Sequence[str], rows: Iterable[Row]) -> None:
    """Write rows over those with the same values in the columns of ``key``; new ones go last."""
    table = {tuple(row[name] for name in key): row for row in read(path)}
    for row in rows:
        table[tuple(str(row.get(name, "")) for name in key)] = row
    path.parent.mkdir(exist_ok=True)
    draft = path.with_suffix(".tmp")
    with draft.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fields, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(table.values())
    os.replace(draft, path)
