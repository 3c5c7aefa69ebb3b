"""Changed files of saved models: bytes, headers, and what they say of names and kinds."""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

import prunus
from prunus.errors import PrunusError
from tests.attacks import BUILDS, NAMES, Observer, Tally, inputs_of, outside, scramble
from tests.snapshots import same


def saved(name: str, folder: Path) -> bytes:
    """The file of a pruned model."""
    model = BUILDS[name]()
    prunus.apply(prunus.plan(prunus.trace(model, inputs_of(name)), model, ratio=0.3), model)
    prunus.save(model, folder / "saved.safetensors")
    return (folder / "saved.safetensors").read_bytes()


def resign(data: bytes) -> bytes:
    """A changed file with the right digest: what somebody does who means it."""
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length]
    at = header.find(b'"digest":"') + len(b'"digest":"')
    if at < 10 or len(header) < at + 64:
        return data
    zeros = header[:at] + b"0" * 64 + header[at + 64 :]
    digest = hashlib.sha256(data[:8] + zeros + data[8 + length :]).hexdigest().encode()
    return data[:8] + header[:at] + digest + header[at + 64 :] + data[8 + length :]


def rewrite(data: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """The file with its header changed as JSON, and signed again."""
    length = int.from_bytes(data[:8], "little")
    document = json.loads(data[8 : 8 + length])
    change(document)
    header = json.dumps(document, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return resign(len(header).to_bytes(8, "little") + header + data[8 + length :])


def with_plan(data: bytes, text: str) -> bytes:
    """The file with another plan in it."""
    return rewrite(data, lambda document: document["__metadata__"].update(plan=text))


def attack_with_files(
    count: int, observer: Observer, seed: int = 0, names: Sequence[str] = tuple(BUILDS)
) -> Tally:
    """Changed files of saved models through load."""
    tally, dice = Tally(), random.Random(seed)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        files = {name: saved(name, Path(folder)) for name in names}
        path, before = Path(folder, "attack.safetensors"), outside()
        for n in range(count):
            name = names[n % len(names)]
            path.write_bytes(_changed(files[name], dice))
            problem = ""
            try:
                with observer.watching():
                    model = prunus.load(path, build=BUILDS[name])
                tally.notes["loaded"] += 1
                problem = _added(model, BUILDS[name]())
            except PrunusError:
                tally.notes["refused"] += 1
            except Exception as error:
                problem = f"load: {type(error).__name__}: {error}"
            after = outside()
            if not problem and observer.seen:
                problem = f"load: {observer.seen.pop()}"
            if not problem and not same(before, after):
                problem = "changed outside"
            before = after
            tally.add(problem, f"{name} {n}")
    return tally


def _added(model: nn.Module, fresh: nn.Module) -> str:
    """What a loaded model has that the built one lacks, biases apart."""
    modules = dict(fresh.named_modules())
    for path, module in model.named_modules():
        if path not in modules:
            return f"load: the module {path} is new"
        allowed = {*vars(modules[path]), "softmax_scale"}
        if not set(vars(module)) <= allowed or module.training != modules[path].training:
            return f"load: {path} has {set(vars(module)) - allowed} more, or another mode"
    return ""


def _changed(data: bytes, dice: random.Random) -> bytes:
    """One random change of bytes, of the header's JSON, or of what names and kinds it gives."""
    changed, kind = bytearray(data), dice.randrange(8)
    if kind == 0:
        changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    elif kind == 1:
        del changed[dice.randrange(len(changed)) :]
    elif kind == 2:
        at = dice.randrange(len(changed))
        changed[at : at + dice.randrange(40)] = dice.randbytes(dice.randrange(40))
    else:

        def change(document: dict[str, Any]) -> None:
            if kind == 3:
                scramble(document, dice)
            elif kind == 4:
                _in_metadata(document, dice.choice(("prunus", "plan")), lambda d: scramble(d, dice))
            else:
                _rename(document, dice)

        return rewrite(data, change)
    return resign(bytes(changed)) if dice.random() < 0.8 else bytes(changed)


def _in_metadata(document: dict[str, Any], entry: str, change: Callable[[Any], None]) -> None:
    inner = json.loads(document["__metadata__"][entry])
    change(inner)
    document["__metadata__"][entry] = json.dumps(inner)


def _rename(document: dict[str, Any], dice: random.Random) -> None:
    """Tensors under other names and of other kinds, as aliases, frozen, or in another layout."""
    tensors = [name for name in document if name != "__metadata__"]
    old = dice.choice(tensors)
    prefix = old.rpartition(".")[0]
    new = f"{dice.choice((prefix, '', 'a'))}.{dice.choice(NAMES)}".lstrip(".")
    if dice.random() < 0.6:
        document[new] = document.pop(old)

    def change(inner: dict[str, Any]) -> None:
        field_ = dice.choice(
            ("buffer", "hidden", "attribute", "frozen", "channels_last", "aliases")
        )
        if field_ == "aliases":
            inner["aliases"] = {dice.choice((new, *tensors)): dice.choice((new, *tensors))}
        else:
            inner[field_] = dice.choice(([new], [old], [*inner[field_], new], []))

    _in_metadata(document, "prunus", change)
