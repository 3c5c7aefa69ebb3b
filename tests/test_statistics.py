"""Statistics of calibration data against brute force: gates, hooks and autograd by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import prunus
from prunus.calibration.batches import check_traced
from prunus.calibration.sites import Site
from prunus.errors import DataError, ModelError, PlanError
from prunus.graph.axis import Role
from prunus.graph.program import state_of
from prunus.importance import Context, score
from prunus.importance.magnitude import sum_by_unit

VOCABULARY = 50
CLOSE: Any = {"rtol": 1e-9, "atol": 1e-12}


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 4)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        h = F.gelu(self.first(x))
        h = h if gate is None else h * gate
        return self.last(torch.tanh(self.second(h)))


class Conv(nn.Module):
    """Batch norm, a grouped, a depthwise and a transposed convolution, a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 6, 3, groups=2)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.up = nn.ConvTranspose2d(6, 4, 2)
        self.head = nn.Linear(4 * 7 * 7, 3)
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.grouped(F.relu(self.norm(self.a(x)))))
        return self.head(F.gelu(self.up(self.depthwise(x))).flatten(1))


def bert(attention: str = "sdpa") -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=16,
        attn_implementation=attention,
    )
    return loud(BertForSequenceClassification(config))


def llama(attention: str = "sdpa") -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        attn_implementation=attention,
    )
    return loud(LlamaForCausalLM(config))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
    )
    return loud(GPT2LMHeadModel(config))


def loud(model: nn.Module) -> nn.Module:
    """In float64, with weights large enough that attention is not uniform."""
    for weight in model.parameters():
        if weight.dim() == 2:
            nn.init.normal_(weight, std=0.3)
    return model.double().eval()


def tokens(count: int = 4, length: int = 6) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(1, VOCABULARY, (count, length))}


def image(count: int = 4) -> Tensor:
    return torch.randn(count, 2, 8, 8, dtype=torch.float64)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "mlp": (lambda: Mlp().double(), lambda: torch.randn(4, 5, dtype=torch.float64)),
    "conv": (lambda: Conv().double(), image),
    "bert": (bert, tokens),
    "llama": (llama, tokens),
    "gpt2": (gpt2, tokens),
}


def build(name: str) -> tuple[nn.Module, Any, prunus.CouplingGraph]:
    make, inputs = CASES[name]
    model, batch = make().eval(), inputs()
    given = ((), batch) if isinstance(batch, dict) else (batch, None)
    return model, batch, prunus.trace(model, *given)


def cut(batch: Any, parts: slice) -> Any:
    return {k: v[parts] for k, v in batch.items()} if isinstance(batch, dict) else batch[parts]


def run(model: nn.Module, batch: Any) -> Tensor:
    out = model(**batch) if isinstance(batch, dict) else model(batch)
    return out if isinstance(out, Tensor) else out.logits


def own_loss(out: Tensor) -> Tensor:
    """Cross-entropy towards the model's own answer."""
    rows = out.flatten(0, -2)
    return -rows.log_softmax(-1).gather(1, rows.detach().argmax(-1)[:, None]).mean()


def by_hand(
    graph: prunus.CouplingGraph, values: dict[str, Tensor], role: Role | None = None
) -> np.ndarray:
    """Sums over everything that a unit owns, position by position."""
    found = np.zeros(graph.unit_count + 1)
    for axis, label in graph.labels.items():
        if axis.tensor in values and role in (None, graph.roles[axis]):
            for position, units in enumerate(label):
                part = values[axis.tensor].select(axis.dim, position).sum().item()
                for unit in set(units.tolist()) - {0}:
                    found[unit] += part
    return found


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_autograd_by_hand(name: str) -> None:
    model, batch, graph = build(name)
    weights = {n: w for n, w in state_of(model)[0].items() if n in graph.parameters}
    wanted = {n: np.zeros(graph.unit_count + 1) for n in ("signed", "squared", "fisher")}
    for index in range(4):
        model.zero_grad()
        own_loss(run(model, cut(batch, slice(index, index + 1)))).backward()
        products = {n: w.detach() * w.grad for n, w in weights.items() if w.grad is not None}
        owned = by_hand(graph, products)
        wanted["signed"] += owned
        wanted["squared"] += owned**2
        wanted["fisher"] += by_hand(graph, {n: p**2 for n, p in products.items()})
    found = prunus.importance.collect(model, graph, [batch], "gradient")
    assert found.samples == 4
    np.testing.assert_allclose(found.units["gradient"], wanted["signed"], **CLOSE)
    np.testing.assert_allclose(found.units["gradient_squared"], wanted["squared"], **CLOSE)
    np.testing.assert_allclose(found.units["fisher"], wanted["fisher"], **CLOSE)
    tensors = state_of(model)[0]
    for criterion, sums in (("taylor", "squared"), ("fisher", "fisher")):
        scores = score(graph, tensors, criterion, statistics=found)[1:]
        np.testing.assert_allclose(scores, wanted[sums][1:] / 4, **CLOSE)


