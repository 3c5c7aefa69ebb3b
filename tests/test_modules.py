"""PyTorch's own attention, transformers, recurrent modules and norms of weights, taken all the way.

Every row is a module in a small model; it goes through the honest pipeline and has to end in
*exact*, with all of its groups shown to matter.
"""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, rnn
from torch.nn.utils.parametrize import register_parametrization

from prunus.checkpoint import load, save
from prunus.errors import ApplyError
from prunus.graph.plan_records import Edit
from prunus.graph.plans import Plan
from prunus.graph.program import state_of
from prunus.surgeon import apply, mask
from prunus.tracer.adapters import SlimMultiheadAttention, adapted
from prunus.tracer.trace import quiet_run, trace
from prunus.verifier.verify import verify
from tests.faults import Net
from tests.pipeline import judge, plan_for, thin

BATCH, LENGTH, WIDTH = 3, 4, 16
CAUSAL = torch.triu(torch.ones(LENGTH, LENGTH, dtype=torch.bool), 1)
PADDING = torch.arange(LENGTH) >= torch.tensor([[4], [3], [2]])
FLOATING = torch.zeros(BATCH, LENGTH).masked_fill(PADDING, float("-inf"))

Build = Callable[[], nn.Module]


def features(*shape: int) -> Tensor:
    return torch.randn(*shape, 6, generator=torch.Generator().manual_seed(3))


TOKENS = features(BATCH, LENGTH)


class Wrapped(nn.Module):
    """A module between two linear layers; ``run`` calls it."""

    def __init__(self, module: nn.Module, run: Callable[..., Any], out: int = WIDTH) -> None:
        super().__init__()
        self.embed, self.module, self.last = nn.Linear(6, WIDTH), module, nn.Linear(out, 5)
        self.run = run

    def forward(self, *inputs: Tensor) -> Any:
        return self.last(self.run(self.module, *(self.embed(x) for x in inputs)))


