"""Whole blocks are dropped: found, named, taken out, proven, undone, saved, and refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn

import models_zoo
import prunus
from prunus.errors import ApplyError, ModelError, PlanError, VerifyError
from prunus.graph.plan_records import Renaming
from prunus.graph.plans import Plan
from prunus.surgeon import depth, drop_blocks
from prunus.surgeon.depth import without_blocks
from prunus.surgeon.layer_count import find_counts
from prunus.verifier import case as cases
from prunus.verifier.depth import skip
from tests import witness

TOKENS = torch.arange(14).reshape(2, 7) * 3 % 64
WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 64}
SPECIAL = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}


def bert(layers: int = 4) -> nn.Module:
    return tf.BertModel(tf.BertConfig(num_hidden_layers=layers, **WIDTHS))


def llama(layers: int = 4, **more: Any) -> nn.Module:
    more = {"num_key_value_heads": 2, **SPECIAL, **more}
    return tf.LlamaForCausalLM(tf.LlamaConfig(num_hidden_layers=layers, **WIDTHS, **more))


KINDS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


def gemma() -> nn.Module:
    own = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 3, "layer_types": KINDS}
    config = tf.Gemma3TextConfig(num_hidden_layers=4, **WIDTHS, **own, **SPECIAL)
    return tf.Gemma3ForCausalLM(config)


def gpt2() -> nn.Module:
    widths = {"vocab_size": 64, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 48}
    return tf.GPT2LMHeadModel(tf.GPT2Config(**widths, **SPECIAL))


def t5() -> nn.Module:
    widths = {"vocab_size": 64, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4}
    # With fewer layers in its encoder than in its decoder, transformers' T5 can't fill its cache.
    layers = {"num_layers": 4, "num_decoder_layers": 4, "decoder_start_token_id": 0}
    return tf.T5ForConditionalGeneration(tf.T5Config(**widths, **layers))


def bart() -> nn.Module:
    widths = {"vocab_size": 64, "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    layers = {"encoder_layers": 3, "decoder_layers": 4}
    return tf.BartForConditionalGeneration(tf.BartConfig(**widths, **heads, **layers))


def swin() -> nn.Module:
    sizes = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "window_size": 4}
    return tf.SwinModel(tf.SwinConfig(**sizes, depths=[2, 2], num_heads=[2, 4]))


PAIR = {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :5]}
IMAGE = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32).sin()


class Bottleneck(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.squeeze, self.expand = nn.Conv2d(width, 6, 1), nn.Conv2d(6, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.expand(self.squeeze(x.relu()).relu())


class Staged(nn.Module):
    """As timm builds them: a sequence of stages, each a sequence that begins with a stride."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(old, new, 3, 2, 1), *(Bottleneck(new) for _ in range(3)))
                for old, new in ((3, 8), (8, 12))
            )
        )
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(x).mean((2, 3)))


class Indexed(nn.Module):
    """Runs its layers by their places, up to a number that it keeps."""

    def __init__(self, width: int = 8, depth: int = 4) -> None:
        super().__init__()
        self.depth = depth
        self.stem = nn.Linear(3, width)
        self.layers = nn.ModuleList(Mlp(width, 12) for _ in range(depth))
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for place in range(self.depth):
            x = self.layers[place](x)
        return self.head(x)


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(x)))


CASES: dict[str, tuple[Callable[[], nn.Module], Any, Any, dict[str, list[int]]]] = {
    "bert": (bert, (TOKENS,), {}, {"encoder.layer": [1, 2]}),
    "llama": (llama, (TOKENS,), {}, {"model.layers": [0, 2]}),
    "gemma": (gemma, (TOKENS,), {}, {"model.layers": [1]}),
    "gpt2": (gpt2, (TOKENS,), {}, {"transformer.h": [0, 3]}),
    "t5": (t5, (), PAIR, {"encoder.block": [1], "decoder.block": [2, 3]}),
    "bart": (bart, (), PAIR, {"model.encoder.layers": [0], "model.decoder.layers": [1]}),
    "swin": (swin, (IMAGE,), {}, {"encoder.layers.0.blocks": [1]}),
    "staged": (Staged, (IMAGE,), {}, {"stages.0": [2], "stages.1": [3]}),
    "indexed": (Indexed, (torch.ones(2, 3),), {}, {"layers": [1]}),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Any, Any, dict[str, list[int]]]:
    build, args, kwargs, layers = CASES[request.param]
    torch.manual_seed(0)
    model = build().eval()
    prunus.verifier.randomize(model, args, kwargs)
    return model, args, kwargs, layers


