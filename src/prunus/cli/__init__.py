"""The command line: ``main`` lists the verbs, each of which has a file of its own."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from prunus import __version__

VERBS = ("inspect", "plan", "shrink", "apply", "verify", "load")

EXIT_CODES = """\
exit codes:
  0    done
  1    not proven: the smaller model does not compute what the masked original computes,
       or the comparison proves nothing
  2    bad input: options, model, data or files; an error of the model itself shows its traceback
  3    refused: the budget is out of reach, or the plan could not be applied
  130  interrupted
"""

NOT_PROVEN, BAD_INPUT, REFUSED, INTERRUPTED = 1, 2, 3, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; ``argv`` is without the program's name."""
    parser = argparse.ArgumentParser(
        prog="prunus",
        description="Structured pruning that rewrites a PyTorch model into a smaller dense one.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"prunus {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for verb in VERBS:
        importlib.import_module(f"{__name__}.{verb}").add_parser(verbs)
    try:
        options = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has printed what there is to say
        return int(stop.code or 0)
    options.command = ["prunus", *(sys.argv[1:] if argv is None else argv)]
    return _run_logged(options)


def _run_logged(options: argparse.Namespace) -> int:
    from prunus.cli.journal import Journal
    from prunus.errors import FileError
    from prunus.report.console import show_error

    try:
        options.journal = Journal(options.log)
        options.journal.write("start", command=options.command)
        code = _run(options)
        options.journal.write("end", exit_code=code)
    except FileError as error:  # the log's own
        show_error("prunus", error)
        return BAD_INPUT
    return code


def _run(options: argparse.Namespace) -> int:
    """Call the verb, and turn whatever it raises into a message and an exit code."""
    from prunus.errors import ApplyError, BudgetError, PrunusError, VerifyError
    from prunus.report.console import show_error, show_traceback, warn

    try:
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except PrunusError as error:
        show_error("prunus", error)
        options.journal.write_error(error)
        if isinstance(error, VerifyError):
            return NOT_PROVEN
        return REFUSED if isinstance(error, (ApplyError, BudgetError)) else BAD_INPUT
    except KeyboardInterrupt as error:
        warn("prunus: interrupted; nothing half-written is left")
        options.journal.write_error(error)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, ``head`` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, SystemExit) as error:  # the model's own: only its traceback helps
        show_traceback(error)
        options.journal.write_error(error)
        return BAD_INPUT
