"""What is removed by structure: shares, percentages, counts, by layer, beside a budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import prunus
from prunus.errors import BudgetError, DataError, PlanError
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


def test_layers_beside_heads_by_layer() -> None:
    """Layers are called as before any of them is dropped."""
    small = shrunk(bert(), {"layers": 0.3, "heads": {0: 0.5, 3: 3}})
    assert small.certificate.verdict == "exact"
    assert len(small.plan.drops) == 1
    assert lost(small, QUERY) == [4, 0, 3]
    two = shrunk(t5(), {"layers": {"encoder.block": 1, "decoder.block": 1}})
    assert [name.rpartition(".")[0] for name in two.plan.drops] == [
        "encoder.block", "decoder.block",
    ]  # fmt: skip


def test_a_budget_takes_nothing_else_of_what_is_named() -> None:
    small = shrunk(bert(), {"heads": 2, "hidden": 0}, budget=prunus.Budget(macs=0.6), round_to=1)
    assert lost(small, QUERY) == [2] * 4
    assert lost(small, "embeddings.weight[1]") == [0]
    assert all(lost(small, FFN))
    assert 0.59 < small.plan.cost()["macs"].share <= 0.6


def test_beyond_the_local_scope_a_share_is_one_of_all_layers() -> None:
    model = bert()
    for layer, size in ((0, 0.01), (2, 0.1)):
        for parameter in model.bert.encoder.layer[layer].attention.parameters():
            parameter.data *= size
    small = shrunk(model, {"heads": 0.3, "ffn": {1: 4}}, scope="global", normalise="none")
    assert lost(small, QUERY) == [6, 0, 4, 0]  # at most 0.8 of a layer
    assert lost(small, FFN) == [0, 4, 0, 0]


def test_layers_are_chosen_by_the_measured_error_of_the_outputs() -> None:
    """What nothing reads is removed first, up to 0.8 of a layer, whatever its scores are."""
    model = bert()
    model.bert.encoder.layer[2].attention.output.dense.weight.data.zero_()
    data = [{"input_ids": torch.randint(1, 50, (4, 12))} for _ in range(4)]
    small = prunus.prune_heads(model, 0.3, scope="measured", data=data, recover="sequential")
    counts = lost(small, QUERY)
    assert (counts[2], sum(counts)) == (6, 10)
    assert small.plan.origin["scope"] == "measured"
    refused(
        bert(), "scope='measured' chooses among the layers", scope="measured", ratios={"*": 0.1}
    )
    with pytest.raises(DataError, match="scope='measured' needs calibration data"):
        prunus.prune_heads(bert(), 0.3, scope="measured")


def test_the_measured_error_shares_out_more_units_than_there_are_rounds_and_layers() -> None:
    data = [{"input_ids": torch.randint(1, 50, (4, 12))} for _ in range(4)]
    model = transformers.BertForMaskedLM(
        transformers.BertConfig(**{**SIZES, "num_hidden_layers": 1})
    ).eval()
    small = shrunk(model, {"ffn": 0.5}, scope="measured", data=data)
    assert lost(small, FFN) == [20]
    two = shrunk(bert(), {"ffn": 0.5}, scope="measured", data=data)
    assert sum(lost(two, FFN)) == 80
    with pytest.raises(BudgetError, match="80 units are to be removed, and only 40 may be"):
        shrunk(bert(), {"ffn": 0.5}, scope="measured", data=data, max_ratio=0.25)


def test_heads_by_amount_and_by_number() -> None:
    data = [{"input_ids": torch.randint(1, 50, (4, 12))} for _ in range(3)]
    small = prunus.prune_heads(llama(), 0.3, importance="taylor", data=data)
    assert lost(small, REP) == [1] * 4
    assert len(small.recovery) > 1
    small = prunus.prune_heads(bert(), {0: 1, 2: "50%"})
    assert lost(small, QUERY) == [1, 0, 4, 0]
    small = prunus.prune_heads(bert(), {0: [7]}, data=data, recover="least_squares")
    assert [step.name for step in small.recovery if step.kept][-1] == "least squares"


BAD: list[tuple[Any, Any, str]] = [
    (bert, {"heads": 1.5}, r"remove\['heads'\]=1\.5 is no amount(.|\n)*a share below 1"),
    (bert, {"heads": 1.0}, r"=1\.0 is no amount"),
    (bert, {"heads": True}, "=True is no amount"),
    (bert, {"heads": -1}, "=-1 is no amount"),
    (bert, {"heads": float("nan")}, "=nan is no amount"),
    (bert, {"ffn": {0: "100%"}}, r"remove\['ffn'\]\[0\]='100%' is no amount"),
    (bert, {"head": 0.3}, r"no structure is called 'head'(.|\n)*heads, kv_groups, ffn, experts"),
    (bert, {"heads": {0.5: 1}}, "0.5 is no layer"),
    (bert, {"layers": 0.1}, "share of layers is less than half a layer(.|\\n)*there are 4 layers"),
    (t5, {"layers": {"*coder.block": 0.3}}, r"'\*coder.block' fits 'encoder.block', 'decoder"),
    (
        bert,
        {"experts": 1},
        r"no experts that can be removed(.|\n)*it has heads, ffn, hidden",
    ),
    (bert, {"kv_groups": 1}, "no kv_groups that can be removed"),
    (bert, {"heads": 8}, r"8 heads can't be removed of 8(.|\n)*layer\.0(.|\n)*at most 7"),
    (llama, {"heads": 3}, r"3 heads can't be removed of 8(.|\n)*each of the 2 KV groups"),
    (
        llama,
        {"heads": 8},
        r"8 heads can't be removed of 8(.|\n)*2 KV groups(.|\n)*at most 6",
    ),
    (bert, {"heads": 0.05}, r"less than half a unit(.|\n)*at least 0\.0625, or a count: 1"),
    (bert, {"heads": {9: 1}}, r"no layers with heads are called 9(.|\n)*layer\.3"),
    (t5, {"ffn": {0: 1}}, r"2 layers with ffn are called 0(.|\n)*decoder\.block\.0"),
    (t5, {"heads": {"encoder.block.0": 1}}, r"no layers with heads(.|\n)*several layers share"),
    (bert, {"layers": 3}, r"3 blocks are to be dropped, and only 2 may be"),
    (bert, {"layers": {"bert.layer": 1}}, "no stack fits 'bert.layer'"),
]


@pytest.mark.parametrize(("build", "remove", "text"), BAD, ids=[str(one[1]) for one in BAD])
def test_what_can_not_be_removed_is_refused(build: Any, remove: Any, text: str) -> None:
    refused(build(), text, remove=remove)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ratio": 0.5}, "remove and a ratio were given"),
        ({"drop": 1, "remove": {"layers": 1}}, r"drop and remove\['layers'\] were given"),
        ({"ratios": {"*query*": 0.5}}, r"group bert\..*query.* is named twice"),
        ({"exclude": "*query*"}, "excluded"),
        ({"min_width": 8}, r"can't lose as many(.|\n)*min_width=8"),
    ],
)
def test_what_contradicts_it_is_refused(options: Any, text: str) -> None:
    refused(bert(), text, **{"remove": {"heads": 0.5}, **options})


def test_what_a_config_has_no_field_for_is_refused() -> None:
    torch.manual_seed(0)
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=16, depths=[2], num_heads=[2], window_size=4
    )
    model = transformers.SwinForImageClassification(config).eval()
    text = r"ffn can't be removed(.|\n)*no other integers in it make these right"
    refused(model, text, remove={"ffn": 0.3}, mode="uniform")


def refused(model: Any, text: str, **options: Any) -> None:
    """Nothing is cut."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(PlanError, match=text):
        prunus.shrink(model, each_group=False, **options)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("heads", "options", "text"),
    [
        ({0: [1], 2: 0.5}, {}, "some layers have numbers of heads, others amounts"),
        ({0: [1]}, {"importance": "l1"}, "importance can't be combined with heads by number"),
        (1.0, {}, "1.0 is no amount"),
    ],
)
def test_heads_that_are_said_in_two_ways(heads: Any, options: Any, text: str) -> None:
    with pytest.raises(PlanError, match=text):
        prunus.prune_heads(bert(), heads, **options)


