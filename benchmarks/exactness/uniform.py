"""Sixty random requests of uniform plans: each is answered by a folder that loads, or refused.

    python -m benchmarks.exactness.uniform        # all; a quarter of an hour on one core
    python -m benchmarks.exactness.uniform 7 8    # some; their rows are replaced

A request is a budget, a ratio, or amounts by structure, some with ``round_to``, ``drop`` or a
scope, of a tiny model that transformers builds from a config.  Whether it is *feasible* is found
without Prunus: by building the model from configs with other widths, and running it.  Heads keep
their size, hidden widths stay where the class computes with them (Gemma 3).  A share is met within
half of itself, a count exactly.  ``ended``: *folder* where ``from_pretrained`` loads what was
written, with the same logits and within what was asked, *refused* where an error of Prunus was
raised and the model and its config are as before.  ``right``: a folder for what is feasible, a
refusal for what is not.
"""

from __future__ import annotations

import copy
import math
import random
import tempfile
import time
from collections.abc import Mapping
from functools import cache
from itertools import product
from typing import Any

import torch

import prunus
from benchmarks.peers.judge import relative_error
from benchmarks.rows import Table, commit
from prunus.errors import PrunusError
from prunus.integrations import hf

TABLE = Table(
    "uniform.csv",
    ("request", "model", "asked", "feasible", "ended", "right", "config", "params_ratio", "gap",
     "error", "seconds", "commit"),
    ("request",),
    order=lambda row: int(row["request"]),
)  # fmt: skip
REQUESTS = 60
EQUAL = 1e-5
"""Logits of what is loaded agree to that with those of the model that was written."""

SIZES = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8,
         "intermediate_size": 160, "vocab_size": 300}  # fmt: skip
GQA = {**SIZES, "num_key_value_heads": 4}
ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}

MODELS: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GQA),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GQA, "head_dim": 16}),
    "mistral": ("MistralForCausalLM", "MistralConfig", GQA),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig",
               {**GQA, "head_dim": 16, "sliding_window": 8, **ENDS}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {**GQA, **ENDS}),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig",
              {**GQA, "intermediate_size": 96, "num_experts": 8, "num_experts_per_tok": 2, **ENDS}),
    "bert": ("BertForMaskedLM", "BertConfig", SIZES),
    "vit": ("ViTForImageClassification", "ViTConfig",
            {**{n: v for n, v in SIZES.items() if n != "vocab_size"}, "image_size": 32,
             "patch_size": 8}),
}  # fmt: skip
FIXED_HIDDEN = {"gemma3"}
"""Embeddings are multiplied by √hidden, which a smaller config changes."""

HIDDEN_BY_HEADS = {"bert", "olmoe"}
"""A head is hidden ÷ heads wide, so both are one number."""

FIELDS = {"hidden": "hidden_size", "ffn": "intermediate_size", "experts": "num_experts",
          "layers": "num_hidden_layers"}  # fmt: skip

Widths = Mapping[str, int]
"""hidden, kv (heads of keys), q (query heads of each), ffn, experts, layers."""


def build(name: str, widths: Widths | None = None, device: str = "cpu") -> Any:
    """The model that its library makes of the config, with other widths or its own."""
    import transformers

    kind, config, sizes = MODELS[name]
    if widths is not None:
        sizes = {**sizes, **{FIELDS[n]: v for n, v in widths.items() if n in FIELDS}}
        sizes |= {"num_attention_heads": widths["kv"] * widths["q"]}
        if "num_key_value_heads" in sizes:
            sizes |= {"num_key_value_heads": widths["kv"]}
        sizes |= {"head_dim": head_dim(name)} if "bert" not in name else {}
        sizes = {n: v for n, v in sizes.items() if n != "num_experts" or "experts" in widths}
    torch.manual_seed(0)
    with torch.device(device):
        made = getattr(transformers, config)(**sizes)
        return getattr(transformers, kind)(made).eval()


