"""Changed plans and files reach nothing; ``benchmarks/exactness/attacks.py`` tries many more."""

from __future__ import annotations

import importlib
import logging
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.attacks import Observer, outside
from tests.file_attacks import attack_with_files
from tests.plan_attacks import PlanAttacks, attack_with_plans
from tests.snapshots import same

OBSERVER = Observer()
SMALL = ("tempting", "mlp")


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where a plan that got through would write."""
    monkeypatch.chdir(tmp_path)
    yield
    assert os.listdir(tmp_path) == []


def test_changed_plans_are_held() -> None:
    dice = random.Random(0)
    tally = attack_with_plans(120, OBSERVER, attacks=[PlanAttacks(name, dice) for name in SMALL])
    assert tally.broken == []
    assert tally.held == tally.tried == 120
    assert tally.notes["valid by the schema"] >= 40
    for use in ("apply", "verify", "mask", "load"):
        assert tally.notes[f"{use} done"] > 5, use
        assert tally.notes[f"{use} refused"] > 5, use


def test_changed_files_are_held() -> None:
    tally = attack_with_files(100, OBSERVER, names=SMALL)
    assert tally.broken == []
    assert tally.notes["loaded"] > 5
    assert tally.notes["refused"] > 50


def test_the_instrument_sees_what_attacks_do(tmp_path: Path) -> None:
    observer = Observer()
    for act in (
        lambda: (tmp_path / "x").write_text("x"),
        lambda: (tmp_path / "x").unlink(),
        lambda: os.open(tmp_path, os.O_RDONLY) and os.mkdir(tmp_path / "y"),
        lambda: os.rmdir(tmp_path / "y"),
        lambda: subprocess.run([sys.executable, "-c", ""], check=True),
    ):
        seen = len(observer.seen)
        act()
        assert len(observer.seen) == seen, "it sees what it does not watch"
        with observer.watching():
            if act is not None:
                (tmp_path / "z").write_text("")
        assert len(observer.seen) > seen
    (tmp_path / "z").unlink()
    before = outside()
    nn.BatchNorm2d._version = 3
    assert not same(before, outside())
    del nn.BatchNorm2d._version
    logging.disable(10)
    assert not same(before, outside())
    logging.disable(0)
    torch.set_num_threads(torch.get_num_threads() + 1)
    assert not same(before, outside())
    torch.set_num_threads(torch.get_num_threads() - 1)
    assert same(before, outside())


def test_an_engine_that_reaches_outside_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The instrument can fail: here every edit also changes the environment, or raises."""
    apply = importlib.import_module("prunus.surgeon.apply")
    attack = PlanAttacks("mlp", random.Random(0))
    monkeypatch.setattr(attack, "draw", lambda: attack.document)
    assert attack_with_plans(1, OBSERVER, attacks=[attack]).held == 1
    monkeypatch.setenv("ATTACKED", "no")

    def reach_out(*_: object) -> None:
        os.environ["ATTACKED"] = "yes"

    def fail(*_: object) -> None:
        raise ValueError

    for evil in (reach_out, fail):
        with monkeypatch.context() as patch:

            def draw(evil: object = evil, patch: pytest.MonkeyPatch = patch) -> object:
                patch.setattr(apply, "write_attribute", evil)
                return attack.document

            patch.setattr(attack, "draw", draw)
            assert attack_with_plans(1, OBSERVER, attacks=[attack]).held == 0
