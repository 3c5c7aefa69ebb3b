"""``prunus load``: check that a file of prunus.save is whole, and that its model runs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from prunus.cli import flags
from prunus.cli.answer import answer, follow, head
from prunus.cli.values import old_file

if TYPE_CHECKING:
    from torch import nn

    from prunus import Plan
    from prunus.cli.models import Source


def add_parser(verbs: Any) -> None:
    """Declare the verb."""
    text = "check that a file of prunus.save is whole, and that its model runs"
    parser = flags.add_parser(verbs, "load", text, run, flags.MODEL_HELP)
    parser.add_argument("file", metavar="FILE", type=old_file, help="what to check")
    flags.add_model(parser, flag=True)


def run(options: argparse.Namespace) -> int:
    """Load the model, run it once, and compare its outputs' shapes with what the plan recorded."""
    import torch

    import prunus
    from prunus.cli.models import find_source
    from prunus.report.tables import describe_choices
    from prunus.surgeon import applied_plan

    with follow(options) as step:
        step("reading")
        torch.manual_seed(options.seed)
        source = find_source(options)
        model = prunus.load(options.file, build=source.bare).eval()
        plan = applied_plan(model)
        step("running the model")
        outputs = _run_once(model, plan, source, options)
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    document = {
        **head(options),
        "file": str(options.file),
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "costs": {} if plan is None else {n: list(pair) for n, pair in sorted(plan.costs.items())},
        "groups": [] if plan is None else describe_choices(plan),
        "outputs": outputs,
    }
    answer(options, document, lambda: _show(document, plan))
    return 0


def _run_once(
    model: nn.Module, plan: Plan | None, source: Source, options: argparse.Namespace
) -> dict[str, list[int]]:
    """Shapes of the outputs; for the inputs that the plan recorded they are compared with it."""
    import torch

    from prunus.cli.models import example_inputs
    from prunus.errors import FormatError
    from prunus.tracer.inputs import rebuild_inputs
    from prunus.tracer.outputs import answer_of

    recorded = None if plan is None or options.input_shape else plan.traced
    if recorded is None or recorded.inputs is None:
        args, kwargs = example_inputs(source, model, options)
    else:
        args, kwargs = rebuild_inputs(recorded.inputs, model, seed=options.seed)
    with torch.no_grad():
        answers = answer_of(model(*args, **kwargs))
    found = {name: list(tensor.shape) for name, tensor in answers.items()}
    for name, shape in recorded.outputs.items() if recorded else ():
        if found.get(name) != list(shape):
            raise FormatError(
                f"output {name!r} has shape {found.get(name)}, it should be {list(shape)}",
                where=str(options.file),
                why="--build makes another model than the one that was saved",
            )
    return found


def _show(document: dict[str, Any], plan: Plan | None) -> None:
    from prunus.graph.plan_records import spell_count
    from prunus.report.console import show
    from prunus.report.tables import widths_table

    params, size = spell_count(document["params"]), spell_count(document["bytes"])
    show(f"{document['file']}: {params} parameters, {size}B of tensors, the digest is right.")
    if plan is None:
        show("It has no plan: the model was not pruned.")
    else:
        show(widths_table(plan))
    shapes = ", ".join(f"{name} {shape}" for name, shape in document["outputs"].items())
    show(f"The model runs: {shapes}")
