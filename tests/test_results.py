"""The committed tables: every row is what is promised, and a row that isn't would be seen."""

from __future__ import annotations

import csv
import importlib.util
import math
import re
import statistics
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
Row = dict[str, str]


def read(name: str) -> list[Row]:
    with (BENCHMARKS / "results" / name).open() as file:
        return list(csv.DictReader(file))


def written(name: str) -> list[Row]:
    """The rows of a table that takes a quiet machine to make; none before it is made."""
    return read(name) if (BENCHMARKS / "results" / name).exists() else []


def catalogue() -> tuple[list[str], tuple[str, ...]]:
    """The names of all models, and of those that answer with a hidden state."""
    spec = importlib.util.spec_from_file_location(
        "catalogue", BENCHMARKS / "exactness" / "catalogue.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.names(), module.HIDDEN_STATE


def number(text: str) -> float:
    """Infinite where a cell is empty."""
    return float(text or "inf")


def broken(row: Row, hidden: tuple[str, ...] = ()) -> list[str]:
    """What a row of exactness.csv lacks of the exactness line."""
    left = 0.75 if f"{row['library']}:{row['model']}" in hidden else 0.6
    bound = {"float32": 1e-4, "float64": 1e-6}.get(row["dtype"], 0)
    judges = [row[judge].split(" ")[0] for judge in ("witness", "shadow")]
    named = [name for name in row["unverified"].split("; ") if name]
    moved = number(row["moved_min"])
    promised = {
        "verdict": row["verdict"] == "exact",
        "params_left": number(row["params_left"]) <= left,
        "rel_err": number(row["rel_err"]) <= bound,
        "rel_err64": row["rel_err64"].startswith("-") or number(row["rel_err64"]) <= 1e-6,
        "judges": "agrees" in judges and "disagrees" not in judges,
        "names": str(len(named)) == row["not_verified"],
        "moved_min": moved <= 1e-3 if named else moved >= 1e-3,
        "line_holds": row["line_holds"] == "yes",
    }
    return [what for what, holds in promised.items() if not holds]


TIMED = ("resnet50", "mobilenetv2")
"""Models of latency.csv."""

BUDGETED = (
    *TIMED, "yolov8n", "vit_small", "llama_1b", "efficientnet_b0", "bert_base", "hrnet_w18",
)  # fmt: skip
"""Models of budgets.csv."""

BACKENDS = ("eager", "onnxruntime")
"""What runs the models of latency.csv and seeds.csv."""

CLOSE = {"1": 0.01, "8": 0.02, "32": 0.04}
"""How far below a bound a plan may end, by what widths are rounded to."""


def missed(row: Row) -> list[str]:
    """What a row of budgets.csv lacks: bounds are held, the tighter one closely, and alignment.

    Of peak memory the count has to agree with the plan, which has to hold the bound; a bound that
    no plan reaches is refused.
    """
    if row["budget"] == "activation" and "no plan reaches activation" in row["verdict"]:
        return []
    if row["verdict"] != "met":
        return ["verdict"]
    requested = float(row["requested"])
    planned = max(map(float, row["planned"].split("+")))
    achieved = max(map(float, row["achieved"].split("+")))
    promised = {
        "commit": re.fullmatch(r"[0-9a-f]{7,}", row["commit"]) is not None,
        "unaligned": row["unaligned"] == "0",
    }
    if row["budget"] == "activation":
        promised |= {
            "over": planned <= requested,
            "agrees": abs(achieved - planned) <= 0.05 * planned,
        }
    else:
        promised |= {
            "over": achieved <= requested,
            "far": requested - achieved < CLOSE[row["round_to"]],
        }
    return [what for what, holds in promised.items() if not holds]


def late(row: Row) -> list[str]:
    """What a row of latency.csv lacks of what is promised of a latency budget."""
    promised = {
        "lands": abs(number(row["measured_ratio"]) / number(row["requested"]) - 1) <= 0.07,
        "quiet": abs(number(row["dense_vs_dense"]) - 1) <= 0.03,
        "commit": not row["commit"].endswith("+"),
    }
    return [what for what, holds in promised.items() if not holds]


def test_every_time_is_met() -> None:
    rows = written("latency.csv")
    assert not {tuple(row.values())[:3]: late(row) for row in rows if late(row)}
    asked = [(model, backend, share) for model in TIMED for backend in BACKENDS
             for share in ("0.75", "0.5")]  # fmt: skip
    found = [(row["model"], row["backend"], row["requested"]) for row in rows]
    assert sorted(found) == sorted(asked)


def wrong_on_a_gpu(row: Row) -> list[str]:
    """What a row of gpu.csv lacks of what is promised on any device.

    What can't be had there is refused, and an operator without a rule pinned and named.
    """
    if row["verdict"].startswith(("BudgetError: no plan takes", "nothing to remove: aten.")):
        return []
    value, other = (number(row[name]) for name in ("value", "other"))
    asked = number(row["setting"].rpartition(" ")[2]) if row["check"] == "latency" else 1
    promised = {
        "exactness": row["verdict"] == "exact" and value <= 1e-4 and other <= 1e-4,
        "recovery": row["verdict"] == "repaired" and abs(value / other - 1) <= 0.02,
        "latency": abs(value / asked - 1) <= 0.07 and value < other,
        "two devices": "the model lies on 2 devices" in row["verdict"],
    }
    return [] if promised[row["check"]] else [row["check"]]


def test_what_runs_on_a_gpu_is_exact_and_meets_its_time() -> None:
    rows = written("gpu.csv")
    assert {(r["check"], r["model"], r["setting"]): r["verdict"] for r in rows
            if wrong_on_a_gpu(r)} == {}  # fmt: skip
    assert not rows or {row["check"] for row in rows} == {
        "exactness", "recovery", "latency", "two devices",
    }  # fmt: skip
    assert not rows or sum(row["verdict"] == "exact" for row in rows) >= 10
    assert not rows or sum(row["verdict"] == "timed" for row in rows) >= 3


@pytest.mark.parametrize(
    "row",
    [
        {"check": "exactness", "verdict": "exact", "value": "2e-4", "other": "1e-7"},
        {"check": "exactness", "verdict": "inexact", "value": "1e-7", "other": "1e-7"},
        {"check": "recovery", "verdict": "repaired", "value": "0.2", "other": "0.1"},
        {"check": "latency", "setting": "batch 1, 0.5", "value": "0.6", "other": "0.7"},
    ],
)
def test_what_fails_on_a_gpu_is_seen(row: Row) -> None:
    assert wrong_on_a_gpu({"verdict": "", "setting": "a 1", **row}) == [row["check"]]


def test_repairs_give_back_what_is_said() -> None:
    rows = read("repairs.csv")
    means = {
        (repair, level): statistics.mean(
            float(row["value"]) for row in rows if (row["repair"], row["level"]) == (repair, level)
        )
        for repair, level in {(row["repair"], row["level"]) for row in rows}
    }
    for level in ("0.7", "0.5"):
        assert means["batch norms without data", level] > means["cut", level] + 20
    for level in ("0.35", "0.25"):
        assert means["sequential", level] > means["auto", level]
    assert means["least squares", "half of dims"] < 0.5 * means["cut", "half of dims"]
    assert not [row for row in rows if "+" in row["commit"]]


def test_a_speed_up_has_its_neighbours_and_a_quiet_machine() -> None:
    rows = written("seeds.csv")
    races: dict[tuple[str, str], dict[tuple[str, str], Row]] = {}
    for row in rows:
        own = races.setdefault((row["recipe"], row["backend"]), {})
        own[row["engine"], row["round_to"]] = row
        assert abs(number(row["dense_vs_dense"]) - 1) <= 0.03, row
        assert not row["commit"].endswith("+"), row
    for race, own in races.items():
        assert set(own) == {("prunus", "1"), ("prunus", "16"), ("torch-pruning", "1")}, race
        ours, theirs = (own[name, "1"]["macs_ratio"] for name in ("prunus", "torch-pruning"))
        assert abs(number(theirs) / number(ours) - 1) <= 0.011, race
    assert not rows or len(races) == 2 * len(BACKENDS)


def test_every_model_is_exact() -> None:
    names, hidden = catalogue()
    rows = read("exactness.csv")
    assert [f"{row['library']}:{row['model']}" for row in rows] == names
    assert {row["model"]: broken(row, hidden) for row in rows if broken(row, hidden)} == {}


def test_every_budget_is_met() -> None:
    rows = read("budgets.csv")
    assert {tuple(row.values())[:4]: missed(row) for row in rows if missed(row)} == {}
    asked = [(cost, size, by) for cost in ("params", "macs", "bytes", "params+macs")
             for size in ("0.3", "0.5", "0.7") for by in CLOSE]  # fmt: skip
    asked += [("activation", size, "1") for size in ("0.3", "0.5", "0.7")]
    for name in BUDGETED:
        own = [(r["budget"], r["requested"], r["round_to"]) for r in rows if r["model"] == name]
        assert sorted(own) == sorted(asked), name
    assert {row["model"] for row in rows} == set(BUDGETED)


def below(rows: list[Row], least: float, median: float) -> list[str]:
    """What plans lack of the optimum."""
    ratios = [float(row["ratio"]) for row in rows]
    lacks = [row["instance"] for row in rows if float(row["bound"]) < float(row["optimum"]) - 1e-6]
    lacks += ["least"] if min(ratios) < least else []
    return lacks + (["median"] if statistics.median(ratios) < median else [])


def test_plans_are_near_the_optimum() -> None:
    rows = read("optimality.csv")
    assert len({row["instance"] for row in rows}) >= 197
    assert all(re.fullmatch("[0-9a-f]{7,}", row["commit"]) for row in rows)
    assert below(rows, 1 - 1e-6, 1 - 1e-6) == []


@pytest.mark.parametrize(
    ("change", "lacks"),
    [
        ({}, []),
        ({"ratio": "0.96"}, ["least", "median"]),
        ({"ratio": "0.99"}, ["median"]),
        ({"bound": "0.79"}, ["a"]),
    ],
)
def test_a_plan_that_is_too_far_is_seen(change: Row, lacks: list[str]) -> None:
    row = {"instance": "a", "ratio": "1", "optimum": "0.8", "bound": "0.9"}
    assert below([{**row, **change}], 0.97, 0.995) == lacks


def slow(rows: list[Row]) -> list[str]:
    """What sizes, smallest first, lack of the line on scale."""
    lacks = [
        f"trace {r['units']}" for r in rows if float(r["seconds"]) >= float(r["trace_seconds"])
    ]
    lacks += [f"memory {row['units']}" for row in rows if float(row["peak_mb"]) > 3000]
    first, last = ((int(r["units"]), float(r["seconds"])) for r in (rows[0], rows[-1]))
    growth = last[0] * math.log(last[0]) / (first[0] * math.log(first[0]))
    return lacks + (["growth"] if last[1] > growth * first[1] else [])


def test_planning_takes_less_than_tracing_and_grows_no_worse_than_n_log_n() -> None:
    rows = read("planner_scale.csv")
    assert all(re.fullmatch("[0-9a-f]{7,}", row["commit"]) for row in rows)
    assert len(rows) >= 4
    assert int(rows[-1]["units"]) > 450_000
    assert slow(rows) == []


@pytest.mark.parametrize(
    ("change", "lacks"),
    [
        ({}, []),
        ({"seconds": "5"}, ["trace 200", "growth"]),
        ({"seconds": "2.6"}, ["growth"]),
        ({"peak_mb": "3001"}, ["memory 200"]),
    ],
)
def test_a_planner_that_is_slow_is_seen(change: Row, lacks: list[str]) -> None:
    row = {"units": "100", "seconds": "1", "trace_seconds": "4", "peak_mb": "900"}
    assert slow([row, {**row, "units": "200", "seconds": "2", **change}]) == lacks


GOOD = {
    "model": "a", "library": "b", "verdict": "exact", "params_left": "0.5", "rel_err": "3e-07",
    "dtype": "float32", "rel_err64": "4e-16", "witness": "undecided (bmm)",
    "shadow": "agrees 1e-16", "unverified": "", "not_verified": "0", "moved_min": "2e-01",
    "line_holds": "yes",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "lacks"),
    [
        ({}, []),
        ({"verdict": "inexact"}, ["verdict"]),
        ({"params_left": "0.61"}, ["params_left"]),
        ({"rel_err": "1.1e-04"}, ["rel_err"]),
        ({"rel_err": "3e-06", "dtype": "float64"}, ["rel_err"]),
        ({"rel_err64": "2e-06"}, ["rel_err64"]),
        ({"rel_err64": "- (float32 only)"}, []),
        ({"shadow": "undecided"}, ["judges"]),
        ({"shadow": "undecided", "witness": "agrees 1e-7"}, []),
        ({"witness": "disagrees 1e-2"}, ["judges"]),
        ({"not_verified": "1"}, ["names"]),
        ({"not_verified": "1", "unverified": "x.weight[0]", "moved_min": "2e-04"}, []),
        ({"moved_min": "2e-04"}, ["moved_min"]),
        ({"unverified": "x.weight[0]", "not_verified": "1"}, ["moved_min"]),
        ({"rel_err": "", "dtype": ""}, ["rel_err"]),
        ({"line_holds": "no (verdict)"}, ["line_holds"]),
    ],
)
def test_a_row_that_breaks_the_line_is_seen(change: Row, lacks: list[str]) -> None:
    assert broken({**GOOD, **change}) == lacks


