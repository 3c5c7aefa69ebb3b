"""Judge every rule by brute force: run the operator, cut, run it again, compare.

Every dim of every tensor argument gets units of its own, the rule says what that ties together,
and random units are taken away.  Then the operator on tensors that were cut has to give what the
oracle's replay of the whole operator gives at the positions that stay.

Run as a program, it prints the table of all rules and fails on anything but OK and PINNED.
"""

from __future__ import annotations

import string
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path as Folder
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._ops import OpOverload

from prunus.errors import RuleError
from prunus.graph.axis import Axis, Label, Mask, kept_positions
from prunus.graph.groups import Pin
from prunus.graph.program import Effect, Labels, Node, Path, Program, Ref
from prunus.tracer.labels import Algebra
from prunus.tracer.registry import (
    Call,
    Rule,
    bind,
    call_bound,
    find_overload,
    find_rule,
    registered,
    tensors_in,
)
from prunus.verifier.replay import Replay

if __name__ == "__main__":  # a program finds what lies beside it, not the folder above
    sys.path.insert(0, str(Folder(__file__).parents[1]))
from tests.rule_table import ROWS, Cut, Row, Sample, pointwise_rows, spell, tagged

MASKS = 3
"""Random selections of units per sample and way of labelling."""


@dataclass(frozen=True)
class Finding:
    """The verdict on the rule of one overload.

    *OK*; *PINNED*: right, but nothing stays prunable in any sample, as the row expects;
    *INCORRECT*: cutting gives something else, or fails; *UNEXPECTED*: right, but it ties or pins
    other dims than the row says; *MISSING*: a rule without row, or a row without rule.
    """

    overload: str
    status: str
    detail: str = ""
    outcomes: tuple[str, ...] = ()


class DisagreementError(Exception):
    """A rule said something that is not so."""


def validate(row: Row, rule: Rule | None = None) -> Finding:
    """The finding for one row; ``rule`` stands in for the registered one."""
    try:
        target = find_overload(row.overload)
        rule = rule or find_rule(target)
    except RuleError as error:
        return Finding(row.overload, "MISSING", error.what)
    if rule is None:
        return Finding(row.overload, "MISSING", "a row without a rule")
    outcomes: list[str] = []
    unexpected = ""
    for number, sample in enumerate(row.samples):
        try:
            outcomes.append(examine(target, rule, sample, row, number))
        except DisagreementError as wrong:
            return Finding(row.overload, "INCORRECT", f"sample {number}, {wrong}")
        if outcomes[-1] != sample.outcome and not unexpected:
            unexpected = f"sample {number} gives {outcomes[-1]!r}, not {sample.outcome!r}"
    if unexpected:
        return Finding(row.overload, "UNEXPECTED", unexpected, tuple(outcomes))
    pinned = not any(char.isalpha() for outcome in outcomes for char in outcome)
    return Finding(row.overload, "PINNED" if pinned else "OK", "", tuple(outcomes))


def examine(target: OpOverload, rule: Rule, sample: Sample, row: Row, seed: int) -> str:
    """The outcome for one sample, tried with dims labelled in all ways."""
    outcome = ""
    for way in WAYS:
        for label_dims in way.variants(sample):
            try:
                trial = Trial(target, rule, sample, label_dims)
                for kept in trial.masks(seed):
                    trial.compare(kept, row)
            except DisagreementError as wrong:
                raise DisagreementError(f"{way.name}: {wrong}") from wrong
            if way is WAYS[0]:
                outcome = trial.outcome()
    return outcome


def missing(rows: Iterable[Row], overloads: Iterable[OpOverload] | None = None) -> list[Finding]:
    """Findings for the overloads (by default all with a rule, by name or tag) that have no row."""
    covered = {row.overload for row in rows}
    ruled = (*registered(), *tagged()) if overloads is None else overloads
    names = {spell(target) for target in ruled}
    return [Finding(n, "MISSING", "a rule without a row") for n in sorted(names - covered)]


