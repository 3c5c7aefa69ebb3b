"""Options: unknown ones, nonsensical values, and such as contradict one another, are refused."""

import ast
import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import nn

import prunus
from prunus import api
from prunus.errors import PlanError, checks_options
from prunus.importance import torch_pruning
from prunus.integrations import hf
from prunus.planner.option_values import texts_of
from prunus.planner.options import PlanKeywords, PlanOptions, ScoreKeywords, ScoreOptions

SOURCE = Path(prunus.__file__).parent


class TouchedError(Exception):
    """Something was looked at before the options were checked."""


class Untouchable:
    """A model, graph or plan that nobody may look at."""

    def __getattribute__(self, name: str):
        raise TouchedError(name)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)
    )


X = torch.ones(4, 6)

CALLS = [
    *(getattr(prunus, name) for name in prunus.__all__),
    *(prunus.api.keep, prunus.api.Shrunk, prunus.verifier.randomize, prunus.verifier.Certificate),
    *(getattr(prunus.planner.search, name) for name in prunus.planner.search.__all__),
    *(getattr(prunus.report, name) for name in prunus.report.__all__),
    *(prunus.importance.collect, prunus.importance.block_influence, prunus.importance.Movement),
    *(prunus.recovery.compensate, prunus.recovery.recalibrate, prunus.recovery.Compensation),
    *(prunus.Plan.save, prunus.Plan.load),
    *(hf.example_inputs, hf.save, hf.load, torch_pruning.TorchPruning),
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: getattr(call, "__qualname__", str(call)))
def test_every_public_call_refuses_an_unknown_option_first(call) -> None:
    with pytest.raises(TypeError, match="got an unexpected option 'no_such_option'"):
        call(*[Untouchable()] * 4, no_such_option=1)


def test_a_call_without_the_check_is_seen() -> None:
    def unchecked(model, *, exclude=()) -> None: ...

    with pytest.raises(TypeError) as caught:
        unchecked(Untouchable(), exlude=1)
    assert "unexpected option" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"exlude": "0.*"}, r"shrink\(\) got an unexpected option 'exlude'; did you mean 'exclude"),
        ({"round": 8}, "did you mean 'round_to'"),
        ({"importnce": "l1"}, "did you mean 'importance'"),
        ({"optimiser": None}, "did you mean 'optimizer'"),
        ({"recovery": "none"}, "did you mean 'recover'"),
        ({"macs": 0.9}, "of those that it has .* is nearest: .*budget"),
    ],
)
@pytest.mark.parametrize("amount", [{"ratio": 0.5}, {"budget": prunus.Budget(macs=0.5)}, {}])
def test_shrink_names_the_nearest_option(options, said, amount) -> None:
    with pytest.raises(TypeError, match=said):
        prunus.shrink(Untouchable(), Untouchable(), **amount, **options)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: prunus.Budget(mac=0.5), r"Budget\(\) .* did you mean 'macs'"),
        (lambda: prunus.plan(None, None, ratios_={}), "did you mean 'ratios'"),
        (lambda: prunus.verify(None, None, sed=1), "did you mean 'seed'"),
        (lambda: prunus.prune_heads(None, {}, verify=False), "did you mean 'verified'"),
        (lambda: prunus.Plan.from_json("", limits=3), r"Plan.from_json\(\) .* mean 'limit'"),
        (lambda: checks_options(lambda: None, name="start")(now=True), r"start\(\) .* takes none"),
    ],
)
def test_others_name_it_too(call, said) -> None:
    with pytest.raises(TypeError, match=said):
        call()


def test_options_can_be_looked_up() -> None:
    known = inspect.signature(prunus.shrink).parameters
    assert {"exclude", "ratio", "optimizer", "scope"} <= known.keys()
    assert "options" not in known


def test_what_a_decorator_around_returns_is_checked_as_well() -> None:
    @checks_options
    def grow(*layers, width=1, **more):
        return layers, width, more

    assert grow(1, 2, width=3, other=4) == ((1, 2), 3, {"other": 4})


