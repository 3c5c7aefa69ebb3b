"""What the benchmarks share: tables, processes of their own, and a sample of each."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from benchmarks import apart, quick
from benchmarks.rows import ROOT, Table

FOLDERS = ("exactness", "accuracy", "training", "speed", "planning", "peers")


def test_rows_are_replaced_by_their_key(tmp_path: Path) -> None:
    table = Table("table.csv", ("a", "b", "c"), ("a", "b"), folder=tmp_path / "results")
    table.add({"a": "x", "b": 0.1, "c": 1}, {"a": "y", "b": 0.1, "c": 2})
    table.add({"a": "x", "b": 0.1, "c": 3}, {"a": "x", "b": 0.2})
    assert table.read() == [
        {"a": "x", "b": "0.1", "c": "3"},
        {"a": "y", "b": "0.1", "c": "2"},
        {"a": "x", "b": "0.2", "c": ""},
    ]
    assert table.done() == {("x", "0.1"), ("y", "0.1"), ("x", "0.2")}
    assert table.at(tmp_path / "none.csv").read() == []
    assert table.pivot(("a",), "b", "c").split() == ["c", "0.1", "x", "3", "y", "2"]


def test_tables_are_sorted_by_what_they_say(tmp_path: Path) -> None:
    table = Table("t.csv", ("a", "b"), ("a",), lambda row: int(row["a"]), folder=tmp_path)
    table.add({"a": 10}, {"a": 9, "b": "x", "no column": 1})
    assert table.path.read_text() == "a,b\n9,x\n10,\n"


def fails() -> None:
    raise ValueError("no\n such thing")


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_function_runs_apart(start: apart.Start) -> None:
    assert apart.run_apart(divmod, 7, 2, start=start) == (3, 1)
    assert apart.run_apart(os.getpid, start=start) != os.getpid()


def test_what_goes_wrong_apart_is_told() -> None:
    with pytest.raises(apart.FailedError, match=r"^ValueError: no such thing$"):
        apart.run_apart(fails, start="fork")
    with pytest.raises(apart.FailedError, match=f"the process died: -{int(signal.SIGKILL)}"):
        apart.run_apart(_kill, start="fork")
    with pytest.raises(apart.StoppedError, match=r"stopped after 0\.3 s"):
        apart.run_apart(time.sleep, 60, start="fork", seconds=0.3)
    with pytest.raises(apart.StoppedError, match="processor time"):
        apart.run_apart(_spin, start="fork", processor_seconds=1)
    with pytest.raises(apart.FailedError, match="MemoryError"):
        apart.run_apart(bytearray, 2**34, start="fork", gigabytes=8)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _spin() -> None:
    while True:
        pass


def benchmarks() -> list[str]:
    """Every program in the folders."""
    paths = [path for folder in FOLDERS for path in (ROOT / "benchmarks" / folder).glob("*.py")]
    return [
        f"{path.parent.name}.{path.stem}"
        for path in sorted(paths)
        if "def main(" in path.read_text(encoding="utf-8")
    ]


def test_every_benchmark_has_a_sample_and_a_row_of_the_readme() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert len(benchmarks()) > 15
    assert sorted(quick.SAMPLES) == sorted([*benchmarks(), "house"])
    assert [name for name in quick.SAMPLES if f"| `{name}` |" not in text] == []


def test_a_sample_is_skipped_where_something_is_missing(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(quick, "OUT", tmp_path)
    status, words = quick.try_out("accuracy.oneshot_fmnist", f"--data {tmp_path / 'none'}")
    assert (status, words) == (
        "skipped",
        f"this benchmark needs Fashion-MNIST in the folder {tmp_path / 'none'}",
    )
    assert quick.try_out("peers.cases", "no_such_case")[0] == "failed"
