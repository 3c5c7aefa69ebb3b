"""Weights that read units: which can be changed, and what can take up a constant behind them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from prunus.calibration.activations import Site, origins_of
from prunus.calibration.readings import contracted_dim
from prunus.graph.coupling import CouplingGraph
from prunus.graph.program import Node, Program, refs_in

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
    sites: tuple[Site, ...],
    *,
    new_biases: bool,
) -> tuple[list[Consumer], dict[str, str]]:
    """The weights that can be changed, and why the others can't, by name."""
    program: Program = graph.program
    uses = _uses(program)
    modules = dict(model.named_modules(remove_duplicate=False))
    found: list[Consumer] = []
    left: dict[str, str] = {}
    several = [site.tensor for site in sites]
    for site in sites:
        name = site.tensor
        if not name:
            left[site.module or "the model"] = "its weight is computed from other tensors"
            continue
        others = [node for node in uses.get(name, ()) if not _contracts(node)]
        dim = contracted_dim(graph, site.tensor, site.label, site.window)
        if others:
            left[name] = f"{others[0].target._schema.name} reads the weight as well"
        elif several.count(name) > 1:
            left[name] = "it is read in several ways"
        elif site.moments is None or dim is None:
            left[name] = "it is no whole matrix or convolution"
        else:
            place, constant = _find_place(graph, modules, uses, name, new_biases=new_biases)
            found.append(Consumer(site, dim, place, constant))
    return found, left


def new_biases_of(consumers: Iterable[Consumer]) -> dict[str, int]:
    """The biases that have to be made for some weights, and their dims of the weight."""
    return {
        consumer.constant: 1 if consumer.site.window.transposed else 0
        for consumer in consumers
        if consumer.place == "new bias"
    }


def _contracts(node: Node) -> bool:
    return node.effect is not None and bool(node.effect.contracted)


def _uses(program: Program) -> dict[str, list[Node]]:
    """The operators that read a named tensor, or a view of it; views are none."""
    origins = origins_of(program)
    found: dict[str, list[Node]] = {}
    for node in program.nodes:
        if node.outputs and all(number in origins for number in node.outputs):
            continue
        for name in dict.fromkeys(_names(node, origins)):
            found.setdefault(name, []).append(node)
    return found


def _names(node: Node, origins: Mapping[int, str]) -> Iterator[str]:
    for ref in refs_in(node.args):
        if ref.value in origins:
            yield origins[ref.value]


def _find_place(
    graph: CouplingGraph,
    modules: Mapping[str, nn.Module],
    uses: Mapping[str, list[Node]],
    name: str,
    *,
    new_biases: bool,
) -> tuple[Place, str]:
    """What can take up a constant behind a weight."""
    prefix, _, own = name.rpartition(".")
    module = modules[prefix]
    tied = [modules[alias.rpartition(".")[0]] for alias, first in graph.aliases.items()
            if first == name]  # fmt: skip
    if any(other is not module for other in tied):
        return "", ""  # two layers share the weight, and may have a bias each
    bias = own.replace("weight", "bias")
    full = f"{prefix}.{bias}" if prefix else bias
    stored: Tensor | None = module._parameters.get(bias) if bias != own else None
    first = graph.aliases.get(full, full)
    if stored is not None:
        alone = len(uses.get(first, ())) == len(uses[name]) and stored.dim() == 1
        return ("bias", first) if alone and first == full else ("", "")
    norm = _norm_behind(graph.program, uses[name])
    if norm:
        return "running mean", norm
    standard = any(type(module).forward is kind.forward for kind in _STANDARD)
    plain = standard and bias == "bias" and getattr(module, "groups", 1) == 1
    if new_biases and plain and not tied:
        return "new bias", full
    return "", ""


def _norm_behind(program: Program, readers: list[Node]) -> str:
    """The running mean of the batch norm that alone reads what a weight gives; or nothing."""
    if len(readers) != 1 or len(readers[0].outputs) != 1:
        return ""
    (number,) = readers[0].outputs
    behind = [
        node for node in program.nodes if any(ref.value == number for ref in refs_in(node.args))
    ]
    if len(behind) != 1 or number in program.outputs.values():
        return ""
    arguments = behind[0].args
    if "batch_norm" not in behind[0].target._schema.name or arguments["input"].value != number:
        return ""
    mean = arguments.get("running_mean")
    refs = refs_in(mean)
    name = program.state.get(refs[0].value, "") if refs else ""
    shared = [n for n in program.nodes if n is not behind[0] and name in _names(n, program.state)]
    return "" if shared else name
