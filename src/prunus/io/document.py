"""What a file says beside its tensors: the plan, and what the tensors were in the model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from prunus.errors import FormatError, PlanError
from prunus.io.container import FLOOR, Container, damaged, parse_json
from prunus.plans import Plan
from prunus.surgeon.restore import Kind

SCHEMA = 1
"""Of the file; one of another version is refused."""

_KINDS: tuple[Kind, ...] = ("buffer", "hidden", "attribute")
"""Those that are listed; what is in no list is a parameter."""

_POSITION = 64
"""Bytes that a position takes: a number, its places in a list and a tuple, and some room."""


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


def check_schema(container: Container) -> dict[str, Any]:
    """The document of a file that this version can read, its entries not yet checked."""
    path = container.path
    if "prunus" not in container.metadata:
        raise FormatError(
            "this is no file of prunus.save",
            where=path,
            why="it is a safetensors file without a document of Prunus",
            fix="build the model and load it with safetensors.torch.load_model",
        )
    document = parse_json(container.metadata["prunus"], container.size, path)
    found = document.get("schema")
    if type(found) is not int or found != SCHEMA:
        raise FormatError(
            f"the file has schema version {found!r}",
            where=path,
            why=f"this Prunus reads version {SCHEMA}",
            fix="install the Prunus that wrote it",
        )
    return document


def read_document(container: Container, document: Mapping[str, Any]) -> Document:
    """The checked document; names are those of the file's tensors."""
    path = container.path
    names = {entry.name for entry in container.entries}
    aliases = document.get("aliases")
    if not isinstance(aliases, dict) or not all(isinstance(v, str) for v in aliases.values()):
        raise damaged(path, "its aliases are no table of names")
    if not set(aliases.values()) <= names or names & set(aliases):
        raise damaged(path, "its aliases speak of tensors that it does not have")
    known = names | set(aliases)
    kinds: dict[str, Kind] = {}
    for kind in _KINDS:
        kinds.update(dict.fromkeys(_names(path, document, kind, known), kind))
    return Document(
        _read_plan(container),
        aliases,
        kinds,
        frozenset(_names(path, document, "frozen", known)),
        frozenset(_names(path, document, "channels_last", known)),
    )


def _names(path: str, document: Mapping[str, Any], field: str, known: set[str]) -> Iterable[str]:
    value = document.get(field)
    if not isinstance(value, list) or not all(isinstance(n, str) and n in known for n in value):
        raise damaged(path, f"its list {field!r} speaks of tensors that it does not have")
    return value


def _read_plan(container: Container) -> Plan | None:
    text = container.metadata.get("plan")
    if text is None:
        return None
    parse_json(text, container.size, container.path)  # bounds what reading it takes
    try:
        plan = Plan.from_json(text, limit=max(container.size, FLOOR) // _POSITION)
    except PlanError as error:
        where = f"{container.path} {error.where}".rstrip()
        raise PlanError(error.what, where=where, why=error.why, fix=error.fix) from error
    for edit in plan.edits:
        # A class is only ever one of the surgeon's equivalents, by its name.
        if edit.attribute != "__class__" and not _is_number((edit.before, edit.after)):
            raise damaged(container.path, f"its plan sets {edit.attribute!r} to no number")
    return plan


def _is_number(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_number(item) for item in value)
    return type(value) in (int, float, bool)
