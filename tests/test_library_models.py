"""A fixed sample of library models through the coverage benchmark, as they come."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COUNT = 25

Row = dict[str, str]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    out = tmp_path_factory.mktemp("sweep") / "rows.csv"
    sweep = [sys.executable, "-m", "benchmarks.exactness.coverage", "--out", str(out)]
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    done = subprocess.run(
        [*sweep, "--sample", str(COUNT), "--jobs", "2"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with out.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_sample_is_whole(rows: list[Row]) -> None:
    assert len(rows) == COUNT
    assert len({row["library"] for row in rows}) == 4


@pytest.mark.parametrize("number", range(COUNT))
def test_a_model_is_pruned_exactly(rows: list[Row], number: int) -> None:
    row = rows[number]
    assert row["verdict"] == "exact", row
    assert row["status"] == "ok", row
    assert not row["witness"].startswith("disagrees"), row
    assert not row["shadow"].startswith("disagrees"), row
