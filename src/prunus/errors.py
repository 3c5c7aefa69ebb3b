"""The exception tree: every error says what went wrong, where, why, and what to do."""

from __future__ import annotations

import importlib
from types import ModuleType


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


class TraceError(PrunusError):
    """The model could not be run or followed."""


class RuleError(PrunusError):
    """An operator rule is missing, registered twice, or broke its contract."""


class PlanError(PrunusError):
    """A plan is malformed, or does not belong to this model."""


class BudgetError(PlanError):
    """No plan lies under the budget; the message says which floor stops it."""


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
