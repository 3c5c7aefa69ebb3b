"""Writing files: what stands there is the old one or the new one, never half of it.

And stdout: what was printed is out, or an error says that it is not.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prunus.errors import FileError

STDOUT = "stdout"
"""Where an error of :func:`printing` is."""

_FIXES = {
    errno.ENOSPC: "make room on the disk, or write elsewhere",
    errno.EDQUOT: "make room in your quota, or write elsewhere",
    errno.EACCES: "write to a folder that you may write to",
    errno.EPERM: "write to a folder that you may write to",
    errno.EROFS: "write to a folder that you may write to",
    errno.ENOENT: "create the folder first",
    errno.ENOTDIR: "create the folder first",
    errno.EISDIR: "give the name of a file",
}


def check_target(path: str | os.PathLike[str]) -> None:
    """Refuse devices, pipes and sockets: a file in their place would be no device any more.

    Raises
    ------
    FileError
        If something is there that is neither a file nor a folder; folders are told by the system.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:  # nothing is there, or whoever writes is told more
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise FileError(
            f"{path} is no regular file",
            why="a device, pipe or socket would be replaced by a file",
            fix="give the name of a file",
        )


def replace_file(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a draft beside the file, then put it in the file's place.

    A new file gets the permissions that the umask leaves, an old one keeps its own; what a symbolic
    link points at is replaced, not the link.  Whatever goes wrong, the draft is removed.

    Raises
    ------
    FileError
        If the system refuses, or if a device, pipe or socket is there; it is an ``OSError`` as
        well.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     replace_file(Path(folder, "a.txt"), lambda draft: draft.write_text("whole"))
    ...     Path(folder, "a.txt").read_text(), os.listdir(folder)
    ('whole', ['a.txt'])
    """
    check_target(path)
    target = Path(os.path.realpath(path))
    draft = target.with_name(f".prunus-{secrets.token_hex(6)}{target.suffix}")
    try:
        try:
            _create(draft, target)
            write(draft)
            with draft.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(draft, target)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise FileError(
            f"{path} can't be written",
            why=error.strerror or str(error),
            fix=_FIXES.get(error.errno or 0, ""),
        ) from error


@contextmanager
def printing() -> Iterator[None]:
    """Whatever is printed meanwhile has left the process afterwards.

    Raises
    ------
    FileError
        If the system refuses; its cause is a ``BrokenPipeError`` if the reader has left.
    """
    try:
        if getattr(sys, "stdout", None) is None:
            raise OSError(errno.EBADF, "it is closed")
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as error:
        raise FileError(
            "the result can't be printed",
            where=STDOUT,
            why=error.strerror or str(error),
            fix=_FIXES.get(error.errno or 0, ""),
        ) from error


def _create(draft: Path, target: Path) -> None:
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    handle = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        if target.exists():
            os.fchmod(handle, stat.S_IMODE(target.stat().st_mode))
    finally:
        os.close(handle)