# Per criterion's case: the consumers of a group, the shape of a gate on them, by hand.
GATED = {
    "mlp": ("first.weight[0]", ["second"], lambda g: g),
    "conv": ("up.weight[1]", ["head"], lambda g: g.repeat_interleave(49)),
    "bert": (
        "bert.encoder.layer.1.attention.self.query.weight[0]",
        ["bert.encoder.layer.1.attention.output.dense"],
        lambda g: g.repeat_interleave(8),
    ),
    "llama": (
        "model.layers.0.self_attn.q_proj.weight[0]",
        ["model.layers.0.self_attn.o_proj"],
        lambda g: g.repeat_interleave(16),
    ),
    "gpt2": (
        "transformer.h.0.attn.c_attn.weight[1]",
        ["transformer.h.0.attn.c_proj"],
        lambda g: g.repeat_interleave(8),
    ),
}


@pytest.mark.parametrize("name", GATED)
def test_head_gradient_is_that_of_a_gate(name: str) -> None:
    model, batch, graph = build(name)
    group = graph.group(GATED[name][0])
    _, readers, spread = GATED[name]
    gate = torch.ones(group.size, dtype=torch.float64, requires_grad=True)
    wanted = np.zeros(group.size)
    hooks = [
        model.get_submodule(reader).register_forward_pre_hook(
            lambda _, args: (args[0] * spread(gate), *args[1:])
        )
        for reader in readers
    ]
    for index in range(4):
        loss = own_loss(run(model, cut(batch, slice(index, index + 1))))
        wanted += torch.autograd.grad(loss, gate)[0].abs().numpy()
    for hook in hooks:
        hook.remove()
    found = prunus.importance.collect(model, graph, [batch], "head_gradient")
    scores = score(graph, state_of(model)[0], "head_gradient", statistics=found)
    assert wanted.min() > 0
    np.testing.assert_allclose(scores[group.units], wanted / 4, **CLOSE)


def test_a_gate_on_units_that_no_weights_read_lies_where_they_are_made() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return (self.q(x) @ self.k(x).transpose(-2, -1)).sum(1)

    model = Products().double()
    x = torch.randn(2, 3, 3, dtype=torch.float64)
    graph = prunus.trace(model, x)
    (group,) = graph.groups
    assert {role for _, role in group.axes} == {Role.PRODUCER}
    wanted = np.zeros(4)
    for one in x:
        gate = torch.ones(4, dtype=torch.float64, requires_grad=True)
        out = ((model.q(one) * gate) @ (model.k(one) * gate).T).sum(0)[None]
        wanted += torch.autograd.grad(own_loss(out), gate)[0].abs().numpy()
    found = prunus.importance.collect(model, graph, [x], "head_gradient")
    np.testing.assert_allclose(found.units["head_gradient"][group.units], wanted, **CLOSE)


