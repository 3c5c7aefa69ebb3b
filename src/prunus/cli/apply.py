"""``prunus apply``: cut a model by a plan that was made before, and verify the cut."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from prunus.cli import cutting, flags
from prunus.cli.answer import follow
from prunus.cli.values import old_file

if TYPE_CHECKING:
    from prunus import Plan
    from prunus.cli.models import Loaded
    from prunus.verifier import Certificate


def add_parser(verbs: Any) -> None:
    """Declare the verb."""
    text = "cut a model by a plan that was made before, and verify the cut"
    epilog = f"{flags.MODEL_HELP}\n{flags.DATA_HELP}"
    parser = flags.add_parser(verbs, "apply", text, epilog)
    parser.add_argument("plan_file", metavar="PLAN", type=old_file, help="what 'prunus plan' wrote")
    flags.add_model(parser)
    flags.add_cut(parser, "plan")
    parser.set_defaults(run=run, plan=None)


def run(options: argparse.Namespace) -> int:
    """Read the plan, verify, cut, recover; write what was asked for; print the outcome."""
    from prunus.cli.data import load_data
    from prunus.cli.models import load_model

    cutting.check(options)
    with follow(options) as step:
        step("building the model")
        loaded = load_model(options)
        data = load_data(options, loaded)
        plan = cutting.read_plan(options.plan_file, loaded.model)
        outcome = _cut(loaded, plan, data, options, step)
        step("writing")
        cutting.write(outcome, options)
    return cutting.finish(outcome, options)


def _cut(
    loaded: Loaded,
    plan: Plan,
    data: Any,
    options: argparse.Namespace,
    step: Callable[..., None],
) -> cutting.Outcome:
    """Verify on a copy; if that does not fail, cut the model in place and recover."""
    import prunus
    from prunus.recovery import Step, cut_and_recover

    model = loaded.model
    step("counting")
    stages = [cutting.measure(loaded, "dense")]
    certificate: Certificate | None = None
    recovery: tuple[Step, ...] = ()
    if not options.no_verify:
        step("verifying")
        certificate = prunus.verify(
            plan, model, loaded.args, loaded.kwargs, outputs=options.outputs, seed=options.seed
        )
    if certificate is None or certificate.verdict != "inexact":
        step("cutting")
        graph = None
        if data is not None and not plan.drops:
            graph = prunus.trace(model, loaded.args, loaded.kwargs, outputs=options.outputs)
        plan, recovery = cut_and_recover(
            *(model, plan, graph, data),
            method=options.recover,
            seed=options.seed,
        )
        stages.append(cutting.measure(loaded, "pruned"))
    document = cutting.describe(options, plan, certificate, stages, recovery)
    return cutting.Outcome(model, plan, certificate, document)
