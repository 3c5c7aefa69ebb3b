"""An iterative run that is killed and resumed ends as the run that nobody killed.

    python -m benchmarks.training.kill_resume   # writes results/kill_resume.csv, three minutes

A small network with dropout trains on random images, under a :class:`prunus.Schedule` of six
rounds.  After every epoch a checkpoint (model, optimizer, schedule) takes the place of the last one
by an atomic rename.  The process gets SIGKILL at a random moment, one in each twentieth of the
run; another process, with a fresh model, reads what checkpoint there is and trains on to the end.
Its plan and weights are compared, bit for bit, with those of the undisturbed run.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import prunus
from benchmarks.rows import Table, commit

EPOCHS, BATCHES = 40, 8
TABLE = Table(
    "kill_resume.csv",
    (
        *("kill", "seconds", "checkpoint", "draft_left", "epochs_done", "rounds_done"),
        *("same_plan", "same_weights", "verdict", "commit"),
    ),
    ("kill",),
)


def build() -> nn.Sequential:
    """The original network, always the same."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 48, 3, stride=2, padding=1), nn.BatchNorm2d(48), nn.ReLU()),
        *(nn.Conv2d(48, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 10)),
    )


def schedule_of(model: nn.Module) -> prunus.Schedule:
    """Six rounds, to 30 % of the MACs."""
    inputs = torch.zeros(2, 3, 12, 12)
    return prunus.Schedule(model, inputs, budget=prunus.Budget(macs=0.3), steps=6)


def train(folder: Path) -> None:
    """Train to the end, from the checkpoint if there is one."""
    torch.set_num_threads(1)
    model = build()
    schedule = schedule_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first, path = 0, folder / "checkpoint.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        schedule.load_state_dict(saved["schedule"])
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["epoch"]
    for epoch in range(first, EPOCHS):
        schedule.step(epoch / EPOCHS, optimizer=optimizer)
        for _ in range(BATCHES):
            images, labels = torch.randn(16, 3, 12, 12), torch.randint(0, 10, (16,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        state = {
            "schedule": schedule.state_dict(),
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "epoch": epoch + 1,
        }
        torch.save(state, folder / "draft.pt")
        os.replace(folder / "draft.pt", path)


def run(folder: Path, seconds: float | None = None) -> float:
    """Train in a process of its own, which is killed after some seconds; how long it ran."""
    process = multiprocessing.get_context("fork").Process(target=train, args=(folder,))
    started = time.perf_counter()
    process.start()
    process.join(seconds)
    ran = time.perf_counter() - started
    if seconds is not None:
        process.kill()
        process.join()
    elif process.exitcode:
        raise RuntimeError(f"the process died: {process.exitcode}")
    return ran


def read(folder: Path) -> dict[str, Any]:
    """The checkpoint; empty where there is none yet."""
    path = folder / "checkpoint.pt"
    return torch.load(path, weights_only=True) if path.exists() else {}


def attempt(whole: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Kill a run, resume it, and compare the end."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(folder, seconds)
        draft = (folder / "draft.pt").exists()
        try:
            found = read(folder)
            checkpoint = "whole" if found else "none"
        except Exception as error:  # whatever a half-written file makes torch.load raise
            found, checkpoint = {}, f"broken: {type(error).__name__}"
        run(folder)
        end = read(folder)
    plans = [prunus.Plan.from_json(text) for text in end["schedule"]["plans"]]
    same_plan = end["schedule"]["plans"] == whole["schedule"]["plans"]
    same_weights = end["model"].keys() == whole["model"].keys() and all(
        torch.equal(value, whole["model"][name]) for name, value in end["model"].items()
    )
    held = same_plan and same_weights and len(plans) > 1 and not checkpoint.startswith("broken")
    return {
        "seconds": round(seconds, 3),
        "checkpoint": checkpoint,
        "draft_left": "yes" if draft else "no",
        "epochs_done": found.get("epoch", 0),
        "rounds_done": found["schedule"]["round"] if found else 0,
        "same_plan": "yes" if same_plan else "no",
        "same_weights": "yes" if same_weights else "no",
        "verdict": "held" if held else "broken",
    }


def main() -> None:
    """Run once undisturbed, then once for every kill."""
    parser = TABLE.parser(__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    torch.set_num_threads(1)
    schedule_of(build())  # what is loaded on first use is there before processes fork
    with tempfile.TemporaryDirectory() as name:
        duration = run(Path(name))
        whole = read(Path(name))
    for kill in range(options.kills):
        seconds = (kill + draw.random()) / options.kills * duration
        options.table.add({"kill": kill, **attempt(whole, seconds), "commit": commit()})


if __name__ == "__main__":
    main()