def test_a_time_that_is_missed_is_seen() -> None:
    row = {"requested": "0.5", "measured_ratio": "0.51", "dense_vs_dense": "1.01",
           "commit": "0123abc"}  # fmt: skip
    assert late(row) == []
    assert late({**row, "requested": "0.75"}) == ["lands"]
    assert late({**row, "measured_ratio": "0.54"}) == ["lands"]
    assert late({**row, "dense_vs_dense": "0.96"}) == ["quiet"]
    assert late({**row, "commit": "0123abc+"}) == ["commit"]


def test_a_budget_that_is_missed_is_seen() -> None:
    row = {"budget": "params", "requested": "0.5", "round_to": "1", "planned": "0.4999",
           "achieved": "0.4999", "unaligned": "0", "verdict": "met",
           "commit": "0123abc"}  # fmt: skip
    assert missed(row) == []
    assert missed({**row, "verdict": "refused: no"}) == ["verdict"]
    assert missed({**row, "achieved": "0.5001"}) == ["over"]
    assert missed({**row, "achieved": "0.48"}) == ["far"]
    assert missed({**row, "achieved": "0.485", "round_to": "8"}) == []
    assert missed({**row, "achieved": "0.45", "round_to": "32"}) == ["far"]
    assert missed({**row, "achieved": "0.31+0.4995"}) == []
    assert missed({**row, "achieved": "0.31+0.5001"}) == ["over"]
    assert missed({**row, "unaligned": "2"}) == ["unaligned"]
    assert missed({**row, "commit": "0123abc+"}) == ["commit"]
    memory = {**row, "budget": "activation", "planned": "0.4"}
    assert missed({**memory, "achieved": "0.415"}) == []
    assert missed({**memory, "achieved": "0.43"}) == ["agrees"]
    refused = "refused: no plan reaches activation at head (operator 3) ≤ 9"
    assert missed({**memory, "verdict": refused}) == []
    assert missed({**row, "verdict": refused}) == ["verdict"]
    assert missed({**memory, "planned": "0.51", "achieved": "0.51"}) == ["over"]


