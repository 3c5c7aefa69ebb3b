"""What every test relies on: no network, the same seed, and a torchvision that imports."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

# Read when these packages are first imported, so set before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["YOLO_OFFLINE"] = "true"
os.environ["YOLO_AUTOINSTALL"] = "false"
os.environ["YOLO_CONFIG_DIR"] = tempfile.mkdtemp(prefix="prunus-yolo-")
os.environ["MPLBACKEND"] = "agg"
atexit.register(shutil.rmtree, os.environ["YOLO_CONFIG_DIR"], ignore_errors=True)

# Tests are small, and threads that wait for a busy core make them ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


# The same examples in every run, and no clock: tracing a model takes as long as it takes.
settings.register_profile("prunus", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("prunus")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--overwrite", action="store_true", help="rewrite the golden files")


def pytest_collection_finish() -> None:
    """Take what is imported by now out of the sight of the collector, until the process ends.

    A trace looks through all objects that are alive for what it left behind; with the libraries'
    hundreds of thousands, that is a fifth of the suite's time.  What tests make is seen.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    # Importing ultralytics changes how numpy and torch print, and doctests look at that.
    np.set_printoptions(linewidth=75, formatter=None, edgeitems=3, threshold=1000)
    torch.set_printoptions(profile="default")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare text with ``tests/golden/NAME``, or rewrite that file under ``--overwrite``."""

    def compare(name: str, text: str) -> None:
        path = Path(__file__).parent / "golden" / name
        if request.config.getoption("overwrite"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"{path.name} is missing: run pytest --overwrite and look at it"
        assert text == path.read_text(encoding="utf-8")

    return compare
