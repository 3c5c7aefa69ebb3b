"""The rule table: one row per overload, with sample calls and what each has to tie together.

A row is all that a new operator needs beside its rule.  The outcome of a case has one word per
dim of every tensor argument, then of every output (see ``Trial.outcome`` in the validator):

``"a b, b c -> a c"``
    a matrix product: equal letters are kept and removed together;
``"."``
    a dim of which every position stays, or of size 1;
``"ab"``, ``"a|b"``, ``"a~"``
    a product (position i stays if both units do), a concatenation, a dim pinned in part.

Outputs alike are written once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.library import Library
from torch.nn.functional import scaled_dot_product_attention

from prunus.graph.expressions import Attribute
from prunus.tracer.provenance import Provenance
from prunus.tracer.registry import Given, registered, returns_tensor


@dataclass(frozen=True, eq=False)
class Cut:
    """A call whose tensors were cut, as a row's ``resize`` sees it.

    Attributes
    ----------
    before, args
        Arguments by name: those of the original call, and those of the cut one.
    shapes
        What the outputs have to be like.
    stated
        The widths that the equations of the effect speak of.
    """

    before: Mapping[str, Any]
    args: Mapping[str, Any]
    shapes: Sequence[tuple[int, ...]]
    stated: Sequence[int]


Resize = Callable[[Cut], Mapping[str, Any]]
"""Arguments of the cut call that are no tensors but speak of sizes."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One call, and the outcome that its rule has to give.

    ``given`` is what the forward's code wrote; without it every size follows what is cut.
    """

    outcome: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    given: Given | None = None


@dataclass(frozen=True)
class Row:
    """An overload as a rule names it, with sample calls.

    ``values`` is false where contents are random or undefined: then only shapes are compared.
    ``again`` runs the cut call where a forward would end up in another operator than before;
    outputs that it leaves None are not compared.
    """

    overload: str
    samples: tuple[Sample, ...]
    resize: Resize | None = None
    values: bool = True
    again: Callable[[Mapping[str, Any]], Sequence[Tensor | None]] | None = None


ROWS: list[Row] = []


def rows(overloads: str, *samples: Sample, **options: Any) -> None:
    """Rows for overloads (names with blanks between) that share their samples.

    Samples for an overload that has a row with the same options are added to it.
    """
    for name in overloads.split():
        row = Row(name, samples, **options)
        for index, other in enumerate(ROWS):
            if replace(other, samples=samples) == row:
                ROWS[index] = replace(other, samples=(*other.samples, *samples))
                break
        else:
            ROWS.append(row)


def case(outcome: str, *args: Any, given: Given | None = None, **kwargs: Any) -> Sample:
    """A sample call."""
    return Sample(outcome, args, kwargs, given)


_generator = torch.Generator().manual_seed(0)


def X(*shape: int) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=_generator, dtype=torch.float64)


def P(*shape: int) -> Tensor:
    """Numbers between 0.1 and 0.9."""
    return torch.rand(shape, generator=_generator, dtype=torch.float64) * 0.8 + 0.1


def B(*shape: int) -> Tensor:
    """Truth values."""
    return torch.rand(shape, generator=_generator) < 0.5


def I(high: int, *shape: int) -> Tensor:  # noqa: E743
    """Indices below ``high``."""
    return torch.randint(high, shape, generator=_generator)


def M(*shape: int) -> Tensor:
    """No content: for operators that have no kernel on a CPU, of which shapes are compared."""
    return torch.empty(shape, device="meta")


def strides_of(shape: Sequence[int]) -> list[int]:
    """Row-major strides."""
    return list(torch.empty(tuple(shape), device="meta").stride())


# -- contraction -----------------------------------------------------------------------------------

rows(
    "mm",
    case("a b, b c -> a c", X(4, 6), X(6, 5)),
    case("a ., . b -> a b", X(4, 1), X(1, 5)),
    case("a b, b c -> a c", X(4, 4), X(4, 4)),
)
rows(
    "bmm",
    case("a b c, a c d -> a b d", X(2, 4, 6), X(2, 6, 5)),
    case(". a b, . b c -> . a c", X(1, 4, 6), X(1, 6, 5)),
)
rows("mv", case("a b, b -> a", X(4, 6), X(6)))
rows("dot vdot", case("a, a ->", X(6), X(6)))
rows(
    "_pack_padded_sequence",
    case(". . a, . -> . a, .", X(3, 4, 6), torch.tensor([4, 2, 1]), True),
    case(". . a, . -> . a, .", X(4, 3, 6), torch.tensor([3, 3, 1]), False),
)
rows(
    "addmm",
    case("a, b c, c a -> b a", X(5), X(4, 6), X(6, 5)),
    case("a b, a c, c b -> a b", X(4, 5), X(4, 6), X(6, 5)),
    case("a ., a b, b c -> a c", X(4, 1), X(4, 6), X(6, 5), beta=2, alpha=3),
    case(". a, b c, c a -> b a", X(1, 5), X(4, 6), X(6, 5)),
    case("., a b, b c -> a c", X(1), X(4, 6), X(6, 5)),
)
rows(
    "addmv",
    case("a, a b, b -> a", X(4), X(4, 6), X(6)),
    case("., a b, b -> a", X(1), X(4, 6), X(6)),
)
rows(
    "baddbmm",
    case("a ., b a c, b c d -> b a d", X(4, 1), X(2, 4, 6), X(2, 6, 5)),
    case(". a b, c a d, c d b -> c a b", X(1, 4, 5), X(2, 4, 6), X(2, 6, 5)),
)
rows(
    "baddbmm baddbmm_",
    case("a b c, a b d, a d c -> a b c", X(2, 4, 5), X(2, 4, 6), X(2, 6, 5), beta=2),
)
rows(
    "addbmm addbmm_",
    case("a b, c a d, c d b -> a b", X(4, 5), X(2, 4, 6), X(2, 6, 5), beta=2, alpha=3),
)
rows("addbmm", case("a, b c d, b d a -> c a", X(5), X(2, 4, 6), X(2, 6, 5)))
rows("addr addr_", case("a b, a, b -> a b", X(4, 5), X(4), X(5), beta=2, alpha=3))
rows("addr", case("a, b, a -> b a", X(5), X(4), X(5)))
ADJACENCY = torch.eye(4, 6, dtype=torch.float64) + torch.eye(4, 6, dtype=torch.float64).roll(2, 1)
rows(
    "_sparse_addmm",
    case(". a, . ., . a -> . a", X(4, 5), ADJACENCY.to_sparse(), X(6, 5), beta=2, alpha=3),
)
rows("_sparse_mm", case(". ., . a -> . a", ADJACENCY.to_sparse(), X(6, 5)))
with warnings.catch_warnings(action="ignore"):  # of a beta state
    ROWS_OF_EACH = ADJACENCY.to_sparse_csr()
rows("_sparse_mm.reduce", case(". ., . a -> . a", ROWS_OF_EACH, X(6, 5), "mean"))
rows(
    "_sparse_mm_reduce_impl",
    case(". ., . a -> . a, .", ROWS_OF_EACH, X(6, 5), "mean"),
)
rows(
    "_trilinear",
    case(
        "a b, c b d, a d -> a c",
        X(4, 5),
        X(3, 5, 6),
        X(4, 6),
        [1, 3],
        [0],
        [1, 2],
        [2, 3],
    ),
    case("a b, b c, a c -> a", X(4, 5), X(5, 6), X(4, 6), [2], [0], [1], [1, 2]),
)
rows(
    "_cdist_forward",
    case("a b, c b -> a c", X(4, 6), X(5, 6), 2.0, None),
    case("a b c, a d c -> a b d", X(2, 4, 6), X(2, 5, 6), 1.0, None),
    case("a b c, . d c -> a b d", X(2, 4, 6), X(1, 5, 6), 3.0, 2),
    case("a b, c b -> a c", X(4, 6), X(5, 6), float("inf"), None),
)
rows("_euclidean_dist", case("a b, c b -> a c", X(4, 6), X(5, 6)))
rows("_pdist_forward", case(". a -> .", X(4, 6)), case(". a -> .", X(4, 6), 1.0))
rows(
    "dist",
    case("a b, a b ->", X(4, 6), X(4, 6)),
    case("a, a ->", X(4), X(4), 1),
    case(". ., . ->", X(4, 6), X(6)),
)
rows(
    "_grouped_mm",
    case(
        ". a, . a b, . -> . b",
        X(7, 8).float(),
        X(1, 8, 12).float(),
        torch.tensor([7], dtype=torch.int32),
    ),
    case(". . ., . . . -> . . .", X(3, 4, 8).float(), X(3, 8, 4).float()),
)
rows(
    "_grouped_mm",
    case(
        ". a, b a c, b -> . c",
        X(7, 8).float(),
        X(3, 8, 12).float(),
        torch.tensor([2, 4, 7], dtype=torch.int32),
    ),
    case(
        ". a, b a c, b -> . c",
        X(7, 8).bfloat16(),
        X(3, 16, 8).bfloat16().transpose(1, 2),
        torch.tensor([2, 4, 7], dtype=torch.int32),
    ),
    values=False,  # beyond the last offset that is kept the kernel leaves rows as they are
)


def conv(
    outcome: str,
    image: Sequence[int],
    weight: Sequence[int],
    *,
    bias: bool = True,
    groups: int = 1,
    transposed: bool = False,
    stride: int = 1,
    dilation: int = 1,
) -> Sample:
    """A convolution with padding 1."""
    rank = len(image) - 2
    outs = weight[1] * groups if transposed else weight[0]
    spatial = ([stride] * rank, [1] * rank, [dilation] * rank)
    args = (X(*image), X(*weight), X(outs) if bias else None, *spatial, transposed, [0] * rank)
    return case(outcome, *args, groups)


def with_groups(cut: Cut) -> Mapping[str, Any]:
    """As many groups as blocks are left."""
    channels = cut.shapes[0][1] if cut.args["transposed"] else cut.args["input"].shape[1]
    return {"groups": channels // cut.args["weight"].shape[1]}


CONVOLUTIONS = (
    conv("a b . ., c b . ., c -> a c . .", (2, 4, 5, 5), (6, 4, 3, 3)),
    conv(
        "a b . ., c b . . -> a c . .", (2, 4, 5, 5), (6, 4, 3, 3), bias=False, stride=2, dilation=2
    ),
    conv(". . . ., a . . ., a -> . a . .", (1, 1, 5, 5), (6, 1, 1, 1)),
    conv("a b ., c b ., c -> a c .", (2, 4, 7), (6, 4, 3)),
    conv("a b . . ., c b . . ., c -> a c . . .", (2, 4, 3, 3, 3), (6, 4, 2, 2, 2)),
    conv("a b . ., b . . ., b -> a b . .", (2, 6, 5, 5), (6, 1, 3, 3), groups=6),
    conv("a b . ., bc . . . -> a bc . .", (2, 6, 5, 5), (12, 1, 3, 3), groups=6, bias=False),
    conv("a bc . ., cd b . ., cd -> a cd . .", (2, 12, 5, 5), (6, 4, 3, 3), groups=3),
    conv("a bc . ., b c . ., b -> a b . .", (2, 12, 5, 5), (3, 4, 3, 3), groups=3),
    conv("a bc ., cd b . -> a cd .", (2, 12, 5), (12, 2, 3), groups=6, bias=False),
    conv("a b . ., b c . ., c -> a c . .", (2, 4, 5, 5), (4, 6, 3, 3), transposed=True),
    conv("a b ., b c . -> a c .", (2, 4, 5), (4, 6, 3), transposed=True, stride=2, bias=False),
    conv(
        "a bc . ., bc d . ., db -> a db . .",
        (2, 12, 5, 5),
        (12, 2, 3, 3),
        transposed=True,
        groups=3,
    ),
    conv("a b . ., b . . ., b -> a b . .", (2, 6, 5, 5), (6, 1, 3, 3), transposed=True, groups=6),
    conv(
        "a b . ., b c . . -> a bc . .",
        (2, 6, 5, 5),
        (6, 2, 3, 3),
        transposed=True,
        groups=6,
        bias=False,
    ),
)
rows("convolution", *CONVOLUTIONS, resize=with_groups)
rows(
    "_convolution",
    *(case(s.outcome, *s.args, False, False, False, False) for s in CONVOLUTIONS),
    resize=with_groups,
)

# -- attention -------------------------------------------------------------------------------------


def with_scale(cut: Cut) -> Mapping[str, Any]:
    """The scale that the original had: half a head's dims are no reason for another one."""
    return {"scale": cut.before["scale"] or cut.before["query"].shape[-1] ** -0.5}