def answer(model: nn.Module, args: Any, kwargs: Any) -> Tensor:
    with torch.no_grad():
        found = model(*args, **kwargs)
    return found if isinstance(found, Tensor) else found[0]


KEPT = (int, str, list, tuple)


def state(model: nn.Module) -> Any:
    """All that a failure has to leave as it was."""
    values = {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict().items()}
    names = [name for name, _ in model.named_modules()]
    held = [
        {k: copy.copy(v) for k, v in vars(m).items() if isinstance(v, KEPT) and k[0] != "_"}
        for m in model.modules()
    ]
    config = getattr(model, "config", None)
    return values, names, held, None if config is None else copy.deepcopy(vars(config))


def assert_same(before: Any, after: Any) -> None:
    assert before[1:] == after[1:]
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(a, after[0][name][1]) for name, (_, a) in before[0].items())


def test_dropping_equals_skipping(case) -> None:
    model, args, kwargs, layers = case
    names = [f"{stack}.{place}" for stack, places in layers.items() for place in places]
    original = copy.deepcopy(model)
    before = answer(model, args, kwargs)
    for stack, places in layers.items():
        length = len(model.get_submodule(stack))
        done = prunus.drop_layers(model, places, args, kwargs, stack=stack)
        assert done.certificate is not None
        assert done.certificate.verdict == "exact"
        assert set(done.certificate.moved_alone) == {f"{stack}.{place}" for place in places}
        assert not done.certificate.unverified
        assert len(model.get_submodule(stack)) == length - len(places)
        dense, left = done.plan.costs["params"]
        assert done.certificate.params == (dense, left)
        assert left == sum(parameter.numel() for parameter in model.parameters()) < dense
    with skip(original, names):
        expected = answer(original, args, kwargs)
    found = answer(model, args, kwargs)
    assert torch.equal(found, expected)
    assert (found - before).abs().max() > 1e-3 * before.abs().max()


def test_a_dropped_model_can_be_saved_and_loaded(case, tmp_path) -> None:
    model, args, kwargs, layers = case
    build = next(b for b, *rest in CASES.values() if rest[2] is layers)
    for stack, places in layers.items():
        prunus.drop_layers(model, places, args, kwargs, stack=stack, verified=False)
    prunus.save(model, tmp_path / "small.safetensors")
    again = prunus.load(tmp_path / "small.safetensors", build=build).eval()
    assert torch.equal(answer(model, args, kwargs), answer(again, args, kwargs))
    assert state(model)[1:] == state(again)[1:]


@pytest.mark.parametrize("name", ["bert", "llama", "gemma", "gpt2", "t5", "bart", "swin"])
def test_the_library_loads_what_its_config_says(name, tmp_path) -> None:
    build, args, kwargs, layers = CASES[name]
    model = build().eval()
    drop_blocks(model, [f"{stack}.{place}" for stack, places in layers.items() for place in places])
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert again.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(answer(model, args, kwargs), answer(again, args, kwargs))


def test_undoing_leaves_no_trace(case) -> None:
    model, _, _, layers = case
    before = state(model)
    names = [f"{stack}.{place}" for stack, places in layers.items() for place in places]
    with without_blocks(model, names):
        assert state(model)[1] != before[1]
    assert_same(before, state(model))


GENERATING = {name: CASES[name] for name in ("llama", "gemma", "gpt2", "t5")}


@pytest.mark.parametrize("name", GENERATING)
def test_a_cache_gives_the_tokens_of_the_skipping_original(name) -> None:
    build, args, kwargs, layers = GENERATING[name]
    torch.manual_seed(0)
    model = build().eval()
    prunus.verifier.randomize(model, args, kwargs)
    original = copy.deepcopy(model)
    names = [f"{stack}.{place}" for stack, places in layers.items() for place in places]
    for stack, places in layers.items():
        prunus.drop_layers(model, places, args, kwargs, stack=stack, verified=False)
    ask = {"max_new_tokens": 12, "do_sample": False, "num_beams": 1, "min_new_tokens": 12}
    mask = {"attention_mask": torch.ones_like(TOKENS)}
    runs = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runs["dense"] = original.generate(TOKENS, **mask, **ask)
        runs["dropped"] = model.generate(TOKENS, **mask, **ask)
        runs["without cache"] = model.generate(TOKENS, **mask, **ask, use_cache=False)
        with skip(original, names):
            runs["skipped"] = original.generate(TOKENS, **mask, **ask)
    assert torch.equal(runs["dropped"], runs["skipped"])
    assert torch.equal(runs["dropped"], runs["without cache"])
    assert not torch.equal(runs["dropped"], runs["dense"])


