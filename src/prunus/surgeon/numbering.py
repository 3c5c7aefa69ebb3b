"""Integers that number the layers of a list: renumbered where they index a cache, and only there.

A forward that computes with such a number (every second layer has a window) would change with it,
which need not show on an example: so the code that reads it is looked at.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from prunus.errors import PlanError
from prunus.surgeon.layer_count import Change

_ORDINAL = re.compile(r"layer|block|depth|number|ind?e?x|id$", re.IGNORECASE)
"""What an attribute has to be called in a list of two: 0 and 1 may mean anything."""

_OPERATIONS = (ast.BinOp, ast.Compare, ast.UnaryOp, ast.BoolOp)

_PLAIN = (
    *(*_OPERATIONS, ast.Constant, ast.Tuple, ast.List, ast.Set, ast.expr_context),
    *(ast.operator, ast.unaryop, ast.boolop, ast.cmpop),
)
"""What an expression of constants consists of."""

_COMPUTING = frozenset(
    ("abs", "bool", "divmod", "float", "int", "max", "min", "pow", "range", "round", "str")
)
"""Functions that make something else of a number, rather than pass it on."""


@dataclass(frozen=True)
class _Use:
    """A place at which the code reads the number of a layer.

    ``expression`` is what it computes of that number and constants alone, if it does; it is passed
    on unchanged where ``computes`` is false.
    """

    source: str
    computes: bool
    expression: str = ""

    def differs(self, before: int, after: int) -> bool:
        """Whether it comes to something else for another number."""
        if not self.computes:
            return False
        return not self.expression or _value(self.expression, before) != _value(
            self.expression, after
        )


def find_numbers(
    model: nn.Module, container: nn.Module, gone: Sequence[int], cut: Collection[str] = ()
) -> Iterator[Change]:
    """New values of attributes that state the place of a child that is kept, or of its parts.

    An attribute does if it is in every child, wherever, and always equal to the child's place.  It
    keeps its value where the model's code computes with it and the result would be another.

    Parameters
    ----------
    cut
        Names of lists that lose the entries of the children ``gone``: the number may index them.

    Raises
    ------
    PlanError
        If a number both is computed with and indexes something (a cache).
    """
    found = [_integers(child) for child in container._modules.values()]
    kept = [place for place in range(len(found)) if place not in gone]
    moved = [(place, later) for later, place in enumerate(kept) if place != later]
    for name in _stated_everywhere(found):
        if not _keeps_its_value(name, [*_uses(model, name, cut)], moved):
            for later, place in enumerate(kept):
                for holder in found[place][name]:
                    yield Change(holder, name, later)


def _stated_everywhere(found: Sequence[Mapping[str, Sequence[Mapping[str, Any]]]]) -> list[str]:
    """Attributes that are in every child, and always equal to the child's place."""
    names = [
        name
        for name in (sorted(set.intersection(*map(set, found))) if len(found) > 1 else ())
        if all(holder[name] == place for place, own in enumerate(found) for holder in own[name])
    ]
    return names if len(found) > 2 else [name for name in names if _ORDINAL.search(name)]


def _keeps_its_value(name: str, uses: Sequence[_Use], moved: Sequence[tuple[int, int]]) -> bool:
    """Whether the code computes with a number what would be another for a layer that moves up."""
    for use in uses:
        for before, after in moved:
            if use.differs(before, after):
                if not all(other.computes for other in uses):
                    raise _both(name, use, before, after)
                return True
    return False


def _both(name: str, use: _Use, before: int, after: int) -> PlanError:
    return PlanError(
        f"the layers can't be renumbered: {use.source} computes with {name!r}",
        why=f"what it comes to would change for the layer that moves from {before} to {after}, and "
        f"{name!r} is passed on as well, as to a cache that needs consecutive numbers",
        fix="drop layers so that it comes to the same for those that move up (an even number of "
        "neighbours, where every second layer is another), or keep what it decides in an "
        "attribute of the layer",
    )


def _integers(child: nn.Module | None) -> dict[str, list[dict[str, Any]]]:
    """The attribute dicts in a child that hold an integer, by its name."""
    own: dict[str, list[dict[str, Any]]] = {}
    for module in child.modules() if child is not None else ():
        for name, value in vars(module).items():
            if type(value) is int:
                own.setdefault(name, []).append(vars(module))
    return own


