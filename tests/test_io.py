"""Whole models in one file: the same to the bit comes back, and nothing in a file is believed."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import os
import pickle
import random
import socket
import stat
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import models_zoo
import prunus
from prunus import files
from prunus.checkpoint import container
from prunus.checkpoint.model_file import without_values
from prunus.errors import ApplyError, FileError, FormatError, ModelError, PlanError, PrunusError
from prunus.graph.plan_records import Edit
from prunus.graph.plans import Plan
from prunus.graph.program import tensors_of
from tests.file_attacks import resign, rewrite

# Every model as a function without arguments, so that another process can build it again.
BUILDERS = """
import torch
import models_zoo


def zoo(name):
    return lambda: models_zoo.build(name)

def swin():
    import timm
    return timm.create_model("swin_tiny_patch4_window7_224").eval()

def llama():
    from transformers import LlamaConfig, LlamaForCausalLM
    return LlamaForCausalLM(LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=97, max_position_embeddings=32, use_cache=False,
        tie_word_embeddings=True,
    )).eval()

def bert():
    from transformers import BertConfig, BertForMaskedLM
    return BertForMaskedLM(BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=97, max_position_embeddings=32,
    )).eval()

def yolov8n():
    from ultralytics.nn.tasks import DetectionModel
    return DetectionModel("yolov8n.yaml", verbose=False).eval()

BUILD = {f"zoo_{name}": zoo(name) for name in models_zoo.names()}
BUILD |= {"swin": swin, "llama": llama, "bert": bert, "yolov8n": yolov8n}
BUILD["twice"] = zoo("resnet20")
"""
scope: dict[str, Any] = {}
exec(BUILDERS, scope)
BUILD: dict[str, Callable[[], nn.Module]] = scope["BUILD"]

CHILD = (
    BUILDERS
    + """
import sys
from pathlib import Path
import prunus
from prunus.graph.program import tensors_of
from safetensors.torch import load_file

torch.set_num_threads(int(sys.argv[2]))
for path in sorted(Path(sys.argv[1]).glob("*.model")):
    model = prunus.load(path, build=BUILD[path.stem]).eval()
    told = load_file(path.with_suffix(".told"))
    inputs = [told[f"in.{n}"] for n in range(sum(key.startswith("in.") for key in told))]
    with torch.no_grad():
        found = dict(tensors_of(model(*inputs)))
    same = all(torch.equal(found[key[4:]], told[key]) for key in told if key.startswith("out."))
    print(path.stem, same, sum(p.numel() for p in model.parameters()))
"""
)


def inputs_of(name: str) -> tuple[torch.Tensor, ...]:
    if name.startswith("zoo_"):
        return models_zoo.example_inputs(name.removeprefix("zoo_"))
    if name == "twice":
        return models_zoo.example_inputs("resnet20")
    if name in ("llama", "bert"):
        return (torch.randint(1, 97, (2, 12)),)
    return (torch.randn(1, 3, *((224, 224) if name == "swin" else (96, 96))),)


def pruned(name: str) -> nn.Module:
    """A model with a third of every group gone; *twice* loses some more."""
    model = BUILD[name]()
    for ratio in (0.3, 0.2) if name == "twice" else (0.3,):
        graph = prunus.trace(model, inputs_of(name))
        prunus.apply(prunus.plan(graph, model, ratio=ratio, importance="random"), model)
    return model


def write_with_outputs(name: str, folder: Path) -> int:
    """Save a pruned model, with inputs and what it answers; how many parameters it has."""
    model, inputs = pruned(name), inputs_of(name)
    with torch.no_grad():
        outputs = dict(tensors_of(model(*inputs)))
    prunus.save(model, folder / f"{name}.model")
    told = {f"in.{n}": value for n, value in enumerate(inputs)}
    told |= {f"out.{key}": value.clone().contiguous() for key, value in outputs.items()}
    save_file(told, folder / f"{name}.told")
    return sum(parameter.numel() for parameter in model.parameters())


def round_trips(names: list[str], folder: Path) -> None:
    counts = {name: write_with_outputs(name, folder) for name in names}
    result = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), str(torch.get_num_threads())],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    lines = sorted(line for line in result.stdout.splitlines() if len(line.split()) == 3)
    assert lines == sorted(f"{name} True {count}" for name, count in counts.items())


LARGE = {"bert_base", "hrnet_w18", "resnet50"}  # each has a smaller sister in the zoo


def test_the_zoo_comes_back_in_a_new_process_to_the_bit(tmp_path) -> None:
    small = [f"zoo_{name}" for name in models_zoo.names() if name not in LARGE]
    round_trips([*small, "twice"], tmp_path)


@pytest.mark.slow
def test_the_large_models_of_the_zoo_come_back_too(tmp_path) -> None:
    assert set(models_zoo.names()) >= LARGE
    round_trips([f"zoo_{name}" for name in sorted(LARGE)], tmp_path)


def test_models_of_others_come_back_in_a_new_process_to_the_bit(tmp_path) -> None:
    for package in ("timm", "transformers", "ultralytics"):
        pytest.importorskip(package)
    round_trips(["swin", "llama", "bert", "yolov8n"], tmp_path)


class Odd(nn.Module):
    """Everything at once: tied weights, a hidden buffer, a tensor attribute, a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.mid = nn.Linear(6, 8)
        self.back = nn.Linear(8, 6)
        self.back.bias.requires_grad_(False)
        self.register_buffer("scale", torch.rand(6), persistent=False)
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("nothing", None)
        self.table = torch.arange(11)
        self.flags = torch.tensor([True, False])
        self.empty = torch.zeros(0, 3)

    def forward(self, ids):
        x = self.embed(self.table[ids]) * self.scale
        return self.head(self.back(self.mid(x).relu()) + x)


