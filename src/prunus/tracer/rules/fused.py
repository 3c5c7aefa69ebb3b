"""Kernels that do several things in one: attention, and recurrent cells.

On CPUs a recurrent cell arrives as the plain operators that it is made of.
"""

from __future__ import annotations

from prunus.graph.axis import Label
from prunus.graph.program import Effect, Labels
from prunus.tracer.registry import Call, rule
from prunus.tracer.rules.contraction import CONTRACTED

OPERANDS = ("query", "key", "value")
POSITION = "a position of the sequence"


@rule("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
      "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
      "_scaled_dot_product_attention_math",
      "_scaled_dot_product_fused_attention_overrideable")  # fmt: skip
def attention(call: Call) -> Effect:
    """q (…, L, E), k (…, S, E), v (…, S, F): E is contracted; … and F pass, L and S stay."""
    query, key, value = (call.labels(name) for name in OPERANDS)
    for labels in (query, key, value):
        call.pin(labels[-2], POSITION)
    inner = call.unify(query[-1], key[-1], CONTRACTED)
    shape = call.outputs[0].shape
    lead = tuple(_tie_lead(call, dim) for dim in range(len(shape) - 2))
    _tie_mask(call, lead)
    rest = tuple(
        (*lead, *(None,) * (output.dim() - len(lead)))
        if output.shape[: len(lead)] == shape[:-2]
        else (None,) * output.dim()
        for output in call.outputs[1:]
    )
    length, keys = call.args["query"].shape[-2], call.args["key"].shape[-2]
    scores = (*zip(shape[:-2], lead, strict=True), (length * keys, None))
    return Effect(
        ((*lead, None, value[-1]), *rest),
        contracted=((("query",), len(query) - 1), (("key",), len(key) - 1)),
        spans=(
            (*scores, (call.args["query"].shape[-1], inner)),
            (*scores, (shape[-1], value[-1])),
        ),
    )


def _tie_lead(call: Call, dim: int) -> Label | None:
    """A batch or head dim: the same everywhere, or of the query alone, which shares keys."""
    shapes = [call.args[name].shape for name in OPERANDS]
    sizes = [shape[dim] for shape in shapes]
    first, *others = (call.labels(name)[dim] for name in OPERANDS)
    joined, size = first, sizes[0]
    for label, own in zip(others, sizes[1:], strict=True):
        if own == size:
            joined = call.unify(joined, label)
        elif size == 1:
            joined, size = label, own
        elif own > 1:
            why = call.why("every key is shared by equally many heads")
            shared, _ = call.algebra.split(joined, (own, size // own), why)
            call.unify(shared, label)
    return call.algebra.canonical(joined)


def _tie_mask(call: Call, lead: Labels) -> None:
    name = next((n for n in ("attn_mask", "attn_bias") if call.args.get(n) is not None), None)
    if name is None:
        return
    labels, shape = call.labels(name), call.args[name].shape
    for label in labels[-2:]:
        call.pin(label, POSITION)
    for label, size, own in zip(labels[-3::-1], shape[-3::-1], lead[::-1], strict=False):
        if size > 1:
            call.unify(label, own, "an attention bias per head")


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
    sizes = count, call.args[state].shape[1]
    for name in ("input_gates", "hidden_gates", "input_bias", "hidden_bias"):
        if call.args.get(name) is None:
            continue
        *lead, gates = call.labels(name)
        column = call.split(gates, sizes, "the gates of a cell keep their places", pinned=0)
        hidden = call.unify(hidden, column)
        for label in lead:
            batch = call.unify(batch, label)
    return batch, hidden
