"""Importing Prunus and asking for help are quick: nothing heavy is loaded until it is used."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import prunus

OPTIONAL = {
    "accelerate",
    "lightning",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "optuna",
    "timm",
    "torch_pruning",
    "torchvision",
    "transformers",
    "ultralytics",
}
HEAVY = {"torch", *OPTIONAL}

PRINT_MODULES = """
import json, sys
print("\\n" + json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""
PRINT_HELP = """
import runpy, sys
sys.argv = ["prunus", "--help"]
try:
    runpy.run_module("prunus", run_name="__main__", alter_sys=True)
except SystemExit as stop:
    assert not stop.code, stop.code
"""


def run(code: str) -> tuple[str, set[str]]:
    """Run code in a fresh interpreter; what it printed, and the packages it has loaded."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code + PRINT_MODULES],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    printed, _, modules = result.stdout.rstrip().rpartition("\n")
    return printed, set(json.loads(modules))


def test_the_probe_sees_what_is_loaded() -> None:
    _, modules = run("import torch")
    assert "torch" in modules


def test_import_is_lean() -> None:
    _, modules = run("import prunus")
    assert "prunus" in modules
    assert not modules & HEAVY


def test_help_is_lean() -> None:
    printed, modules = run(PRINT_HELP)
    assert "prunus" in printed
    assert not modules & HEAVY


PARSE = """
import sys
from prunus.cli import main
assert main(["shrink", "gone.py:net", "--macs", "half"]) == 2
assert main(["shrink", "gone.py:net", "--macs", "0.5", "--picture", "nowhere/x.png"]) == 2
"""


def test_reading_the_options_is_lean() -> None:
    _, modules = run(PARSE)
    assert not modules & {*HEAVY, "numpy", "networkx", "scipy", "rich"}


def test_printing_needs_no_graph() -> None:
    _, modules = run("import prunus.report.console")
    assert not modules & {*HEAVY, "numpy", "networkx", "scipy"}


def test_using_the_api_loads_torch_but_no_optional_package() -> None:
    _, modules = run("import prunus\nfor name in prunus.__all__: getattr(prunus, name)")
    assert "torch" in modules
    assert not modules & OPTIONAL


PACKAGES = (
    "importance", "recovery", "report", "structures", "verifier", "planner.search",
)  # fmt: skip


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_load_on_first_use(package) -> None:
    printed, _ = run(
        f"import prunus\nfor name in prunus.{package}.__all__: getattr(prunus.{package}, name)\n"
        f"print(*prunus.{package}.__all__)"
    )
    assert printed.strip()


def test_every_public_name_exists_and_is_listed() -> None:
    assert len(set(prunus.__all__)) == len(prunus.__all__) <= 16
    for name in prunus.__all__:
        assert getattr(prunus, name) is not None
        assert name in dir(prunus)
