"""Seconds and memory of each stage, side by side with Torch-Pruning; ``results/speed.csv``.

    python -m benchmarks.speed.speed   # all models, both engines
    python -m benchmarks.speed.speed resnet50 bert_12  # some; their rows are replaced
    python -m benchmarks.speed.speed --profile resnet50  # where the time of each stage goes

Every run has a fresh process; the engines take turns, and each figure is the median of three
rounds after a small model to warm up; ``peak_mb`` is before verification, which the first round
alone does.  Both remove half of the parameters by L2 norm: ours by budget, Torch-Pruning by the
ratio that comes to about as much (its build and step are what is timed).  ``fake_s`` is a warmed
plain forward of the same model on fake tensors.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import prunus
from benchmarks.apart import FailedError, StoppedError, peak_mb, run_apart
from benchmarks.rows import Table

ROUNDS = 3
LIMIT = 600
STAGES = ("trace_s", "group_s", "plan_s", "apply_s")


def _timm(name: str) -> Callable[[], tuple[Any, Any, Any]]:
    def build() -> tuple[Any, Any, Any]:
        import timm

        return timm.create_model(name).eval(), (torch.randn(1, 3, 224, 224),), {}

    return build


def _bert(layers: int) -> Callable[[], tuple[Any, Any, Any]]:
    def build() -> tuple[Any, Any, Any]:
        from transformers import BertConfig, BertModel

        ids = torch.randint(5, 30000, (1, 128))
        return BertModel(BertConfig(num_hidden_layers=layers)).eval(), (ids,), {}

    return build


def _llama_8b() -> tuple[Any, Any, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
        ids = torch.zeros(1, 128, dtype=torch.long)
    return model, (), {"input_ids": ids, "use_cache": False}


def _warm_up() -> tuple[Any, Any, Any]:
    """A small network: importing what an engine loads when first used is nobody's speed."""
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(8 * 4 * 4, 10))
    return model.eval(), (torch.randn(1, 3, 8, 8),), {}


MODELS: dict[str, Callable[[], tuple[Any, Any, Any]]] = {
    "warm_up": _warm_up,
    "resnet50": _timm("resnet50"),
    "hrnet_w48": _timm("hrnet_w48"),
    "vit_base": _timm("vit_base_patch16_224"),
    "swin_tiny": _timm("swin_tiny_patch4_window7_224"),
    "bert_12": _bert(12),
    "bert_24": _bert(24),
    "bert_48": _bert(48),
    "llama_8b_meta": _llama_8b,
}


TABLE = Table(
    "speed.csv",
    (
        "engine", "model", "trace_s", "group_s", "plan_s", "apply_s", "verify_s", "total_s",
        "peak_mb", "fake_s", "params_left", "note",
    ),
    ("model", "engine"),
    lambda row: list(MODELS).index(row["model"]),
)  # fmt: skip


def run_prunus(name: str, *, verified: bool = False) -> dict[str, Any]:
    """One round of ours, in this process."""
    model, args, kwargs = MODELS[name]()
    meta = name.endswith("meta")
    row: dict[str, Any] = {"fake_s": _fake_forward(model, args, kwargs)}
    graph = prunus.trace(model, args, kwargs)
    row["trace_s"], row["group_s"] = graph.seconds["trace"], graph.seconds["group"]
    started = time.perf_counter()
    importance = "random" if meta else "l2"
    plan = prunus.plan(graph, model, budget=prunus.Budget(params=0.5), importance=importance)
    row["plan_s"], started = time.perf_counter() - started, time.perf_counter()
    prunus.apply(plan, model)
    row["apply_s"] = time.perf_counter() - started
    row["peak_mb"] = peak_mb()
    row["params_left"] = plan.costs["params"][1] / plan.costs["params"][0]
    if verified and not meta:
        dense, args, kwargs = MODELS[name]()
        started = time.perf_counter()
        certificate = prunus.verify(plan, dense, args, kwargs, each_group=False)
        row["verify_s"] = time.perf_counter() - started
        row["note"] = certificate.verdict
    return row


