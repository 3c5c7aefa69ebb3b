"""``prunus verify``: does a model, cut by a plan, compute what the masked original computes?"""

from __future__ import annotations

import argparse
from typing import Any

from prunus.cli import cutting, values
from prunus.cli import options as shared

_FIX = "plan anew, and leave groups out with --exclude"


def add_parser(verbs: Any) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "verify",
        help="prove that a model cut by a plan computes what the masked original computes",
        description=__doc__.partition(": ")[2],
        epilog=shared.MODEL_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "plan_file", metavar="PLAN", type=values.old_file, help="what 'prunus plan' wrote"
    )
    shared.add_model_options(parser)
    shared.add_files(parser, [("certificate", "what was compared, and the verdict, as JSON")])
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prove on a copy, print the verdict."""
    import prunus
    from prunus.cli.models import load_model
    from prunus.report.documents import write_json

    with shared.follow(options, 2) as step:
        step("building the model")
        loaded = load_model(options)
        plan = cutting.read_plan(options.plan_file, loaded.model)
        step("proving")
        certificate = prunus.verify(
            plan,
            loaded.model,
            loaded.args,
            loaded.kwargs,
            outputs=options.outputs,
            seed=options.seed,
        )
    document = {
        **shared.head(options),
        "plan": str(options.plan_file),
        "certificate": certificate.to_json(),
    }
    if options.certificate:
        write_json(certificate.to_json(), options.certificate)
    shared.answer(options, document, lambda: cutting.show_certificate(certificate, _FIX))
    return cutting.exit_code(plan, certificate)
