"""Uniform plans: the config's constraints are part of the solver, and the live model follows."""

from __future__ import annotations

import copy
import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import prunus
from benchmarks.exactness import uniform
from prunus.cli import main
from prunus.errors import BudgetError, ModelError, PlanError, PrunusError
from prunus.graph.groups import Divisible, Lockstep, Proportional, find_violation
from prunus.integrations import hf

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8,
         "intermediate_size": 160, "vocab_size": 100}  # fmt: skip
ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def build(name: str, **more: Any) -> Any:
    torch.manual_seed(0)
    head = {"Bert": "ForMaskedLM", "ViT": "ForImageClassification"}.get(name, "ForCausalLM")
    sizes = {**SMALL, **({"image_size": 32, "patch_size": 8} if name == "ViT" else {}), **more}
    if name == "ViT":
        del sizes["vocab_size"]
    suffix = "TextConfig" if name == "Gemma3" else "Config"
    config = getattr(transformers, name + suffix)(**sizes)
    return getattr(transformers, name + head)(config).eval()


def shrink(model: Any, **options: Any) -> Any:
    inputs = hf.example_inputs(model)
    return prunus.shrink(model, (), inputs, mode="uniform", each_group=False, **options)


def test_a_width_that_another_has_to_divide() -> None:
    hidden, heads = np.arange(1, 13), np.arange(13, 17)
    rule = Divisible(Proportional("h", 12, (hidden,)), Proportional("n", 4, (heads,)), "h % n")
    kept = np.ones(17, dtype=bool)
    assert find_violation([rule], kept) == ""
    kept[[1, 2]] = False  # 10 % 4
    assert find_violation([rule], kept) == "h % n"
    kept[[13, 14]] = False  # 10 % 2
    assert find_violation([rule], kept) == ""


def test_locksteps_in_proportion() -> None:
    rule = Lockstep("equal count", (np.arange(1, 9), np.arange(9, 11)), "four to one", (4, 1))
    kept = np.ones(11, dtype=bool)
    kept[[1, 2, 3, 4]] = False
    assert "four to one" in find_violation([rule], kept)
    kept[9] = False
    assert find_violation([rule], kept) == ""


@pytest.mark.parametrize(
    ("name", "more"),
    [("Llama", {"num_key_value_heads": 4}), ("Bert", {}), ("ViT", {}),
     ("Gemma3", {"num_key_value_heads": 4, "head_dim": 16, **ENDS})],
)  # fmt: skip
def test_the_live_model_is_one_that_the_library_builds(
    name: str, more: Any, tmp_path: Path
) -> None:
    model = build(name, **more)
    shrink(model, budget=prunus.Budget(params=0.6), drop=1, importance="random")
    again = type(model)(copy.deepcopy(model.config))
    for path, module in model.named_modules():
        theirs = again.get_submodule(path)
        for attribute, value in vars(theirs).items():
            if type(value) in (int, tuple):
                assert vars(module)[attribute] == value, f"{path}.{attribute}"
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    inputs = hf.example_inputs(model, seed=3)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, loaded(**inputs).logits)


def test_generate_follows() -> None:
    model = build("Llama", num_key_value_heads=4, **ENDS)
    shrink(model, ratio=0.3, drop=1)
    ids = torch.arange(5)[None]
    answers = [
        model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*answers)


def tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({f"w{n}": n for n in range(100)}, unk_token="w3")
    made = tokenizers.Tokenizer(words)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names = {"unk_token": "w3", "eos_token": "w1", "pad_token": "w2"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)


