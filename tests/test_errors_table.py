"""What people get wrong, and what machines do to them: every message, and nothing left behind.

Each row is tried with files to write; whatever happens, none of them exists afterwards, whole or
half, the files that were there are as they were, and a model in memory is as it was.
"""

from __future__ import annotations

import errno
import io
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import prunus
from prunus.checkpoint import container
from prunus.cli import main
from prunus.errors import (
    ApplyError,
    DataError,
    FileError,
    FormatError,
    MissingExtraError,
    ModelError,
    PlanError,
    TraceError,
)
from prunus.graph.plan_records import Edit
from prunus.graph.plans import Plan
from tests.snapshots import same, snapshot

NET = """
import torch
from torch import nn

def net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )

def words():
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))

def late():
    raise KeyboardInterrupt

def example_inputs():
    return torch.ones(2, 3, 8, 8)

def nan_batches():
    return [torch.full((2, 3, 8, 8), float("nan"))]

def wrong_batches():
    return [torch.ones(2, 5)]

def objects():
    return [object()]

def broken_loader():
    raise OSError("my disk is gone")
"""
scope: dict[str, Any] = {}
exec(NET, scope)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """Files of every wrong kind, and a right plan and a right model."""
    folder = tmp_path_factory.mktemp("shelf")
    (folder / "net.py").write_text(NET)
    (folder / "syntax.py").write_text("def net(:\n")
    model = scope["net"]()
    plan = prunus.plan(prunus.trace(model, scope["example_inputs"]()), model, ratio=0.3)
    plan.save(folder / "plan.json")
    (folder / "half.json").write_text(plan.to_json()[:200])
    (folder / "future.json").write_text('{"prunus_plan": 99}')
    sized = plan.to_json().replace("[3,3]", "[3,3]", 1)
    bomb = (
        Plan({}, {"w": (10**12,)})
        .to_json()
        .replace('"keep":{}', '"keep":{"w[0]":[[0,9999999999]]}')
    )
    (folder / "bomb.json").write_text(bomb)
    stale = plan.to_json().replace('"before":8', '"before":9', 1)
    assert stale != sized
    (folder / "stale.json").write_text(stale)
    prunus.apply(plan, model)
    prunus.save(model, folder / "small.safetensors")
    whole = (folder / "small.safetensors").read_bytes()
    (folder / "short.safetensors").write_bytes(whole[:-5])
    (folder / "flipped.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    torch.save({}, folder / "weights.pt")
    (folder / "link.py").symlink_to(folder / "net.py")
    (folder / "pictures").mkdir()
    (folder / "pictures" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    (folder / "empty").mkdir()
    (folder / "damaged.npz").write_bytes(b"PK\x03\x04 no")
    np.savez(folder / "two.npz", a=np.zeros(2), b=np.zeros(2))
    np.savez(folder / "objects.npz", np.array([{}], dtype=object))
    (folder / "lines.txt").write_text("one\ntwo\n")
    (folder / "empty.txt").write_text("\n \n")
    (folder / "words").mkdir()
    (folder / "words" / "tokenizer.json").write_text("{}")
    (folder / "table.csv").write_text("1,2\n")
    np.savez(folder / "empty.npz", inputs=np.zeros((0, 3, 8, 8)))
    (folder / "half_good").mkdir()
    write_picture(folder / "half_good" / "a.png")
    (folder / "half_good" / "z.png").write_bytes((folder / "half_good" / "a.png").read_bytes()[:60])
    for name, config in {
        "nojson": "{",
        "remote": '{"architectures": ["Mine"], "auto_map": {"AutoModel": "mine.Mine"}}',
        "bare": '{"architectures": ["BertModel"], "model_type": "bert"}',
        "list": "[]",
    }.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(config)
    (folder / "pickled").mkdir()
    (folder / "pickled" / "config.json").write_text((folder / "bare" / "config.json").read_text())
    (folder / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (folder / "remote" / "mine.py").write_text("raise SystemExit('ran code')\n")
    return folder


def write_picture(path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    pillow.fromarray(pixels).save(path)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


SHRINK = "shrink @net.py:net --macs 0.5"

# Command (@ is the folder of files), exit code, and what is said.
COMMANDS = [
    # arguments
    ("shrink @net.py:net", 2, "give a budget: --params, --macs, --bytes, --activation"),
    ("shrink @net.py:net --macs 2.5", 2, "2.5 is no budget"),
    (f"{SHRINK} --mean 1,x", 2, "'1,x' is no list of numbers"),
    (f"{SHRINK} --samples 0", 2, "no whole number from 1 on"),
    (f"{SHRINK} --picture nowhere/x.png", 2, "the folder nowhere does not exist"),
    (f"{SHRINK} --log @empty", 2, "is a folder"),
    ("plan @net.py:net --macs 0.5 --dry-run --out OUT/p.json", 2, "both were given"),
    ("load @small.safetensors", 2, "the following arguments are required: --build"),
    (f"{SHRINK} --exclude fc*", 2, "'fc*' matches no group"),
    ("shrink @net.py:net --macs 2", 3, "no plan reaches macs"),
    # files to write that are one another, or files to read
    ("shrink @net.py:net --macs 0.5 --out OUT/a --plan OUT/a", 2, "--out and --plan are one file"),
    ("shrink @net.py:net --macs 0.5 --plan OUT/a --log OUT/./a", 2, "--plan and --log are one"),
    ("shrink @net.py:net --macs 0.5 --report OUT/a.png --picture OUT/a.png", 2, "--report and"),
    ("inspect @net.py:net --dot OUT/a --log OUT/a", 2, "--log and --dot are one file"),
    ("verify @plan.json @net.py:net --certificate @plan.json", 2, "--certificate and PLAN are one"),
    ("verify @plan.json @net.py:net --log @plan.json", 2, "--log and PLAN are one file"),
    ("inspect @net.py:net --log @net.py", 2, "--log and MODEL are one file"),
    ("inspect @net.py --log @net.py", 2, "--log and MODEL are one file"),
    ("inspect @net.py:net --log @link.py", 2, "--log and MODEL are one file"),
    ("inspect yolo:@weights.pt --log @weights.pt", 2, "--log and MODEL are one file"),
    ("inspect hf:@bare --log @bare/config.json", 2, "--log and MODEL are one file"),
    ("load @small.safetensors --build @net.py:net --log @small.safetensors", 2, "--log and FILE"),
    ("load @small.safetensors --build @net.py:net --log @net.py", 2, "--log and --build are one"),
    (f"{SHRINK} --data @lines.txt --log @lines.txt", 2, "--log and --data are one file"),
    (f"{SHRINK} --data @net.py:objects --log @net.py", 2, "--log and MODEL are one file"),
    (f"{SHRINK} --data @pictures --log @pictures/a.png", 2, "--log and --data are one file"),
    # models
    ("inspect @net.py", 2, "net.py:NAME, where NAME is net, words, late"),
    ("inspect @syntax.py", 2, "is no reference"),
    ("inspect @gone.py:net", 2, "there is no file"),
    ("inspect @syntax.py:net", 2, "SyntaxError"),
    ("inspect @net.py:nett", 2, "did you mean 'net'?"),
    ("inspect @net.py:words", 2, "mat1 and mat2 shapes cannot be multiplied"),
    ("inspect @net.py:late", 130, "interrupted"),
    ("inspect zoo:resnet21", 2, "did you mean 'resnet20'?"),
    ("inspect hf:@empty", 2, "nothing is downloaded"),
    ("inspect hf:@nojson", 2, "is not JSON"),
    ("inspect hf:@list", 2, "it is no JSON object"),
    ("inspect hf:@remote", 2, "code that comes with a model is never run"),
    ("inspect hf:@bare", 2, "there are no safetensors in"),
    ("inspect hf:@pickled", 2, "give --trust-pickle if you trust where it comes from"),
    ("inspect hf:@bare --pretrained", 2, "--pretrained is for models of the zoo and of timm"),
    ("inspect yolo:@weights.pt", 2, "a .pt file of ultralytics is a pickle"),
    ("inspect yolo:@gone.pt", 2, "nothing is downloaded"),
    ("inspect yolo:@net.py", 2, "is neither a .yaml nor a .pt file"),
    # plans and files
    ("apply @gone.json @net.py:net", 2, "there is no file"),
    ("apply @half.json @net.py:net", 2, "it is not JSON"),
    ("apply @future.json @net.py:net", 2, "this is a plan of version 99"),
    ("apply @bomb.json @net.py:net", 2, "its ranges speak of 9999999999 positions"),
    ("apply @plan.json @net.py:words --input-shape 2,5", 2, "this is a plan for another model"),
    ("verify @plan.json @net.py:words --input-shape 2,5", 2, "this is a plan for another model"),
    ("apply @stale.json @net.py:net --no-verify", 3, "the plan expects 9"),
    ("load @short.safetensors --build @net.py:net", 2, "the file is damaged"),
    ("load @flipped.safetensors --build @net.py:net", 2, "not what its digest was made of"),
    ("load @weights.pt --build @net.py:net", 2, "this is a pickle"),
    ("load @small.safetensors --build @net.py:words", 2, "build= makes another model"),
    # data
    (f"{SHRINK} --data @gone.npz", 2, "there is no file"),
    (f"{SHRINK} --data @damaged.npz", 2, "can't be read"),
    (f"{SHRINK} --data @two.npz", 2, "several arrays and none is called 'inputs'"),
    (f"{SHRINK} --data @objects.npz", 2, "can't be read"),
    (f"{SHRINK} --data @empty", 2, "there are no images in"),
    (f"{SHRINK} --data @pictures", 2, "a.png is no image that can be read"),
    ("shrink @net.py:words --input-shape 2,5 --params 0.8 --data @pictures", 2, "images don't fit"),
    (f"{SHRINK} --data @lines.txt", 2, "a text file needs a tokenizer"),
    (f"{SHRINK} --data @lines.txt --tokenizer @gone", 2, "there is no folder"),
    (f"{SHRINK} --data @net.py:nan_batches", 2, "activations are NaN or infinite"),
    (f"{SHRINK} --data @net.py:nan_batches --recover recalibrate", 2, "that are not finite"),
    (f"{SHRINK} --data @net.py:wrong_batches", 2, "RuntimeError"),
    (f"{SHRINK} --data @net.py:objects", 2, "a calibration batch is a object"),
    (f"{SHRINK} --data @net.py:broken_loader", 2, "OSError: my disk is gone"),
    (f"{SHRINK} --data @elsewhere", 2, "there is no file or folder"),
    (f"{SHRINK} --data @gone.py:f", 2, "there is no file"),
    (f"{SHRINK} --data @net.py", 2, "where NAME is net, words, late"),
    (f"{SHRINK} --data @table.csv", 2, "files that end in .npz, .txt and .yaml are known"),
    (f"{SHRINK} --data @half_good", 2, "z.png is no image that can be read"),
    (f"{SHRINK} --data @empty.txt --tokenizer @words", 2, "there is no text in"),
    (f"{SHRINK} --data @lines.txt --tokenizer @empty", 2, "there is no tokenizer in"),
    (f"{SHRINK} --data @empty.npz", 2, "it has no samples"),
    ("shrink @net.py:words --input-shape 2,5 --params 0.8 --data @empty.npz", 2, "no samples"),
    (f"{SHRINK} --picture OUT/v.txt", 2, "is no picture: give a name that ends in .png, .svg or"),
]


def run(command: str, shelf: Path, out: Path) -> int:
    """A command with all its files in ``out``, as far as it writes any."""
    argv = [part.replace("@", f"{shelf}/").replace("OUT", str(out)) for part in command.split()]
    if argv[0] in ("shrink", "apply"):
        names = ["out", "certificate", "report"] + ["plan"] * (argv[0] == "shrink")
        asked = [name for name in names if f"--{name}" not in argv]
        argv += [part for name in asked for part in (f"--{name}", str(out / name))]
    return main(argv)


@pytest.mark.parametrize(("command", "code", "text"), COMMANDS, ids=lambda v: str(v)[:70])
def test_commands(shelf, tmp_path, capsys, command, code, text) -> None:
    if "hf:" in command:
        pytest.importorskip("transformers")
    if "yolo:" in command:
        pytest.importorskip("ultralytics")
    before = contents(shelf)
    assert run(command, shelf, tmp_path) == code
    printed = capsys.readouterr()
    assert text in printed.err
    assert "wrote" not in printed.out
    assert contents(tmp_path) == {}
    assert contents(shelf) == before


def test_pictures_are_tried_before_the_work(shelf, tmp_path, capsys) -> None:
    asked = f"{SHRINK} --data @half_good --log OUT/log"
    assert run(asked, shelf, tmp_path) == 2
    events = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [e["name"] for e in events if e["event"] == "step"] == ["building the model"]
    assert "z.png is no image that can be read" in capsys.readouterr().err


def test_the_table_is_long_enough() -> None:
    assert len(COMMANDS) + len(CALLS) + len(MACHINES) >= 25
    assert len({text for _, _, text in COMMANDS}) >= 25


# The extra, the package that is missing, and a command that needs it.
EXTRAS = [
    ("timm", "timm", "inspect timm:resnet18"),
    ("hf", "transformers", "inspect hf:@bare"),
    ("yolo", "ultralytics", "inspect yolo:yolov8n.yaml"),
    ("images", "PIL", f"{SHRINK} --data @pictures"),
    ("plot", "matplotlib", f"{SHRINK} --picture OUT/x.png --out OUT/x.safetensors"),
]


@pytest.mark.parametrize(("extra", "package", "command"), EXTRAS, ids=lambda v: str(v)[:20])
def test_missing_extras(shelf, tmp_path, capsys, monkeypatch, extra, package, command) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=package)

    monkeypatch.setattr("prunus.errors.importlib", SimpleNamespace(import_module=absent))
    argv = [
        part.replace("@", f"{shelf}/").replace("OUT", str(tmp_path)) for part in command.split()
    ]
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert f"{package} is not installed" in err
    assert f"pip install 'prunus[{extra}]'" in err
    assert contents(tmp_path) == {}
    assert issubclass(MissingExtraError, ImportError)


class Full(io.FileIO):
    """A file on a disk that has room for a hundred bytes."""

    room = 100

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        written = super().write(view[: max(self.room - self.tell(), 0)])
        if written < len(view):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written


def disk_full(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def opened(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if self.name.startswith(".prunus-") and "w" in mode:
            raw = Full(str(self), "w")
            return raw if "b" in mode else io.TextIOWrapper(raw, write_through=True)
        return real(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opened)


def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write everywhere, so the system's answer is put on."""
    real = os.open

    def opened(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if Path(path).name.startswith(".prunus-"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", opened)


def interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C between the first tensor and the second."""
    real, calls = container._bytes_of, []

    def stop(tensor: torch.Tensor) -> memoryview:
        calls.append(tensor)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(tensor)

    monkeypatch.setattr(container, "_bytes_of", stop)


def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)


MACHINES: list[tuple[Callable[[pytest.MonkeyPatch], None], int, list[str]]] = [
    (disk_full, 2, ["No space left on device", "make room on the disk"]),
    (read_only, 2, ["Permission denied", "write to a folder that you may write to"]),
    (interrupted, 130, ["interrupted; nothing half-written is left"]),
    (no_fsync, 2, ["Input/output error"]),
]


@pytest.mark.parametrize(
    ("happen", "code", "texts"), MACHINES, ids=lambda v: getattr(v, "__name__", "")
)
@pytest.mark.parametrize("old", [None, b"the old file"])
def test_what_machines_do(shelf, tmp_path, capsys, monkeypatch, happen, code, texts, old) -> None:
    out = tmp_path / "out"
    if old is not None:
        out.write_bytes(old)
    happen(monkeypatch)
    assert run(SHRINK, shelf, tmp_path) == code
    err = capsys.readouterr().err
    for text in texts:
        assert text in err
    assert "Traceback" not in err
    assert contents(tmp_path) == ({} if old is None else {"out": old})


@pytest.mark.parametrize("happen", [disk_full, read_only, no_fsync])
@pytest.mark.parametrize(
    "option", ["plan @net.py:net --macs 0.5 --out", "inspect @net.py:net --dot"]
)
def test_other_files_are_whole_or_not_there(
    shelf, tmp_path, capsys, monkeypatch, happen, option
) -> None:
    happen(monkeypatch)
    assert run(f"{option} OUT/x", shelf, tmp_path) == 2
    assert f"{tmp_path / 'x'} can't be written" in capsys.readouterr().err
    assert contents(tmp_path) == {}


OUTPUTS = [
    *(f"{SHRINK} --{name}" for name in ("out", "plan", "certificate", "report", "picture")),
    "plan @net.py:net --macs 0.5 --out",
    "inspect @net.py:net --dot",
]


@pytest.mark.parametrize("command", OUTPUTS)
def test_a_pipe_is_no_place_for_a_file(shelf, tmp_path, capsys, command) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    argv = [part.replace("@", f"{shelf}/") for part in command.split()]
    assert main([*argv, str(tmp_path / "pipe.png")]) == 2
    assert "pipe.png is no regular file" in capsys.readouterr().err
    assert stat.S_ISFIFO((tmp_path / "pipe.png").stat().st_mode)
    assert os.listdir(tmp_path) == ["pipe.png"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_log_on_a_full_disk(shelf, capsys) -> None:
    assert main(["inspect", f"{shelf}/net.py:net", "--log", "/dev/full"]) == 2
    err = capsys.readouterr().err
    assert "the log /dev/full can't be written" in err
    assert "No space left on device" in err


def _inputs() -> torch.Tensor:
    return torch.ones(2, 3, 8, 8)


def _plan(model: nn.Module) -> Plan:
    return prunus.plan(prunus.trace(model, _inputs()), model, ratio=0.3)


def _stale(model: nn.Module) -> Any:
    plan = _plan(model)
    return Plan(plan.keep, plan.shapes, (*plan.edits, Edit("5", "in_features", 9, 4)))


def _shape(model: nn.Module) -> Any:
    plan = _plan(model)
    edits = tuple(e for e in plan.edits if e.attribute != "num_features")
    keep = {axis: stay for axis, stay in plan.keep.items() if axis.tensor != "5.weight"}
    return Plan(keep, plan.shapes, edits, origin=plan.origin)


def _foreign() -> Plan:
    """A plan that fits other tensors under the same names."""
    wider = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    return _plan(nn.Sequential(*wider, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)))


# By the public API: what is done to a model, the error, and its text.
CALLS: list[tuple[Callable[[nn.Module, Path], Any], type[Exception], str]] = [
    (lambda m, _: prunus.trace(m, _inputs(), outputs="logits"), TraceError, "no output is called"),
    (lambda m, _: prunus.trace(m), TypeError, "missing 1 required positional argument"),
    (lambda m, _: prunus.plan(prunus.trace(m, _inputs()), m), PlanError, "nothing says how much"),
    (lambda m, _: prunus.apply(_stale(m), m), ApplyError, "5.in_features is 8, the plan expects 9"),
    (lambda m, _: prunus.apply(_shape(m), m), ApplyError, "the smaller model does not run"),
    (lambda m, _: prunus.apply(_foreign(), m), PlanError, "plan for another model"),
    (lambda m, _: prunus.recovery.recalibrate(m, []), DataError, "the calibration data is empty"),
    (
        lambda m, _: prunus.shrink(m, _inputs(), budget=prunus.Budget(macs=0.5), data=[]),
        DataError,
        "the calibration data is empty",
    ),
    (
        lambda m, _: prunus.shrink(m, _inputs(), budget=prunus.Budget(macs=0.5), data=["a"]),
        DataError,
        "a calibration batch is a str",
    ),
    (lambda m, _: prunus.save(m, "no/such/folder/x"), FileError, "create the folder first"),
    (lambda m, f: prunus.save(m, f), FileError, "Is a directory"),
    (lambda m, f: prunus.save(m, f / "x", plan=_plan(m)), PlanError, "is not what the plan leaves"),
    (lambda m, f: _plan(m).save(f), FileError, "Is a directory"),
    (lambda m, f: prunus.load(f / "none", build=lambda: m), FileError, "No such file"),
    (lambda m, f: Plan.from_json("{}"), PlanError, "this is no plan"),
    (lambda m, f: Plan.from_json("9" * 5000), PlanError, "no plan, or a damaged one"),
    (lambda m, f: _load(m, f, lambda: 3), ModelError, "build= returned a int"),
    (lambda m, f: _load(m, f, lambda: nn.Linear(2, 2)), FormatError, "build= makes another model"),
]


def _load(model: nn.Module, folder: Path, build: Any) -> None:
    path = folder / "x"
    prunus.save(model, path)
    try:
        prunus.load(path, build=build)
    finally:
        path.unlink()


@pytest.fixture
def unchanged() -> Iterator[nn.Module]:
    """A model that has to be the same afterwards: tensors, attributes, mode."""
    model = scope["net"]().train()
    before, said = snapshot(model), repr(model)
    yield model
    assert repr(model) == said
    assert same(snapshot(model), before)


@pytest.mark.parametrize(("call", "error", "text"), CALLS, ids=range(len(CALLS)))
def test_calls_leave_the_model_as_it_was(unchanged, tmp_path, call, error, text) -> None:
    with pytest.raises(error, match=text):
        call(unchanged, tmp_path)
    assert contents(tmp_path) == {}
    assert prunus.surgeon.applied_plan(unchanged) is None
