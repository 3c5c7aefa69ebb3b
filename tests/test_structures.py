"""Heads, KV groups, FFN widths by name; removing them by name; folders that load again."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunus
from prunus.errors import FormatError, ModelError, PlanError
from prunus.integrations import hf
from prunus.tracer.attention import find_cores

transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 100,
}


def bert(**more: Any) -> Any:
    torch.manual_seed(0)
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, **more)).eval()


def llama(**more: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SIZES, "num_key_value_heads": 2, **more})
    return transformers.LlamaForCausalLM(config).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=100, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval()


def t5() -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=100
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def vit() -> Any:
    torch.manual_seed(0)
    sizes = {name: size for name, size in SIZES.items() if name != "vocab_size"}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8)
    return transformers.ViTForImageClassification(config).eval()


def mixtral() -> Any:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4)
    return transformers.MixtralForCausalLM(config).eval()


def swin() -> Any:
    return timm.create_model(
        "swin_tiny_patch4_window7_224", embed_dim=16, depths=(2,), num_heads=(2,), img_size=56
    )


class ByHand(nn.Module):
    """Attention as people write it, one product after the other, and an FFN with its own GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict(self._parts()) for _ in range(2)])
        self.heads = [4, 4]

    def _parts(self) -> dict[str, nn.Module]:
        return {
            "qkv": nn.Linear(16, 48), "out": nn.Linear(16, 16),
            "up": nn.Linear(16, 24), "down": nn.Linear(24, 16),
        }  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        for block, heads in zip(self.blocks, self.heads, strict=True):
            parts = block["qkv"](x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            q, k, v = parts
            weights = torch.einsum("bhid,bhjd->bhij", q, k).mul(0.5).softmax(-1)
            y = torch.einsum("bhij,bhjd->bhid", weights, v).transpose(1, 2).flatten(2)
            x = x + block["out"](y)
            u = block["up"](x)
            x = x + block["down"](0.5 * u * (1 + torch.tanh(u + 0.04 * u.pow(3))))
        return x


def anatomy(model: Any, *args: Any) -> Any:
    kwargs = {} if args else hf.example_inputs(model)
    return prunus.structures.find_structures(prunus.trace(model, args, kwargs))


def in_layer(found: Any, layer: str) -> dict[str, int]:
    return {part.kind: part.size for part in found.structures if part.layer == layer}


HEADS = {"heads": 4, "head dims": 8}
GQA = {"kv groups": 2, "query heads": 2}
NAMED: list[tuple[Callable[[], Any], str, dict[str, int]]] = [
    (bert, "bert.encoder.layer.1", {**HEADS, "ffn": 48}),
    (lambda: bert(attn_implementation="eager"), "bert.encoder.layer.1", {**HEADS, "ffn": 48}),
    (llama, "model.layers.1", {**GQA, "ffn": 48}),
    (lambda: llama(attn_implementation="eager"), "model.layers.1", {**GQA, "ffn": 48}),
    (lambda: llama(num_key_value_heads=4), "model.layers.1", {"heads": 4, "ffn": 48}),
    (lambda: llama(num_key_value_heads=1), "model.layers.1", {"query heads": 4, "ffn": 48}),
    (gpt2, "transformer.h.1", {**HEADS, "ffn": 128}),
    (t5, "decoder.block.1", {"head dims": 8, "ffn": 48}),
    (vit, "vit.layers.1", {**HEADS, "ffn": 48}),
    (mixtral, "model.layers.1", {**GQA, "experts": 4, "ffn": 48}),
]


@pytest.mark.parametrize(("build", "layer", "expected"), NAMED)
def test_what_a_layer_has(build: Callable[[], Any], layer: str, expected: dict[str, int]) -> None:
    assert in_layer(anatomy(build()), layer) == expected


def test_attention_by_hand_and_in_windows() -> None:
    found = anatomy(ByHand(), torch.randn(2, 5, 16))
    assert in_layer(found, "blocks.1") == {"heads": 4, "head dims": 4, "ffn": 24}
    assert [a.module for a in found.attentions] == ["blocks.0", "blocks.1"]
    found = anatomy(swin(), torch.randn(1, 3, 56, 56))
    assert in_layer(found, "layers.0.blocks.1") == {"heads": 2, "head dims": 8, "ffn": 64}
    assert [len(a.heads) for a in found.attentions] == [2, 2]


def test_streams_and_convolutions() -> None:
    found = anatomy(llama())
    assert [part.size for part in found.of("hidden")] == [32]
    assert not found.of("channels")
    net = timm.create_model("resnet18", num_classes=10)
    found = anatomy(net, torch.randn(1, 3, 32, 32))
    assert {part.kind for part in found.structures} == {"hidden", "channels"}
    assert not found.attentions
    assert not found.layers


def test_stacks_and_their_layers() -> None:
    found = anatomy(t5())
    assert {path: len(layers) for path, layers in found.stacks.items()} == {
        "encoder.block": 2,
        "decoder.block": 2,
    }
    with pytest.raises(PlanError, match=r"3 attentions are found at layer 0(.|\n)*EncDecAttention"):
        found.attention(0)
    where = "decoder.block.1.layer.1.EncDecAttention"
    assert found.attention(where).layer == "decoder.block.1"
    assert found.attention("encoder.block.1").kv_heads == 4


def test_a_softmax_over_classes_is_no_attention() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Softmax(-1), nn.Linear(8, 3))
    graph = prunus.trace(net, torch.randn(2, 4))
    assert not list(find_cores(graph.program))


