"""``prunus shrink``: make a model smaller under a budget, and prove the cut."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from prunus.cli import NOT_PROVEN
from prunus.cli import options as shared

if TYPE_CHECKING:
    from prunus import Certificate, CouplingGraph, Plan
    from prunus.cli.models import Loaded


def add_parser(verbs: Any) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "shrink",
        help="make a model smaller under a budget, and prove the cut",
        description=__doc__.partition(": ")[2],
        epilog=shared.MODEL_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shared.add_model_options(parser)
    _add_choice(parser.add_argument_group("what to remove"))
    files = parser.add_argument_group("files to write")
    for name, text in (
        ("out", "the smaller model's weights, as safetensors"),
        ("plan", "which units stay, as JSON"),
        ("certificate", "what was compared, and the verdict, as JSON"),
        ("report", "all of it in one JSON document, the same that --json prints"),
        ("picture", "the units that stay and go, as PNG (the extra 'plot')"),
    ):
        files.add_argument(f"--{name}", metavar="FILE", type=shared.new_file, help=text)
    parser.add_argument(
        "--data",
        metavar="DATA",
        help="calibration batches for batch norms: file.py:FUNCTION, which returns an iterable of "
        "them, or an .npz file with the array 'inputs'",
    )
    parser.add_argument("--no-verify", action="store_true", help="don't prove the cut")
    parser.set_defaults(run=run)


def _add_choice(group: Any) -> None:
    text = "upper bound: a fraction of the dense cost, as 0.5, or a number, as 2000000"
    group.add_argument("--macs", metavar="N", type=_bound, help=text)
    group.add_argument("--params", metavar="N", type=_bound, help=text)
    group.add_argument(
        "--from-plan", metavar="FILE", type=shared.old_file, help="apply this plan, choose nothing"
    )
    group.add_argument(
        "--importance", default="l2", metavar="NAME", help="score of a unit (default: l2)"
    )
    group.add_argument(
        "--scope",
        default="local",
        choices=("local", "isomorphic", "global"),
        help="which units compete: those of one group, of groups of one shape, all "
        "(default: local)",
    )
    group.add_argument(
        "--round-to", default=1, metavar="N", type=shared.count, help="widths are multiples of it"
    )
    group.add_argument(
        "--min-width", default=1, metavar="N", type=shared.count, help="units every group keeps"
    )
    group.add_argument(
        "--max-ratio",
        default=1.0,
        metavar="R",
        type=shared.ratio,
        help="the largest share of its units that a group may lose",
    )
    text = "groups, by globs over their names and those of their tensors; may be repeated"
    group.add_argument("--include", metavar="GLOB", action="append", help=f"only these {text}")
    group.add_argument(
        "--exclude", metavar="GLOB", action="append", default=[], help=f"not these {text}"
    )


def run(options: argparse.Namespace) -> int:
    """Trace, plan, prove, cut, recalibrate; write what was asked for; print the outcome."""
    from prunus.cli.models import load_data, load_model
    from prunus.errors import PlanError
    from prunus.plans import Plan
    from prunus.report.console import follow_steps, show_json
    from prunus.tracer.program import state_of

    bounds = {n: v for n in ("macs", "params") if (v := getattr(options, n)) is not None}
    if bool(bounds) == bool(options.from_plan):
        raise PlanError(
            "give a budget, --macs or --params, or a plan, --from-plan, but not both",
            fix="--macs 0.5, say",
        )
    with follow_steps(8) as step:
        step("building the model")
        loaded = load_model(options)
        data = None if options.data is None else load_data(options.data)
        given = None
        if options.from_plan:
            given = Plan.load(options.from_plan)
            state, _ = state_of(loaded.model)
            given.check_model({name: tuple(tensor.shape) for name, tensor in state.items()})
        document, plan, certificate = _shrink(loaded, options, bounds, given, data, step)
        step("writing")
        proven = _is_proven(plan, certificate)
        files = _write(document, loaded, plan, certificate, options)
    if options.json:
        show_json(document)
    else:
        _show(document, plan, certificate, files)
    return 0 if proven else NOT_PROVEN


def _shrink(
    loaded: Loaded,
    options: argparse.Namespace,
    bounds: dict[str, float | int],
    given: Plan | None,
    data: Any,
    step: Callable[..., None],
) -> tuple[dict[str, Any], Plan, Certificate | None]:
    """Everything but the files: the report, the plan, the proof; the model is changed in place."""
    import prunus
    from prunus.report.documents import describe_choices

    model, args, kwargs = loaded.model, loaded.args, loaded.kwargs
    step("counting")
    stages = [{"name": "dense", **prunus.measure_costs(model, args, kwargs)}]
    if given is None:
        step("tracing")
        graph = prunus.trace(model, args, kwargs, outputs=options.outputs)
        step("planning")
        plan = _choose(graph, loaded, options, bounds)
    else:
        plan = given
    certificate = None
    if not options.no_verify:
        step("proving")
        certificate = prunus.verify(
            plan, model, args, kwargs, outputs=options.outputs, seed=options.seed
        )
    if certificate is None or certificate.verdict != "inexact":
        step("cutting")
        prunus.apply(plan, model)
        if data is not None:
            step("recalibrating")
            prunus.recalibrate(
                model, data, progress=lambda n: step(f"recalibrating: {n} batches", same=True)
            )
        stages.append({"name": "pruned", **prunus.measure_costs(model, args, kwargs)})
    document = {
        "command": options.command,
        "versions": shared.versions(),
        "model": options.model,
        "seed": options.seed,
        "budget": bounds,
        "recalibrated": data is not None and len(stages) == 2,
        "costs": {name: list(pair) for name, pair in sorted(plan.costs.items())},
        "stages": stages,
        "groups": describe_choices(plan),
        "certificate": None if certificate is None else certificate.to_json(),
    }
    return document, plan, certificate


def _choose(
    graph: CouplingGraph,
    loaded: Loaded,
    options: argparse.Namespace,
    bounds: dict[str, float | int],
) -> Plan:
    import prunus

    return prunus.plan(
        graph,
        loaded.model,
        budget=prunus.Budget(**bounds),
        importance=options.importance,
        scope=options.scope,
        min_width=options.min_width,
        max_ratio=options.max_ratio,
        round_to=options.round_to,
        include=options.include,
        exclude=options.exclude,
        seed=options.seed,
    )


def _is_proven(plan: Plan, certificate: Certificate | None) -> bool:
    """Whether the exit code is 0; who asked for no proof, or removed nothing, needs none."""
    if certificate is None or certificate.verdict == "exact":
        return True
    return certificate.verdict == "not verified" and not plan.keep


def _write(
    document: dict[str, Any],
    loaded: Loaded,
    plan: Plan,
    certificate: Certificate | None,
    options: argparse.Namespace,
) -> dict[str, str]:
    """Write the files that were asked for; weights only of a model that was cut."""
    from prunus.cli.weights import save_weights
    from prunus.report.documents import write_json
    from prunus.report.pictures import draw_channels

    written: dict[str, str] = {}
    document["files"] = written
    if options.out and len(document["stages"]) == 2:
        save_weights(loaded.model, options.out)
        written["out"] = str(options.out)
    if options.plan:
        plan.save(options.plan)
        written["plan"] = str(options.plan)
    if options.certificate and certificate is not None:
        write_json(certificate.to_json(), options.certificate)
        written["certificate"] = str(options.certificate)
    if options.picture:
        draw_channels(plan, options.picture, title=options.model)
        written["picture"] = str(options.picture)
    if options.report:
        written["report"] = str(options.report)
        write_json(document, options.report)
    return written


def _show(
    document: dict[str, Any], plan: Plan, certificate: Certificate | None, files: dict[str, str]
) -> None:
    from prunus.report.console import show, show_stages, warn
    from prunus.report.tables import choices_table, spell_places

    show_stages(document["stages"])
    show(choices_table(plan))
    if certificate is None:
        show("Not proven: --no-verify was given.")
    elif certificate.verdict == "inexact":
        why = certificate.reason or f"the outputs differ by {certificate.rel_err:.1e}"
        warn(
            "prunus: the smaller model would not compute what the masked original computes\n"
            f"  why:   {why}\n"
            "  fix:   no weights were written; leave groups out with --exclude"
        )
    else:
        show(
            f"Proof: {certificate.verdict}. Pruned and masked outputs differ by "
            f"{certificate.rel_err:.1e}; the removal moved them by {certificate.moved:.1e}."
        )
        if certificate.unverified:
            show(f"Nothing is proven of: {spell_places(certificate.unverified)}")
    if document["recalibrated"]:
        show("Batch norms were measured again on the calibration data.")
    for name, path in files.items():
        show(f"wrote {name}: {path}")


def _bound(text: str) -> float | int:
    """Read a bound, and let the budget itself say whether it is one."""
    from prunus.budget import Budget
    from prunus.errors import BudgetError

    try:
        value = int(text) if text.isascii() and text.isdigit() else float(text)
        Budget(macs=value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
    except BudgetError as error:
        raise argparse.ArgumentTypeError(f"{text} is no budget: {error.why}; {error.fix}") from None
    return value