def fails(row: Row) -> bool:
    """Whether a row of transformers.csv is less than promised.

    A config that can't say what is asked refuses it, in uniform mode alone.
    """
    if row["mode"] == "uniform" and row["verdict"].startswith("refused: "):
        return False
    answers = row["logits"] == "equal" and row["generate"] in ("equal", "")
    lives = row["live"] == "equal" or (row["mode"], row["live"]) == ("free", "refused")
    return not (
        row["verdict"] == "exact"
        and number(row["rel_err"]) <= 1e-4
        and float(row["moved"] or 0) > 1e-3
        and float(row["share"] or 0) >= 0.25
        and row["witness"] in ("same tokens", "same outputs")
        and (row["loads"] == "yes" and answers and lives)
    )


def test_heads_chosen_by_the_measured_error_keep_the_embeddings() -> None:
    """The target of a row; a ratio without one is written down as it was reached."""
    rows = [row for row in read("heads.csv") if row["scope"] == "measured"]
    found = {float(row["ratio"]): row for row in rows}
    assert float(found[0.3]["fidelity"]) >= 0.96
    assert (found[0.3]["removed"], found[0.3]["verdict"]) == ("22", "exact")
    single = [float(row["fidelity"]) for row in read("heads.csv") if row["repair"] == "none"
              and float(row["ratio"]) == 0.3]  # fmt: skip
    assert float(found[0.3]["fidelity"]) > max(single)


