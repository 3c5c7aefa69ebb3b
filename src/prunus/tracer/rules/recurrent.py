"""Packed sequences, and the fused cells of GPUs.

Elsewhere a cell arrives as the plain operators that it is made of.
"""

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


@rule("_thnn_fused_lstm_cell")
def lstm_cell(call: Call) -> Effect:
    """Gates (b, 4·h) and a cell (b, h): a hidden unit owns a place in each of its four gates."""
    batch, hidden = call.labels("cx")
    rows = call.args["cx"].shape[1]
    why = call.why("the gates of a cell keep their places")
    for name in ("input_gates", "hidden_gates", "input_bias", "hidden_bias"):
        if call.args.get(name) is None:
            continue
        *lead, gates = call.labels(name)
        gate, column = call.algebra.split(gates, (4, rows), why)
        call.pin(gate, why.reason)
        hidden = call.unify(hidden, column)
        for label in lead:
            batch = call.unify(batch, label)
    workspace = call.algebra.merge((None, hidden), (4, rows))
    return Effect(((batch, hidden), (batch, hidden), (batch, workspace)))
