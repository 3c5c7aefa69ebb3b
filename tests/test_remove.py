"""What is removed by structure: shares, percentages, counts, by layer, beside a budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import prunus
from prunus.integrations import hf

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "intermediate_size": 40,
    "vocab_size": 50,
}


def bert() -> Any:
    torch.manual_seed(0)
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)).eval()


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config).eval()


def t5() -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, vocab_size=50
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def shrunk(model: Any, remove: Any, **options: Any) -> Any:
    return prunus.shrink(
        model, (), hf.example_inputs(model), remove=remove, each_group=False, **options
    )


def lost(small: Any, end: str) -> list[int]:
    """Units removed of the groups whose names end so, in the order of the layers."""
    return [len(choice.removed) for choice in small.plan.groups if choice.name.endswith(end)]


QUERY, FFN, REP = "query.weight[0]", "intermediate.dense.weight[0]", "weight[0]/2"


@pytest.mark.parametrize(
    ("build", "remove", "end", "counts"),
    [
        (bert, {"heads": 0.3}, QUERY, [2] * 4),
        (bert, {"heads": 1}, QUERY, [1] * 4),
        (bert, {"ffn": "25%"}, FFN, [10] * 4),
        (bert, {"ffn": 7}, FFN, [7] * 4),
        (bert, {"heads": {0: 0.5, "bert.encoder.layer.3": 3}}, QUERY, [4, 0, 0, 3]),
        (bert, {"hidden": 0.3}, "embeddings.weight[1]", [10]),
        (llama, {"heads": 0.3}, REP, [1] * 4),
        (llama, {"heads": 4}, REP, [2] * 4),
        (llama, {"kv_groups": 0.3}, "q_proj.weight[0]", [1] * 4),
    ],
)
def test_a_structure_is_removed(build: Any, remove: Any, end: str, counts: list[int]) -> None:
    small = shrunk(build(), remove)
    assert small.certificate.verdict == "exact"
    assert lost(small, end) == counts
    assert sum(counts) == sum(len(choice.removed) for choice in small.plan.groups)