def report(findings: Iterable[Finding]) -> str:
    """A table with one line per overload, and the number of each status."""
    findings = list(findings)
    width = max(len(finding.overload) for finding in findings)
    lines = [
        f"{f.overload:<{width}}  {f.status:<10}  {f.detail or '; '.join(f.outcomes)}".rstrip()
        for f in findings
    ]
    counts: dict[str, int] = {}
    for finding in findings:
        counts[finding.status] = counts.get(finding.status, 0) + 1
    summary = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    return "\n".join([*lines, "", f"{len(findings)} overloads: {summary}"])


class Trial:
    """One rule applied to one call whose dims are labelled in some way."""

    def __init__(
        self,
        target: OpOverload,
        rule: Rule,
        sample: Sample,
        label_dims: Callable[[Algebra, list[Tensor]], list[Labels]],
    ) -> None:
        self._target = target
        self._algebra = Algebra()
        self._before = copy_tensors(bind(target, sample.args, sample.kwargs))
        after = copy_tensors(self._before)
        paths = [path for path, _ in tensors_in(after)]
        tensors = [tensor for _, tensor in tensors_in(after)]
        own = label_dims(self._algebra, tensors)
        by_id = {id(tensor): labels for tensor, labels in zip(tensors, own, strict=True)}
        dense = bool(tensors) and tensors[0].layout == torch.strided
        strides = tensors[0].stride() if dense else ()
        result = run(target, after)
        outputs = tuple(leaf for leaf in leaves(result) if isinstance(leaf, Tensor))
        context = Pin("", str(target), "", "")
        call = Call(
            target,
            after,
            outputs,
            self._algebra,
            lambda tensor: by_id[id(tensor)],
            context,
            strides,
            sample.given,
        )
        try:
            effect = rule(call)
        except Exception as error:
            raise DisagreementError(f"the rule raised {type(error).__name__}: {error}") from error
        check_shape(effect, outputs, self._before)
        for expression, _, label in effect.equations:
            if isinstance(expression, int):
                call.pin(label, "the code fixes this size")
        self._effect = effect
        self._paths = paths
        self._labels = [*own, *effect.outputs]
        values = (*(tensor for _, tensor in tensors_in(self._before)), *outputs)
        self._shapes = tuple(tuple(tensor.shape) for tensor in values)
        self._strides = tuple(
            tensor.stride() if tensor.layout == torch.strided else () for tensor in values
        )
        self._resolved: dict[int, tuple[Label, Label | None]] = {}
        counted = (label for _, label in effect.counted)
        dims = (d for labels in self._labels for d in labels)
        for label in (*dims, *(label for label, _ in effect.at_least), *counted):
            self._algebra.canonical(label)  # which may pin what grew too deep, so all come first

    def resolve(self, label: Label | None) -> Label | None:
        """The label in terms of units, those that are always kept left out."""
        if label is None:
            return None
        if id(label) not in self._resolved:
            self._resolved[id(label)] = label, self._algebra.canonical(label)
        return self._resolved[id(label)][1]

    def outcome(self) -> str:
        """What is tied to what, as ``a b, b c -> a c``: one word per dim, ``.`` if it is pinned.

        ``ab`` is a product (a position stays if both units do), ``a|b`` a concatenation, and
        ``a~`` a dim of which some positions are pinned.  Outputs alike are written once.
        """
        names: dict[int, str] = {}
        letters = iter(string.ascii_letters)
        resolved = [
            " ".join(describe_dim(self.resolve(label), names, letters) for label in own)
            for own in self._labels
        ]
        count = len(self._paths)
        outputs = [word for word, _ in groupby(resolved[count:])]
        return f"{', '.join(resolved[:count])} -> {', '.join(outputs)}".strip()

    def masks(self, seed: int) -> Iterator[Mask]:
        """Random selections of units, the first with as few as may be."""
        rng = np.random.default_rng(seed)
        dims = [label for labels in self._labels for label in labels]
        found = [(self.resolve(label), 1) for label in dims]
        found += [(self.resolve(label), least) for label, least in self._effect.at_least]
        constrained = [(label, least) for label, least in found if label is not None]
        if not constrained:  # nothing can go: at least the operator runs again
            yield np.ones(self._algebra.count, dtype=np.bool_)
            return
        for share in (0.0, *rng.uniform(0.2, 0.9, MASKS - 1)):
            kept = rng.random(self._algebra.count) < share
            kept[0] = True
            for index in rng.permutation(len(constrained)):
                label, least = constrained[index]
                while len(stay := kept_positions(label, kept)) < least:
                    kept[label[rng.choice(np.setdiff1d(np.arange(len(label)), stay))]] = True
            self._align(kept)
            yield kept

    def _align(self, kept: Mask) -> None:
        """Keep more, until every dim is a multiple of what its kernel takes."""
        found = [(self.resolve(label), multiple) for label, multiple in self._effect.aligned]
        labels = [(label, multiple) for label, multiple in found if label is not None]
        while wrong := [
            label for label, multiple in labels if len(kept_positions(label, kept)) % multiple
        ]:
            kept[wrong[0][~kept[wrong[0]].all(axis=1)][0]] = True

    def compare(self, kept: Mask, row: Row) -> None:
        """Raise :class:`DisagreementError` unless cutting gives what the silenced original does."""
        count = len(self._paths)
        own, theirs = self._labels[:count], self._labels[count:]
        whole = self._replay(kept)
        expected = [
            self._cut(tensor, labels, kept) for tensor, labels in zip(whole, theirs, strict=True)
        ]
        arguments = copy_tensors(self._before)
        for path, labels in zip(self._paths, own, strict=True):
            replace_tensor(arguments, path, lambda t, labels=labels: self._cut(t, labels, kept))
        for name, value in self._effect.sizes.items():
            arguments[name] = self._resize(value, kept)
        if row.resize is not None:
            shapes = [tuple(tensor.shape) for tensor in expected]
            stated = [self._resize((n, label), kept) for _, n, label in self._effect.equations]
            arguments.update(row.resize(Cut(self._before, arguments, shapes, stated)))
        try:
            result = run(self._target, arguments, row.again)
        except Exception as error:
            raise DisagreementError(f"cut, it raised {type(error).__name__}: {error}") from error
        found = [leaf for leaf in leaves(result) if isinstance(leaf, Tensor)]
        if len(found) != len(expected) and row.again is None:
            raise DisagreementError(
                f"cut, it gives {len(found)} outputs instead of {len(expected)}"
            )
        for output, label in self._effect.counted:
            if (units := self.resolve(label)) is not None:  # positions among those that are kept
                found[output] = torch.as_tensor(kept_positions(units, kept))[found[output]]
        for number, (one, other) in enumerate(zip(found, expected, strict=row.again is None)):
            same_shape(number, one, other)
            if row.values and one.device.type != "meta" and not agree(one, other):
                raise DisagreementError(f"output {number} differs once {self._loss(kept)} is gone")

    def _replay(self, kept: Mask) -> list[Tensor]:
        """The oracle's meaning: contracted operands silenced, mixing ones run on what stays."""
        numbers: dict[int, int] = {}
        originals: list[Tensor] = []

        def refer(value: Any) -> Any:
            if isinstance(value, Tensor):
                numbers[id(value)] = len(originals)
                originals.append(value)
                return Ref(numbers[id(value)])
            if isinstance(value, (list, tuple)):
                return [refer(item) for item in value]
            return value

        recorded = {name: refer(value) for name, value in self._before.items()}
        count = len(originals)
        outputs = tuple(range(count, len(self._labels)))
        node = Node(self._target, recorded, outputs, self._effect, "", "")
        program = Program(
            nodes=(node,),
            inputs=tuple(range(count)),
            state={},
            constants={},
            outputs={str(number): number for number in outputs},
            labels=tuple(self._labels),
            shapes=self._shapes,
            resolve=self.resolve,
            strides=self._strides,
        )
        try:
            values = Replay(SimpleNamespace(program=program, unit_count=0), {}, originals).run(kept)  # type: ignore[arg-type]
        except Exception as error:
            raise DisagreementError(
                f"replayed, it raised {type(error).__name__}: {error}"
            ) from error
        return [values[str(number)] for number in outputs]

    def _cut(self, tensor: Tensor, labels: Labels, kept: Mask) -> Tensor:
        for dim, label in enumerate(labels):
            flat = self.resolve(label)
            if flat is not None:
                stay = torch.as_tensor(kept_positions(flat, kept), device=tensor.device)
                tensor = tensor.index_select(dim, stay)
        return tensor

    def _resize(self, value: Any, kept: Mask) -> Any:
        if isinstance(value, list):
            return [self._resize(item, kept) for item in value]
        size, label = value
        flat = self.resolve(label)
        return size if flat is None else len(kept_positions(flat, kept))

    def _loss(self, kept: Mask) -> str:
        gone = [
            f"{path}[{dim}] {np.flatnonzero(~kept[flat].all(axis=1)).tolist()}"
            for path, labels in zip(self._paths, self._labels, strict=False)
            for dim, label in enumerate(labels)
            if (flat := self.resolve(label)) is not None and not kept[flat].all()
        ]
        return ", ".join(gone) or "nothing"


