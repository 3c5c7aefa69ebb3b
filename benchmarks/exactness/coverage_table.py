"""The coverage benchmark's rows as a table that people read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

Row = dict[str, str]
OURS = "prunus"
PEERS = {
    "torch-pruning": "torch-pruning",
    "torch-pruning+hints": "torch-pruning",
    "torch-kirigami": "torch-kirigami",
}
"""Engine → the package whose version its rows state."""

ENOUGH = 0.75
"""A model that keeps a larger share of its parameters was not really pruned."""


def succeeds(row: Row) -> bool:
    """Half asked for, at most 0.75 left, own forward, same shapes; ours must be exact as well."""
    proven = row["verdict"] == "exact" or row["engine"] != OURS
    return row["status"] == "ok" and proven


def render(rows: Sequence[Row]) -> str:
    """A table of all engines by library, and what ours does not do."""
    libraries = sorted({row["library"] for row in rows})
    lines = [
        "# Coverage",
        "",
        "Models as their libraries build them, no hints, half of the parameters asked for.",
        f"A success keeps at most {ENOUGH:.0%}, runs its own forward, answers in the same shapes;",
        "ours is exact as well. *wrong* counts results that run and are inexact; *out of time*",
        "those that were stopped, the other engines after 60 s of processor time.",
        "",
        "| engine | " + " | ".join(libraries) + " | all | wrong | out of time |",
        "|---|" + "---|" * (len(libraries) + 3),
    ]
    for engine in (OURS, *PEERS):
        own = [row for row in rows if row["engine"] == engine]
        if not own:
            continue
        cells = []
        for library in (*libraries, ""):
            some = [row for row in own if library in ("", row["library"])]
            good = sum(map(succeeds, some))
            cells.append(f"{good} of {len(some)} ({good / max(len(some), 1):.0%})")
        wrong = sum(row["verdict"] == "inexact" and row["status"] == "ok" for row in own)
        told = "flagged" if engine == OURS else "silent"
        cells += [f"{wrong} {told}", str(sum(row["status"] == "timeout" for row in own))]
        lines.append(f"| {engine} {own[0].get('version', '')} | {' | '.join(cells)} |")
    ours = [row for row in rows if row["engine"] == OURS]
    if ours:
        lines += ["", "## Prunus", "", *_details(ours, libraries)]
    return "\n".join(lines) + "\n"


def _details(ours: Sequence[Row], libraries: Sequence[str]) -> list[str]:
    lines = [
        "| library | median share of parameters on a prunable axis "
        "| witness agrees, undecided, disagrees | shadow agrees, undecided, disagrees |",
        "|---|---|---|---|",
    ]
    for library in libraries:
        some = [row for row in ours if row["library"] == library]
        shares = sorted(float(row["prunable_share"] or 0) for row in some)
        cells = [f"{shares[len(shares) // 2]:.3f}" if shares else ""]
        for judge in ("witness", "shadow"):
            said = Counter(row.get(judge, "").partition(" ")[0] for row in some)
            cells.append(f"{said['agrees']}, {said['undecided']}, {said['disagrees']}")
        lines.append(f"| {library} | {' | '.join(cells)} |")
    slow = [r for r in ours if r["seconds"] and r.get("forward_s")
            and float(r["seconds"]) > 10 * float(r["forward_s"]) + 20]  # fmt: skip
    lines += [
        "",
        "A proof runs the model a dozen times, some in float64, and anew for a rejected group. "
        f"Slower than ten plain forwards and 20 s: {len(slow)}.",
    ]
    lines += [f"- {r['library']}:{r['model']}: {r['seconds']} s, one forward {r['forward_s']} s"
              for r in slow]  # fmt: skip
    lines += ["", "Not a success:", ""]
    for row in ours:
        if not succeeds(row):
            why = row["reason"] or f"keeps {row['param_ratio']}; pinned by {row['pins']}"
            lines.append(f"- {row['library']}:{row['model']}: {row['status']}, "
                         f"{row['verdict'] or 'no verdict'}: {why}")  # fmt: skip
    return lines