def as_a_forward(args: Mapping[str, Any]) -> Sequence[Tensor | None]:
    """The function that forwards call, which takes another kernel where head sizes differ."""
    mask = args.get("attn_mask", args.get("attn_bias"))
    tensors = (args["query"], args["key"], args["value"])
    causal, scale = args["is_causal"], args["scale"]
    out = scaled_dot_product_attention(
        *tensors, mask, is_causal=causal, scale=scale, enable_gqa=True
    )
    return out, *(None,) * 8


QKV = (X(2, 4, 5, 6), X(2, 4, 7, 6), X(2, 4, 7, 6))
GQA = (X(2, 4, 5, 6), X(2, 2, 7, 6), X(2, 2, 7, 6))
MQA = (X(2, 4, 5, 6), X(2, 1, 7, 6), X(2, 1, 7, 6))
rows(
    "_scaled_dot_product_flash_attention_for_cpu",
    case("a b . c, a b . c, a b . d -> a b . d, a b .", *QKV),
    case("a b . c, a b . c, a b . d -> a b . d, a b .", *QKV, scale=0.5),
    case(
        "a b . c, a b . c, a b . d -> a b . d, a b .",
        X(2, 4, 5, 6),
        X(2, 4, 5, 6),
        X(2, 4, 5, 6),
        is_causal=True,
    ),
    case("a b . c, a b . c, a b . d, . . -> a b . d, a b .", *QKV, attn_mask=X(5, 7)),
    case("a b . c, a b . c, a b . d, a . . . -> a b . d, a b .", *QKV, attn_mask=X(2, 1, 5, 7)),
    case("a b . c, a b . c, a b . d, . b . . -> a b . d, a b .", *QKV, attn_mask=X(1, 4, 5, 7)),
    case("a b . c, a b . c, a b . d, a b . . -> a b . d, a b .", *QKV, attn_mask=X(2, 4, 5, 7)),
    case("a bc . d, a b . d, a b . e -> a bc . e, a bc .", *GQA),
    case("a bc . d, a b . d, a b . e, a bc . . -> a bc . e, a bc .", *GQA, attn_mask=X(2, 4, 5, 7)),
    case("a b . c, a . . c, a . . d -> a b . d, a b .", *MQA),
    resize=with_scale,
    again=as_a_forward,
)
rows(
    "_scaled_dot_product_attention_math",
    case(
        "a b . c, a b . c, a b . d -> a b . d, a b . .", X(2, 4, 5, 6), X(2, 4, 7, 6), X(2, 4, 7, 8)
    ),
    case("a b . c, a b . c, a b . d, . . -> a b . d, a b . .", *QKV, X(5, 7), scale=0.5),
    case("a b . c, a b . c, a b . d, b . . -> a b . d, a b . .", *QKV, X(4, 5, 7)),
    case("a b . c, a b . c, a b . d, a b . . -> a b . d, a b . .", *QKV, X(2, 4, 5, 7)),
    case("a b . c, a b . c, a b . d, a . . . -> a b . d, a b . .", *QKV, B(2, 1, 1, 7) | True),
    case(
        "a b . c, a b . c, a b . d -> a b . d, a b . .",
        X(2, 4, 5, 6),
        X(2, 4, 5, 6),
        X(2, 4, 5, 6),
        is_causal=True,
    ),
    case("a bc . d, a b . d, a b . e -> a bc . e, a bc . .", *GQA, enable_gqa=True),
    case(
        "a bc . d, a b . d, a b . e, a bc . . -> a bc . e, a bc . .",
        *GQA,
        X(2, 4, 5, 7),
        enable_gqa=True,
    ),
    case("a b . c, a . . c, a . . d -> a b . d, a b . .", *MQA, enable_gqa=True),
    case("a . b, a . b, a . c -> a . c, a . .", X(4, 5, 6), X(4, 7, 6), X(4, 7, 8)),
    case(
        "a . b, a . b, a . c, a . . -> a . c, a . .", X(4, 5, 6), X(4, 7, 6), X(4, 7, 8), X(4, 5, 7)
    ),
    case(". a, . a, . b, . . -> . b, . .", X(5, 6), X(7, 6), X(7, 8), X(5, 7)),
    case(
        ". a . b, c a . b, c . . d -> c a . d, c a . .", X(1, 4, 5, 6), X(2, 4, 7, 6), X(2, 1, 7, 6)
    ),
    case(
        "a b c . d, a b c . d, a b c . e, b . . . -> a b c . e, a b c . .",
        X(3, 2, 4, 5, 6),
        X(3, 2, 4, 7, 6),
        X(3, 2, 4, 7, 6),
        X(2, 1, 5, 7),
    ),
    resize=with_scale,
)
META = (M(2, 4, 8, 16), M(2, 4, 8, 16), M(2, 4, 8, 16))
rows(
    "_scaled_dot_product_flash_attention",
    case("a b . c, a b . c, a b . d -> a b . d, a b ., ., , .", *META),
    resize=with_scale,
    again=as_a_forward,
)
rows(
    "_scaled_dot_product_efficient_attention",
    case("a b . c, a b . c, a b . d -> a b . d, a b .,", *META, None, True),
    case("a b . c, a b . c, a b . d, a b . . -> a b . d, a b .,", *META, M(2, 4, 8, 8), True),
    case("a b . c, a b . c, a b . d, . . . . -> a b . d, a b .,", *META, M(1, 1, 8, 8), False),
    resize=with_scale,
)
rows(
    "_scaled_dot_product_cudnn_attention",
    case("a b . c, a b . c, a b . d -> a b . d, a b . .,", *META, None, True),
    case("a b . c, a b . c, a b . d, a b . . -> a b . d, a b . .,", *META, M(2, 4, 8, 8), False),
    resize=with_scale,
)
rows(
    "_scaled_dot_product_fused_attention_overrideable",
    case("a b . c, a b . c, a b . d -> a b . d, a b .,", *META),
    case("a b . c, a b . c, a b . d, a b . . -> a b . d, a b .,", *META, M(2, 4, 8, 8)),
    resize=with_scale,
)

