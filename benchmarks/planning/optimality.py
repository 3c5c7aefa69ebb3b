"""How near the planner comes to the best choice there is; ``results/optimality.csv``.

    python -m benchmarks.planning.optimality  # 200 instances
    python -m benchmarks.planning.optimality --count 20  # the first ones; their rows are replaced

An instance is a small network drawn from a seed, traced, with random scores and one budget or two.
The optimum is found by trying every set of units, on costs and constraints that are read from the
traced graph but counted here; where the plan uses the tightest bound to within 1 % of the dense
cost (``room``), of the sets that do so too, since a closer plan comes before a more important one.
``kept`` and ``optimum`` are parts of the sum of all scores, each group's divided by its mean;
``bound`` is what the plan says that no choice exceeds.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import prunus
from benchmarks.rows import Table, commit

TABLE = Table(
    "optimality.csv",
    (
        "instance", "budget", "units", "room", "kept", "optimum", "ratio", "bound", "commit",
    ),
    ("instance",),
)  # fmt: skip
CLOSE = 0.01
COUNT = 200
MOST_UNITS = 18
CHUNK = 1 << 14


class Residual(nn.Module):
    """A hidden width beside a stream."""

    def __init__(self, stream: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Conv2d(stream, hidden, 3, padding=1)
        self.down = nn.Conv2d(hidden, stream, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Concatenate(nn.Module):
    """A layer whose output stands beside its input."""

    def __init__(self, stream: int, growth: int) -> None:
        super().__init__()
        self.grow = nn.Conv2d(stream, growth, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, torch.relu(self.grow(x))], dim=1)


class Heads(nn.Module):
    """Attention over the pixels, its heads and their dims both prunable."""

    def __init__(self, stream: int, heads: int, dim: int) -> None:
        super().__init__()
        self.heads, self.dim = heads, dim
        self.qkv = nn.ModuleList(nn.Linear(stream, heads * dim) for _ in range(3))
        self.out = nn.Linear(heads * dim, stream)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        shape = (*tokens.shape[:2], self.heads, self.dim)
        query, key, value = (layer(tokens).view(shape).transpose(1, 2) for layer in self.qkv)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        mixed = mixed.transpose(1, 2).flatten(2)
        return x + self.out(mixed).transpose(1, 2).reshape(x.shape)


def network(draw: random.Random) -> nn.Module:
    """A stem, one to three blocks, a classifier."""
    width = draw.randint(2, 6)
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU()]
    for _ in range(draw.randint(1, 3)):
        kind = draw.choice(("plain", "pool", "depthwise", "grouped", "residual", "concat", "heads"))
        size = draw.randint(2, 6)
        if kind == "residual":
            layers.append(Residual(width, size))
        elif kind == "concat":
            layers.append(Concatenate(width, size))
            width += size
        elif kind == "heads":
            layers.append(Heads(width, draw.randint(2, 3), draw.randint(2, 3)))
        else:
            if kind == "pool":
                layers.append(nn.MaxPool2d(2, ceil_mode=True))
            if kind == "depthwise":
                layers.append(nn.Conv2d(width, width, 3, padding=1, groups=width))
            groups = 2 if kind == "grouped" and width % 2 == 0 else 1
            size += size % groups
            layers += [nn.Conv2d(width, size, 3, padding=1, groups=groups), nn.ReLU()]
            width = size
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)).eval()


def scores_of(graph: prunus.CouplingGraph, draw: random.Random) -> np.ndarray:
    """Random scores, of one of three kinds of spread."""
    kinds: tuple[Any, ...] = (
        lambda: draw.uniform(0.05, 1),
        lambda: draw.expovariate(1),
        lambda: draw.lognormvariate(0, 1),
    )
    kind = draw.choice(kinds)
    return np.array([np.inf, *(kind() for _ in range(graph.unit_count))])


def bounds_of(draw: random.Random) -> dict[str, float]:
    """One budget, or two at once."""
    names = draw.choice((("params",), ("macs",), ("params", "macs")))
    return {name: round(draw.uniform(0.3, 0.85), 2) for name in names}


def instances(count: int) -> Iterator[tuple[str, nn.Module, Any, np.ndarray, prunus.Budget]]:
    """The first instances, in the order of their seeds; larger networks are passed over."""
    seed = found = 0
    while found < count:
        draw = random.Random(seed)
        torch.manual_seed(seed)
        model = network(draw)
        graph = prunus.trace(model, (torch.randn(1, 3, 8, 8),))
        if 4 <= graph.unit_count <= MOST_UNITS:
            found += 1
            yield (
                f"seed {seed}",
                model,
                graph,
                scores_of(graph, draw),
                prunus.Budget(**bounds_of(draw)),
            )
        seed += 1


def optimum(graph: Any, weights: np.ndarray, budget: prunus.Budget, most: float) -> float | None:
    """The largest sum of weights under the budget, and not more than ``most`` of the dense cost
    under its tightest bound, by trying every set of units.

    Every dim and every group keep something, and all constraints hold; None if no set does.
    """
    limits = budget.limits(graph)
    best: float | None = None
    every = np.arange(1 << graph.unit_count)
    for at in range(0, len(every), CHUNK):
        bits = every[at : at + CHUNK, None] >> np.arange(graph.unit_count) & 1
        kept = np.concatenate([np.ones((len(bits), 1), dtype=bool), bits.astype(bool)], axis=1)
        good = np.ones(len(kept), dtype=bool)
        for group in graph.groups:
            good &= kept[:, group.units].any(axis=1)
        for label in graph.labels.values():
            good &= kept[:, label].all(axis=2).any(axis=1)
        for constraint in graph.constraints:
            good &= holds(constraint, kept)
        room = np.ones(len(kept))
        for name, limit in limits.items():
            room = np.minimum(room, (limit - cost_of(graph, name, kept)) / graph.cost(name))
        good &= (room >= 0) & (room <= most)
        if good.any():
            found = float((kept[good][:, 1:] @ weights[1:]).max())
            best = found if best is None else max(best, found)
    return best


def holds(constraint: Any, kept: np.ndarray) -> np.ndarray:
    """Which of the masks respect a constraint."""
    if hasattr(constraint, "sets"):
        gone = np.stack([(~kept[:, units]).sum(axis=1) for units in constraint.sets])
        return np.asarray((gone == gone[0]).all(axis=0))
    stay = kept[:, constraint.label].all(axis=2).sum(axis=1)
    multiple = getattr(constraint, "multiple", None)
    return np.asarray(stay > 0 if multiple is None else stay % multiple == 0)


def cost_of(graph: Any, name: str, kept: np.ndarray) -> np.ndarray:
    """A cost for every mask."""
    widths = [kept[:, label].all(axis=2).sum(axis=1) for label in graph.width_labels]
    total = np.full(len(kept), graph.costs[name].fixed)
    for term in graph.costs[name].terms:
        product = np.full(len(kept), term.constant)
        for width in term.widths:
            product *= widths[width]
        total += product
    return total


def examine(
    instance: str, model: nn.Module, graph: Any, scores: np.ndarray, budget: prunus.Budget
) -> list[dict[str, Any]]:
    """One row; none where no set of units lies under the budget."""
    weights = scores.copy()
    for group in graph.groups:
        weights[group.units] /= weights[group.units].mean()
    total = weights[1:].sum()
    row = {
        "instance": instance,
        "budget": " ".join(f"{name}={value}" for name, value in budget.requested.items()),
        "units": graph.unit_count,
        "commit": commit(),
    }
    try:
        plan = prunus.plan(
            graph, model, budget=budget, scope="global", round_to=1, max_ratio=1.0,
            importance=lambda group, _: scores[group.units],
        )  # fmt: skip
    except prunus.PrunusError as refused:
        best = optimum(graph, weights, budget, 1.0)
        missed = row | {"room": "", "kept": "0", "optimum": f"{(best or 0) / total:.6f}"}
        return [] if best is None else [missed | {"ratio": "0", "bound": str(refused)[:60]}]
    room = min(
        (limit - plan.costs[name][1]) / plan.costs[name][0]
        for name, limit in budget.limits(graph).items()
    )
    best = optimum(graph, weights, budget, CLOSE if room <= CLOSE else 1.0)
    gone = [weights[graph.group(g.name).units[list(g.removed)]].sum() for g in plan.groups]
    kept = total - sum(gone)
    return [row | {
        "room": f"{room:.4f}",
        "kept": f"{kept / total:.6f}",
        "optimum": f"{(best or 0) / total:.6f}",
        "ratio": f"{kept / best if best else 0:.6f}",
        "bound": f"{plan.origin['bound']:.6f}",
    }]  # fmt: skip


def main() -> None:
    """Examine the instances and replace their rows."""
    parser = TABLE.parser(__doc__)
    parser.add_argument("--count", type=int, default=COUNT)
    options = parser.parse_args()
    ratios = []
    for instance in instances(options.count):
        rows = examine(*instance)
        options.table.add(*rows)
        ratios += [float(row["ratio"]) for row in rows]
    print(f"least {min(ratios):.4f}, median {np.median(ratios):.4f}")


if __name__ == "__main__":
    main()
