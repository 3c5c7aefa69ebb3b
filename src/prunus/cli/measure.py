"""``prunus measure``: what the operators of a model take on this machine, for latency budgets."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from prunus.cli import options as shared

if TYPE_CHECKING:
    from prunus import CouplingGraph
    from prunus.cli.models import Loaded
    from prunus.latency import LatencyTable


def add_parser(verbs: Any) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "measure",
        help="time the operators of a model on this machine, for latency budgets",
        description=__doc__.partition(": ")[2],
        epilog=shared.MODEL_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shared.add_model_options(parser)
    shared.add_backend(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Trace, measure what the cache lacks, and print the operators by their time."""
    import prunus
    from prunus.cli.models import load_model
    from prunus.report.console import show
    from prunus.report.documents import describe_latency
    from prunus.report.tables import latency_table

    with shared.follow(options, 3) as step:
        step("building the model")
        loaded = load_model(options)
        step("tracing")
        graph = prunus.trace(loaded.model, loaded.args, loaded.kwargs, outputs=options.outputs)
        table = measure(loaded, graph, options, step)
    found = describe_latency(table, graph)

    def tell() -> None:
        show(latency_table(found))
        show(
            f"{found['backend']}: {found['dense_ms']:.4g} ms for the example inputs, of which "
            f"{found['fixed_ms']:.4g} ms are the same at any width. Time steps at multiples of "
            f"{found['step']}."
        )
        show(*(f"Not measured: {why}" for why in found["unmeasured"]))

    shared.answer(options, {**shared.head(options), **found}, tell)
    return 0


def measure(
    loaded: Loaded,
    graph: CouplingGraph,
    options: argparse.Namespace,
    step: Callable[..., None],
) -> LatencyTable:
    """The latency table of a model on the backend of the options."""
    import prunus

    step("measuring")

    def count(done: int, whole: int) -> None:
        step(f"measuring: {done} of {whole} operators", same=True)

    return prunus.latency.measure(
        loaded.model,
        loaded.args,
        loaded.kwargs,
        backend=options.backend,
        graph=graph,
        progress=count,
    )