# -- views -----------------------------------------------------------------------------------------


def with_size(cut: Cut) -> Mapping[str, Any]:
    """The size that is left, and row-major strides where some are asked for."""
    size = {"shape" if "shape" in cut.args else "size": list(cut.shapes[0])}
    return {**size, **({"stride": strides_of(cut.shapes[0])} if "stride" in cut.args else {})}


VIEWS = (
    case("a b -> ab", X(4, 6), [24]),
    case("ab -> a b", X(24), [4, 6]),
    case("a b -> a b", X(4, 6), [4, 6]),
    case("a bc d -> a b c d", X(2, 12, 5), [2, 3, 4, -1]),
    case("a b c -> ab c", X(2, 3, 4), [6, 4]),
    case("a b c -> abc", X(2, 3, 4), [-1]),
    case("a b c -> a bc", X(2, 3, 4), [2, -1]),
    case("abc -> a b c", X(12), [2, 3, 2]),
    case("ab c -> a cb", X(4, 6), [2, 12]),
    case("ab cd -> ca db", X(2, 6), [3, 4]),
    case("a b -> a . b", X(4, 6), [4, 1, 6]),
    case("a . b -> a b", X(4, 1, 6), [4, 6]),
    case(". ->", X(1), []),
    case("-> . .", X(), [1, 1]),
    case(". a -> . . .", X(0, 4), [0, 2, 2]),
)
rows("view _unsafe_view reshape _reshape_copy", *VIEWS, resize=with_size)
rows("reshape _reshape_copy", case("a b -> ab", X(6, 4).t(), [24]), resize=with_size)
rows(
    "_reshape_alias",
    case("a b -> ab", X(4, 6), [24], [1]),
    case("ab -> a b", X(24), [4, 6], [6, 1]),
    case("a b c -> ab c", X(2, 3, 4), [6, 4], [4, 1]),
    resize=with_size,
)
rows(
    "permute",
    case("a b c -> c a b", X(2, 3, 4), [2, 0, 1]),
    case("a b c -> c a b", X(2, 3, 4), [-1, -3, -2]),
    case("a . -> . a", X(2, 1), [1, 0]),
)
rows(
    "transpose.int transpose_",
    case("a b c -> c b a", X(2, 3, 4), 0, 2),
    case("a b c -> a c b", X(2, 3, 4), -1, -2),
    case("a b -> a b", X(2, 3), 1, 1),
)
rows("t t_", case("a b -> b a", X(2, 3)), case("a -> a", X(3)))
rows("movedim.intlist", case(". . . -> . . .", X(2, 3, 4), [0, 1], [2, 0]))
rows(
    "unsqueeze unsqueeze_",
    case("a b -> . a b", X(2, 3), 0),
    case("a b -> a . b", X(2, 3), 1),
    case("a b -> a b .", X(2, 3), -1),
    case("a b -> a . b", X(2, 3), -2),
    case("-> .", X(), 0),
)
rows(
    "squeeze",
    case(". a~ . b~ -> a~ b~", X(1, 4, 1, 6)),
    case(". . ->", X(1, 1)),
    case("a~ b~ -> a~ b~", X(4, 6)),
)
rows(
    "squeeze.dim squeeze_.dim",
    case("a . b -> a b", X(4, 1, 6), 1),
    case("a b . -> a b", X(4, 6, 1), -1),
    case(". a b -> a b", X(1, 4, 6), -3),
    case("a~ b -> a~ b", X(4, 6), 0),
    case("a b~ -> a b~", X(4, 6), -1),
)
rows(
    "squeeze.dims",
    case(". a . b -> a b", X(1, 4, 1, 6), [0, 2]),
    case(". a . b~ -> a . b~", X(1, 4, 1, 6), [-1, -4]),
    case("a . -> a .", X(4, 1), []),
)
rows(
    "expand",
    case(". a -> b a", X(1, 6), [4, 6]),
    case("a -> b a", X(6), [4, 6]),
    case("a . b -> a c b", X(4, 1, 6), [-1, 5, -1]),
    case("a b -> a b", X(4, 6), [4, 6]),
    case(". a -> . a", X(1, 6), [1, -1]),
    case("-> a b", X(), [2, 3]),
)
rows(
    "repeat",
    case("a b -> a b", X(4, 6), [2, 3]),
    case("a -> . a", X(6), [2, 1]),
    case("a b -> . a b", X(4, 6), [1, 1, 1]),
    case(". a -> . a", X(1, 6), [5, 1]),
)
rows("rot90", case(". . a -> . . a", X(4, 6, 3)), case("a . . -> a . .", X(2, 4, 6), 2, [-1, 1]))
rows(
    "diagonal",
    case("a a -> a", X(4, 4)),
    case("a b a -> b a", X(4, 6, 4), 0, 0, 2),
    case(". . -> .", X(4, 6)),
    case("a . . -> a .", X(2, 4, 4), 1, -1, -2),
)
rows("trace", case("a a ->", X(4, 4)), case(". . ->", X(4, 6)))
rows(
    "diag_embed",
    case("a b -> a b b", X(3, 4)),
    case("a b -> b a b", X(3, 4), 0, 0, 2),
    case("a . -> a . .", X(3, 4), 1),
)
rows(
    "slice.Tensor",
    case("a b -> a b", X(6, 4)),
    case("a b -> a b", X(6, 4), -1, 0, 4),
    case("a b -> a b", X(6, 4), 0, -6, 2**63 - 1),
    case("a~ b -> . b", X(6, 4), 0, 0, 3),
    case("a~ b -> a b", X(6, 4), -2, 1, 6),
    case(". a -> . a", X(6, 4), 0, 0, 6, 2),
    case("a~ b -> . b", X(6, 4), 0, 2, 3),
    case("a~ b -> . b", X(6, 4), 0, 3, 3),
    case("a~ b -> a b", X(6, 4), 0, 3),
    case(". a -> . a", X(6, 4), 0, -9, 3),
    case("a~ b -> . b", X(6, 4), 0, -4, -1),
    case(". a -> . a", X(6, 4), 0, 1, -9),
    case(". a -> . a", X(6, 4), 0, 8, 9),
    case(". a -> . a", X(6, 4), 0, 2, -1, 3),
    case("a~ b -> a b", X(6, 4), 0, 0, -2),
)


def attribute(name: str, value: int) -> int:
    """An integer that a module keeps under that name."""
    return Provenance(value, Attribute("", name))


def with_bounds(cut: Cut) -> Mapping[str, Any]:
    """The bounds that were stated."""
    names = [name for name in ("start", "end") if cut.before[name]]
    return dict(zip(names, cut.stated, strict=True))


HALF, THIRD = attribute("half", 3), attribute("third", 2)


def with_repeats(cut: Cut) -> Mapping[str, Any]:
    """Where nothing is stated, as often as before."""
    return {} if cut.stated else {"repeats": cut.before["repeats"]}