@dataclass(frozen=True)
class Way:
    """A way to label the dims of a call: what a rule may be confronted with."""

    name: str
    variants: Callable[[Sample], Iterator[Callable[[Algebra, list[Tensor]], list[Labels]]]]


def _independent(_: Sample) -> Iterator[Any]:
    """Every dim of every tensor has units of its own."""
    yield lambda algebra, tensors: [_fresh(algebra, t) for t in tensors]


def _one_unlabelled(sample: Sample) -> Iterator[Any]:
    """One of several tensors can't be pruned, an input of the model say."""
    count = sum(1 for _ in tensors_in({"args": list(_flat(sample))}))
    for fixed in range(count if count > 1 else 0):
        yield lambda algebra, tensors, fixed=fixed: [
            (None,) * t.dim() if n == fixed else _fresh(algebra, t) for n, t in enumerate(tensors)
        ]


def _products(_: Sample) -> Iterator[Any]:
    """Dims that are heads × head dims already."""

    def label(algebra: Algebra, size: int) -> Label:
        factor = next((f for f in (2, 3, 5) if size % f == 0 and size > f), None)
        if factor is None:
            return algebra.fresh(size)[:, None]
        parts = [algebra.fresh(n)[:, None] for n in (factor, size // factor)]
        merged = algebra.merge(parts, (factor, size // factor))
        assert merged is not None
        return merged

    yield lambda algebra, tensors: [_by_size(t, lambda n: label(algebra, n)) for t in tensors]


def _partly_pinned(_: Sample) -> Iterator[Any]:
    """Dims whose first positions are pinned, and whose last two share a unit."""

    def label(algebra: Algebra, size: int) -> Label:
        atoms = algebra.fresh(size)
        atoms[: size // 3] = 0
        atoms[-1] = atoms[-2]
        return atoms[:, None]

    yield lambda algebra, tensors: [_by_size(t, lambda n: label(algebra, n)) for t in tensors]


def _shared(_: Sample) -> Iterator[Any]:
    """Dims of the same size have the same units, as where a tensor meets itself."""

    def label_all(algebra: Algebra, tensors: list[Tensor]) -> list[Labels]:
        known: dict[int, Label] = {}

        def label(size: int) -> Label:
            if size not in known:
                known[size] = algebra.fresh(size)[:, None]
            return known[size]

        return [_by_size(tensor, label) for tensor in tensors]

    yield label_all


WAYS = (
    Way("independent", _independent),
    Way("one unlabelled", _one_unlabelled),
    Way("products", _products),
    Way("partly pinned", _partly_pinned),
    Way("shared", _shared),
)


def _fresh(algebra: Algebra, tensor: Tensor) -> Labels:
    return tuple(
        algebra.fresh(size, Axis("argument", dim))[:, None] if size > 1 else None
        for dim, size in enumerate(tensor.shape)
    )


def _by_size(tensor: Tensor, label: Callable[[int], Label]) -> Labels:
    return tuple(label(size) if size > 1 else None for size in tensor.shape)


def _flat(sample: Sample) -> Iterator[Any]:
    for value in (*sample.args, *sample.kwargs.values()):
        yield from value if isinstance(value, (list, tuple)) else (value,)


def describe_dim(label: Label | None, names: dict[int, str], letters: Iterator[str]) -> str:
    """One word for a dim; see :meth:`Trial.outcome`."""
    if label is None:
        return "."
    words = []
    for column in sorted(label.T, key=lambda column: int(column.max())):
        new = [int(atom) for atom in column if atom > 0 and int(atom) not in names]
        if new:
            names.update(dict.fromkeys(new, next(letters)))
        seen = dict.fromkeys(names[int(atom)] for atom in column if atom > 0)
        words.append("|".join(seen) + ("~" if (column == 0).any() else ""))
    return "*".join(words) if any(len(word) > 1 for word in words) else "".join(words)


def check_shape(effect: Effect, outputs: Sequence[Tensor], args: Mapping[str, Any]) -> None:
    """Labels fit the outputs, places exist, spans and sizes are as long as their labels."""
    if len(effect.outputs) != len(outputs):
        raise DisagreementError(f"{len(effect.outputs)} sets of labels for {len(outputs)} outputs")
    for number, (labels, output) in enumerate(zip(effect.outputs, outputs, strict=True)):
        if len(labels) != output.dim():
            raise DisagreementError(
                f"{len(labels)} labels for the {output.dim()} dims of output {number}"
            )
        for dim, label in enumerate(labels):
            _check_length(label, output.shape[dim], f"dim {dim} of output {number}")
    shapes = {path: tensor.shape for path, tensor in tensors_in(args)}
    for path, dim in (*effect.contracted, *effect.produced, *effect.mixing):
        if path not in shapes or not 0 <= dim < len(shapes[path]):
            raise DisagreementError(f"there is no dim {dim} of argument {path}")
    sized = [(name, pair) for name, value in effect.sizes.items() for pair in _pairs(value)]
    sized += [("a span", pair) for span in effect.spans for pair in span]
    sized += [("an equation", (size, label)) for _, size, label in effect.equations]
    for name, (size, label) in sized:
        _check_length(label, size, name)
    for name in effect.sizes:
        if name not in args:
            raise DisagreementError(f"there is no argument {name!r}")


def _check_length(label: Label | None, size: int, what: str) -> None:
    if label is not None and len(label) != size:
        raise DisagreementError(f"a label of {len(label)} positions for {what}, which has {size}")


def _pairs(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for item in value:
            yield from _pairs(item)
    else:
        yield value


def run(
    target: OpOverload,
    arguments: Mapping[str, Any],
    instead: Callable[[Mapping[str, Any]], Any] | None = None,
) -> Any:
    """The operator, or what stands for it."""
    with torch.no_grad():
        return call_bound(target, arguments) if instead is None else instead(arguments)


def leaves(value: Any) -> list[Any]:
    """Items of nested lists and tuples."""
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


def copy_tensors(value: Any) -> Any:
    """The same arguments with tensors of their own, strides kept."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided:
            return value.clone()
        source = value
        for dim, stride in enumerate(value.stride()):
            source = source if stride else source.narrow(dim, 0, 1)  # stretched, which clones lose
        copied = source.clone(memory_format=torch.preserve_format)
        return copied if source is value else copied.expand(value.shape)
    if isinstance(value, (list, tuple)):
        return [copy_tensors(item) for item in value]
    if isinstance(value, dict):
        return {name: copy_tensors(item) for name, item in value.items()}
    return value


def replace_tensor(
    arguments: dict[str, Any], path: Path, change: Callable[[Tensor], Tensor]
) -> None:
    """Change the tensor at a place, in the caller's own copy of the arguments."""
    name, *rest = path
    if rest:
        arguments[str(name)][rest[0]] = change(arguments[str(name)][rest[0]])
    else:
        arguments[str(name)] = change(arguments[str(name)])


def same_shape(number: int, one: Tensor, other: Tensor) -> None:
    """Raise :class:`DisagreementError` where shapes or types differ."""
    if one.shape != other.shape or one.dtype != other.dtype:
        raise DisagreementError(
            f"output {number}, cut, is {one.dtype} {tuple(one.shape)} "
            f"instead of {other.dtype} {tuple(other.shape)}"
        )


def agree(one: Tensor, other: Tensor) -> bool:
    """Equal up to rounding."""
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, other)
    loose = 1e-4 if one.dtype in (torch.float32, torch.complex64) else 1e-9
    return torch.allclose(one, other, rtol=loose, atol=loose, equal_nan=True)


def main() -> int:
    """Print the table; 1 if a rule is wrong, unexpected or missing."""
    rows = [*ROWS, *pointwise_rows()]
    findings = [validate(row) for row in rows] + missing(rows)
    print(report(findings))
    return int(any(finding.status not in ("OK", "PINNED") for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
