"""Take whole blocks out of their lists, with all that counts or numbers them.

Integers that number the layers of a list are renumbered where they index a cache, and only there.
A forward that computes with such a number (every second layer has a window) would change with it,
which need not show on an example: so the code that reads it is looked at.
"""

from __future__ import annotations

import ast
import inspect
import operator as op
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Any

from torch import nn

from prunus.errors import ApplyError, PlanError
from prunus.surgeon.layer_count import Change, find_counts
from prunus.surgeon.reach import own_dicts
from prunus.surgeon.snapshot import Snapshot


def drop_blocks(model: nn.Module, names: Sequence[str]) -> None:
    """Remove children of lists and sequences of modules, in place.

    The children that stay close up.  What follows: integers that number them (``layer_idx``, by
    which a cache is indexed), and in configs the number of layers and the lists that have an entry
    for each.  Either all of it happens or nothing.

    Parameters
    ----------
    names
        Module paths in the model as it is.

    Raises
    ------
    PlanError
        If the model has no such child, a name is given twice, nothing would stay of a list, or
        the code computes with numbers of layers that a cache needs renumbered.
    ApplyError
        If its children are named in a way that can't close up.
    """
    stacks = find_places(model, names)
    for path, gone in stacks.items():
        counts = [*find_counts(model, path, gone)]
        lists = {change.key for change in counts if type(change.value) is not int}
        container = model.get_submodule(path)
        changes = [*find_numbers(model, container, gone, lists), *counts]
        _close_up(container, gone, path)
        owned = own_dicts(model, [change.holder for change in changes])
        for change in changes:
            owned.get(id(change.holder), change.holder)[change.key] = change.value


@contextmanager
def without_blocks(model: nn.Module, names: Sequence[str]) -> Iterator[nn.Module]:
    """Within the context the model lacks the blocks; nothing is copied."""
    if not names:
        yield model
        return
    before = Snapshot(model)
    try:
        drop_blocks(model, names)
        yield model
    finally:
        before.restore()


def find_places(model: nn.Module, names: Sequence[str]) -> dict[str, list[int]]:
    """Ascending places of the children that go, by the path of their list.

    Raises
    ------
    PlanError
        As :func:`drop_blocks`.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, list[int]] = {}
    for name in names:
        path, _, key = name.rpartition(".")
        container = modules.get(path)
        if not isinstance(container, (nn.ModuleList, nn.Sequential)) or name not in modules:
            raise PlanError(
                f"the model has no block {name!r}",
                why="a block is a child of a ModuleList or a Sequential",
                fix="`prunus.trace(model, inputs).blocks` lists those that can be dropped",
            )
        places = found.setdefault(path, [])
        place = list(container._modules).index(key)
        if place in places:
            raise PlanError(f"the block {name!r} is to be dropped twice", fix="name it once")
        places.append(place)
    for path, places in found.items():
        _check_places(path, places, names, len(modules[path]._modules))
    return {path: sorted(places) for path, places in found.items()}


def _check_places(path: str, places: Sequence[int], names: Sequence[str], size: int) -> None:
    outer = next((name for name in names if f"{path}.".startswith(f"{name}.")), None)
    if outer is not None:
        raise PlanError(
            f"blocks of {path!r} are to be dropped, and all of {outer!r} as well",
            fix="name the outer block alone",
        )
    if len(places) == size:
        raise PlanError(
            f"nothing would stay of {path!r}",
            why=f"all of its {len(places)} blocks are to be dropped",
            fix="keep one of them",
        )


def _close_up(container: nn.Module, gone: Sequence[int], path: str) -> None:
    """Take children out; those that are called by their place move up."""
    children = container._modules
    saved = dict(children)
    kept = [(key, child) for place, (key, child) in enumerate(saved.items()) if place not in gone]
    if any(key.isdecimal() for key in saved):
        if list(saved) != [str(place) for place in range(len(saved))]:
            raise ApplyError(
                f"the children of {path!r} can't close up",
                where=path,
                why=f"some are called by a number that is not their place: {', '.join(saved)}",
                fix="name all of them by their place, or none by a number",
            )
        kept = [(str(place), child) for place, (_, child) in enumerate(kept)]

    children.clear()
    children.update(kept)


_ORDINAL = re.compile(r"layer|block|depth|number|ind?e?x|id$", re.IGNORECASE)
"""What an attribute has to be called in a list of two: 0 and 1 may mean anything."""

_OPERATIONS = (ast.BinOp, ast.Compare, ast.UnaryOp, ast.BoolOp)

_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    **{ast.Add: op.add, ast.Sub: op.sub, ast.Mult: op.mul, ast.Div: op.truediv, ast.Mod: op.mod},
    **{ast.FloorDiv: op.floordiv, ast.Pow: op.pow, ast.LShift: op.lshift, ast.RShift: op.rshift},
    **{ast.BitAnd: op.and_, ast.BitOr: op.or_, ast.BitXor: op.xor, ast.Invert: op.invert},
    **{ast.Not: op.not_, ast.USub: op.neg, ast.UAdd: op.pos, ast.Eq: op.eq, ast.NotEq: op.ne},
    **{ast.Lt: op.lt, ast.LtE: op.le, ast.Gt: op.gt, ast.GtE: op.ge, ast.Is: op.is_},
    **{ast.IsNot: op.is_not, ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b},
}

_COMPUTING = frozenset(
    ("abs", "bool", "divmod", "float", "int", "max", "min", "pow", "range", "round", "str")
)
"""Functions that make something else of a number, rather than pass it on."""


@dataclass(frozen=True)
class _Use:
    """A place at which the code reads the number of a layer, in the attribute ``name``.

    ``expression`` is what it computes of that number and constants alone, if it does; it is passed
    on unchanged where ``computes`` is false.
    """

    source: str
    name: str
    computes: bool
    expression: ast.AST | None = None

    def differs(self, before: int, after: int) -> bool:
        """Whether it comes to something else for another number."""
        if not self.computes or self.expression is None:
            return self.computes
        return bool(self._value(before) != self._value(after))

    def _value(self, number: int) -> Any:
        try:
            return evaluate(self.expression, self.name, number)
        except Exception:  # arithmetic may raise anything: a division by zero
            return None


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
    files: dict[str, set[str]] = {}
    for kind in {kind for module in model.modules() for kind in type(module).__mro__}:
        if kind.__module__.partition(".")[0] not in ("torch", "builtins", "typing"):
            files.setdefault(kind.__module__, set()).add(kind.__name__)
    for module, classes in sorted(files.items()):
        for node, parents in _reads(module, frozenset(classes)).get(name, ()):
            path = Path(str(sys.modules[module].__file__))
            source = f"{'/'.join(path.parts[-2:])}:{node.lineno}"
            yield _use(source, node, parents, cut)


@lru_cache(maxsize=64)
def _reads(
    module: str, classes: frozenset[str]
) -> Mapping[str, Sequence[tuple[ast.Attribute, list[ast.AST]]]]:
    """Every read of ``….name`` in the code of some classes, by name, with the nodes around it.

    The innermost comes first.  All names are looked for at once, since a walk takes long.
    """
    found: dict[str, list[tuple[ast.Attribute, list[ast.AST]]]] = {}

    def walk(node: ast.AST, parents: list[ast.AST], inside: frozenset[str]) -> None:
        if isinstance(node, ast.Attribute):
            if isinstance(node.ctx, ast.Load) and node.attr not in inside:
                found.setdefault(node.attr, []).append((node, parents))
            inside = inside | {node.attr}
        for child in ast.iter_child_nodes(node):
            walk(child, [node, *parents], inside)

    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (KeyError, OSError, TypeError, SyntaxError):  # no source to read
        return found
    for function in _functions(tree, classes):
        walk(function, [], frozenset())
    return found


def _functions(tree: ast.Module, classes: Collection[str]) -> Iterator[ast.AST]:
    """Methods of the model's classes in a file, and the functions that they mention."""
    functions = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
    pending = _methods(tree, classes)
    seen: set[str] = set()
    while pending:
        yield from pending
        nodes = [node for one in pending for node in ast.walk(one)]
        names = {node.id for node in nodes if isinstance(node, ast.Name)} - seen
        seen |= names
        pending = [functions[name] for name in sorted(names & functions.keys())]


