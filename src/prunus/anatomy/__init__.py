"""What a person calls the groups of a transformer: heads, KV groups, FFN width, experts."""

from prunus.anatomy.names import Anatomy, Attention, Kind, Layer, Structure, structures

__all__ = ["Anatomy", "Attention", "Kind", "Layer", "Structure", "structures"]