def head_dim(name: str) -> int:
    """Width of a head."""
    sizes = MODELS[name][2]
    return int(sizes.get("head_dim", sizes["hidden_size"] // sizes["num_attention_heads"]))


def dense(name: str) -> dict[str, int]:
    """The widths of a model as it is."""
    sizes = MODELS[name][2]
    kv = sizes.get("num_key_value_heads", sizes["num_attention_heads"])
    found = {n: sizes[field] for n, field in FIELDS.items() if field in sizes}
    return {**found, "kv": kv, "q": sizes["num_attention_heads"] // kv}


@cache
def parameters(name: str, key: tuple[tuple[str, int], ...]) -> int | None:
    """Parameters of the library's model with these widths; None where it refuses or fails."""
    device = "cpu" if "experts" in dict(key) else "meta"  # which token goes where is a value
    try:
        model = build(name, dict(key), device)
        sizes = {
            size
            for module in model.modules()
            for attribute in ("head_dim", "attention_head_size")
            if (size := getattr(module, attribute, None)) is not None
        }
        inputs = {n: v.to(device) for n, v in hf.example_inputs(model).items()}
        with torch.no_grad():
            model(**inputs)
    except Exception:  # whatever a class says of widths that it can't have
        return None
    if sizes != {head_dim(name)}:
        return None
    return sum(p.numel() for p in model.parameters())


def count(name: str, widths: Widths) -> int | None:
    return parameters(name, tuple(sorted(widths.items())))


def draw(request: int) -> tuple[str, dict[str, Any]]:
    """A model and what is asked of it, as keyword arguments of ``prunus.shrink``."""
    dice = random.Random(request)
    name = list(MODELS)[request % len(MODELS)]
    asked: dict[str, Any] = {}
    way = dice.choice(("budget", "budget", "ratio", "remove", "remove", "both", "too much"))
    if way in ("budget", "both"):
        asked["budget"] = round(dice.uniform(0.25, 0.9), 2)
        asked["scope"] = dice.choice(("local", "global"))
    if way == "too much":
        asked["budget"] = round(dice.uniform(0.001, 0.02), 4)
    if way == "ratio":
        asked["ratio"] = round(dice.uniform(0.15, 0.6), 2)
    if way in ("remove", "both"):
        asked["remove"] = _draw_amounts(name, dice, 1 if way == "both" else dice.choice((1, 2, 2)))
    if way in ("budget", "ratio") and dice.random() < 0.5:
        asked["round_to"] = dice.choice((8, 16))
    if dice.random() < 0.3:
        asked["drop"] = 1
    return name, asked


def _draw_amounts(name: str, dice: random.Random, count: int) -> dict[str, float | int]:
    """Shares or counts by structure."""
    full = dense(name)
    structures = ["heads", "ffn", "hidden"]
    structures += ["kv_groups"] if full["q"] > 1 else []
    structures += ["experts"] if "experts" in full else []
    found: dict[str, float | int] = {}
    for structure in sorted(dice.sample(structures, count)):
        size = _size(full, structure)
        step = full["kv"] if structure == "heads" and full["q"] > 1 else 1
        exact = step * dice.randint(1, max(1, size // 2))
        found[structure] = exact if dice.random() < 0.5 else round(dice.uniform(0.2, 0.6), 2)
    return found


def _size(full: Widths, structure: str) -> int:
    """How many units of a structure are removed one by one: heads of each KV group."""
    return full[_axis(full, structure)]


def _axis(full: Widths, structure: str) -> str:
    heads = "q" if full["q"] > 1 else "kv"
    return {"kv_groups": "kv", "heads": heads}.get(structure, structure)


def is_feasible(name: str, asked: Mapping[str, Any]) -> bool:
    """Whether the config has widths that are what is asked, by trying them."""
    full = dense(name)
    start = {**full, "layers": full["layers"] - asked.get("drop", 0)}
    limit = math.floor(asked["budget"] * (count(name, full) or 0)) if "budget" in asked else None
    amounts = asked.get("remove", {})
    free = {n: _values(name, n, asked, limit is not None or "ratio" in asked) for n in full}
    free["layers"] = [start["layers"]]
    for structure, amount in amounts.items():
        axis = _axis(full, structure)
        values = _values(name, axis, {}, True)
        free[axis] = [n for n in values if _is_met(full, structure, n, amount)]
    if name in HIDDEN_BY_HEADS and _contradict(full, amounts):
        return False
    for n in ("ffn", "experts"):  # fewer cost less; kernels for experts take multiples of 4
        free[n] = free.get(n, [])[:4]
    names = [n for n in full if free[n]]
    if len(names) < len(full):
        return False
    for values in product(*(free[n] for n in names)):
        widths = dict(zip(names, values, strict=True))
        found = count(name, widths)
        within = found is not None and (limit is None or found <= limit)
        if within and (widths != full or limit is not None):
            return True
    return False


def _contradict(full: Widths, amounts: Mapping[str, float | int]) -> bool:
    """Whether amounts of heads and of hidden round to different numbers of heads."""
    heads = "heads" if full["q"] == 1 else "kv_groups"
    steps = {heads: 1, "hidden": full["hidden"] // full["kv"]}
    gone = set()
    for structure in steps.keys() & amounts.keys():
        amount = amounts[structure]
        units = amount * _size(full, structure) if isinstance(amount, float) else amount
        gone.add(math.floor(units / steps[structure] + 0.5))
    return len(gone) > 1


def _values(name: str, axis: str, asked: Mapping[str, Any], may_shrink: bool) -> list[int]:
    """Numbers that may be kept of an axis, ascending."""
    full = dense(name)
    size = full[axis]
    if not may_shrink or axis == "layers" or (axis == "hidden" and name in FIXED_HIDDEN):
        return [size]
    least = MODELS[name][2].get("num_experts_per_tok", 1) if axis == "experts" else 1
    if asked.get("scope") == "global":
        least = max(least, size - math.floor(0.8 * size + 1e-9))
    width = {"kv": head_dim(name)}.get(axis, 1)
    multiple = asked.get("round_to", 1) if axis in ("hidden", "ffn", "kv") else 1
    return [n for n in range(least, size + 1) if n == size or n * width % multiple == 0]


def _is_met(full: Widths, structure: str, kept: int, amount: float | int) -> bool:
    """Whether keeping so many is what was asked: a count exactly, a share within half of it."""
    size = _size(full, structure)
    gone = size - kept
    if isinstance(amount, int):
        each = full["kv"] if structure == "heads" and full["q"] > 1 else 1
        return gone * each == amount
    asked = math.floor(amount * size + 0.5)
    return gone > 0 and 2 * abs(gone - asked) <= asked


def examine(request: int) -> dict[str, Any]:
    """Ask, and see what comes of it."""
    import transformers

    name, asked = draw(request)
    row: dict[str, Any] = {
        "request": request, "model": name, "asked": str(asked), "feasible": is_feasible(name, asked)
    }  # fmt: skip
    model = build(name)
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    total, inputs = model.num_parameters(), hf.example_inputs(model, seed=1)
    options = {n: v for n, v in asked.items() if n != "budget"}
    if "budget" in asked:
        options["budget"] = prunus.Budget(params=asked["budget"])
    started = time.perf_counter()
    try:
        prunus.shrink(model, (), inputs, mode="uniform", each_group=False, **options)
        with tempfile.TemporaryDirectory() as folder:
            hf.save(model, folder, mode="uniform")
            loaded = getattr(transformers, MODELS[name][0]).from_pretrained(folder).eval()
        row |= _compare(name, asked, model, loaded, inputs, total)
    except PrunusError as error:
        after = model.state_dict()
        same = all(torch.equal(before[n], after[n]) for n in before)
        same = same and len(before) == len(after) and config == model.config.to_dict()
        row |= {"ended": "refused" if same else "half cut", "error": _first_line(error)}
    except Exception as error:  # of the library, which a user should never see
        row |= {"ended": "failed", "error": _first_line(error)}
    right = row["ended"] == ("folder" if row["feasible"] else "refused")
    seconds = f"{time.perf_counter() - started:.1f}"
    return {**row, "right": right, "seconds": seconds, "commit": commit()}


def _compare(
    name: str, asked: Mapping[str, Any], model: Any, loaded: Any, inputs: Any, total: int
) -> dict[str, Any]:
    """How what was loaded differs from what was written, and whether it is what was asked."""
    with torch.no_grad():
        gap = relative_error(model(**inputs).logits, loaded(**inputs).logits)
    own, full = loaded.config, dense(name)
    heads = own.num_attention_heads
    kv = getattr(own, "num_key_value_heads", None) or heads
    kept = {n: getattr(own, field) for n, field in FIELDS.items() if n in full}
    kept |= {"kv": kv, "q": heads // kv}
    ratio = loaded.num_parameters() / total
    met = gap <= EQUAL and ratio <= asked.get("budget", 1)
    for structure, amount in asked.get("remove", {}).items():
        met = met and _is_met(full, structure, kept[_axis(full, structure)], amount)
    return {
        "ended": "folder" if met else "another folder", "gap": f"{gap:.0e}",
        "params_ratio": f"{ratio:.3f}", "config": " ".join(f"{n}={v}" for n, v in kept.items()),
    }  # fmt: skip


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:160]


def main() -> None:
    parser = TABLE.parser(__doc__)
    parser.add_argument("requests", nargs="*", type=int, default=range(REQUESTS))
    options = parser.parse_args()
    for request in options.requests:
        options.table.add(examine(request))


if __name__ == "__main__":
    main()
