"""``prunus shrink``: make a model smaller under a budget, and verify the cut."""

from __future__ import annotations

import argparse
from typing import Any

from prunus.cli import cutting, flags
from prunus.cli.answer import follow
from prunus.cli.plan import by_table, check_data


def add_parser(verbs: Any) -> None:
    """Declare the verb."""
    text = "make a model smaller under a budget, and verify the cut"
    epilog = f"{flags.MODEL_HELP}\n{flags.DATA_HELP}"
    parser = flags.add_parser(verbs, "shrink", text, epilog)
    flags.add_model(parser)
    flags.add_choice(parser)
    flags.add_cut(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Trace, plan, verify, cut, recover; write what was asked for; print the outcome."""
    import prunus
    from prunus.cli.data import load_data
    from prunus.cli.models import load_model

    chosen = flags.choice_of(options)
    budget = chosen["budget"]
    cutting.check(options)
    with follow(options) as step:
        step("building the model")
        loaded = load_model(options)
        chosen["data"] = load_data(options, loaded)
        check_data(options)
        step("counting")
        stages = [cutting.measure(loaded, "dense")]
        if options.sensitivity is not None:
            graph = prunus.trace(loaded.model, loaded.args, loaded.kwargs, outputs=options.outputs)
            chosen = by_table(options, chosen, loaded, graph)
        step("tracing")
        small = prunus.shrink(
            loaded.model,
            loaded.args,
            loaded.kwargs,
            outputs=options.outputs,
            verified=not options.no_verify,
            recover=options.recover,
            **chosen,
        )
        stages.append(cutting.measure(loaded, "pruned"))
        document = cutting.describe(options, small.plan, small.certificate, stages, small.recovery)
        document.update(budget=None if budget is None else budget.requested, held=dict(small.held))
        outcome = cutting.Outcome(loaded.model, small.plan, small.certificate, document)
        step("writing")
        cutting.write(outcome, options)
    return cutting.finish(outcome, options)
