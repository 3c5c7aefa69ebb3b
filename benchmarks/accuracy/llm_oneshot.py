"""Perplexity of SmolLM2-135M after one cut, nothing trained; ``results/llm_oneshot.csv``.

    python -m benchmarks.accuracy.llm_oneshot   # all; an hour
    python -m benchmarks.accuracy.llm_oneshot --engine prunus --structure width --importance l2

10, 20 and 30 % of the parameters go, by *width* (hidden units of the FFNs, and KV groups with
their query heads), by *width+hidden* (the residual stream as well), by *depth* (whole layers, as
many as are needed), or by *both* (half of the removal each).  Perplexity is on blocks of 256 tokens
of one part of the text, criteria see the other (``texts.py``).  ``params_ratio`` is what was
reached.  The dense model was quantised to four bits once, so compare with ``dense_perplexity``.

Torch-Pruning runs its own recipe for LLaMA (examples/LLMs/prune_llm.py): heads of q, k and v
given, whole heads, hidden size and FFN by one ratio, group L2 norms, rounded to 4; the ratio is the
least one that comes to the parameters asked for.  What its recipe does not do is done for it:
attention is *eager*, since with the model's default its grouping fails where 9 query heads share 3
KV heads; the tied embedding, of which it makes two, is tied again.

Every row has a process of its own, in which an engine has ten minutes of processor time for
tracing, scoring and cutting; loading and scoring perplexity are nobody's.  ``seconds`` are those of
the engine on the wall; of Torch-Pruning for about ten tries until the ratio is found.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from itertools import product
from typing import Any

from torch import Tensor

import prunus
from benchmarks.accuracy import measures, pretrained, texts
from benchmarks.apart import FailedError, StoppedError, limit_processor_time, run_apart
from benchmarks.peers import bounded
from benchmarks.peers.judge import count_parameters
from benchmarks.rows import Table, commit

REMOVED = (0.1, 0.2, 0.3)
LIMIT = 600
LENGTH = 256
TABLE = Table(
    "llm_oneshot.csv",
    (
        "engine", "structure", "importance", "removed", "params_ratio", "perplexity",
        "dense_perplexity", "seconds", "blocks", "note", "text", "commit",
    ),
    ("engine", "structure", "importance", "removed"),
)  # fmt: skip
FFN, KV_GROUPS, HIDDEN = (
    "*.mlp.gate_proj.weight[0]", "*.self_attn.q_proj.weight[0]", "model.embed_tokens.weight[1]",
)  # fmt: skip
CALIBRATED = ("taylor", "fisher", "activation", "flap")
IMPORTANCES = ("random", "l2", *CALIBRATED)

Cut = Callable[[Any, float, str, Tensor], Any]
"""(model, share of the parameters to remove, importance, calibration blocks) → smaller model."""


def by_width(model: Any, removed: float, importance: str, blocks: Tensor, *more: str) -> Any:
    """Every FFN loses the same share, and every attention as many whole KV groups as that is."""
    data = {"data": batches(blocks)} if importance in CALIBRATED else {}
    graph = prunus.trace(model, (), example(blocks))
    budget = prunus.Budget(params=1 - removed)
    plan = prunus.plan(
        graph, model, budget=budget, importance=importance, include=(FFN, KV_GROUPS, *more), **data
    )
    return prunus.apply(plan, model)


def by_width_and_hidden(model: Any, removed: float, importance: str, blocks: Tensor) -> Any:
    """The same with the residual stream, which loses that share too."""
    return by_width(model, removed, importance, blocks, HIDDEN)


def by_depth(model: Any, removed: float, importance: str, blocks: Tensor) -> Any:
    """As many layers as it takes, by block influence on the calibration blocks."""
    count = layers_for(model, removed)
    shrunk = prunus.shrink(
        model, (), example(blocks), drop=count, data=batches(blocks), verified=False
    )
    return shrunk.model


def by_both(model: Any, removed: float, importance: str, blocks: Tensor) -> Any:
    """Layers for half of the removal, widths for the rest."""
    dense = count_parameters(model)
    model = by_depth(model, removed / 2, importance, blocks)
    rest = 1 - (1 - removed) * dense / count_parameters(model)
    return by_width(model, rest, importance, blocks)


def layers_for(model: Any, removed: float) -> int:
    """The least number of layers that is so much of the parameters."""
    layer = count_parameters(model.model.layers[0])
    return -int(-removed * count_parameters(model) // layer)


def by_recipe(model: Any, removed: float, importance: str, blocks: Tensor) -> Any:
    """Torch-Pruning's recipe, every layer by the same ratio."""
    return find_ratio(model, removed, blocks, over_all=False)


def by_recipe_over_all(model: Any, removed: float, importance: str, blocks: Tensor) -> Any:
    """The same with all layers ranked together (``global_pruning``)."""
    return find_ratio(model, removed, blocks, over_all=True)


CUTS: dict[str, dict[str, Cut]] = {
    "prunus": {
        "width": by_width,
        "width+hidden": by_width_and_hidden,
        "depth": by_depth,
        "both": by_both,
    },
    "torch-pruning": {
        "width+hidden": by_recipe,
        "width+hidden, global": by_recipe_over_all,
    },
}
NATIVE = {"depth": ("block_influence",)}
"""Structures that have an importance of their own; the others take all of ``IMPORTANCES``."""