def repeated(*times: int) -> Given:
    """``x.repeat(*times)``."""
    return Given(Tensor.repeat, (X(1), *times), {})


rows(
    "repeat",
    case(". . -> a .", X(1, 1), [3, 1], given=repeated(HALF, 1)),
    case(". a -> b a", X(1, 4), [3, 1], given=repeated(HALF, 1)),
    case("a b -> ac bd", X(4, 5), [3, 2], given=repeated(HALF, THIRD)),
    case("a -> b a", X(4), [3, 1], given=repeated(HALF, 1)),
    case("a b -> a b", X(4, 6), [2, 3], given=repeated(2, 3)),
    resize=with_repeats,
)
rows(
    "slice.Tensor",
    case("a . -> a .", X(6, 1), 0, 0, 3, given=Given(Tensor.__getitem__, (slice(0, HALF),), {})),
    case("a . -> a .", X(6, 1), 0, 3, given=Given(Tensor.__getitem__, (slice(HALF, None),), {})),
    case(
        "a . -> a .", X(6, 1), 0, 2, 3, given=Given(Tensor.__getitem__, (slice(THIRD, HALF),), {})
    ),
    case(
        "a . -> a .", X(6, 1), 0, 0, -2, given=Given(Tensor.__getitem__, (slice(None, -THIRD),), {})
    ),
    resize=with_bounds,
)
rows(
    "select.int",
    case(". a -> a", X(3, 4), 0, 1),
    case("a . b -> a b", X(3, 1, 4), -2, 0),
    case(". ->", X(3), -1, -1),
)
rows(
    "unbind.int",
    case(". a -> a", X(3, 4)),
    case("a . b -> a b", X(3, 4, 2), -2),
    case("a . -> a", X(4, 1), 1),
)


def with_split_size(cut: Cut) -> Mapping[str, Any]:
    """The size of the first piece."""
    return {"split_size": cut.shapes[0][cut.args["dim"]]}


def with_split_sizes(cut: Cut) -> Mapping[str, Any]:
    """The sizes of all pieces."""
    return {"split_sizes": [shape[cut.args["dim"]] for shape in cut.shapes]}


rows(
    "split.Tensor unsafe_split.Tensor",
    case("a b -> a b", X(12, 2), 4),
    case("a b -> a b", X(2, 12), 3, -1),
    case(". a -> . a", X(12, 2), 5),
    case("a b -> a b", X(12, 2), 12),
    case("a b -> a b", X(12, 2), 20),
    case(". a -> . a", X(3, 2), 1),
    resize=with_split_size,
)
rows(
    "chunk unsafe_chunk",
    case("a b -> a b", X(12, 2), 3),
    case("a b -> a b", X(2, 12), 2, -1),
    case("a b -> a b", X(6, 2), 4),
    case(". a -> . a", X(7, 2), 2),
    case("a b -> a b", X(6, 2), 1),
)
rows(
    "split_with_sizes unsafe_split_with_sizes",
    case(". a -> . a", X(12, 2), [4, 8]),
    case("a . -> a .", X(2, 12), [6, 6], -1),
    case(". a -> . a", X(12, 2), [12]),
    case("a b -> a b", X(5, 2), [2, 3], given=Given(torch.split, (X(5, 2), [THIRD, HALF]), {})),
    case("a~ b -> . b, a b", X(5, 2), [2, 3], given=Given(torch.split, (X(5, 2), [2, HALF]), {})),
    resize=with_split_sizes,
)
rows(
    "cat",
    case("a b, c b -> a|c b", [X(2, 3), X(4, 3)]),
    case("a b, a c, a . -> a b|c~", [X(2, 3), X(2, 4), X(2, 1)], -1),
    case("a b, ., a c -> a b|c", [X(2, 3), X(0), X(2, 4)], 1),
    case("a b, a . -> a b", [X(2, 3), X(2, 0)], 1),
    case("a b -> a b", [X(2, 3)], 1),
    case(". a, . a -> . a", [X(1, 3), X(1, 3)], 0),
    case("., . -> .", [X(0), X(0)]),
)
rows(
    "stack",
    case("a b, a b -> . a b", [X(2, 3), X(2, 3)]),
    case("a b, a b, a b -> a b .", [X(2, 3), X(2, 3), X(2, 3)], -1),
    case("a b -> a . b", [X(2, 3)], -2),
    case(",  -> .", [X(), X()]),
)
rows(
    "constant_pad_nd",
    case("a b c -> a b c~", X(2, 3, 4), [1, 2]),
    case("a b c -> a b~ c", X(2, 3, 4), [0, 0, 1, 0], 2.0),
    case("a b . -> a b .", X(2, 3, 4), [-1, 1]),
    case("a b . -> a~ b .", X(2, 3, 4), [0, -1, 0, 0, 0, 1]),
    case("a . -> a .", X(2, 1), [1, 1]),
)
rows(
    "flip",
    case("a b c -> a b c", X(2, 3, 4), [1]),
    case("a b c -> a b c", X(2, 3, 4), [-1, 0]),
    case("a b -> a b", X(2, 3), []),
)
rows(
    "roll",
    case(". a -> . a", X(3, 4), [1], [0]),
    case(". . -> . .", X(3, 4), [1, 2], [0, -1]),
    case(". . -> . .", X(3, 4), [1]),
)
rows(
    "pixel_shuffle",
    case("a b . . -> a b . .", X(2, 12, 3, 3), 2),
    case("a . . -> a . .", X(18, 2, 3), 3),
    case("a . . . -> a . . .", X(2, 4, 3, 3), 2),
)
rows(
    "pixel_unshuffle",
    case("a b . . -> a b . .", X(2, 3, 4, 4), 2),
    case("a . . -> a . .", X(3, 6, 3), 3),
)
rows(
    "channel_shuffle native_channel_shuffle",
    case("a b c d -> a b c d", X(2, 6, 3, 3), 2),
    case("a b c -> a b c", X(2, 12, 3), 3),
    case("a . b c -> a . b c", X(2, 6, 3, 3), 6),
)


def with_strides(cut: Cut) -> Mapping[str, Any]:
    """As asked for where nothing was cut, else the size that is left, row-major."""
    same = cut.args["self"].shape == cut.before["self"].shape
    return {} if same else with_size(cut)


rows(
    "as_strided as_strided_",
    case("a . b -> a . b", X(4, 1, 6), [4, 1, 6], [6, 1, 1]),
    case("a b -> a b", X(4, 6), [4, 6], [6, 1]),
    case(". . -> . .", X(4, 6), [6, 4], [1, 6]),
    case(". . -> . .", X(4, 6), [2, 3], [6, 1], 2),
    case(". . -> . .", X(4, 4).t(), [4, 4], [4, 1]),
    case("a b -> a b", X(4, 6), [4, 6], [6, 1], 0),
    resize=with_strides,
)
rows(
    "glu",
    case("a b -> a b", X(4, 6)),
    case("a b -> a b", X(6, 4), 0),
    case("a . -> a .", X(2, 3)[:, :2], -1),
)
COMPLEX = torch.complex(X(4, 6), X(4, 6))
rows("view_as_real", case("a b -> a b .", COMPLEX))
rows("view_as_complex", case("a b . -> a b", X(4, 6, 2)))
rows(
    "_fft_r2c",
    case("a . -> a .", X(4, 6), [1], 0, True),
    case("a b . -> a b .", X(2, 4, 6), [2], 0, True),
)
rows("_fft_c2r", case("a . -> a .", COMPLEX, [1], 0, 10))
rows("_fft_c2c", case(". a -> . a", COMPLEX, [0], 0, True))
rows("resize_", case("a b -> a b", X(4, 6), [4, 6]))
rows("unfold", case("a . -> a . .", X(2, 6), 1, 3, 1), case(". a -> . a .", X(6, 2), -2, 2, 2))
rows(
    "im2col",
    case("a b . . -> a b .", X(2, 3, 4, 4), [2, 2], [1, 1], [0, 0], [2, 2]),
    case("a b . . -> a b .", X(2, 3, 4, 4), [3, 3], [1, 1], [1, 1], [1, 1]),
    case("a . . -> a .", X(3, 4, 4), [2, 2], [1, 1], [0, 0], [2, 2]),
)
rows(
    "col2im",
    case("a b . -> a b . .", X(2, 12, 4), [4, 4], [2, 2], [1, 1], [0, 0], [2, 2]),
    case("a . -> a . .", X(12, 4), [4, 4], [2, 2], [1, 1], [0, 0], [2, 2]),
    case("a b . -> a b . .", X(2, 3, 4), [2, 2], [1, 1], [1, 1], [0, 0], [1, 1]),
)

