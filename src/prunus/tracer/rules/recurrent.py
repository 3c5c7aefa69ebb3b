"""Packed sequences; the cells themselves arrive as the plain operators that they are made of."""

from __future__ import annotations

from prunus.tracer.registry import Call, Effect, rule

PACKED = "a position of the sequence"


@rule("_pack_padded_sequence")
def pack(call: Call) -> Effect:
    """Batch and time become one dim, sorted by time; features pass."""
    batch, time, *features = call.labels("input")
    for label in (batch, time, *call.labels("lengths")):
        call.pin(label, PACKED)
    return Effect(((None, *features), (None,)))