def moe(kind: str = "Mixtral", **more: Any) -> Any:
    torch.manual_seed(0)
    sizes = {**SIZES, "num_hidden_layers": 2, "intermediate_size": 48, "num_key_value_heads": 2}
    config = getattr(transformers, f"{kind}Config")(**sizes, **more)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def test_experts_are_left_for_the_router() -> None:
    small = shrunk(moe(num_local_experts=8), {"experts": 0.3})
    assert small.certificate.verdict == "exact"
    assert [len(choice.removed) for choice in small.plan.groups if choice.size == 8] == [2, 2]
    text = r"%s experts can't be removed of 8(.|\n)*topk(.|\n)*takes 2(.|\n)*at most 6"
    for amount, count in ((7, "7"), (0.9, r"7\.2"), (8, "8")):
        refused(moe(num_local_experts=8), text % count, remove={"experts": amount})


def test_counts_are_met_or_refused() -> None:
    """The kernel of grouped products takes multiples only."""
    model = moe(num_local_experts=4)
    refused(model, r"exactly 5 units can't be removed(.|\n)*nearest number is 4", remove={"ffn": 5})
    assert set(lost(shrunk(model, {"ffn": 0.3}), "gate_up_proj[1]")) == {16}


@pytest.mark.parametrize("size", range(2, 33))
def test_of_thirty_per_cent_a_quarter_is_removed_at_least(size: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(2 * size, size, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    model, x = Net().eval(), torch.randn(1, 3, 2 * size)
    plan = prunus.plan(prunus.trace(model, x), model, remove={"heads": 0.3})
    (removed,) = [len(choice.removed) for choice in plan.groups if choice.removed]
    assert abs(removed - 0.3 * size) <= 0.5
    assert 0.25 <= removed / size <= 0.5