def test_configs_and_numbers_follow() -> None:
    model = gemma()
    drop_blocks(model, ["model.layers.1"])
    assert model.config.num_hidden_layers == 3
    assert model.config.layer_types == [KINDS[0], *KINDS[2:]]
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]
    assert [layer.self_attn.layer_type for layer in model.model.layers] == [KINDS[0], *KINDS[2:]]
    model = t5()
    drop_blocks(model, ["decoder.block.1", "encoder.block.2", "decoder.block.3"])
    assert (model.config.num_layers, model.config.num_decoder_layers) == (3, 2)
    assert (model.encoder.config.num_layers, model.decoder.config.num_layers) == (3, 2)
    indices = [block.layer[0].SelfAttention.layer_idx for block in model.decoder.block]
    assert indices == [0, 1]
    model = swin()
    drop_blocks(model, ["encoder.layers.1.blocks.0"])
    assert model.config.depths == [2, 1]
    assert model.config.num_layers == model.encoder.num_layers == 2
    model = Indexed()
    drop_blocks(model, ["layers.0", "layers.3"])
    assert model.depth == 2


def test_the_config_is_proven_by_building_from_it() -> None:
    """Heads and layers are four of each, and only one of the two numbers changes."""
    model = bert()
    changes = list(find_counts(model, "encoder.layer", [2]))
    assert [(change.key, change.value) for change in changes] == [("num_hidden_layers", 3)]
    drop_blocks(model, ["encoder.layer.2"])
    again = tf.BertModel(model.config)
    again.load_state_dict(model.state_dict())
    assert model.config.num_attention_heads == 4


def test_without_a_constructor_from_the_config_names_decide() -> None:
    class Pair(nn.Module):
        def __init__(self, config: Any, extra: int) -> None:
            super().__init__()
            self.config, self.extra = config, extra
            self.encoder = nn.ModuleDict({"layers": nn.ModuleList(Mlp(4, 4) for _ in range(3))})
            self.decoder = nn.ModuleDict({"layers": nn.ModuleList(Mlp(4, 4) for _ in range(3))})

    config = type("Settings", (), {"__module__": "elsewhere"})()
    vars(config).update(encoder_layers=3, decoder_layers=3, heads=3, layer_names=["a", "b", "c"])
    model = Pair(config, 3)
    changes = find_counts(model, "decoder.layers", [1])
    assert {c.key: c.value for c in changes} == {"decoder_layers": 2, "layer_names": ["a", "c"]}


@pytest.mark.parametrize(
    ("name", "stack", "places", "dim"),
    [
        ("resnet20", "layer2", [1], -3),
        ("resnet20", "layer1", [0, 2], -3),
        ("mobilenetv2", "features", [5, 9, 13], -3),
        ("hrnet_w18_small", "stages.0.0.branches.1", [1], -3),
        ("vit_tiny", "blocks", [0, 11], -1),
        ("llama_tiny", "layers", [1], -1),
        ("bert_tiny", "layers", [0], -1),
    ],
)
def test_blocks_of_the_zoo(name, stack, places, dim) -> None:
    model, inputs = models_zoo.build(name).eval(), models_zoo.example_inputs(name)
    done = prunus.drop_layers(model, places, inputs, stack=stack)
    assert {block.dim for block in done.graph.blocks} == {dim}
    assert done.certificate is not None
    assert done.certificate.verdict == "exact"
    assert not done.certificate.unverified


def test_blocks_that_change_the_shape_or_stand_side_by_side_are_none() -> None:
    graph = prunus.trace(models_zoo.build("resnet20").eval(), models_zoo.example_inputs("resnet20"))
    assert [block.index for block in graph.stacks["layer2"]] == [1, 2]
    assert "and returns" in graph.obstacles["layer2.0"]
    graph = prunus.trace(models_zoo.build("yolov8n").eval(), models_zoo.example_inputs("yolov8n"))
    assert not graph.blocks
    assert "one operator reads both" in graph.obstacles["stage2.m.0"]


def test_a_block_whose_by_product_is_read_elsewhere_is_none() -> None:
    graph = prunus.trace(t5().eval(), (), PAIR)
    assert "something else that it computes" in graph.obstacles["encoder.block.0"]
    assert "part of the block" in graph.obstacles["encoder.block.1.layer.0"]
    assert [block.index for block in graph.stacks["encoder.block"]] == [1, 2, 3]