# -- removing by name ------------------------------------------------------------------------------


def test_heads_go_and_the_rest_computes_the_same() -> None:
    """Against the model whose output projections don't read these heads."""
    model, silenced = bert(), bert()
    inputs = hf.example_inputs(model)
    for layer, heads in {0: [1, 2], 2: [0]}.items():
        output = silenced.bert.encoder.layer[layer].attention.output.dense
        for head in heads:
            output.weight.data[:, 8 * head : 8 * head + 8] = 0
    shrunk = prunus.prune_heads(model, {0: [1, 2], 2: [0]})
    assert shrunk.certificate.verdict == "exact"
    assert [layer.attention.self.query.out_features for layer in model.bert.encoder.layer] == [
        16, 32, 24,
    ]  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, silenced(**inputs).logits)


@pytest.mark.parametrize("heads", [[0, 1], [1, 3]], ids=["a KV group", "a place in every group"])
def test_query_heads_that_share_keys(heads: list[int]) -> None:
    model, silenced = llama(), llama()
    for head in heads:
        output = silenced.model.layers[1].self_attn.o_proj
        output.weight.data[:, 8 * head : 8 * head + 8] = 0
    inputs = hf.example_inputs(model)
    prunus.prune_heads(model, {1: heads})
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, silenced(**inputs).logits)


def test_generation_with_a_cache_gives_the_same_tokens() -> None:
    model, silenced = llama(), llama()
    for layer in (0, 2):
        silenced.model.layers[layer].self_attn.o_proj.weight.data[:, :16] = 0
    prunus.prune_heads(model, {0: [0, 1], 2: [0, 1]})
    ids = torch.arange(1, 6)[None]
    told = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for cached in (True, False):
        tokens = [m.generate(ids, use_cache=cached, **told) for m in (model, silenced)]
        assert torch.equal(*tokens)


def test_layers_that_share_their_heads_are_named_together() -> None:
    attentions = [f"encoder.block.{n}.layer.0.SelfAttention" for n in (0, 1)]
    with pytest.raises(PlanError, match="head 1 would go as well"):
        prunus.prune_heads(t5(), {attentions[0]: [1]})
    model = t5()
    shrunk = prunus.prune_heads(model, {attention: [1] for attention in attentions})
    assert shrunk.certificate.verdict == "exact"