# -- indexing --------------------------------------------------------------------------------------

rows(
    "embedding",
    case(". a, b c -> b c a", X(5, 6), I(5, 2, 3)),
    case(". a, b -> b a", X(5, 6), I(5, 4), 2),
    case(". .,  -> .", X(5, 1), I(5)),
)
BAG = (I(5, 7), torch.tensor([0, 2, 5]))
rows(
    "_embedding_bag _embedding_bag_forward_only",
    *(case(". a, ., . -> . a, .", X(5, 6), *BAG, False, mode) for mode in (0, 1)),
    case(". a, ., . -> . a, ., . a", X(5, 6), *BAG, False, 2),
    case(". a, ., ., . -> . a, .", X(5, 6), *BAG, False, 0, False, X(7)),
)
rows(
    "index_fill.int_Scalar index_fill_.int_Scalar",
    case("a ., . -> a .", X(3, 4), 1, torch.tensor([2, 0]), 0.5),
    case(". a, . -> . a", X(4, 3), -2, torch.tensor([2, 0]), 0.5),
)
rows(
    "index_fill.int_Tensor index_fill_.int_Tensor",
    case("a ., .,  -> a .", X(3, 4), 1, torch.tensor([2, 0]), X()),
)
ROWWISE = torch.tensor([[True], [False], [True]]).expand(3, 4)
rows(
    "masked_scatter masked_scatter_",
    case(". a, . a, . a -> . a", X(3, 4), ROWWISE, X(2, 4)),
    case(". ., . ., . . -> . .", X(3, 4), ROWWISE.clone(), X(2, 4)),
    case(". ., . ., . -> . .", X(3, 4), ROWWISE, X(8)),
)
rows(
    "segment_reduce",
    case(". a, . -> . a", X(4, 6), "mean", lengths=torch.tensor([1, 3])),
    case(". a, . -> . a", X(4, 6), "max", lengths=torch.tensor([2, 2])),
)
EDGES = torch.tensor([-0.5, 0.0, 0.5], dtype=torch.float64)
rows("bucketize.Tensor", case("a b, . -> a b", X(4, 6), EDGES))
rows("searchsorted.Tensor", case("., a b -> a b", EDGES, X(4, 6)))
rows("searchsorted.Tensor", case(". ., . . -> . .", EDGES.expand(4, 3).contiguous(), X(4, 6)))
rows(
    "index_reduce index_reduce_",
    case("a ., ., a . -> a .", X(3, 4), 1, torch.tensor([2, 0]), X(3, 2), "amax"),
)
rows(
    "index_select",
    case(". a, b -> b a", X(3, 4), 0, I(3, 5)),
    case("a ., b -> a b", X(3, 4), -1, I(4, 2)),
    case("a ., . -> a .", X(3, 4), 1, I(4, 1)),
    case("a .,  -> a .", X(3, 4), 1, I(4)),
)
rows(
    "gather",
    case("a ., a b -> a b", X(3, 4), 1, I(4, 3, 2)),
    case(". a, b a -> b a", X(3, 4), -2, I(3, 5, 4)),
    case(". ., a . -> a .", X(3, 4), 0, I(3, 2, 2)),
    case(",  ->", X(), 0, I(1)),
    case(", a -> a", X(), 0, I(1, 3)),
    case(".,  ->", X(3), 0, I(3)),
)
rows(
    "index.Tensor _unsafe_index.Tensor",
    case(". a b, . -> . a b", X(3, 4, 5), [I(3, 2)]),
    case("a . b, . -> a . b", X(3, 4, 5), [None, I(4, 2)]),
    case(". a b, . . -> . . a b", X(3, 4, 5), [I(3, 2, 6)]),
    case(". a ., ., . -> . a", X(3, 4, 5), [I(3, 2), None, I(5, 2)]),
    case(". . a, . ., . -> . . a", X(3, 4, 5), [I(3, 2, 1), I(4, 6)]),
    case("a b .,  -> a b", X(3, 4, 5), [None, None, I(5)]),
    case("a . . b, ., . -> a . b", X(2, 3, 4, 5), [None, I(3, 6), I(4, 6)]),
)
MASKED = (
    case(". a b, . -> . a b", X(3, 4, 5), [B(3)]),
    case("a . ., . . -> a .", X(3, 4, 5), [None, B(4, 5)]),
    case(". . ., . . . -> .", X(3, 4, 5), [B(3, 4, 5)]),
)
rows("index.Tensor", *MASKED)
rows(
    "index_put index_put_ _index_put_impl_",
    case(". a b, ., . a b -> . a b", X(3, 4, 5), [I(3, 2)], X(2, 4, 5)),
    case("a . b, ., b -> a . b", X(3, 4, 5), [None, I(4, 2)], X(5)),
    case("a . b, ., . . . -> a . b", X(3, 4, 5), [None, I(4, 2)], X(1, 2, 1)),
    case(". a ., ., ., . a -> . a .", X(3, 4, 5), [I(3, 2), None, I(5, 2)], X(2, 4), True),
    case(". a b, .,  -> . a b", X(3, 4, 5), [B(3)], X()),
)
DISTINCT = torch.tensor([[0, 1], [3, 2], [1, 0]])
rows(
    "scatter.src scatter_.src scatter_add scatter_add_",
    case("a ., a ., a . -> a .", X(3, 4), 1, DISTINCT, X(3, 2)),
    case(". a, . a, . a -> . a", X(4, 3), -2, DISTINCT.t().contiguous(), X(2, 3)),
    case(". ., . ., . . -> . .", X(3, 4), 0, DISTINCT[:2, :1] % 3, X(3, 3)),
    case("., ,  -> .", X(3), 0, torch.tensor(1), X()),
)
rows("scatter.value scatter_.value", case("a ., a . -> a .", X(3, 4), 1, DISTINCT, 0.5))
rows(
    "scatter_reduce.two scatter_reduce_.two",
    case("a ., a ., a . -> a .", X(3, 4), 1, DISTINCT, X(3, 2), "amax"),
)
rows(
    "index_add index_add_ index_copy index_copy_",
    case("a ., ., a . -> a .", X(3, 4), 1, torch.tensor([2, 0]), X(3, 2)),
    case(". ., ., . . -> . .", X(4, 1), 0, torch.tensor([2, 0]), X(2, 1)),
)
rows("index_copy index_copy_", case("., ,  -> .", X(3), 0, torch.tensor(1), X()))

# -- normalisation ---------------------------------------------------------------------------------


IMAGE, COLUMNS, CUBE = X(2, 4, 3, 3), X(5, 4), X(2, 4, 2, 2, 2)
HELD = (X(4), P(4))
INFERENCE = (False, 0.1, 1e-5)
TRAINING = (True, 0.1, 1e-5)
rows(
    "native_batch_norm _native_batch_norm_legit",
    case("a b c d, b, b, b, b -> a b c d, .", IMAGE, P(4), X(4), *HELD, *INFERENCE),
    case("a b, b, b -> a b, .", COLUMNS, None, None, *HELD, *INFERENCE),
    case("a b c d e, b, b, b -> a b c d e, .", CUBE, P(4), None, *HELD, *INFERENCE),
    case("a b c d, b, b, b, b -> a b c d, b", IMAGE, P(4), X(4), *HELD, *TRAINING),
    case("a b, b, b -> a b, b", COLUMNS, None, None, *HELD, *TRAINING),
)
rows(
    "native_batch_norm",
    case("a b c, b, b -> a b c, b", X(2, 4, 3), P(4), X(4), None, None, *TRAINING),
)
rows(
    "_native_batch_norm_legit.no_stats",
    case("a b c d, b, b -> a b c d, b", IMAGE, P(4), X(4), *TRAINING),
    case("a b -> a b, b", COLUMNS, None, None, *TRAINING),
)
rows(
    "_native_batch_norm_legit_no_training",
    case("a b c d, b, b, b, b -> a b c d, .", IMAGE, P(4), X(4), *HELD, 0.1, 1e-5),
    case("a b, b, b -> a b, .", COLUMNS, None, None, *HELD, 0.1, 1e-5),
)
ON_GPU = (M(2, 4, 3, 3), M(4), M(4), M(4), M(4))
rows(
    "cudnn_batch_norm miopen_batch_norm",
    case("a b c d, b, b, b, b -> a b c d, .", *ON_GPU, *INFERENCE),
)
rows("miopen_batch_norm", case("a b c d, b, b, b, b -> a b c d, b", *ON_GPU, *TRAINING))
rows(
    "_thnn_fused_lstm_cell",
    case("a b, a b, a b, b, b -> a b", M(2, 16), M(2, 16), M(2, 4), M(16), M(16)),
)


