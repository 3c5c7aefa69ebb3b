"""Faults to plant in the engine, each with a small model that exercises it.

A fault is one wrong line in one place: a rule, the algebra, the plan's index maps, the surgeon,
the attributes.  Everything else, the instruments included, stays as it is.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.case_models import conv, head
from prunus.graph import coupling
from prunus.graph.axis import Axis
from prunus.graph.coupling import CouplingGraph
from prunus.graph.plans import Plan
from prunus.graph.program import Effect
from prunus.tracer import adapters, capture, registry, rerun
from prunus.tracer.labels import Algebra
from prunus.tracer.registry import Call, find_overload, find_rule
from prunus.tracer.rules.pointwise import pointwise
from prunus.verifier import judgement, replay
from prunus.verifier import verify as oracle
from prunus.verifier.randomize import Known

# ``prunus.surgeon.apply`` and ``prunus.tracer.trace.trace`` hide the modules of the same name.
surgeon = importlib.import_module("prunus.surgeon.apply")
tracer = importlib.import_module("prunus.tracer.trace")


class Injector:
    """Plants one fault, and counts how often the faulty code runs."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch
        self.calls = 0

    def rule(self, *overloads: str, to: Callable[[Any, Call], Effect]) -> None:
        """Replace the rules of some overloads; ``to`` also gets the right one."""
        for text in overloads:
            target = find_overload(text)
            right = find_rule(target)

            def faulty(call: Call, right: Any = right) -> Effect:
                self.calls += 1
                return to(right, call)

            self._patch.setitem(registry._RULES, target, faulty)

    def outputs(self, *overloads: str, to: Callable[[Call, list[Any]], list[Any]]) -> None:
        """Replace the labels of the first output; ``to`` gets the right ones."""

        def faulty(right: Any, call: Call) -> Effect:
            effect = right(call)
            first = tuple(to(call, list(effect.outputs[0])))
            return replace(effect, outputs=(first, *effect.outputs[1:]))

        self.rule(*overloads, to=faulty)

    def function(self, home: Any, name: str, to: Callable[..., Any]) -> None:
        """Replace a function or a method; ``to`` gets the right one first."""
        right = getattr(home, name)

        def faulty(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return to(right, *args, **kwargs)

        self._patch.setattr(home, name, faulty)

    def slices(self, name: str, to: Callable[[Tensor, dict[int, Tensor]], Any]) -> None:
        """Let the surgeon cut the tensors whose names end in ``name`` by other indices."""

        def faulty(right: Any, plan: Plan) -> Any:
            keep = dict(right(plan))
            for tensor, axes in keep.items():
                if tensor.endswith(name):
                    size = plan.shapes[tensor]
                    keep[tensor] = {d: to(stay, size[d]) for d, stay in axes.items()}
            return keep

        self.function(surgeon, "_by_tensor", faulty)


@dataclass(frozen=True)
class Fault:
    """What is planted, into which model, and which instrument has to notice.

    ``caught_by`` is *refusal* (the engine raises one of its errors), *verify*, *unverified* (the
    certificate lists groups of which it proves nothing), *witness*, or *exchange* (units of one
    group are not interchangeable).
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    plant: Callable[[Injector], None]
    caught_by: str


FAULTS: list[Fault] = []


def fault(
    build: Callable[[], nn.Module], *shape: int, by: str = "verify"
) -> Callable[[Callable[[Injector], None]], Callable[[Injector], None]]:
    """Register a function that plants a fault."""

    def register(plant: Callable[[Injector], None]) -> Callable[[Injector], None]:
        FAULTS.append(Fault(plant.__name__, build, shape or (2, 3, 8, 8), plant, by))
        return plant

    return register


class Net(nn.Module):
    """Layers by name, and a function as their forward."""

    def __init__(self, run: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self, *inputs)


def between(
    act: Callable[[Tensor], Tensor], width: int = 12, after: int | None = None
) -> Callable[[], nn.Module]:
    """A convolution, something done to its channels, another convolution."""

    def run(m: Any, x: Tensor) -> Tensor:
        out: Tensor = m.head(F.relu(m.second(act(m.first(x)))))
        return out

    return lambda: Net(run, first=conv(3, width), second=conv(after or width, 9), head=head(9))


# --- models ---------------------------------------------------------------------------------


def residual() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.bn1(m.conv1(x)))
        x = x + m.bn2(m.conv2(x))
        out: Tensor = m.head(F.relu(m.conv3(x)))
        return out

    return Net(
        run,
        conv1=conv(3, 10),
        bn1=nn.BatchNorm2d(10),
        conv2=conv(10, 10),
        bn2=nn.BatchNorm2d(10),
        conv3=conv(10, 12),
        head=head(12),
    )


def two_branches() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        out: Tensor = m.head(F.relu(m.after(torch.cat([m.one(x), m.two(x)], 1))))
        return out

    return Net(run, one=conv(3, 8), two=conv(3, 8), after=conv(16, 9), head=head(9))


def depthwise() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.expand(x))
        x = F.relu(m.bn(m.filter(x)))
        out: Tensor = m.head(F.relu(m.project(x)))
        return out

    return Net(
        run,
        expand=conv(3, 12),
        filter=conv(12, 12, groups=12),
        bn=nn.BatchNorm2d(12),
        project=conv(12, 9, 1),
        head=head(9),
    )


def squeeze_excite() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.first(x))
        gate = torch.sigmoid(m.up(F.relu(m.down(x.mean((2, 3), keepdim=True)))))
        out: Tensor = m.head(F.relu(m.second(gate * x)))
        return out

    return Net(
        run,
        first=conv(3, 12),
        down=conv(12, 6, 1),
        up=conv(6, 12, 1),
        second=conv(12, 9),
        head=head(9),
    )


def grouped() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.middle(F.relu(m.first(x))))
        out: Tensor = m.head(F.relu(m.last(x)))
        return out

    return Net(
        run, first=conv(3, 12), middle=conv(12, 16, groups=4), last=conv(16, 9, 1), head=head(9)
    )


def flattened() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        out: Tensor = m.last(F.relu(m.wide(F.relu(m.first(x)).flatten(1))))
        return out

    return Net(run, first=conv(3, 6), wide=nn.Linear(6 * 36, 12), last=nn.Linear(12, 10))


def flattened_last() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.first(x)).permute(0, 2, 3, 1).flatten(1)
        out: Tensor = m.last(F.relu(m.wide(x)))
        return out

    return Net(run, first=conv(3, 6), wide=nn.Linear(6 * 36, 12), last=nn.Linear(12, 10))


def thirds() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        a, b, c = m.first(x).chunk(3, 1)
        out: Tensor = m.head(F.relu(m.left(a) - m.middle(b) * m.right(c)))
        return out

    return Net(
        run,
        first=conv(3, 36),
        left=conv(12, 9),
        middle=conv(12, 9),
        right=conv(12, 9),
        head=head(9),
    )


def transposed() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.up(F.relu(m.first(x))))
        out: Tensor = m.head(F.relu(m.last(x)))
        return out

    return Net(
        run, first=conv(3, 10), up=nn.ConvTranspose2d(10, 10, 2, 2), last=conv(10, 9), head=head(9)
    )


def mixed_mlp() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        out: Tensor = m.last(F.gelu(m.norm(m.first(x))))
        return out

    return Net(run, first=nn.Linear(8, 16), norm=nn.LayerNorm(16), last=nn.Linear(16, 10))


def group_norm() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        out: Tensor = m.head(F.relu(m.second(F.relu(m.norm(m.first(x))))))
        return out

    return Net(run, first=conv(3, 16), norm=nn.GroupNorm(4, 16), second=conv(16, 9), head=head(9))


class Attention(nn.Module):
    """Self-attention of six heads of six dims, and a residual: [B, N, 12] -> [B, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 6
        self.embed = nn.Linear(12, 20)
        self.query, self.key, self.value = (nn.Linear(20, 36) for _ in range(3))
        self.out, self.last = nn.Linear(36, 20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        batch, length, _ = x.shape
        query, key, value = (
            layer(x).view(batch, length, self.heads, -1).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.last((x + self.out(mixed.transpose(1, 2).flatten(2))).mean(1))
        return out


class Words(nn.Module):
    """An embedding, two layers, and an output layer that may share the embedding's weight."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.up = nn.Linear(12, 16)
        self.down = nn.Linear(16, 12)
        self.out = nn.Linear(12, 20, bias=False)
        if tied:
            self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        words = self.embed((x.sum((2, 3)) * 7).long() % 20)
        out: Tensor = self.out(words + self.down(F.relu(self.up(words))))
        return out


class Buffered(nn.Module):
    """A buffer with a number per channel, which batch norm's table knows nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = conv(3, 12), conv(12, 9), head(9)
        self.register_buffer("gain", torch.rand(12, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(F.relu(self.second(self.first(x) * self.gain)))
        return out


class Ordered(nn.Module):
    """Channels brought into another order by a buffer of indices."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = conv(3, 12), conv(12, 9), head(9)
        self.register_buffer("order", torch.arange(12).roll(5))
        self.hidden = conv(9, 9, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(self.first(x).index_select(1, self.order)))
        out: Tensor = self.head(F.relu(self.hidden(x)))
        return out


class ZeroInit(nn.Module):
    """A residual block whose last batch norm starts at zero, so that it says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = conv(3, 10), head(10)
        self.one, self.bn1 = conv(10, 8), nn.BatchNorm2d(8)
        self.two, self.bn2 = conv(8, 10), nn.BatchNorm2d(10)
        nn.init.zeros_(self.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = x + self.bn2(self.two(F.relu(self.bn1(self.one(x)))))
        out: Tensor = self.out(F.relu(x))
        return out


class TwoHeads(nn.Module):
    """A backbone map is an output beside the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.map, self.head = conv(3, 12), conv(12, 8), head(8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.map(F.relu(self.first(x)))
        return {"logits": self.head(F.relu(features)), "map": features}


@torch.library.custom_op("prunus_faults::mirror", mutates_args=())
def mirror(x: Tensor) -> Tensor:
    """An operator nobody knows: the channels in reverse order."""
    return x.flip(1).contiguous()


@mirror.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def mirrored() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.second(mirror(m.first(x))))
        out: Tensor = m.head(F.relu(m.third(x)))
        return out

    return Net(run, first=conv(3, 12), second=conv(12, 9), third=conv(9, 9, 1), head=head(9))


def beside(act: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    """As ``between``, with one more convolution, so that something is left to prune."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.second(act(m.first(x))))
        out: Tensor = m.head(F.relu(m.third(x)))
        return out

    return lambda: Net(run, first=conv(3, 12), second=conv(12, 9), third=conv(9, 9), head=head(9))


def embedded() -> nn.Module:
    return Words(tied=False)


def tied() -> nn.Module:
    return Words(tied=True)


# --- rules ----------------------------------------------------------------------------------


def _first_operand(call: Call, labels: list[Any]) -> list[Any]:
    return list(call.labels("self"))


@fault(residual)
def add_ties_nothing(inject: Injector) -> None:
    inject.rule("add.Tensor", to=lambda right, call: Effect((call.labels("self"),)))


@fault(squeeze_excite)
def gate_ties_nothing(inject: Injector) -> None:
    inject.rule("mul.Tensor", to=lambda right, call: Effect((call.labels("other"),)))


@fault(two_branches)
def concatenation_in_wrong_order(inject: Injector) -> None:
    inject.outputs(
        "cat", to=lambda call, labels: [labels[0], np.roll(labels[1], 8, 0), *labels[2:]]
    )


@fault(two_branches)
def concatenation_one_off(inject: Injector) -> None:
    inject.outputs(
        "cat", to=lambda call, labels: [labels[0], np.roll(labels[1], 1, 0), *labels[2:]]
    )


def _forget(*names: str) -> Callable[[Any, Call], Effect]:
    """The right rule, which does not see some arguments."""

    def faulty(right: Any, call: Call) -> Effect:
        kept = {name: call.args[name] for name in names}
        call.args.update(dict.fromkeys(names))
        effect: Effect = right(call)
        call.args.update(kept)
        return effect

    return faulty


@fault(residual)
def running_statistics_not_sliced(inject: Injector) -> None:
    inject.rule(
        "native_batch_norm",
        "_native_batch_norm_legit_no_training",
        to=_forget("running_mean", "running_var"),
    )


@fault(residual)
def bias_not_sliced(inject: Injector) -> None:
    inject.rule("convolution", to=_forget("bias"))


@fault(residual)
def batch_norm_carries_other_channels(inject: Injector) -> None:
    inject.outputs(
        "native_batch_norm",
        "_native_batch_norm_legit_no_training",
        to=lambda call, labels: [labels[0], np.roll(labels[1], 1, 0), *labels[2:]],
    )


def _blocks_swapped(call: Call, labels: list[Any]) -> list[Any]:
    groups = call.args["groups"]
    if groups > 1:
        labels[1] = np.roll(labels[1], len(labels[1]) // groups, 0)
    return labels


@fault(grouped)
def grouped_convolution_blocks_swapped(inject: Injector) -> None:
    inject.outputs("convolution", to=_blocks_swapped)


@fault(depthwise)
def depthwise_taken_for_dense(inject: Injector) -> None:
    def faulty(right: Any, call: Call) -> Effect:
        effect: Effect = right(call)
        if call.args["groups"] > 1:
            size = call.outputs[0].shape[1]
            own = call.algebra.fresh(size, Axis("filter", 0))[:, None]
            effect = replace(effect, outputs=((effect.outputs[0][0], own, None, None),))
        return effect

    inject.rule("convolution", to=faulty)


@fault(transposed)
def transposed_convolution_taken_for_plain(inject: Injector) -> None:
    def faulty(right: Any, call: Call) -> Effect:
        was = call.args["transposed"]
        call.args["transposed"] = False
        effect: Effect = right(call)
        call.args["transposed"] = was
        return effect

    inject.rule("convolution", to=faulty)


@fault(flattened, 2, 3, 6, 6)
def flatten_repeats_where_it_should_tile(inject: Injector) -> None:
    def faulty(right: Any, self: Algebra, labels: Any, sizes: Any) -> Any:
        return right(self, list(reversed(labels)), list(reversed(sizes)))

    inject.function(Algebra, "merge", faulty)


@fault(flattened_last, 2, 3, 6, 6)
def permute_ignored(inject: Injector) -> None:
    inject.outputs("permute", to=_first_operand)


@fault(thirds)
def chunk_taken_for_free_pieces(inject: Injector) -> None:
    def faulty(right: Any, call: Call) -> Effect:
        batch, channels, *space = call.labels("self")
        return Effect(tuple((batch, part, *space) for part in np.split(channels, 3)))

    inject.rule("split.Tensor", to=faulty)


@fault(thirds)
def chunk_interleaved(inject: Injector) -> None:
    def faulty(right: Any, call: Call) -> Effect:
        batch, channels, *space = call.labels("self")
        why = call.why("pieces")
        column, piece = call.algebra.split(channels, (len(channels) // 3, 3), why)
        call.pin(piece, "pieces")
        return Effect(((batch, column, *space),) * 3)

    inject.rule("split.Tensor", to=faulty)


def _split_and_swapped(x: Tensor) -> Tensor:
    a, b = x.split([5, 7], 1)
    return torch.cat([b, a], 1)


@fault(beside(_split_and_swapped))
def split_with_sizes_taken_for_free(inject: Injector) -> None:
    inject.rule("split_with_sizes", to=lambda right, call: replace(right(call), equations=()))


@fault(beside(lambda x: x.roll(5, 1)))
def roll_taken_for_pass(inject: Injector) -> None:
    inject.rule("roll", to=lambda right, call: Effect((call.labels("self"),)))


@fault(between(lambda x: x.flip(1)))
def flip_taken_for_pass(inject: Injector) -> None:
    inject.rule("flip", to=lambda right, call: Effect((call.labels("self"),)))


@fault(beside(lambda x: torch.cat([x[:, 5:], x[:, :5]], 1)))
def slice_bounds_forgotten(inject: Injector) -> None:
    inject.rule("slice.Tensor", to=lambda right, call: replace(right(call), equations=()))


@fault(between(lambda x: F.channel_shuffle(x, 3)))
def shuffle_with_swapped_factors(inject: Injector) -> None:
    def faulty(right: Any, call: Call) -> Effect:
        batch, channels, *space = call.labels("self")
        groups = call.args["groups"]
        why = call.why("shuffle")
        block, column = call.algebra.split(channels, (len(channels) // groups, groups), why)
        call.pin(block, "shuffle")
        shuffled = call.algebra.merge((column, block), (groups, len(channels) // groups))
        return Effect(((batch, shuffled, *space),))

    inject.rule("channel_shuffle", "native_channel_shuffle", to=faulty)


@fault(between(lambda x: F.channel_shuffle(x, 4)))
def shuffle_taken_for_pass(inject: Injector) -> None:
    inject.rule(
        "channel_shuffle",
        "native_channel_shuffle",
        to=lambda right, call: Effect((call.labels("self"),)),
    )


def _shuffle_by_views(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    x = x.view(batch, 4, channels // 4, height, width).transpose(1, 2)
    return x.reshape(batch, channels, height, width)


@fault(between(_shuffle_by_views, width=16))
def transpose_ignored(inject: Injector) -> None:
    inject.outputs("transpose.int", to=_first_operand)


@fault(between(lambda x: F.pixel_shuffle(x, 2), width=24, after=6))
def pixel_shuffle_with_phases_outside(inject: Injector) -> None:
    def faulty(right: Any, call: Call) -> Effect:
        batch, channels, *_ = call.labels("self")
        why = call.why("phases")
        phase, out = call.algebra.split(channels, (4, len(channels) // 4), why)
        call.pin(phase, "phases")
        return Effect(((batch, out, None, None),))

    inject.rule("pixel_shuffle", to=faulty)


@fault(between(lambda x: F.pad(x, (0, 0, 0, 0, 1, 3)), after=16))
def padding_on_the_wrong_side(inject: Injector) -> None:
    inject.outputs(
        "constant_pad_nd",
        to=lambda call, labels: [labels[0], np.roll(labels[1], 2, 0), *labels[2:]],
    )


@fault(between(lambda x: x.repeat(1, 2, 1, 1), after=24))
def repeat_taken_for_interleave(inject: Injector) -> None:
    def faulty(right: Any, call: Call) -> Effect:
        batch, channels, *space = call.labels("self")
        twice = call.algebra.merge((channels, None), (len(channels), 2))
        return Effect(((batch, twice, *space),))

    inject.rule("repeat", to=faulty)


@fault(Ordered)
def addressed_channels_taken_for_pass(inject: Injector) -> None:
    inject.rule("index_select", to=lambda right, call: Effect((call.labels("self"),)))


@fault(mirrored)
def unknown_operator_taken_for_elementwise(inject: Injector) -> None:
    inject.function(capture, "find_rule", lambda right, target: right(target) or pointwise)


@fault(between(lambda x: x.softmax(1)))
def softmax_over_channels_taken_for_elementwise(inject: Injector) -> None:
    inject.rule("_softmax", to=lambda right, call: Effect((call.labels("self"),)))


@fault(between(lambda x: x - x.mean(1, keepdim=True)))
def mean_over_channels_does_not_mix(inject: Injector) -> None:
    inject.rule("mean.dim", to=lambda right, call: replace(right(call), mixing=()))


def _mixing(right: Any, call: Call) -> Effect:
    """Runs on the kept channels alone: just what the cut model does, right or wrong."""
    name = call.target._schema.arguments[0].name
    return Effect((call.labels(name),), mixing=(((name,), 1),))


@fault(beside(lambda x: x.roll(5, 1)), by="exchange")
def roll_taken_for_mixing(inject: Injector) -> None:
    inject.rule("roll", to=_mixing)


@fault(mirrored, by="exchange")
def unknown_operator_taken_for_mixing(inject: Injector) -> None:
    inject.function(
        capture,
        "find_rule",
        lambda right, target: right(target) or (lambda call: _mixing(None, call)),
    )


@fault(mixed_mlp, 4, 8)
def layer_norm_does_not_mix(inject: Injector) -> None:
    inject.rule("native_layer_norm", to=lambda right, call: replace(right(call), mixing=()))


@fault(group_norm)
def group_norm_keeps_no_blocks(inject: Injector) -> None:
    def faulty(right: Any, call: Call) -> Effect:
        labels = list(call.labels("input"))
        for name in ("weight", "bias"):
            labels[1] = call.unify(labels[1], call.labels(name)[0])
        return Effect((tuple(labels), (None, None), (None, None)))

    inject.rule("native_group_norm", to=faulty)


@fault(embedded)
def embedding_columns_forgotten(inject: Injector) -> None:
    inject.outputs("embedding", to=lambda call, labels: [*labels[:-1], None])


@fault(embedded)
def every_second_contraction_forgotten(inject: Injector) -> None:
    def faulty(right: Any, call: Call) -> Effect:
        if inject.calls % 2:
            return right(call)  # type: ignore[no-any-return]
        size = call.outputs[0].shape[-1]
        return Effect(((None, call.algebra.fresh(size, Axis("free", 0))[:, None]),))

    inject.rule("addmm", to=faulty)


@fault(residual)
def contraction_silences_nothing(inject: Injector) -> None:
    inject.rule("convolution", to=lambda right, call: replace(right(call), contracted=()))


# --- attention ------------------------------------------------------------------------------

TOKENS = (3, 6, 12)


@fault(Attention, *TOKENS)
def softmax_scale_moves(inject: Injector) -> None:
    inject.function(
        Plan,
        "from_mask",
        lambda right, *args, **named: replace(right(*args, **named), scalings=()),
    )


@fault(Attention, *TOKENS)
def query_rows_shuffled(inject: Injector) -> None:
    inject.slices("query.weight", lambda stay, size: stay.roll(1))


@fault(Attention, *TOKENS)
def heads_taken_for_dims(inject: Injector) -> None:
    def faulty(right: Any, self: Algebra, label: Any, sizes: Any, why: Any) -> Any:
        parts = right(self, label, sizes, why)
        return parts[::-1] if tuple(sizes) == (6, 6) else parts

    inject.function(Algebra, "split", faulty)


@fault(Attention, *TOKENS)
def query_and_key_not_tied(inject: Injector) -> None:
    def faulty(right: Any, call: Call) -> Effect:
        query, value = call.labels("query"), call.labels("value")
        rest = tuple((None,) * out.dim() for out in call.outputs[1:])
        inner = ((("query",), 3), (("key",), 3))
        return Effect(((query[0], query[1], None, value[3]), *rest), contracted=inner)

    inject.rule(
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_attention_math",
        to=faulty,
    )


@fault(Attention, *TOKENS)
def half_a_head_removed(inject: Injector) -> None:
    """Every dim of every head is a unit of its own, so that heads lose different numbers."""

    def faulty(right: Any, self: Algebra, label: Any, sizes: Any, why: Any) -> Any:
        if label is None or tuple(sizes) != (6, 6):
            return right(self, label, sizes, why)
        return [None, self.fresh(sizes[1], Axis("free", 0))[:, None]]

    inject.function(Algebra, "split", faulty)


# --- attention and recurrent modules of PyTorch ---------------------------------------------


class Packed(nn.Module):
    """``nn.MultiheadAttention`` of six heads of six dims, and a residual: [B, N, 12] -> [B, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 36)
        self.attention = nn.MultiheadAttention(36, 6, batch_first=True)
        self.last = nn.Linear(36, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        mixed, _ = self.attention(x, x, x, need_weights=False)
        out: Tensor = self.last((x + mixed).mean(1))
        return out


class Recurrent(nn.Module):
    """An LSTM of two layers, and what it last said: [B, N, 12] -> [B, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 10)
        self.cells = nn.LSTM(10, 12, num_layers=2, batch_first=True)
        self.last = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.cells(self.embed(x))[0][:, -1])
        return out


def _edits_changed(change: Callable[[Any, dict[str, Any]], Any]) -> Callable[..., Any]:
    """Every edit as ``change`` wants it; it also gets the new head dims by module."""

    def faulty(right: Any, *args: Any) -> Any:
        edits = right(*args)
        dims = {edit.module: edit.after for edit in edits if edit.attribute == "head_dim"}
        changed = (change(edit, dims) for edit in edits)
        return tuple(edit for edit in changed if edit is not None)

    return faulty


@fault(Packed, *TOKENS)
def packed_scale_moves(inject: Injector) -> None:
    def change(edit: Any, dims: dict[str, Any]) -> Any:
        if edit.attribute != "__class__":
            return edit
        return replace(edit, after=(edit.after[0], dims[edit.module] ** -0.5))

    inject.function(_pipeline(), "find_edits", _edits_changed(change))


@fault(Packed, *TOKENS)
def packed_attention_is_not_replaced(inject: Injector) -> None:
    def change(edit: Any, dims: dict[str, Any]) -> Any:
        return None if edit.attribute == "__class__" else edit

    inject.function(_pipeline(), "find_edits", _edits_changed(change))


@fault(Packed, *TOKENS)
def packed_attention_computes_something_else(inject: Injector) -> None:
    def faulty(right: Any, self: Any, query: Tensor, *rest: Any, **named: Any) -> Any:
        return right(self, 2 * query, *rest, **named)

    inject.function(adapters.SlimMultiheadAttention, "_attend", faulty)


@fault(Packed, *TOKENS)
def packed_queries_swapped_with_keys(inject: Injector) -> None:
    inject.slices(
        "in_proj_weight",
        lambda stay, size: stay if size == 36 else torch.cat([*stay.view(3, -1)[[1, 0, 2]]]),
    )


@fault(Packed, *TOKENS)
def stale_num_heads(inject: Injector) -> None:
    inject.function(_pipeline(), "find_edits", _keep_stale("num_heads"))


@fault(Packed, *TOKENS)
def stale_head_dim(inject: Injector) -> None:
    inject.function(_pipeline(), "find_edits", _keep_stale("head_dim"))


@fault(Recurrent, *TOKENS)
def gates_interleaved(inject: Injector) -> None:
    def faulty(right: Any, call: Call) -> Effect:
        *lead, rows = call.labels("self")
        count, why = len(call.outputs), call.why("gates")
        column, gate = call.algebra.split(rows, (call.outputs[0].shape[-1], count), why)
        call.pin(gate, "gates")
        return Effect(((*lead, column),) * count)

    inject.rule("unsafe_split.Tensor", to=faulty)


@fault(Recurrent, *TOKENS)
def gates_in_another_order(inject: Injector) -> None:
    inject.slices(
        "weight_hh_l1", lambda stay, size: stay.roll(len(stay) // 4) if size == 48 else stay
    )


@fault(Recurrent, *TOKENS)
def recurrent_columns_shuffled(inject: Injector) -> None:
    inject.slices("weight_hh_l0", lambda stay, size: stay.roll(1) if size == 12 else stay)


@fault(Recurrent, *TOKENS)
def stale_hidden_size(inject: Injector) -> None:
    inject.function(_pipeline(), "find_edits", _keep_stale("hidden_size"))


@fault(Recurrent, *TOKENS)
def stale_input_size(inject: Injector) -> None:
    inject.function(_pipeline(), "find_edits", _keep_stale("input_size"))


# --- algebra, plan, oracle ------------------------------------------------------------------


@fault(residual)
def unify_remembers_but_ties_nothing(inject: Injector) -> None:
    inject.function(Algebra, "_unify", lambda right, self, a, b, why: a)


@fault(grouped)
def product_keeps_where_either_stays(inject: Injector) -> None:
    def either(right: Any, label: Any, kept: Any) -> Any:
        return np.flatnonzero(kept[label].any(axis=1))

    for home in (coupling, replay, rerun):
        inject.function(home, "kept_positions", either)


@fault(flattened, 2, 3, 6, 6)
def split_takes_rows_for_columns(inject: Injector) -> None:
    inject.function(
        Algebra,
        "merge",
        lambda right, self, labels, sizes: (
            np.roll(right(self, labels, sizes), 1, 0)
            if right(self, labels, sizes) is not None
            else None
        ),
    )


def _with_keep(change: Callable[[dict[Axis, tuple[int, ...]], Plan], None]) -> Any:
    def faulty(right: Any, graph: Any, kept: Any, *rest: Any, **named: Any) -> Plan:
        plan: Plan = right(graph, kept, *rest, **named)
        keep = dict(plan.keep)
        change(keep, plan)
        return replace(plan, keep=keep)

    return faulty


@fault(Packed, *TOKENS)
def packed_half_a_head_removed(inject: Injector) -> None:
    """Positions of the last head that stays go: of queries, keys and values, everywhere alike."""

    def change(keep: dict[Axis, tuple[int, ...]], plan: Plan) -> None:
        for axis, parts in (("in_proj_weight", 3), ("in_proj_bias", 3), ("out_proj.weight", 1)):
            at = Axis(f"attention.{axis}", int(parts == 1))
            rows = np.array(keep[at]).reshape(parts, -1)
            keep[at] = tuple(rows[:, :-2].ravel().tolist())

    inject.function(Plan, "from_mask", _with_keep(change))


@fault(residual)
def plan_is_one_off(inject: Injector) -> None:
    def change(keep: dict[Axis, tuple[int, ...]], plan: Plan) -> None:
        axis = Axis("conv3.weight", 1)
        size = plan.shapes[axis.tensor][axis.dim]
        keep[axis] = tuple(sorted((index + 1) % size for index in keep[axis]))

    inject.function(Plan, "from_mask", _with_keep(change))


@fault(residual)
def plan_keeps_what_it_should_remove(inject: Injector) -> None:
    def change(keep: dict[Axis, tuple[int, ...]], plan: Plan) -> None:
        for axis in list(keep):
            if axis.tensor.startswith("conv3") and axis.dim == 0:
                everything = range(plan.shapes[axis.tensor][axis.dim])
                keep[axis] = tuple(i for i in everything if i not in keep[axis])

    inject.function(Plan, "from_mask", _with_keep(change))


@fault(residual)
def plan_forgets_an_axis(inject: Injector) -> None:
    inject.function(
        Plan,
        "from_mask",
        _with_keep(lambda keep, plan: keep.pop(Axis("conv3.weight", 1)) and None),  # type: ignore[func-returns-value]
    )


@fault(residual)
def mask_keeps_everything(inject: Injector) -> None:
    inject.function(CouplingGraph, "mask_from_positions", lambda right, graph, keep: graph.all_kept)


@fault(residual)
def comparison_always_content(inject: Injector) -> None:
    for home in (oracle, judgement):
        inject.function(home, "relative_error", lambda right, a, b: 0.0)


@fault(ZeroInit, by="unverified")
def network_does_not_listen(inject: Injector) -> None:
    for home, name in ((oracle, "randomize"), (_pipeline(), "randomize")):
        inject.function(home, name, lambda right, *args, **kwargs: Known())


@fault(TwoHeads, by="witness")
def an_output_is_overlooked(inject: Injector) -> None:
    inject.function(
        tracer, "select_outputs", lambda right, found, wanted: (right(found, wanted)[0][:1], [])
    )


# --- surgeon and attributes -----------------------------------------------------------------


@fault(residual)
def surgeon_permutes_rows(inject: Injector) -> None:
    inject.slices("conv3.weight", lambda stay, size: stay.flip(0))


@fault(residual)
def surgeon_is_one_off(inject: Injector) -> None:
    inject.slices("conv1.weight", lambda stay, size: (stay + 1) % size)


@fault(residual)
def surgeon_takes_the_first_of_a_bias(inject: Injector) -> None:
    inject.slices("conv3.bias", lambda stay, size: torch.arange(len(stay)))


@fault(residual)
def surgeon_takes_the_first_running_means(inject: Injector) -> None:
    inject.slices("bn1.running_mean", lambda stay, size: torch.arange(len(stay)))


@fault(Buffered)
def surgeon_forgets_a_buffer(inject: Injector) -> None:
    inject.slices("gain", lambda stay, size: torch.arange(size))


@fault(residual)
def surgeon_scales_a_weight_a_little(inject: Injector) -> None:
    def faulty(right: Any, tensor: Tensor, keep: Any) -> Tensor:
        sliced: Tensor = right(tensor, keep)
        return sliced * (1 + 5e-4) if tensor.shape == (12, 10, 3, 3) else sliced

    inject.function(surgeon, "slice_tensor", faulty)


@fault(tied)
def surgeon_unties(inject: Injector) -> None:
    def faulty(right: Any, modules: Any, state: Any, new: Any, aliases: Any) -> None:
        for name, first in [*((n, n) for n in new), *aliases.items()]:
            if first in new:
                prefix, _, own = name.rpartition(".")
                setattr(modules[prefix], own, nn.Parameter(new[first].clone()))

    inject.function(surgeon, "_swap", faulty)


@fault(tied)
def surgeon_cuts_only_the_first_of_a_tie(inject: Injector) -> None:
    def faulty(right: Any, modules: Any, state: Any, new: Any, aliases: Any) -> None:
        for name, tensor in new.items():
            prefix, _, own = name.rpartition(".")
            setattr(modules[prefix], own, nn.Parameter(tensor.clone()))

    inject.function(surgeon, "_swap", faulty)


def _keep_stale(*attributes: str) -> Any:
    def faulty(right: Any, *args: Any) -> Any:
        return tuple(edit for edit in right(*args) if edit.attribute not in attributes)

    return faulty


@fault(depthwise)
def stale_groups(inject: Injector) -> None:
    inject.function(_pipeline(), "find_edits", _keep_stale("groups"))


@fault(residual)
def stale_num_features(inject: Injector) -> None:
    inject.function(_pipeline(), "find_edits", _keep_stale("num_features"))


@fault(residual)
def stale_out_channels(inject: Injector) -> None:
    inject.function(_pipeline(), "find_edits", _keep_stale("out_channels"))


@fault(embedded)
def stale_in_features(inject: Injector) -> None:
    inject.function(_pipeline(), "find_edits", _keep_stale("in_features", "embedding_dim"))


@fault(mixed_mlp, 4, 8)
def stale_normalized_shape(inject: Injector) -> None:
    inject.function(_pipeline(), "find_edits", _keep_stale("normalized_shape"))


def _pipeline() -> Any:
    from tests import pipeline

    return pipeline