class Chain(nn.Module):
    """Children of every kind that are no residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Mlp(8, 8), Plain(), Mlp(8, 8), Plain(), Mlp(8, 8)])
        self.unused = nn.ModuleList([Mlp(8, 8)])
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        for part in (*self.parts, self.parts[0]):
            x = part(x)
        return self.head(x)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).relu()


def test_what_is_no_block() -> None:
    graph = prunus.trace(Chain().eval(), torch.ones(2, 8))
    assert [block.name for block in graph.blocks] == ["parts.2", "parts.4"]
    assert graph.obstacles == {
        "parts.0": "it ran 2 times in one forward",
        "parts.1": "no skip connection leads around what it computes",
        "parts.3": "no skip connection leads around what it computes",
        "unused.0": "it did not run",
    }


# The plan.


def depth_plan(model: nn.Module, args: Any, drop: Any, **options: Any) -> Plan:
    graph = prunus.trace(model, args)
    return prunus.plan(graph, model, drop=drop, **options)


def test_width_and_depth_share_one_plan_and_one_budget() -> None:
    model = llama(layers=6).eval()
    original = copy.deepcopy(model)
    dense = prunus.report.measure_costs(model, (TOKENS,))
    done = prunus.shrink(model, (TOKENS,), budget=prunus.Budget(params=0.5), drop=2)
    assert done.certificate is not None
    assert done.certificate.verdict == "exact"
    assert len(done.plan.drops) == 2
    assert not {"model.layers.0", "model.layers.5"} & set(done.plan.drops)
    assert done.plan.keep
    assert done.plan.origin["budget"] == {"params": 0.5}
    left = prunus.report.measure_costs(model, (TOKENS,))
    for cost in ("params", "macs"):
        assert done.plan.costs[cost] == (dense[cost], left[cost])
    assert 0.48 * dense["params"] < left["params"] <= 0.5 * dense["params"]
    again = prunus.apply(Plan.from_json(done.plan.to_json()), copy.deepcopy(original))
    assert torch.equal(answer(again, (TOKENS,), {}), answer(model, (TOKENS,), {}))
    with torch.no_grad(), prunus.mask(done.plan, original):
        masked = answer(original, (TOKENS,), {})
        assert len(original.model.layers) == 4
    assert len(original.model.layers) == 6
    assert torch.allclose(masked, answer(model, (TOKENS,), {}), atol=1e-5)


def test_a_mask_generates() -> None:
    model = llama().eval()
    prunus.verifier.randomize(model, (TOKENS,), {})
    before = state(model)
    plan = depth_plan(model, (TOKENS,), ["model.layers.0"])
    ask = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(TOKENS)}
    with prunus.mask(plan, model):
        masked = model.generate(TOKENS, **ask)
    assert_same(before, state(model))
    assert torch.equal(masked, prunus.apply(plan, model).generate(TOKENS, **ask))


def test_a_plan_without_drops_reads_and_writes_as_ever() -> None:
    model = Indexed().eval()
    plan = depth_plan(model, torch.ones(2, 3), (), ratio=0.3)
    assert '"drops"' not in plan.to_json()
    assert Plan.from_json(plan.to_json()) == plan
    dropping = depth_plan(model, torch.ones(2, 3), ["layers.1"])
    assert Plan.from_json(dropping.to_json()) == dropping
    assert dropping.widths.drops == ()
    assert "layers.3.up.weight" not in dropping.resulting_shapes()


@pytest.mark.parametrize(
    ("drops", "said"),
    [
        ('["a",3]', r"drops\[1\].*Expected `str`"),
        ('["a","a"]', "dropped twice"),
        ('[""]', r"drops\[0\].*length >= 1"),
    ],
)
def test_damaged_drops_are_refused(drops, said) -> None:
    text = Plan({}, {"w": (2,)}, drops=("layers.0",)).to_json()
    with pytest.raises(PlanError, match=f"(?s){said}"):
        Plan.from_json(text.replace('["layers.0"]', drops))


def test_plans_compose() -> None:
    """Widths, then blocks, then widths, then blocks, are one plan for the original."""
    x = torch.randn(4, 3)
    original = Indexed(depth=6).eval()
    model, plans = copy.deepcopy(original), []
    for options in (
        {"ratio": 0.2, "importance": "random"},
        {"drop": ["layers.1", "layers.4"], "ratio": 0.2},
        {"drop": ["layers.1"]},
        {"ratio": 0.3},
    ):
        plans.append(depth_plan(model, x, options.pop("drop", ()), **options))
        prunus.apply(plans[-1], model)
    whole = plans[0].then(plans[1]).then(plans[2]).then(plans[3])
    assert whole.drops == ("layers.1", "layers.4", "layers.2")
    assert plans[0].then(plans[1].then(plans[2]).then(plans[3])) == whole
    at_once = prunus.apply(whole, copy.deepcopy(original))
    assert torch.equal(at_once(x), model(x))
    assert at_once.depth == 3
    assert whole.costs["params"][0] == sum(p.numel() for p in original.parameters())
    assert whole.costs["params"][1] == sum(p.numel() for p in model.parameters())


def test_the_second_witness_speaks_of_the_widths_that_are_left() -> None:
    x = torch.randn(6, 3)
    original = Indexed().eval()
    plan = depth_plan(original, x, ["layers.1"], ratio=0.3)
    cut = prunus.apply(plan, copy.deepcopy(original))
    found = witness.testify(plan, original, cut, x)
    assert found.verdict == "undecided"
    assert "drops blocks" in found.reason
    drop_blocks(original, plan.drops)
    assert witness.testify(plan.widths, original, cut, x).verdict == "agrees"
    with torch.no_grad():
        cut.layers[0].up.weight.mul_(1.5)
    assert witness.testify(plan.widths, original, cut, x).verdict == "disagrees"


def test_a_later_plan_for_another_depth_is_refused() -> None:
    model = Indexed().eval()
    plan = depth_plan(model, torch.ones(2, 3), ["layers.1"])
    with pytest.raises(PlanError, match="not for the model that this one leaves"):
        plan.then(plan)
    prunus.apply(plan, model)
    with pytest.raises(PlanError, match="plan for another model"):
        prunus.apply(plan, model)
    assert len(model.layers) == model.depth == 3


def test_names_go_there_and_back() -> None:
    names = Renaming(["a.layers.0", "a.layers.3", "stem.norm"])
    left = [n for n in range(6) if n not in (0, 3)]
    for new, old in enumerate(left):
        assert names.after(f"a.layers.{old}.w") == f"a.layers.{new}.w"
        assert names.before(f"a.layers.{new}.w") == f"a.layers.{old}.w"
    assert names.after("a.layers.3.w") is None
    assert names.after("stem.norm.weight") is None
    assert names.after("stem.conv.weight") == "stem.conv.weight"
    assert names.after("b.layers.5") == "b.layers.5"


# All or nothing.


def test_a_failure_puts_everything_back(monkeypatch) -> None:
    model = llama().eval()
    plan = depth_plan(model, (TOKENS,), ["model.layers.1"], ratio=0.3)
    before = state(model)
    wrong = replace(plan, origin={"traced": {**plan.origin["traced"], "outputs": {"logits": [1]}}})
    with pytest.raises(ApplyError, match="has shape"):
        prunus.apply(wrong, model)
    assert_same(before, state(model))

    right = depth._close_up

    def fail(*args: Any) -> None:
        right(*args)
        raise RuntimeError("planted")

    monkeypatch.setattr(depth, "_close_up", fail)
    with pytest.raises(RuntimeError, match="planted"):
        prunus.apply(plan, model)
    assert_same(before, state(model))


def test_parameters_and_optimizer() -> None:
    model = Indexed().eval()
    x = torch.randn(2, 3)
    optimizer = torch.optim.Adam(model.parameters())
    model(x).sum().backward()
    optimizer.step()
    kept = [p for name, p in model.named_parameters() if not name.startswith("layers.2")]
    prunus.apply(depth_plan(model, x, ["layers.2"]), model, optimizer=optimizer)
    assert [id(p) for p in model.parameters()] == [id(p) for p in kept]
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in kept]
    assert {id(p) for p in optimizer.state} == {id(p) for p in kept}
    model(x).sum().backward()
    optimizer.step()


# Influence.


def test_influence_is_one_minus_the_mean_cosine() -> None:
    model = llama().eval()
    graph = prunus.trace(model, (TOKENS,))
    batches = [TOKENS, TOKENS[:1, :4].flip(1)]
    found = prunus.importance.block_influence(model, graph, batches)
    cosines: dict[str, list[Tensor]] = {block.name: [] for block in graph.blocks}
    taken: dict[str, Tensor] = {}
    for block in graph.blocks:

        def enter(_: nn.Module, args: Any, name: str = block.name) -> None:
            taken[name] = args[0]

        def leave(_: nn.Module, args: Any, output: Tensor, name: str = block.name) -> None:
            cosines[name].append(F.cosine_similarity(taken[name].double(), output.double(), -1))

        model.get_submodule(block.name).register_forward_pre_hook(enter)
        model.get_submodule(block.name).register_forward_hook(leave)
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for name, values in cosines.items():
        every = torch.cat([value.flatten() for value in values])
        assert found[name] == pytest.approx(1 - float(every.mean()), abs=1e-9)


def test_influence_of_images_is_over_channels() -> None:
    model = Staged().eval()
    graph = prunus.trace(model, IMAGE)
    assert {block.dim for block in graph.blocks} == {-3}
    found = prunus.importance.block_influence(model, graph, [IMAGE])
    with torch.no_grad():
        x = model.stages[0][0](IMAGE)
        expected = 1 - F.cosine_similarity(x, model.stages[0][1](x), 1).mean()
    assert found["stages.0.1"] == pytest.approx(float(expected), abs=1e-5)


def test_the_least_influential_goes_and_the_ends_stay() -> None:
    model = Indexed(depth=5).eval()
    with torch.no_grad():
        for place, factor in enumerate((0, 1, 0.1, 1, 0)):
            model.layers[place].down.weight.mul_(factor)
            model.layers[place].down.bias.mul_(factor)
    x = torch.randn(32, 3)
    graph = prunus.trace(model, x)
    assert prunus.plan(graph, model, drop=1, data=[x]).drops == ("layers.2",)
    free = prunus.plan(graph, model, drop=2, data=[x], protect_ends=False)
    assert free.drops == ("layers.0", "layers.4")
    with pytest.raises(PlanError, match=r"(?s)4 blocks .* only 3 may be.*protected"):
        prunus.plan(graph, model, drop=4)
    with pytest.raises(prunus.PrunusError, match="not finite"):
        prunus.importance.block_influence(model, graph, [torch.full((2, 3), float("nan"))])
    with pytest.raises(prunus.PrunusError, match="data is empty"):
        prunus.importance.block_influence(model, graph, [])
    with pytest.raises(PlanError, match="drop must be an int"):
        prunus.plan(graph, model, drop=True)


# Proof: it can fail.


def plant_wrong_block(monkeypatch) -> None:
    right = depth.find_places

    def shifted(model: nn.Module, names: Any) -> dict[str, list[int]]:
        return {
            path: [place - 1 for place in places] for path, places in right(model, names).items()
        }

    monkeypatch.setattr(depth, "find_places", shifted)


def plant_stale_numbers(monkeypatch) -> None:
    monkeypatch.setattr(depth, "find_numbers", lambda *_: iter(()))


def plant_stale_config(monkeypatch) -> None:
    monkeypatch.setattr(depth, "find_counts", lambda model, path, gone: iter(()))


def plant_scaled_neighbour(monkeypatch) -> None:
    right = depth._close_up

    def close_up(container: nn.Module, gone: Any, path: str) -> Any:
        undo = right(container, gone, path)
        with torch.no_grad():
            next(container[-1].parameters()).mul_(1.5)
        return undo

    monkeypatch.setattr(depth, "_close_up", close_up)


@pytest.mark.parametrize(
    ("plant", "build", "inputs", "drops"),
    [
        (plant_wrong_block, llama, TOKENS, ["model.layers.2"]),
        (plant_wrong_block, Staged, IMAGE, ["stages.0.2"]),
        (plant_stale_numbers, llama, TOKENS, ["model.layers.0"]),
        (plant_stale_numbers, gpt2, TOKENS, ["transformer.h.0"]),
        (plant_stale_numbers, gemma, TOKENS, ["model.layers.1"]),
        (plant_stale_config, Indexed, torch.ones(2, 3), ["layers.1"]),
        (plant_scaled_neighbour, llama, TOKENS, ["model.layers.1"]),
    ],
)
def test_planted_faults_are_found(monkeypatch, plant, build, inputs, drops) -> None:
    model = build().eval()
    plan = depth_plan(model, inputs, drops)
    assert prunus.verify(plan, model, inputs).verdict == "exact"
    plant(monkeypatch)
    found = prunus.verify(plan, model, inputs)
    assert found.verdict == "inexact"
    assert found.reason


def test_a_fault_in_the_widths_of_a_dropped_model_is_found(monkeypatch) -> None:
    model = Indexed().eval()
    plan = depth_plan(model, torch.randn(4, 3), ["layers.1"], ratio=0.3)
    assert prunus.verify(plan, model, torch.randn(4, 3)).verdict == "exact"
    right = cases.cut_own

    def wrong(plan: Plan, model: nn.Module) -> nn.Module:
        right(plan, model)
        with torch.no_grad():
            model.layers[0].up.weight.copy_(model.layers[0].up.weight.flip(0))
        return model

    monkeypatch.setattr(cases, "cut_own", wrong)
    assert prunus.verify(plan, model, torch.randn(4, 3)).verdict == "inexact"


def test_a_block_that_changes_nothing_proves_nothing() -> None:
    model = Indexed().eval()
    with torch.no_grad():
        model.layers[1].down.weight.zero_()
        model.layers[1].down.bias.zero_()
    plan = depth_plan(model, torch.ones(2, 3), ["layers.1"])
    found = prunus.verify(plan, model, torch.ones(2, 3), randomise=False)
    assert found.verdict == "not verified"
    assert found.unverified == ("layers.1",)


class Numbered(Indexed):
    """What a layer gets depends on its place, and nothing on the layer says so."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for place, layer in enumerate(self.layers):
            x = layer(x * (2 if place == 2 else 1))
        return self.head(x)