AMISS = {
    *((("t5", mode, what)) for mode in ("free", "uniform") for what in ("layers", "all")),
    ("switch", "free", "layers"),
    ("dinov2", "free", "layers"),
}
"""Rows that are less than promised.

Plain transformers fails alike to generate with T5 of fewer layers in the encoder than in the
decoder.  ``save_pretrained`` of the other two writes a config that does not describe the layers
that are left, and should refuse.
"""


def test_structures_of_transformers_are_exact_and_load() -> None:
    rows = read("transformers.csv")
    assert {(row["model"], row["mode"], row["structure"]) for row in rows if fails(row)} == AMISS
    found: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        found.setdefault((row["model"], row["mode"]), set()).add(row["structure"])
    lacking = {model for (model, _), has in found.items() if not {"heads", "layers", "all"} <= has}
    assert lacking == {"phi3"}  # one number of its config sizes the slices of all layers: pinned
    assert {mode for _, mode in found} == {"free", "uniform"}
    assert len({model for model, _ in found}) >= 28
    mixtures = {model for (model, _), structures in found.items() if "experts" in structures}
    assert {"mixtral", "deepseek-v3"} <= mixtures
    refused = [row for row in rows if row["verdict"].startswith("refused: ")]
    assert {row["mode"] for row in refused} == {"uniform"}  # what a plain config can't say
    assert len(refused) < 0.3 * sum(row["mode"] == "uniform" for row in rows)


