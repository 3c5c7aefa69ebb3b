"""``prunus verify``: does a model, cut by a plan, compute what the masked original computes?"""

from __future__ import annotations

import argparse
from typing import Any

from prunus.cli import cutting, flags
from prunus.cli.answer import answer, follow, head
from prunus.cli.values import old_file

_FIX = "plan anew, and leave groups out with --exclude"


def add_parser(verbs: Any) -> None:
    """Declare the verb."""
    text = "does a model, cut by a plan, compute what the masked original computes?"
    parser = flags.add_parser(verbs, "verify", text, flags.MODEL_HELP)
    parser.add_argument("plan_file", metavar="PLAN", type=old_file, help="what 'prunus plan' wrote")
    flags.add_model(parser)
    flags.add_files(parser, {"certificate": "what was compared, and the verdict, as JSON"})
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Verify a plan on a copy of the model, and print the verdict."""
    import prunus
    from prunus.cli.models import load_model
    from prunus.report.documents import write_json

    with follow(options) as step:
        step("building the model")
        loaded = load_model(options)
        plan = cutting.read_plan(options.plan_file, loaded.model)
        step("verifying")
        certificate = prunus.verify(
            plan,
            loaded.model,
            loaded.args,
            loaded.kwargs,
            outputs=options.outputs,
            seed=options.seed,
        )
    document = {
        **head(options),
        "plan": str(options.plan_file),
        "certificate": certificate.to_json(),
    }
    if options.certificate:
        write_json(certificate.to_json(), options.certificate)
    answer(options, document, lambda: cutting.show_certificate(certificate, _FIX))
    return cutting.exit_code(plan, certificate)
