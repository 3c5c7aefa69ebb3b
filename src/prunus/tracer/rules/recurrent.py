"""Packed sequences, and the fused cells of GPUs.

Elsewhere a cell arrives as the plain operators that it is made of.
"""

from __future__ import annotations

from prunus.graph.axis import Label
from prunus.graph.program import Effect
from prunus.tracer.registry import Call, rule

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
    """Gates (b, 4·h) and a cell (b, h); the workspace holds the gates, activated."""
    batch, hidden = _join_gates(call, "cx", 4)
    workspace = call.algebra.merge((None, hidden), (4, call.args["cx"].shape[1]))
    return Effect(((batch, hidden), (batch, hidden), (batch, workspace)))


@rule("_thnn_fused_gru_cell")
def gru_cell(call: Call) -> Effect:
    """Gates (b, 3·h) and a state (b, h); the workspace holds five numbers of a hidden unit."""
    batch, hidden = _join_gates(call, "hx", 3)
    workspace = call.algebra.merge((None, hidden), (5, call.args["hx"].shape[1]))
    return Effect(((batch, hidden), (batch, workspace)))


def _join_gates(call: Call, state: str, count: int) -> tuple[Label | None, Label | None]:
    """The labels of batch and hidden width: a hidden unit owns a place in each of its gates."""
    batch, hidden = call.labels(state)
    rows = call.args[state].shape[1]
    why = call.why("the gates of a cell keep their places")
    for name in ("input_gates", "hidden_gates", "input_bias", "hidden_bias"):
        if call.args.get(name) is None:
            continue
        *lead, gates = call.labels(name)
        gate, column = call.algebra.split(gates, (count, rows), why)
        call.pin(gate, why.reason)
        hidden = call.unify(hidden, column)
        for label in lead:
            batch = call.unify(batch, label)
    return batch, hidden
