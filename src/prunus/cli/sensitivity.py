"""``prunus sensitivity``: how much a metric falls when one group after the other loses units."""

from __future__ import annotations

import argparse
from typing import Any

from prunus.cli import flags
from prunus.cli.answer import answer, follow, head
from prunus.cli.values import numbers

METRIC_HELP = """\
The metric is a function in a file of yours, path/to/file.py:F: F(model) returns a number of which
more is better, for the model as it is and for masked ones, the same each time.
"""


def add_parser(verbs: Any) -> None:
    """Declare the verb."""
    text = "how much a metric falls when one group after the other loses units"
    epilog = (METRIC_HELP, flags.MODEL_HELP, flags.DATA_HELP)
    parser = flags.add_parser(verbs, "sensitivity", text, run, *epilog)
    flags.add_model(parser)
    parser.add_argument(
        "--metric", metavar="FILE:FUNCTION", required=True, help="of a model, more is better"
    )
    parser.add_argument(
        "--at", metavar="R,R,…", type=numbers, help="ratios (default: 0.1,0.2,…,0.9)"
    )
    parser.add_argument(
        "--tolerance", metavar="R", type=float, help="search what loses at most this of the metric"
    )
    flags.add_options(parser, "importance", "include", "exclude")
    flags.add_data(parser)
    files = {
        "out": "the table, as JSON, after each cell; what is there already is not done again",
        "picture": "the heat map (the extra 'plot')",
    }
    flags.add_files(parser, files)


def run(options: argparse.Namespace) -> int:
    """Trace, measure, and show the table."""
    import prunus
    from prunus.cli.data import load_data
    from prunus.cli.models import load_model
    from prunus.cli.python_file import find_function
    from prunus.cli.shrink import check_picture
    from prunus.errors import DataError
    from prunus.report.console import show
    from prunus.report.tables import sensitivity_table

    check_picture(options)
    metric: Any = find_function(options.metric, DataError, "write path/to/file.py:FUNCTION")
    given = {} if options.at is None else {"ratios": options.at}
    with follow(options) as step:
        step("building the model")
        loaded = load_model(options)
        data = load_data(options, loaded)
        step("tracing")
        graph = loaded.trace(options)
        step("measuring")
        table = prunus.planner.search.sensitivity(
            graph,
            loaded.model,
            metric,
            tolerance=options.tolerance,
            importance=options.importance,
            data=data,
            include=options.include,
            exclude=options.exclude,
            path=options.out,
            seed=options.seed,
            **given,
        )
        step("writing")
        if options.picture:
            prunus.report.draw_sensitivity(table, options.picture)
    written = {n: str(p) for n in ("out", "picture") if (p := getattr(options, n))}
    document = {
        **head(options),
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

    answer(options, document, tell)
    return 0