# Modules that read units, with the dim of their weight that does; and how their input is laid out.
READERS: dict[str, dict[str, int]] = {
    "mlp": {"second": 1, "last": 1},
    "conv": {"grouped": 1, "up": 0, "head": 1},
    "bert": {
        f"bert.encoder.layer.{i}.{name}": 1
        for i in range(2)
        for name in (
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
            "intermediate.dense",
            "output.dense",
        )
    }
    | {"bert.pooler.dense": 1, "classifier": 1},
    "llama": {
        f"model.layers.{i}.{name}": 1
        for i in range(2)
        for name in (
            *(f"self_attn.{n}_proj" for n in "qkvo"),
            *(f"mlp.{n}_proj" for n in ("gate", "up", "down")),
        )
    }
    | {"lm_head": 1},
    "gpt2": {
        f"transformer.h.{i}.{name}": 0
        for i in range(2)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    | {"lm_head": 1},
}


def read_by_hand(model: nn.Module, batch: Any, readers: dict[str, int]) -> dict[str, Tensor]:
    """Inputs of modules as (vectors, positions)."""
    seen: dict[str, list[Tensor]] = {name: [] for name in readers}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].movedim(1, -1) if args[0].dim() == 4 else args[0]
            seen[name].append(rows.reshape(-1, rows.shape[-1]))

        return hook

    hooks = [model.get_submodule(n).register_forward_pre_hook(keep(n)) for n in readers]
    with torch.no_grad():
        run(model, batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}


def weight_by_hand(module: nn.Module, dim: int) -> Tensor:
    """Squares of the weights that read each channel of a module's input."""
    squares = module.weight.detach() ** 2
    if getattr(module, "groups", 1) > 1:
        rows = squares.sum((2, 3)).chunk(module.groups)
        return torch.cat([block.sum(0) for block in rows])
    others = [d for d in range(squares.dim()) if d != dim]
    return squares.sum(others)


@pytest.mark.parametrize("name", READERS)
def test_activations_equal_hooks_by_hand(name: str) -> None:
    model, batch, graph = build(name)
    inputs = read_by_hand(model, batch, READERS[name])
    found = prunus.importance.collect(model, graph, [batch], "activation")
    state, aliases = state_of(model)
    sites = {site.tensor: site for site in found.sites}
    weights = {aliases.get(f"{n}.weight", f"{n}.weight"): n for n in READERS[name]}
    assert sorted(sites) == sorted(weights)
    raw: dict[str, np.ndarray] = {}
    for criterion in ("activation", "wanda", "flap"):
        raw[criterion] = np.zeros(graph.unit_count + 1)
    for tensor, reader in weights.items():
        rows, site = inputs[reader], sites[tensor]
        squares = weight_by_hand(model.get_submodule(reader), READERS[name][reader])
        assert site.count == len(rows)
        np.testing.assert_allclose(site.total, rows.sum(0), **CLOSE)
        np.testing.assert_allclose(site.square, (rows**2).sum(0), **CLOSE)
        np.testing.assert_allclose(site.variance, rows.var(0, correction=0), rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(site.weight, squares, **CLOSE)
        values = {
            "activation": (rows**2).mean(0),
            "wanda": squares.sqrt() * (rows**2).mean(0).sqrt(),
            "flap": squares * rows.var(0, correction=0),
        }
        for group in graph.groups:
            for criterion, value in values.items():
                raw[criterion][group.units] += sum_by_unit(group, site.label, value.numpy())
    raw["activation"] = np.sqrt(raw["activation"])
    for criterion in ("activation", "wanda"):
        scores = score(graph, state, criterion, statistics=found)[1:]
        np.testing.assert_allclose(scores, raw[criterion][1:], rtol=1e-9)
    scores = score(graph, state, "flap", statistics=found)
    assert scores.min() == 0
    shifts = []
    for group in graph.groups:
        own = raw["flap"][group.units]
        shift = scores[group.units] - (own - own.mean()) / own.std()
        shifts += shift.tolist()
    np.testing.assert_allclose(shifts, shifts[0], atol=1e-6)


def test_weights_that_are_computed_are_found_by_their_module() -> None:
    norm = torch.nn.utils.parametrizations.weight_norm
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), norm(nn.Linear(4, 2))).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    graph = prunus.trace(model, x)
    (site,) = prunus.importance.collect(model, graph, [x, x], "activation").sites
    read = model[:2](x).detach()
    assert (site.tensor, site.count) == ("", 10)
    np.testing.assert_allclose(site.square, 2 * (read**2).sum(0), **CLOSE)
    np.testing.assert_allclose(site.weight, (model[2].weight.detach() ** 2).sum(0), **CLOSE)


