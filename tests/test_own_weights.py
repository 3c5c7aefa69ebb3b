"""What is verified is what users run: their weights, their settings; and what no forward shows."""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunus
from prunus.graph.plans import Plan
from prunus.surgeon import apply
from tests.faults import conv
from tests.pipeline import plan_for, thin

surgeon = importlib.import_module("prunus.surgeon.apply")


# --- own weights ----------------------------------------------------------------------------


class ZeroBranch(nn.Module):
    """A branch that zero-initialised parameters switch off; behind it numpy reads a width."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 12), nn.Linear(12, 3)
        self.c, self.d = nn.Linear(4, 10), nn.Linear(10, 3)
        self.mix = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        other: Tensor = self.d(self.c(x).relu())
        if not self.mix.any():
            return other + self.b(h / np.sqrt(operator.index(h.shape[1])))
        return other + self.b(h / np.sqrt(12)) * (1 + self.mix)


class Gated(nn.Module):
    """The value of a scale decides on the path."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 12), nn.Linear(12, 3)
        self.c, self.d = nn.Linear(4, 10), nn.Linear(10, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        width = 12.0 if self.scale.std() > 0 else operator.index(h.shape[1])
        out: Tensor = self.b(h / width) + self.d(self.c(x).relu()) * self.scale
        return out


@pytest.mark.parametrize("build", [ZeroBranch, Gated])
def test_a_path_that_only_the_own_weights_take_is_verified(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(5, 4)
    small = prunus.shrink(model, x, ratios={"[ac].*": 0.4}, recover="none")
    assert small.certificate is not None
    assert small.certificate.verdict == "exact"
    assert [name for name in small.held if name.startswith("a.")]
    assert small.model.get_submodule("a").weight.shape[0] == 12
    assert small.model.get_submodule("c").weight.shape[0] < 10


def test_own_weights_that_move_nothing_are_no_verification() -> None:
    """Zeros agree with zeros; so randomised weights are compared as well."""
    model = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    x = torch.randn(5, 4)
    plan = plan_for(graph := prunus.trace(model, x), model, thin(graph))
    assert prunus.verify(plan, model, x, randomise=False).verdict == "not verified"
    found = prunus.verify(plan, model, x)
    assert found.verdict == "exact"
    assert found.moved > 0.01
    assert [line.rpartition(", ")[2] for line in found.inputs[:2]] == [
        "own weights",
        "randomised weights",
    ]
    assert "given inputs (5×4)" in found.inputs[0]
    assert "random inputs" in prunus.verify(plan, model).inputs[0]


# --- settings -------------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 20, batch_first=True, **options)
        self.enc, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(16, 3)

    def forward(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
        out: Tensor = self.head(self.enc(x, src_key_padding_mask=pad).mean(1))
        return out


PAD = torch.tensor([[0, 0, 0, 0, 1, 1]] * 2).bool()


def zeroed(model: nn.Module, plan: Plan) -> nn.Module:
    with torch.no_grad():
        for axis, stay in plan.keep.items():
            gone = sorted(set(range(plan.shapes[axis.tensor][axis.dim])) - set(stay))
            model.get_parameter(axis.tensor).index_fill_(axis.dim, torch.tensor(gone), 0)
    return model


def test_the_fast_path_with_a_padding_mask_is_what_is_verified() -> None:
    torch.manual_seed(0)
    model, x = Encoder().eval(), torch.randn(2, 6, 16)
    dense = Encoder().eval()
    dense.load_state_dict(model.state_dict())
    small = prunus.shrink(model, (x, PAD), ratio=0.3, recover="none")
    assert small.certificate is not None
    assert small.certificate.verdict == "exact"
    assert torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        a, b = zeroed(dense, small.plan)(x, PAD), small.model(x, PAD)
    assert (a - b).abs().max() <= 1e-4 * a.abs().max()
    assert any("fast path" in why and "set_fastpath_enabled" in why for why in small.held.values())


@pytest.mark.parametrize("fast", [True, False])
def test_where_the_fast_path_changes_nothing_everything_is_pruned(fast: bool) -> None:
    torch.manual_seed(0)
    model, x = Encoder().eval(), torch.randn(2, 6, 16)
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        inputs = (x,) if fast else (x, PAD)  # the mask matters on the fast path only
        plan = plan_for(graph := prunus.trace(model, inputs), model, thin(graph))
        assert prunus.verify(plan, model, inputs).verdict == "exact"
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


# --- whom to blame --------------------------------------------------------------------------


class Lengths(nn.Module):
    """Frames beyond each length are cut off, as in speech models; no length may be zero."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        if int(lengths.min()) < 1 or int(lengths.max()) > x.shape[1]:
            raise ValueError("lengths have to lie between 1 and the number of frames")
        seen = torch.arange(x.shape[1])[None] < lengths[:, None]
        out: Tensor = self.down((self.up(x).relu() * seen[..., None]).sum(1) / lengths[:, None])
        return out


def test_lengths_keep_their_values_in_verify_and_apply() -> None:
    model, inputs = Lengths().eval(), (torch.randn(2, 7, 4), torch.tensor([7, 3]))
    plan = prunus.plan(prunus.trace(model, inputs), model, ratio=0.4)
    assert prunus.verify(plan, model).verdict == "exact"
    prunus.apply(plan, model)
    assert model.up.weight.shape[0] < 12


def test_the_cut_is_not_blamed_where_the_model_itself_does_not_run() -> None:
    model, inputs = Lengths().eval(), (torch.randn(2, 7, 4), torch.tensor([7, 3]))
    plan = prunus.plan(prunus.trace(model, inputs), model, ratio=0.4)
    with pytest.raises(prunus.PrunusError, match="the model itself does not run") as caught:
        prunus.verify(plan, model, (torch.randn(2, 7, 4), torch.tensor([7, 0])))
    assert "test_own_weights.py" in caught.value.where
    assert "lengths have to lie" in caught.value.why


def test_a_kernel_that_fails_in_the_replay_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(5, 4)
    plan = prunus.plan(prunus.trace(model, x), model, ratio=0.4)
    replay = importlib.import_module("prunus.verifier.replay")
    right = replay.call_bound

    def faulty(target: Any, bound: Any) -> Any:
        if "relu" in str(target):
            raise RuntimeError("no such kernel")
        return right(target, bound)

    monkeypatch.setattr(replay, "call_bound", faulty)
    with pytest.raises(prunus.PrunusError, match="relu") as caught:
        prunus.verify(plan, model, x)
    assert caught.value.where.startswith("1 ")
    assert "no such kernel" in caught.value.why


# --- what no input shows --------------------------------------------------------------------


class Tokens(nn.Module):
    """Embeddings, one attention, and what eval mode does not read."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(30, width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.norm, self.down = nn.Linear(width, 24), nn.BatchNorm1d(24), nn.Linear(24, 5)
        self.drop = nn.Dropout(0.3)
        self.up.weight.requires_grad_(False)
        self.up.register_forward_hook(lambda *_: None)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        b, n, _ = x.shape
        q, k, v = (
            f(x).view(b, n, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        out: Tensor = self.down(self.drop(self.norm(self.up(x.mean(1)).relu())))
        return out


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(3, 8), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x).relu()).mean((2, 3))
        return out


IDS = torch.tensor([[1, 5, 9, 2], [3, 1, 4, 1]])


def _rows(model: Any) -> None:
    unseen = [row for row in range(30) if row not in IDS]
    model.embed.weight.data[unseen] = model.embed.weight.data[unseen].flip(1)


def _one_row(model: Any) -> None:
    model.embed.weight.data[29] += 1


def _dropout(model: Any) -> None:
    model.drop.p = 0.0


def _momentum(model: Any) -> None:
    model.norm.momentum = 0.2


def _epsilon_lost(model: Any) -> None:
    model.norm.eps = 1e-3


def _statistics(model: Any) -> None:
    model.norm.num_batches_tracked += 1


def _requires_grad(model: Any) -> None:
    model.up.weight.requires_grad_(True)


def _hooks(model: Any) -> None:
    model.up._forward_hooks.clear()


def _training(model: Any) -> None:
    model.drop.train()


def _double(model: Any) -> None:
    model.norm.num_batches_tracked = model.norm.num_batches_tracked.int()


def _attribute(model: Any) -> None:
    del model.norm.affine


def _buffer(model: Any) -> None:
    model.norm.register_buffer("extra", torch.zeros(1))


def _class(model: Any) -> None:
    model.drop = nn.Identity()


@pytest.mark.parametrize(
    "damage",
    [_rows, _one_row, _dropout, _momentum, _epsilon_lost, _statistics, _requires_grad, _hooks,
     _training, _double, _attribute, _buffer, _class],
)  # fmt: skip
def test_what_the_surgeon_damages_is_named(
    damage: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = Tokens().eval()
    plan = prunus.plan(prunus.trace(model, IDS), model, ratio=0.4)
    assert prunus.verify(plan, model, IDS).verdict == "exact"

    def wrong(plan: Plan, model: Any) -> Any:
        apply(plan, model, check=False)
        damage(model)
        return model

    monkeypatch.setattr("prunus.verifier.case.cut_own", wrong)
    found = prunus.verify(plan, model, IDS)
    assert found.verdict == "inexact"
    assert any(name in found.reason for name in ("embed", "drop", "norm", "up", "down")), found


class Shared(nn.Module):
    """Two blocks run the very same layers, each under a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.position = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU())
        self.blocks = nn.ModuleList(nn.ModuleDict({"position": self.position}) for _ in range(2))
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block["position"](x)
        found: Tensor = self.head(x)
        return found


def test_a_module_under_several_names_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Shared().eval(), torch.randn(2, 3, 6, 6)
    plan = prunus.plan(prunus.trace(model, x), model, ratio=0.5)
    certificate = prunus.verify(plan, model, x)
    assert certificate.verdict == "exact", certificate.reason

    def apart(plan: Plan, model: Any) -> Any:
        apply(plan, model, check=False)
        model.blocks[1]["position"] = nn.Sequential(*model.position)
        return model

    monkeypatch.setattr("prunus.verifier.case.cut_own", apart)
    found = prunus.verify(plan, model, x)
    assert found.verdict == "inexact"
    assert "blocks.1.position" in found.reason


@pytest.mark.parametrize("order", ["flip", "channels_last"])
def test_a_kernel_is_compared_where_a_small_image_does_not_show_it(
    order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, x = Image().eval(), torch.randn(4, 3, 1, 1)
    plan = prunus.plan(prunus.trace(model, x), model, ratio=0.4)
    assert prunus.verify(plan, model, x).verdict == "exact"
    right = surgeon.slice_tensor

    def wrong(tensor: Tensor, keep: Any) -> Tensor:
        sliced: Tensor = right(tensor, keep)
        if sliced.dim() != 4:
            return sliced
        if order == "flip":
            return sliced.flip(2, 3)
        return sliced.contiguous(memory_format=torch.channels_last)

    monkeypatch.setattr(surgeon, "slice_tensor", wrong)
    found = prunus.verify(plan, model, x)
    assert found.verdict == "inexact"
    assert "first.weight" in found.reason


def test_a_scale_that_moved_shows_at_length_one_as_a_group_that_is_not_verified() -> None:
    torch.manual_seed(0)
    model, ids = Tokens().eval(), IDS[:, :1]
    plan = prunus.plan(prunus.trace(model, ids), model, ratio=0.4)
    assert plan.scalings
    found = prunus.verify(replace(plan, scalings=()), model, ids)
    assert found.verdict != "exact" or any(name.startswith("q.") for name in found.unverified)
    assert prunus.verify(replace(plan, scalings=()), model, IDS).verdict == "inexact"


# --- gradients instead of removals ----------------------------------------------------------


def deep(width: int = 12, depth: int = 8) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(4, width)]
    for _ in range(depth):
        layers += [nn.ReLU(), nn.Linear(width, width)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.Linear(width, 3)).eval()
    for layer in model[::2]:
        nn.init.kaiming_normal_(layer.weight)
    return model


def test_gradients_agree_with_removing_groups_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    effect = importlib.import_module("prunus.verifier.case")
    model, x = deep(), torch.randn(64, 4)
    plan = plan_for(graph := prunus.trace(model, x), model, thin(graph))
    by_gradient = prunus.verify(plan, model, x)
    monkeypatch.setattr(effect, "FEW", 100)
    alone = prunus.verify(plan, model, x)
    assert by_gradient.verdict == alone.verdict == "exact"
    assert by_gradient.unverified == alone.unverified == ()
    assert any(by_gradient.moved_alone[n] != by for n, by in alone.moved_alone.items())
    for name, by in alone.moved_alone.items():
        assert 1e-3 < by_gradient.moved_alone[name] < 30 * by


def test_units_whose_gradients_cancel_are_removed_alone() -> None:
    """Two units that undo each other: each moves the output, both together don't."""
    torch.manual_seed(0)
    model, x = deep(), torch.randn(64, 4)
    with torch.no_grad():
        for tensor in (model[6].weight, model[6].bias):
            tensor[1] = tensor[0]
        model[8].weight[:, 1] = -model[8].weight[:, 0]
    graph = prunus.trace(model, x)
    kept = thin(graph)
    (group,) = (g for g in graph.groups if g.name.startswith("6.weight"))
    kept[group.units] = True
    kept[group.units[:2]] = False
    found = prunus.verify(plan_for(graph, model, kept), model, x)
    assert found.unverified == (group.name,)
