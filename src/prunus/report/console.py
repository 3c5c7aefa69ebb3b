"""What is printed: results on stdout, as tables or JSON; progress and errors on stderr."""

from __future__ import annotations

import json
import math
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from prunus.errors import checks_options
from prunus.files import printing, replace_file

_UNCUT = 100_000
"""Columns of a pipe or a file: nothing is folded or cut."""


class _Console(Console):
    """One that leaves it to the caller what a broken pipe means."""

    def on_broken_pipe(self) -> None:
        """Called while the error is handled; rich itself would exit."""
        raise


def show(*parts: RenderableType) -> None:
    """Print tables and sentences on stdout; strings are plain text, without markup."""
    with printing():
        console = _console(stderr=False)
        for part in parts:
            console.print(
                Text(part) if isinstance(part, str) else part, soft_wrap=isinstance(part, str)
            )
            if isinstance(part, Table):
                console.print()


def show_json(document: Any) -> None:
    """Print a document on stdout as JSON."""
    with printing():
        print(to_json(document))


@checks_options
def show_stages(stages: Sequence[Mapping[str, Any]]) -> None:
    """Print one table: accuracy, params, MACs, bytes and latency of a model's states.

    Parameters
    ----------
    stages
        Mappings with ``name``, ``params``, ``macs``, ``bytes``, and where they are known
        ``accuracy`` in percent and ``latency_ms`` by batch size; shares are of the first.
    """
    from prunus.report.tables import stages_table

    show(stages_table(stages))


def warn(text: str) -> None:
    """Print a sentence on stderr; where that can't be written, nothing happens."""
    with suppress(OSError):
        _console(stderr=True).print(Text(text), soft_wrap=True)


def show_traceback(error: BaseException) -> None:
    """Print somebody else's error as Python does, on stderr."""
    traceback.print_exception(error, file=sys.stderr)


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _UNCUT
    return _Console(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)


def to_json(document: Any, *, indent: int | None = 2) -> str:
    """Strict JSON: numbers that are not finite become null.

    >>> to_json({"error": float("inf"), "by": (1, 2)}, indent=None)
    '{"error": null, "by": [1, 2]}'
    """
    return json.dumps(_finite(document), indent=indent, ensure_ascii=False, allow_nan=False)


def write_json(document: Any, path: str | os.PathLike[str]) -> None:
    """Write a document as JSON."""
    text = to_json(document) + "\n"
    replace_file(path, lambda draft: draft.write_text(text, encoding="utf-8"))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