def test_recurrent_and_shared_modules_are_summed_over_their_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h, _ = self.rnn(x)
            return self.head(h[:, 0]) + self.head(h[:, -1])

    model = Twice().double()
    x = torch.randn(5, 6, 3, dtype=torch.float64)
    graph = prunus.trace(model, x)
    found = prunus.importance.collect(model, graph, [x], "activation")
    sites = {site.tensor: site for site in found.sites}
    h = model.rnn(x)[0].detach()
    read = torch.cat([h[:, 0], h[:, -1]])
    np.testing.assert_allclose(sites["head.weight"].square, (read**2).sum(0), **CLOSE)
    before = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1)
    recurrent = sites["rnn.weight_hh_l0"]
    np.testing.assert_allclose(recurrent.square, (before**2).sum((0, 1)), **CLOSE)
    squares = (model.rnn.weight_hh_l0.detach() ** 2).sum(0)
    np.testing.assert_allclose(recurrent.weight, squares, **CLOSE)
    assert recurrent.count == 30


def test_experts_are_read_through_one_tensor_of_weights() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 4, 6))
            self.down = nn.Parameter(torch.randn(3, 6, 4))

        def forward(self, x: Tensor) -> Tensor:
            inner = torch.relu(torch.einsum("btd,edf->ebtf", x, self.up))
            return sum(inner[e] @ self.down[e] for e in range(3))

    model = Experts().double()
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    graph = prunus.trace(model, x)
    (site,) = prunus.importance.collect(model, graph, [x], "activation").sites
    inner = torch.einsum("btd,edf->ebtf", x, model.up).relu().detach()
    assert (site.tensor, site.count) == ("down", 30)
    np.testing.assert_allclose(site.square, (inner**2).sum((0, 1, 2)), **CLOSE)
    np.testing.assert_allclose(site.weight, (model.down.detach() ** 2).sum((0, 2)), **CLOSE)


@pytest.mark.parametrize("name", CASES)
def test_results_do_not_hang_on_the_batch_size_or_length_traced(name: str) -> None:
    model, batch, graph = build(name)
    small = cut(batch, slice(0, 1))
    other = prunus.trace(model, *(((), small) if isinstance(small, dict) else (small,)))
    needs = ["gradient", "head_gradient", "activation"]
    whole = prunus.importance.collect(model, graph, [batch], needs)
    parts = prunus.importance.collect(
        model, other, (cut(batch, slice(i, i + 1)) for i in range(4)), needs
    )
    alone = prunus.importance.collect(model, graph, [batch], "activation")
    assert whole.samples == parts.samples == alone.samples == 4
    for key in whole.units:
        np.testing.assert_allclose(whole.units[key], parts.units[key], rtol=1e-8, atol=1e-14)
    for a, b, c in zip(whole.sites, parts.sites, alone.sites, strict=True):
        np.testing.assert_allclose(a.square, b.square, rtol=1e-9)
        np.testing.assert_allclose(a.square, c.square, rtol=1e-9)
        np.testing.assert_allclose(a.weight, b.weight, rtol=1e-12)
        assert a.count == b.count == c.count
    assert whole.loss == pytest.approx(parts.loss)


def test_nothing_of_the_model_changes() -> None:
    model = Conv()
    model.train()
    model.norm.eval()
    model.a.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    x = image().float()
    graph = prunus.trace(model, x)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    attributes = [set(vars(module)) for module in model.modules()]
    data = [x, x]
    prunus.importance.collect(model, graph, data, ["gradient", "activation"])
    with pytest.raises(ZeroDivisionError):
        prunus.importance.collect(model, graph, data, "gradient", loss=lambda output, batch: 1 / 0)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert [name for name, w in model.named_parameters() if not w.requires_grad] == ["a.weight"]
    assert [name for name, w in model.named_parameters() if w.grad is not None] == ["head.weight"]
    assert bool((model.head.weight.grad == 1).all())
    assert [m for m in model.modules() if not m.training] == [model.norm]
    assert attributes == [set(vars(module)) for module in model.modules()]
    assert torch.is_grad_enabled()


