"""``prunus verify``: does a model, cut by a plan, compute what the masked original computes?"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from prunus.cli import flags, shrink
from prunus.cli.answer import answer, follow, head
from prunus.cli.values import FILES

if TYPE_CHECKING:
    from prunus import Plan
    from prunus.cli.models import Loaded
    from prunus.verifier import Certificate

_FIX = "plan anew, and leave groups out with --exclude"


def add_parser(verbs: Any) -> None:
    """Declare the verb."""
    text = "does a model, cut by a plan, compute what the masked original computes?"
    parser = flags.add_parser(verbs, "verify", text, run, flags.MODEL_HELP)
    flags.add_plan(parser)
    flags.add_model(parser)
    flags.add_files(parser, {"certificate": FILES["certificate"]})


def run(options: argparse.Namespace) -> int:
    """Verify a plan on a copy of the model, and print the verdict."""
    from prunus.cli.models import load_model
    from prunus.report.console import write_json

    with follow(options) as step:
        step("building the model")
        loaded = load_model(options)
        plan = read_plan(options, loaded)
        step("verifying")
        certificate = verify(plan, loaded, options)
    document = {
        **head(options),
        "plan": str(options.plan_file),
        "certificate": certificate.to_json(),
    }
    if options.certificate:
        write_json(document["certificate"], options.certificate)
    answer(options, document, lambda: shrink.show_certificate(certificate, _FIX))
    return shrink.exit_code(plan, certificate)


def read_plan(options: argparse.Namespace, loaded: Loaded) -> Plan:
    """A plan from a file; :class:`~prunus.errors.PlanError` if it is for another model."""
    from prunus import Plan
    from prunus.graph.program import state_of
    from prunus.surgeon.apply import check_model

    plan = Plan.load(options.plan_file)
    check_model(plan, loaded.model, state_of(loaded.model)[0])
    return plan


def verify(plan: Plan, loaded: Loaded, options: argparse.Namespace) -> Certificate:
    """Compare on a copy of the model."""
    import prunus

    return prunus.verify(
        plan,
        loaded.model,
        loaded.args,
        loaded.kwargs,
        outputs=options.outputs,
        seed=options.seed,
    )
