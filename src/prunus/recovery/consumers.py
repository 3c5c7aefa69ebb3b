"""Weights that read units: which can be changed, and what can take up a constant behind them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from prunus.calibration.sites import Site
from prunus.graph.axis import Mask
from prunus.graph.coupling import CouplingGraph
from prunus.graph.program import Ref, refs_in
from prunus.tracer.dataflow import Dataflow, contracts, name_of, read_by

Place = Literal["bias", "running mean", "new bias", ""]
"""Where a constant goes: into the bias that is there, into the mean that a batch norm subtracts,
into a bias that is made, or nowhere."""

_STANDARD = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d,
             nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Consumer:
    """A weight that reads units, as a matrix of outputs by columns.

    Attributes
    ----------
    site
        Where it reads, with what was summed up there.
    dim
        Of the weight: the one that is summed over.
    place, constant
        What can take up a constant of every output: the kind, and the tensor's name.
    """

    site: Site
    dim: int
    place: Place
    constant: str

    @property
    def tensor(self) -> str:
        """Name of the weight."""
        return self.site.tensor


def find_consumers(
    graph: CouplingGraph,
    model: nn.Module,
    sites: Sequence[Site],
    *,
    new_biases: bool,
) -> tuple[list[Consumer], dict[str, str]]:
    """The weights that can be changed, and why the others can't, by name."""
    flow = Dataflow(graph.program)
    modules = dict(model.named_modules(remove_duplicate=False))
    found: list[Consumer] = []
    left: dict[str, str] = {}
    several = [site.tensor for site in sites]
    for site in sites:
        name = site.tensor
        others = [name_of(node) for node in flow.uses(name) if not contracts(node)] if name else []
        if not name:
            left[site.module or "the model"] = "its weight is computed from other tensors"
        elif others:
            left[name] = f"{others[0]} reads the weight as well"
        elif several.count(name) > 1:
            left[name] = "it is read in several ways"
        elif site.dim is None:
            left[name] = "it is no whole matrix or convolution"
        else:
            place, constant = _find_place(graph, modules, flow, name, new_biases=new_biases)
            found.append(Consumer(site, site.dim, place, constant))
    return found, left


def new_biases_of(consumers: Iterable[Consumer]) -> dict[str, int]:
    """The biases that have to be made for some weights, and their dims of the weight."""
    return {
        consumer.constant: 1 if consumer.site.window.transposed else 0
        for consumer in consumers
        if consumer.place == "new bias"
    }


def find_changed(graph: CouplingGraph, kept: Mask) -> tuple[set[str], dict[str, int]]:
    """Weights that read values that a plan changes, and batch norms behind such weights.

    Those are values on which units go, and what is made of such values.  The batch norms are there
    by the names of their running means, with the number of the operator.
    """
    flow = Dataflow(graph.program)
    products = {node: product for node, _, product in flow.products() if product is not None}
    behind: dict[int, bool] = {}  # by memory: whether a changed value comes from such a weight
    weights: set[str] = set()
    norms: dict[str, int] = {}

    def loses(value: int) -> bool:
        if value in flow.fixed:  # a weight that loses rows gives the others as before
            return False
        labels = (graph.program.label(label) for label in graph.program.labels[value])
        return any(label is not None and not kept[label].all() for label in labels)

    for place, node in enumerate(graph.program.nodes):
        read = read_by(node)
        known = [behind[flow.root(value)] for value in read if flow.root(value) in behind]
        if not known and not any(map(loses, read)):
            continue
        fitted = any(known)
        for ref in refs_in(node.args.get("running_mean")) if fitted else ():
            norms.setdefault(flow.names.get(ref.value, ""), place)
        product = products.get(node)
        if product is not None and product.name:
            weights.add(product.name)
            fitted = True
        for value in node.outputs:
            root = flow.root(value)
            behind[root] = fitted or behind.get(root, False)
    return weights, norms


def _find_place(
    graph: CouplingGraph,
    modules: Mapping[str, nn.Module],
    flow: Dataflow,
    name: str,
    *,
    new_biases: bool,
) -> tuple[Place, str]:
    """What can take up a constant behind a weight."""
    prefix, _, own = name.rpartition(".")
    module, bias = modules[prefix], own.replace("weight", "bias")
    tied = [alias for alias, first in graph.aliases.items() if first == name]
    if len({modules[alias.rpartition(".")[0]] for alias in (name, *tied)}) > 1:
        return "", ""  # two layers share the weight, and may have a bias each
    full = f"{prefix}.{bias}" if prefix else bias
    if bias != own and isinstance(stored := module._parameters.get(bias), Tensor):
        alone = len(flow.uses(full)) == len(flow.uses(name)) and full not in graph.aliases
        return ("bias", full) if alone and stored.dim() == 1 else ("", "")
    if norm := _norm_behind(flow, name):
        return "running mean", norm
    takes = new_biases and not tied and _takes_bias(module, bias)
    return ("new bias", full) if takes else ("", "")


def _takes_bias(module: nn.Module, name: str) -> bool:
    """Whether a module that has no bias runs with one of that name."""
    standard = any(type(module).forward is kind.forward for kind in _STANDARD)
    return standard and name == "bias" and getattr(module, "groups", 1) == 1


def _norm_behind(flow: Dataflow, weight: str) -> str:
    """The running mean of the batch norm that alone reads what a weight gives; or nothing."""
    made = [number for node in flow.uses(weight) for number in node.outputs]
    behind = [node for number in made for node in flow.readers.get(number, ())]
    if len(made) != 1 or len(behind) != 1 or made[0] in flow.program.outputs.values():
        return ""
    (norm,), (number,) = behind, made
    means = [ref.value for ref in refs_in(norm.args.get("running_mean"))]
    if norm.args.get("input") != Ref(number) or len(means) != 1:
        return ""
    name = flow.program.state.get(means[0], "")
    return name if flow.uses(name) == behind else ""
