"""The exception tree: every error says what went wrong, where, why, and what to do.

:func:`checks_options` is how every public call refuses an option that it does not have.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any, TypeVar

Call = TypeVar("Call", bound=Callable[..., Any])

_SIMILAR = 0.6
"""From which similarity on (of :mod:`difflib`) a name is taken for a misspelt one."""


def checks_options(
    call: Call, *, options_of: Callable[..., Any] | None = None, name: str = ""
) -> Call:
    """Let a public function refuse an unknown option before it does anything else.

    Parameters
    ----------
    call
        A function; or a class, of which the constructor and every public method are meant.
    options_of
        For a function that hands its ``**options`` on: the one whose keyword-only options they are.
    name
        What errors call the function, its own name by default.

    Raises
    ------
    TypeError
        By the function that comes back, if it is called with an option that it does not have; the
        message has the nearest one.

    Examples
    --------
    >>> @checks_options
    ... def grow(model, *, exclude=()): ...
    >>> grow(None, exlude="0.*")
    Traceback (most recent call last):
        ...
    TypeError: grow() got an unexpected option 'exlude'; did you mean 'exclude'?
    """
    if isinstance(call, type):
        _check_methods(call)
        return call
    signature = inspect.signature(call)
    parameters = _with_options(signature, options_of)
    kinds = {p.name: p.kind for p in parameters}
    open_ended = inspect.Parameter.VAR_KEYWORD in kinds.values()
    fixed = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
    known = {option for option, kind in kinds.items() if kind not in fixed}
    called = name or call.__name__

    @functools.wraps(call)
    def checked(*args: Any, **options: Any) -> Any:
        for option in () if open_ended else options:
            if option not in known:
                raise _unexpected(called, option, known)
        return call(*args, **options)

    checked.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return checked  # type: ignore[return-value]


def _with_options(
    signature: inspect.Signature, options_of: Callable[..., Any] | None
) -> list[inspect.Parameter]:
    """The parameters, the keyword-only ones of ``options_of`` in place of ``**options``."""
    named = signature.parameters
    if options_of is None:
        return list(named.values())
    own = [p for p in named.values() if p.kind is not p.VAR_KEYWORD]
    more = inspect.signature(options_of).parameters.values()
    return own + [p for p in more if p.kind is p.KEYWORD_ONLY and p.name not in named]


def _check_methods(kind: type) -> None:
    """Let the constructor and the public methods of a class check their options."""
    for name, method in list(vars(kind).items()):
        if name.startswith("_") and name != "__init__":
            continue
        called = kind.__name__ if name == "__init__" else f"{kind.__name__}.{name}"
        if isinstance(method, classmethod):
            setattr(kind, name, classmethod(checks_options(method.__func__, name=called)))
        elif isinstance(method, FunctionType):
            setattr(kind, name, checks_options(method, name=called))


def _unexpected(called: str, option: str, known: set[str]) -> TypeError:
    """The error for an option that a call does not have."""
    import difflib

    said = f"{called}() got an unexpected option {option!r}"
    near = difflib.get_close_matches(option, sorted(known - {"self", "cls"}), n=1, cutoff=0.0)
    if not near:
        return TypeError(f"{said}; it takes none")
    similar = difflib.SequenceMatcher(None, near[0], option).ratio() >= _SIMILAR
    return TypeError(
        f"{said}; did you mean {near[0]!r}?"
        if similar
        else f"{said}; of those that it has {near[0]!r} is nearest: {', '.join(sorted(known))}"
    )


def first_names(names: Iterable[str], shown: int = 3) -> str:
    """The first few names, and how many more.

    >>> first_names(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    ordered = list(names)
    rest = len(ordered) - shown
    return ", ".join(ordered[:shown]) + (f" and {rest} more" if rest > 0 else "")


@checks_options
class PrunusError(Exception):
    """Base of every error that Prunus raises on purpose.

    Parameters
    ----------
    what
        What went wrong, in one sentence.
    where
        Module path, operator, file or option in which it was found.
    why
        The cause.
    fix
        What the reader can do about it, at best the corrected call.

    Examples
    --------
    >>> print(
    ...     PrunusError(
    ...         "cannot keep 10 of 8 units",
    ...         where="group 'layer1.0.conv1'",
    ...         fix="keep at most 8",
    ...     )
    ... )
    cannot keep 10 of 8 units
      where: group 'layer1.0.conv1'
      fix:   keep at most 8

    The fields stay readable one by one, and those left out are not printed:

    >>> error = PrunusError("nothing to prune")
    >>> str(error), error.where
    ('nothing to prune', '')
    """

    def __init__(self, what: str, *, where: str = "", why: str = "", fix: str = "") -> None:
        super().__init__(what)  # ``args`` holds positional arguments only, so that pickle works
        self.what = what
        self.where = where
        self.why = why
        self.fix = fix

    def __str__(self) -> str:
        details = (("where:", self.where), ("why:", self.why), ("fix:", self.fix))
        lines = [f"  {label:<6} {_indented(text)}" for label, text in details if text]
        return "\n".join([self.what, *lines])


@contextmanager
def found_in(place: str) -> Iterator[None]:
    """Within the context errors name the place, a file say, before what they name themselves."""
    try:
        yield
    except PrunusError as error:
        where = f"{place} {error.where}".rstrip()
        raise type(error)(error.what, where=where, why=error.why, fix=error.fix) from error


class TraceError(PrunusError):
    """The model could not be run or followed."""


class RuleError(PrunusError):
    """An operator rule is missing, registered twice, or broke its contract."""


class PlanError(PrunusError):
    """A plan is malformed, or does not belong to this model."""


class BudgetError(PlanError):
    """No plan does what was asked; the message says which floors and pins stop it."""


class ApplyError(PrunusError):
    """A plan could not be applied; the model is as it was before."""


class VerifyError(PrunusError):
    """The pruned model and the masked original disagree."""


class DataError(PrunusError):
    """Calibration or training data is missing, empty, or of the wrong form."""


class ModelError(PrunusError):
    """A model could not be found or built."""


class FormatError(PrunusError):
    """A file is not of the format, or of the version, that was expected."""


class FileError(PrunusError, OSError):
    """A file could not be read or written; nothing half-written is left.

    It is an ``OSError`` as well, since that is what callers of functions with paths expect.
    """


class MissingExtraError(PrunusError, ImportError):
    """An optional package is not installed; the message names the extra that brings it.

    It is an ``ImportError`` as well, so ``except ImportError`` and ``pytest.importorskip``
    see it for what it is.
    """


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package at the moment it is needed.

    Parameters
    ----------
    module
        Name of the module, possibly dotted.
    extra
        The extra of ``prunus`` that installs it.

    Raises
    ------
    MissingExtraError
        If the package is not installed. A package that is installed but fails to import
        raises its own error.

    Examples
    --------
    >>> require("json.decoder", "stdlib").__name__
    'json.decoder'
    >>> require("no_such_package", "timm")
    Traceback (most recent call last):
        ...
    prunus.errors.MissingExtraError: no_such_package is not installed
      why:   it is an optional package of Prunus, brought by the extra 'timm'
      fix:   pip install 'prunus[timm]'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name != package:
            raise
        raise MissingExtraError(
            f"{package} is not installed",
            why=f"it is an optional package of Prunus, brought by the extra '{extra}'",
            fix=f"pip install 'prunus[{extra}]'",
        ) from error


def _indented(text: str) -> str:
    """Align the later lines of a detail under its first."""
    return text.replace("\n", "\n" + " " * 9)
