"""The command line: ``main`` lists the verbs, each of which has a file of its own."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from prunus import __version__
from prunus.errors import ApplyError, BudgetError, FileError, PrunusError, VerifyError
from prunus.files import STDOUT, printing

VERBS = (
    "inspect", "sensitivity", "plan", "shrink", "apply", "verify", "load",
)  # fmt: skip

EXIT_CODES = """\
exit codes:
  0    done
  1    not verified: the smaller model does not compute what the masked original computes,
       or the comparison shows no effect of the cut
  2    bad input: options, model, data or files; an error of the model itself shows its traceback
  3    refused: the budget is out of reach, or the plan could not be applied
  130  interrupted
  141  broken pipe: stdout was closed before the end, by 'head' for example
  143  terminated
"""

NOT_VERIFIED, BAD_INPUT, REFUSED, INTERRUPTED, UNREAD, TERMINATED = 1, 2, 3, 130, 141, 143


class Terminated(KeyboardInterrupt):
    """SIGTERM, which stops a command as Ctrl-C does."""


class _Parser(argparse.ArgumentParser):
    """Argparse keeps to itself that help could not be printed."""

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; ``argv`` is without the program's name."""
    try:
        with _catch_termination():
            return _main(argv)
    except KeyboardInterrupt as stop:  # at whatever moment, while modules are imported as well
        return _tell(stop)


def _main(argv: Sequence[str] | None) -> int:
    parser = _Parser(
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
        with printing():
            options = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has printed what there is to say
        return int(stop.code or 0)
    except FileError as error:
        return _tell(error)
    options.command = ["prunus", *(sys.argv[1:] if argv is None else argv)]
    return _run_logged(options)


def _run_logged(options: argparse.Namespace) -> int:
    from prunus.cli.answer import Journal
    from prunus.cli.values import check_files

    try:
        check_files(options)
        options.journal = Journal(options.log)
        options.journal.write("start", command=options.command)
        code = _run(options)
        options.journal.write("end", exit_code=code)
    except FileError as error:  # before the verb runs, or the log's own
        return _tell(error)
    return code


def _run(options: argparse.Namespace) -> int:
    """Call the verb, and turn whatever it raises into a message and an exit code."""
    try:
        with _threads(getattr(options, "threads", None)):
            code: int = options.run(options)
        return code
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        code = _tell(error)
        options.journal.write_error(error)
        return code


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """As many threads of PyTorch as were asked for, as long as the verb runs."""
    if count is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _tell(error: BaseException) -> int:
    """Print what ended a command; the exit code."""
    if isinstance(error, KeyboardInterrupt):
        terminated = isinstance(error, Terminated)
        with suppress(OSError):
            ending = "terminated" if terminated else "interrupted"
            print(f"prunus: {ending}; nothing half-written is left", file=sys.stderr)
        return TERMINATED if terminated else INTERRUPTED
    if getattr(error, "where", "") == STDOUT:
        _abandon_stdout()
        if isinstance(error.__cause__, BrokenPipeError):
            return UNREAD
    from prunus.report.console import show_traceback, warn

    if not isinstance(error, PrunusError):  # the model's own: only its traceback helps
        show_traceback(error)
        return BAD_INPUT
    warn(f"prunus: {error}")
    if isinstance(error, VerifyError):
        return NOT_VERIFIED
    return REFUSED if isinstance(error, (ApplyError, BudgetError)) else BAD_INPUT


def _abandon_stdout() -> None:
    """What is left in its buffer would fail once more when Python exits."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _catch_termination() -> Iterator[None]:
    """Let SIGTERM raise, so that drafts are removed; unless it is handled already."""
    own = os.getpid()

    def stop(number: int, _: Any) -> None:
        if os.getpid() != own:  # a child that was forked from here ends as any other
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise Terminated

    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