def test_code_that_depends_on_the_place_is_refused_and_spared() -> None:
    x = torch.randn(4, 3)
    model = Numbered().eval()
    before = state(model)
    with pytest.raises(VerifyError, match="without this block") as caught:
        prunus.drop_layers(model, [1], x)
    assert caught.value.where == "layers.1"
    assert_same(before, state(model))
    with torch.no_grad():
        model.layers[1].down.weight.mul_(0.01)
        model.layers[1].down.bias.mul_(0.01)
    done = prunus.shrink(model, x, drop=1)
    assert list(done.held) == ["layers.1"]
    assert done.plan.drops == ("layers.2",)
    assert done.certificate is not None
    assert done.certificate.verdict == "exact"


# Refusals.


@pytest.mark.parametrize(
    ("layers", "options", "said"),
    [
        ([4], {}, r"no layer 4 in 'model.layers'(?s:.*)from 0 to 3"),
        ([-1], {}, r"no layer -1(?s:.*)negative"),
        ([1.0], {}, r"no layer 1.0"),
        ([1, 2, 1], {}, "layer 1 is to be dropped 2 times"),
        ([0, 1, 2, 3], {}, "all 4 layers of 'model.layers'"),
        ([], {}, "no layer is named"),
        ([1], {"stack": "decoder"}, r"no stack fits 'decoder'(?s:.*)'model.layers' \(4 blocks\)"),
    ],
)
def test_layers_that_are_refused(layers, options, said) -> None:
    model = llama().eval()
    before = state(model)
    with pytest.raises(PlanError, match=said):
        prunus.drop_layers(model, layers, (TOKENS,), **options)
    assert_same(before, state(model))


