"""From recorded atoms to units, groups, costs and couplings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from math import prod

import numpy as np
from torch import Tensor, nn

from prunus.graph.axis import Axis, Label, Role
from prunus.graph.coupling import Coupling, CouplingGraph
from prunus.graph.groups import Aligned, AtLeast, Constraint, Group, Pin, Rescale, form_groups
from prunus.graph.polynomial import Monomial, Polynomial, add_up
from prunus.graph.program import Program, Ref, Span, modules_in
from prunus.tracer.capture import Recorder
from prunus.tracer.dataflow import Dataflow, operand
from prunus.tracer.labels import Algebra, Atoms
from prunus.tracer.settling import condition_in_units, in_units, pin_unsolvable
from prunus.tracer.softmax_scale import Fixed, find_rescales
from prunus.tracer.units import Resolve, Resolver, Widths


def build_graph(
    recorder: Recorder,
    flow: Dataflow,
    model: nn.Module,
    state: Mapping[str, Tensor],
    aliases: Mapping[str, str],
) -> tuple[CouplingGraph, Resolve]:
    """The coupling graph, and the function that turns a label of atoms into one of units."""
    rescales = _keep_scales(recorder, flow)
    resolver = pin_unsolvable(recorder, list(state))
    parameters = frozenset(n for n, tensor in state.items() if isinstance(tensor, nn.Parameter))
    roles = _roles(recorder, flow, parameters)
    groups = _groups(flow.program, resolver, roles)
    if _pin_data(recorder, resolver, groups, parameters):
        resolver = recorder.resolver(list(state))
        groups = _groups(flow.program, resolver, roles)
    labels = resolver.axes
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    widths = Widths(resolver)
    parts = _count(flow.program, model, state, labels, widths)
    couplings, pins = _read_events(recorder.algebra)
    graph = CouplingGraph(
        shapes=shapes,
        parameters=parameters,
        aliases=dict(aliases),
        labels=labels,
        roles={axis: roles.get(axis, Role.CARRIER) for axis in labels},
        groups=groups,
        unit_count=resolver.count,
        constraints=_constraints(flow.program, resolver),
        width_labels=tuple(widths.labels),
        costs={name: add_up(owners.values()) for name, owners in parts.items()},
        parts=parts,
        couplings=couplings,
        pins=pins,
        kept_outputs=tuple(flow.program.outputs),
        unknown=dict(recorder.unknown),
        equations=tuple(in_units(equation, resolver) for equation in recorder.sizes.equations),
        attributes=recorder.sizes.attributes,
        conditions=tuple(condition_in_units(one, resolver) for one in recorder.sizes.conditions),
        rescales=_rescales(rescales, resolver),
    )
    return graph, resolver


def _rescales(scales: Iterable[tuple[Label, Fixed]], resolve: Resolve) -> tuple[Rescale, ...]:
    found = ((resolve(label), targets) for label, targets in scales)
    return tuple(Rescale(units, targets) for units, targets in found if units is not None)


def _groups(program: Program, resolver: Resolver, roles: Mapping[Axis, Role]) -> tuple[Group, ...]:
    mixing = np.zeros(resolver.count + 1, dtype=np.bool_)
    for node in program.nodes:
        for path, dim in node.effect.mixing if node.effect else ():
            reference = operand(node, path)
            if isinstance(reference, Ref):
                label = resolver(program.labels[reference.value][dim])
                mixing[0 if label is None else label] = True
    mixing[0] = False
    own = {axis: roles.get(axis, Role.CARRIER) for axis in resolver.axes}
    return form_groups(resolver.axes, own, resolver.count, mixing)


def _pin_data(
    recorder: Recorder, resolver: Resolver, groups: Iterable[Group], parameters: frozenset[str]
) -> bool:
    """Pin units that no parameter makes: positions of tables and other data that the model holds.

    Removing them would be exact, and of no use to anyone; most are positions that this run
    happened not to need.  Returns whether there were any.
    """
    found = False
    for group in groups:
        makers = [axis.tensor for axis, role in group.axes if role is Role.PRODUCER] or [
            axis.tensor for axis, role in group.axes if role is Role.CARRIER
        ]
        if parameters.isdisjoint(makers):
            found = True
            why = Pin("data that no parameter makes", "", "", "")
            recorder.algebra.pin(resolver.roots[group.units][:, None], why)
    return found


def _keep_scales(recorder: Recorder, flow: Dataflow) -> list[tuple[Label, Fixed]]:
    """Head dims whose softmax scale has to be made up for; pinned where that can't be done."""
    found: dict[Fixed, Label] = {}
    for attention, fixed in find_rescales(flow, recorder.attended):
        label = recorder.labels[attention.query][-1]
        if label is None or recorder.algebra.canonical(label) is None:
            continue
        if fixed is None:
            reason = "the softmax scale depends on this dim, and no weights serve the query alone"
            recorder.algebra.pin(label, replace(attention.why, reason=reason))
            continue
        found.setdefault(fixed, label)
    return [(label, fixed) for fixed, label in found.items()]


def _count(
    program: Program,
    model: nn.Module,
    state: Mapping[str, Tensor],
    labels: Mapping[Axis, Label],
    widths: Widths,
) -> dict[str, dict[str, Polynomial]]:
    """Every cost, part by part: params and bytes by tensor, MACs by the module that runs."""
    held = ((*own._parameters.values(), *own._buffers.values()) for _, own in modules_in(model))
    stored = set(map(id, chain.from_iterable(held)))
    own = {name: tensor for name, tensor in state.items() if id(tensor) in stored}
    sizes = {name: _size_of(name, tensor, labels, widths) for name, tensor in own.items()}
    return {
        "params": {n: sizes[n] for n, t in own.items() if isinstance(t, nn.Parameter)},
        "bytes": {n: p.times(state[n].element_size()) for n, p in sizes.items()},
        "macs": {module: widths.polynomial(own) for module, own in _spans(program).items()},
    }