def _methods(tree: ast.Module, classes: Collection[str]) -> list[ast.FunctionDef]:
    kinds = (one for one in ast.walk(tree) if isinstance(one, ast.ClassDef) and one.name in classes)
    found = (method for kind in kinds for method in kind.body)
    return [one for one in found if isinstance(one, ast.FunctionDef) and one.name != "__init__"]


def _use(source: str, node: ast.Attribute, parents: list[ast.AST], cut: Collection[str]) -> _Use:
    around, name = parents[0], node.attr
    if isinstance(around, _OPERATIONS):
        return _Use(source, name, True, _widest(name, parents))
    if isinstance(around, (ast.If, ast.IfExp)):
        return _Use(source, name, True, node)
    if isinstance(around, (ast.keyword, ast.FormattedValue)):
        return _Use(source, name, False)
    if isinstance(around, ast.Call):
        called = around.func.id if isinstance(around.func, ast.Name) else ""
        return _Use(source, name, called in _COMPUTING)
    if isinstance(around, ast.Subscript) and around.slice is node:
        own = ast.unparse(around.value).startswith("self.")  # else a cache that is handed in
        return _Use(source, name, own and getattr(around.value, "attr", "") not in cut)
    return _Use(source, name, True)


def _widest(name: str, parents: Iterable[ast.AST]) -> ast.AST | None:
    """The largest expression around a read that is of this number and constants alone."""
    found = None
    for parent in takewhile(lambda one: isinstance(one, _OPERATIONS), parents):
        try:
            evaluate(parent, name, 0)
        except _NotPlainError:
            break
        except Exception:  # of constants, though not of this one
            pass
        found = parent
    return found


class _NotPlainError(Exception):
    """An expression is of more than one number and constants."""


def evaluate(node: ast.AST | None, name: str, number: int) -> Any:
    """What an expression of constants and ``….name`` comes to where that is a number.

    >>> evaluate(ast.parse("self.index % 2 == 0", mode="eval").body, "index", 4)
    True
    """

    def of(part: ast.AST) -> Any:
        return evaluate(part, name, number)

    match node:
        case ast.Attribute(attr=attribute) if attribute == name:
            return number
        case ast.Constant():
            return node.value
        case ast.Tuple() | ast.List() | ast.Set():
            return tuple(map(of, node.elts))
        case ast.UnaryOp():
            return _OPERATORS[type(node.op)](of(node.operand))
        case ast.BinOp():
            left, right = of(node.left), of(node.right)
            return _OPERATORS[type(node.op)](left, right)
        case ast.BoolOp():
            return _decide(isinstance(node.op, ast.Or), list(map(of, node.values)))
        case ast.Compare():
            return _compare(node.ops, [of(one) for one in (node.left, *node.comparators)])
    raise _NotPlainError


def _decide(ends: bool, values: list[Any]) -> Any:
    """The first value that ends an ``and`` or an ``or``, or the last one."""
    return next((value for value in values if bool(value) == ends), values[-1])


def _compare(operators: Iterable[ast.AST], values: list[Any]) -> bool:
    pairs = zip(operators, values, values[1:], strict=False)
    return all(_OPERATORS[type(one)](a, b) for one, a, b in pairs)