NONSENSE = {
    "scope": "nonsense",
    "normalise": "nonsense",
    "importance": "nonsense",
    "round_to": "nonsense",
    "min_width": -1,
    "max_ratio": 2.0,
    "include": 5,
    "part": 5,
    "exclude": 5,
    "hold": "0.weight[0]",
    "drop": True,
    "protect_ends": "no",
    "seed": 0.5,
    "data": 3,
    "samples": 0,
    "statistics": {},
    "loss": "cross_entropy",
    "ratios": 0.5,
    "remove": 0.5,
    "budget": 0.5,
    "ratio": "half",
}
AMOUNTS = {
    "ratio": {"ratio": 0.5},
    "budget": {"budget": prunus.Budget(macs=0.5)},
    "ratios": {"ratios": {"0.*": 0.5}},
    "remove": {"remove": {"ffn": 0.5}},
    "drop": {"drop": ["0"]},
}


def test_every_option_of_a_plan_has_a_value_that_is_refused() -> None:
    assert NONSENSE.keys() == {one.name for one in fields(PlanOptions)}


@pytest.mark.parametrize(
    ("record", "keywords"),
    [
        (ScoreOptions, ScoreKeywords),
        (PlanOptions, PlanKeywords),
        (api.ShrinkOptions, api.ShrinkKeywords),
    ],
)
def test_type_checkers_see_the_options_of_the_record(record, keywords) -> None:
    types = {name: found.__forward_arg__ for name, found in keywords.__annotations__.items()}
    assert types == {one.name: one.type for one in fields(record)}


@pytest.mark.parametrize("call", [prunus.plan, prunus.shrink])
def test_signature_and_documentation_are_read_off_the_record(call) -> None:
    known = inspect.signature(call).parameters
    for one in fields(PlanOptions):
        assert known[one.name].default == one.default
        assert known[one.name].annotation == one.type
        assert call.__doc__.count(f"    {one.name} : ") == 1
        assert texts_of(PlanOptions)[one.name].partition("\n")[0] in call.__doc__
    assert "**options" not in call.__doc__


def test_no_option_is_documented_twice() -> None:
    for call in (
        prunus.plan,
        prunus.shrink,
        prunus.planner.search.sensitivity,
        prunus.planner.search.search_ratios,
    ):
        names = re.findall(r"^    (\w+(?:, \w+)*)(?: :.*)?$", call.__doc__, re.MULTILINE)
        each = [name for line in names for name in line.split(", ")]
        assert len(each) == len(set(each)), call


def test_a_function_has_at_most_twelve_parameters() -> None:
    files = [*(SOURCE / "cli").glob("*.py"), SOURCE / "api.py", SOURCE / "planner" / "planning.py"]
    assert len(files) > 5
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                a = node.args
                count = len(
                    [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, [a.vararg, a.kwarg])]
                )
                assert count <= 12, (file.name, node.name)


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_refused_in_any_combination(name, amount) -> None:
    options = {**AMOUNTS[amount], name: NONSENSE[name]}
    with pytest.raises(PlanError, match=name):
        prunus.plan(Untouchable(), Untouchable(), **options)
    with pytest.raises(PlanError, match=name):
        prunus.shrink(Untouchable(), Untouchable(), **options)


@pytest.mark.parametrize(
    ("given", "fix"),
    [
        (0.5, "prunus.Budget(macs=0.5)"),
        (2_000_000, "prunus.Budget(macs=2000000)"),
        ("0.3", "prunus.Budget(macs=0.3)"),
        ("30%", "prunus.Budget(macs=0.3)"),
        ("half", "prunus.Budget(macs=0.5)"),
        ({"params": 0.4, "macs": 0.6}, "prunus.Budget(params=0.4, macs=0.6)"),
        ({"flops": 0.4}, "prunus.Budget(macs=0.5)"),
        ([0.5], "prunus.Budget(macs=0.5)"),
        (True, "prunus.Budget(macs=0.5)"),
    ],
)
def test_what_is_no_budget_is_answered_with_one(given, fix) -> None:
    with pytest.raises(PlanError) as caught:
        prunus.shrink(Untouchable(), Untouchable(), budget=given)
    assert f"budget must be a Budget; got {given!r}" in str(caught.value)
    assert caught.value.fix == f"budget={fix}"