@pytest.mark.parametrize(
    ("cell", "value"),
    [("verdict", "not verified"), ("rel_err", "2e-4"), ("moved", "1e-4"), ("share", "0.246"),
     ("witness", "differs by 3.6e-02, moved 0.0e+00"), ("loads", "OSError"),
     ("logits", "differs by 1.0e-02"), ("generate", "differs by inf"), ("live", "KeyError")],
)  # fmt: skip
def test_a_row_of_transformers_that_is_less_is_seen(cell: str, value: str) -> None:
    for mode in ("free", "uniform"):
        row = next(row for row in read("transformers.csv") if row["mode"] == mode)
        assert not fails(row)
        assert fails({**row, cell: value})


def test_experts_by_what_they_add_beat_norms_and_chance() -> None:
    rows = read("experts.csv")
    assert {row["verdict"] for row in rows} == {"exact"}
    for removed in ("0.25", "0.5"):
        own = [row for row in rows if row["removed"] == removed]
        assert {(row["structure"], row["importance"]) for row in own} == {
            *(("experts", name) for name in ("reap", "l2", "random")),
            *(("ffn", name) for name in ("activation", "l2", "random")),
        }
        shares = [float(row["params_ratio"]) for row in own]
        assert max(shares) - min(shares) < 0.01
        loss = {
            name: statistics.mean(
                float(row["perplexity"]) / float(row["dense_perplexity"])
                for row in own
                if (row["structure"], row["importance"]) == ("experts", name)
            )
            for name in ("reap", "l2", "random")
        }
        assert 1 < loss["reap"] < min(loss["l2"], loss["random"])


