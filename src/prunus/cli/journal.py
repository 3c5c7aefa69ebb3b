"""The log of a command: JSON lines, one for each step, the result, and what went wrong."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from prunus.errors import FileError, PrunusError


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
