"""A request that removes nothing is refused, with everything that stands in its way."""

import json
import operator

import pytest
import torch
from torch import Tensor, nn

import prunus
from prunus.cli import main
from prunus.errors import BudgetError, PlanError, VerifyError

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
HALF = prunus.Budget(macs=0.5)


class Counted(nn.Module):
    """Every width is pinned: values are sorted and multiplied up along it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.cumprod(self.b(torch.sort(self.a(x), dim=1)[0]), dim=1))


class Comparing(nn.Module):
    """What no trace foresees: another answer at another width."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(a if operator.index(a.shape[1]) == 16 else 2 * a)
        return self.c(b if operator.index(b.shape[1]) == 8 else 2 * b)


class Thin(nn.Module):
    """Widths of one: nothing may go."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 1), nn.Linear(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


AMOUNTS = [{"ratio": 0.5}, {"budget": HALF}, {"ratio": 0.01}]


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("call", ["plan", "shrink"])
def test_every_pin_is_named(call, amount) -> None:
    model = Counted().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph = prunus.trace(model, X)
    with pytest.raises(BudgetError) as caught:
        prunus.plan(graph, model, **amount) if call == "plan" else prunus.shrink(model, X, **amount)
    why = caught.value.why
    for axis, reader in [("a.weight[0]", "aten.sort"), ("b.weight[0]", "aten.cumprod")]:
        line = next(line for line in why.splitlines() if line.startswith(axis))
        assert reader in line
        assert "test_nothing_removed.py:" in line
    assert "output 'output' keeps its shape" in why
    assert all(torch.equal(before[n], tensor) for n, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("model", "amount", "said"),
    [
        (Thin(), {"ratio": 0.5}, "b.weight[0] pinned: output"),
        (Thin(), {"budget": HALF}, "a.weight[1] pinned: contracted with"),
        (nn.Linear(6, 3), {"ratio": 0.9}, "weight[0] pinned: output 'output' keeps its shape"),
        (nn.Linear(6, 3), {"budget": HALF}, "weight[1] pinned: contracted with"),
        (nn.ReLU(), {"ratio": 0.9}, "reads no parameter of which a dim could be pruned"),
        (plain(), {"ratio": 0.5, "hold": ["0.weight[0]"]}, "0.weight[0]: it is held"),
        (plain(), {"ratios": {"0.*": 0.01}}, "0.weight[0]: no smaller number than its 8 units"),
        (plain(), {"ratios": {"0.*": 0.5}, "hold": ["0.weight[0]"]}, "0.weight[0]: it is held"),
        (plain(), {"budget": HALF, "hold": ["0.weight[0]"]}, "0.weight[0]: it is held"),
        (plain(), {"budget": HALF, "exclude": "*"}, "0.weight[0]: excluded"),
        (plain(), {"budget": HALF, "round_to": 16}, "can't be cut to multiples of 16"),
        (plain(), {"budget": HALF, "min_width": 8}, "keeps 8 of 8 units"),
        (plain(), {"budget": HALF, "max_ratio": 0.05}, "keeps 8 of 8 units"),
    ],
)
def test_whatever_stands_in_the_way_is_named(model, amount, said) -> None:
    for run in (lambda: prunus.plan(prunus.trace(model, X), model, **amount),
                lambda: prunus.shrink(model, X, **amount)):  # fmt: skip
        with pytest.raises(BudgetError) as caught:
            run()
        assert said in caught.value.why


@pytest.mark.parametrize("option", ["include", "exclude"])
@pytest.mark.parametrize("glob", ["2.weight[0]", "2.bias", "2.b*"])
def test_globs_that_fit_only_what_is_pinned(option, glob) -> None:
    model = plain()
    graph = prunus.trace(model, X)
    with pytest.raises(PlanError, match="matches only what is pinned") as caught:
        prunus.plan(graph, model, budget=HALF, **{option: glob})
    assert "output 'output' keeps its shape" in caught.value.why


@pytest.mark.parametrize("amount", AMOUNTS)
def test_groups_that_the_verification_rejects_are_named(amount) -> None:
    with pytest.raises((VerifyError, BudgetError)) as caught:
        prunus.shrink(Comparing().eval(), X, **amount)
    assert "a.weight[0]" in caught.value.why
    assert "b.weight[0]" in caught.value.why


def test_what_is_held_after_a_rejected_cut_is_named_with_the_reason() -> None:
    """The rest of the plan, made again, would remove nothing."""

    class Half(Comparing):
        def forward(self, x: Tensor) -> Tensor:
            a = self.a(x)
            return self.c(
                torch.sort(self.b(a if operator.index(a.shape[1]) == 16 else 2 * a), dim=1)[0]
            )

    with pytest.raises((VerifyError, BudgetError), match=r"a.weight\[0\]: .*outputs differ"):
        prunus.shrink(Half().eval(), X, ratio=0.5)


@pytest.mark.parametrize(
    "amount",
    [{"budget": prunus.Budget(macs=1.0)}, {"budget": prunus.Budget(params=10**6)},
     {"ratios": {"*": 0.0}}, {"ratios": {}}],
)  # fmt: skip
@pytest.mark.parametrize("model", [plain(), Counted()])
def test_what_is_met_already_and_an_empty_request_return(model, amount) -> None:
    if "*" in amount.get("ratios", {}) and isinstance(model, Counted):
        pytest.skip("no group fits a glob")
    graph = prunus.trace(model, X)
    assert not prunus.plan(graph, model, **amount).keep
    assert not prunus.shrink(model, X, **amount).plan.keep


MODEL = """
import torch
from torch import nn
from test_nothing_removed import Counted, plain
def counted(): return Counted().eval()
def example_inputs(): return torch.ones(4, 6)
"""


@pytest.mark.parametrize("verb", ["plan", "shrink"])
@pytest.mark.parametrize(
    ("name", "options", "code", "said"),
    [
        ("counted", ["--macs", "0.5"], 3, "a.weight[0] pinned: positions along this dim are"),
        ("plain", ["--ratios", "0.*=0.01"], 3, "0.weight[0]: no smaller number than its 8"),
        ("plain", ["--macs", "0.5", "--include", "2.weight*0*"], 2, "matches only what is pinned"),
        ("plain", ["--macs", "0.5", "--exclude", "*"], 3, "0.weight[0]: excluded"),
        ("plain", ["--macs", "1.0"], 0, ""),
        ("plain", ["--ratios", "0.*=0.0"], 0, ""),
    ],
)
def test_the_command_line_says_so(tmp_path, capsys, verb, name, options, code, said) -> None:
    file = tmp_path / "own.py"
    file.write_text(f"import sys\nsys.path.insert(0, {str(__file__).rpartition('/')[0]!r}){MODEL}")
    more = ["--dry-run"] if verb == "plan" else []
    assert main([verb, f"{file}:{name}", "--json", *options, *more]) == code
    out, err = capsys.readouterr()
    assert said in err
    if not code:
        assert json.loads(out)["groups"]
