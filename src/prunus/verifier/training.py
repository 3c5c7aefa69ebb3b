"""Heads that run in training alone (GoogLeNet's): the cut model has to run there as well."""

from __future__ import annotations

from torch import nn

from prunus.tracer.copies import duplicate
from prunus.tracer.quiet import quiet
from prunus.tracer.sources import find_line
from prunus.verifier.case import Case


def breaks_in_training(case: Case) -> str:
    """What the cut model raises in training mode where the original raises nothing.

    Asked only of models with parameters that the traced forward did not read; empty otherwise.
    """
    unread = case.graph.traced.get("unread", ())
    if not unread or _error_in_training(case, case.original) is not None:
        return ""
    error = _error_in_training(case, case.pruned)
    if error is None:
        return ""
    return (
        f"in training mode the pruned model raises {type(error).__name__} at {find_line(error)}: "
        f"{error}; its eval mode never reads {unread[0]}"
    )


def _error_in_training(case: Case, model: nn.Module) -> Exception | None:
    copied = duplicate(model)
    copied.train()
    try:
        with quiet():
            copied(*case.args, **case.kwargs)
    except Exception as error:  # a forward may raise anything
        return error
    return None
