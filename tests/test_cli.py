"""The command line: what it prints, writes and returns, and every message for what goes wrong."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import models_zoo
import prunus
from prunus.cli import VERBS, main, shrink
from prunus.cli.data import load_data
from tests.snapshots import same, snapshot

NET = """
import torch
from torch import nn

def net():
    print("built")
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )

def other():
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))

def nan():
    model = net()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = float("nan")
    return model

class Sorts(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x):
        y = self.a(x)
        return self.b(y + torch.histogram(y, 6)[0])

class Breaks(nn.Module):
    def forward(self, x):
        raise RuntimeError("my own mistake")

def broken():
    raise KeyError("no such checkpoint")

def number():
    return 3

def example_inputs():
    return torch.randn(2, 3, 8, 8)

def loader():
    return [torch.randn(4, 3, 8, 8) for _ in range(3)]

def nothing():
    return []

def leaves():
    raise SystemExit(0)

def interrupted():
    raise KeyboardInterrupt

NET = "not callable"
"""
CERTIFICATE = {"verdict", "rel_err", "moved", "moved_alone", "unverified", "dtype", "params"}
BARE = "from torch import nn\ndef net():\n    return nn.Linear(2, 2)\n"


@pytest.fixture
def net(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(NET)
    return f"{tmp_path / 'net.py'}:net"


def needs(package: str) -> None:
    """Skip without it; the command is to be the first that imports it."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def recovered(document: dict[str, Any]) -> list[str]:
    """The steps of the recovery."""
    return [step["name"] for step in document["recovery"]]