def test_dropout_is_off_and_frozen_weights_count() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2)).train()
    x = torch.randn(6, 3)
    graph = prunus.trace(model, x)
    model.requires_grad_(False)
    runs = [
        prunus.importance.collect(model, graph, [x], "gradient").units["gradient"] for _ in range(2)
    ]
    np.testing.assert_array_equal(*runs)
    assert (runs[0][1:] != 0).all()


def losses(graph: prunus.CouplingGraph, model: nn.Module, batch: Any, **options: Any) -> float:
    return prunus.importance.collect(model, graph, [batch], "gradient", **options).loss


def test_labels_and_losses_of_the_user_come_first() -> None:
    model, x, graph = build("mlp")
    labels = torch.tensor([0, 2, 1, 1])
    wanted = F.cross_entropy(model(x), labels).item()
    assert losses(graph, model, (x, labels)) == pytest.approx(wanted)
    assert losses(graph, model, x) == pytest.approx(own_loss(model(x)).item())
    squared = F.mse_loss(model(x), x[:, :3]).item()
    told = {"loss": lambda output, batch: F.mse_loss(output, batch[1])}
    assert losses(graph, model, (x, x[:, :3]), **told) == pytest.approx(squared)


def test_a_model_that_knows_its_loss_is_asked_for_it() -> None:
    model, batch, graph = build("llama")
    labels = batch | {"labels": batch["input_ids"]}
    wanted = np.mean([model(**cut(labels, slice(i, i + 1))).loss.item() for i in range(4)])
    assert losses(graph, model, labels) == pytest.approx(wanted)


def test_what_padding_hides_has_no_say_in_the_models_own_answer() -> None:
    model, batch, graph = build("llama")
    short = {"input_ids": batch["input_ids"][:1, :4], "attention_mask": torch.ones(1, 4).long()}
    padded = {
        "input_ids": batch["input_ids"][:1],
        "attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]]),
    }
    a, b = (prunus.importance.collect(model, graph, [one], "gradient") for one in (short, padded))
    assert a.loss == pytest.approx(b.loss)
    np.testing.assert_allclose(a.units["fisher"], b.units["fisher"], rtol=1e-8, atol=1e-15)


def test_outputs_that_are_no_classes_move_in_random_directions() -> None:
    """The mean of (Σ w·∂L/∂w)² comes near the squared derivative of all outputs."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Unflatten(1, (5, 1, 1)))
    model = model.double()
    x = torch.randn(1, 3, dtype=torch.float64)
    graph = prunus.trace(model, x)
    (group,) = graph.groups
    found = prunus.importance.collect(model, graph, [x.expand(4000, 3)], "head_gradient")
    again = prunus.importance.collect(model, graph, [x.expand(4000, 3)], "head_gradient")
    other = prunus.importance.collect(model, graph, [x.expand(4000, 3)], "head_gradient", seed=1)
    np.testing.assert_array_equal(found.units["head_gradient"], again.units["head_gradient"])
    assert (found.units["head_gradient"] != other.units["head_gradient"])[1:].all()
    moves = (model[2].weight * torch.tanh(model[0](x))).detach().square().sum(0) / 5
    expected = moves.sqrt().numpy() * np.sqrt(2 / np.pi)  # mean of |normal|
    np.testing.assert_allclose(
        found.units["head_gradient"][group.units] / 4000, expected, rtol=0.05
    )


def test_a_batch_may_be_one_sample() -> None:
    model, x, graph = build("mlp")
    found = prunus.importance.collect(model, graph, [x], "gradient", split=False)
    apart = prunus.importance.collect(model, graph, [x], "gradient")
    assert (found.samples, apart.samples) == (1, 4)
    np.testing.assert_allclose(found.units["gradient"], apart.units["gradient"] / 4, **CLOSE)


def test_progress_counts_batches() -> None:
    model, x, graph = build("mlp")
    seen: list[tuple[str, int, int | None]] = []
    prunus.importance.collect(
        *(model, graph, iter([x, x, x]), "activation"), progress=lambda *stage: seen.append(stage)
    )
    assert seen == [("collecting statistics", n, 3) for n in range(4)]


class Whole(nn.Module):
    """An output that nothing can be differentiated through."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)).argmax(-1)


