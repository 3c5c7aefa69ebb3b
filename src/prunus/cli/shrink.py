"""``prunus shrink``: make a model smaller under a budget, and verify the cut.

What a cut writes and prints is here as well; ``prunus apply`` and ``prunus verify`` share it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from prunus.cli import NOT_VERIFIED, flags
from prunus.cli.answer import answer, follow, head
from prunus.cli.plan import by_table, remarks
from prunus.errors import FileError, ModelError, first_names, require

if TYPE_CHECKING:
    from prunus import Plan
    from prunus.cli.models import Loaded
    from prunus.recovery import Step
    from prunus.verifier import Certificate


def add_parser(verbs: Any) -> None:
    """Declare the verb."""
    text = "make a model smaller under a budget, and verify the cut"
    parser = flags.add_parser(verbs, "shrink", text, run, flags.MODEL_HELP, flags.DATA_HELP)
    flags.add_model(parser)
    flags.add_choice(parser)
    flags.add_cut(parser)
    parser.add_argument(
        "--mode",
        choices=("free", "uniform"),
        default="free",
        help="uniform, for hf: models: only what a plain config.json can express is removed, and "
        "--out is a folder for from_pretrained, with the tokenizer and model card of the original",
    )


def run(options: argparse.Namespace) -> int:
    """Trace, plan, verify, cut, recover; write what was asked for; print the outcome."""
    import prunus
    from prunus.cli.data import load_data
    from prunus.cli.models import load_model
    from prunus.integrations.ultralytics import kept_whole

    chosen = flags.choice_of(options)
    budget = chosen["budget"]
    check_picture(options)
    _check_mode(options)
    with follow(options) as step:
        step("building the model")
        loaded = load_model(options)
        chosen["data"] = load_data(options, loaded)
        if _opened_by_yolo(options):
            chosen["exclude"] = (*chosen["exclude"], *kept_whole(loaded.model))
        step("counting")
        stages = [loaded.costs("dense")]
        if options.sensitivity is not None:
            chosen = by_table(options, chosen, loaded)
        step("tracing")
        small = prunus.shrink(
            loaded.model,
            loaded.args,
            loaded.kwargs,
            outputs=options.outputs,
            verified=not options.no_verify,
            mode=options.mode,
            recover=options.recover,
            **chosen,
        )
        stages.append(loaded.costs("pruned"))
        document = {
            **describe(options, small.plan, small.certificate, stages, small.recovery),
            "budget": None if budget is None else budget.requested,
            "held": dict(small.held),
        }
        step("writing")
        write(options, loaded, small.plan, small.certificate, document)
    return finish(options, small.plan, small.certificate, document)


def _opened_by_yolo(options: argparse.Namespace) -> bool:
    """Whether the model is written as a file of ultralytics."""
    return options.model.startswith("yolo:") and str(options.out).endswith(".pt")


def _check_mode(options: argparse.Namespace) -> None:
    """Refuse early what planning or writing would refuse late."""
    if options.mode == "uniform" and not options.model.startswith("hf:"):
        raise ModelError(
            "--mode uniform is for models of transformers",
            where=options.model,
            fix="give hf:FOLDER, or leave out --mode",
        )
    if options.mode == "uniform" and options.out and options.out.is_file():
        raise FileError(f"{options.out} is a file", why="--mode uniform writes a folder")


def check_picture(options: argparse.Namespace) -> None:
    """Refuse early what drawing would refuse late, when other files are there already."""
    if options.picture:
        require("matplotlib.figure", "plot")


def describe(
    options: argparse.Namespace,
    plan: Plan,
    certificate: Certificate | None,
    stages: list[dict[str, Any]],
    recovery: Sequence[Step],
) -> dict[str, Any]:
    """The report of a cut, as plain data."""
    from prunus.report.tables import describe_choices

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


def write(
    options: argparse.Namespace,
    loaded: Loaded,
    plan: Plan,
    certificate: Certificate | None,
    document: dict[str, Any],
) -> None:
    """Write the files that were asked for, and note them; the model only if it was cut."""
    import prunus
    from prunus.integrations import hf, ultralytics
    from prunus.report.console import write_json

    def write_model(path: str) -> None:
        if getattr(options, "mode", "free") == "uniform":
            hf.save(loaded.model, path, mode="uniform", source=loaded.source.folder)
        elif _opened_by_yolo(options):
            ultralytics.save(loaded.model, path)
        else:
            prunus.save(loaded.model, path, plan=plan)

    writers: dict[str, Any] = {
        "out": write_model,
        "plan": plan.save,
        "certificate": lambda path: write_json(document["certificate"], path),
        "picture": lambda path: prunus.report.draw_channels(plan, path, title=options.model),
        "report": lambda path: write_json(document, path),
    }
    if len(document["stages"]) < 2:
        del writers["out"]
    if certificate is None:
        del writers["certificate"]
    written = document["files"] = {n: str(p) for n in writers if (p := getattr(options, n))}
    for name, path in written.items():
        writers[name](path)


def finish(
    options: argparse.Namespace,
    plan: Plan,
    certificate: Certificate | None,
    document: dict[str, Any],
) -> int:
    """Print the outcome; the exit code."""
    from prunus.report.console import show
    from prunus.report.tables import stages_table, widths_table

    def tell() -> None:
        show(stages_table(document["stages"]), widths_table(plan), *remarks(plan))
        if certificate is None:
            show("not verified (--no-verify)")
        else:
            leave = "leave groups out with --exclude"
            fix = leave if hasattr(options, "exclude") else f"plan anew, and {leave}"
            show_certificate(certificate, f"no model was written; {fix}")
        for name, reason in document.get("held", {}).items():
            show(f"{name} is kept whole: {reason}")
        if document["recovery"]:
            show(tell_recovery(document["recovery"]))
        show(*(f"wrote {name}: {path}" for name, path in document["files"].items()))

    answer(options, document, tell)
    return exit_code(plan, certificate)


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
    lines = [str(certificate)]
    for line in certificate.inputs:
        lines.append(f"  {'' if line.startswith('not compared') else 'compared on '}{line}")
    if certificate.unread:
        lines.append(f"Not verified, since no forward read them: {first_names(certificate.unread)}")
    if certificate.renormalised:
        worst = max(certificate.renormalised.values())
        lines.append(
            f"Kept weights change with what is removed: {first_names(certificate.renormalised)}; "
            f"outputs are up to {worst:.1e} from plain silencing"
        )
    if certificate.released:
        lines.append(f"Outputs that may shrink: {', '.join(certificate.released)}")
    if certificate.stale:
        stale = "; ".join(certificate.stale)
        lines.append(f"Not changed, and read by no forward that ran: {stale}")
    if certificate.unverified:
        still = first_names(certificate.unverified)
        lines.append(f"Not verified, since removing them moves no output: {still}")
    show(*lines)


def tell_recovery(steps: Sequence[dict[str, Any]]) -> str:
    """What the recovery brought, step by step.

    >>> steps = [("cut", 0.5, True, ""), ("least squares", 0.125, True, ""),
    ...          ("batch norms", 0.25, False, "worse than without")]
    >>> names = ("name", "error", "kept", "why")
    >>> print(tell_recovery([dict(zip(names, step)) for step in steps]))
    On the calibration data the outputs are off by 50.0% after the cut, 12.5% after least squares.
    skipped batch norms: output error 25.0%, worse than without
    """
    errors = ["an unknown share" if s["error"] is None else f"{s['error']:.1%}" for s in steps]
    kept, lines, skipped = [], [], []
    for step, error in zip(steps, errors, strict=True):
        if not step["kept"]:
            skipped.append(f"skipped {step['name']}: output error {error}, {step['why']}")
            continue
        kept.append(f"{error} after {'the ' * (step['name'] == 'cut')}{step['name']}")
        if step["why"]:
            lines.append(f"warning: {step['why']}")
    blind = any("no data" in step["name"] for step in steps)
    inputs = "random inputs" if blind else "the calibration data"
    first = f"On {inputs} the outputs are off by {', '.join(kept)}."
    return "\n".join([first, *lines, *skipped])
