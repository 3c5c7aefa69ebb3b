"""What a person calls the groups of a transformer: heads, KV groups, FFN width, experts."""

from prunus.structures.amounts import REMOVABLE, Remove
from prunus.structures.names import Anatomy, Attention, Kind, Layer, Structure, find_structures

__all__ = [
    "REMOVABLE", "Anatomy", "Attention", "Kind", "Layer", "Remove", "Structure", "find_structures",
]  # fmt: skip