def run_torch_pruning(name: str, *, verified: bool = False) -> dict[str, Any]:
    """One round of Torch-Pruning, in this process; it has no proof to be ``verified``."""
    import torch_pruning

    model, args, kwargs = MODELS[name]()
    before = sum(parameter.numel() for parameter in model.parameters())
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    heads = {m.qkv: m.num_heads for m in model.modules() if hasattr(m, "qkv")}
    heads |= {
        linear: m.num_attention_heads
        for m in model.modules()
        if hasattr(m, "num_attention_heads") and hasattr(m, "query")
        for linear in (m.query, m.key, m.value)
    }
    started = time.perf_counter()
    pruner = torch_pruning.pruner.BasePruner(
        model,
        kwargs or args[0],
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.3,
        ignored_layers=linears[-1:],
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
    )
    built = time.perf_counter()
    pruner.step()
    row = {"trace_s": built - started, "group_s": 0.0, "plan_s": 0.0}
    row["apply_s"] = time.perf_counter() - built
    row["peak_mb"] = peak_mb()
    row["params_left"] = sum(parameter.numel() for parameter in model.parameters()) / before
    try:
        with torch.no_grad():
            model(*args, **kwargs)
        return row | {"note": "forward runs"}
    except Exception as error:
        return row | {"note": f"broken forward: {error}"[:80].replace("\n", " ")}


def _fake_forward(model: Any, args: Any, kwargs: Any) -> float:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._pytree import tree_map

    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(value: Any) -> Any:
        return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

    inputs, named = tree_map(fake, (args, kwargs))
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        with torch.no_grad(), mode:
            model(*inputs, **named)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


PARTS = {
    "operators on fakes, while tracing and in the check below": ("fakes.py", "run"),
    "labels, by the rules of the operators": ("capture.py", "_record"),
    "the graph from the labels": ("build.py", "build_graph"),
    "scores": ("registry.py", "score"),
    "choosing under the budget": ("allocate.py", "select"),
    "attributes to follow": ("attributes.py", "find_edits"),
    "slicing": ("apply.py", "slice_tensor"),
    "the check that the cut model runs": ("apply.py", "_check_outputs"),
}
"""Parts of a run by the function that they are spent in: its file and name."""


def profile(name: str) -> None:
    """Print the stages of one run, and the share of each part, from Python's own profiler."""
    import cProfile
    import pstats

    run_prunus("warm_up")
    model, args, kwargs = MODELS[name]()
    profiler = cProfile.Profile()
    profiler.enable()
    graph = prunus.trace(model, args, kwargs)
    plan = prunus.plan(graph, model, budget=prunus.Budget(params=0.5), importance="l2")
    prunus.apply(plan, model)
    profiler.disable()
    stats: Any = pstats.Stats(profiler)
    print(f"{name}: {stats.total_tt:.2f} s under the profiler, of which")
    for what, (file, function) in PARTS.items():
        spent = sum(
            row[3]
            for (path, _, found), row in stats.stats.items()
            if found == function and Path(path).name == file and "prunus" in path
        )
        print(f"  {spent / stats.total_tt:6.0%}  {what}")


ENGINES = {"prunus": run_prunus, "torch-pruning": run_torch_pruning}


def run_round(engine: str, name: str, verified: bool) -> dict[str, Any]:
    """One round in this process, after a small model."""
    ENGINES[engine]("warm_up")
    return ENGINES[engine](name, verified=verified)


def measure(engine: str, name: str, *, verified: bool) -> dict[str, Any]:
    """One round in a process of its own."""
    try:
        found: dict[str, Any] = run_apart(run_round, engine, name, verified, seconds=LIMIT)
    except StoppedError:
        return {"note": f"did not finish in {LIMIT} s"}
    except FailedError as error:
        return {"note": f"failed: {error}"[:120]}
    return found


def summarise(engine: str, name: str, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds that came through."""
    good = [one for one in rounds if "apply_s" in one]
    row: dict[str, Any] = {"engine": engine, "model": name, "note": rounds[0].get("note", "")}
    if not good:
        return row
    for key in (*STAGES, "verify_s", "fake_s", "params_left"):
        values = [one[key] for one in good if key in one]
        if values:
            row[key] = f"{median(values):.3f}"
    row["total_s"] = f"{median(sum(one[stage] for stage in STAGES) for one in good):.3f}"
    row["peak_mb"] = f"{max(one['peak_mb'] for one in good):.0f}"
    return row


def main() -> None:
    """Measure the models asked for, engines in turn, and replace their rows."""
    parser = TABLE.parser(__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS)[1:], metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    options = parser.parse_args()
    for name in options.models:
        if options.profile:
            profile(name)
            continue
        rounds: dict[str, list[dict[str, Any]]] = {engine: [] for engine in ENGINES}
        for _ in range(options.rounds):
            for engine, known in rounds.items():
                if not known or "apply_s" in known[-1]:
                    known.append(measure(engine, name, verified=not known))
        options.table.add(*(summarise(engine, name, rounds[engine]) for engine in ENGINES))


if __name__ == "__main__":
    main()
