"""``prunus sensitivity``: how much a metric falls when one group after the other loses units."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from prunus.cli import options as shared
from prunus.cli import values

if TYPE_CHECKING:
    from prunus.planner.search import Sensitivity

METRIC_HELP = """\
The metric is a function in a file of yours, path/to/file.py:F: F(model) returns a number of which
more is better, for the model as it is and for masked ones, the same each time.
"""


def add_parser(verbs: Any) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "sensitivity",
        help="how much a metric falls when one group after the other loses units",
        description=__doc__.partition(": ")[2],
        epilog=f"{METRIC_HELP}\n{shared.MODEL_HELP}\n{shared.DATA_HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shared.add_model_options(parser)
    parser.add_argument(
        "--metric", metavar="FILE:FUNCTION", required=True, help="of a model, more is better"
    )
    parser.add_argument(
        "--at", metavar="R,R,…", type=values.numbers, help="ratios (default: 0.1,0.2,…,0.9)"
    )
    parser.add_argument(
        "--tolerance", metavar="R", type=float, help="search what loses at most this of the metric"
    )
    shared.add_importance(parser)
    shared.add_group_globs(parser)
    shared.add_data_options(parser)
    files = [
        ("out", "the table, as JSON, after each cell; what is there already is not done again"),
        ("picture", "the heat map (the extra 'plot')"),
    ]
    shared.add_files(parser, files)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Trace, measure, and show the table."""
    import prunus
    from prunus.cli.data import load_data
    from prunus.cli.models import load_model
    from prunus.cli.plan import collect
    from prunus.cli.python_file import find_function
    from prunus.errors import DataError, require

    if options.picture:
        require("matplotlib", "plot")
    metric: Any = find_function(options.metric, DataError, "write path/to/file.py:FUNCTION")
    given = {} if options.at is None else {"ratios": options.at}
    with shared.follow(options, 4) as step:
        step("building the model")
        loaded = load_model(options)
        data = load_data(options, loaded)
        step("tracing")
        graph = prunus.trace(loaded.model, loaded.args, loaded.kwargs, outputs=options.outputs)
        step("measuring")
        table = prunus.planner.search.sensitivity(
            graph,
            loaded.model,
            metric,
            tolerance=options.tolerance,
            importance=options.importance,
            statistics=collect(loaded, graph, data, options, step),
            include=options.include,
            exclude=options.exclude,
            path=options.out,
            progress=lambda told: step(f"measuring: {told}", same=True),
            seed=options.seed,
            **given,
        )
        step("writing")
        if options.picture:
            prunus.report.draw_sensitivity(table, options.picture)
    _answer(options, table)
    return 0


def _answer(options: argparse.Namespace, table: Sensitivity) -> None:
    from prunus.report.console import show
    from prunus.report.tables import sensitivity_table

    written = {n: str(getattr(options, n)) for n in ("out", "picture") if getattr(options, n)}
    document = {
        **shared.head(options),
        "dense": table.dense,
        "ratios": list(table.ratios),
        "tolerance": table.tolerance,
        "tolerated": dict(table.tolerated),
        "groups": [
            {"name": name, "units": size, "metric": [table.value(name, r) for r in table.ratios]}
            for name, size in table.sizes.items()
        ],
        "files": written,
    }

    def tell() -> None:
        show(sensitivity_table(table), f"The whole model: {table.dense:.6g}")
        show(*(f"wrote {name}: {path}" for name, path in written.items()))

    shared.answer(options, document, tell)