def test_uniform_requests_end_in_folders_or_refusals() -> None:
    rows = read("uniform.csv")
    assert len(rows) == 60
    assert sum(row["feasible"] == "True" for row in rows) >= 40
    assert {row["ended"] for row in rows} == {"folder", "refused"}
    assert all(float(row["gap"]) <= 1e-5 for row in rows if row["ended"] == "folder")
    wrong = [row for row in rows if row["right"] != "True"]
    # Heads of Phi-3, cut out of one tensor by sizes that all layers read of one config, are pinned.
    assert {(row["model"], row["ended"]) for row in wrong} <= {("phi3", "refused")}
    assert len(wrong) <= 2


def test_the_fuzz_found_no_wrong_answer() -> None:
    rows = read("fuzz.csv")
    assert sum(int(row["networks"]) for row in rows) == 10_000
    assert sum(int(row["wrong"]) for row in rows) == 0
    assert sum(int(row["judges_undecided"]) for row in rows) <= 10


def test_statistics_cost_what_is_promised() -> None:
    """The pass five forwards and 3 GB at most, the solve less than the pass."""
    rows = {row["what"]: row for row in read("statistics_cost.csv")}
    assert rows["forward"]["images"] == rows["pass"]["images"] == "256"
    assert float(rows["pass"]["times_forward"]) <= 5
    assert float(rows["pass"]["peak_mb"]) - float(rows["forward"]["peak_mb"]) <= 3 * 1024
    assert float(rows["solve"]["seconds"]) < float(rows["pass"]["seconds"])
    assert not [row for row in rows.values() if "+" in row["commit"]]


def test_sensitivity_beats_equal_ratios_by_the_metric_that_it_read() -> None:
    found = {(row["ratios"], row["recovery"], row["level"]): row for row in read("sensitivity.csv")}
    levels = {level for _, _, level in found}
    assert levels == {"0.7", "0.5", "0.35"}
    assert len(found) == 3 * 3 * len(levels)
    for (_, _, level), row in found.items():
        assert float(level) - 0.02 <= float(row["macs_ratio"]) <= float(level)
        assert row["images"] == "2000"
        assert not row["commit"].endswith("+")
    for level in levels:
        cut = {way: float(row["metric"]) for (way, r, at), row in found.items()
               if (r, at) == ("cut", level)}  # fmt: skip
        assert cut["equal"] < min(cut["sensitivity"], cut["search"])


LEVELS = ("0.7", "0.5", "0.35", "0.25")
BEST = ("prunus", "obs", "local", "least squares + recalibrated")
"""The setting that is held to the promise; what ``shrink(importance="obs")`` does."""


def losses(rows: list[Row]) -> dict[tuple[str, ...], dict[str, float]]:
    """Mean loss of accuracy by setting and level, in points; only of what keeps its bound."""
    found: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for row in rows:
        if row["accuracy"] and float(row["macs_ratio"]) <= float(row["level"]):
            setting = tuple(row[key] for key in ("engine", "importance", "scope", "recovery"))
            lost = float(row["dense_accuracy"]) - float(row["accuracy"])
            found.setdefault(setting, {}).setdefault(row["level"], []).append(lost)
    return {
        setting: {level: sum(values) / len(values) for level, values in levels.items()}
        for setting, levels in found.items()
    }