def _uses(model: nn.Module, name: str, cut: Collection[str]) -> Iterator[_Use]:
    """Where the code of the model's classes, and functions beside them, read an attribute."""
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    files: dict[str, set[str]] = {}
    for kind in kinds:
        if kind.__module__.partition(".")[0] not in ("torch", "builtins", "typing"):
            files.setdefault(kind.__module__, set()).add(kind.__name__)
    for module_name, classes in sorted(files.items()):
        parsed = _parsed(module_name)
        if parsed is None or name not in parsed.text:
            continue
        for node, parents in _reads(module_name, frozenset(classes)).get(name, ()):
            yield _use(node, parents, name, cut, parsed.path)


@dataclass(frozen=True)
class _File:
    text: str
    tree: ast.Module
    path: str


@lru_cache(maxsize=64)
def _parsed(module_name: str) -> _File | None:
    """The source of a Python module; None where there is none to read."""
    try:
        module = sys.modules[module_name]
        text = inspect.getsource(module)
        return _File(text, ast.parse(text), str(module.__file__))
    except (KeyError, OSError, TypeError, SyntaxError):
        return None


def _functions(tree: ast.Module, classes: Collection[str]) -> Iterator[ast.AST]:
    """Methods of the model's classes in a file, and the functions that they mention."""
    functions = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
    pending: list[ast.FunctionDef] = [*_methods(tree, classes)]
    seen: set[str] = set()
    while pending:
        yield from pending
        nodes = [node for one in pending for node in ast.walk(one)]
        names = {node.id for node in nodes if isinstance(node, ast.Name)} - seen
        seen |= names
        pending = [functions[name] for name in sorted(names & functions.keys())]


def _methods(tree: ast.Module, classes: Collection[str]) -> Iterator[ast.FunctionDef]:
    for kind in ast.walk(tree):
        if isinstance(kind, ast.ClassDef) and kind.name in classes:
            for method in kind.body:
                if isinstance(method, ast.FunctionDef) and method.name != "__init__":
                    yield method


@lru_cache(maxsize=64)
def _reads(
    module_name: str, classes: frozenset[str]
) -> Mapping[str, Sequence[tuple[ast.AST, list[ast.AST]]]]:
    """Every read of ``….name`` in the code of some classes, by name, with the nodes around it.

    The innermost comes first.  All names are looked for at once, since a walk takes long.
    """
    parsed = _parsed(module_name)
    found: dict[str, list[tuple[ast.AST, list[ast.AST]]]] = {}

    def walk(node: ast.AST, parents: list[ast.AST], inside: frozenset[str]) -> None:
        if isinstance(node, ast.Attribute):
            if isinstance(node.ctx, ast.Load) and node.attr not in inside:
                found.setdefault(node.attr, []).append((node, parents))
            inside = inside | {node.attr}
        for child in ast.iter_child_nodes(node):
            walk(child, [node, *parents], inside)

    for function in () if parsed is None else _functions(parsed.tree, classes):
        walk(function, [], frozenset())
    return found


def _use(node: ast.AST, parents: list[ast.AST], name: str, cut: Collection[str], path: str) -> _Use:
    source = f"{'/'.join(Path(path).parts[-2:])}:{getattr(node, 'lineno', 0)}"
    around = parents[0]
    if isinstance(around, _OPERATIONS):
        return _Use(source, True, _widest(node, parents, name))
    if isinstance(around, (ast.keyword, ast.FormattedValue)):
        return _Use(source, False)
    if isinstance(around, ast.Call):
        called = around.func.id if isinstance(around.func, ast.Name) else ""
        return _Use(source, called in _COMPUTING)
    if isinstance(around, ast.Subscript) and around.slice is node:
        own = ast.unparse(around.value).startswith("self.")  # else a cache that is handed in
        return _Use(source, own and getattr(around.value, "attr", "") not in cut)
    return _Use(source, True, "number" if isinstance(around, (ast.If, ast.IfExp)) else "")


def _widest(node: ast.AST, parents: list[ast.AST], name: str) -> str:
    """The largest expression around a read that is of this number and constants alone."""
    found = ""
    for parent in parents:
        if not isinstance(parent, _OPERATIONS):
            break
        plain = _Plain(name)
        expression = plain.visit(ast.parse(ast.unparse(parent), mode="eval").body)
        if not plain.alone:
            break
        found = ast.unparse(expression)
    return found


class _Plain(ast.NodeTransformer):
    """Replaces the attribute by a name, and notices everything but constants and operations."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.alone = True

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.Attribute) and node.attr == self._name:
            return ast.Name("number", ast.Load())
        self.alone = self.alone and isinstance(node, _PLAIN)
        return self.generic_visit(node)


def _value(expression: str, number: int) -> Any:
    """What an expression of constants and one number comes to; None where it can't."""
    try:
        return eval(compile(expression, "", "eval"), {"__builtins__": {}}, {"number": number})
    except Exception:
        return None
