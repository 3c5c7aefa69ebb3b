"""Heads, FFN widths and layers of seventeen transformers, removed at random and proven.

    python -m benchmarks.exactness.transformers_heads   # all; ten minutes on one core
    python -m benchmarks.exactness.transformers_heads llama t5  # some; their rows are replaced

Every model is built by its library from a config, unmodified.  ``removed`` is how much of a
structure went, ``rel_err`` and ``moved`` are the certificate's.  ``witness``: *same
outputs* where the cut model's agree (to 1e-4) with those of the original in which the removed units
are zeros wherever matrices make or read them, or the dropped layers hand on what they are given,
and these are others than the dense model's; *same tokens* where that holds of greedy decoding and
its logits, with and without a KV cache.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Mapping
from typing import Any

import torch

import prunus
from benchmarks.peers.judge import EXACT, relative_error
from benchmarks.rows import Table, commit
from prunus.graph.axis import Axis
from prunus.integrations import hf

TABLE = Table(
    "transformers.csv",
    (
        "model", "structure", "named", "removed", "rel_err", "moved", "verdict", "params_ratio",
        "witness", "seconds", "commit",
    ),
    ("model", "structure"),
)  # fmt: skip
RATIO = 0.3
MOVED = 1e-3
"""Logits have to be moved by as much, or that they agree says nothing."""

KINDS: Mapping[str, tuple[str, ...]] = {
    "heads": ("heads", "kv groups", "query heads"),
    "ffn": ("ffn",),
    "layers": (),
}

SMALL = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8,
         "intermediate_size": 160, "vocab_size": 300}  # fmt: skip
GQA = {**SMALL, "num_key_value_heads": 4}
VISION = {n: v for n, v in SMALL.items() if n != "vocab_size"} | {"image_size": 32, "patch_size": 8}
SEQ2SEQ = {"d_model": 64, "encoder_layers": 4, "decoder_layers": 4, "encoder_attention_heads": 8,
           "decoder_attention_heads": 8, "encoder_ffn_dim": 160, "decoder_ffn_dim": 160,
           "vocab_size": 300}  # fmt: skip
ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}

MODELS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "bert-base": ("BertForMaskedLM", "BertConfig", {}),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", SMALL),
    "distilbert": ("DistilBertForMaskedLM", "DistilBertConfig",
                   {"dim": 64, "n_layers": 4, "n_heads": 8, "hidden_dim": 160, "vocab_size": 300}),
    "electra": ("ElectraForMaskedLM", "ElectraConfig", {**SMALL, "embedding_size": 64}),
    "deberta-v2": ("DebertaV2ForMaskedLM", "DebertaV2Config", SMALL),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config",
             {"n_embd": 64, "n_layer": 4, "n_head": 8, "vocab_size": 300, **ENDS}),
    "opt": ("OPTForCausalLM", "OPTConfig",
            {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8, "ffn_dim": 160,
             "vocab_size": 300, "word_embed_proj_dim": 64, **ENDS}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GQA),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GQA, "head_dim": 8}),
    "gemma3-text": ("Gemma3ForCausalLM", "Gemma3TextConfig",
                    {**GQA, "head_dim": 8, "sliding_window": 8, **ENDS}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**GQA, "num_local_experts": 4}),
    "t5": ("T5ForConditionalGeneration", "T5Config",
           {"d_model": 64, "d_kv": 8, "d_ff": 160, "num_layers": 4, "num_heads": 8,
            "vocab_size": 300, "decoder_start_token_id": 0}),
    "bart": ("BartForConditionalGeneration", "BartConfig", {**SEQ2SEQ, **ENDS}),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig",
                {**SEQ2SEQ, **ENDS, "max_source_positions": 32, "max_target_positions": 64,
                 "num_mel_bins": 16, "decoder_start_token_id": 0}),
    "vit": ("ViTForImageClassification", "ViTConfig", VISION),
    "swin": ("SwinForImageClassification", "SwinConfig",
             {"image_size": 56, "embed_dim": 32, "depths": [2, 4], "num_heads": [4, 8],
              "window_size": 7}),
    "clip": ("CLIPModel", "CLIPConfig",
             {"text_config": {**SMALL, "max_position_embeddings": 32, **ENDS},
              "vision_config": VISION, "projection_dim": 32}),
}  # fmt: skip


def build(name: str) -> Any:
    """The model that its library makes of the config."""
    import transformers

    kind, config, sizes = MODELS[name]
    torch.manual_seed(0)
    return getattr(transformers, kind)(getattr(transformers, config)(**sizes)).eval()


def examine(name: str, structure: str) -> dict[str, Any]:
    """Remove 30 % of one structure from a model, and prove it."""
    model = build(name)
    inputs = hf.example_inputs(model, tokens=(2, 12))
    prunus.verifier.randomize(model, (), inputs)
    started = time.perf_counter()
    graph = prunus.trace(model, (), inputs)
    original = copy.deepcopy(model)
    if structure == "layers":
        named, names = _layers(graph)
        shrunk = prunus.shrink(model, (), inputs, drop=names)
        removed = f"{len(names)} of {named}"
    else:
        parts = prunus.structures.find_structures(graph).of(*KINDS[structure])  # type: ignore[arg-type]
        named = sum(part.size for part in parts)
        own = {part.group for part in parts}
        hold = [group.name for group in graph.groups if group.name not in own]
        options: Any = {"ratio": RATIO, "importance": "random", "hold": hold}
        shrunk = prunus.shrink(model, (), inputs, **options)
        gone = sum(len(c.removed) for c in shrunk.plan.groups if c.name in own)
        removed = f"{gone} of {named}"
    proof = shrunk.certificate
    assert proof is not None
    return {
        "model": name, "structure": structure, "named": named, "removed": removed,
        "rel_err": f"{proof.rel_err:.1e}", "moved": f"{proof.moved:.1e}", "verdict": proof.verdict,
        "params_ratio": f"{proof.params[1] / proof.params[0]:.3f}",
        "witness": _compare(original, shrunk, inputs),
        "seconds": f"{time.perf_counter() - started:.1f}", "commit": commit(),
    }  # fmt: skip


def _layers(graph: Any) -> tuple[int, list[str]]:
    """All layers that hold an attention, and a random third of them, no first and no last."""
    dice = random.Random(0)
    stacks = prunus.structures.find_structures(graph).stacks
    blocks = {block.name for block in graph.blocks}
    names: list[str] = []
    for layers in stacks.values():
        inner = [layer.path for layer in layers[1:-1] if layer.path in blocks]
        names += sorted(dice.sample(inner, min(len(inner), max(1, round(RATIO * len(layers))))))
    return sum(map(len, stacks.values())), names


def _compare(original: Any, shrunk: Any, inputs: Mapping[str, Any]) -> str:
    """Whether the cut model answers as the original does without what was removed.

    The reference is plain PyTorch: zeros where matrices make or read the removed units, and blocks
    that hand on what they are given.  What generates decodes, with and without a cache.
    """
    pruned = shrunk.model
    writes = hasattr(pruned, "generate") and pruned.can_generate()
    if shrunk.plan.drops:
        reference = copy.deepcopy(original)
        for name in shrunk.plan.drops:
            reference.get_submodule(name).register_forward_hook(_hand_on, with_kwargs=True)
    else:
        reference = _silence(original, shrunk.plan.keep)

    def answers(model: Any) -> list[Answer]:
        if not writes:
            return [_run(model, inputs)]
        return [_decode(model, inputs, cached=cached) for cached in (True, False)]

    expected, *others = answers(reference)
    error = max(_gap(expected, answer) for answer in (*others, *answers(pruned)))
    moved = _gap(answers(original)[0], expected)
    if error > EXACT or not moved > MOVED:
        return f"differs by {error:.1e}, moved {moved:.1e}"
    return "same tokens" if writes else "same outputs"


Answer = tuple[list[torch.Tensor], list[torch.Tensor]]
"""Tokens that were chosen, if any, and floating-point outputs."""


def _run(model: Any, inputs: Mapping[str, Any]) -> Answer:
    with torch.no_grad():
        found = model(**inputs)
    return [], [v for v in found.values() if isinstance(v, torch.Tensor) and v.is_floating_point()]


def _silence(model: Any, keep: Mapping[Axis, Any]) -> Any:
    """A copy with zeros wherever a matrix made or read what is removed."""
    twin = copy.deepcopy(model)
    for axis, stay in keep.items():
        weight = dict(twin.named_parameters(remove_duplicate=False)).get(axis.tensor)
        if weight is not None and weight.dim() > 1:
            gone = sorted(set(range(weight.shape[axis.dim])) - set(stay))
            weight.data.index_fill_(axis.dim, torch.tensor(gone), 0)
    return twin


def _decode(model: Any, inputs: Mapping[str, Any], *, cached: bool) -> Answer:
    """Greedy tokens, and the logits that they were chosen by."""
    given = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    found = model.generate(
        **given, max_new_tokens=6, do_sample=False, pad_token_id=1, eos_token_id=None,
        use_cache=cached, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return [found.sequences], list(found.logits)


def _gap(a: Answer, b: Answer) -> float:
    """The relative difference of the outputs; infinite where other tokens were chosen."""
    same = all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))
    return relative_error(a[1], b[1]) if same else float("inf")


def _hand_on(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
    """Skip a block: its first floating-point argument takes the place of what it computes."""
    values = (*args, *kwargs.values())
    x = next(v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point())
    return x if isinstance(output, torch.Tensor) else (x, *output[1:])


def main() -> None:
    """Examine what is asked for, and save every row at once."""
    parser = TABLE.parser(__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", default=list(MODELS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.models:
        for structure in KINDS:
            try:
                row = examine(name, structure)
            except Exception as error:  # a row says what went wrong
                told = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                row = {"model": name, "structure": structure, "verdict": told, "commit": commit()}
            options.table.add(row)


if __name__ == "__main__":
    main()