def find_ratio(model: Any, removed: float, blocks: Tensor, *, over_all: bool) -> Any:
    """The model cut by the least ratio that removes enough parameters.

    Its ratio is one of widths.  Every try has the whole of the time limit for itself.
    """
    goal = (1 - removed) * count_parameters(model)

    def cut(twin: Any, ratio: float) -> Any:
        limit_processor_time(LIMIT)
        return cut_by_recipe(twin, ratio, blocks, over_all=over_all)

    return bounded.cut_within(model, cut, lambda smaller: count_parameters(smaller) <= goal)


def cut_by_recipe(model: Any, ratio: float, blocks: Tensor, *, over_all: bool) -> Any:
    """Torch-Pruning's public interface as its example for LLaMA uses it."""
    import torch_pruning

    model.set_attn_implementation("eager")
    config, heads = model.config, {}
    attentions = [layer.self_attn for layer in model.model.layers]
    for attention in attentions:
        heads[attention.q_proj] = config.num_attention_heads
        heads[attention.k_proj] = heads[attention.v_proj] = config.num_key_value_heads
    pruner = torch_pruning.pruner.BasePruner(
        model,
        example_inputs=example(blocks),
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2, group_reduction="mean"),
        global_pruning=over_all,
        pruning_ratio=ratio,
        ignored_layers=[model.lm_head],
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=ratio,
        # Its default dicts are shared by all pruners of a process, and it writes to them.
        out_channel_groups={},
        in_channel_groups={},
        round_to=4,
        forward_fn=lambda m, inputs: m(**inputs),
        output_transform=lambda output: output.logits,
    )
    pruner.step()
    for attention in attentions:
        queries, keys = (
            layer.out_features // attention.head_dim
            for layer in (attention.q_proj, attention.k_proj)
        )
        attention.num_key_value_groups = queries // keys
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def run(engine: str, structure: str, importance: str, removed: float, count: int) -> dict[str, Any]:
    """One row, in this process."""
    model, tokenizer = pretrained.smollm2()
    parts = texts.load()
    calibration = texts.blocks(parts.calibration, tokenizer, 32, LENGTH)
    test = texts.blocks(parts.test, tokenizer, count, LENGTH)
    dense = count_parameters(model)
    if not removed:
        return {"perplexity": f"{measures.perplexity(model, test):.4g}"}
    cut = CUTS[engine][structure]
    limit_processor_time(LIMIT)
    started = time.perf_counter()
    pruned = cut(model, removed, importance, calibration)
    seconds = time.perf_counter() - started
    limit_processor_time(None)
    return {
        "params_ratio": f"{count_parameters(pruned) / dense:.4f}",
        "perplexity": f"{measures.perplexity(pruned.eval(), test):.4g}",
        "seconds": f"{seconds:.1f}",
    }


def try_apart(*words: Any) -> dict[str, Any]:
    """The same in a process of its own; an engine that fails or does not finish says so."""
    try:
        found: dict[str, Any] = run_apart(run, *words)
    except StoppedError:
        return {"note": f"did not finish in {LIMIT // 60} minutes"}
    except FailedError as error:
        return {"note": f"failed: {error}"[:200]}
    return found


def example(blocks: Tensor) -> dict[str, Any]:
    """Inputs to trace with: the start of one block."""
    return {"input_ids": blocks[:1, :32], "use_cache": False}


def batches(blocks: Tensor) -> list[dict[str, Any]]:
    """Calibration data: every token is to be foretold."""
    return [{"input_ids": b, "labels": b, "use_cache": False} for b in blocks.split(2)]


def jobs(options: argparse.Namespace) -> list[tuple[str, str, str]]:
    """Engine, structure and importance of the rows that were asked for."""
    found = []
    for engine in options.engine or CUTS:
        for structure in CUTS[engine]:
            own = NATIVE.get(structure, IMPORTANCES) if engine == "prunus" else ("l2",)
            if not options.structure or structure in options.structure:
                asked = options.importance or own
                found += [(engine, structure, name) for name in own if name in asked]
    return found


def main() -> int:
    """Run what was asked for and replace its rows; 1 if something of ours failed."""
    parser = TABLE.parser(__doc__)
    parser.add_argument("--engine", nargs="*", choices=CUTS)
    parser.add_argument("--structure", nargs="*")
    parser.add_argument("--importance", nargs="*")
    parser.add_argument("--removed", nargs="*", type=float, default=REMOVED)
    parser.add_argument("--blocks", type=int, default=40, help="of the test text")
    options = parser.parse_args()
    dense = try_apart("prunus", "width", "random", 0.0, options.blocks)
    if "perplexity" not in dense:
        raise SystemExit(f"the dense model {dense['note']}")
    failed = False
    for (engine, structure, importance), removed in product(jobs(options), options.removed):
        row = {
            "engine": engine,
            "structure": structure,
            "importance": importance,
            "removed": removed,
            "dense_perplexity": dense["perplexity"],
            "blocks": options.blocks,
            "text": texts.SOURCE,
            "commit": commit(),
            **try_apart(engine, structure, importance, removed, options.blocks),
        }
        if engine == "prunus" and "note" in row:
            failed = True  # ours has to be mended; no row of the table
            print(row)
        else:
            options.table.add(row)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
