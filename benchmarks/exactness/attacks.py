"""Attacks on the engine, counted: files from strangers, and what else may happen to a call.

    OMP_NUM_THREADS=1 python -m benchmarks.exactness.attacks   # all kinds, about ten minutes
    OMP_NUM_THREADS=1 python -m benchmarks.exactness.attacks --kind files --count 200

``results/attacks.csv`` has one row for each kind: how many attacks were tried, and how many held.
One holds where nothing but Prunus' own errors comes out, what was refused leaves the model as it
was, and nothing outside the model changes; ``tests/attacks.py`` says how that is seen.
"""

from __future__ import annotations

import gc
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from benchmarks.rows import Table
from tests import interrupt_attacks
from tests.attacks import Observer, Tally
from tests.file_attacks import attack_with_files
from tests.plan_attacks import attack_with_plans

TABLE = Table("attacks.csv", ("kind", "tried", "held"), ("kind",))

CHUNK = 250
"""Attacks between two looks at the table: what was tried is never lost."""

Attack = Callable[[int, int], Tally]
"""Called with how many to try and a seed."""


def _interrupts(attack: Callable[..., Any]) -> Attack:
    def run(count: int, seed: int) -> Tally:
        tally = Tally()
        attack(count, seed, tally.add)
        return tally

    return run


KINDS: dict[str, tuple[str, int, Attack]] = {
    "plans": ("structural mutations of plans", 10_000,
              lambda count, seed: attack_with_plans(count, Observer(), seed)),
    "files": ("structural mutations of files", 2_000,
              lambda count, seed: attack_with_files(count, Observer(), seed)),
    "lines": ("errors at random lines of apply and shrink", 250,
              _interrupts(interrupt_attacks.interrupt_lines)),
    "signals": ("signals at random moments of apply and shrink", 250,
                _interrupts(interrupt_attacks.interrupt_by_signals)),
    "threads": ("threads that shrink and answer at once", 16,
                _interrupts(interrupt_attacks.shrink_in_threads)),
}  # fmt: skip
"""Name on the command line → what the table calls it, how many are tried, and what tries them."""


def main() -> int:
    """Run the kinds that were asked for; 1 if an attack got through."""
    parser = TABLE.parser(__doc__)
    parser.add_argument("--kind", action="append", choices=KINDS, help="only these; all by default")
    parser.add_argument("--count", type=int, help="how many of each; the table's number by default")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    broken = 0
    for name in options.kind or KINDS:
        title, count, attack = KINDS[name]
        attack(10, options.seed + 1)  # which imports all that is needed
        gc.freeze()  # traces look through all that is alive
        broken += _try(options.table, title, options.count or count, attack, options.seed)
    return 1 if broken else 0


def _try(table: Table, title: str, count: int, attack: Attack, seed: int) -> int:
    """Try one kind, a chunk after the other; how many got through."""
    tried = held = 0
    notes: Counter[str] = Counter()
    started = time.perf_counter()
    while tried < count:
        tally = attack(min(CHUNK, count - tried), seed * 1_000 + tried // CHUNK)
        tried, held = tried + tally.tried, held + tally.held
        notes += tally.notes
        for problem in tally.broken:
            print(f"  {problem}")
        told = ", ".join(f"{n} {what}" for what, n in sorted(notes.items()))
        print(f"{told}; {time.perf_counter() - started:.0f} s")
        table.add({"kind": title, "tried": tried, "held": held})
    return tried - held


if __name__ == "__main__":
    sys.exit(main())
