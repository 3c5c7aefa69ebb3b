"""What ``shrink`` and ``apply`` have in common: what is written, and what is printed."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunus.cli import NOT_VERIFIED
from prunus.cli.answer import answer, head
from prunus.cli.plan import told_of, told_of_rounding, told_of_time
from prunus.errors import first_names, require

if TYPE_CHECKING:
    from torch import nn

    from prunus import Plan
    from prunus.cli.models import Loaded
    from prunus.recovery import Step
    from prunus.verifier import Certificate


@dataclass(frozen=True)
class Outcome:
    """The model, cut unless the verification failed; and what is printed of it."""

    model: nn.Module
    plan: Plan
    certificate: Certificate | None
    document: dict[str, Any]


def check(options: argparse.Namespace) -> None:
    """Refuse early what writing would refuse late, when other files are there already."""
    if options.picture:
        require("matplotlib.figure", "plot")


def read_plan(path: Path, model: nn.Module) -> Plan:
    """A plan from a file, for this model; :class:`~prunus.errors.PlanError` if it is another's."""
    from prunus import Plan
    from prunus.graph.program import state_of
    from prunus.surgeon.apply import check_model

    plan = Plan.load(path)
    check_model(plan, model, state_of(model)[0])
    return plan


def measure(loaded: Loaded, name: str) -> dict[str, Any]:
    """The costs of the model as it is now."""
    import prunus

    return {"name": name, **prunus.report.measure_costs(loaded.model, loaded.args, loaded.kwargs)}


def describe(
    options: argparse.Namespace,
    plan: Plan,
    certificate: Certificate | None,
    stages: list[dict[str, Any]],
    recovery: Sequence[Step],
) -> dict[str, Any]:
    """The report of a cut, as plain data."""
    from prunus.report.documents import describe_choices

    return {
        **head(options),
        "recovery": [
            {**asdict(step), "error": None if math.isnan(step.error) else step.error}
            for step in recovery
        ],
        "costs": {name: list(pair) for name, pair in sorted(plan.costs.items())},
        "stages": stages,
        "drops": list(plan.drops),
        "groups": describe_choices(plan),
        "certificate": None if certificate is None else certificate.to_json(),
    }


def write(outcome: Outcome, options: argparse.Namespace) -> None:
    """Write the files that were asked for; the model only if it was cut."""
    import prunus
    from prunus.report.documents import write_json
    from prunus.report.pictures import draw_channels

    document, certificate = outcome.document, outcome.certificate
    written: dict[str, str] = {}
    document["files"] = written
    if options.out and len(document["stages"]) == 2:
        prunus.save(outcome.model, options.out, plan=outcome.plan)
        written["out"] = str(options.out)
    if options.plan:
        outcome.plan.save(options.plan)
        written["plan"] = str(options.plan)
    if options.certificate and certificate is not None:
        write_json(certificate.to_json(), options.certificate)
        written["certificate"] = str(options.certificate)
    if options.picture:
        draw_channels(outcome.plan, options.picture, title=options.model)
        written["picture"] = str(options.picture)
    if options.report:
        written["report"] = str(options.report)
        write_json(document, options.report)


def finish(outcome: Outcome, options: argparse.Namespace) -> int:
    """Tell the outcome; the exit code."""
    answer(options, outcome.document, lambda: _show(outcome, options))
    return exit_code(outcome.plan, outcome.certificate)


def exit_code(plan: Plan, certificate: Certificate | None) -> int:
    """Without verification, or where nothing was removed, there is nothing to fail."""
    verdict = "exact" if certificate is None else certificate.verdict
    verified = verdict == "exact" or (verdict == "not verified" and not plan.keep)
    return 0 if verified else NOT_VERIFIED


def show_certificate(certificate: Certificate, fix: str) -> None:
    """The verdict in a sentence or two; ``fix`` is what can be done where it is inexact."""
    from prunus.report.console import show, warn

    if certificate.verdict == "inexact":
        why = certificate.reason or f"the outputs differ by {certificate.rel_err:.1e}"
        warn(
            "prunus: the smaller model would not compute what the masked original computes\n"
            f"  why:   {why}\n"
            f"  fix:   {fix}"
        )
        return
    show(str(certificate))
    for line in certificate.inputs:
        show(f"  {'' if line.startswith('not compared') else 'compared on '}{line}")
    if certificate.unread:
        show(f"Not verified, since no forward read them: {first_names(certificate.unread)}")
    if certificate.renormalised:
        names, worst = list(certificate.renormalised), max(certificate.renormalised.values())
        show(
            f"Kept weights change with what is removed: {first_names(names)}; "
            f"outputs are up to {worst:.1e} from plain silencing"
        )
    if certificate.released:
        show(f"Outputs that may shrink: {', '.join(certificate.released)}")
    if certificate.stale:
        show("Not changed, and read by no forward that ran: " + "; ".join(certificate.stale))
    if certificate.unverified:
        still = first_names(certificate.unverified)
        show(f"Not verified, since removing them moves no output: {still}")


def _show(outcome: Outcome, options: argparse.Namespace) -> None:
    from prunus.report.console import show, show_stages
    from prunus.report.tables import choices_table

    show_stages(outcome.document["stages"])
    show(choices_table(outcome.plan), *told_of(outcome.plan))
    show(*told_of_rounding(outcome.plan), *told_of_time(outcome.plan))
    if outcome.certificate is None:
        show("not verified (--no-verify)")
    else:
        leave = "leave groups out with --exclude"
        fix = leave if hasattr(options, "exclude") else f"plan anew, and {leave}"
        show_certificate(outcome.certificate, f"no model was written; {fix}")
    for name, reason in outcome.document.get("held", {}).items():
        show(f"{name} is kept whole, since its cut failed verification: {reason}")
    if outcome.document["recovery"]:
        show(tell_recovery(outcome.document["recovery"]))
    for name, path in outcome.document["files"].items():
        show(f"wrote {name}: {path}")


def tell_recovery(steps: Sequence[dict[str, Any]]) -> str:
    """What the recovery brought, step by step.

    >>> steps = [("cut", 0.5, True, ""), ("least squares", 0.125, True, ""),
    ...          ("batch norms", 0.25, False, "worse than without")]
    >>> names = ("name", "error", "kept", "why")
    >>> print(tell_recovery([dict(zip(names, step)) for step in steps]))
    On the calibration data the outputs are off by 50.0% after the cut, 12.5% after least squares.
    skipped batch norms: output error 25.0%, worse than without
    """

    def error(step: dict[str, Any]) -> str:
        return "an unknown share" if step["error"] is None else f"{step['error']:.1%}"

    kept = [f"{error(s)} after {'the ' * (s['name'] == 'cut')}{s['name']}"
            for s in steps if s["kept"]]  # fmt: skip
    blind = any("no data" in s["name"] for s in steps)
    inputs = "random inputs" if blind else "the calibration data"
    lines = [f"On {inputs} the outputs are off by {', '.join(kept)}."]
    lines += [f"warning: {s['why']}" for s in steps if s["kept"] and s["why"]]
    lines += [f"skipped {s['name']}: output error {error(s)}, {s['why']}"
              for s in steps if not s["kept"]]  # fmt: skip
    return "\n".join(lines)
