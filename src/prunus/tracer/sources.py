"""Which line of the user's code is running, or raised an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_PACKAGE = str(Path(__file__).parents[1]).replace("\\", "/") + "/"
_OURS = ("/torch/", "/numpy/", "/contextlib.py", _PACKAGE)
_foreign: dict[str, bool] = {}


def find_line(error: BaseException) -> str:
    """``file.py:line`` of the innermost frame of an error that is neither PyTorch's nor ours."""
    place, traceback = "", error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_back is None or is_users(traceback.tb_frame):
            place = _spoken(traceback.tb_frame, traceback.tb_lineno)
        traceback = traceback.tb_next
    return place


def is_users(frame: Any) -> bool:
    """Whether a frame runs code that is neither PyTorch's nor ours."""
    name = frame.f_code.co_filename
    foreign = _foreign.get(name)
    if foreign is None:
        plain = name.replace("\\", "/")
        foreign = _foreign[name] = not any(part in plain for part in _OURS)
    return foreign


def _spoken(frame: Any, line: int) -> str:
    return "/".join(frame.f_code.co_filename.replace("\\", "/").rsplit("/", 2)[-2:]) + f":{line}"


def find_source(frame: Any) -> str:
    """``file.py:line`` of the innermost frame that is neither PyTorch's nor ours."""
    frame = users_frame(frame)
    return "" if frame is None else _spoken(frame, frame.f_lineno)


def users_frame(frame: Any) -> Any:
    """The innermost frame that is neither PyTorch's nor ours; None without one."""
    while frame is not None and not is_users(frame):
        frame = frame.f_back
    return frame


def code_frame(frame: Any) -> Any:
    """The innermost frame that is not ours; None where that is PyTorch's own code."""
    while frame is not None and _PACKAGE in frame.f_code.co_filename.replace("\\", "/"):
        frame = frame.f_back
    return frame if frame is not None and is_users(frame) else None