def test_trainer_and_pipeline_take_it_as_any_model(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = build("Llama", num_key_value_heads=4, **ENDS)
    shrink(model, ratio=0.3, drop=1)
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, save_steps=1, report_to=[], use_cpu=True
    )
    data = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8
    transformers.Trainer(model=model, args=args, train_dataset=data).train()
    loaded = type(model).from_pretrained(tmp_path / "checkpoint-1")
    answers = []
    for one in (model, loaded):
        pipe = transformers.pipeline("text-generation", model=one.eval(), tokenizer=tokenizer())
        answers.append(pipe("w5 w6 w7", max_new_tokens=4, do_sample=False))
    assert answers[0] == answers[1]
    assert answers[0][0]["generated_text"].startswith("w5 w6 w7")


def test_what_can_not_be_had_is_refused_before_anything_is_cut() -> None:
    model = build("Llama", num_key_value_heads=4)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(BudgetError):
        shrink(model, budget=prunus.Budget(params=0.0005))
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.config.hidden_size == 64


def test_heads_that_the_config_can_not_divide_by() -> None:
    model = build("Gemma3", num_key_value_heads=4, head_dim=16, **ENDS)
    with pytest.raises(PrunusError, match=r"can be combined(.|\n)*multiple of its num_attention"):
        shrink(model, remove={"kv_groups": 1})
    assert model.config.num_key_value_heads == 4
    assert shrink(model, remove={"kv_groups": 2}).certificate.verdict == "exact"
    assert model.config.num_attention_heads == 4


def test_a_free_cut_is_not_written_as_a_plain_folder(tmp_path: Path) -> None:
    model = build("Llama", num_key_value_heads=4)
    inputs = hf.example_inputs(model)
    prunus.shrink(model, (), inputs, ratio=0.3, recover="none", each_group=False)
    for one in (model, copy.deepcopy(model)):
        with pytest.raises(ModelError, match=r"can't be loaded(.|\n)*hf\.save\(model, folder\)"):
            one.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
    torch.save(model, tmp_path / "whole.pt")
    torch.load(tmp_path / "whole.pt", weights_only=False)
    hf.save(model, tmp_path / "free")
    again = hf.load(tmp_path / "free")
    with pytest.raises(ModelError, match="can't be loaded"):
        again.save_pretrained(tmp_path / "plain")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, again(**inputs).logits)
    prunus.drop_layers(build("Bert"), [1]).model.save_pretrained(tmp_path / "fewer")


@pytest.mark.parametrize("mode", ["free", "uniform"])
def test_load_reads_what_save_writes(mode: Any, tmp_path: Path) -> None:
    build("Llama", num_key_value_heads=4, **ENDS).save_pretrained(tmp_path / "dense")
    dtype = torch.bfloat16  # but frequencies of positions stay float32
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype)
    model.generation_config.max_new_tokens = 3
    inputs = hf.example_inputs(model)
    prunus.shrink(model, (), inputs, ratio=0.3, mode=mode, recover="none", each_group=False)
    hf.save(model, tmp_path / "small", mode=mode)
    again = hf.load(tmp_path / "small")
    assert again.dtype == torch.bfloat16
    assert not again.training
    assert again.generation_config.max_new_tokens == 3
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, again(**inputs).logits)


def test_weights_in_several_files_replace_those_that_were_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("Llama", num_key_value_heads=4)
    model.save_pretrained(tmp_path)
    shrink(model, ratio=0.3)
    monkeypatch.setattr(hf, "SHARD", "100KB")
    hf.save(model, tmp_path, mode="uniform")
    assert not (tmp_path / "model.safetensors").exists()
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    inputs = hf.example_inputs(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, hf.load(tmp_path)(**inputs).logits)


