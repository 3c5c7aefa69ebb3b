"""``prunus shrink``: make a model smaller under a budget, and prove the cut."""

from __future__ import annotations

import argparse
from typing import Any

from prunus.cli import cutting
from prunus.cli import options as shared
from prunus.cli.bounds import budget_of
from prunus.cli.by_table import check_alone, ratios_by_table
from prunus.cli.plan import choice_of, collect


def add_parser(verbs: Any) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "shrink",
        help="make a model smaller under a budget, and prove the cut",
        description=__doc__.partition(": ")[2],
        epilog=f"{shared.MODEL_HELP}\n{shared.DATA_HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shared.add_model_options(parser)
    shared.add_choice_options(parser)
    shared.add_files(parser, cutting.FILES)
    shared.add_data_options(parser)
    cutting.add_recovery(parser)
    parser.add_argument("--no-verify", action="store_true", help="don't prove the cut")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Trace, plan, prove, cut, recover; write what was asked for; print the outcome."""
    import prunus
    from prunus.cli.data import load_data
    from prunus.cli.models import load_model
    from prunus.importance import needs_of

    check_alone(options)
    budget = budget_of(options)
    cutting.check(options)
    with shared.follow(options, 5) as step:
        step("building the model")
        loaded = load_model(options)
        data = load_data(options, loaded)
        step("counting")
        stages = [cutting.measure(loaded, "dense")]
        chosen = choice_of(options)
        read: dict[str, Any] = {}
        needs = needs_of(options.importance)
        by_table = options.sensitivity is not None
        if not options.drop and (needs or by_table):
            graph = prunus.trace(loaded.model, loaded.args, loaded.kwargs, outputs=options.outputs)
            read["statistics"] = collect(loaded, graph, data, options, step)
            if by_table:
                chosen["ratios"] = ratios_by_table(options, graph, loaded.model, read["statistics"])
        step("planning and cutting" if options.no_verify else "planning, proving and cutting")
        small = prunus.shrink(
            loaded.model,
            loaded.args,
            loaded.kwargs,
            outputs=options.outputs,
            verified=not options.no_verify,
            data=data,
            recover=options.recover,
            progress=cutting.telling(step),
            **read,
            **chosen,
        )
        stages.append(cutting.measure(loaded, "pruned"))
        document = cutting.describe(options, small.plan, small.certificate, stages, small.recovery)
        document.update(budget=None if budget is None else budget.requested, held=dict(small.held))
        outcome = cutting.Outcome(loaded.model, small.plan, small.certificate, document)
        step("writing")
        cutting.write(outcome, options)
    return cutting.finish(outcome, options)