def less_than_promised(rows: list[Row]) -> list[str]:
    """At half the MACs two points at most; everywhere half of what the best peer setting loses."""
    lost = losses(rows)
    ours = lost[BEST]
    wrong = ["0.5: two points"] if ours["0.5"] > 2 else []
    for level in LEVELS:
        peers = [v[level] for s, v in lost.items() if s[0] != "prunus" and level in v]
        if ours[level] > min(peers) / 2:
            wrong.append(f"{level}: half of the peers' loss")
    return wrong


def test_one_shot_accuracy_is_what_is_promised() -> None:
    rows = read("oneshot_fmnist.csv")
    assert less_than_promised(rows) == []
    ours = {(r["importance"], r["recovery"], r["level"], r["seed"])
            for r in rows if r["engine"] == "prunus"}  # fmt: skip
    assert len(ours) == 5 * 5 * len(LEVELS) * 5
    assert {r["images"] for r in rows if r["accuracy"]} == {"10000"}
    assert {r["engine"] for r in rows} == {"prunus", "torch-pruning", "torch-kirigami"}


def test_accuracy_that_is_less_is_seen() -> None:
    known = {"scope": "local", "level": "0.5", "macs_ratio": "0.49", "dense_accuracy": "93"}

    def one(engine: str, accuracy: float, **more: str) -> list[Row]:
        importance, recovery = BEST[1], BEST[3]
        cell = {"engine": engine, "importance": importance, "recovery": recovery, **known, **more}
        return [{**cell, "level": level, "accuracy": str(accuracy),
                 "macs_ratio": more.get("macs_ratio", level)} for level in LEVELS]  # fmt: skip

    assert less_than_promised(one("prunus", 92) + one("peer", 90)) == []
    assert less_than_promised(one("prunus", 90.9) + one("peer", 80)) == ["0.5: two points"]
    assert len(less_than_promised(one("prunus", 92) + one("peer", 91.5))) == len(LEVELS)
    assert less_than_promised(one("prunus", 92) + one("peer", 90) + one("peer", 92.9,
                              importance="x", macs_ratio="0.9")) == []  # fmt: skip


def test_models_with_real_weights_are_measured_on_enough_inputs() -> None:
    rows = read("oneshot_pretrained.csv")
    assert rows
    assert all(int(row["inputs"]) >= 100 for row in rows)
    assert all(float(row["macs_ratio"]) <= float(row["level"]) for row in rows)
    assert not [row for row in rows if "+" in row["commit"]]


def test_every_attack_was_held() -> None:
    rows = read("attacks.csv")
    tried = {row["kind"].partition(" ")[0]: int(row["tried"]) for row in rows}
    structural = {row["kind"]: int(row["tried"]) for row in rows if "structural" in row["kind"]}
    assert structural["structural mutations of plans"] >= 10_000
    assert structural["structural mutations of files"] >= 2_000
    assert tried["errors"] + tried["signals"] >= 500
    assert tried["threads"] >= 16
    assert [row for row in rows if row["tried"] != row["held"]] == []


def test_every_killed_run_ends_as_the_undisturbed_one() -> None:
    rows = read("kill_resume.csv")
    assert len(rows) == 20
    assert {row["verdict"] for row in rows} == {"held"}
    assert {row["same_plan"] for row in rows} == {row["same_weights"] for row in rows} == {"yes"}
    assert len({row["rounds_done"] for row in rows}) > 4  # kills fell between and into rounds


def test_pruned_models_of_ultralytics_stay_pruned() -> None:
    rows = [row for row in read("training_survival.csv") if row["framework"] == "ultralytics"]
    assert len({row["model"] for row in rows}) >= 5
    for row in rows:
        assert row["verdict"] == ("exact" if row["step"] == "shrink" else "ok"), row
        assert int(row["params_after"]) <= int(row["params_before"]), row
        assert row["optimizer_live"] in ("", "1.0"), row
        assert float(row["ema_distance"] or 0) < 1e-5, row
        if row["step"] in ("reopen", "onnx", "fuse"):
            assert float(row["metric"]) <= 1e-4, row