def attention(heads: int = 4, run: Callable[..., Any] | None = None, **options: Any) -> Build:
    """Self-attention with a residual; ``run`` gives the arguments beside query, key and value."""
    options = {"batch_first": True} | options

    def call(module: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = x + module(x, x, x, **(run() if run is not None else {}))[0]
        return out

    return lambda: Wrapped(nn.MultiheadAttention(WIDTH, heads, **options), call)


class Cross(nn.Module):
    """Queries of one width, keys and values of two others."""

    def __init__(self, keys: int = 9, values: int = 10, **options: Any) -> None:
        super().__init__()
        self.query = nn.Linear(6, WIDTH)
        self.key, self.value = nn.Linear(6, keys), nn.Linear(6, values)
        self.attention = nn.MultiheadAttention(
            WIDTH, 4, kdim=keys, vdim=values, batch_first=True, **options
        )
        self.last = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        query = self.query(x)
        mixed, _ = self.attention(query, self.key(memory), self.value(memory))
        out: Tensor = self.last(query + mixed)
        return out


class Same(nn.MultiheadAttention):
    """A subclass that adds nothing to the forward."""


class Own(nn.MultiheadAttention):
    """A subclass with a forward of its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class Direct(nn.Module):
    """The function without the module."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3 * WIDTH, WIDTH) / 4)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        rest = (None, None, None, False, 0.0, self.out.weight, self.out.bias)
        mixed, _ = F.multi_head_attention_forward(x, x, x, WIDTH, 4, self.weight, *rest)
        return mixed.transpose(0, 1)


def beside(module: Callable[[], nn.Module]) -> Build:
    """An attention that stays whole, and a layer behind it that does not."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        mixed = m.module(x) if isinstance(m.module, Direct) else m.module(x, x, x)[0]
        out: Tensor = m.last(F.relu(m.up(x + mixed)))
        return out

    def build() -> nn.Module:
        up, last = nn.Linear(WIDTH, 20), nn.Linear(20, 5)
        return Net(run, embed=nn.Linear(6, WIDTH), module=module(), up=up, last=last)

    return build


def encoder(layers: int = 1, **options: Any) -> Build:
    options = {"batch_first": True} | options

    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 24, **options)
        nested = options["batch_first"] and not options.get("norm_first", False)
        nested = nested and options.get("bias", True)
        stack = nn.TransformerEncoder(layer, layers, enable_nested_tensor=nested)
        # Where tensors are nested, padded positions become zeros: another function, refused.
        mask = None if nested else PADDING
        return Wrapped(stack, lambda module, x: module(x, src_key_padding_mask=mask))

    return build


def decoder(**options: Any) -> Build:
    def build() -> nn.Module:
        layer = nn.TransformerDecoderLayer(WIDTH, 4, 24, batch_first=True, **options)
        return Wrapped(
            nn.TransformerDecoder(layer, 1),
            lambda module, x, memory: module(x, memory, tgt_mask=CAUSAL, tgt_is_causal=True),
        )

    return build


def transformer() -> nn.Module:
    return Wrapped(
        nn.Transformer(WIDTH, 4, 1, 1, 24, batch_first=True), lambda module, x, y: module(x, y)
    )


def recurrent(kind: Callable[..., nn.Module], **options: Any) -> Build:
    sides = 2 if options.get("bidirectional") else 1
    out = sides * (options.get("proj_size") or 12)
    return lambda: Wrapped(kind(WIDTH, 12, **options), lambda module, x: module(x)[0], out)


def cell(kind: Callable[..., nn.Module]) -> Build:
    def run(module: nn.Module, x: Tensor) -> Tensor:
        state: Any = None
        for step in x.unbind(1):
            state = module(step, state)
        out: Tensor = state[0] if isinstance(state, tuple) else state
        return out

    return lambda: Wrapped(kind(WIDTH, 12), run, 12)


def last_state(module: nn.Module, x: Tensor) -> Tensor:
    state = module(x)[1]
    out: Tensor = (state[0] if isinstance(state, tuple) else state)[-1]
    return out


def packed(kind: Callable[..., nn.Module], *, final: bool) -> Build:
    def run(module: nn.Module, x: Tensor) -> Tensor:
        sequence = rnn.pack_padded_sequence(
            x, torch.tensor([3, 4, 2]), batch_first=True, enforce_sorted=False
        )
        if final:
            return last_state(module, sequence)  # type: ignore[arg-type]
        return rnn.pad_packed_sequence(module(sequence)[0], batch_first=True)[0]

    return lambda: Wrapped(kind(WIDTH, 12, batch_first=True), run, 12)


class EncoderDecoder(nn.Module):
    """The state of one recurrent module starts another; the first is started by the user."""

    def __init__(self) -> None:
        super().__init__()
        self.reader = nn.GRU(6, 12, batch_first=True)
        self.writer, self.last = nn.GRU(6, 12, batch_first=True), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        _, state = self.reader(x, torch.zeros(1, x.shape[0], self.reader.hidden_size))
        out: Tensor = self.last(self.writer(x, state)[0])
        return out


def normed(wrap: Callable[[nn.Module], nn.Module]) -> Build:
    """The first two of three linear layers, each with a norm of its weight."""
    return lambda: nn.Sequential(
        wrap(nn.Linear(6, 14)), nn.ReLU(), wrap(nn.Linear(14, 12)), nn.ReLU(), nn.Linear(12, 5)
    )


def older(norm: Callable[..., nn.Module], **options: Any) -> Callable[[nn.Module], nn.Module]:
    """The norms that PyTorch deprecates; they keep the weight that they computed last."""

    def wrap(layer: nn.Module) -> nn.Module:
        with pytest.warns(FutureWarning) if norm is nn.utils.weight_norm else torch.no_grad():
            norm(layer, **options)
        layer.weight = layer.weight.detach()  # PyTorch copies no tensor that has a history
        return layer

    return wrap


class Positional(nn.Module):
    """wav2vec2's positional convolution: weight norm along the kernel, and groups (case 39)."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Conv1d(WIDTH, WIDTH, 4, padding=2, groups=4)
        self.embed, self.last = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 5)
        self.positions = parametrizations.weight_norm(layer, name="weight", dim=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        places = self.positions(x.transpose(1, 2))[:, :, :-1].transpose(1, 2)
        out: Tensor = self.last(x + F.gelu(places))
        return out


@dataclass(frozen=True)
class Row:
    """A model, its inputs, and the share of parameters that at most may be left."""

    name: str
    build: Build
    inputs: tuple[Tensor, ...] = (TOKENS,)
    left: float = 0.6


TWO = (TOKENS, features(BATCH, LENGTH))
VECTORS = (features(7),)

ROWS = [
    Row("attention", attention()),
    Row("attention, batch second", attention(batch_first=False)),
    Row("attention, unbatched", attention(), (features(LENGTH),)),
    Row("attention, no bias", attention(bias=False)),
    Row("attention, one head", attention(1)),
    Row("attention, heads of one", attention(16)),
    Row("attention, fused", attention(run=lambda: {"need_weights": False})),
    Row("attention, extra keys", attention(add_bias_kv=True, add_zero_attn=True)),
    Row(
        "attention, masks",
        attention(run=lambda: {"attn_mask": CAUSAL, "key_padding_mask": PADDING}),
    ),
    Row(
        "attention, extra keys and masks",
        attention(
            add_bias_kv=True,
            add_zero_attn=True,
            run=lambda: {"attn_mask": CAUSAL, "key_padding_mask": PADDING, "need_weights": False},
        ),
    ),
    Row(
        "attention, causal",
        attention(run=lambda: {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False}),
    ),
    Row("attention, other keys and values", Cross, TWO),
    Row("attention, other keys, no bias", lambda: Cross(bias=False), TWO),
    Row("attention, other keys of one width", lambda: Cross(WIDTH, WIDTH), TWO),
    Row("subclass that adds nothing", beside(lambda: Same(WIDTH, 4, batch_first=True))),
    Row("encoder", encoder(2)),
    Row("encoder, norm first, gelu", encoder(norm_first=True, activation="gelu")),
    Row("encoder, no bias", encoder(bias=False)),
    Row("decoder", decoder(), TWO),
    Row("decoder, norm first", decoder(norm_first=True), TWO),
    Row("transformer", transformer, TWO),
    Row("lstm", recurrent(nn.LSTM)),
    Row("lstm, batch first, no bias", recurrent(nn.LSTM, batch_first=True, bias=False)),
    Row("lstm, deep, both ways", recurrent(nn.LSTM, num_layers=2, bidirectional=True, dropout=0.2)),
    Row("lstm, projected", recurrent(nn.LSTM, num_layers=2, proj_size=5)),
    Row("gru", recurrent(nn.GRU)),
    Row("gru, deep, both ways", recurrent(nn.GRU, num_layers=2, bidirectional=True)),
    Row("rnn, deep", recurrent(nn.RNN, num_layers=2)),
    Row("rnn, relu", recurrent(nn.RNN, nonlinearity="relu")),
    Row("lstm, last state", lambda: Wrapped(nn.LSTM(WIDTH, 12), last_state, 12)),
    Row("gru, started by another", EncoderDecoder),
    Row("lstm cell", cell(nn.LSTMCell)),
    Row("gru cell", cell(nn.GRUCell)),
    Row("rnn cell", cell(nn.RNNCell)),
    Row("lstm, packed", packed(nn.LSTM, final=True)),
    Row("gru, packed", packed(nn.GRU, final=False)),
    Row("weight norm", normed(parametrizations.weight_norm), VECTORS, 0.65),
    Row("weight norm, older", normed(older(nn.utils.weight_norm)), VECTORS, 0.65),
    Row("weight norm of all", normed(older(nn.utils.weight_norm, dim=None)), VECTORS, 0.65),
    Row("spectral norm", normed(parametrizations.spectral_norm), VECTORS, 0.65),
    Row("spectral norm, older", normed(older(nn.utils.spectral_norm)), VECTORS, 0.65),
    Row("weight norm along a kernel", Positional),
]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_module_is_exact(row: Row) -> None:
    judged = judge(row.build, *row.inputs)
    assert judged.caught_by == "", judged
    assert judged.certificate is not None
    before, after = judged.certificate.params
    limit = 0.95 if row.name.startswith("subclass") else row.left
    assert after <= limit * before, (before, after)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: Own(WIDTH, 4, batch_first=True), "computes its sizes by itself"),
        (Direct, "computes its sizes by itself"),
        (
            lambda: parametrizations.weight_norm(
                nn.MultiheadAttention(WIDTH, 4, batch_first=True), "in_proj_weight"
            ),
            "computes its sizes by itself",
        ),
    ],
    ids=["own forward", "function", "parametrized"],
)
def test_what_can_not_be_replaced_says_why(build: Build, reason: str) -> None:
    judged = judge(beside(build), TOKENS)
    assert judged.caught_by == "", judged
    graph = trace(beside(build)().eval(), TOKENS)
    assert [group.name for group in graph.groups] == ["up.weight[0]"]
    pins = [pin for _, pin in graph.why_pinned("embed.weight")]
    told = [pin for pin in pins if reason in pin.reason]
    assert told
    assert all(pin.module == "module" for pin in told)
    assert all(re.search(r"tests/(test_modules|faults)\.py:\d+", pin.source) for pin in told)


