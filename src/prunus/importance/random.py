"""Random scores: the control that every other criterion has to beat."""

from __future__ import annotations

import hashlib

import numpy as np

from prunus.graph.groups import Group
from prunus.importance.registry import Context, Scores, importance


@importance("random")
def random(group: Group, context: Context) -> Scores:
    """Uniform in [0, 1), a function of the seed and the group's name alone."""
    digest = hashlib.sha256(f"{context.seed}:{group.name}".encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, dtype="<u4")).random(group.size)
