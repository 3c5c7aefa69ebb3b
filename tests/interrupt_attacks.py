"""Interrupts and threads, counted for ``benchmarks/exactness/attacks.py``."""

from __future__ import annotations

import random
import threading
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

import prunus
from tests.interrupts import (
    Interrupted,
    fingerprint,
    lines_of,
    seconds_of,
    signal_after,
    switches,
)
from tests.test_all_or_nothing import MODELS, VERBS, Case

TARGETS = (
    ("attention", "apply"),
    ("blocks", "apply"),
    ("attention", "shrink"),
    ("perceptron", "shrink"),
    ("blocks", "drop"),
    ("perceptron", "compensate"),
)
"""Models, and what is interrupted; each gets the same share of the points."""

Problem = Callable[[str, str], None]
"""Told what went wrong (nothing, if the attack held) and what was tried."""


def interrupt_lines(count: int, seed: int, tell: Problem) -> None:
    """Raise errors at random lines of Prunus's own code."""
    _interrupt(count, seed, tell, _at_a_line, lines_of)


def interrupt_by_signals(count: int, seed: int, tell: Problem) -> None:
    """Let a signal raise ``KeyboardInterrupt`` after random times, wherever the process then is."""
    _interrupt(count, seed, tell, _by_a_signal, seconds_of)


def _at_a_line(share: float, lines: Any) -> Any:
    line = 1 + int(share * lines)
    return Interrupted(line, MemoryError if line % 4 == 0 else KeyboardInterrupt)


def _by_a_signal(share: float, seconds: Any) -> Any:
    return signal_after(max(share * seconds, 1e-5))


def _interrupt(
    count: int,
    seed: int,
    tell: Problem,
    attack: Callable[[float, Any], Any],
    measure: Callable[[Callable[[], Any]], Any],
) -> None:
    """An attack may come too late, or be caught where a second way leads on: then all is done."""
    chance = random.Random(seed)
    for place, (name, verb) in enumerate(TARGETS):
        run, build = VERBS[verb], MODELS[name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(build())  # which fills caches of Python's functions
            extent = measure(partial(run, build()))
            case = build()
            before = fingerprint(case.model, case.optimizer)
            tried = 0
            while tried < share_of(count, place):
                share, done = chance.random(), False
                try:
                    with attack(share, extent):
                        run(case)
                        done = True
                except (KeyboardInterrupt, MemoryError, prunus.PrunusError):
                    pass
                if done:
                    case = build()
                    before = fingerprint(case.model, case.optimizer)
                    continue
                tried += 1
                same = fingerprint(case.model, case.optimizer) == before
                tell("" if same else "the model or the process changed", f"{verb} {name} {share}")
                if not same:
                    case = build()
                    before = fingerprint(case.model, case.optimizer)


def share_of(count: int, place: int) -> int:
    """How many of the points fall to one of the targets."""
    return count // len(TARGETS) + (place < count % len(TARGETS))


def shrink_in_threads(count: int, seed: int, tell: Problem) -> None:
    """Threads at once: half of them shrink models of their own, half answer with theirs."""
    torch.manual_seed(seed)
    names = [name for name in MODELS if name != "blocks"]
    cases = [MODELS[names[place % len(names)]]() for place in range(count)]
    alone = [MODELS[names[place % len(names)]]().model for place in range(count)]
    results: list[Any] = [None] * count
    before = switches()
    wanted = [_answer(model, case) for model, case in zip(alone, cases, strict=True)]
    gate = threading.Barrier(count)

    def work(place: int) -> None:
        case = cases[place]
        gate.wait()
        try:
            if place % 2:
                results[place] = [_answer(case.model, case) for _ in range(20)]
            else:
                results[place] = prunus.shrink(case.model, case.x, ratio=0.4, recover="none")
        except BaseException as error:
            results[place] = error

    threads = [threading.Thread(target=work, args=(place,)) for place in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, found in enumerate(results):
        problem = ""
        if isinstance(found, BaseException):
            problem = f"{type(found).__name__}: {found}"
        elif place % 2:
            problem = "" if all(torch.equal(y, wanted[place]) for y in found) else "another answer"
        else:
            prunus.shrink(alone[place], cases[place].x, ratio=0.4, recover="none")
            answers = _answer(alone[place], cases[place]), _answer(found.model, cases[place])
            problem = "" if torch.equal(*answers) else "another model than alone"
        tell(problem, f"thread {place}")
    if switches() != before:
        tell("a switch of the process stayed changed", "after all threads")


def _answer(model: nn.Module, case: Case) -> torch.Tensor:
    with torch.no_grad():
        answer: torch.Tensor = model(case.x)
    return answer
