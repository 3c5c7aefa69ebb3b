"""``prunus inspect``: what hangs together in a model, what is pinned and why, what it costs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from prunus.cli import flags
from prunus.cli.answer import answer, follow, head
from prunus.cli.values import new_file
from prunus.errors import first_names

if TYPE_CHECKING:
    from prunus.graph.coupling import CouplingGraph


def add_parser(verbs: Any) -> None:
    """Declare the verb."""
    text = "what hangs together in a model, what is pinned and why, what it costs"
    parser = flags.add_parser(verbs, "inspect", text, run, flags.MODEL_HELP)
    flags.add_model(parser)
    parser.add_argument(
        "--explain",
        nargs=2,
        metavar="AXIS",
        help="the shortest chain of operators that ties two axes, as conv1.weight[0]",
    )
    parser.add_argument("--why-pinned", metavar="AXIS", help="every pin that reaches an axis")
    parser.add_argument(
        "--dot", metavar="FILE", type=new_file, help="write the graph in the DOT language"
    )


def run(options: argparse.Namespace) -> int:
    """Trace the model and print what was found."""
    from prunus.cli.models import load_model
    from prunus.files import replace_file
    from prunus.report import tables
    from prunus.report.console import show

    with follow(options) as step:
        step("building the model")
        loaded = load_model(options)
        step("tracing")
        graph = loaded.trace(options)
    document = {**head(options), **tables.describe_graph(graph)}
    shown: list[Any] = []
    if options.explain:
        a, b = map(graph.axis, options.explain)
        chain = graph.explain(a, b)
        document["explain"] = [tables.describe_coupling(link) for link in chain]
        tied = [f"{a} and {b} are tied by {len(chain)} operators:", tables.chain_table(a, chain)]
        shown += tied if chain else [f"Nothing ties {a} and {b}."]
    if options.why_pinned:
        axis = graph.axis(options.why_pinned)
        pins = graph.why_pinned(axis)
        document["why_pinned"] = [tables.describe_pin(*pin) for pin in pins]
        pinned = [f"{axis} is pinned:", tables.pins_table(pins)]
        shown += pinned if pins else [f"All of {axis} can be pruned."]
    if options.dot:
        replace_file(options.dot, lambda draft: draft.write_text(graph.dot(), encoding="utf-8"))

    def tell() -> None:
        show(*(shown or _overview(graph, options.model)))
        if options.dot:
            show(f"wrote {options.dot}")

    answer(options, document, tell)
    return 0


def _overview(graph: CouplingGraph, name: str) -> list[Any]:
    from prunus.graph.plan_records import spell_count
    from prunus.report import tables

    structures = tables.structures_table(graph)
    how = "Removed by name: --heads 0.3 --ffn 25% --layers 2, or remove={'heads': 0.3, …}."
    costs = (f"{spell_count(graph.cost(c))} {c}" for c in sorted(graph.costs, reverse=True))
    shown: list[Any] = [
        f"{name}: {', '.join(costs)} for the example inputs",
        f"{graph.unit_count:,} units in {len(graph.groups)} groups; "
        f"kept outputs: {first_names(graph.kept_outputs)}",
        "",
        *([] if structures is None else [structures, how, ""]),
        tables.groups_table(graph),
        tables.pins_table(graph.pins),
    ]
    if graph.unknown:
        shown.append("Operators without a rule; whatever they touch is pinned:")
        for operator, calls in sorted(graph.unknown.items()):
            namespace, _, rule = operator.removesuffix(".default").partition(".")
            rule = rule if namespace == "aten" else f"{namespace}::{rule}"
            shown.append(f"  {operator}, {calls} ×; its rule would begin with")
            shown.append(f'      @rule("{rule}")')
        shown.append("A rule is one function in a file of src/prunus/tracer/rules; see README.md.")
    return shown
