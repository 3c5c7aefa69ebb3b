"""torchvision imports whether its compiled operators load or not, and nothing clashes."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("torchvision")

DECLARE = (
    "import sys, torch\n"
    "from prunus.integrations.torchvision_ops import _declare, declare_missing_ops\n"
    "declare_missing_ops(); declare_missing_ops()\n"
)
# A torchvision that brings its own operators when imported, as beside a CUDA build of torch.
WHOLE = """
import torch
library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def run(code: str, path: str = "") -> None:
    """Run code in a fresh interpreter, with a folder put first on its path."""
    code = f"import sys; sys.path[:0] = [{path!r}] if {path!r} else []\n{code}"
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_models_run_and_fake_tensors_pass() -> None:
    run(
        DECLARE + "import torchvision\n"
        "from torch._subclasses.fake_tensor import FakeTensorMode\n"
        "model = torchvision.models.resnet18().eval()\n"
        "assert model(torch.rand(1, 3, 32, 32)).shape == (1, 1000)\n"
        "with FakeTensorMode(allow_non_fake_inputs=True):\n"
        "    assert model(torch.rand(1, 3, 32, 32)).shape == (1, 1000)\n"
    )


def test_works_after_somebody_elses_import_failed() -> None:
    run(
        "try:\n    import torchvision\nexcept RuntimeError:\n    pass\n"
        + DECLARE
        + "import torchvision.models"
    )


def test_does_nothing_where_torchvision_brings_its_operators(tmp_path) -> None:
    (tmp_path / "torchvision.py").write_text(WHOLE)
    run(DECLARE + "assert _declare.cache_info().misses == 0", str(tmp_path))


def test_does_nothing_where_torchvision_is_absent(tmp_path) -> None:
    (tmp_path / "torchvision.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'torchvision'\", name='torchvision')"
    )
    run(DECLARE + "assert not hasattr(torch.ops.torchvision, 'nms')", str(tmp_path))


def test_passes_other_errors_on(tmp_path) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('different CUDA versions')")
    run(
        "try:\n    " + DECLARE.splitlines()[1] + "; declare_missing_ops()\n"
        "except RuntimeError as error:\n    assert 'different CUDA' in str(error)\n"
        "else:\n    raise AssertionError('nothing was raised')\n",
        str(tmp_path),
    )
