"""Whole experts: router rows and stacked weights are cut together, as if never picked."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import prunus
from prunus.errors import PlanError
from prunus.graph.axis import Axis
from prunus.integrations import hf
from prunus.structures import find_structures

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "num_experts_per_tok": 2, "pad_token_id": None, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 8},
    "Qwen2Moe": {"num_experts": 8, "moe_intermediate_size": 24, "decoder_sparse_step": 1,
                 "shared_expert_intermediate_size": 40},
    "Qwen3Moe": {"num_experts": 8, "moe_intermediate_size": 24, "head_dim": 8},
    "Olmoe": {"num_experts": 8},
    "GptOss": {"num_local_experts": 8, "head_dim": 8, "rope_parameters": {"rope_type": "default"}},
    "DeepseekV3": {**LATENT, "n_routed_experts": 8, "moe_intermediate_size": 24, "n_group": 2,
                   "topk_group": 1},
}  # fmt: skip
IDS = {"input_ids": torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))}
CALL = {**IDS, "use_cache": False}


def build(family: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES[family]})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():  # routers that decide
        for name, weight in model.named_parameters():
            if name.endswith(("gate.weight", "router.weight")):
                weight.mul_(40)
    return model


def experts_of(graph: prunus.CouplingGraph) -> list[str]:
    return [one.group for one in find_structures(graph).of("experts")]


class _NeverPicked(TorchFunctionMode):
    """Router logits of some experts are −inf."""

    def __init__(self, removed: dict[int, list[int]]) -> None:
        super().__init__()
        self._removed = removed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.linear and args[1].data_ptr() in self._removed:
            index = torch.tensor(self._removed[args[1].data_ptr()])
            return out.index_fill(-1, index, float("-inf"))
        return out


@contextmanager
def never_picked(model: nn.Module, plan: prunus.Plan) -> Iterator[None]:
    state = dict(model.named_parameters())
    removed = {}
    for axis, kept in plan.keep.items():
        if axis.tensor.endswith(("gate.weight", "router.weight")) and axis.dim == 0:
            gone = np.setdiff1d(np.arange(state[axis.tensor].shape[0]), kept).tolist()
            removed[state[axis.tensor].data_ptr()] = gone
    assert removed
    with _NeverPicked(removed):
        yield


@pytest.mark.parametrize("family", FAMILIES)
def test_removed_experts_are_those_that_the_router_never_picks(family: str) -> None:
    model = build(family)
    graph = prunus.trace(model, kwargs=CALL)
    groups = experts_of(graph)
    assert len(groups) == (1 if family == "DeepseekV3" else 2)
    plan = prunus.plan(graph, model, ratios=dict.fromkeys(groups, 0.25), importance="random")
    certificate = prunus.verify(plan, model, kwargs=CALL)
    assert certificate.verdict == "exact"
    with torch.no_grad():
        dense = model(**CALL).logits
        with never_picked(model, plan):
            expected = model(**CALL).logits
        with prunus.mask(plan, model) as masked:
            silenced = masked(**CALL).logits
        prunus.apply(plan, model)
        found = model(**CALL).logits
    assert (dense - expected).abs().max() > 1e-3 * dense.abs().max()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, silenced, rtol=1e-4, atol=1e-5)
    stacked = [p for n, p in model.named_parameters() if "experts." in n and "shared" not in n]
    assert {len(p) for p in stacked} == {6}


def test_routing_groups_lose_equally_many_and_keep_top_k() -> None:
    model = build("DeepseekV3")
    graph = prunus.trace(model, kwargs=CALL)
    anatomy = find_structures(graph)
    (experts,), (groups,) = anatomy.of("experts"), anatomy.of("routing groups")
    assert (experts.size, groups.size) == (4, 2)
    assert (experts.experts, experts.each) == (2, 2)
    with pytest.raises(PlanError, match="each of the 2 routing groups has to lose equally many"):
        prunus.plan(graph, model, remove={"experts": 3})
    two = prunus.plan(graph, model, remove={"experts": 2})
    assert len(two.keep[Axis("model.layers.1.mlp.gate.weight", 0)]) == 6
    plan = prunus.plan(graph, model, ratio=0.9, importance="random")
    kept = np.asarray(plan.keep[Axis("model.layers.1.mlp.gate.weight", 0)])
    assert [int((kept // 4 == group).sum()) for group in (0, 1)] == [2, 2]


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_at_least_top_k_experts_are_kept(family: str) -> None:
    model = build(family)
    graph = prunus.trace(model, kwargs=CALL)
    groups = experts_of(graph)
    with pytest.raises(PlanError, match=r"at least 2 for aten.topk.*keep 2 of its 8 units"):
        prunus.plan(graph, model, ratios=dict.fromkeys(groups, 0.9), importance="random")
    prunus.apply(prunus.plan(graph, model, ratio=0.9, importance="random"), model)
    assert model(**CALL).logits.isfinite().all()
    assert {len(p) for n, p in model.named_parameters() if "experts." in n} == {2}
    with pytest.raises(PlanError, match="1 would be kept, and at least 2 are"):
        prunus.api.keep(build(family), groups[0], [3], kwargs=CALL)


class Chosen(nn.Module):
    """Rows of tables for the best of several classes."""

    def __init__(self, look_up: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.router, self.look_up = nn.Linear(6, 8), look_up
        self.table = nn.Embedding(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.look_up(self, self.router(x))


def scattered(m: Any, scores: Tensor) -> Tensor:
    values, places = scores.topk(2, -1)
    return torch.zeros_like(scores).scatter(-1, places, values) @ m.table.weight


def gathered(m: Any, scores: Tensor) -> Tensor:
    places = scores.softmax(-1).topk(2, -1)[1]
    return (scores.gather(-1, places)[..., None] * m.table(places)).sum(-2)


TIED = {
    "embedding": lambda m, scores: m.table(scores.argmax(-1)),
    "index": lambda m, scores: m.table.weight[scores.argmax(-1)],
    "index_select": lambda m, scores: m.table.weight.index_select(0, scores.argmax(-1)),
    "gather": gathered,
    "scatter": scattered,
}


@pytest.mark.parametrize("name", TIED)
def test_what_a_choice_looks_up_goes_with_it(name: str) -> None:
    torch.manual_seed(0)
    model, x = Chosen(TIED[name]).eval(), torch.randn(32, 6)
    graph = prunus.trace(model, x)
    plan = prunus.plan(graph, model, ratios={"*router.weight[[]0]": 0.5}, importance="random")
    assert prunus.verify(plan, model, x).verdict == "exact"
    assert len(plan.keep[Axis("router.weight", 0)]) == 4


@pytest.mark.parametrize(
    "look_up",
    [
        lambda m, scores: m.table.weight[scores.argmax(-1) // 2],
        lambda m, scores: m.table.weight[7 - scores.argmax(-1)],
        lambda m, scores: (scores.argmax(-1) == 3).float()[:, None] * m.table.weight[0],
        lambda m, scores: scores.topk(2, -1)[1].float(),
    ],
)
def test_positions_that_are_computed_with_keep_every_class(look_up: Any) -> None:
    model = Chosen(look_up).eval()
    graph = prunus.trace(model, torch.randn(32, 6))
    assert Axis("router.weight", 0) not in graph.labels


def contributions(model: nn.Module, path: str) -> dict[int, list[float]]:
    """By expert the norms of what it adds to its tokens, each token and expert run alone."""
    found: dict[int, list[float]] = {}
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    experts = model.get_submodule(path)
    handle = experts.register_forward_pre_hook(lambda _, args: seen.append(args))
    with torch.no_grad():
        model(**CALL)
        handle.remove()
        ((hidden, chosen, weights),) = seen
        for row, (own, shares) in enumerate(zip(chosen.tolist(), weights, strict=True)):
            for expert, share in zip(own, shares, strict=True):
                alone = experts(hidden[row : row + 1], torch.tensor([[expert]]), share[None, None])
                found.setdefault(expert, []).append(float(alone.norm()))
    return found


@pytest.mark.parametrize("kernel", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_reap_is_the_mean_norm_of_what_an_expert_adds(family: str, kernel: str) -> None:
    model = build(family)
    graph = prunus.trace(model, kwargs=CALL)
    model.config._experts_implementation = kernel
    statistics = prunus.importance.collect(model, graph, [CALL], "routed")
    tensors = dict(model.named_parameters())
    scores = prunus.importance.score(graph, tensors, "reap", statistics=statistics)
    for layer, name in enumerate(experts_of(graph)):
        added = contributions(model, f"model.layers.{layer}.mlp.experts")
        wanted = [np.mean(added.get(expert, [0.0])) for expert in range(8)]
        np.testing.assert_allclose(scores[graph.group(name).units], wanted, rtol=1e-4)
    others = [group for group in graph.groups if group.name not in experts_of(graph)]
    assert all(np.isinf(scores[group.units]).all() for group in others)


def test_shrink_removes_the_experts_that_add_least() -> None:
    model = build("Qwen3Moe")
    added = contributions(model, "model.layers.0.mlp.experts")
    least = sorted(range(8), key=lambda expert: np.mean(added.get(expert, [0.0])))[:2]
    small = prunus.shrink(
        model, kwargs=CALL, remove={"experts": 0.25}, importance="reap", data=[CALL]
    )
    assert small.certificate is not None
    assert small.certificate.verdict == "exact"
    kept = small.plan.keep[Axis("model.layers.0.mlp.gate.weight", 0)]
    assert sorted(set(range(8)) - set(map(int, kept))) == sorted(least)


def test_a_latent_width_of_an_attention_is_no_ffn() -> None:
    anatomy = find_structures(prunus.trace(build("DeepseekV3"), kwargs=CALL))
    assert all("mlp" in part.group for part in anatomy.of("ffn"))
    assert {part.size for part in anatomy.of("other")} == {16}


def switch() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.SwitchTransformersConfig(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=4, num_decoder_layers=4,
        num_heads=4, num_experts=6, num_sparse_encoder_layers=2, num_sparse_decoder_layers=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.SwitchTransformersForConditionalGeneration(config).eval()


def eager() -> nn.Module:
    model = build("Mixtral")
    model.config._experts_implementation = "eager"
    return model


VISITED = [(switch, {"heads": 0.5, "ffn": 0.25, "layers": 1}), (eager, {"heads": 0.5, "ffn": 0.25})]


@pytest.mark.parametrize(("make", "amounts"), VISITED)
def test_experts_that_python_visits_by_value_are_all_visited(make: Any, amounts: Any) -> None:
    call = CALL if make is eager else {**IDS, "decoder_input_ids": IDS["input_ids"]}
    for structure, amount in amounts.items():
        small = prunus.shrink(
            make(),
            kwargs=call,
            remove={structure: amount},
            importance="random",
            each_group=False,
        )
        assert small.certificate is not None
        assert small.certificate.verdict == "exact"


def test_a_mask_follows_a_model_that_visits_by_value() -> None:
    model, call = switch(), {**IDS, "decoder_input_ids": IDS["input_ids"]}
    graph = prunus.trace(model, kwargs=call)
    plan = prunus.plan(graph, model, ratio=0.3, importance="random")
    with torch.no_grad():
        with prunus.mask(plan, model) as masked:
            silenced = masked(**call).logits
        prunus.apply(plan, model)
        torch.testing.assert_close(model(**call).logits, silenced, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "count"),
    [("Qwen2Moe", "num_experts"), ("GptOss", "num_local_experts"),
     ("DeepseekV3", "n_routed_experts")],
)  # fmt: skip
def test_a_uniform_mixture_is_read_by_its_library(family: str, count: str, tmp_path: Any) -> None:
    model = build(family)
    prunus.shrink(
        model, kwargs=CALL, remove={"experts": 0.25}, importance="random", mode="uniform",
        each_group=False,
    )  # fmt: skip
    assert getattr(model.config, count) == 6
    hf.save(model, tmp_path, mode="uniform")
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**CALL).logits, model(**CALL).logits)
