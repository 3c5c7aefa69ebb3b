"""Prune random networks at random and let judges that share nothing with the engine object.

    python -m benchmarks.exactness.fuzz --count 10000  # an hour on one core; resumes

Network number N is drawn from seed N (``tests/random_networks.py``), pruned by a random share and
verified; where the certificate does not say *inexact*, ``prunus.mask``, the second witness and the
shadow run judge it.  ``results/fuzz.csv`` has one row for every hundred networks.  A network that
breaks the promise is printed with its seed: it belongs into ``tests/test_random_networks.py``.
"""

from __future__ import annotations

import multiprocessing
import time
from collections import Counter
from functools import partial

import torch

from benchmarks.rows import Row, Table, commit
from tests.random_networks import from_seed
from tests.test_random_networks import examine

TABLE = Table(
    "fuzz.csv",
    (
        "first_seed", "networks", "exact", "not_verified", "inexact", "refused",
        "judges_undecided", "wrong", "seconds", "commit",
    ),
    ("first_seed",),
    lambda row: int(row["first_seed"]),
)  # fmt: skip
FIRST = 10_000
"""Seeds below this one are the test-suite's."""


def examine_chunk(first: int, size: int) -> Row:
    """The row for the networks of one chunk."""
    counts: Counter[str] = Counter()
    started = time.perf_counter()
    for seed in range(first, first + size):
        found = examine(from_seed(seed), seed)
        counts[found.verdict.replace(" ", "_") or "refused"] += 1
        counts["judges_undecided"] += bool(found.undecided)
        if found.wrong:
            counts["wrong"] += 1
            print(f"seed {seed}: {found}", flush=True)
    return {name: counts[name] for name in TABLE.fields} | {
        "first_seed": first,
        "networks": size,
        "seconds": round(time.perf_counter() - started),
        "commit": commit(),
    }


def main() -> None:
    """Go on where the last run ended, and save every chunk."""
    parser = TABLE.parser(__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="networks in all")
    parser.add_argument("--chunk", type=int, default=100, help="networks of a row")
    parser.add_argument("--jobs", type=int, default=1, help="chunks at a time")
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = {int(first) for (first,) in options.table.done()}
    wanted = range(FIRST, FIRST + options.count, options.chunk)
    examine_one = partial(examine_chunk, size=options.chunk)
    with multiprocessing.get_context("fork").Pool(options.jobs) as pool:
        for row in pool.imap_unordered(examine_one, [n for n in wanted if n not in known]):
            options.table.add(row)
    rows = options.table.read()
    print({name: sum(int(row[name]) for row in rows) for name in TABLE.fields[1:-1]})


if __name__ == "__main__":
    main()
