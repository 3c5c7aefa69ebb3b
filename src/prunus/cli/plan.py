"""``prunus plan``: choose which units stay, and write that down; the model is not cut."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from prunus.cli import options as shared

if TYPE_CHECKING:
    from prunus import CouplingGraph, Plan, Statistics
    from prunus.cli.models import Loaded


def add_parser(verbs: Any) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "plan",
        help="choose which units stay, and write that down; the model is not cut",
        description=__doc__.partition(": ")[2],
        epilog=f"{shared.MODEL_HELP}\n{shared.DATA_HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shared.add_model_options(parser)
    shared.add_choice_options(parser)
    shared.add_data_options(parser)
    files = [("out", "the plan, as JSON, for 'prunus apply' and 'prunus verify'")]
    shared.add_files(parser, files)
    parser.add_argument(
        "--dry-run", action="store_true", help="only print widths and costs; write no plan"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Trace and choose; write the plan; print widths and costs."""
    from prunus.cli.data import load_data
    from prunus.cli.models import load_model
    from prunus.errors import PlanError
    from prunus.report.console import show
    from prunus.report.documents import describe_choices
    from prunus.report.tables import choices_table, costs_table

    bounds = bounds_of(options)
    if bool(options.out) == options.dry_run:
        raise PlanError(
            "give a file for the plan, or --dry-run to see it only",
            why="both were given" if options.out else "neither was given",
            fix="--out plan.json, say",
        )
    with shared.follow(options, 4) as step:
        step("building the model")
        loaded = load_model(options)
        data = load_data(options, loaded)
        graph, plan = choose(loaded, data, options, step)
        step("writing")
        if options.out:
            plan.save(options.out)
    costs = describe_costs(graph, plan, bounds)
    document = {
        **shared.head(options),
        "budget": bounds,
        "costs": costs,
        "groups": describe_choices(plan),
        "files": {"out": str(options.out)} if options.out else {},
    }

    def tell() -> None:
        show(costs_table(costs), choices_table(plan))
        show(f"wrote out: {options.out}" if options.out else "Nothing was written: --dry-run.")

    shared.answer(options, document, tell)
    return 0


def bounds_of(options: argparse.Namespace) -> dict[str, float | int]:
    """The budget; :class:`~prunus.errors.PlanError` if there is none."""
    from prunus.errors import PlanError

    bounds = {n: v for n in ("macs", "params") if (v := getattr(options, n)) is not None}
    if not bounds:
        raise PlanError("give a budget: --macs or --params, or both", fix="--macs 0.5, say")
    return bounds


def choice_of(options: argparse.Namespace) -> dict[str, Any]:
    """What :func:`prunus.plan` and :func:`prunus.shrink` take beside the budget."""
    names = "importance scope min_width max_ratio round_to include exclude seed"
    return {name: getattr(options, name) for name in names.split()}


def collect(
    loaded: Loaded,
    graph: CouplingGraph,
    data: Iterable[Any] | None,
    options: argparse.Namespace,
    step: Callable[..., None],
) -> Statistics | None:
    """What the importance reads of the calibration data; None if it looks at the weights alone."""
    import prunus
    from prunus.errors import DataError
    from prunus.importance import needs_of

    needs = needs_of(options.importance)
    if not needs:
        return None
    if data is None:
        raise DataError(
            f"--importance {options.importance} needs calibration data",
            why=f"it is computed from {' and '.join(sorted(needs))} statistics",
            fix="give --data, or an importance of the weights alone: l2",
        )

    def count(done: int) -> None:
        step(f"collecting: {done} batches", same=True)

    return prunus.collect(loaded.model, graph, data, needs, seed=options.seed, progress=count)


def choose(
    loaded: Loaded,
    data: Iterable[Any] | None,
    options: argparse.Namespace,
    step: Callable[..., None],
) -> tuple[CouplingGraph, Plan]:
    """Trace the model and choose what stays."""
    import prunus

    step("tracing")
    graph = prunus.trace(loaded.model, loaded.args, loaded.kwargs, outputs=options.outputs)
    step("planning")
    plan = prunus.plan(
        graph,
        loaded.model,
        budget=prunus.Budget(**bounds_of(options)),
        statistics=collect(loaded, graph, data, options, step),
        **choice_of(options),
    )
    return graph, plan


def describe_costs(
    graph: CouplingGraph, plan: Plan, bounds: dict[str, float | int]
) -> dict[str, dict[str, int | None]]:
    """Every cost before, as requested at most, and as achieved."""
    import prunus

    limits = prunus.Budget(**bounds).limits(graph)
    return {
        name: {"before": before, "requested": limits.get(name), "achieved": after}
        for name, (before, after) in sorted(plan.costs.items(), reverse=True)
    }