def shrink_json(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> dict:
    """The document that a command prints; everything else has to be on stderr."""
    assert main([*argv, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_inspect_tells_groups_pins_outputs_and_costs(net, capsys) -> None:
    assert main(["inspect", net]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "16 units in 2 groups; kept outputs: output" in out
    assert "0.weight[0] 8 1 1 " in out
    assert "output 'output' keeps its shape" in out
    assert "built" not in out


def test_inspect_json(net, capsys) -> None:
    document = shrink_json(capsys, "inspect", net)
    assert document["model"] == net
    assert document["command"] == ["prunus", "inspect", net, "--json"]
    assert document["costs"]["params"] == 3 * 8 * 9 + 8 + 16 + 8 * 8 * 9 + 8 + 8 * 4 + 4
    assert [group["size"] for group in document["groups"]] == [8, 8]
    assert {"tensor": "0.weight", "dim": 0, "role": "producer"} in document["groups"][0]["axes"]
    assert {"axis", "reason", "operator", "module", "source"} == set(document["pins"][0])
    assert document["unknown"] == {}
    assert document["outputs"] == ["output"]
    assert set(document["versions"]) == {"prunus", "torch", "python"}


def test_inspect_explains_a_coupling_and_a_pin(net, capsys) -> None:
    assert main(["inspect", net, "--explain", "0.weight", "3.weight[1]"]) == 0
    assert "are tied by" in capsys.readouterr().out
    assert main(["inspect", net, "--explain", "0.weight", "3.weight"]) == 0
    assert capsys.readouterr().out == "Nothing ties 0.weight[0] and 3.weight[0].\n"
    assert main(["inspect", net, "--why-pinned", "7.weight"]) == 0
    assert "keeps its shape" in capsys.readouterr().out
    assert main(["inspect", net, "--why-pinned", "0.weight"]) == 0
    assert "All of 0.weight[0] can be pruned." in capsys.readouterr().out
    asked = ["--explain", "0.weight", "3.weight[1]", "--why-pinned", "7.weight"]
    document = shrink_json(capsys, "inspect", net, *asked)
    assert document["explain"][0]["a"] == "0.weight[0]"
    assert document["why_pinned"][0]["axis"] == "7.weight[0]"


def test_inspect_lists_unknown_operators_and_how_to_add_a_rule(net, capsys) -> None:
    reference = net.replace(":net", ":Sorts")
    assert main(["inspect", reference, "--input-shape", "2,5"]) == 0
    out = capsys.readouterr().out
    assert "Operators without a rule" in out
    assert '@rule("histogram.bin_ct")' in out


def test_inspect_writes_dot(net, tmp_path, capsys) -> None:
    assert main(["inspect", net, "--dot", str(tmp_path / "net.dot")]) == 0
    assert (tmp_path / "net.dot").read_text().startswith("graph prunus {")
    assert "wrote" in capsys.readouterr().out


def test_shrink_writes_what_it_is_asked_to(net, tmp_path, capsys) -> None:
    names = {
        "out": "small.safetensors",
        "plan": "plan.json",
        "certificate": "proof.json",
        "report": "report.json",
        "picture": "channels.png",
    }
    files = {name: tmp_path / file for name, file in names.items()}
    asked = [part for name, path in files.items() for part in (f"--{name}", str(path))]
    data = net.replace(":net", ":loader")
    document = shrink_json(capsys, "shrink", net, "--macs", "0.5", "--data", data, *asked)

    assert json.loads(files["report"].read_text()) == document
    assert document["files"] == {name: str(path) for name, path in files.items()}
    assert json.loads(files["certificate"].read_text()) == document["certificate"]
    assert set(document["certificate"]) >= CERTIFICATE
    assert document["certificate"]["verdict"] == "exact"
    assert recovered(document) == ["cut", "least squares", "batch norms"]
    dense, pruned = document["stages"]
    assert [dense["name"], pruned["name"]] == ["dense", "pruned"]
    for cost in ("params", "macs"):
        assert [dense[cost], pruned[cost]] == document["costs"][cost]
    assert pruned["macs"] <= dense["macs"] // 2
    assert files["picture"].read_bytes().startswith(b"\x89PNG")

    scope: dict = {}
    exec(NET, scope)
    model = prunus.load(files["out"], build=scope["net"])
    assert load_file(files["out"]).keys() == model.state_dict().keys()
    assert sum(p.numel() for p in model.parameters()) == pruned["params"]
    left = {path.name for path in tmp_path.iterdir()} - {"net.py", "__pycache__"}
    assert left == set(names.values())  # no drafts


def test_shrink_tells_a_person(net, capsys) -> None:
    assert main(["shrink", net, "--params", "0.6", "--no-verify"]) == 0
    out = capsys.readouterr().out
    assert "dense" in out
    assert "not verified (--no-verify)" in out
    assert main(["shrink", net, "--params", "0.6"]) == 0
    assert "verified (exact):" in capsys.readouterr().out


def test_same_seed_same_files(net, tmp_path, capsys) -> None:
    asked = ["shrink", net, "--macs", "0.5", "--no-verify", "--seed", "3", "--importance", "random"]
    for run in "ab":
        files = ["--plan", str(tmp_path / f"{run}.json"), "--out", str(tmp_path / f"{run}.st")]
        assert main([*asked, *files]) == 0
    for end in ("json", "st"):
        assert (tmp_path / f"a.{end}").read_bytes() == (tmp_path / f"b.{end}").read_bytes()


def test_a_plan_can_be_applied_again(net, tmp_path, capsys) -> None:
    plan, out = str(tmp_path / "plan.json"), str(tmp_path / "small.safetensors")
    first = shrink_json(capsys, "shrink", net, "--macs", "0.5", "--plan", plan)
    second = shrink_json(capsys, "apply", plan, net, "--out", out)
    assert second["stages"] == first["stages"]
    assert second["certificate"]["verdict"] == "exact"
    proof = shrink_json(capsys, "verify", plan, net)
    assert proof["certificate"] == second["certificate"]
    loaded = shrink_json(capsys, "load", out, "--build", net)
    assert loaded["params"] == first["stages"][1]["params"]
    assert loaded["outputs"] == {"output": [2, 4]}
    assert main(["verify", plan, net]) == main(["load", out, "--build", net]) == 0
    printed = capsys.readouterr().out
    assert "verified (exact):" in printed
    assert "the digest is right" in printed


def test_plan_shows_widths_and_costs_and_writes_only_if_asked_to(net, tmp_path, capsys) -> None:
    out = tmp_path / "plan.json"
    asked = ["plan", net, "--macs", "0.5"]
    dry = shrink_json(capsys, *asked, "--dry-run")
    assert not out.exists()
    macs = dry["costs"]["macs"]
    assert macs["achieved"] <= macs["requested"] == macs["before"] // 2
    assert dry["costs"]["params"]["requested"] is None
    wet = shrink_json(capsys, *asked, "--out", str(out))
    assert (wet["groups"], wet["costs"]) == (dry["groups"], dry["costs"])
    assert prunus.Plan.load(out).costs["macs"] == (macs["before"], macs["achieved"])
    assert main([*asked, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "at most" in printed
    assert "Nothing was written: --dry-run." in printed


def test_a_dry_run_tells_widths_and_what_stops_them(net, capsys) -> None:
    asked = ["plan", net, "--macs", "0.8", "--round-to", "4", "--exclude", "3.weight[0]"]
    document = shrink_json(capsys, *asked, "--min-width", "4", "--dry-run")
    assert [(g["width"], g["stopped"]) for g in document["groups"]] == [
        ([8, 4], "it keeps 4 at least, and goes in steps of 4"),
        ([8, 8], "excluded"),
    ]
    costs = document["costs"]["params"]
    assert costs["share"] == costs["achieved"] / costs["before"]
    assert costs["pinned"] == 4  # the bias of the last layer
    assert main([*asked, "--dry-run"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "3.weight[0] 8 8 100% 8 excluded" in out
    assert "0.weight[0] 8 4 50% 8 → 4" in out


def test_blocks_are_dropped_by_number_and_by_name(tmp_path, capsys) -> None:
    vit = ["zoo:vit_tiny"]
    plan = str(tmp_path / "plan.json")
    document = shrink_json(capsys, "plan", *vit, "--drop", "2", "--out", plan)
    assert len(document["drops"]) == 2
    assert prunus.Plan.load(plan).drops == tuple(document["drops"])
    assert document["costs"]["macs"]["requested"] is None
    named = ["--drop", "blocks.3", "--drop", "blocks.1", "--macs", "0.7"]
    document = shrink_json(capsys, "shrink", *vit, *named)
    assert document["drops"] == ["blocks.1", "blocks.3"]
    assert document["certificate"]["verdict"] == "exact"
    assert document["costs"]["macs"][1] <= 0.7 * document["costs"]["macs"][0]
    assert main(["plan", *vit, *named, "--dry-run"]) == 0
    assert "Dropped: blocks.1, blocks.3" in capsys.readouterr().out
    for wrong, text in [
        (["--drop", "blocks.77"], "'blocks.77' can't be dropped"),
        (["--drop", "0"], "'0' is no whole number from 1 on"),
        (["--drop", "2", "--drop", "blocks.1"], "drop must be an int ≥ 1, or the names of blocks"),
    ]:
        assert main(["plan", *vit, *wrong, "--dry-run"]) == 2
        assert text in capsys.readouterr().err


def test_a_model_may_be_replaced_by_a_second_run(net, tmp_path, capsys) -> None:
    files = ["--out", str(tmp_path / "w.st"), "--log", str(tmp_path / "log")]
    for _ in range(2):
        assert main(["shrink", net, "--macs", "0.5", "--no-verify", *files]) == 0


def test_the_log_has_every_event_as_a_line_of_json(net, tmp_path, capsys) -> None:
    log = tmp_path / "log.jsonl"
    document = shrink_json(capsys, "shrink", net, "--macs", "0.5", "--log", str(log))
    events = [json.loads(line) for line in log.read_text().splitlines()]
    names = [event["event"] for event in events]
    assert names[0] == "start"
    assert names[-2:] == ["result", "end"]
    assert set(names[1:-2]) == {"step"}
    assert events[-2]["document"] == document
    assert events[-1]["exit_code"] == 0
    assert main(["shrink", net, "--macs", "2", "--log", str(log)]) == 3
    *_, error, end = [json.loads(line) for line in log.read_text().splitlines()]
    assert (error["kind"], end["exit_code"]) == ("BudgetError", 3)
    assert error["what"] in capsys.readouterr().err


def test_images_in_a_folder_calibrate(net, tmp_path, capsys) -> None:
    pillow = pytest.importorskip("PIL.Image")
    folder = tmp_path / "pictures" / "cats"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0)
    for index, mode in enumerate(["RGB", "L", "RGBA", "P"]):
        values = pixels.integers(0, 255, (20, 30 + index), dtype=np.uint8)
        pillow.fromarray(values).convert(mode).save(folder / f"{index}.png")
    asked = ["shrink", net, "--macs", "0.5", "--data", str(folder.parent)]
    out = tmp_path / "small.safetensors"
    document = shrink_json(capsys, *asked, "--mean", "0.5", "--std", "0.25", "--out", str(out))
    assert recovered(document) == ["cut", "least squares", "batch norms"]
    for wrong, text in [
        (["--mean", "0.5,0.5"], "--mean has 2 numbers"),
        (["--std", "0"], "not above zero"),
        (["--mean", "a"], "is no list of numbers"),
    ]:
        assert main([*asked, *wrong]) == 2
        assert text in capsys.readouterr().err


def test_data_repair_a_model_without_batch_norms(net, tmp_path, capsys) -> None:
    np.savez(tmp_path / "x.npz", np.zeros((4, 5)))
    other = [net.replace(":net", ":other"), "--input-shape", "2,5"]
    asked = ["shrink", *other, "--params", "0.6", "--data", str(tmp_path / "x.npz")]
    assert main(asked) == 0
    assert "after least squares" in capsys.readouterr().out


def test_options_reach_the_planner(net, capsys) -> None:
    asked = ["--macs", "0.8", "--round-to", "4", "--exclude", "3.weight[0]", "--scope", "local"]
    document = shrink_json(capsys, "shrink", net, *asked, "--no-verify")
    assert [(g["size"], g["kept"]) for g in document["groups"]] == [(8, 4), (8, 8)]
    asked = ["--macs", "0.8", "--min-width", "7", "--max-ratio", "0.2", "--include", "0.*"]
    assert main(["shrink", net, *asked, "--no-verify"]) == 3


def test_classes_reach_the_planner(net, capsys) -> None:
    asked = ["--macs", "0.6", "--scope", "0.*,3.*", "--normalise", "standardised", "--no-verify"]
    document = shrink_json(capsys, "shrink", net, *asked)
    assert all(g["kept"] < g["size"] for g in document["groups"])
    assert main(["plan", net, "--macs", "0.6", "--scope", "globl", "--dry-run"]) == 2
    assert "scope='globl' is none of 'global', 'local', 'isomorphic'" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_help(verb, golden, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main([verb, "--help"]) == 0
    _, _, text = capsys.readouterr().out.partition("\n\n")  # how usage wraps is Python's
    golden(f"{verb}.txt", text)


def test_defaults_are_those_of_the_api() -> None:
    verbs = argparse.ArgumentParser().add_subparsers()
    shrink.add_parser(verbs)
    parsed = vars(verbs.choices["shrink"].parse_args(["zoo:resnet20"]))
    wanted = inspect.signature(prunus.plan).parameters
    names = "importance scope normalise min_width max_ratio round_to include seed"
    for name in names.split():
        assert parsed[name] == wanted[name].default, name


def test_a_budget_of_everything_removes_nothing_and_needs_no_proof(net, capsys) -> None:
    document = shrink_json(capsys, "shrink", net, "--macs", "1.0")
    assert document["certificate"]["verdict"] == "not verified"
    assert document["stages"][0]["params"] == document["stages"][1]["params"]


def test_zoo_reference_with_trained_weights(capsys) -> None:
    asked = ["--pretrained", "--params", "0.9", "--no-verify", "--input-shape", "1,1,28,28"]
    document = shrink_json(capsys, "shrink", "zoo:resnet_fmnist", *asked)
    model = models_zoo.build("resnet_fmnist")
    assert document["stages"][0]["params"] == sum(p.numel() for p in model.parameters())


def test_timm_reference(capsys) -> None:
    pytest.importorskip("timm")
    document = shrink_json(capsys, "inspect", "timm:test_resnet.r160_in1k")
    assert document["inputs"]["args"][0]["tensor"] == [1, 3, 160, 160]
    assert document["groups"]


def test_a_folder_of_transformers_with_lines_of_text(tmp_path, capsys) -> None:
    transformers, tokenizers = (pytest.importorskip(n) for n in ("transformers", "tokenizers"))
    folder = tmp_path / "bert"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = transformers.BertConfig(**sizes, num_attention_heads=4, vocab_size=9)
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    words = {word: n for n, word in enumerate(["[PAD]", "[UNK]", "a", "b", "c"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]")
    fast.save_pretrained(folder)
    (tmp_path / "lines.txt").write_text("a b c\n\nc d\n")
    out, data = str(tmp_path / "small.safetensors"), str(tmp_path / "lines.txt")
    asked = ["shrink", f"hf:{folder}", "--params", "0.8", "--data", data, "--out", out]
    document = shrink_json(capsys, *asked, "--round-to", "1")
    assert document["certificate"]["verdict"] == "exact"
    assert recovered(document) == ["cut", "least squares", "norms"]  # there is no batch norm
    loaded = shrink_json(capsys, "load", out, "--build", f"hf:{folder}")
    assert loaded["outputs"] == {"logits": [1, 16, 9]}
    told = run("inspect", f"hf:{folder}")
    assert (told.returncode, "Loading" in told.stderr) == (0, False)
    for path in folder.glob("tokenizer*"):
        path.rename(path.with_name(f"no-{path.name}"))
    assert main(asked) == 2
    assert "there is no tokenizer in" in capsys.readouterr().err
    for path in folder.glob("no-*"):
        path.rename(path.with_name(path.name.removeprefix("no-")))
    options = SimpleNamespace(data=data, samples=9, tokenizer=str(folder))
    (batch,) = load_data(options, SimpleNamespace(source=None))
    assert batch["input_ids"].tolist() == [[2, 3, 4], [4, 1, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_a_model_of_ultralytics(tmp_path, capsys) -> None:
    needs("ultralytics")
    out = str(tmp_path / "small.safetensors")
    asked = ["yolo:yolov8n.yaml", "--input-shape", "1,3,64,64"]
    document = shrink_json(capsys, "shrink", *asked, "--macs", "0.7", "--no-verify", "--out", out)
    assert document["stages"][1]["macs"] <= 0.7 * document["stages"][0]["macs"]
    loaded = shrink_json(capsys, "load", out, "--build", "yolo:yolov8n.yaml")
    assert loaded["outputs"]["0"] == [1, 84, 84]


def test_a_pickle_is_read_only_where_it_is_trusted(tmp_path, capsys) -> None:
    needs("ultralytics")
    path = str(tmp_path / "tiny.pt")
    assert main(["inspect", "yolo:yolov8n.yaml", "--input-shape", "1,3,64,64"]) == 0
    tasks = importlib.import_module("ultralytics.nn.tasks")
    model = tasks.DetectionModel("yolov8n.yaml", verbose=False)
    torch.save({"model": model, "train_args": {}}, path)
    assert main(["inspect", f"yolo:{path}"]) == 2
    assert "--trust-pickle" in capsys.readouterr().err
    asked = ["--input-shape", "1,3,64,64", "--trust-pickle"]
    document = shrink_json(capsys, "inspect", f"yolo:{path}", *asked)
    assert document["costs"]["params"] == sum(p.numel() for p in model.parameters())


def test_inputs_by_keyword_and_from_a_npz(tmp_path, capsys) -> None:
    (tmp_path / "keys.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.n, self.b = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)\n"
        "    def forward(self, x):\n"
        "        return self.b(self.n(self.a(x)).relu())\n"
        "def example_inputs():\n"
        "    return {'x': torch.randn(3, 4)}\n"
    )
    np.savez(tmp_path / "data.npz", inputs=np.random.default_rng(0).normal(size=(100, 4)))
    asked = ["--params", "0.7", "--data", str(tmp_path / "data.npz")]
    document = shrink_json(capsys, "shrink", f"{tmp_path / 'keys.py'}:Net", *asked)
    assert recovered(document) == ["cut", "least squares", "batch norms"]
    assert document["certificate"]["verdict"] == "exact"


# What the command line is given, the exit code, and what it has to say about it; FILE is net.py.
MISTAKES = [
    (["inspect", "resnet50"], 2, "'resnet50' is no reference"),
    (["inspect", "zoo:resnet_fmnits"], 2, "did you mean 'resnet_fmnist'"),
    (["inspect", "zoo:resnet20", "--pretrained"], 2, "no trained weights ship"),
    (["inspect", "FILE:net", "--pretrained"], 2, "--pretrained is for models of the zoo"),
    (["inspect", "missing.py:net"], 2, "there is no file missing.py"),
    (["inspect", "FILE:nett"], 2, "did you mean 'net'?"),
    (["inspect", "FILE:NET"], 2, "has no function 'NET'"),
    (["inspect", "FILE:number"], 2, "returned a int"),
    (["inspect", "FILE:broken"], 2, "KeyError: 'no such checkpoint'"),
    (["inspect", "FILE:Breaks"], 2, "RuntimeError: my own mistake"),
    (["inspect", "FILE:leaves"], 2, "SystemExit: 0"),
    (["inspect", "FILE:interrupted"], 130, "interrupted"),
    (["inspect", "BARE:net"], 2, "no function example_inputs()"),
    (["inspect", "FILE:net", "--input-shape", "1,x"], 2, "'1,x' is no shape"),
    (["inspect", "FILE:net", "--outputs", "logits"], 2, "no output is called 'logits'"),
    (["inspect", "FILE:net", "--why-pinned", "9.weight"], 2, "the model has no axis 9.weight"),
    (
        ["inspect", "FILE:net", "--why-pinned", "0.weight[a]"],
        2,
        "the model has no axis 0.weight[a]",
    ),
    (["inspect", "FILE:net", "--dot", "no/such/folder/x.dot"], 2, "no/such/folder does not exist"),
    (["shrink", "FILE:net"], 2, "give a budget"),
    (["shrink", "FILE:net", "--macs", "1.5"], 2, "1.5 is no budget: a float is a fraction"),
    (["shrink", "FILE:net", "--macs", "1"], 2, "1.0 is all of it"),
    (["shrink", "FILE:net", "--macs", "half"], 2, "'half' is no number"),
    (["shrink", "FILE:net", "--macs", "nan"], 2, "it is not finite"),
    (["shrink", "FILE:net", "--macs", "0.5", "--round-to", "0"], 2, "no whole number"),
    (["shrink", "FILE:net", "--macs", "0.5", "--max-ratio", "2"], 2, "max_ratio=2.0 is no ratio"),
    (["shrink", "FILE:net", "--macs", "2"], 3, "prunus: "),
    (
        ["shrink", "FILE:net", "--macs", "0.5", "--importance", "l3"],
        2,
        "known are activation, bn_scale",
    ),
    (
        ["shrink", "FILE:net", "--macs", "0.5", "--importance", "taylor"],
        2,
        "needs calibration data",
    ),
    (["shrink", "FILE:net", "--macs", "0.5", "--exclude", "x"], 2, "'x' matches no group"),
    (["shrink", "FILE:nan", "--macs", "0.5"], 2, "1 values of 216 that are NaN"),
    (["shrink", "FILE:net", "--macs", "0.5", "--data", "FILE:nothing"], 2, "data is empty"),
    (["shrink", "FILE:net", "--macs", "0.5", "--data", "FILE:number"], 2, "iterable of batches"),
    (["shrink", "FILE:net", "--macs", "0.5", "--data", "x.npz"], 2, "there is no file x.npz"),
    (["shrink", "FILE:net", "--macs", "0.5", "--data", "BYTES"], 2, "is uint8 of shape (2, 3)"),
    (["apply", "x.json", "FILE:net"], 2, "there is no file x.json"),
    (["apply", "FILE", "FILE:net"], 2, "no plan"),
    (["verify", "PLAN", "FILE:net"], 2, "this is no plan, or a damaged one"),
    (["plan", "FILE:net", "--macs", "0.5"], 2, "give a file for the plan, or --dry-run"),
    (["plan", "FILE:net", "--dry-run"], 2, "give a budget"),
    (["load", "FILE", "--build", "FILE:net"], 2, "this is no safetensors file"),
    (["load", "PLAN", "--build", "FILE:net"], 2, "this is no safetensors file"),
]


@pytest.mark.parametrize(("argv", "code", "text"), MISTAKES, ids=lambda v: str(v)[:60])
def test_mistakes_are_told_plainly_and_nothing_is_written(
    net, tmp_path, capsys, argv, code, text
) -> None:
    file = net.partition(":net")[0]
    (tmp_path / "bare.py").write_text(BARE)
    (tmp_path / "plan.json").write_text("{}")
    np.savez(tmp_path / "bytes.npz", np.zeros((2, 3), dtype=np.uint8))
    places = {"FILE": file, "BARE": str(tmp_path / "bare.py"), "PLAN": str(tmp_path / "plan.json")}
    places["BYTES"] = str(tmp_path / "bytes.npz")
    for name, place in places.items():
        argv = [part.replace(name, place) if part.startswith(name) else part for part in argv]
    out = tmp_path / "out"
    out.mkdir()
    if argv[0] == "shrink":
        argv = [*argv, "--out", str(out / "w.safetensors"), "--plan", str(out / "plan.json")]
    before = Path(file).read_bytes()
    assert main([*argv, "--json"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert text in captured.err
    own = any(error in text for error in ("RuntimeError", "KeyError", "SystemExit"))
    assert ("Traceback" in captured.err) == own
    assert list(out.iterdir()) == []
    assert Path(file).read_bytes() == before


def test_a_plan_for_another_model_is_refused(net, tmp_path, capsys) -> None:
    plan = str(tmp_path / "plan.json")
    assert main(["shrink", net, "--macs", "0.5", "--plan", plan, "--no-verify"]) == 0
    other = [net.replace(":net", ":other"), "--input-shape", "2,5"]
    for argv in (["apply", plan, *other], ["apply", plan, *other, "--no-verify"]):
        assert main(argv) == 2
        assert "this is a plan for another model" in capsys.readouterr().err


def test_a_plan_for_a_part_of_the_model_is_refused(tmp_path, capsys) -> None:
    plan = str(tmp_path / "plan.json")
    small = ["--input-shape", "1,3,32,32"]
    assert main(["plan", "zoo:resnet20", *small, "--macs", "0.5", "--out", plan]) == 0
    for verb in ("verify", "apply"):
        assert main([verb, plan, "zoo:resnet56", *small]) == 2
        err = capsys.readouterr().err
        assert "this is a plan for another model" in err
        assert "more than the plan has" in err


def test_weights_that_are_not_on_this_machine(tmp_path, monkeypatch, capsys) -> None:
    timm = pytest.importorskip("timm")

    def offline(name: str, pretrained: bool = False) -> None:
        raise ConnectionError("offline mode is enabled")

    monkeypatch.setattr(timm, "create_model", offline)
    assert main(["inspect", "timm:resnet18", "--pretrained"]) == 2
    err = capsys.readouterr().err
    assert "the trained weights of resnet18 can't be had" in err
    assert "offline mode is enabled" in err
    assert "Traceback" not in err


# The same mistakes by the public API, as arguments of prunus.shrink.
API_MISTAKES = [
    ({"budget": {"macs": 1.5}}, "1.5 is no budget"),
    ({"budget": {"macs": 2}}, "no plan reaches macs ≤ 2"),
    ({"budget": {"macs": 0.5}, "importance": "l3"}, "no importance is called 'l3'"),
    ({"budget": {"macs": 0.5}, "exclude": "x"}, "matches no group"),
    ({"budget": {"macs": 0.5}, "outputs": "logits"}, "no output is called 'logits'"),
    ({"budget": {"macs": 0.5}, "nan": True}, "NaN or infinite"),
    ({"budget": {"macs": 0.5}, "data": []}, "data is empty"),
]


@pytest.mark.parametrize(("options", "text"), API_MISTAKES, ids=lambda v: str(v)[:60])
def test_a_mistake_leaves_the_model_as_it_was(options, text) -> None:
    model = models_zoo.build("resnet_fmnist").train()
    options = dict(options)
    if options.pop("nan", False):
        model.fc.weight.data[0, 0] = float("nan")
    before = snapshot(model)
    with pytest.raises(prunus.PrunusError, match=text):
        prunus.shrink(
            model,
            models_zoo.example_inputs("resnet_fmnist"),
            **{**options, "budget": prunus.Budget(**options["budget"])},
        )
    assert same(snapshot(model), before)


def test_an_unknown_timm_model_and_a_missing_timm(monkeypatch, capsys) -> None:
    pytest.importorskip("timm")
    assert main(["inspect", "timm:resnet18_typo"]) == 2
    assert "did you mean" in capsys.readouterr().err

    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("prunus.errors.importlib", SimpleNamespace(import_module=absent))
    assert main(["inspect", "timm:resnet18"]) == 2
    assert "pip install 'prunus[timm]'" in capsys.readouterr().err


@pytest.mark.parametrize("verdict", ["inexact", "not verified"])
def test_exit_code_1_when_nothing_is_proven(net, tmp_path, capsys, monkeypatch, verdict) -> None:
    plan = str(tmp_path / "plan.json")
    assert main(["plan", net, "--macs", "0.5", "--out", plan]) == 0
    capsys.readouterr()
    real = prunus.verify

    def pretend(*args, **kwargs) -> prunus.verifier.Certificate:
        return replace(real(*args, **kwargs), verdict=verdict, rel_err=float("inf"))

    monkeypatch.setattr("prunus.verify", pretend, raising=False)
    traced = prunus.verifier.verify.verify
    monkeypatch.setattr(
        "prunus.planner.planning.verify",
        lambda *a, **k: replace(traced(*a, **k), verdict=verdict, rel_err=float("inf")),
    )
    files = [tmp_path / "w.st", tmp_path / "proof.json"]
    asked = ["--out", str(files[0]), "--certificate", str(files[1])]
    document = shrink_json(capsys, "apply", plan, net, *asked, code=1)
    assert document["certificate"]["verdict"] == verdict
    assert document["certificate"]["rel_err"] is None
    assert files[0].exists() == (verdict != "inexact")
    assert files[1].exists()
    for argv, fix in (
        (["verify", plan, net], "fix:   plan anew, and leave groups out with --exclude"),
        (["apply", plan, net], "fix:   no model was written; plan anew, and leave groups out"),
        (["shrink", net, "--macs", "0.5"], "fix:   no model was written; leave groups out"),
    ):
        assert main(argv) == 1
        printed = capsys.readouterr()
        assert verdict in printed.out or "would not" in printed.err
        if verdict == "inexact" and argv[0] != "shrink":
            assert fix in printed.err


def run(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "prunus", *argv],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_progress_and_prints_of_the_model_go_to_stderr(net) -> None:
    result = run("shrink", net, "--macs", "0.5", "--json", FORCE_COLOR="1")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["certificate"]["verdict"] == "exact"
    assert "built" in result.stderr
    assert "tracing" in result.stderr or "verifying" in result.stderr


def test_bad_options_exit_with_2_and_help_with_0() -> None:
    assert run("shrink", "zoo:resnet_fmnist", "--macs", "0.5", "--scope", "x").returncode == 2
    assert run("no-such-verb").returncode == 2
    assert main(["--version"]) == 0
    assert main([]) == 2


SLOW = """
import time
from pathlib import Path
from typing import Any
from prunus.files import replace_file

def net():
    replace_file("out", write)

def write(draft):
    draft.write_text("half of it")
    Path("started").touch()
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("number", "code", "text"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_stopped_from_outside(tmp_path, number, code, text) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    process = subprocess.Popen(
        [sys.executable, "-m", "prunus", "inspect", "slow.py:net", "--log", "log"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        # A shell starts its background jobs with the signal ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    while not (tmp_path / "started").exists():
        assert process.poll() is None
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert err == f"prunus: {text}; nothing half-written is left\n"
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {
        *("slow.py", "started", "log")
    }
    last = json.loads((tmp_path / "log").read_text().splitlines()[-1])
    assert (last["event"], last["exit_code"]) == ("end", code)


def test_termination_is_heeded_only_while_a_command_runs(net, capsys) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert main(["inspect", net]) == 0
    assert signal.getsignal(signal.SIGTERM) is before


STOP = """
import sys

class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == "MODULE":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Stop())
"""


@pytest.mark.parametrize(
    ("verb", "module"),
    [
        ("inspect", "argparse"),
        ("inspect", "numpy"),
        ("inspect", "scipy"),
        ("shrink", "prunus.cli.plan"),
        ("shrink", "numpy"),
        ("shrink", "torch"),
        ("shrink", "rich"),
    ],
)
def test_interrupted_while_modules_are_imported(net, tmp_path, verb, module) -> None:
    (tmp_path / "sitecustomize.py").write_text(STOP.replace("MODULE", module))
    asked = [net, "--explain", "0.weight", "3.weight"] if verb == "inspect" else [net, "--macs=0.5"]
    path = os.pathsep.join(filter(None, [str(tmp_path), *sys.path]))
    result = run(verb, *asked, PYTHONPATH=path)
    assert result.stderr.replace("built\n", "") == (
        "prunus: interrupted; nothing half-written is left\n"
    )
    assert result.returncode == 130
    assert result.stdout == ""


@pytest.mark.parametrize("argv", [["inspect", "NET"], ["inspect", "NET", "--json"], ["--help"]])
def test_a_reader_that_leaves(net, argv) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run(
        [sys.executable, "-m", "prunus", *(net if part == "NET" else part for part in argv)],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writing)
    assert result.stderr.replace("built\n", "") == ""
    assert result.returncode == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("argv", [["inspect", "NET"], ["inspect", "NET", "--json"], ["--help"]])
def test_a_full_disk_under_stdout(net, tmp_path, argv) -> None:
    log = [] if argv == ["--help"] else ["--log", str(tmp_path / "log")]
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [
                *(sys.executable, "-m", "prunus"),
                *(net if part == "NET" else part for part in argv),
                *log,
            ],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert result.returncode == 2
    assert result.stderr.replace("built\n", "") == (
        "prunus: the result can't be printed\n"
        "  where: stdout\n"
        "  why:   No space left on device\n"
        "  fix:   make room on the disk, or write elsewhere\n"
    )
    if log:
        *_, error, end = map(json.loads, (tmp_path / "log").read_text().splitlines())
        assert (error["kind"], end["exit_code"]) == ("FileError", 2)


def test_a_pipe_that_breaks_in_the_model_is_an_error_of_the_model(tmp_path, capsys) -> None:
    (tmp_path / "pipe.py").write_text("def net():\n    raise BrokenPipeError('my socket')\n")
    assert main(["inspect", f"{tmp_path / 'pipe.py'}:net"]) == 2
    assert "BrokenPipeError: my socket" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["shrink", "plan"])
def test_an_importance_reads_the_calibration_data(verb, net, tmp_path, capsys) -> None:
    data = f"{tmp_path / 'net.py'}:loader"
    asked = [verb, net, "--macs", "0.5", "--importance", "taylor", "--data", data]
    asked += ["--dry-run"] if verb == "plan" else ["--plan", str(tmp_path / "plan.json")]
    document = shrink_json(capsys, *asked)
    assert sum(group["size"] - group["kept"] for group in document["groups"]) > 0
    if verb == "shrink":
        assert "batch norms" in recovered(document)
        assert prunus.Plan.load(tmp_path / "plan.json").origin["importance"] == "taylor"


def test_data_that_comes_once_serves_importance_and_batch_norms(net, tmp_path, capsys) -> None:
    (tmp_path / "once.py").write_text(f"{NET}\ndef once():\n    return iter(loader())\n")
    data = f"{tmp_path / 'once.py'}:once"
    asked = ["shrink", net, "--macs", "0.5", "--importance", "flap", "--data", data]
    assert "batch norms" in recovered(shrink_json(capsys, *asked))
    other = net.replace(":net", ":other")
    (tmp_path / "lines.py").write_text("import torch\ndef x():\n    return [torch.randn(3, 5)]\n")
    asked = ["shrink", other, "--params", "0.6", "--input-shape", "1,5", "--importance", "wanda"]
    assert main([*asked, "--data", f"{tmp_path / 'lines.py'}:x"]) == 0
    assert "after least squares" in capsys.readouterr().out
    assert main([*asked, "--data", f"{tmp_path / 'lines.py'}:x", "--recover", "none"]) == 0
    assert "On the calibration data" not in capsys.readouterr().out