def test_several_stacks_have_to_be_told_apart() -> None:
    model = t5().eval()
    with pytest.raises(PlanError, match=r"more than one stack(?s:.*)'encoder.block' \(3 blocks\)"):
        prunus.drop_layers(model, [1], (), PAIR)
    with pytest.raises(PlanError, match=r"'\*block' fits 'encoder.block', 'decoder.block'"):
        prunus.drop_layers(model, [1], (), PAIR, stack="*block")
    with pytest.raises(PlanError, match="something else that it computes"):
        prunus.drop_layers(model, [0], (), PAIR, stack="encoder*")
    with pytest.raises(PlanError, match="no stack of layers"):
        prunus.drop_layers(nn.Sequential(nn.Linear(3, 3)), [0], torch.ones(1, 3))


def test_blocks_that_are_refused() -> None:
    model = Staged().eval()
    graph = prunus.trace(model, IMAGE)
    for name, said in (
        ("stages.0.0", "plain layer"),
        ("stages.1", "takes"),
        ("head", "no child of a list"),
        ("stages.0.9", "plain layer"),
    ):
        with pytest.raises(PlanError, match=said):
            prunus.plan(graph, model, drop=[name])
    with pytest.raises(PlanError, match="dropped twice"):
        prunus.plan(graph, model, drop=["stages.0.1", "stages.0.1"])
    for names, said in (
        (["stages.0.7"], "no block 'stages.0.7'"),
        (["stages.0.1"] * 2, "dropped twice"),
        (["stages.0", "stages.0.1"], "all of 'stages.0' as well"),
        (["stages.0", "stages.1"], "nothing would stay of 'stages'"),
    ):
        with pytest.raises(PlanError, match=said):
            drop_blocks(model, names)


