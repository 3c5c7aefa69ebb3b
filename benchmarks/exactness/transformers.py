"""Heads, KV groups, FFN widths, experts and layers of transformers, removed by structure.

    python -m benchmarks.exactness.transformers                # all that is not done yet
    python -m benchmarks.exactness.transformers llama t5       # some models; rows are replaced
    python -m benchmarks.exactness.transformers --mode uniform # one mode

Every model is built by its library from a config, unmodified, and loses 30 % of each structure that
it has, and of all at once, by ``remove={"heads": 0.3}`` in both modes.

``share`` is what was removed of the structure in the layers that are left, of *all* the least one;
``rel_err`` and ``moved`` are the certificate's.  ``witness``: *same outputs* where the pruned
model's agree (to 1e-4) with those of the original in plain PyTorch, in which the removed units are
zeros wherever matrices make or read them, norms see the kept positions alone, the router never
picks the removed experts (its logits are −inf), and the dropped layers hand on what they are given,
and where these are others than the dense model's; *same tokens* where that holds of greedy decoding
and its logits, with and without a KV cache.

``loads``, ``logits``, ``generate``: whether the folder is read by ``from_pretrained`` in a process
that never imports prunus (free mode: by ``hf.load``), and answers as the pruned model does, tokens
with and without a cache included.  ``live``: the same of ``save_pretrained`` of the live model; in
free mode it has to be refused.  ``verdict`` begins with *refused* where the config can't say it.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import prunus
from benchmarks.exactness.library_reader import Answer, answers, decode, forward, writes
from benchmarks.peers.judge import EXACT, relative_error
from benchmarks.rows import ROOT, Table, commit
from prunus.graph.amounts import LAYERS, REMOVABLE
from prunus.graph.plan_records import Renaming
from prunus.integrations import hf
from prunus.structures import find_structures

MODES = ("free", "uniform")
ALL = "all"
TABLE = Table(
    "transformers.csv",
    (
        "model", "mode", "structure", "named", "removed", "share", "rel_err", "moved", "verdict",
        "params_ratio", "witness", "loads", "logits", "generate", "live", "seconds", "commit",
    ),
    ("model", "mode", "structure"),
)  # fmt: skip
RATIO = 0.3
LEAST = 0.25
"""Less of what was named is no removal of 30 %."""

MOVED = 1e-3
"""Logits have to be moved by as much, or that they agree says nothing."""

SMALL = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 12,
         "intermediate_size": 160, "vocab_size": 300, "max_position_embeddings": 64}  # fmt: skip
ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
GQA = {**SMALL, **ENDS, "num_key_value_heads": 4}
HEAD_DIM = {**GQA, "head_dim": 8}
MIXTURE = {**GQA, "num_local_experts": 8, "num_experts": 8, "num_experts_per_tok": 2,
           "moe_intermediate_size": 48}  # fmt: skip
LATENT = {
    **MIXTURE, "num_key_value_heads": 12, "q_lora_rank": 24, "kv_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 8,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
}  # fmt: skip
VISION = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 12,
          "intermediate_size": 160, "image_size": 32, "patch_size": 8}  # fmt: skip
SEQ2SEQ = {"d_model": 96, "encoder_layers": 4, "decoder_layers": 4, "encoder_attention_heads": 12,
           "decoder_attention_heads": 12, "encoder_ffn_dim": 160, "decoder_ffn_dim": 160,
           "vocab_size": 300, "max_position_embeddings": 64, **ENDS,
           "decoder_start_token_id": 0, "forced_eos_token_id": None}  # fmt: skip
T5 = {"d_model": 96, "d_kv": 8, "d_ff": 160, "num_layers": 4, "num_decoder_layers": 4,
      "num_heads": 12, "vocab_size": 300, "decoder_start_token_id": 0}  # fmt: skip

MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "bert": ("BertForMaskedLM", SMALL),
    "roberta": ("RobertaForMaskedLM", {**SMALL, **ENDS}),
    "distilbert": ("DistilBertForMaskedLM",
                   {"dim": 96, "n_layers": 4, "n_heads": 12, "hidden_dim": 160, "vocab_size": 300}),
    "electra": ("ElectraForMaskedLM", {**SMALL, "embedding_size": 96}),
    "mpnet": ("MPNetForMaskedLM", SMALL),
    "deberta-v2": ("DebertaV2ForMaskedLM", SMALL),
    "modernbert": ("ModernBertForMaskedLM", {**SMALL, "pad_token_id": 1, "bos_token_id": 0,
                   "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2, "local_attention": 8}),
    "gpt2": ("GPT2LMHeadModel",
             {"n_embd": 96, "n_layer": 4, "n_head": 12, "n_inner": 160, "vocab_size": 300, **ENDS}),
    "opt": ("OPTForCausalLM", {**SMALL, **ENDS, "ffn_dim": 160, "word_embed_proj_dim": 96}),
    "gpt-neox": ("GPTNeoXForCausalLM", {**SMALL, **ENDS}),
    "llama": ("LlamaForCausalLM", GQA),
    "mistral": ("MistralForCausalLM", {**HEAD_DIM, "sliding_window": 8}),
    "qwen2": ("Qwen2ForCausalLM", GQA),
    "qwen3": ("Qwen3ForCausalLM", HEAD_DIM),
    "gemma3-text": ("Gemma3ForCausalLM", {**HEAD_DIM, "sliding_window": 8}),
    "phi3": ("Phi3ForCausalLM", GQA),
    "olmo2": ("Olmo2ForCausalLM", GQA),
    "glm": ("GlmForCausalLM", HEAD_DIM),
    "mixtral": ("MixtralForCausalLM", {**MIXTURE, "head_dim": 8}),
    "qwen2-moe": ("Qwen2MoeForCausalLM", {**MIXTURE, "shared_expert_intermediate_size": 64,
                                          "decoder_sparse_step": 1}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", {**MIXTURE, "head_dim": 8}),
    "olmoe": ("OlmoeForCausalLM", MIXTURE),
    "gpt-oss": ("GptOssForCausalLM", {**MIXTURE, "head_dim": 8, "sliding_window": 8,
                                      "rope_parameters": {"rope_type": "default"}}),
    "deepseek-v3": ("DeepseekV3ForCausalLM", LATENT),
    "switch": ("SwitchTransformersForConditionalGeneration",
               {**T5, "num_experts": 8, "num_sparse_encoder_layers": 2,
                "num_sparse_decoder_layers": 2}),
    "t5": ("T5ForConditionalGeneration", T5),
    "bart": ("BartForConditionalGeneration", SEQ2SEQ),
    "whisper": ("WhisperForConditionalGeneration",
                {**SEQ2SEQ, "max_source_positions": 32, "max_target_positions": 64,
                 "num_mel_bins": 16}),
    "vit": ("ViTForImageClassification", VISION),
    "dinov2": ("Dinov2ForImageClassification", VISION),
    "swin": ("SwinForImageClassification",
             {"image_size": 56, "embed_dim": 32, "depths": [2, 4], "num_heads": [4, 8],
              "window_size": 7}),
    "clip": ("CLIPModel", {"text_config": {**SMALL, **ENDS}, "vision_config": VISION,
                           "projection_dim": 32}),
    "siglip": ("SiglipModel", {"text_config": {**SMALL, "projection_size": 96},
                               "vision_config": VISION}),
}  # fmt: skip


def build(name: str) -> Any:
    """The model that its library makes of the config."""
    import transformers

    kind = getattr(transformers, MODELS[name][0])
    torch.manual_seed(0)
    return kind(kind.config_class(**copy.deepcopy(MODELS[name][1]))).eval()


def structures_of(name: str) -> list[str]:
    """What a model can lose, and *all* of it together."""
    model = build(name)
    graph = prunus.trace(model, (), hf.example_inputs(model, tokens=(2, 12)))
    anatomy = find_structures(graph)
    found = [one for one in REMOVABLE if one != "hidden" and anatomy.of(*REMOVABLE[one].kinds)]
    return [*found, *([LAYERS] if graph.blocks else []), ALL]


class Reader:
    """The other process; see :mod:`benchmarks.exactness.library_reader`."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "benchmarks.exactness.library_reader"]
        self._process = subprocess.Popen(
            command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def read(self, kind: str, folder: str, inputs: Mapping[str, Any]) -> dict[str, Answer] | str:
        """What the library's model answers, or what it says instead."""
        with TemporaryDirectory() as place:
            paths = {name: str(Path(place) / name) for name in ("inputs", "answers")}
            torch.save(dict(inputs), paths["inputs"])
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            print(json.dumps({"kind": kind, "folder": folder, **paths}), file=self._process.stdin,
                  flush=True)  # fmt: skip
            said = json.loads(self._process.stdout.readline())
            found: dict[str, Answer] = (
                torch.load(paths["answers"], weights_only=True) if said == "ok" else {}
            )
            return found if said == "ok" else str(said)


def examine(name: str, structure: str, mode: str, reader: Reader) -> dict[str, Any]:
    """Remove 30 % of one structure from a model, and check it in every way."""
    model, started = build(name), time.perf_counter()
    inputs = hf.example_inputs(model, tokens=(2, 12))
    prunus.verifier.randomize(model, (), inputs)
    original, before = copy.deepcopy(model), _sizes(model, inputs)
    names = structures_of(name)[:-1] if structure == ALL else [structure]
    try:
        shrunk = prunus.shrink(
            model, (), inputs, remove=dict.fromkeys(names, RATIO), importance="random", mode=mode,
            recover="none",
        )  # fmt: skip
    except prunus.PrunusError as error:
        told = f"refused: {' '.join(str(error).split())}"[:200]
        return {"model": name, "mode": mode, "structure": structure, "verdict": told,
                "commit": commit()}  # fmt: skip
    after = _sizes(shrunk.model, inputs)
    proof = shrunk.certificate
    assert proof is not None
    row = {
        "model": name, "mode": mode, "structure": structure,
        "named": "+".join(str(sum(before[one].values())) for one in names),
        "removed": "+".join(
            str(sum(before[one].values()) - sum(after[one].values())) for one in names
        ),
        "share": f"{min(_share(one, before, after, shrunk.plan.drops) for one in names):.3f}",
        "rel_err": f"{proof.rel_err:.1e}", "moved": f"{proof.moved:.1e}", "verdict": proof.verdict,
        "params_ratio": f"{proof.params[1] / proof.params[0]:.3f}",
        "witness": _compare(original, shrunk, inputs), "commit": commit(),
    }  # fmt: skip
    found = (_uniform if mode == "uniform" else _free)(shrunk.model, inputs, reader)
    return {**row, **found, "seconds": f"{time.perf_counter() - started:.1f}"}


Sizes = Mapping[str, Mapping[str, int]]
"""By structure the units of each of its groups; of layers the number of all."""


def _sizes(model: Any, inputs: Mapping[str, Any]) -> Sizes:
    graph = prunus.trace(model, (), inputs)
    anatomy = find_structures(graph)
    found = {
        one: {part.group: part.size for part in anatomy.of(*of.kinds)}
        for one, of in REMOVABLE.items()
    }
    return {**found, LAYERS: {"": len(graph.blocks)}}


def _share(structure: str, before: Sizes, after: Sizes, drops: tuple[str, ...]) -> float:
    """What groups have lost that are left; layers, of all."""
    names = Renaming(drops)
    left = {names.before(group): size for group, size in after[structure].items()}
    return 1 - sum(left.values()) / sum(before[structure][group] for group in left)


def _uniform(model: Any, inputs: Mapping[str, Any], reader: Reader) -> dict[str, str]:
    """What the library says of the folder, and of what the live model saves."""
    expected = answers(model, inputs)
    with TemporaryDirectory() as folder, TemporaryDirectory() as live:
        try:
            hf.save(model, folder, mode="uniform")
        except prunus.PrunusError as error:
            return {"loads": f"not written: {' '.join(str(error).split())}"[:160]}
        found = reader.read(type(model).__name__, folder, inputs)
        model.save_pretrained(live)
        again = reader.read(type(model).__name__, live, inputs)
    row = {"live": again if isinstance(again, str) else _same(expected, again)}
    if isinstance(found, str):
        return {**row, "loads": found}
    written = {kind: found[kind] for kind in found if kind != "forward"}
    tokens = _same({kind: expected[kind] for kind in written}, written) if written else ""
    return {**row, "loads": "yes", "generate": tokens,
            "logits": _same({"": expected["forward"]}, {"": found["forward"]})}  # fmt: skip


def _free(model: Any, inputs: Mapping[str, Any], reader: Reader) -> dict[str, str]:
    """What ``hf.load`` makes of the folder, and whether ``save_pretrained`` is refused."""
    with TemporaryDirectory() as folder, TemporaryDirectory() as live:
        hf.save(model, folder)
        found = hf.load(folder)
        try:
            model.save_pretrained(live)
            said = "written"
        except prunus.PrunusError:
            said = "refused"
        if said == "written":  # which is right where the plain config happens to say it
            again = reader.read(type(model).__name__, live, inputs)
            said = again if isinstance(again, str) else _same(answers(model, inputs), again)
    expected, again = answers(model, inputs), answers(found, inputs)
    tokens = {kind: expected.pop(kind) for kind in ("True", "False") if kind in expected}
    return {
        "loads": "yes", "live": said, "logits": _same(expected, {"forward": again["forward"]}),
        "generate": _same(tokens, {kind: again[kind] for kind in tokens}) if tokens else "",
    }  # fmt: skip


def _same(expected: Mapping[str, Answer], found: Mapping[str, Answer]) -> str:
    gap = max(_gap(answer, found[kind]) for kind, answer in expected.items())
    return "equal" if gap <= EXACT else f"differs by {gap:.1e}"


def _compare(original: Any, shrunk: Any, inputs: Mapping[str, Any]) -> str:
    """Whether the pruned model answers as the original does without what was removed.

    The reference is plain PyTorch.  What generates decodes, with and without a cache.
    """
    pruned, plan = shrunk.model, shrunk.plan
    reference = copy.deepcopy(original)
    for name in plan.drops:
        reference.get_submodule(name).register_forward_hook(_hand_on, with_kwargs=True)
    routers = _silence(reference, plan)

    def run(model: Any) -> list[Answer]:
        with _NeverPicked(routers) if model is reference else nullcontext():
            if not writes(model):
                return [forward(model, inputs)]
            return [decode(model, inputs, cached=cached) for cached in (True, False)]

    expected, *others = run(reference)
    error = max(_gap(expected, answer) for answer in (*others, *run(pruned)))
    moved = _gap(run(original)[0], expected)
    if error > EXACT or not moved > MOVED:
        return f"differs by {error:.1e}, moved {moved:.1e}"
    return "same tokens" if writes(pruned) else "same outputs"


def _silence(model: Any, plan: prunus.Plan) -> dict[int, list[int]]:
    """Zeros wherever a matrix makes or reads what is removed; what routers never pick, by router.

    Weights that experts stack lose whole experts only along with rows of a router.
    """
    state, modules = (
        dict(model.named_parameters(remove_duplicate=False)),
        dict(model.named_modules()),
    )
    removed: dict[str, dict[int, list[int]]] = {}
    names = Renaming(plan.drops)
    for axis, stay in plan.keep.items():
        name = names.before(axis.tensor)
        if name in state:
            gone = sorted(set(range(state[name].shape[axis.dim])) - set(stay))
            removed.setdefault(name, {})[axis.dim] = gone
    for name, dims in removed.items():
        owner = modules[name.rpartition(".")[0]]
        if state[name].dim() == 1 and name.endswith(".weight") and "Norm" in type(owner).__name__:
            _norm_the_rest(owner, dims[0])
    stacks = {n: dims[0] for n, dims in removed.items() if state[n].dim() == 3 and 0 in dims}
    routers: dict[int, list[int]] = {}
    for name, dims in removed.items():
        for dim, gone in dims.items():
            beside = [own for n, own in stacks.items() if n.rpartition(".")[0].rpartition(".")[0]
                      == name.rpartition(".")[0].rpartition(".")[0]]  # fmt: skip
            if state[name].dim() == 2 and dim == 0 and gone in beside and "expert" not in name:
                routers[state[name].data_ptr()] = gone
            elif state[name].dim() > 1 and not (name in stacks and dim == 0):
                state[name].data.index_fill_(dim, torch.tensor(gone), 0)
    return routers


def _norm_the_rest(norm: Any, gone: list[int]) -> None:
    """Let a norm see all but some positions, and leave zeros there."""
    small, stay = copy.deepcopy(norm), [n for n in range(len(norm.weight)) if n not in set(gone)]
    for name, parameter in list(small.named_parameters()):
        setattr(small, name, torch.nn.Parameter(parameter.detach()[stay]))
    if isinstance(small, torch.nn.LayerNorm):
        small.normalized_shape = (len(stay),)

    def run(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x).index_copy(-1, torch.tensor(stay), small(x[..., stay]))

    norm.forward = run


class _NeverPicked(TorchFunctionMode):
    """Logits of some experts of each router, by where its weight lies, are −inf."""

    def __init__(self, routers: Mapping[int, list[int]]) -> None:
        super().__init__()
        self._routers = routers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is F.linear and args[1].data_ptr() in self._routers:
            gone = torch.tensor(self._routers[args[1].data_ptr()])
            return found.index_fill(-1, gone, float("-inf"))
        return found


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
    """Examine what is asked for, or what is not done yet, and save every row at once."""
    from transformers.utils import logging

    parser = TABLE.parser(__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--mode", choices=MODES, action="append", help="one mode alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    done = set() if options.models else options.table.done()
    reader = Reader()
    for name in options.models or MODELS:
        for mode in options.mode or MODES:
            for structure in structures_of(name):
                if (name, mode, structure) in done:
                    continue
                try:
                    row = examine(name, structure, mode, reader)
                except Exception as error:  # a row says what went wrong
                    told = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                    row = {"model": name, "mode": mode, "structure": structure, "verdict": told,
                           "commit": commit()}  # fmt: skip
                options.table.add(row)


if __name__ == "__main__":
    main()