BAD: list[tuple[Callable[[], Any], dict[Any, Any], str]] = [
    (bert, {0: [4]}, r"there is no head 4(.|\n)*numbers 0 to 3"),
    (bert, {0: [-1]}, "there is no head -1"),
    (bert, {0: [True]}, "there is no head True"),
    (bert, {0: [0, 1, 2, 3]}, r"no head would be kept(.|\n)*drop the layer"),
    (bert, {0: [1, 1]}, "a head is named twice"),
    (bert, {9: [0]}, r"no attentions are found at layer 9(.|\n)*layer\.2\.attention"),
    (llama, {0: [1]}, r"head 1 can't go alone(.|\n)*4 query heads share 2 keys"),
]


@pytest.mark.parametrize(("build", "heads", "text"), BAD)
def test_heads_that_are_refused(build: Any, heads: Any, text: str) -> None:
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(PlanError, match=text):
        prunus.prune_heads(model, heads)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_keep_some_units_of_a_group() -> None:
    model = bert()
    group = "bert.encoder.layer.0.intermediate.dense.weight[0]"
    rows = bert().bert.encoder.layer[0].intermediate.dense.weight[[0, 7, 9]]
    prunus.api.keep(model, group, [9, 0, 7])
    assert torch.equal(model.bert.encoder.layer[0].intermediate.dense.weight, rows)
    for units, text in (([48], "there is no unit 48"), ([], "no unit of"), ([1, 1], "named twice")):
        with pytest.raises(PlanError, match=text):
            prunus.api.keep(bert(), group, units)
    with pytest.raises(PlanError, match="no group is called 'nothing'"):
        prunus.api.keep(bert(), "nothing", [0])


def test_keep_respects_constraints() -> None:
    """The kernel of grouped products takes multiples only."""
    group = "model.layers.0.mlp.experts.gate_up_proj[1]"
    with pytest.raises(PlanError, match=r"can't be removed by themselves(.|\n)*is no multiple of"):
        prunus.api.keep(mixtral(), group, range(47))
    prunus.api.keep(mixtral(), group, range(32))


def test_a_quantized_model_is_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    net[0].register_parameter(
        "packed", nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    )
    with pytest.raises(
        ModelError, match=r"the model is quantized(.|\n)*Linear stores(.|\n)*prune it, and quantize"
    ):
        prunus.api.keep(net, "0.weight[0]", [0], torch.randn(1, 4))


def test_inputs_that_nobody_knows() -> None:
    with pytest.raises(ModelError, match=r"example inputs are missing(.|\n)*give args or kwargs"):
        prunus.prune_heads(ByHand(), {"": [0]})


# -- folders ---------------------------------------------------------------------------------------

ALONE = """
import json, sys, torch, transformers
for line in sys.stdin:
    name, folder, inputs, out = json.loads(line)
    model = getattr(transformers, name).from_pretrained(folder, local_files_only=True).eval()
    with torch.no_grad():
        torch.save(model(**torch.load(inputs, weights_only=True)).logits, out)
    assert not [name for name in sys.modules if name.partition(".")[0] == "prunus"]
    print("saved", flush=True)
"""


@pytest.fixture(scope="module")
def alone() -> Iterator[Callable[..., None]]:
    """Ask a process that has transformers and not Prunus for a model's answer."""
    command = [sys.executable, "-W", "ignore", "-c", ALONE]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def ask(*words: Any) -> None:
            stdin.write(json.dumps([str(word) for word in words]) + "\n")
            stdin.flush()
            assert stdout.readline() == "saved\n"

        yield ask
        stdin.close()
        assert process.wait() == 0


WIDTHS = {"hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size"}
KV = {"num_key_value_heads"}
LAYERS = {"num_hidden_layers"}


