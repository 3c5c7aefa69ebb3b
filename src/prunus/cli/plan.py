"""``prunus plan``: choose which units are kept, and write that down; the model is not cut."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prunus.cli import flags
from prunus.cli.answer import answer, follow, head

if TYPE_CHECKING:
    from prunus import Budget, CouplingGraph, Plan
    from prunus.cli.models import Loaded


def add_parser(verbs: Any) -> None:
    """Declare the verb."""
    text = "choose which units are kept, and write that down; the model is not cut"
    parser = flags.add_parser(verbs, "plan", text, run, flags.MODEL_HELP, flags.DATA_HELP)
    flags.add_model(parser)
    flags.add_choice(parser)
    flags.add_data(parser)
    flags.add_files(parser, {"out": "the plan, as JSON, for 'prunus apply' and 'prunus verify'"})
    parser.add_argument(
        "--dry-run", action="store_true", help="only print widths and costs; write no plan"
    )


def run(options: argparse.Namespace) -> int:
    """Trace and choose; write the plan; print widths and costs."""
    import prunus
    from prunus.cli.data import load_data
    from prunus.cli.models import load_model
    from prunus.errors import PlanError
    from prunus.report.console import show
    from prunus.report.tables import costs_table, describe_choices, widths_table

    chosen = flags.choice_of(options)
    if bool(options.out) == options.dry_run:
        raise PlanError(
            "give a file for the plan, or --dry-run to see it only",
            why="both were given" if options.out else "neither was given",
            fix="--out plan.json, say",
        )
    budget = chosen["budget"]
    with follow(options) as step:
        step("building the model")
        loaded = load_model(options)
        chosen["data"] = load_data(options, loaded)
        step("tracing")
        graph = loaded.trace(options)
        if options.sensitivity is not None:
            chosen = by_table(options, chosen, loaded, graph)
        step("planning")
        plan = prunus.plan(graph, loaded.model, **chosen)
        step("writing")
        if options.out:
            plan.save(options.out)
    costs = describe_costs(graph, plan, budget)
    document = {
        **head(options),
        "budget": None if budget is None else budget.requested,
        "costs": costs,
        "drops": list(plan.drops),
        **{name: plan.origin.get(name) for name in ("round_to", "retained", "bound")},
        "groups": describe_choices(plan),
        "files": {"out": str(options.out)} if options.out else {},
    }

    def tell() -> None:
        show(costs_table(costs), widths_table(plan), *remarks(plan))
        show(f"wrote out: {options.out}" if options.out else "Nothing was written: --dry-run.")

    answer(options, document, tell)
    return 0


def by_table(
    options: argparse.Namespace,
    chosen: Mapping[str, Any],
    loaded: Loaded,
    graph: CouplingGraph | None = None,
) -> dict[str, Any]:
    """The options with the ratios of a table: what meets the budget, or what is tolerated.

    Raises
    ------
    FormatError
        If the file is no table.
    PlanError
        If it is another model's, or of another importance, or says nothing without a budget.
    BudgetError
        If its largest ratios don't meet the budget.
    """
    import prunus
    from prunus.errors import PlanError
    from prunus.importance import needs_of

    table = prunus.planner.search.Sensitivity.load(options.sensitivity)
    measured = table.origin.get("importance", options.importance)
    if measured != options.importance:
        raise PlanError(
            f"the table is of the importance {measured}, and this plan of {options.importance}",
            where=str(options.sensitivity),
            why="what the loss of units costs depends on which of them are removed first",
            fix=f"--importance {measured}",
        )
    graph = graph or loaded.trace(options)
    score = {name: chosen[name] for name in ("importance", "include", "exclude", "seed")}
    if needs := needs_of(options.importance):
        score["statistics"] = prunus.importance.collect(
            loaded.model, graph, chosen["data"], needs, seed=options.seed
        )
    plan = prunus.planner.search.plan_by_sensitivity(
        table, graph, loaded.model, chosen["budget"], **score
    )
    rows = (choice for choice in plan.groups if choice.name in table.sizes)
    ratios = {choice.name: len(choice.removed) / choice.size for choice in rows}
    return {**chosen, **score, "ratios": ratios}


def remarks(plan: Plan) -> list[str]:
    """Sentences on what a plan drops, rounds and retains, and on the time that was measured."""
    found = [f"Dropped: {', '.join(plan.drops)}"] if plan.drops else []
    found += plan.origin.get("through", ())
    timed, retained = plan.origin.get("latency"), plan.origin.get("retained")
    if timed is None and "round_to" in plan.origin.get("automatic", ()):
        found.append(_rounding(plan.origin["round_to"]))
    if retained is not None:
        bound = plan.origin.get("bound")
        most = "" if bound is None else f" (upper bound {bound:.1%})"
        found.append(f"retained importance {retained:.1%}{most}")
    if timed is not None:
        multiple, error, dense = timed["multiple"], timed["error"], timed["dense_ms"]
        widths = "" if multiple is None else f", widths multiples of {multiple}"
        repaired = "" if error is None else f", output error {error:.1%} after repair"
        found.append(
            f"Measured time {timed['ratio'] * dense:.4g} of {dense:.4g} ms ({timed['ratio']:.1%} ± "
            f"{timed['spread']:.1%}) by the clock {timed['clock']}, of {len(timed['trials'])} "
            f"plans: at most {timed['macs']:.1%} of the MACs{widths}{repaired}."
        )
    return found


def _rounding(multiple: int | Mapping[str, int]) -> str:
    """Of what widths are multiples where nobody said so."""
    finer = ""
    if isinstance(multiple, Mapping):
        finer = f", {len(multiple) - 1} of them of less, for which that is too coarse a step"
        multiple = multiple["*"]
    if multiple == 1:
        return "Widths are not rounded: a step of 8 is too coarse for these bounds."
    return (
        f"Widths of 32 and more are multiples of {multiple} by default{finer}; --round-to 1 rounds "
        "nothing."
    )


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