def test_plans_and_results_are_short_tables(model) -> None:
    whole = prunus.plan(prunus.trace(model, X), model, ratio=0.5)
    table = """\
        before  after  share
params     355    131    37%
MACs    1.30 k    456    35%
bytes   1.42 k    524    37%
group        units  kept  share
0.weight[0]     16     8    50%
2.weight[0]     12     6    50%"""
    assert str(whole) == table
    small = prunus.shrink(model, X, ratio=0.5)
    verdict = repr(small).removeprefix(f"{table}\n")
    assert re.fullmatch(
        r"verified \(exact\): max relative error \S+ against the masked model; "
        r"pruning changed the outputs by \S+",
        verdict,
    )
    unseen = prunus.shrink(model, X, ratio=0.5, verified=False)
    assert repr(unseen).endswith("not verified (verified=False)")


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"mode": "nonsense"}, PlanError, "mode='nonsense' is none of 'free', 'uniform'"),
        ({"recover": "nonsense"}, PlanError, "no recovery is called 'nonsense'"),
        ({"recover": "least_squares"}, prunus.errors.DataError, "needs calibration data"),
        ({"recover": "recalibrate"}, prunus.errors.DataError, "needs calibration data"),
    ],
)
def test_shrink_refuses_nonsense_of_its_own(options, error, said) -> None:
    with pytest.raises(error, match=said):
        prunus.shrink(Untouchable(), Untouchable(), ratio=0.5, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"scope": "global"},
        {"scope": ["0.*"]},
        {"normalise": "max"},
    ],
)
def test_what_has_no_effect_beside_a_ratio_is_refused(options) -> None:
    with pytest.raises(PlanError, match="can't be combined with ratio=") as caught:
        prunus.shrink(Untouchable(), Untouchable(), ratio=0.5, **options)
    assert "a ratio is taken from every group alike" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "widths"),
    [
        ({}, (8, 6)),
        ({"exclude": "0.*"}, (16, 6)),
        ({"include": "0.*"}, (8, 12)),
        ({"min_width": 7}, (8, 7)),
        ({"max_ratio": {"2.weight[[]0]": 0.25}}, (8, 9)),
        ({"round_to": 4}, (8, 8)),
        ({"scope": "local", "hold": ["2.weight[0]"]}, (8, 12)),
    ],
)
def test_a_ratio_is_taken_of_the_groups_that_are_meant(model, options, widths) -> None:
    prunus.shrink(model, X, ratio=0.5, **options)
    assert (model[0].out_features, model[2].out_features) == widths


def test_defaults_may_be_written_out_beside_a_ratio(model) -> None:
    graph = prunus.trace(model, X)
    plain = prunus.plan(graph, model, ratio=0.5)
    said = prunus.plan(
        graph, model, ratio=0.5, scope="local", round_to=1, exclude=[], min_width=1, max_ratio=1.0
    )
    assert said.keep == plain.keep


def test_lines_of_pins_are_not_those_of_the_check(model) -> None:
    sources = {pin.source for _, pin in prunus.trace(model, X).pins if pin.operator}
    assert {source.rpartition(":")[0] for source in sources} == {"tests/test_options.py"}


@pytest.mark.parametrize("recover", ["auto", "none", "bias", "least_squares", "recalibrate"])
@pytest.mark.parametrize("kind", [torch.optim.Adam, lambda p: torch.optim.SGD(p, 0.1, 0.9)])
def test_shrink_carries_an_optimizer_along(model, kind, recover) -> None:
    optimizer = kind(model.parameters())
    model(X).square().sum().backward()
    optimizer.step()
    data = None if recover in ("auto", "none") else [X, -X]
    small = prunus.shrink(model, X, ratio=0.5, optimizer=optimizer, data=data, recover=recover)
    assert small.certificate.verdict == "exact"
    for parameter in optimizer.state:
        for value in optimizer.state[parameter].values():
            assert not isinstance(value, torch.Tensor) or value.shape in ((), parameter.shape)
    optimizer.zero_grad()
    model(X).square().sum().backward()
    optimizer.step()


def test_heads_and_layers_carry_an_optimizer_along() -> None:
    layer = nn.TransformerEncoderLayer(8, 4, 16, dropout=0, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    x = torch.randn(2, 5, 8)
    optimizer = torch.optim.Adam(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        model.train()(x).square().sum().backward()
        optimizer.step()
        model.eval()

    step()
    prunus.prune_heads(model, {0: [1]}, x, optimizer=optimizer)
    step()
    prunus.drop_layers(model, [1], x, optimizer=optimizer)
    group = next(g.name for g in prunus.trace(model, x).groups if "linear1" in g.name)
    prunus.api.keep(model, group, range(5), x, optimizer=optimizer)
    step()
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == set(map(id, model.parameters()))
