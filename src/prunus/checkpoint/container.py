"""The safetensors container with a digest: written deterministically, read by the library.

A file is eight bytes with the length of the header, the header as JSON, and the tensors one after
the other.  The digest, an entry of the metadata, is the SHA-256 of the file with zeros in its own
place.  Any reader of safetensors can read the file.  Reading takes at most twice the file, or its
size and 64 MB where that is more.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prunus.errors import FileError, FormatError

T = TypeVar("T")

DIGEST = "digest"
"""The metadata entry that the container keeps for itself."""

_PLACE = "0" * 64
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_PICKLES = (b"PK\x03\x04", *(bytes([0x80, version]) for version in range(1, 6)))
"""What files of ``torch.save`` and other pickles begin with."""

FLOOR = 64 << 20
"""Bytes that reading may take beside the tensors, however small the file.

The tensors take no more than the file, and all else that it says may take its size once more.
"""

_GROWTH = 32
"""Bytes of memory that a byte of the header takes at most, once it is read."""


def largest_header(size: int) -> int:
    """Bytes of the longest header that a file of so many bytes may have.

    >>> largest_header(1000), largest_header(1 << 30)
    (2097152, 33554432)
    """
    return max(size, FLOOR) // _GROWTH


@dataclass(frozen=True)
class Container:
    """An open file whose header has been read and checked, the tensors not yet."""

    path: str
    size: int
    metadata: Mapping[str, str]
    header: bytes
    file: BinaryIO
    library: Any

    def read(self) -> dict[str, Tensor]:
        """Every tensor, in memory of its own, once the digest has been compared."""
        stated = self.metadata.get(DIGEST, "")
        if len(stated) != 64 or self.header.count(stated.encode()) != 1:
            raise damaged(self.path, "it has no digest")
        digest = hashlib.sha256(len(self.header).to_bytes(8, "little"))
        digest.update(self.header.replace(stated.encode(), _PLACE.encode()))
        tensors: dict[str, Tensor] = {}
        for name in self.library.offset_keys():
            tensor = tensors[name] = self._empty(name)
            content = _bytes_of(tensor)
            if content and self.file.readinto(content) != len(content):  # type: ignore[attr-defined]
                raise damaged(self.path, "it became shorter while it was read")
            digest.update(content)
            if tensor.dtype == torch.bool and max(content, default=0) > 1:
                raise damaged(self.path, f"{name} holds what is neither true nor false")
        if digest.hexdigest() != stated:
            raise damaged(self.path, "its content is not what its digest was made of")
        return tensors

    def _empty(self, name: str) -> Tensor:
        piece = self.library.get_slice(name)
        if not name.isprintable() or piece.get_dtype() not in _DTYPES:
            raise damaged(self.path, f"{name!r} of type {piece.get_dtype()} is no tensor of ours")
        try:
            return torch.empty(piece.get_shape(), dtype=_DTYPES[piece.get_dtype()])
        except (RuntimeError, TypeError) as error:  # sizes beside a 0 may be of any length
            raise damaged(self.path, f"{name} has an impossible shape") from error


def write_container(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Fill a file; the same tensors and metadata make the same bytes."""
    # Wide numbers first, so that every tensor is aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    head: dict[str, Any] = {"__metadata__": {**metadata, DIGEST: _PLACE}}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        head[name] = {
            "dtype": _dtype_name(name, tensors[name]),
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > largest_header(8 + len(text) + end):
        raise FormatError(
            "the model has too many tensors for their size",
            why=f"the header would have {len(text)} bytes for {end} bytes of tensors",
            fix="save it with torch.save, which is read where it is trusted",
        )
    with path.open("wb") as file:
        digest = hashlib.sha256()
        for chunk in (len(text).to_bytes(8, "little"), text):
            digest.update(chunk)
            file.write(chunk)
        for name in order:
            content = _bytes_of(tensors[name].detach().cpu().resolve_conj().resolve_neg())
            digest.update(content)
            file.write(content)
        file.seek(8 + text.index(f'"{DIGEST}":"{_PLACE}"'.encode()) + len(f'"{DIGEST}":"'))
        file.write(digest.hexdigest().encode())


@contextmanager
def open_container(path: str | os.PathLike[str]) -> Iterator[Container]:
    """Open a file and check its header against the file's size.

    Raises
    ------
    FileError
        If the file can't be opened.
    FormatError
        If it is no safetensors file, or a truncated or damaged one.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise FileError(f"{path} can't be read", why=error.strerror or str(error)) from error
    with file:
        size = os.fstat(file.fileno()).st_size
        header = _read_header(file, size, str(path))
        try:
            library: Any = safe_open(path, "pt")
        except (SafetensorError, OSError) as error:
            raise damaged(str(path), str(error)) from error
        with library:
            yield Container(str(path), size, library.metadata() or {}, header, file, library)


def damaged(path: str, why: str) -> FormatError:
    """The error for a file that is none of ours or not what it was."""
    return FormatError(
        "the file is damaged",
        where=path,
        why=why,
        fix="copy or save it again",
    )


def decode(text: bytes | str, kind: type[T], path: str) -> T:
    """JSON of that type and no other."""
    try:
        return msgspec.json.decode(text, type=kind, strict=True)
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise damaged(path, f"its header is not JSON as it should be: {error}") from error


def _read_header(file: BinaryIO, size: int, path: str) -> bytes:
    start, first = file.read(8), file.read(1)
    length = int.from_bytes(start, "little")
    if first != b"{" and start.startswith(_PICKLES):
        raise FormatError(
            "this is a pickle, not a file of prunus.save",
            where=path,
            why="a pickle can run any code when it is read, so it was not read",
            fix="load it where you trust it, and save the model with prunus.save",
        )
    if first != b"{" or length < 2:
        raise FormatError(
            "this is no safetensors file", where=path, why="it does not begin with a header"
        )
    if length > size - 8 or length > largest_header(size):
        raise damaged(path, f"a header of {length} bytes is promised in a file of {size} bytes")
    text = first + file.read(length - 1)
    if len(text) != length:
        raise damaged(path, "it became shorter while it was read")
    return text


def _dtype_name(name: str, tensor: Tensor) -> str:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.dtype not in _NAMES:
        kind = tensor.dtype if tensor.layout == torch.strided else tensor.layout
        raise FormatError(
            f"a tensor of type {kind} can't be saved",
            where=name,
            fix="convert it, to float32 say",
        )
    if tensor.device.type == "meta":
        raise FormatError(
            "a tensor on the meta device can't be saved",
            where=name,
            why="it has a shape and no values",
            fix="load weights first",
        )
    return _NAMES[tensor.dtype]


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a dense tensor, in row-major order; that of a fresh one can be written."""
    if not tensor.numel():
        return memoryview(b"")
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]
