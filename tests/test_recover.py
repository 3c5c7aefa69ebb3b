"""The recovery after a cut: what it does, takes back and tells, and that it does all or nothing."""

from __future__ import annotations

import copy
import math
import os
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

import prunus
from prunus.calibration.batches import Batches
from prunus.cli.flags import RECOVERIES
from prunus.errors import DataError, PlanError
from prunus.graph.axis import Axis
from prunus.recovery import LOOKED_AT, Recover
from tests.snapshots import same, snapshot

HALF = prunus.Budget(macs=0.5)


def net() -> nn.Sequential:
    """Two convolutions, the second without a norm behind it and without a bias."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 8, 3, bias=False), nn.Flatten(), nn.Linear(8 * 16, 5),
    )  # fmt: skip
    model.train()(torch.randn(64, 3, 8, 8))
    return model.eval()


def images(count: int = 6, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [scale * torch.randn(16, 3, 8, 8, generator=generator) for _ in range(count)]


def shrunk(model: nn.Module, data: Any, **options: Any) -> prunus.api.Shrunk:
    return prunus.shrink(model, images(1)[0], budget=HALF, data=data, **options)


def off(model: nn.Module, dense: nn.Module) -> float:
    """What a step tells, counted here."""
    with torch.no_grad():
        pairs = [(model(x), dense(x)) for x in Batches(images()).first(LOOKED_AT)]
    missed = sum(float((a - b).double().square().sum()) for a, b in pairs)
    return math.sqrt(missed / sum(float(b.double().square().sum()) for _, b in pairs))


@pytest.mark.parametrize("kind", [list, iter])
def test_auto_fits_weights_then_batch_norms_and_tells_what_they_bring(kind: Any) -> None:
    dense, model = net(), net()
    done = shrunk(model, kind(images()))
    assert [step.name for step in done.recovery] == ["cut", "least squares", "batch norms"]
    first, second, _ = done.recovery
    assert second.error < 0.8 * first.error
    kept = [step for step in done.recovery if step.kept]
    assert kept[-1].error == pytest.approx(off(model, dense), rel=1e-6)
    assert [step.error for step in kept] == sorted((s.error for s in kept), reverse=True)


@pytest.mark.parametrize(
    ("recover", "steps"),
    [
        ("recalibrate", ["cut", "batch norms"]),
        ("bias", ["cut", "bias"]),
        ("least_squares", ["cut", "least squares"]),
        ("none", []),
    ],
)
def test_each_recovery_is_what_its_parts_do(recover: Recover, steps: list[str]) -> None:
    model, twin = net(), net()
    done = shrunk(model, images(), recover=recover)
    assert [step.name for step in done.recovery] == steps
    graph = prunus.trace(twin, images(1)[0])
    plan = prunus.plan(graph, twin, budget=HALF)
    if recover in ("bias", "least_squares"):
        prunus.recovery.compensate(twin, plan, graph, images(), method=recover)
    else:
        prunus.apply(plan, twin)
    if recover == "recalibrate":
        prunus.recovery.recalibrate(twin, images())
    assert torch.equal(model(images(1)[0]), twin(images(1)[0]))


def test_auto_takes_back_what_makes_the_outputs_worse() -> None:
    """Statistics of far larger images, when the first batches are looked at."""
    model, twin = net(), net()
    data = [*images(LOOKED_AT), *images(30, scale=100.0)]
    done = shrunk(model, data)
    assert [(s.name, s.kept) for s in done.recovery][-1] == ("batch norms", False)
    assert done.recovery[-1].error > min(step.error for step in done.recovery)
    assert done.recovery[-1].why
    stay = list(done.plan.keep[Axis("1.weight", 0)])
    kept = {name: b.clone() for name, b in model[1].named_buffers()}
    assert torch.equal(kept["running_var"], twin[1].running_var[stay])
    asked = net()
    shrunk(asked, data, recover="recalibrate")  # whoever asks for it gets it
    assert not torch.equal(asked[1].running_var, twin[1].running_var[stay])


def test_a_model_with_new_biases_is_saved_and_read_back(tmp_path: Any) -> None:
    model = net()
    done = shrunk(model, images())
    assert model[3].bias is not None
    prunus.save(model, tmp_path / "small.safetensors", plan=done.plan)
    again = prunus.load(tmp_path / "small.safetensors", build=net)
    assert torch.equal(again(images(1)[0]), model(images(1)[0]))


def test_a_repair_that_reads_data_is_refused_without_any() -> None:
    model = net()
    with pytest.raises(DataError, match="recover='least_squares' needs calibration data"):
        shrunk(model, None, recover="least_squares")
    assert model[3].bias is None


@pytest.mark.parametrize(
    ("data", "options", "error", "said"),
    [
        (images(1), {"recover": "everything"}, PlanError, "no recovery is called 'everything'"),
        ([], {}, DataError, "empty"),
        (iter(()), {}, DataError, "empty"),
        ([*images(3), torch.full((2, 3, 8, 8), torch.nan)], {}, DataError, "NaN"),
        ([*images(3), torch.full((2, 3, 8, 8), torch.nan)], {"recover": "recalibrate"}, DataError,
         "finite"),
    ],
)  # fmt: skip
def test_bad_input_leaves_the_model_whole(
    data: Any, options: Any, error: type[Exception], said: str
) -> None:
    model = net()
    before = snapshot(model)
    with pytest.raises(error, match=said):
        shrunk(model, data, **options)
    assert same(snapshot(model), before)


def test_an_interrupt_leaves_the_model_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    before = snapshot(model)

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("prunus.recovery.recover.recalibrate", stop)
    with pytest.raises(KeyboardInterrupt):
        shrunk(model, images())
    assert same(snapshot(model), before)


def test_progress_names_the_step() -> None:
    told: list[tuple[str, int, int | None]] = []
    shrunk(net(), images(2), progress=lambda *stage: told.append(stage))
    stages = [stage for stage, _, _ in told]
    wanted = ["tracing", "planning", "verifying", "collecting statistics", "measuring batch norms"]
    assert [stage for stage in dict.fromkeys(stages) if stage in wanted] == wanted
    for name in wanted[3:]:
        assert [(name, n, 2) for n in range(3)] == [one for one in told if one[0] == name]


def test_uniform_plans_get_no_biases() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, vocab_size=64)
    model = transformers.LlamaForCausalLM(config).eval()
    dense = copy.deepcopy(model)
    data = [{"input_ids": torch.randint(0, 64, (4, 12))} for _ in range(3)]
    budget = prunus.Budget(params=0.8)
    done = prunus.shrink(model, data[0]["input_ids"], budget=budget, data=data, mode="uniform")
    assert [step.name for step in done.recovery] == ["cut", "least squares", "norms"]
    assert done.recovery[1].error < done.recovery[0].error
    assert all(p is None or "bias" not in n for n, p in model.named_parameters())
    assert dense(data[0]["input_ids"]).logits.shape == model(data[0]["input_ids"]).logits.shape


def test_the_command_line_knows_all_recoveries() -> None:
    assert get_args(Recover) == RECOVERIES


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(192, 24), nn.LayerNorm(24), nn.GELU()),
        *(nn.Linear(24, 16), nn.GELU(), nn.Linear(16, 5)),
    ).eval()


@pytest.mark.parametrize("make", [net, normed])
@pytest.mark.parametrize(
    ("recover", "most"), [("auto", 4.0), ("least_squares", 4.0), ("sequential", 6.0)]
)
@pytest.mark.parametrize("importance", ["l2", "obs", "taylor", "wanda"])
def test_the_data_run_a_few_times(
    make: Any, recover: Recover, most: float, importance: str, tmp_path: Any
) -> None:
    """What 64 images more cost: so that trace and verification, which are fixed, don't count.

    Counted in a file, since all that a forward leaves behind in memory is put back.
    """

    def count(batches: int) -> int:
        path = tmp_path / f"{batches}"
        file = os.open(path, os.O_WRONLY | os.O_CREAT)

        class Counting(nn.Sequential):
            def forward(self, x: Tensor) -> Tensor:
                os.write(file, bytes(len(x)))
                y: Tensor = super().forward(x)
                return y

        model = Counting(*make().children()).eval()
        done = shrunk(model, images(batches), importance=importance, recover=recover)
        os.close(file)
        assert done.samples == 16 * batches
        assert len(done.recovery) > 1
        return int(path.stat().st_size)

    assert 64 < count(8) - count(4) <= most * 64
