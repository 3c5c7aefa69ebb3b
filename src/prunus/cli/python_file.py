"""Functions in a user's own file: ``path/to/file.py:FUNCTION``."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from prunus.errors import DataError, ModelError


def find_function(
    reference: str, problem: type[ModelError] | type[DataError], fix: str
) -> Callable[[], Any]:
    """Import the file and take the function; ``problem`` is raised if there is none.

    An error in the user's own code is raised as it is.
    """
    file, _, name = reference.rpartition(":")
    path = Path(file)
    if path.suffix != ".py" or not name.isidentifier():
        own = _functions(Path(reference))
        if own:
            fix = f"write {reference}:NAME, where NAME is {', '.join(own)}"
        raise problem(f"{reference!r} is no reference", fix=fix)
    if not path.is_file():
        raise problem(f"there is no file {file}", where=reference, fix=fix)
    function = getattr(_import_file(path), name, None)
    if callable(function):
        return function  # type: ignore[no-any-return]
    own = _functions(path)
    near = difflib.get_close_matches(name, own, n=1)
    raise problem(
        f"{file} has no function {name!r}",
        where=reference,
        why=f"it has {', '.join(own)}" if own else "it defines none",
        fix=f"did you mean {near[0]!r}?" if near else fix,
    )


def find_beside(reference: str, name: str) -> Callable[[], Any] | None:
    """Another function of a file that has been imported."""
    return getattr(sys.modules[_module_name(Path(reference.rpartition(":")[0]))], name, None)


def _functions(path: Path) -> list[str]:
    """What a file defines, read and not run; nothing where it can't be read."""
    try:
        found = ast.parse(path.read_bytes()).body
    except (OSError, ValueError, SyntaxError):
        return []
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [node.name for node in found if isinstance(node, kinds) and node.name[0] != "_"]


def _module_name(path: Path) -> str:
    """The name under which a file is imported: one that no package has."""
    return f"prunus_file:{path.resolve()}"


def _import_file(path: Path) -> ModuleType:
    """Run a file as Python runs a script: its folder can be imported from."""
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    name = _module_name(path)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