X = torch.ones(2, 5)
BAD: list[tuple[Callable[[], nn.Module], Any, dict[str, Any], type[Exception], str]] = [
    (Mlp, [], {}, DataError, r"data is empty\n  why:   the iterable gave no batch"),
    (Mlp, [X[:0]], {}, DataError, r"data is empty\n  why:   its batches hold no sample"),
    (Mlp, [X[:0]], {"needs": "activation"}, DataError, "its batches hold no sample"),
    (Mlp, [X / 0 - X / 0], {}, DataError, "the loss of a sample is nan"),
    (Mlp, [X * float("inf")], {"needs": "activation"}, DataError, r"input of second\.weight"),
    (Mlp, [["text"]], {}, DataError, "a calibration batch is a str"),
    (Mlp, [()], {}, DataError, "a calibration batch is empty"),
    (Mlp, [(X, X)], {}, DataError, r"no classes: torch.float32 of shape \(1, 5\)(.|\n)*loss="),
    (Mlp, [X], {"loss": lambda o, b: o}, DataError, r"the loss is no scalar: \(1, 3\)"),
    (Mlp, [X], {"loss": lambda o, b: 3}, DataError, "the loss is no scalar: int"),
    (Mlp, [X], {"loss": lambda o, b: o.detach().sum()}, DataError, "does not depend on the wei"),
    (Whole, [X], {}, DataError, "output has no floating-point tensor(.|\n)*loss=lambda"),
    (Mlp, [X], {"needs": "gradients"}, PlanError, "'gradients' can be collected(.|\n)*head_grad"),
    (Mlp, [X], {"needs": ()}, PlanError, "nothing is needed"),
]


@pytest.mark.parametrize(("make", "data", "options", "error", "text"), BAD)
def test_what_can_not_be_collected_is_said(make, data, options, error, text) -> None:
    model = make()
    graph = prunus.trace(model, X)
    options = {"needs": "gradient"} | options
    with pytest.raises(error, match=text):
        prunus.importance.collect(model, graph, data, **options)


def test_gradients_that_are_no_numbers_name_their_sample() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    data = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    graph = prunus.trace(model, data)
    nn.init.zeros_(model[0].bias)
    with pytest.raises(DataError, match="gradients of sample 1 are NaN or infinite"):
        # √0 has no derivative, so that the second sample has a loss and no gradient
        prunus.importance.collect(
            model, graph, [data], "gradient", loss=lambda o, b: model[0](b).norm(2) ** 0.5
        )


def test_a_model_without_values_or_of_another_graph_is_refused() -> None:
    model = Mlp()
    graph = prunus.trace(model, X)
    with pytest.raises(ModelError, match=r"first.weight has a shape but no values"):
        prunus.importance.collect(Mlp().to("meta"), graph, [X], "gradient")
    wide = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    with pytest.raises(PlanError, match=r"first.weight has shape \(6, 5\) there, and here is miss"):
        prunus.importance.collect(wide, graph, [X], "gradient")
    model.second = nn.Linear(6, 5)
    with pytest.raises(PlanError, match=r"second.weight has shape \(4, 6\) there, and here \(5, 6"):
        prunus.importance.collect(model, graph, [X], "gradient")


def test_a_model_on_two_devices_is_refused() -> None:
    class Elsewhere:
        """A tensor on a device that this machine need not have."""

        shape, device = (4, 6), "cuda:1"

    model = Mlp()
    graph = prunus.trace(model, X)
    tensors: Any = {**state_of(model)[0], "second.weight": Elsewhere()}
    text = r"lies on 2 devices(.|\n)*first.weight on cpu, second.weight on cuda:1(.|\n)*model.to"
    with pytest.raises(ModelError, match=text):
        check_traced(graph, tensors)