@pytest.mark.parametrize(
    ("build", "options", "changed"),
    [
        (llama, {"ratio": 0.4}, WIDTHS),
        (llama, {"ratio": 0.4, "drop": 1}, WIDTHS | LAYERS),
        (llama, {"drop": 1}, LAYERS),
        (bert, {"ratio": 0.4, "drop": 1}, WIDTHS - KV | LAYERS),
        (vit, {"ratio": 0.4, "drop": 1}, WIDTHS - KV | LAYERS),
    ],
)
def test_uniform_results_load_without_prunus(
    build: Any, options: Any, changed: set[str], tmp_path: Path, alone: Callable[..., None]
) -> None:
    model = build()
    before = model.config.to_dict()
    inputs = hf.example_inputs(model, seed=1)
    shrunk = prunus.shrink(
        model, (), inputs, **options, importance="random", mode="uniform", each_group=False
    )
    assert shrunk.certificate.verdict == "exact"
    hf.save(model, tmp_path / "small", mode="uniform")
    after = json.loads((tmp_path / "small" / "config.json").read_text(encoding="utf-8"))
    assert {n for n, v in before.items() if type(v) is int and after.get(n, v) != v} == changed
    torch.save(inputs, tmp_path / "inputs.pt")
    alone(type(model).__name__, tmp_path / "small", tmp_path / "inputs.pt", tmp_path / "out.pt")
    with torch.no_grad():
        expected = model(**inputs).logits
    torch.testing.assert_close(torch.load(tmp_path / "out.pt", weights_only=True), expected)


def test_layers_go_without_inputs() -> None:
    model = llama()
    assert prunus.drop_layers(model, [1]).certificate.verdict == "exact"
    assert model.config.num_hidden_layers == len(model.model.layers) == 2


def test_a_folder_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    hf.save(model, tmp_path, mode="uniform")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(folder: str, **_: Any) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        hf.save(model, tmp_path, mode="uniform")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_uniform_can_not_say_is_held_with_its_reason() -> None:
    model = bert()
    shrunk = prunus.shrink(
        model, (), hf.example_inputs(model), ratio=0.4, mode="uniform", each_group=False
    )
    dims = "bert.encoder.layer.0.attention.self.query.weight[0]/2"
    assert "hidden ÷ heads" in shrunk.held[dims]
    model = llama()
    shrunk = prunus.shrink(
        model, (), hf.example_inputs(model), ratio=0.4, mode="uniform", each_group=False
    )
    assert "a scale or frequencies" in shrunk.held["model.layers.0.self_attn.q_proj.weight[0]/3"]


def test_heads_of_bert_are_refused_in_a_plain_folder(tmp_path: Path) -> None:
    model = bert()
    prunus.prune_heads(model, {0: [0], 1: [0], 2: [0]})
    with pytest.raises(ModelError, match=r"config.json can't describe(.|\n)*hidden ÷ heads"):
        hf.save(model, tmp_path / "small", mode="uniform")
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("drop", [0, 1])
@pytest.mark.parametrize("build", [bert, llama, gpt2, t5, vit, mixtral])
def test_free_results_load_to_the_bit(build: Any, drop: int, tmp_path: Path) -> None:
    model = build()
    inputs = hf.example_inputs(model)
    told = {"drop": drop} if drop and build not in (gpt2, t5) else {}  # two layers: both are ends
    prunus.shrink(model, (), inputs, ratio=0.3, importance="random", each_group=False, **told)
    hf.save(model, tmp_path)
    again = hf.load(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, again(**inputs).logits)
    names = {id(tensor) for tensor in model.parameters()}
    assert len({id(tensor) for tensor in again.parameters()}) == len(names)  # tied stays tied


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no file"):
        hf.load(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}', encoding="utf-8")
    with pytest.raises(FormatError, match=r"there is no model\.safetensors"):
        hf.load(tmp_path)
    with pytest.raises(ModelError, match="Linear is no model of transformers"):
        hf.save(nn.Linear(2, 2), tmp_path)
