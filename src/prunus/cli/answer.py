"""How a command answers: progress on stderr, the result on stdout, and a log of both."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from prunus import __version__
from prunus.errors import FileError, PrunusError
from prunus.graph.progress import following


class Journal:
    """A file to which events are appended as they happen; without a path nothing is written.

    Every line is an object with ``time`` (seconds since 1970) and ``event``: *start*, *step*,
    *result*, *error* or *end*, in this order, of which *end* has the ``exit_code``.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._append("", mode="w")

    def write(self, event: str, **fields: Any) -> None:
        """Append one line."""
        line = {"time": round(time.time(), 3), "event": event, **fields}
        self._append(json.dumps(line, default=str) + "\n", mode="a")

    def write_error(self, error: BaseException) -> None:
        """Append what went wrong, in the parts that the message has."""
        parts = {"what": str(error)}
        if isinstance(error, PrunusError):
            parts = {name: getattr(error, name) for name in ("what", "where", "why", "fix")}
        self.write("error", kind=type(error).__name__, **parts)

    def _append(self, text: str, *, mode: str) -> None:
        if self._path is None:
            return
        try:
            with self._path.open(mode, encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            path, self._path = self._path, None  # the next lines would fail alike
            why = error.strerror or str(error)
            raise FileError(f"the log {path} can't be written", why=why) from error


@contextmanager
def follow(options: argparse.Namespace) -> Iterator[Callable[..., None]]:
    """What is called with each stage: it shows it on a terminal, and writes new ones to the log.

    Whatever a model prints meanwhile goes to stderr, so that stdout has results only.
    """
    last = ""
    with redirect_stdout(sys.stderr), following(delay=0) as tell:

        def step(stage: str, done: int = 0, total: int | None = None) -> None:
            nonlocal last
            if stage != last:
                options.journal.write("step", name=stage)
                last = stage
            tell(stage, done, total)

        with following(step):
            yield step


def head(options: argparse.Namespace) -> dict[str, Any]:
    """What every JSON document begins with."""
    given = {name: getattr(options, name) for name in ("model", "seed") if hasattr(options, name)}
    return {"command": options.command, "versions": versions(), **given}


def answer(options: argparse.Namespace, document: dict[str, Any], show: Callable[[], None]) -> None:
    """Print the result, as JSON if that was asked for; it goes into the log as well."""
    from prunus.report.console import show_json, to_json

    if options.log:
        options.journal.write("result", document=json.loads(to_json(document)))
    if options.json:
        show_json(document)
    else:
        show()


def versions() -> dict[str, str]:
    """What a report's numbers were made with."""
    import torch

    python = platform.python_version()
    return {"prunus": __version__, "torch": str(torch.__version__), "python": python}
