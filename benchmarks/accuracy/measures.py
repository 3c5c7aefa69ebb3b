"""What is left of a language model after pruning: fidelity of embeddings, and perplexity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]


def fidelity(dense: Tensor, pruned: Tensor) -> float:
    """Spearman correlation of the cosines of all pairs, of two sets of embeddings.

    Rank by rank: whether what the dense model finds alike is still found alike.

    Parameters
    ----------
    dense, pruned
        Unit vectors, shape ``(sentences, features)``, row by row of the same sentences.

    Examples
    --------
    >>> x = torch.nn.functional.normalize(torch.randn(20, 8), dim=1)
    >>> round(fidelity(x, x), 6), fidelity(x, x.flip(0)) < 0.9
    (1.0, True)
    """
    from scipy.stats import spearmanr

    if len(dense) != len(pruned) or len(dense) < 3:
        raise ValueError(f"{len(dense)} and {len(pruned)} embeddings have no pairs to compare")
    upper = np.triu_indices(len(dense), 1)
    cosines = [(x.double() @ x.double().T).numpy()[upper] for x in (dense, pruned)]
    if any(np.ptp(values) == 0 for values in cosines):
        return 0.0  # all alike: no ranking is left
    return float(spearmanr(*cosines).statistic)


@torch.no_grad()
def embed(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """Mean over the tokens of the last hidden states, normalised: a row a sentence."""
    rows = []
    for batch in batches:
        hidden = model(**batch).last_hidden_state
        there = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * there).sum(1) / there.sum(1)
        rows.append(nn.functional.normalize(mean, dim=1))
    return torch.cat(rows)


def tokenize(sentences: Sequence[str], tokenizer: Any, size: int = 32) -> list[Batch]:
    """Padded batches, in the order of the sentences."""
    return [
        dict(tokenizer(list(sentences[start : start + size]), padding=True, return_tensors="pt"))
        for start in range(0, len(sentences), size)
    ]


@torch.no_grad()
def perplexity(model: nn.Module, blocks: Tensor, size: int = 2) -> float:
    """exp of the mean negative log-likelihood of every token but the first of each block.

    Parameters
    ----------
    blocks
        Token ids, shape ``(blocks, length)``; no block sees another.
    size
        Blocks in a batch.
    """
    total = 0.0
    for batch in blocks.split(size):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1)
        total += float(nn.functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum"))
    mean = total / (blocks.shape[0] * (blocks.shape[1] - 1))
    return math.exp(mean) if mean < 700 else math.inf
