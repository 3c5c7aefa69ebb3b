"""The README tells the truth: its programs run and print what it shows, and so does the demo."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from prunus.cli import main
from prunus.tracer import registry

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

PROGRAMS = re.findall(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", README, re.M | re.S)
FILES = re.findall(r"^```py\n(# (\S+\.py)\n.*?)^```", README, re.M | re.S)
COMMANDS = re.findall(r"^\$ prunus (.*?)\n(.*?)^```", README, re.M | re.S)


def without_noise(text: str) -> str:
    """Rounding errors differ from machine to machine, and so do the spaces that end a line."""
    text = re.sub(r"\d\.\de[+-]\d+", "#", text)
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


@pytest.mark.parametrize(("code", "shown"), PROGRAMS, ids=range(len(PROGRAMS)))
def test_programs_print_what_is_shown(code, shown, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_RULES", dict(registry.registered()))  # one adds a rule
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    assert without_noise(printed.getvalue()) == without_noise(shown)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where a reader is: with the benchmarks, the README's own files, and some pictures."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
    for text, name in FILES:
        (folder / name).write_text(text)
    (folder / "pictures").mkdir()
    images = pytest.importorskip("PIL.Image")
    noise = np.random.default_rng(0)
    for number in range(8):
        pixels = noise.integers(0, 256, (70, 90, 3), dtype=np.uint8)
        images.fromarray(pixels).save(folder / "pictures" / f"{number}.png")
    return folder


@pytest.mark.parametrize(("command", "shown"), COMMANDS, ids=range(len(COMMANDS)))
def test_commands_print_what_is_shown(command, shown, folder, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    assert main(shlex.split(command)) == 0
    assert without_noise(capsys.readouterr().out) == without_noise(shown)


def test_there_is_something_to_test() -> None:
    assert len(PROGRAMS) >= 2
    assert len(COMMANDS) >= 3
    assert len(FILES) >= 1
    assert all(shown for _, shown in PROGRAMS)


def test_demo_prints_the_table_that_is_shown(tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib")
    path = ROOT / "benchmarks" / "demo.py"
    spec = importlib.util.spec_from_file_location("demo", path)
    assert spec is not None
    assert spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    assert demo.main(["--out", str(tmp_path / "demo")]) == 0
    printed = capsys.readouterr().out

    names = ["certificate.json", "channels.png", "plan.json", "report.json"]
    assert sorted(file.name for file in (tmp_path / "demo").iterdir()) == names
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert report["certificate"]["verdict"] == "exact"
    dense, cut, recalibrated = report["stages"]
    assert set(dense) == {"name", "accuracy", "params", "macs", "bytes", "latency_ms"}
    assert set(dense["latency_ms"]) == {"1", "64"}
    assert cut["macs"] <= dense["macs"] // 2
    assert recalibrated["accuracy"] >= dense["accuracy"] - 10

    shown = re.search(r"<!-- demo -->\n```text\n(.*?)^```", README, re.M | re.S)
    assert shown is not None
    assert len(rows(printed)) == len(rows(shown[1])) == 3
    for ours, theirs in zip(rows(printed), rows(shown[1]), strict=True):
        assert ours[0] == theirs[0]
        assert float(ours[1]) == pytest.approx(float(theirs[1]), abs=1)
        assert ours[2:-2] == theirs[2:-2]  # all but the milliseconds


def rows(table: str) -> list[list[str]]:
    """The words of every row that begins with the name of a stage."""
    lines = (line.split() for line in table.splitlines())
    return [line for line in lines if line and line[0] in {"dense", "cut", "recalibrated"}]


def test_every_folder_has_its_place_in_the_layout() -> None:
    layout = README.partition("## Layout")[2].partition("\n## ")[0]
    ignored = {".git", "out", "build", "dist", "htmlcov"}
    for folder in ROOT.iterdir():
        if not folder.is_dir() or folder.name in ignored:
            continue
        if folder.name.startswith(".") and folder.name != ".ci":
            continue
        if folder.name.endswith(".egg-info") or folder.name == "__pycache__":
            continue
        name = "src/prunus" if folder.name == "src" else folder.name
        assert f"`{name}/`" in layout, f"{folder.name} is not in the README's layout"


def test_exit_codes_are_those_of_the_help(capsys) -> None:
    main(["--help"])
    told = re.findall(r"^  (\d+) ", capsys.readouterr().out, re.M)
    assert re.findall(r"^\| (\d+) \|", README, re.M) == told