def fused_gru_cell(gates: Tensor, _: Tensor, state: Tensor, *biases: Any) -> tuple[Tensor, Tensor]:
    """The shapes of what the kernel returns, which PyTorch doesn't say."""
    return torch.empty_like(state), state.new_empty(len(state), 5 * state.shape[1])


SHAPES = Library("aten", "IMPL", "Meta")
SHAPES.impl("_thnn_fused_gru_cell", fused_gru_cell)
rows(
    "_thnn_fused_gru_cell",
    case("a b, a b, a b, b, b -> a b", M(2, 12), M(2, 12), M(2, 4), M(12), M(12)),
)
rows(
    "native_layer_norm",
    case("a b c, c, c -> a b c, a b .", X(2, 5, 6), [6], X(6), X(6), 1e-5),
    case("a b c -> a b c, a b .", X(2, 5, 6), [6], None, None, 1e-5),
    case("a b c, b c, b c -> a b c, a . .", X(2, 5, 6), [5, 6], X(5, 6), X(5, 6), 1e-5),
    case("a b, b -> a b, a .", X(2, 6), [6], None, X(6), 1e-5),
)
rows(
    "_fused_rms_norm",
    case("a b c, c -> a b c, a b .", X(2, 5, 6), [6], X(6), 1e-5),
    case("a b c -> a b c, a b .", X(2, 5, 6), [6], None, None),
    case("a b c, b c -> a b c, a . .", X(2, 5, 6), [5, 6], X(5, 6), 1e-5),
)


def with_batch(cut: Cut) -> Mapping[str, Any]:
    """The number of images that is left."""
    return {"N": cut.args["input"].shape[0]}


rows(
    "native_group_norm",
    case("a bc . ., bc, bc -> a bc . ., a b", X(2, 12, 3, 3), X(12), X(12), 2, 12, 9, 3, 1e-5),
    case("a bc . . -> a bc . ., a b", X(2, 12, 3, 3), None, None, 2, 12, 9, 3, 1e-5),
    case("a b ., b -> a b ., a .", X(2, 6, 5), X(6), None, 2, 6, 5, 1, 1e-5),
    case("a b . ., b, b -> a b . ., a b", X(2, 6, 3, 3), X(6), X(6), 2, 6, 9, 6, 1e-5),
    case("a bc, bc, bc -> a bc, a b", X(2, 6), X(6), X(6), 2, 6, 1, 2, 1e-5),
    resize=with_batch,
)
rows(
    "_weight_norm_interface",
    case("a b c, a . . -> a b c, a . .", X(4, 6, 3), X(4, 1, 1)),
    case("a b, . b -> a b, . b", X(4, 6), X(1, 6), 1),
)
for tail in ((False,), ()):
    rows(
        "_softmax _log_softmax" if tail else "softmax.int log_softmax.int _safe_softmax",
        case("a b -> a b", X(4, 6), 1, *tail),
        case("a b -> a b", X(4, 6), -2, *tail),
        case("a -> a", X(6), 0, *tail),
        case("a . -> a .", X(4, 1), -1, *tail),
        case("->", X(), 0, *tail),
    )
rows("cumsum", case("a b -> a b", X(4, 6), 1), case("a b -> a b", X(4, 6), -2), case("->", X(), 0))
rows("cumprod logcumsumexp", case("a . -> a .", X(4, 6), 1), case(". a -> . a", X(4, 6), -2))

# -- elementwise, factories ------------------------------------------------------------------------

rows(
    "copy_",
    case("a b, a b -> a b", X(4, 6), X(4, 6)),
    case("a b, b -> a b", X(4, 6), X(6)),
    case("a b, a . -> a b", X(4, 6), X(4, 1)),
    case("a b,  -> a b", X(4, 6), X()),
)
rows(
    "masked_fill.Scalar masked_fill_.Scalar",
    case("a b, a b -> a b", X(4, 6), B(4, 6), 0.5),
    case("a b, b -> a b", X(4, 6), B(6), 0.5),
    case("a b, a . -> a b", X(4, 6), B(4, 1), 0.5),
)
rows(
    "masked_fill.Scalar",
    case("a, b a -> b a", X(6), B(4, 6), 0.5),
    case("a ., . b -> a b", X(4, 1), B(1, 6), 0.5),
)
rows(
    "masked_fill.Tensor masked_fill_.Tensor",
    case("a b, a b,  -> a b", X(4, 6), B(4, 6), X()),
    case("a b, a .,  -> a b", X(4, 6), B(4, 1), X()),
)
rows(
    "lerp.Tensor",
    case("a b, b, a . -> a b", X(4, 6), X(6), X(4, 1)),
    case("a b, a b, a b -> a b", X(4, 6), X(4, 6), X(4, 6)),
)
ONE, TWO = (
    (case("a b -> a b", X(4, 6)),),
    (case("a b, a b -> a b", X(4, 6), X(4, 6)), case("a b, b -> a b", X(4, 6), X(6))),
)
rows("hardswish hardswish_ gelu_ mish_ abs_ log_sigmoid_forward", *ONE)
rows("_conj", case("a b -> a b", COMPLEX))
rows("threshold_", case("a b -> a b", X(4, 6), 0.1, 0.5))
rows("fill.Scalar fill_.Scalar floor_divide.Scalar", case("a b -> a b", X(4, 6), 0.5))
rows("fill.Tensor fill_.Tensor", case("a b,  -> a b", X(4, 6), X()))
rows(
    "_prelu_kernel",
    case("a b, . b -> a b", X(4, 6), X(1, 6)),
    case("a b, . . -> a b", X(4, 6), X(1, 1)),
)
rows("rrelu_with_noise", case("a b, a b -> a b", X(4, 6), X(4, 6)))
rows("floor_divide complex polar", *TWO)
rows("bernoulli.p", case("a b -> a b", X(4, 6), 1.0))
rows("randint_like", case("a b -> a b", X(4, 6), 5), values=False)
rows(
    "zero_ alias detach detach_ lift_fresh lift_fresh_copy",
    case("a b -> a b", X(4, 6)),
    case("->", X()),
)
rows(
    "zeros_like ones_like",
    case("a b -> a b", X(4, 6)),
    case("a b -> a b", X(4, 6), dtype=torch.float32),
)
rows("full_like", case("a b -> a b", X(4, 6), 0.5))
rows("empty_like rand_like randn_like", case("a b -> a b", X(4, 6)), values=False)
rows("_to_copy", case("a b -> a b", X(4, 6)), case("a b -> a b", X(4, 6), dtype=torch.float32))
rows(
    "dropout native_dropout",
    case("a b -> a b", X(4, 6), 0.5, False),
    case("a b -> a b", X(4, 6), 0.0, True),
)
rows("dropout native_dropout", case("a b -> a b", X(4, 6), 0.5, True), values=False)
rows("bernoulli", case("a b -> a b", B(4, 6).double()))
rows("bernoulli_.float", case("a b -> a b", X(4, 6), 1.0))
rows("uniform_", case("a b -> a b", X(4, 6), 0.5, 0.5))
rows("normal_", case("a b -> a b", X(4, 6), 0.5, 0.0))
rows("normal.Tensor_float", case("a b -> a b", X(4, 6), 0.0))
rows("normal.float_Tensor", case("a b -> a b", 0.5, P(4, 6)), values=False)
rows("normal.Tensor_Tensor", case("a b, b -> a b", X(4, 6), P(6)), values=False)
rows("bernoulli_.Tensor", case("a b, b -> a b", X(4, 6), P(6)), values=False)
rows("poisson _standard_gamma", case("a b -> a b", P(4, 6)), values=False)
rows("binomial", case("a b, b -> a b", 3 + P(4, 6).round(), P(6)), values=False)
rows("log_normal_ cauchy_ random_", case("a b -> a b", X(4, 6)), values=False)
rows("geometric_", case("a b -> a b", X(4, 6), 0.5), values=False)
rows("random_.to", case("a b -> a b", X(4, 6), 5), values=False)
rows("random_.from", case("a b -> a b", X(4, 6), 2, 5), values=False)
rows("exponential_", case("a b -> a b", X(4, 6)), values=False)

