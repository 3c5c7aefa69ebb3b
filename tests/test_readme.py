"""The programs of the README and of docs/ run and print what is shown, and so does the demo."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from benchmarks import demo
from prunus.cli import main
from prunus.tracer import registry
from tests.boxes import write_boxes

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

PAGES = "\n".join([README, *(p.read_text("utf-8") for p in sorted((ROOT / "docs").glob("*.md")))])

PROGRAMS = re.findall(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", PAGES, re.M | re.S)
FILES = re.findall(r"^```py\n(# (\S+\.py)\n.*?)^```", PAGES, re.M | re.S)
COMMANDS = re.findall(r"^\$ prunus (.*?)\n(.*?)^```", PAGES, re.M | re.S)
LINKS = re.findall(r"\]\(([^)#:]+)\)", README)


def without_noise(text: str) -> str:
    """Rounding errors differ from machine to machine, and so do the spaces that end a line.

    On its first use ultralytics says where its settings are.
    """
    text = re.sub(r"^.*(Ultralytics|yolo) [Ss]ettings.*\n", "", text, flags=re.M)
    text = re.sub(r"\d\.\de[+-]\d+", "#", text)
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


@pytest.mark.parametrize(("code", "shown"), PROGRAMS, ids=range(len(PROGRAMS)))
def test_programs_print_what_is_shown(code, shown, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_RULES", dict(registry.registered()))  # one adds a rule
    if "boxes/data.yaml" in code:
        write_boxes(tmp_path / "boxes")
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


@pytest.mark.parametrize("link", LINKS)
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


def test_demo_prints_the_table_that_is_shown(tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("torch_pruning")
    assert demo.main(["--out", str(tmp_path / "demo")]) == 0
    printed = capsys.readouterr().out

    names = ["certificate.json", "demo.png", "plan.json", "report.json"]
    assert sorted(file.name for file in (tmp_path / "demo").iterdir()) == names
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert report["certificate"]["verdict"] == "exact"
    dense, ours, *peers = report["stages"]
    assert set(dense) == {"name", "accuracy", "params", "macs", "bytes", "latency_ms"}
    assert set(dense["latency_ms"]) == {"1", "64"}
    assert ours["macs"] <= dense["macs"] // 2
    assert ours["accuracy"] >= dense["accuracy"] - 2
    assert len(peers) == 2
    assert all(ours["accuracy"] > peer["accuracy"] + 10 for peer in peers)

    shown = re.search(r"<!-- demo -->\n```text\n(.*?)^```", README, re.M | re.S)
    assert shown is not None
    assert len(rows(printed)) == len(rows(shown[1])) == 4
    for one, other in zip(rows(printed), rows(shown[1]), strict=True):
        assert one[0] == other[0]
        assert float(one[1]) == pytest.approx(float(other[1]), abs=1)
        assert one[2:-2] == other[2:-2]  # all but the milliseconds


def rows(table: str) -> list[list[str]]:
    """The name and the numbers of every row of the table."""
    lines = (re.split(r"\s{2,}", line.strip()) for line in table.splitlines())
    return [[line[0], line[1].split()[0], *line[2:]] for line in lines if len(line) > 5][1:]


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
    assert re.findall(r"^\| (\d+) \|", PAGES, re.M) == told
