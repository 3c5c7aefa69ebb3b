"""``prunus diff``: what two plans for one model remove differently, and what they cost."""

from __future__ import annotations

import argparse
from typing import Any

from prunus.cli import flags
from prunus.cli.answer import answer, head
from prunus.cli.values import old_file


def add_parser(verbs: Any) -> None:
    """Declare the verb."""
    text = "compare two plans for one model: costs, widths, units"
    parser = flags.add_parser(verbs, "diff", text)
    for name in ("a", "b"):
        parser.add_argument(
            name, metavar=name.upper(), type=old_file, help="what 'prunus plan' wrote"
        )
    flags.add_answer(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Read both plans and compare them; nothing is traced."""
    from prunus.graph.plans import Plan
    from prunus.report.console import show
    from prunus.report.documents import describe_diff
    from prunus.report.tables import diff_tables

    diff = Plan.load(options.a).diff(Plan.load(options.b))
    document = {
        **head(options),
        "files": {"a": str(options.a), "b": str(options.b)},
        **describe_diff(diff),
    }

    def tell() -> None:
        if not diff:
            show(str(diff).capitalize() + ".")
            return
        show(*diff_tables(diff))
        for side, names in (("a", diff.only_a), ("b", diff.only_b)):
            if names:
                show(f"Only {side} drops {', '.join(names)}.")

    answer(options, document, tell)
    return 0
