"""A small sample of every benchmark, to see that each still runs: ``make bench-quick``.

    python -m benchmarks.quick             # all, some minutes; writes out/bench-quick
    python -m benchmarks.quick speed peers.cases

Tables are written to ``out/bench-quick`` and say nothing about speed or accuracy.  A benchmark that
needs data, weights or a GPU that are not there is skipped, with what it needs.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import subprocess
import sys
import time
from functools import partial

from benchmarks.apart import limit_processor_time
from benchmarks.rows import MISSING, ROOT

OUT = ROOT / "out" / "bench-quick"
LIMIT = 120
"""Seconds of processor time of a sample, so that a busy machine stops none."""

SAMPLES: dict[str, str] = {
    "house": "",
    "exactness.exactness": "zoo:resnet20 hf:bert",
    "exactness.coverage": "torchvision:resnet18 timm:convnext_zepto_rms",
    "exactness.transformers": "vit llama",
    "exactness.uniform": "0 5",
    "exactness.fuzz": "--count 20 --chunk 20",
    "exactness.attacks": "--kind files --kind plans --kind lines --count 20",
    "exactness.gpu": "",
    "accuracy.oneshot_fmnist": "--engine prunus --importance l2 --seed 0",
    "accuracy.repairs": "--seeds 1",
    "accuracy.oneshot_pretrained": "--model minilm",
    "accuracy.heads": "--importance l2 --sentences 32 --calibration 32",
    "accuracy.experts": "--seeds 0 --steps 3",
    "accuracy.llm_oneshot": "--engine prunus --structure width --importance l2 --blocks 2",
    "speed.speed": "resnet50 --rounds 1",
    "speed.verify_cost": "mobilenetv2",
    "speed.statistics_cost": "--images 32 --side 64",
    "speed.depth": "2 4",
    "speed.bert_speed": "--pairs 3 --tries 1",
    "speed.seeds": "--pairs 1 --tries 1",
    "speed.latency": "resnet50 --backend eager --request 0.5 --pairs 3 --tries 1",
    "training.kill_resume": "--kills 2",
    "training.survival": "--only yolov8n-cls --steps shrink",
    "planning.budgets": "mobilenetv2",
    "planning.optimality": "--count 3",
    "planning.planner_scale": "2",
    "planning.sensitivity": "--table",
    "peers.cases": "flatten pixel_shuffle transformer_encoder",
}
"""Benchmark → the arguments of its sample."""


def try_out(name: str, arguments: str) -> tuple[str, str]:
    """How a sample ended, and the last words of one that did not end well."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments.split()]
    environment = {**os.environ, "PRUNUS_RESULTS": str(OUT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        preexec_fn=partial(limit_processor_time, LIMIT),
    )
    if done.returncode == -signal.SIGXCPU:
        return "stopped", f"after {LIMIT} s of processor time"
    last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
    if not done.returncode:
        return "ok", ""
    return ("skipped" if MISSING in last else "failed"), last


def clocks() -> tuple[float, float]:
    """The time on the wall, and the processor time of all samples so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter(), used.ru_utime + used.ru_stime


def since(started: tuple[float, float]) -> str:
    """What has passed, as text."""
    wall, processor = (now - then for now, then in zip(clocks(), started, strict=True))
    return f"{wall:5.0f} s, {processor:4.0f} s of processor time"


def main() -> int:
    """Run the samples asked for; 1 if one of them failed or had to be stopped."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="folders or benchmarks; all without")
    options = parser.parse_args()
    begun, bad = clocks(), 0
    for name, arguments in SAMPLES.items():
        if options.names and not any(name.startswith(asked) for asked in options.names):
            continue
        started = clocks()
        status, words = try_out(name, arguments)
        bad += status in ("failed", "stopped")
        print(f"{name:32}{status:9}{since(started)}  {words}".rstrip(), flush=True)
    print(f"{'':41}{since(begun)}; tables in {OUT.relative_to(ROOT)}")
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main())
