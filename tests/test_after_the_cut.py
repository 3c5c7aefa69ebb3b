"""What is done with a pruned model later: other forwards of its modules, folding, export."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunus
from prunus.graph.plan_records import Edit
from prunus.surgeon.reach import read_attribute
from prunus.verifier.other_ways import ways_of

X = torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(0))


def randomise(model: nn.Module) -> Any:
    """Statistics that matter, as in a trained model."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    return model.eval()


def off(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max())


class Halves(nn.Module):
    """Two halves of one convolution; the hidden width of the other layers is the same number."""

    def __init__(self, inner: int = 8) -> None:
        super().__init__()
        self.c = 8
        self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 6, 1)
        self.m = nn.Sequential(nn.Conv2d(8, inner, 3, padding=1), nn.Conv2d(inner, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(x).chunk(2, 1)
        return self.b(torch.cat([left, self.m(right)], 1))

    def forward_split(self, x: Tensor) -> Tensor:
        left, right = self.a(x).split((self.c, self.c), 1)
        return self.b(torch.cat([left, self.m(right)], 1))

    def _make_fused(self) -> nn.Module:
        return nn.Identity()

    def forward_fuse(self, x: Tensor) -> Tensor:
        """Something else, in the whole model too."""
        return self.a(x)[:, : self.c]


def cut(model: nn.Module, x: Tensor, **options: Any) -> prunus.Plan:
    plan = prunus.plan(prunus.trace(model, x), model, **(options or {"ratio": 0.4}))
    prunus.apply(plan, model)
    return plan


@pytest.mark.parametrize("inside", [False, True])
def test_another_forward_of_the_class_follows(inside: bool) -> None:
    model: Any = nn.Sequential(Halves(), nn.ReLU()) if inside else Halves()
    # Two groups had 8 units, and lose other numbers of them: only a run tells which one c counts.
    plan = cut(model.eval(), X, ratios={"*m.0.weight[0]": 0.5, "*a.weight[0]": 0.25})
    block = model[0] if inside else model
    assert block.m[0].out_channels == 4
    assert block.c == 6
    assert Edit("0" if inside else "", "c", 8, 6) in plan.edits
    with torch.no_grad():
        assert off(block(X), block.forward_split(X)) < 1e-6
    assert ways_of(block) == ["forward_fuse", "forward_split"]  # _make_fused builds a part


def test_an_integer_that_no_way_reads_is_reported_and_kept() -> None:
    model = Halves(inner=12).eval()
    model.hidden, model.kernel = 12, 5
    graph = prunus.trace(model, X)
    plan = prunus.plan(graph, model, ratio=0.5)
    assert plan.origin["stale"] == ("hidden is 12; widths of 12 in that module became 6",)
    certificate = prunus.verify(plan, model, X)
    assert (certificate.verdict, certificate.stale) == ("exact", tuple(plan.origin["stale"]))
    assert certificate.to_json()["stale"] == certificate.stale
    prunus.apply(plan, model)
    assert (model.hidden, model.kernel) == (12, 5)


def test_a_wrong_edit_is_named_though_no_traced_forward_reads_it() -> None:
    model = Halves().eval()
    plan = prunus.plan(prunus.trace(model, X), model, ratio=0.5)
    right = prunus.verify(plan, model, X)
    assert (right.verdict, right.stale) == ("exact", ())
    edits = [replace(e, after=3) if e.attribute == "c" else e for e in plan.edits]
    wrong = prunus.verify(replace(plan, edits=tuple(edits)), model, X)
    assert wrong.stale == ("forward_split does not compute what the forward does",)


class Branches(nn.Module):
    """A depthwise convolution and an identity, which fold into one convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = self.groups = dim
        self.sizes = (dim, 3)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.norm, self.folded = nn.BatchNorm2d(dim), None

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + x if self.folded is None else self.folded(x)

    def _fold(self) -> nn.Conv2d:
        made = nn.Conv2d(self.dim, self.dim, 3, padding=1, groups=self.groups)
        scale = self.norm.weight / (self.norm.running_var + self.norm.eps).sqrt()
        weight = self.conv.weight * scale[:, None, None, None]
        for channel in range(self.sizes[0]):
            weight[channel, channel % (self.dim // self.groups), 1, 1] += 1
        made.weight.data = weight
        made.bias.data = self.norm.bias - self.norm.running_mean * scale
        return made


class InPlace(Branches):
    def switch_to_deploy(self) -> None:
        self.folded = self._fold()


class Returned(Branches):
    def fuse(self) -> nn.Module:
        return self._fold()


@pytest.mark.parametrize("kind", [InPlace, Returned])
def test_folding_follows(kind: Any) -> None:
    layers = [nn.Conv2d(3, 12, 1), kind(12), nn.Conv2d(12, 4, 1)]
    model = randomise(nn.Sequential(*layers))
    plan = cut(model, X, ratio=0.5)
    assert {e.attribute for e in plan.edits if e.module == "1"} == {"dim", "groups", "sizes[0]"}
    assert model[1].sizes == (6, 3)
    with torch.no_grad():
        before = model(X)
        if kind is InPlace:
            model[1].switch_to_deploy()
        else:
            model[1] = model[1].fuse()
        assert off(before, model(X)) < 1e-5


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0", "fastvit_t8"])
def test_timm_models_fold_after_the_cut(name: str) -> None:
    timm = pytest.importorskip("timm")
    from timm.utils.model import reparameterize_model

    torch.manual_seed(0)
    model = randomise(timm.create_model(name, num_classes=10))
    x = torch.randn(1, 3, 64, 64)
    cut(model, x, ratio=0.5)
    with torch.no_grad():
        assert off(model(x), reparameterize_model(model).eval()(x)) < 1e-5


def test_counts_of_heads_follow() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=6,
        intermediate_size=32,
        vocab_size=40,
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    model.encoder.layer[0].attention.self.layer_idx = 6  # as many as heads, and something else
    ids = torch.randint(1, 40, (2, 6))
    done = prunus.prune_heads(model, {0: [1], 1: [0, 2, 5]}, ids)
    attention = [layer.attention.self for layer in model.encoder.layer]
    assert [a.num_attention_heads for a in attention] == [5, 3]
    assert [a.all_head_size for a in attention] == [20, 12]
    assert attention[0].layer_idx == 6
    assert done.certificate.verdict == "exact"


def test_width_and_count_of_heads_follow_when_both_are_cut() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=32,
        vocab_size=40,
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    cut(model, torch.randint(1, 40, (2, 6)), ratio=0.5)
    attention = model.encoder.layer[0].attention.self
    made = (attention.num_attention_heads, attention.attention_head_size, attention.all_head_size)
    assert made == (2, 3, 6)
    assert attention.query.out_features == 6


@pytest.mark.filterwarnings("ignore")
def test_a_pruned_yolo_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ultralytics = pytest.importorskip("ultralytics")
    runtime = pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    yolo = ultralytics.YOLO("yolov8n.yaml", verbose=False)
    model = randomise(yolo.model)
    x = torch.rand(1, 3, 64, 64)
    plan = cut(model, x, ratio=0.3)
    assert sum(edit.attribute == "c" for edit in plan.edits) == 8
    with torch.no_grad():
        wanted = copy.deepcopy(model)(x)[0]
    model.pt_path = str(tmp_path / "small.pt")
    scripted = torch.jit.load(yolo.export(format="torchscript", imgsz=64, verbose=False))(x)
    assert off(wanted, scripted[0] if isinstance(scripted, tuple) else scripted) < 1e-5
    session = runtime.InferenceSession(yolo.export(format="onnx", imgsz=64, verbose=False))
    (name,) = (one.name for one in session.get_inputs())
    assert off(wanted, torch.from_numpy(session.run(None, {name: x.numpy()})[0])) < 1e-5


def test_on_the_meta_device_nothing_is_tried() -> None:
    with torch.device("meta"):
        model, x = Halves(inner=12).eval(), torch.empty(2, 3, 10, 10)
    plan = prunus.plan(prunus.trace(model, x), model, ratio=0.5, importance="random")
    assert "c" not in {edit.attribute for edit in plan.edits}
    assert read_attribute(model, "c") == 8
    assert plan.origin["stale"] == ("c is 8; widths of 8 in that module became 4",)
