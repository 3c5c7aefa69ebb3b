"""``prunus apply``: cut a model by a plan that was made before, and verify the cut."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from prunus.cli import flags, shrink
from prunus.cli.answer import follow
from prunus.cli.verify import read_plan, verify

if TYPE_CHECKING:
    from prunus.recovery import Step


def add_parser(verbs: Any) -> None:
    """Declare the verb."""
    text = "cut a model by a plan that was made before, and verify the cut"
    parser = flags.add_parser(verbs, "apply", text, run, flags.MODEL_HELP, flags.DATA_HELP)
    flags.add_plan(parser)
    flags.add_model(parser)
    flags.add_cut(parser, "plan")
    parser.set_defaults(plan=None)


def run(options: argparse.Namespace) -> int:
    """Read the plan, verify on a copy, and unless that fails cut the model and recover."""
    from prunus.cli.data import load_data
    from prunus.cli.models import load_model
    from prunus.recovery import cut_and_recover

    shrink.check_picture(options)
    certificate = None
    recovery: tuple[Step, ...] = ()
    with follow(options) as step:
        step("building the model")
        loaded = load_model(options)
        data = load_data(options, loaded)
        plan = read_plan(options, loaded)
        step("counting")
        stages = [loaded.costs("dense")]
        if not options.no_verify:
            step("verifying")
            certificate = verify(plan, loaded, options)
        if certificate is None or certificate.verdict != "inexact":
            step("cutting")
            graph = loaded.trace(options) if data is not None and not plan.drops else None
            plan, recovery = cut_and_recover(
                *(loaded.model, plan, graph, data), method=options.recover, seed=options.seed
            )
            stages.append(loaded.costs("pruned"))
        document = shrink.describe(options, plan, certificate, stages, recovery)
        step("writing")
        shrink.write(options, loaded, plan, certificate, document)
    return shrink.finish(options, plan, certificate, document)
