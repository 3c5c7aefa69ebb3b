"""Errors say what, where, why and what to do, and survive being passed around."""

from __future__ import annotations

import copy
import pickle

import pytest

from prunus import errors
from prunus.errors import BudgetError, MissingExtraError, PlanError, PrunusError, require

CLASSES = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, PrunusError)
]
WHAT, WHERE, WHY, FIX = "what went", "a.b, aten.view", "because\nof two lines", "do this"


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("clone", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])
def test_message_and_fields_survive_copies(cls, clone) -> None:
    error = clone(cls(WHAT, where=WHERE, why=WHY, fix=FIX))
    assert type(error) is cls
    assert (error.what, error.where, error.why, error.fix) == (WHAT, WHERE, WHY, FIX)
    assert str(error) == (
        "what went\n"
        "  where: a.b, aten.view\n"
        "  why:   because\n"
        "         of two lines\n"
        "  fix:   do this"
    )


def test_tree() -> None:
    assert issubclass(BudgetError, PlanError)
    assert issubclass(MissingExtraError, ImportError)
    assert len(CLASSES) == 12


def test_missing_package_names_the_extra() -> None:
    with pytest.raises(MissingExtraError, match=r"pip install 'prunus\[timm\]'") as caught:
        require("no_such_package.models", "timm")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_missing_submodule_of_an_installed_package_is_not_a_missing_extra() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"json\.nothing") as caught:
        require("json.nothing", "timm")
    assert not isinstance(caught.value, MissingExtraError)


def test_package_that_is_installed_but_broken_raises_its_own_error(tmp_path, monkeypatch) -> None:
    (tmp_path / "half_a_package.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency") as caught:
        require("half_a_package", "timm")
    assert not isinstance(caught.value, MissingExtraError)