def small() -> tuple[Odd, torch.Tensor]:
    model, ids = Odd(), torch.arange(5)
    graph = prunus.trace(model, ids)
    prunus.apply(prunus.plan(graph, model, ratio=0.3), model)
    return model, ids


def test_every_kind_of_tensor_comes_back(tmp_path) -> None:
    model, ids = small()
    prunus.save(model, tmp_path / "m.st")
    other = prunus.load(tmp_path / "m.st", build=Odd)
    assert torch.equal(model(ids), other(ids))
    assert other.head.weight is other.embed.weight
    assert "scale" not in other.state_dict()
    assert "steps" in other.state_dict()
    assert not other.back.bias.requires_grad
    assert other.mid.weight.requires_grad
    assert isinstance(other.mid.weight, nn.Parameter)
    for name in ("scale", "steps", "table", "flags", "empty"):
        assert torch.equal(getattr(model, name), getattr(other, name)), name
    assert other.mid.out_features == model.mid.out_features < 8
    assert list(without_values(other)) == []


def test_the_file_is_plain_safetensors_tied_once_and_the_same_every_time(tmp_path) -> None:
    model, _ = small()
    for name in "ab":
        prunus.save(model, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with safe_open(tmp_path / "a", "pt") as file:
        assert "head.weight" not in set(file.keys())
        metadata = file.metadata()
    assert json.loads(metadata["prunus"])["aliases"] == {"head.weight": "embed.weight"}
    plan = Plan.from_json(metadata["plan"])
    assert plan.traced.inputs["args"][0]["tensor"] == (5,)
    assert torch.equal(load_file(tmp_path / "a")["scale"], model.scale)
    umask = os.umask(0o022)
    os.umask(umask)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_model_that_was_not_pruned_and_half_precision_and_channels_last(tmp_path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)).eval()

    model = build().to(torch.bfloat16, memory_format=torch.channels_last)
    prunus.save(model, tmp_path / "m.st")
    other = prunus.load(tmp_path / "m.st", build=build)
    x = torch.randn(2, 3, 9, 9, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    assert torch.equal(model(x), other(x))
    assert other[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert other[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_modules_keep_their_list_of_weights(tmp_path, kind) -> None:
    model = kind(3, 4, 2, batch_first=True)
    prunus.save(model, tmp_path / "m.st")
    other = prunus.load(tmp_path / "m.st", build=lambda: kind(3, 4, 2, batch_first=True))
    x = torch.randn(2, 5, 3)
    assert torch.equal(model(x)[0], other(x)[0])
    assert all(a is b for a, b in zip(other._flat_weights, other.parameters(), strict=True))


def test_loading_leaves_the_random_state_and_remembers_the_plan(tmp_path) -> None:
    model, ids = small()
    prunus.save(model, tmp_path / "m.st")
    before = torch.get_rng_state()
    other = prunus.load(tmp_path / "m.st", build=Odd)
    assert torch.equal(before, torch.get_rng_state())
    graph = prunus.trace(other, ids)
    prunus.apply(prunus.plan(graph, other, ratio=0.3), other)
    prunus.save(other, tmp_path / "smaller.st")
    third = prunus.load(tmp_path / "smaller.st", build=Odd)
    assert torch.equal(other(ids), third(ids))
    assert third.mid.out_features < model.mid.out_features


class Stubborn(nn.Module):
    """Can't be finished on the meta device, in the way that ``how`` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        if how == "reads":
            self.factor = float(torch.ones(1).item())
        elif how == "list":
            self.tables = [torch.ones(3)]
        elif how == "closure":
            kept = torch.ones(3)
            self.function = lambda: kept
        elif how == "device":
            self.device = self.a.weight.device

    def forward(self, x):
        return self.a(x)


@pytest.mark.parametrize("how", ["reads", "list", "closure", "device"])
def test_what_has_no_values_on_meta_is_built_on_the_cpu(tmp_path, how) -> None:
    devices = []

    def build() -> nn.Module:
        model = Stubborn(how)
        devices.append(model.a.weight.device.type)
        return model

    model = Stubborn(how)
    prunus.save(model, tmp_path / "m.st")
    other = prunus.load(tmp_path / "m.st", build=build)
    assert devices[-1] == "cpu"
    assert list(without_values(other)) == []
    assert torch.equal(model.a.weight, other.a.weight)


def test_a_simple_model_is_built_on_meta_only(tmp_path) -> None:
    devices = []

    def build() -> nn.Module:
        model = nn.Linear(3, 3)
        devices.append(model.weight.device.type)
        return model

    prunus.save(nn.Linear(3, 3), tmp_path / "m.st")
    prunus.load(tmp_path / "m.st", build=build)
    assert devices == ["meta"]


def test_what_save_refuses(tmp_path) -> None:
    path = tmp_path / "m.st"
    model, ids = small()
    plan = prunus.plan(prunus.trace(model, ids), model, ratio=0.3)
    extra = type("Extra", (nn.Linear,), {"get_extra_state": lambda self: {}})(2, 2)
    part = nn.Sequential(copy.deepcopy(model))
    prunus.apply(prunus.plan(prunus.trace(part[0], ids), part[0], ratio=0.2), part[0])
    for subject, given, error, text in [
        (nn.Linear(2, 2, device="meta"), None, FormatError, "on the meta device can't be saved"),
        (nn.Linear(2, 2, dtype=torch.complex128), None, FormatError, "complex128 can't be saved"),
        (extra, None, FormatError, "extra state"),
        (model, plan, PlanError, "the model is not what the plan leaves"),
        (part, None, PlanError, "a plan for a part of this model"),
    ]:
        with pytest.raises(error, match=text):
            prunus.save(subject, path, plan=given)
        assert os.listdir(tmp_path) == []


def test_a_pruned_copy_needs_its_plan(tmp_path) -> None:
    model, ids = small()
    twin = copy.deepcopy(model)
    prunus.save(twin, tmp_path / "m.st")
    with pytest.raises(FormatError, match=r"the file has no plan(.|\n)*plan="):
        prunus.load(tmp_path / "m.st", build=Odd)
    with safe_open(_saved(model, tmp_path / "whole.st"), "pt") as file:
        plan = Plan.from_json(file.metadata()["plan"])
    prunus.save(twin, tmp_path / "m.st", plan=plan)
    assert torch.equal(prunus.load(tmp_path / "m.st", build=Odd)(ids), model(ids))


def test_a_cut_that_is_undone_is_forgotten(tmp_path) -> None:
    model = Odd()
    plan = prunus.plan(prunus.trace(model, torch.arange(5)), model, ratio=0.3)
    bad = Plan(plan.keep, plan.shapes, plan.edits[:-1], origin=plan.origin)
    with pytest.raises(PrunusError):
        prunus.apply(Plan(plan.keep, plan.shapes, (*plan.edits, Edit("mid", "x", 1, 2))), model)
    if bad.edits != plan.edits:
        prunus.save(model, tmp_path / "m.st")
        assert prunus.load(tmp_path / "m.st", build=Odd).mid.out_features == 8


def _saved(model: nn.Module, path: Path) -> Path:
    prunus.save(model, path)
    return path


# Another architecture than the one that was saved: the builder, the error, and its text.
OTHERS = [
    (lambda: nn.Linear(2, 2), FormatError, "the model has no back.bias"),
    (lambda: "model", ModelError, "build= returned a str"),
    (lambda: _with(Odd(), more=nn.Linear(2, 2)), FormatError, "the file has no more.bias"),
    (lambda: _without(Odd(), "back"), FormatError, "the model has no back.bias"),
    (lambda: _wider(Odd()), PlanError, "this is a plan for another model"),
    (lambda: _edited(Odd()), ApplyError, "mid.out_features is 9, the plan expects 8"),
]


def _with(model: nn.Module, **modules: nn.Module) -> nn.Module:
    for name, module in modules.items():
        model.add_module(name, module)
    return model


def _without(model: nn.Module, name: str) -> nn.Module:
    getattr(model, name).register_parameter("bias", None)
    return model


def _wider(model: nn.Module) -> nn.Module:
    model.mid, model.back = nn.Linear(6, 9), nn.Linear(9, 6)
    return model


def _edited(model: nn.Module) -> nn.Module:
    model.mid.out_features = 9
    return model


@pytest.mark.parametrize(("build", "error", "text"), OTHERS, ids=range(len(OTHERS)))
def test_another_architecture_is_refused(tmp_path, build, error, text) -> None:
    model, _ = small()
    prunus.save(model, tmp_path / "m.st")
    if "has no back.bias" in text:
        error, text = PrunusError, "back.bias"
    with pytest.raises(error, match=text) as caught:
        prunus.load(tmp_path / "m.st", build=build)
    if error is not ModelError:
        assert "m.st" in caught.value.where


def in_metadata(entry: str, change: Callable[[dict], None]) -> Callable[[dict], None]:
    def run(document: dict) -> None:
        inner = json.loads(document["__metadata__"][entry])
        change(inner)
        document["__metadata__"][entry] = json.dumps(inner)

    return run


def _set(**values: Any) -> Callable[[dict], None]:
    return lambda document: document.update(values)


def _edit(**values: Any) -> Callable[[dict], None]:
    return in_metadata("plan", lambda plan: plan["edits"][0].update(values))


def _tensor(**values: Any) -> Callable[[dict], None]:
    return lambda document: document["mid.weight"].update(values)


# What somebody may do to a file, as a change of its bytes, and what is said about it.
TAMPERED: list[tuple[Callable[[bytes], bytes], str]] = [
    (lambda data: b"", "this is no safetensors file"),
    (lambda data: data[:7], "this is no safetensors file"),
    (lambda data: b"\x00" * 100, "this is no safetensors file"),
    (lambda data: pickle.dumps({"a": 1}), "this is a pickle"),
    (lambda data: b"PK\x03\x04" + data, "this is a pickle"),
    (lambda data: data[:-1], "the file is damaged"),
    (lambda data: data[: len(data) // 2], "the file is damaged"),
    (lambda data: data + b"x", "the file is damaged"),
    (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "not what its digest was made of"),
    (lambda data: b"\xff" * 8 + data[8:], "a header of 18446744073709551615 bytes"),
    (
        lambda data: data[:8] + b"{" + b"[" * 900 + data[909:],
        "the file is damaged",
    ),
    (lambda data: data.replace(b'"I64"', b'"X64"', 1), "the file is damaged"),
    (lambda data: rewrite(data, lambda d: d.pop("__metadata__")), "not written by prunus.save"),
    (lambda data: rewrite(data, _set(__metadata__=3)), "the file is damaged"),
    (lambda data: rewrite(data, _tensor(shape=[-1, 6])), "the file is damaged"),
    (lambda data: rewrite(data, _tensor(shape=[True, 6])), "the file is damaged"),
    (lambda data: rewrite(data, _tensor(shape=[10**15, 6])), "the file is damaged"),
    (lambda data: rewrite(data, _tensor(shape=[0, 1 << 40, 1 << 40])), "the file is damaged"),
    (lambda data: rewrite(data, _tensor(data_offsets=[0, 10**15])), "the file is damaged"),
    (lambda data: rewrite(data, _tensor(data_offsets=[4, 3])), "the file is damaged"),
    (lambda data: rewrite(data, lambda d: d.pop("mid.bias")), "the file is damaged"),
    (lambda data: rewrite(data, in_metadata("prunus", _set(schema=3))), "schema version 3"),
    (lambda data: rewrite(data, in_metadata("prunus", _set(aliases={"a": "b"}))), "its aliases"),
    (lambda data: rewrite(data, in_metadata("prunus", _set(buffer=["x"]))), "its list 'buffer'"),
    (lambda data: rewrite(data, in_metadata("plan", _set(keep=[]))), "this is no plan"),
    (
        lambda data: rewrite(data, _edit(attribute="forward.__globals__")),
        "that a plan may",
    ),
    (lambda data: rewrite(data, _edit(before="a", after="b")), "that a plan may"),
    (lambda data: rewrite(data, _edit(attribute="weight", before=9)), "the plan expects 9"),
    (lambda data: rewrite(data, _edit(attribute="in_features[x]")), "that a plan may"),
    (lambda data: rewrite(data, _edit(attribute="nope")), "the plan expects"),
]


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> bytes:
    torch.manual_seed(0)
    model, _ = small()
    return _saved(model, tmp_path_factory.mktemp("io") / "m.st").read_bytes()


@pytest.mark.parametrize(("change", "text"), TAMPERED, ids=range(len(TAMPERED)))
def test_wrong_truncated_and_tampered_files(tmp_path, file, change, text) -> None:
    path = tmp_path / "m.st"
    path.write_bytes(change(file))
    with pytest.raises((FormatError, PlanError, ApplyError)) as caught:
        prunus.load(path, build=Odd)
    assert text in str(caught.value)
    assert "m.st" in str(caught.value)


def test_files_that_are_not_there_or_not_ours(tmp_path) -> None:
    with pytest.raises(FileError, match=r"none.st can't be read(.|\n)*No such file"):
        prunus.load(tmp_path / "none.st", build=Odd)
    with pytest.raises(FileError, match="Is a directory"):
        prunus.load(tmp_path, build=Odd)
    save_file({"a": torch.ones(2)}, tmp_path / "plain.st")
    with pytest.raises(FormatError, match=r"not written by prunus.save(.|\n)*load_model"):
        prunus.load(tmp_path / "plain.st", build=Odd)
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    with pytest.raises(FormatError, match="this is a pickle"):
        prunus.load(tmp_path / "a.pt", build=Odd)


WORDS = [None, True, -1, 0, 3, 1 << 70, 1e300, "", "x", "mid.weight", [], [[0, 1]], {}, {"a": 1}]


def mutate(data: bytes, dice: random.Random) -> bytes:
    """One random change of bytes or of the header's JSON; most are signed again."""
    changed = bytearray(data)
    kind = dice.randrange(8)
    if kind == 0:
        at = dice.randrange(len(changed))
        changed[at] ^= 1 << dice.randrange(8)
    elif kind == 1:
        del changed[dice.randrange(len(changed)) :]
    elif kind == 2:
        at = dice.randrange(len(changed))
        changed[at : at + dice.randrange(40)] = dice.randbytes(dice.randrange(40))
    elif kind == 3:
        changed[: dice.randrange(1, 9)] = dice.randbytes(dice.randrange(1, 9))
    else:
        return rewrite(data, lambda document: scramble(document, dice, inner=kind > 4))
    return resign(bytes(changed)) if dice.random() < 0.8 else bytes(changed)


def scramble(document: Any, dice: random.Random, *, inner: bool) -> None:
    """Replace, remove or copy one value somewhere in a JSON document, in place."""
    if inner and "__metadata__" in document:
        entry = dice.choice(["prunus", "plan"])
        in_metadata(entry, lambda found: scramble(found, dice, inner=False))(document)
        return
    holder, places = document, [document]
    while dice.random() < 0.8 and places:
        holder = dice.choice(places)
        values = holder.values() if isinstance(holder, dict) else holder
        places = [value for value in values if isinstance(value, dict | list) and value]
    keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    if not keys:
        return
    key = dice.choice(keys)
    action = dice.randrange(3)
    if action == 0:
        holder[key] = dice.choice(WORDS)
    elif action == 1:
        del holder[key]
    else:
        holder[key] = copy.deepcopy(holder[dice.choice(keys)])


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(1200, 1200), nn.ReLU(), nn.Linear(1200, 1200))


def wide_file(folder: Path) -> bytes:
    """A pruned model in a file of 8.6 MB."""
    model = wide()
    prunus.apply(prunus.plan(prunus.trace(model, torch.ones(1, 1200)), model, ratio=0.25), model)
    prunus.save(model, folder / "wide.st")
    data = (folder / "wide.st").read_bytes()
    (folder / "wide.st").unlink()
    assert len(data) > container.FLOOR
    return data


def test_a_thousand_mutated_files_make_no_crash_and_run_no_code(tmp_path, file) -> None:
    fuzz(file, Odd, tmp_path)


@pytest.mark.slow
def test_a_thousand_larger_files_never_take_more_than_twice_the_file(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(container, "FLOOR", 8 << 20)  # or the file would have to be that large
    fuzz(wide_file(tmp_path), wide, tmp_path)


def fuzz(file: bytes, build: Callable[[], nn.Module], tmp_path: Path) -> None:
    """Load a thousand mutated files, and watch what that takes and runs."""
    path, dice = tmp_path / "m.st", random.Random(0)
    path.write_bytes(file)
    prunus.load(path, build=build)  # what is imported when it is first needed
    watching, seen = [], []

    def audit(event: str, arguments: Any) -> None:
        if watching and event in {"exec", "compile", "pickle.find_class", "os.system", "import"}:
            seen.append((event, str(arguments)[:100]))

    sys.addaudithook(audit)
    refused = 0
    for _ in range(1000):
        data = mutate(file, dice)
        path.write_bytes(data)
        watching.append(True)
        try:
            with memory() as taken:
                prunus.load(path, build=build)
        except PrunusError:
            refused += 1
        finally:
            watching.clear()
        assert taken[0] <= len(data) + max(len(data), container.FLOOR)
    assert seen == []
    assert refused > 600
    assert os.listdir(tmp_path) == ["m.st"]


@contextlib.contextmanager
def memory() -> Iterator[list[int]]:
    """At the end, the most that Python held at once, and all tensors that were made."""
    taken, real = [0], torch.empty

    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = real(*args, **kwargs)
        taken[0] += 0 if tensor.is_meta else tensor.nbytes
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        tracemalloc.start()
        try:
            yield taken
        finally:
            taken[0] += tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()


def test_memory_is_measured() -> None:
    with memory() as taken:
        held = [torch.empty(1000), bytes(5000), torch.empty(10**9, device="meta")]
    assert 9000 <= taken[0] < 12000
    del held


def _range(positions: int) -> Callable[[bytes], bytes]:
    def change(document: dict) -> None:
        document["shapes"]["x"] = [positions]
        document["keep"]["x[0]"] = [[0, positions]]

    return lambda data: rewrite(data, in_metadata("plan", change))


def _rows(count: int) -> Callable[[bytes], bytes]:
    header = b"{" + b",".join(b'"%d":{}' % n for n in range(count)) + b"}"
    return lambda data: len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize("size", [10, 1_000, 50_000, 90_000, 130_000, 170_000, 300_000])
@pytest.mark.parametrize("bomb", [_range, _rows])
def test_small_files_that_would_be_large(tmp_path, file, bomb, size) -> None:
    data = bomb(size)(file)
    (tmp_path / "m.st").write_bytes(data)
    with memory() as taken, pytest.raises(PrunusError):
        prunus.load(tmp_path / "m.st", build=Odd)
    assert taken[0] <= len(data) + max(len(data), container.FLOOR)


def test_a_deep_model_of_few_numbers_is_no_bomb(tmp_path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(*(nn.Linear(2, 2) for _ in range(700)))

    model = build()
    prunus.apply(prunus.plan(prunus.trace(model, torch.ones(1, 2)), model, ratio=0.5), model)
    prunus.save(model, tmp_path / "m.st")
    assert len(prunus.load(tmp_path / "m.st", build=build)) == 700


MEMORY = """
import resource, sys
import torch
from torch import nn
import prunus
from prunus.checkpoint.model_file import read_file

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

prunus.save(nn.Linear(3, 3), "warm.st")
prunus.load("warm.st", build=lambda: nn.Linear(3, 3))
for name in sys.argv[1:]:
    size = __import__("os").path.getsize(name)
    before = peak()
    try:
        prunus.load(name, build=lambda: nn.Linear(4096, 4096, bias=False))
        told = "loaded"
    except prunus.PrunusError as error:
        told = type(error).__name__
    print(name, told, size, peak() - before)
"""


def test_nothing_allocates_more_than_twice_the_file(tmp_path) -> None:
    bombs = {
        "deep.st": b'{"a":' + b"[" * 3_000_000,
        "wide.st": b'{"a":[' + b"{}," * 3_000_000 + b"{}]}",
        "names.st": b"{" + b",".join(b'"%d":0' % n for n in range(1_000_000)) + b"}",
    }
    for name, header in bombs.items():
        (tmp_path / name).write_bytes(len(header).to_bytes(8, "little") + header)
    huge = json.dumps(
        {
            "prunus_plan": 1,
            "keep": {"weight[0]": [[0, 10**12]]},
            "shapes": {"weight": [10**12, 1]},
            **{"edits": [], "scalings": [], "groups": [], "costs": {}, "origin": {}},
        }
    )
    prunus.save(nn.Linear(64, 64, bias=False), tmp_path / "range.st")
    data = (tmp_path / "range.st").read_bytes()
    changed = rewrite(data, lambda d: d["__metadata__"].update(plan=huge))
    (tmp_path / "range.st").write_bytes(changed)
    prunus.save(nn.Linear(4096, 4096, bias=False), tmp_path / "whole.st")

    result = subprocess.run(
        [sys.executable, "-c", MEMORY, *bombs, "range.st", "whole.st"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    assert [row[:2] for row in rows] == [
        ["deep.st", "FormatError"],
        ["wide.st", "FormatError"],
        ["names.st", "FormatError"],
        ["range.st", "PlanError"],
        ["whole.st", "loaded"],
    ]
    for name, _, size, grown in rows:
        assert int(grown) <= 2 * int(size) + (16 << 20), (name, size, grown)


def test_the_old_file_survives_a_failure_and_keeps_its_permissions(tmp_path, monkeypatch) -> None:
    path = tmp_path / "m.st"
    path.write_text("old")
    path.chmod(0o640)
    (tmp_path / "link.st").symlink_to(path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match=r"No space left(.|\n)*make room on the disk"):
        prunus.save(nn.Linear(2, 2), path)
    assert path.read_text() == "old"
    monkeypatch.undo()
    prunus.save(nn.Linear(2, 2), tmp_path / "link.st")
    assert (tmp_path / "link.st").is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    prunus.load(path, build=lambda: nn.Linear(2, 2))
    assert sorted(os.listdir(tmp_path)) == ["link.st", "m.st"]
    with pytest.raises(FileError, match="Is a directory"):
        files.replace_file(tmp_path, lambda draft: draft.write_text("x"))


def test_what_is_no_regular_file_is_not_replaced(tmp_path) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "socket"))
    server.close()
    for path in (pipe, link, tmp_path / "socket"):
        with pytest.raises(FileError, match=f"{path.name} is no regular file"):
            prunus.save(nn.Linear(2, 2), path)
        with pytest.raises(FileError, match="is no regular file"):
            files.replace_file(path, lambda draft: draft.write_text("x"))
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe", "socket"]


def test_models_are_not_kept_alive() -> None:
    from prunus.surgeon import snapshot as applied

    model, _ = small()
    count = len(applied._APPLIED)
    assert model in applied._APPLIED
    del model
    gc.collect()
    assert len(applied._APPLIED) < count


def test_every_type_of_safetensors_comes_back(tmp_path) -> None:
    def build() -> nn.Module:
        model = nn.Module()
        for name, dtype in container._DTYPES.items():
            values = torch.arange(6).reshape(2, 3) % 2
            model.register_buffer(name.lower(), values.to(dtype))
        return model

    prunus.save(build(), tmp_path / "m.st")
    other = prunus.load(tmp_path / "m.st", build=build)
    for name, buffer in build().named_buffers():
        found = other.get_buffer(name)
        assert found.dtype == buffer.dtype
        assert found.contiguous().view(torch.uint8).equal(buffer.contiguous().view(torch.uint8))
