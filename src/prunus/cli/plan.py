"""``prunus plan``: choose which units stay, and write that down; the model is not cut."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from prunus.cli import options as shared
from prunus.cli.bounds import budget_of
from prunus.cli.by_table import check_alone, ratios_by_table

if TYPE_CHECKING:
    from prunus import Budget, CouplingGraph, Plan
    from prunus.cli.models import Loaded
    from prunus.importance import Statistics


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
    from prunus.report.tables import costs_table, widths_table

    check_alone(options)
    budget = budget_of(options)
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
    costs = describe_costs(graph, plan, budget)
    document = {
        **shared.head(options),
        "budget": None if budget is None else budget.requested,
        "costs": costs,
        "drops": list(plan.drops),
        **{name: plan.origin.get(name) for name in ("round_to", "retained", "bound")},
        "groups": describe_choices(plan),
        "files": {"out": str(options.out)} if options.out else {},
    }

    def tell() -> None:
        show(costs_table(costs), widths_table(plan))
        show(*told_of(plan), *told_of_rounding(plan))
        show(*_told_of_bounds(costs), *_told_of_worth(plan), *told_of_time(plan))
        show(f"wrote out: {options.out}" if options.out else "Nothing was written: --dry-run.")

    shared.answer(options, document, tell)
    return 0


def choice_of(options: argparse.Namespace) -> dict[str, Any]:
    """What :func:`prunus.plan` and :func:`prunus.shrink` take."""
    names = "ratios importance scope normalise min_width max_ratio round_to include exclude"
    return {
        "budget": budget_of(options),
        "drop": _drop_of(options),
        **{name: getattr(options, name) for name in (*names.split(), "seed")},
    }


def _drop_of(options: argparse.Namespace) -> Any:
    """The number of blocks to drop, or their names."""
    from prunus.errors import PlanError

    numbers = [entry for entry in options.drop if isinstance(entry, int)]
    if numbers and len(options.drop) > 1:
        raise PlanError(
            "--drop has a number and is given more than once",
            why="a number is how many blocks go, whichever they are",
            fix="give one number, or names only",
        )
    return numbers[0] if numbers else options.drop


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

    return prunus.importance.collect(
        loaded.model, graph, data, needs, seed=options.seed, progress=count
    )


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
    # With blocks to drop, what the importance reads is collected on what is left of the model.
    read: dict[str, Any] = {"data": data} if reads_data(options) else {}
    if not options.drop:
        read["statistics"] = collect(loaded, graph, data, options, step)
    chosen = choice_of(options)
    if options.sensitivity is not None:
        chosen["ratios"] = ratios_by_table(options, graph, loaded.model, read["statistics"])
    return graph, prunus.plan(graph, loaded.model, **read, **chosen)


def reads_data(options: argparse.Namespace) -> bool:
    """Whether planning reads the data itself, and not only the statistics of an importance."""
    return bool(options.drop) or options.latency is not None


def told_of(plan: Plan) -> list[str]:
    """Which blocks go, in a sentence."""
    return [f"Dropped: {', '.join(plan.drops)}"] if plan.drops else []


def told_of_rounding(plan: Plan) -> list[str]:
    """Of what widths are multiples where nobody said so, in a sentence."""
    if "round_to" not in plan.origin.get("automatic", ()) or "latency" in plan.origin:
        return []
    multiple = plan.origin["round_to"]
    finer = ""
    if isinstance(multiple, Mapping):
        finer = f", {len(multiple) - 1} of them of less, for which that is too coarse a step"
        multiple = multiple["*"]
    if multiple == 1:
        return ["Widths are not rounded: a step of 8 is too coarse for these bounds."]
    return [
        f"Widths of 32 and more are multiples of {multiple} by default{finer}; --round-to 1 rounds "
        "nothing."
    ]


def told_of_time(plan: Plan) -> list[str]:
    """What the clock says of a latency budget, in a sentence."""
    timed = plan.origin.get("latency")
    if timed is None:
        return []
    multiple, error = timed["multiple"], timed["error"]
    widths = "" if multiple is None else f", widths multiples of {multiple}"
    repaired = "" if error is None else f", output error {error:.1%} after repair"
    dense = timed["dense_ms"]
    return [
        f"Measured time {timed['ratio'] * dense:.4g} of {dense:.4g} ms ({timed['ratio']:.1%} ± "
        f"{timed['spread']:.1%}) by the clock {timed['clock']}, of {len(timed['trials'])} plans: "
        f"at most {timed['macs']:.1%} of the MACs{widths}{repaired}."
    ]


def _told_of_bounds(costs: dict[str, dict[str, Any]]) -> list[str]:
    """How far below each bound the plan ends, in a sentence."""
    return [
        f"{name} ends {(cost['requested'] - cost['achieved']) / cost['before']:.2%} of the dense "
        f"cost below its bound."
        for name, cost in costs.items()
        if cost["requested"] is not None
    ]


def _told_of_worth(plan: Plan) -> list[str]:
    """What part of the scores stays, and what no other choice exceeds, in a sentence."""
    retained, bound = plan.origin.get("retained"), plan.origin.get("bound")
    if retained is None:
        return []
    most = "" if bound is None else f"; no choice under this budget keeps more than {bound:.1%}"
    return [f"The units that stay hold {retained:.1%} of all scores{most}."]


def describe_costs(
    graph: CouplingGraph, plan: Plan, budget: Budget | None
) -> dict[str, dict[str, Any]]:
    """Every cost before, as requested at most, and as achieved; what is pinned of it."""
    counted = None if budget is None else budget.counted
    limits = {} if counted is None else counted.limits(graph)
    nothing = ~graph.all_kept
    nothing[0] = True
    return {
        name: {
            "before": cost.before,
            "pinned": graph.cost(name, nothing) if name in graph.costs else None,
            "requested": limits.get(name),
            "achieved": cost.after,
            "share": cost.share,
        }
        for name, cost in sorted(plan.cost().items(), reverse=True)
    }
