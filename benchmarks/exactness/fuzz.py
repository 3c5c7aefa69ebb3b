"""Prune random networks at random and let judges that share nothing with the engine object.

    python -m benchmarks.exactness.fuzz --count 10000  # an hour on one core; resumes

Network number N is drawn from seed N (``tests/random_networks.py``), pruned by a random share and
verified; where the certificate does not say *inexact*, ``prunus.mask``, the second witness and the
shadow run judge it.  ``results/fuzz.csv`` has one row for every hundred networks.  A network that
breaks the promise is printed with its seed: it belongs into ``tests/test_random_networks.py``.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import sys
import time
from collections import Counter
from pathlib import Path

from benchmarks.rows import commit

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parents[1] / "results" / "fuzz.csv"
CHUNK = 100
FIELDS = (
    "first_seed", "networks", "exact", "not_verified", "inexact", "refused", "judges_undecided",
    "wrong", "seconds", "commit",
)  # fmt: skip
FIRST = 10_000
"""Seeds below this one are the test-suite's."""


def examine_chunk(first: int) -> dict[str, object]:
    """The row for the networks of one chunk."""
    from tests.random_networks import from_seed
    from tests.test_random_networks import examine

    counts: Counter[str] = Counter()
    started = time.perf_counter()
    for seed in range(first, first + CHUNK):
        found = examine(from_seed(seed), seed)
        counts[found.verdict.replace(" ", "_") or "refused"] += 1
        counts["judges_undecided"] += bool(found.undecided)
        if found.wrong:
            counts["wrong"] += 1
            print(f"seed {seed}: {found}", flush=True)
    row: dict[str, object] = {name: counts[name] for name in FIELDS}
    return row | {
        "first_seed": first,
        "networks": CHUNK,
        "seconds": round(time.perf_counter() - started),
        "commit": commit(),
    }


def _save(rows: list[dict[str, object]], out: Path) -> None:
    draft = out.with_suffix(".tmp")
    with draft.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: int(str(row["first_seed"]))))
    os.replace(draft, out)


def main() -> None:
    """Go on where the last run ended, and save every chunk."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=10_000, help="networks in all")
    parser.add_argument("--jobs", type=int, default=1, help="chunks at a time")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    import torch

    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    if options.out.exists():
        with options.out.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    known = {int(str(row["first_seed"])) for row in rows}
    wanted = range(FIRST, FIRST + options.count, CHUNK)
    with multiprocessing.get_context("fork").Pool(options.jobs) as pool:
        for row in pool.imap_unordered(examine_chunk, [n for n in wanted if n not in known]):
            rows.append(row)
            _save(rows, options.out)
            print(row, flush=True)
    print({name: sum(int(str(row[name])) for row in rows) for name in FIELDS[1:-1]})


if __name__ == "__main__":
    main()