rows("zeros ones", case("-> a b", [4, 6]), case("-> . a", [1, 3]), case("->", []), resize=with_size)
rows("full", case("-> a b", [4, 6], 0.5), resize=with_size)
rows("normal.float_float", case("-> a b", 0.5, 2.0, [4, 6]), resize=with_size, values=False)
rows(
    "rand.generator randn.generator",
    case("-> a b", [4, 6], generator=None),
    resize=with_size,
    values=False,
)
rows("empty.memory_format rand randn", case("-> a b", [4, 6]), resize=with_size, values=False)
rows("empty_strided", case("-> a b", [4, 6], [6, 1]), resize=with_size, values=False)
rows("new_zeros new_ones", case("a -> b c", X(3), [4, 6]), case("a ->", X(3), []), resize=with_size)
rows("new_full", case("a -> b c", X(3), [4, 6], 0.5), resize=with_size)
rows("new_empty", case("a -> b c", X(3), [4, 6]), resize=with_size, values=False)
rows("new_empty_strided", case("a -> b c", X(3), [4, 6], [6, 1]), resize=with_size, values=False)
rows("scalar_tensor", case("->", 0.5))
rows("arange", case("-> .", 6))
rows("arange.start", case("-> .", 1, 6))
rows("arange.start_step", case("-> .", 1, 6, 2))
rows("linspace", case("-> .", 0, 1, 5))
rows("eye", case("-> . .", 4))
rows("randperm", case("-> .", 4), values=False)
rows("eye.m", case("-> . .", 4, 6))
rows("randint", case("-> . .", 5, [4, 6]), values=False)
rows("randint.low", case("-> . .", 2, 5, [4, 6]), values=False)

# -- reduction -------------------------------------------------------------------------------------

rows("mean sum prod max min var std", case("a b ->", X(4, 6)), case(". a ->", X(1, 6)))
rows("mean sum prod max min", case("->", X()))
rows("norm.Scalar", case("a b ->", X(4, 6)), case("a b ->", X(4, 6), 1))
rows("all any _is_all_true _is_any_true", case("a b ->", B(4, 6)))
LISTS = (
    case("a b c -> a c", X(2, 4, 6), [1]),
    case("a b c -> a b .", X(2, 4, 6), [-1], True),
    case("a b c -> b", X(2, 4, 6), [0, -1]),
    case("a b c -> . b .", X(2, 4, 6), [0, 2], True),
    case("a . -> a", X(4, 1), [1]),
)
rows("mean.dim sum.dim_IntList amax amin logsumexp", *LISTS)
rows("mean.dim sum.dim_IntList amax amin", case("a b ->", X(4, 6), []))
rows("mean.dim sum.dim_IntList", case("a b ->", X(4, 6), None))
rows("var.dim std.dim", *(case(s.outcome, s.args[0], s.args[1], False, *s.args[2:]) for s in LISTS))
rows(
    "var.correction std.correction var_mean.correction std_mean.correction",
    *(case(s.outcome, s.args[0], s.args[1], correction=0, keepdim=len(s.args) > 2) for s in LISTS),
    case("a b ->", X(4, 6)),
    case("a b ->", X(4, 6), [], correction=1),
)
rows(
    "linalg_vector_norm",
    *(case(s.outcome, s.args[0], 2, *s.args[1:]) for s in LISTS),
    case("a b ->", X(4, 6)),
    case("a b -> . .", X(4, 6), float("inf"), None, True),
)
rows("norm.ScalarOpt_dim", *(case(s.outcome, s.args[0], 2, *s.args[1:]) for s in LISTS))
rows(
    "norm.ScalarOpt_dim_dtype",
    case("a b -> a .", X(4, 6).float(), 1, [-1], True, dtype=torch.float64),
)
rows(
    "prod.dim_int",
    case("a b c -> a c", X(2, 4, 6), 1),
    case("a b c -> a b .", X(2, 4, 6), -1, True),
)
rows(
    "all.dim any.dim",
    case("a b c -> a c", B(2, 4, 6), 1),
    case("a b c -> a b .", B(2, 4, 6), -1, True),
)
rows(
    "any.dims all.dims",
    case("a b c -> b", B(2, 4, 6), [0, -1]),
    case("a b c -> a . c", B(2, 4, 6), [1], True),
    case("a b ->", B(4, 6)),
    case("a b -> a b", B(4, 6), []),
)
rows(
    "aminmax",
    case("a b c -> a c", X(2, 4, 6), dim=1),
    case("a b c -> a b .", X(2, 4, 6), dim=-1, keepdim=True),
    case("a b ->", X(4, 6)),
)
rows(
    "max.dim min.dim median.dim nanmedian.dim mode",
    case("a b c -> a c", X(2, 4, 6), 1),
    case("a b c -> a b .", X(2, 4, 6), -1, True),
)
rows(
    "argmax argmin",
    case("a b c -> a c", X(2, 4, 6), 1),
    case("a b c -> a b .", X(2, 4, 6), -1, True),
    case(". . ->", X(4, 6)),
    case(". . -> . .", X(4, 6), None, True),
)
rows("multinomial", case("a . -> a .", P(4, 6), 2), values=False)
rows("multinomial", case(". -> .", P(6), 2), values=False)
rows("cummax cummin", case("a . -> a .", X(4, 6), 1), case(". a -> . a", X(4, 6), -2))
rows("nansum", *LISTS, case("a b ->", X(4, 6)))
rows("median nanmedian", case("a b ->", X(4, 6)))
rows("count_nonzero", case("a b ->", B(4, 6)), case("a b -> a", B(4, 6), 1))
rows("count_nonzero.dim_IntList", *(case(s.outcome, *s.args) for s in LISTS if len(s.args) == 2))
rows(
    "topk",
    case("a b -> a .", X(4, 6), 2),
    case("a b -> . b", X(4, 6), 2, 0),
    case("a b -> a .", X(4, 6), 1, 1, False),
    case("a b -> a .", X(4, 6), 6),
    case("->", X(), 1),
)
rows("histc", case(". . -> .", X(4, 6), 6))
rows("kthvalue", case("a b~ -> a", X(4, 6), 2), case("a~ b -> . b", X(4, 6), 2, 0, True))
TARGETS = (X(4, 6), P(4, 6))
rows(
    "mse_loss smooth_l1_loss huber_loss soft_margin_loss binary_cross_entropy_with_logits",
    case("a b, a b -> a b", *TARGETS, reduction=0),
    case("a b, a b ->", *TARGETS, reduction=1),
    case("a b, a b ->", *TARGETS, reduction=2),
)
rows(
    "binary_cross_entropy",
    case("a b, a b, b -> a b", P(4, 6), P(4, 6), P(6), 0),
    case("a b, a b, b ->", P(4, 6), P(4, 6), P(6), 1),
)
rows("mse_loss", case("a b, . b ->", X(4, 6), X(1, 6)))
rows("renorm renorm_", case("a b c -> a b c", X(2, 4, 6), 2, 1, 0.5))


def observed(outcome: str, channels: int, axis: int, *shape: int) -> Sample:
    """A fused observer: for all entries, or (``channels`` > 0) for each channel."""
    each = (channels,) if channels else ()
    switch, grid = torch.tensor([1]), each or (1,)
    statistics = (-2 * torch.ones(each), 2 * torch.ones(each))
    scale, zero = torch.full(grid, 0.1), torch.zeros(grid, dtype=torch.int32)
    options = (0.01, 0, 255, axis, bool(channels))
    return case(outcome, X(*shape).float(), switch, switch, *statistics, scale, zero, *options)


rows(
    "_fused_moving_avg_obs_fq_helper",
    observed("a b, ., ., , , ., . -> a b", 0, 0, 4, 6),
    observed("a b, ., ., a, a, a, a -> a b", 4, 0, 4, 6),
)
GRID = (X(6).float().abs() + 0.1, torch.zeros(6, dtype=torch.int32))
rows(
    "fake_quantize_per_channel_affine_cachemask",
    case("a b, b, b -> a b", X(4, 6).float(), *GRID, 1, 0, 255),
)
rows(
    "fake_quantize_per_tensor_affine_cachemask",
    case("a b -> a b", X(4, 6).float(), 0.1, 2, 0, 255),
)
rows(
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
    case(
        "a b, ., ., . -> a b",
        X(4, 6).float(),
        torch.tensor([0.1]),
        torch.tensor([2], dtype=torch.int32),
        torch.tensor([1]),
        0,
        255,
    ),
)
rows("sort argsort", case("a . -> a .", X(4, 6)), case(". a -> . a", X(4, 6), 0, True))
rows(
    "sort.stable",
    case("a . -> a .", X(4, 6), stable=True),
    case(". a -> . a", X(4, 6), stable=True, dim=0),
)
rows("nonzero", case(". . -> . .", B(4, 6)), case(". -> . .", B(6)))
rows("triu tril triu_ tril_", case("a . . -> a . .", X(2, 4, 6)), case(". . -> . .", X(4, 6), 1))