def test_half_precision_runs() -> None:
    model, x, graph = build("mlp")
    half = prunus.importance.collect(
        model.bfloat16(), graph, [x.bfloat16()], ["gradient", "activation"]
    )
    exact = prunus.importance.collect(model.double(), graph, [x.bfloat16().double()], ["gradient"])
    a, b = (one.units["fisher"][1:] for one in (half, exact))
    assert np.corrcoef(a, b)[0, 1] > 0.99


def test_memory_does_not_grow_with_the_data() -> None:
    model, x, graph = build("mlp")

    def stream() -> Iterator[Tensor]:
        for _ in range(50):
            yield x

    found = prunus.importance.collect(model, graph, stream(), ["activation", "gradient"])
    sizes = [array.size for site in found.sites for array in (site.total, site.weight)]
    assert sum(sizes) + sum(a.size for a in found.units.values()) < 100
    assert isinstance(found.sites[0], Site)
    assert found.samples == 200


def test_a_criterion_of_the_user_declares_what_it_needs() -> None:
    model, x, graph = build("mlp")

    def mean(group: Any, context: Context) -> np.ndarray:
        (site,) = (s for s in context.statistics.sites if np.isin(s.label, group.units).any())
        return np.abs(site.total)

    with pytest.raises(DataError, match=r"does not declare what it needs(.|\n)*needs="):
        prunus.plan(graph, model, ratio=0.5, importance=mean, data=[x])
    mean.needs = ("activation",)  # type: ignore[attr-defined]
    plan = prunus.plan(graph, model, ratio=0.5, importance=mean, data=[x])
    assert plan.origin["importance"] == "mean"
    assert [len(choice.removed) for choice in plan.groups] == [3, 2]


WORKER = """
import os, sys
import torch
from torch import distributed as dist
import prunus

rank, folder = int(os.environ["RANK"]), sys.argv[1]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=3)
model, data, parts = torch.load(f"{folder}/given.pt", weights_only=False)
found = prunus.importance.collect(
    model, prunus.trace(model, data[0]), [data[n] for n in parts[rank]],
    ["gradient", "activation", "second_moment"], positions=36,
)
torch.save(found, f"{folder}/found-{rank}.pt")
dist.barrier()
dist.destroy_process_group()
"""


def test_processes_of_torch_distributed_add_up_their_sums(tmp_path: Path) -> None:
    """Three processes, one of them without data, get what one pass over all of it gives."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GELU(), nn.Conv2d(4, 3, 3), nn.Flatten())
    model = model.append(nn.Linear(12, 3)).double().eval()
    data = [torch.randn(n, 2, 6, 6, dtype=torch.float64) + 5 * n for n in (3, 2, 1)]
    torch.save((model, data, [[0, 2], [], [1]]), tmp_path / "given.pt")
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path)], env={**os.environ, "RANK": str(rank)}
        )
        for rank in range(3)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0, 0]
    needs = ["gradient", "activation", "second_moment"]
    whole = prunus.importance.collect(
        model, prunus.trace(model, data[0]), data, needs, positions=36
    )
    for rank in range(3):
        found = torch.load(tmp_path / f"found-{rank}.pt", weights_only=False)
        assert (found.samples, found.loss) == (6, pytest.approx(whole.loss))
        for name, values in whole.units.items():
            np.testing.assert_allclose(found.units[name], values, rtol=1e-9, atol=1e-14)
        for one, wanted in zip(found.sites, whole.sites, strict=True):
            assert one.count == wanted.count
            np.testing.assert_allclose(one.square, wanted.square, rtol=1e-9)
            np.testing.assert_array_equal(one.weight, wanted.weight)
            assert one.moments.count == wanted.moments.count
            second = wanted.moments.covariance()
            torch.testing.assert_close(one.moments.covariance(), second, rtol=1e-9, atol=1e-12)