def test_from_folder_to_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, small = tmp_path / "dense", tmp_path / "small"
    build("Llama", num_key_value_heads=4, **ENDS).save_pretrained(dense)
    tokenizer().save_pretrained(dense)
    (dense / "README.md").write_text("# A model\n")
    (dense / "pytorch_model.bin").write_text("old")
    command = ["shrink", f"hf:{dense}", "--mode", "uniform", "--params", "0.7"]
    assert main([*command, "--out", str(small)]) == 0
    assert f"wrote out: {small}" in capsys.readouterr().out
    assert {path.name for path in small.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "README.md",
    }  # fmt: skip
    assert transformers.AutoTokenizer.from_pretrained(small)("w5 w6").input_ids == [5, 6]
    card = (small / "README.md").read_text()
    assert card.startswith("# A model\n")
    assert "from_pretrained" in card
    loaded = transformers.AutoModelForCausalLM.from_pretrained(small)
    assert loaded.num_parameters() <= 0.7 * hf.load(dense).num_parameters()
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "small"}
    assert main(["shrink", "zoo:lenet5", "--mode", "uniform", "--params", "0.7"]) == 2
    assert "for models of transformers" in capsys.readouterr().err


def test_widths_are_multiples_where_nobody_says_otherwise() -> None:
    model = build("Llama", num_key_value_heads=4, hidden_size=128, intermediate_size=352)
    shrink(model, remove={"ffn": 0.3, "hidden": 0.2})
    assert (model.config.hidden_size, model.config.intermediate_size) == (96, 240)
    model = build("Llama", num_key_value_heads=4, hidden_size=128, intermediate_size=352)
    shrink(model, remove={"ffn": 101})
    assert model.config.intermediate_size == 251


def test_nothing_is_removed_that_nobody_named() -> None:
    model = build("Llama", num_key_value_heads=4)
    with pytest.raises(PlanError, match=r"can be combined(.|\n)*multiple of its num_attention"):
        shrink(model, remove={"heads": 4, "kv_groups": 1})  # 3 heads, and a hidden size of 64


def test_heads_that_are_a_part_of_the_hidden_size_are_not_removed_alone() -> None:
    model = build("Bert")
    with pytest.raises(PlanError, match=r"can't be removed alone(.|\n)*hidden and heads"):
        shrink(model, remove={"heads": 0.25})
    shrink(model, remove={"heads": 0.25, "hidden": 0.25})
    assert (model.config.hidden_size, model.config.num_attention_heads) == (48, 6)


@pytest.mark.parametrize("request_number", [8, 11, 15, 20, 29, 30])
def test_a_request_ends_in_a_folder_or_is_refused(request_number: int) -> None:
    row = uniform.examine(request_number)
    assert row["right"], row
    assert row["ended"] == ("refused" if request_number in (29, 30) else "folder")


ORDER = """
import sys, prunus, test_uniform
for name in sys.argv[1:]:
    print(test_uniform.plan_of(name))
"""


def plan_of(name: str) -> str:
    model = build(name, **({"num_key_value_heads": 4} if name == "Llama" else {}))
    shrunk = shrink(model, budget=prunus.Budget(params=0.7), scope="global")
    return hashlib.sha256(shrunk.plan.to_json().encode()).hexdigest()


def test_plans_do_not_depend_on_what_was_planned_before() -> None:
    here = [plan_of(name) for name in ("Llama", "Bert", "Llama")]
    command = [sys.executable, "-W", "ignore", "-c", ORDER, "Bert", "Llama"]
    fresh = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
    )
    assert [here[1], here[0]] == fresh.stdout.split()
    assert here[2] == here[0]


def test_bad_requests_are_refused_by_name(tmp_path: Path) -> None:
    net = torch.nn.Linear(4, 4)
    with pytest.raises(ModelError, match=r"Linear is no model of transformers(.|\n)*config\.json"):
        prunus.shrink(net, (), {"input": torch.ones(1, 4)}, mode="uniform", ratio=0.3)
    model = build("Llama", num_key_value_heads=4)
    with pytest.raises(PlanError, match=r"can't be removed alone(.|\n)*one number for the ffn"):
        shrink(model, remove={"ffn": {0: 32}})
    assert model.config.intermediate_size == 160
    with pytest.raises(ModelError, match="there is no folder"):
        hf.save(model, tmp_path / "small", mode="uniform", source=tmp_path / "none")
    assert not (tmp_path / "small").exists()