# -- space -----------------------------------------------------------------------------------------

LINE, PLANE, VOLUME = X(2, 3, 6), X(2, 3, 6, 6), X(2, 3, 4, 4, 4)
rows("avg_pool1d", case("a b . -> a b .", LINE, [2]), case("a . -> a .", LINE[0], [3], [1], [1]))
rows(
    "max_pool2d_with_indices avg_pool2d max_pool2d",
    case("a b . . -> a b . .", PLANE, [2, 2]),
    case("a b . . -> a b . .", PLANE, [3, 3], [1, 1], [1, 1]),
    case("a . . -> a . .", PLANE[0], [2, 2]),
)
PLACES = torch.tensor([0, 7, 18, 35]).reshape(2, 2).expand(2, 3, 2, 2).contiguous()
rows(
    "max_unpool2d",
    case("a b . ., a b . . -> a b . .", X(2, 3, 2, 2), PLACES, [6, 6]),
    case("a . ., a . . -> a . .", X(3, 2, 2), PLACES[0], [6, 6]),
)
rows(
    "max_unpool3d",
    case(
        "a b . . ., a b . . . -> a b . . .",
        X(2, 3, 1, 2, 2),
        PLACES[:, :, None],
        [1, 6, 6],
        [1, 3, 3],
        [0, 0, 0],
    ),
)
rows("max_pool3d_with_indices avg_pool3d", case("a b . . . -> a b . . .", VOLUME, [2, 2, 2]))
rows("adaptive_avg_pool1d", case("a b . -> a b .", LINE, [2]), case("a b . -> a b .", LINE, [1]))
rows(
    "_adaptive_avg_pool2d adaptive_max_pool2d",
    case("a b . . -> a b . .", PLANE, [2, 3]),
    case("a b . . -> a b . .", PLANE, [1, 1]),
    case("a . . -> a . .", PLANE[0], [1, 1]),
)
rows("_adaptive_avg_pool3d adaptive_max_pool3d", case("a b . . . -> a b . . .", VOLUME, [2, 2, 2]))
rows("upsample_nearest1d _upsample_nearest_exact1d", case("a b . -> a b .", LINE, [12]))
rows("upsample_linear1d", case("a b . -> a b .", LINE, [12], False))
rows("upsample_nearest2d _upsample_nearest_exact2d", case("a b . . -> a b . .", PLANE, [12, 9]))
rows(
    "upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa",
    case("a b . . -> a b . .", PLANE, [12, 9], False),
    case("a b . . -> a b . .", PLANE, [3, 3], True),
)
rows(
    "upsample_nearest3d _upsample_nearest_exact3d",
    case("a b . . . -> a b . . .", VOLUME, [8, 8, 8]),
)
rows("upsample_trilinear3d", case("a b . . . -> a b . . .", VOLUME, [8, 8, 8], False))
rows(
    "upsample_nearest2d.vec",
    case("a b . . -> a b . .", PLANE, None, [2.0, 2.0]),
    case("a b . . -> a b . .", PLANE, [3, 3], None),
)
rows(
    "upsample_bilinear2d.vec upsample_bicubic2d.vec",
    case("a b . . -> a b . .", PLANE, None, False, [2.0, 2.0]),
)
rows(
    "reflection_pad1d replication_pad1d",
    case("a b . -> a b .", LINE, [1, 2]),
    case("a . -> a .", LINE[0], [1, 0]),
)
rows("reflection_pad2d replication_pad2d", case("a b . . -> a b . .", PLANE, [1, 2, 0, 1]))
rows(
    "reflection_pad3d replication_pad3d", case("a b . . . -> a b . . .", VOLUME, [1, 1, 0, 1, 2, 0])
)
rows("grid_sampler_2d", case("a b . ., a . . . -> a b . .", PLANE, X(2, 4, 5, 2), 0, 0, False))
rows(
    "grid_sampler_3d",
    case("a b . . ., a . . . . -> a b . . .", VOLUME, X(2, 4, 5, 3, 3), 0, 0, False),
)

# -- elementwise by tag ----------------------------------------------------------------------------

rows("clamp clamp_ clip clip_", case("a b -> a b", X(4, 6), -0.5, 0.5))  # defaults do nothing


def tagged() -> list[OpOverload]:
    """Every ATen overload that has its rule by the pointwise tag, those with ``out`` left out.

    The dispatcher knows all of them; ``dir(torch.ops.aten)`` those that were used before.
    """
    found = []
    for text in sorted(torch._C._dispatch_get_all_op_names()):
        namespace, _, name = text.partition("::")
        packet, _, overload = name.partition(".")
        if namespace != "aten":
            continue
        try:
            target = getattr(getattr(torch.ops.aten, packet), overload or "default")
        except AttributeError:  # what TorchScript alone can call
            continue
        written = any(argument.is_out for argument in target._schema.arguments)
        if torch.Tag.pointwise in target.tags and returns_tensor(target) and not written:
            found.append(target)
    own = set(registered())
    return [target for target in found if target not in own]


def pointwise_rows() -> list[Row]:
    """A row for every overload that has its rule by the pointwise tag, and no row yet."""
    by_hand = {row.overload for row in ROWS}
    return [
        generated_row(text, target) for target in tagged() if (text := spell(target)) not in by_hand
    ]


def spell(target: OpOverload) -> str:
    """The name under which a rule registers an overload."""
    namespace, _, name = str(target._schema.name).partition("::")
    overload = "" if target._overloadname == "default" else f".{target._overloadname}"
    return ("" if namespace == "aten" else f"{namespace}::") + name + overload


CONTENTS: tuple[Callable[..., Tensor], ...] = (
    P,
    lambda *shape: 1 + P(*shape),
    lambda *shape: 1 + I(4, *shape),
    B,
    lambda *shape: torch.complex(P(*shape), P(*shape)),
    lambda *shape: P(*shape).float(),
)
WORDS = {(4, 6): "a b", (6,): "b", (4, 1): "a ."}


def generated_row(text: str, target: OpOverload) -> Row:
    """Sample calls by the schema: all tensors of one shape, then broadcast ones."""
    count = sum(str(a.type) in ("Tensor", "Optional[Tensor]") for a in target._schema.arguments)
    equal = ((4, 6),) * count
    spread = tuple(((4, 6), (6,), (4, 1))[index % 3] for index in range(count))
    samples = []
    for shapes in dict.fromkeys((equal, spread)):
        args, kwargs = generated_call(target, shapes)
        words = ", ".join(WORDS[shape] for shape in shapes)
        samples.append(Sample(f"{words} -> a b", args, kwargs))
    random = torch.Tag.nondeterministic_seeded in target.tags
    return Row(text, tuple(samples), values=not random)


def generated_call(
    target: OpOverload, shapes: Sequence[tuple[int, ...]]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments under which the operator runs and gives numbers that differ."""
    for content in CONTENTS:
        for number in (0.5, 2):
            args, kwargs = _fill(target, iter(shapes), content, number)
            try:
                out = target(*_copies(args), **_copies_by_name(kwargs))
            except (RuntimeError, NotImplementedError, TypeError, ValueError):
                continue
            out = out[0] if isinstance(out, (tuple, list)) else out
            if out.isfinite().all() and (out.dtype == torch.bool or out.unique().numel() > 1):
                return args, kwargs
    raise AssertionError(f"no sample call for {target}: give it a row of its own")


def _fill(
    target: OpOverload,
    shapes: Iterator[tuple[int, ...]],
    content: Callable[..., Tensor],
    number: float,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    by_type = {"number": number, "float": 0.5, "int": 1, "bool": False, "str": "floor"}
    for argument in target._schema.arguments:
        kind = str(argument.type)
        if kind in ("Tensor", "Optional[Tensor]"):
            value = content(*next(shapes))
        elif argument.has_default_value():
            continue
        else:
            value = by_type[kind.removeprefix("Optional[").removesuffix("]")]
        if argument.kwarg_only:
            kwargs[argument.name] = value
        else:
            args.append(value)
    return tuple(args), kwargs


def _copies(args: Sequence[Any]) -> list[Any]:
    return [value.clone() if isinstance(value, Tensor) else value for value in args]


def _copies_by_name(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return dict(zip(kwargs, _copies(list(kwargs.values())), strict=True))
