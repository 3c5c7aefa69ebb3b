"""Progress: one callback, of the outermost call, and a bar on terminals alone."""

from __future__ import annotations

import io
import sys
import time

import pytest
import torch
from torch import nn

import prunus
from prunus.graph import progress
from prunus.graph.progress import counted, following, shows

Stage = tuple[str, int, "int | None"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def a_terminal(monkeypatch) -> Terminal:
    """What stderr is from now on; a fixture would come before pytest's own."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    return screen


def test_calls_inside_report_to_the_callback_of_the_one_around() -> None:
    outer: list[Stage] = []
    inner: list[Stage] = []
    with following(lambda *stage: outer.append(stage)) as tell:
        tell("first", 0, None)
        with following() as again:
            again("second", 1, 2)
        with following(lambda *stage: inner.append(stage)):
            assert list(counted("ab", "third")) == ["a", "b"]
        list(counted((letter for letter in "a"), "fourth"))
    list(counted("ab", "nobody watches"))
    assert outer == [("first", 0, None), ("second", 1, 2), ("fourth", 0, None), ("fourth", 1, None)]
    assert inner == [("third", 0, 2), ("third", 1, 2), ("third", 2, 2)]


def test_a_function_is_a_stage() -> None:
    seen: list[Stage] = []

    @shows("resting")
    def rest(seconds: int) -> int:
        """Doze."""
        return seconds

    with following(lambda *stage: seen.append(stage)):
        assert rest(seconds=3) == 3
    assert (seen, rest.__name__, rest.__doc__) == ([("resting", 0, None)], "rest", "Doze.")


def test_a_long_call_shows_a_bar_and_leaves_nothing(monkeypatch) -> None:
    terminal = a_terminal(monkeypatch)
    with following(delay=0.01) as tell:
        tell("counting sheep", 3, 10)
        deadline = time.monotonic() + 20
        while "counting sheep" not in terminal.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    shown = terminal.getvalue()
    assert "counting sheep" in shown
    assert shown.rstrip().endswith(("\x1b[2K", "\x1b[?25h"))  # the line is erased again
    assert progress._current.get() is None


def test_a_short_call_shows_none(monkeypatch) -> None:
    terminal = a_terminal(monkeypatch)
    with following(delay=60) as tell:
        tell("counting sheep", 3, 10)
    assert terminal.getvalue() == ""


def test_an_error_closes_the_bar(monkeypatch) -> None:
    terminal = a_terminal(monkeypatch)
    with pytest.raises(KeyError), following(delay=0):
        raise KeyError
    assert terminal.getvalue().rstrip().endswith(("\x1b[2K", "\x1b[?25h"))
    assert progress._current.get() is None


def test_without_a_terminal_nothing_is_printed(capsys) -> None:
    with following(delay=0) as tell:
        tell("counting sheep", 3, 10)
    assert capsys.readouterr() == ("", "")


def test_public_calls_say_what_they_do() -> None:
    seen: list[Stage] = []
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with following(lambda *stage: seen.append(stage)):
        graph = prunus.trace(model, torch.ones(1, 4))
        plan = prunus.plan(graph, model, ratio=0.5)
        prunus.verify(plan, model, torch.ones(1, 4))
        prunus.api.keep(model, graph.groups[0].name, [0, 1], torch.ones(1, 4))
    stages = ("tracing", "planning", "verifying", "removing units")
    assert seen == [(stage, 0, None) for stage in stages]


def test_a_call_from_python_shows_a_bar(monkeypatch) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    graph = prunus.trace(model, torch.ones(1, 4))
    terminal = a_terminal(monkeypatch)
    monkeypatch.setattr(progress, "DELAY", 0.01)

    def slow(_: nn.Module) -> float:
        deadline = time.monotonic() + 20
        while "━" not in terminal.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
        return 1.0

    prunus.planner.search.sensitivity(graph, model, slow, ratios=[0.5])
    assert "0.weight[0] without 4 of 8: 1" in terminal.getvalue()
