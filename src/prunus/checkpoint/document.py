"""What a file says beside its tensors: the plan, and what the tensors were in the model."""

import json
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

import msgspec

from prunus.checkpoint.container import Container, damaged, decode
from prunus.errors import FormatError, found_in
from prunus.graph.plans import Plan
from prunus.surgeon.restore import Kind

SCHEMA = 2
"""Of the file; its plan is of the second form, version 1 is read as well."""

READABLE = (1, 2)

_KINDS: tuple[Kind, ...] = ("buffer", "hidden", "attribute")
"""Those that are listed; what is in no list is a parameter."""

_POSITION = 64
"""Bytes that a position takes: a number, its places in a list and a tuple, and some room."""

_POSITIONS = 8 << 20
"""Bytes that all positions of a plan may take, however small the file."""


class _Version(msgspec.Struct, frozen=True):
    schema: Any


class _Listed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    schema: int
    aliases: dict[str, str]
    buffer: tuple[str, ...]
    hidden: tuple[str, ...]
    attribute: tuple[str, ...]
    frozen: tuple[str, ...]
    channels_last: tuple[str, ...]


@dataclass(frozen=True)
class Document:
    """The metadata of a file.

    Attributes
    ----------
    plan
        What the model was pruned by: index maps, attribute edits, the spec of its inputs.
    aliases
        Other name → first name, of tied tensors.
    kinds
        Of every name that is no parameter.
    frozen
        Parameters that don't require gradients.
    channels_last
        Tensors whose memory is laid out with the channels last.
    """

    plan: Plan | None
    aliases: Mapping[str, str]
    kinds: Mapping[str, Kind]
    frozen: frozenset[str]
    channels_last: frozenset[str]

    def to_metadata(self) -> dict[str, str]:
        """Strings for the container."""
        document: dict[str, Any] = {
            "schema": SCHEMA,
            "aliases": dict(self.aliases),
            "frozen": sorted(self.frozen),
            "channels_last": sorted(self.channels_last),
            **{kind: sorted(n for n, k in self.kinds.items() if k == kind) for kind in _KINDS},
        }
        text = json.dumps(document, sort_keys=True, separators=(",", ":"))
        plan = {} if self.plan is None else {"plan": self.plan.to_json()}
        return {"prunus": text, **plan}


def check_schema(container: Container) -> str:
    """The document of a file that this version can read, as text."""
    path = container.path
    text = container.metadata.get("prunus")
    if text is None:
        raise FormatError(
            "this is no file of prunus.save",
            where=path,
            why="it is a safetensors file without a document of Prunus",
            fix="build the model and load it with safetensors.torch.load_model",
        )
    found = decode(text, _Version, path).schema
    if type(found) is not int or found not in READABLE:
        raise FormatError(
            f"the file has schema version {found!r}",
            where=path,
            why=f"this Prunus reads the versions {', '.join(map(str, READABLE))}",
            fix="install the Prunus that wrote it",
        )
    return text


def read_document(container: Container, text: str, names: Set[str]) -> Document:
    """The checked document of a file with tensors of these names."""
    path = container.path
    found = decode(text, _Listed, path)
    if not set(found.aliases.values()) <= names or names & set(found.aliases):
        raise damaged(path, "its aliases speak of tensors that it does not have")
    known = names | set(found.aliases)
    for field in (*_KINDS, "frozen", "channels_last"):
        if not set(getattr(found, field)) <= known:
            raise damaged(path, f"its list {field!r} speaks of tensors that it does not have")
    kinds: dict[str, Kind] = {n: kind for kind in _KINDS for n in getattr(found, kind)}
    frozen, last = frozenset(found.frozen), frozenset(found.channels_last)
    return Document(_read_plan(container), found.aliases, kinds, frozen, last)


def _read_plan(container: Container) -> Plan | None:
    text = container.metadata.get("plan")
    if text is None:
        return None
    with found_in(container.path):
        return Plan.from_json(text, limit=max(container.size, _POSITIONS) // _POSITION)
