"""What a person calls the groups of a transformer: heads, KV groups, FFN width, experts."""

from prunus.graph.amounts import REMOVABLE, Kind, Remove
from prunus.structures.names import Anatomy, Attention, Layer, Structure, find_structures

__all__ = [
    "REMOVABLE", "Anatomy", "Attention", "Kind", "Layer", "Remove", "Structure", "find_structures",
]  # fmt: skip
