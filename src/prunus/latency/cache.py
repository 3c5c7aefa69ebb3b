"""What was measured, on disk: one JSON file for each machine, number of threads and backend."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from prunus.errors import FormatError
from prunus.files import replace_file
from prunus.latency.backends import Backend
from prunus.latency.samples import Widths

VERSION = 1
"""Of the form; a file of another version is refused."""

Times = dict[str, dict[Widths, float]]
"""Key of an operator → widths → nanoseconds."""


def signature(backend: Backend) -> dict[str, Any]:
    """All that times depend on beside the operator; no host's name."""
    device = backend.device
    return {
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "",
        "threads": torch.get_num_threads(),
        "weights_mb": backend.weights_mb,
        "torch": str(torch.__version__),
        "backend": backend.name,
        "backend_version": backend.version,
    }


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/prunus/latency``, or the same below ``~/.cache``."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(home) if home and Path(home).is_absolute() else Path.home() / ".cache"
    return base / "prunus" / "latency"


class Cache:
    """The times of one backend on this machine.

    Parameters
    ----------
    folder
        Where the file lies; it is made when something is written.
    backend
        Whose times.

    Raises
    ------
    FormatError
        If the file is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str], backend: Backend) -> None:
        self._signature = signature(backend)
        text = json.dumps(self._signature, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.path = Path(folder) / f"{backend.name}-{name}.json"
        self.times: Times = _read(self.path, self._signature) if self.path.exists() else {}

    def store(self, times: Mapping[str, Mapping[Widths, float]]) -> None:
        """Add operators, and write the file: it is the old one or the new one.

        What another process has added meanwhile is kept.
        """
        if self.path.exists():
            self.times = {**_read(self.path, self._signature), **self.times}
        self.times.update({key: dict(own) for key, own in times.items()})
        document = {
            "prunus_latency": VERSION,
            "signature": self._signature,
            "operators": {
                key: [[*widths, time] for widths, time in own.items()]
                for key, own in self.times.items()
            },
        }
        text = json.dumps(document, sort_keys=True, allow_nan=False)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, lambda draft: draft.write_text(text, encoding="utf-8"))


def _read(path: Path, wanted: Mapping[str, Any]) -> Times:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["prunus_latency"] != VERSION or document["signature"] != wanted:
            raise ValueError("it is of another version or machine")
        return {
            key: {tuple(map(int, row[:-1])): _time(row[-1]) for row in rows}
            for key, rows in document["operators"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise FormatError(
            "this is no latency table",
            where=str(path),
            why=str(error),
            fix="delete the file, and it is measured anew",
        ) from error


def _time(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{value!r} is no time")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{value!r} is no time")
    return float(value)


def _processor() -> str:
    """The model of the processor, as the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    found = {name.strip(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    known = ("model name", "cpu family", "model", "stepping")
    told = " ".join(found[name] for name in known if name in found)
    return told or f"{platform.machine()} {platform.processor()}".strip()