def test_names_that_cannot_close_up_are_refused() -> None:
    model = nn.Sequential()
    for name in ("1", "2", "last"):
        model.add_module(name, Mlp(4, 4))
    with pytest.raises(ApplyError, match="can't close up"):
        drop_blocks(model, ["2"])
    named = nn.Sequential()
    for name in ("a", "b", "c"):
        named.add_module(name, Mlp(4, 4))
    done = prunus.drop_layers(named, [1], torch.randn(2, 4))
    assert done.certificate is not None
    assert done.certificate.verdict == "exact"
    assert list(named._modules) == ["a", "c"]


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.linear(x, self.weight.to(x))


def test_a_quantized_model_is_refused() -> None:
    with pytest.raises(ModelError, match="is quantized") as caught:
        prunus.drop_layers(nn.Sequential(Packed(), Packed()), [0], torch.ones(1, 4))
    assert caught.value.where == "0"
    assert "quantize what is left" in caught.value.fix
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dynamic = torch.ao.quantization.quantize_dynamic(Indexed().eval(), {nn.Linear})
    with pytest.raises(ModelError, match="is quantized") as caught:
        prunus.drop_layers(dynamic, [0], torch.ones(1, 3))
    assert caught.value.where == "stem"


def test_statistics_of_the_whole_model_are_refused_where_blocks_go() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model, x = (
        nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).eval(),
        torch.randn(2, 5, 8),
    )
    graph = prunus.trace(model, x)
    given = prunus.importance.collect(model, graph, [x], "activation")
    options = {"drop": 1, "ratio": 0.3, "importance": "activation", "statistics": given}
    with pytest.raises(
        PlanError, match=r"can't be given where blocks are dropped(.|\n)*give data="
    ):
        prunus.plan(graph, model, **options)
    with pytest.raises(PlanError, match="can't be given where blocks are dropped"):
        prunus.shrink(model, x, **options)
    assert len(model.layers) == 4


