"""Perplexity of a small mixture of experts without some of them; ``results/experts.csv``.

    python -m benchmarks.accuracy.experts              # one training; half an hour
    python -m benchmarks.accuracy.experts --seeds 1 2  # two more; rows are replaced

A Mixtral of 8 experts per layer, 2 of which each token uses, learns to read the source of Python's
own library letter by letter; perplexity, by letter, is on files that it was not trained on.  Then
25 or 50 % of the *experts* of every layer go, by REAP's score (router-weighted output norm over
blocks of the training files), by the norm of their weights, or at random; or as large a share of
the *widths* of all experts.  Nothing is trained or repaired after the cut.
"""

from __future__ import annotations

import copy
import platform
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

import prunus
from benchmarks.peers.judge import count_parameters
from benchmarks.rows import Table, commit

TABLE = Table(
    "experts.csv",
    (
        "seed", "structure", "importance", "removed", "params_ratio", "perplexity",
        "dense_perplexity", "verdict", "steps", "train_seconds", "text", "commit",
    ),
    ("seed", "structure", "importance", "removed"),
)  # fmt: skip
REMOVED = (0.25, 0.5)
STEPS, BATCH, LENGTH, RATE = 700, 16, 96, 3e-3
CALIBRATION, SCORED = 32, 128
"""Blocks that importances see, and blocks that perplexity is taken on."""

STRUCTURES = {
    "experts": ("reap", "l2", "random"),
    "ffn": ("activation", "l2", "random"),
}
"""What is removed, and by which importances."""


def load() -> tuple[Tensor, Tensor]:
    """Modules of Python's library, four of five to train on and the others for perplexity."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(folder.glob("*.py"), key=lambda file: crc32(file.name.encode()))
    cut = len(files) // 5
    return letters(files[cut:]), letters(files[:cut])


def letters(files: Sequence[Path]) -> Tensor:
    """Their text as blocks of ids below 128, ``(blocks, LENGTH)``."""
    joined = b"\n".join(file.read_bytes() for file in files)
    ids = torch.frombuffer(bytearray(joined), dtype=torch.uint8).long().clamp(max=127)
    return ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)


def train(blocks: Tensor, seed: int, steps: int = STEPS) -> Any:
    """A mixture that has learned to read these blocks."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=128, hidden_size=96, intermediate_size=96, num_hidden_layers=3,
            num_attention_heads=6, num_key_value_heads=3, num_local_experts=8,
            num_experts_per_tok=2, router_aux_loss_coef=0.01, output_router_logits=True,
            max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.1)
    dice = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = blocks[torch.randint(len(blocks), (BATCH,), generator=dice)]
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.config.output_router_logits = False
    return model.eval()


def perplexity(model: Any, blocks: Tensor) -> float:
    """By letter, over all letters but the first of each block."""
    with torch.no_grad():
        losses = [float(model(input_ids=some, labels=some).loss) for some in blocks.split(16)]
    return float(torch.tensor(losses).mean().exp())


def rows(seed: int, table: Table, steps: int) -> None:
    """Train once, cut in every way, and save each row."""
    known, unseen = load()
    unseen = unseen[torch.randperm(len(unseen), generator=torch.Generator().manual_seed(0))]
    started = time.perf_counter()
    model = train(known, seed, steps)
    trained = time.perf_counter() - started
    dense = perplexity(model, unseen[:SCORED])
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": some} for some in known[order[:CALIBRATION]].split(8)]
    inputs = {"input_ids": known[:2], "use_cache": False}
    for structure, importances in STRUCTURES.items():
        for importance in importances:
            for removed in REMOVED:
                smaller = prunus.shrink(
                    copy.deepcopy(model), (), inputs, remove={structure: removed}, data=data,
                    importance=importance, recover="none", seed=seed,
                )  # fmt: skip
                assert smaller.certificate is not None
                left = count_parameters(smaller.model) / count_parameters(model)
                table.add(
                    {
                        "seed": seed, "structure": structure, "importance": importance,
                        "removed": removed, "params_ratio": f"{left:.3f}",
                        "perplexity": f"{perplexity(smaller.model, unseen[:SCORED]):.3f}",
                        "dense_perplexity": f"{dense:.3f}", "verdict": smaller.certificate.verdict,
                        "steps": steps, "train_seconds": f"{trained:.0f}",
                        "text": f"source of Python {platform.python_version()}", "commit": commit(),
                    }
                )  # fmt: skip


def main() -> None:
    """Train and cut with every seed that is asked for."""
    parser = TABLE.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in options.seeds:
        rows(seed, options.table, options.steps)
    print(TABLE.pivot(("structure", "removed"), "importance", "perplexity"))


if __name__ == "__main__":
    main()