def _spans(program: Program) -> dict[str, list[Span]]:
    """The products of a program by the module that runs them."""
    found: dict[str, list[Span]] = {}
    for node in program.nodes:
        if node.effect is not None and node.effect.spans:
            found.setdefault(node.module, []).extend(node.effect.spans)
    return found


def _size_of(name: str, tensor: Tensor, labels: Mapping[Axis, Label], widths: Widths) -> Polynomial:
    """The number of a tensor's elements."""
    own = [labels.get(Axis(name, dim)) for dim in range(tensor.dim())]
    constant = prod(n for n, label in zip(tensor.shape, own, strict=True) if label is None)
    used = tuple(widths.index(label) for label in own if label is not None)
    if not used:
        return Polynomial(constant, ())
    return Polynomial(0, (Monomial(constant, used),))


def _roles(recorder: Recorder, flow: Dataflow, parameters: frozenset[str]) -> dict[Axis, Role]:
    """Roles of the axes of weights, read off the atoms that they were born with.

    Where those are of other data (``mask * weight`` has the mask's), the parameters that the
    weight was computed from have the role.
    """
    roles: dict[Axis, Role] = {}
    starts = np.array(recorder.algebra.starts)
    owners = recorder.algebra.owners
    for value, label, role in _weights(recorder, flow.program):
        for owner in np.unique(np.searchsorted(starts, label[:, 0], side="right") - 1):
            made = owners[owner].tensor in parameters
            behind = () if made else _axes_behind(flow, recorder.algebra, value, label, parameters)
            for axis in behind or (owners[owner],):
                roles.setdefault(axis, role)
    return roles


def _weights(recorder: Recorder, program: Program) -> Iterator[tuple[int, Label, Role]]:
    """Labelled dims of values made of state alone, where operators sum over them or make them."""
    for node in program.nodes:
        if node.effect is None:
            continue
        places = [(place, Role.CONSUMER) for place in node.effect.contracted]
        places += [(place, Role.PRODUCER) for place in node.effect.produced]
        for (path, dim), role in places:
            reference = operand(node, path)
            if isinstance(reference, Ref) and recorder.from_state[reference.value]:
                label = program.labels[reference.value][dim]
                if label is not None:
                    yield reference.value, label, role


def _axes_behind(
    flow: Dataflow, algebra: Algebra, value: int, label: Label, names: frozenset[str]
) -> tuple[Axis, ...]:
    """Axes, of the named tensors behind a value, that share atoms with a label of it."""
    roots = algebra.find(label)
    roots = roots[roots > 0]
    return tuple(
        Axis(name, dim)
        for number in flow.state_behind(value)
        if (name := flow.program.state[number]) in names
        for dim, own in enumerate(flow.program.labels[number])
        if own is not None and np.isin(algebra.find(own), roots).any()
    )


def _constraints(program: Program, resolve: Resolve) -> tuple[Constraint, ...]:
    found: dict[bytes, Constraint] = {}
    for node in program.nodes:
        if node.effect is None:
            continue
        why = f"{node.target} in {node.module}"
        for label, least in node.effect.at_least:
            units = resolve(label)
            if units is not None and (~(units > 0).any(axis=1)).sum() < least:
                key = b"" if least == 1 else least.to_bytes(5, "little")
                found.setdefault(key + units.tobytes(), AtLeast(units, why, least))
        for dim, multiple in node.effect.aligned:
            units = resolve(dim)
            if units is not None and multiple > 1:
                key = multiple.to_bytes(4, "little") + units.tobytes()
                found.setdefault(key, Aligned(units, multiple, why))
    return tuple(found.values())


def _read_events(
    algebra: Algebra,
) -> tuple[tuple[Coupling, ...], tuple[tuple[Axis, Pin], ...]]:
    """Events between atoms as couplings between the axes that own them."""
    starts, owners = np.array(algebra.starts), algebra.owners
    owner_of = np.repeat(np.arange(len(starts)), np.diff(starts, append=algebra.count))
    couplings: dict[tuple[Axis, Axis, str, str], Coupling] = {}
    pins: dict[tuple[Axis, Pin], None] = {}
    for event in algebra.events:
        left = owner_of[event.a]
        if event.b is None:
            for owner in _distinct(left):
                if owner:
                    pins[(owners[owner], event.why)] = None
            continue
        right = owner_of[event.b]
        pairs = left * len(owners) + right
        for pair in _distinct(pairs[(left != right) & (left > 0) & (right > 0)]):
            chosen = pairs == pair
            a, b = divmod(int(pair), len(owners))
            key = (owners[a], owners[b], event.why.operator, event.why.module)
            couplings.setdefault(
                key,
                Coupling(*key, event.a[chosen] - starts[a], event.b[chosen] - starts[b]),
            )
    return tuple(couplings.values()), tuple(pins)


def _distinct(numbers: Atoms) -> Atoms:
    """As ``numpy.unique``, which takes its time where all are one, as they are mostly."""
    alike = len(numbers) > 0 and bool((numbers == numbers[0]).all())
    return numbers[:1] if alike else np.unique(numbers)