def test_orthogonal_weights_stay() -> None:
    model = normed(parametrizations.orthogonal)()
    assert trace(model, VECTORS).groups == ()


@pytest.mark.parametrize("average", [True, False])
def test_weights_of_attention_as_an_output(average: bool) -> None:
    """Averaged over heads they may have any number of these, else each is an output."""

    def run(m: Any, x: Tensor) -> Any:
        x = m.embed(x)
        mixed, weights = m.attention(x, x, x, average_attn_weights=average)
        return m.last(x + mixed), weights

    def build() -> nn.Module:
        module = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        return Net(run, embed=nn.Linear(6, WIDTH), attention=module, last=nn.Linear(WIDTH, 5))

    judged = judge(build, TOKENS)
    assert judged.caught_by == "", judged
    graph = trace(build(), TOKENS)
    heads = [g for g in graph.groups if g.name == "attention.in_proj_weight[0]"]
    assert [group.size for group in heads] == ([4] if average else [8])


def test_a_mask_per_head_keeps_the_heads() -> None:
    def run(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        per_head = torch.zeros(BATCH * 4, LENGTH, LENGTH)
        out: Tensor = x + module(x, y, y, attn_mask=per_head)[0]
        return out

    model = Wrapped(nn.MultiheadAttention(WIDTH, 4, batch_first=True), run)
    assert judge(lambda: model, *TWO).caught_by == ""
    assert not any(g.size == 4 for g in trace(model, TWO).groups)


def example(build: Build | None = None) -> tuple[nn.Module, Plan]:
    torch.manual_seed(0)
    model = (build or attention())().eval()
    graph = trace(model, TOKENS)
    return model, plan_for(graph, model, thin(graph))


MODULES = {
    "attention": attention(),
    "encoder": encoder(2),
    "lstm": recurrent(nn.LSTM, num_layers=2),
}
each_module = pytest.mark.parametrize("name", MODULES)


@each_module
def test_the_model_handed_in_is_unchanged(name: str) -> None:
    model = MODULES[name]().train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    before = [(type(module), {**vars(module)}) for module in model.modules()]
    graph = trace(model, TOKENS)
    plan = plan_for(graph, model, thin(graph))
    verify(plan, model, TOKENS)
    with mask(plan, model):
        model(TOKENS)
    assert [type(module) for module in model.modules()] == [kind for kind, _ in before]
    assert [set(vars(module)) for module in model.modules()] == [set(own) for _, own in before]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@each_module
def test_json_reproduces_the_cut_on_another_copy(name: str) -> None:
    model, plan = example(MODULES[name])
    other = copy.deepcopy(model)
    apply(plan, model)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    apply(again, other)
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(other(TOKENS), model(TOKENS))


@each_module
def test_second_pruning_and_composition(name: str) -> None:
    model, first = example(MODULES[name])
    fresh = copy.deepcopy(model)
    apply(first, model)
    graph = trace(model, TOKENS)
    second = plan_for(graph, model, thin(graph, seed=5))
    proof = verify(second, model, TOKENS)
    assert (proof.verdict, proof.reason) == ("exact", "")
    apply(second, model)
    both = first.then(second)
    assert Plan.from_json(both.to_json()) == both
    apply(both, fresh)
    assert torch.equal(fresh(TOKENS), model(TOKENS))
    scales = [m.softmax_scale for m in model.modules() if isinstance(m, SlimMultiheadAttention)]
    assert all(scale == 0.5 for scale in scales)


@each_module
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, plan = example(MODULES[name])
    apply(plan, model)
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model", MODULES[name]).eval()
    assert [type(m) for m in loaded.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(loaded(TOKENS), model(TOKENS))


@each_module
def test_training_goes_on(name: str) -> None:
    model, plan = example(MODULES[name])
    model.train()
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(2):
        optimizer.zero_grad()
        loss = model(TOKENS).square().mean()
        loss.backward()
        optimizer.step()
        if step == 0:
            apply(plan, model, optimizer=optimizer)
            assert model.training
            assert all(parameters[name] is p for name, p in model.named_parameters())
    assert model(TOKENS).square().mean() < loss


def test_replaced_in_place_with_hooks_and_put_back_on_failure() -> None:
    model, plan = example()
    module = model.get_submodule("module")
    calls: list[Any] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    own = set(vars(module))
    traced = {**plan.origin["traced"], "outputs": {"output": [1, 2, 3]}}
    broken = Plan(plan.keep, plan.shapes, plan.edits, origin={"traced": traced})
    with pytest.raises(ApplyError, match="has shape"):
        apply(broken, model)
    assert type(module) is nn.MultiheadAttention
    assert set(vars(module)) == own
    calls.clear()
    apply(plan, model)
    assert model.get_submodule("module") is module
    assert isinstance(module, SlimMultiheadAttention)
    model(TOKENS)
    assert calls


def test_a_module_that_is_not_touched_is_not_replaced() -> None:
    model = encoder()().eval()
    graph = trace(model, TOKENS)
    kept = graph.all_kept
    kept[next(g for g in graph.groups if "linear1" in g.name).units[:5]] = False
    plan = plan_for(graph, model, kept)
    assert verify(plan, model, TOKENS).verdict == "exact"
    apply(plan, model)
    assert not any(isinstance(m, SlimMultiheadAttention) for m in model.modules())


def test_a_forged_plan_changes_no_other_class() -> None:
    model, plan = example()
    forged = Edit("last", "__class__", "Linear", ("prunus.SlimMultiheadAttention", 0.5))
    with pytest.raises(ApplyError, match="a Linear can't become"):
        apply(Plan(plan.keep, plan.shapes, (*plan.edits, forged), origin=plan.origin), model)
    assert type(model.get_submodule("last")) is nn.Linear
    assert type(model.get_submodule("module")) is nn.MultiheadAttention


@pytest.mark.parametrize("kind", [nn.MultiheadAttention, Same])
def test_copies_and_pickles(kind: type[nn.MultiheadAttention]) -> None:
    model, plan = example(lambda: Wrapped(kind(WIDTH, 4, batch_first=True), self_attention))
    apply(plan, model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copy.deepcopy(model), loaded):
        assert isinstance(other.module, kind)
        assert torch.equal(other(TOKENS), model(TOKENS))


def self_attention(module: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = x + module(x, x, x)[0]
    return out


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_encoder_keeps_off_the_fused_kernel_and_nested_tensors() -> None:
    """Both read the attention's attributes directly, in eval mode and without gradients."""
    model, plan = example(encoder(2))
    apply(plan, model)
    assert torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        plain = model(TOKENS)
    with quiet_run(model):
        slow = model(TOKENS)
    torch.testing.assert_close(plain, slow)


def test_masking_the_module_itself() -> None:
    model = nn.MultiheadAttention(WIDTH, 4, batch_first=True).eval()
    x = torch.randn(2, 4, WIDTH)
    graph = trace(model, (x, x, x))
    plan = plan_for(graph, model, thin(graph))
    with mask(plan, model):
        masked = model(x, x, x)[0]
    apply(plan, model)
    torch.testing.assert_close(model(x, x, x)[0], masked)


CALLS: list[dict[str, Any]] = [
    {},
    {"need_weights": False},
    {"average_attn_weights": False},
    {"attn_mask": CAUSAL},
    {"attn_mask": CAUSAL, "is_causal": True},
    {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
    {"attn_mask": torch.randn(BATCH * 4, LENGTH, LENGTH), "key_padding_mask": FLOATING},
    {"key_padding_mask": PADDING, "need_weights": False},
    {"key_padding_mask": PADDING, "attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
]
OPTIONS: list[dict[str, Any]] = [
    {"batch_first": True},
    {},
    {"bias": False},
    {"kdim": 9, "vdim": 10},
    {"add_bias_kv": True, "add_zero_attn": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_equivalent_computes_what_pytorch_does(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(WIDTH, 4, **options).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    lead = (BATCH, LENGTH) if options.get("batch_first") else (LENGTH, BATCH)
    query = torch.randn(*lead, WIDTH)
    key, value = torch.randn(*lead, module.kdim), torch.randn(*lead, module.vdim)
    same = "kdim" not in options
    for call in CALLS:
        for inputs in [(query, key, value), *([(query, query, query), (query, key, key)] * same)]:
            with quiet_run(module):
                expected, weights = module(*inputs, **call)
                with adapted(module):
                    found, own = module(*inputs, **call)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            assert (own is None) == (weights is None)
            if own is not None:
                torch.testing.assert_close(own, weights, rtol=1e-4, atol=1e-4)


def test_the_equivalent_drops_out_as_often() -> None:
    module = nn.MultiheadAttention(WIDTH, 4, dropout=0.5, batch_first=True)
    x = torch.randn(BATCH, LENGTH, WIDTH)
    with adapted(module):
        _, weights = module(x, x, x, average_attn_weights=False)
        assert 0.2 < (weights == 0).float().mean() < 0.8
        assert not torch.equal(*(module(x, x, x, need_weights=False)[0] for _ in range(2)))
    module.eval()
    with adapted(module):
        assert (module(x, x, x)[1] > 0).all()
    with adapted(module), pytest.raises(RuntimeError, match="Need attn_mask"):
        module(x, x, x, is_causal=True)


def test_parameters_are_the_same_objects_and_names() -> None:
    model, plan = example(recurrent(nn.LSTM, num_layers=2))
    module: Any = model.get_submodule("module")
    before = dict(module.named_parameters())
    apply(plan, model)
    after = dict(module.named_parameters())
    assert all(after[name] is tensor for name, tensor in before.items())
    assert {id(t) for t in module._flat_weights} == {id(t) for t in after.values()}
    assert (module.input_size, module.hidden_size) == (11, 8)
    assert set(state_of(model)[0]) == set(plan.shapes)


class Scaled(nn.Module):
    """A parametrization that only multiplies."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_parametrized_recurrent_weights() -> None:
    """A weight that is computed anew at every access is taken, or refused, but never wrong."""

    def build() -> nn.Module:
        module = nn.GRU(WIDTH, 12, batch_first=True)
        register_parametrization(module, "weight_hh_l0", Scaled())
        return Wrapped(module, lambda m, x: m(x)[0], 12)

    judged = judge(build, TOKENS)
    assert judged.certificate is None or judged.certificate.verdict != "inexact", judged