class Windowed(nn.Module):
    """A layer with a window, or without: which, the others say in one way or another."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.layer_idx, self.window = number, 99
        self.qkv, self.o = nn.Linear(16, 48), nn.Linear(16, 16)
        self.sliding, self.windows = [0, 2], [99, 5, 99, 5]

    def slides(self) -> bool:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        i = torch.arange(x.shape[1])
        mask = i[:, None] >= i[None]
        if self.slides():
            mask = mask & (i[:, None] - i[None] < self.window)
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + self.o(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.7))


class ByRemainder(Windowed):
    def slides(self) -> bool:
        return self.layer_idx % 2 == 0


class ByMembership(Windowed):
    def slides(self) -> bool:
        return self.layer_idx in self.sliding


class ByBeingFirst(Windowed):
    def slides(self) -> bool:
        return not self.layer_idx


class BySubscript(Windowed):
    def slides(self) -> bool:
        return self.windows[self.layer_idx] < 9


class ByVariable(Windowed):
    def slides(self) -> bool:
        number = self.layer_idx
        return number % 2 == 1


class WithCache(Windowed):
    def slides(self) -> bool:
        {}.setdefault(self.layer_idx, self)
        return self.layer_idx % 2 == 0


class WindowedStack(nn.Module):
    def __init__(self, kind: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.e, self.out = nn.Linear(4, 16), nn.Linear(16, 3)
        self.layers = nn.ModuleList(kind(i) for i in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.e(x)
        for layer in self.layers:
            x = layer(x)
        return self.out(x)


@pytest.mark.parametrize("kind", [ByRemainder, ByMembership, ByBeingFirst, BySubscript, ByVariable])
@pytest.mark.parametrize("gone", [[0], [1], [1, 2]])
def test_a_number_that_the_code_computes_with_changes_nothing(kind: Any, gone: list[int]) -> None:
    torch.manual_seed(0)
    model = WindowedStack(kind).eval()
    skipping = copy.deepcopy(model)
    for place in gone:
        skipping.layers[place].forward = lambda x: x
    result = prunus.drop_layers(model, gone, torch.randn(2, 6, 4))
    assert result.certificate.verdict == "exact"
    x = torch.randn(1, 150, 4)  # beyond the window, which no verification reached
    with torch.no_grad():
        assert torch.allclose(model(x), skipping(x), atol=1e-5)


def test_a_number_that_is_computed_with_and_numbers_a_cache_is_refused_by_name() -> None:
    torch.manual_seed(0)
    model = WindowedStack(WithCache).eval()
    with pytest.raises(prunus.PrunusError, match=r"computes with 'layer_idx'"):
        prunus.drop_layers(model, [1], torch.randn(2, 6, 4))
    assert len(model.layers) == 4
    prunus.drop_layers(model, [1, 2], torch.randn(2, 6, 4))
    assert [layer.layer_idx for layer in model.layers] == [0, 1]
