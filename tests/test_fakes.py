"""Fakes that are made here agree with those that PyTorch makes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

import models_zoo
import prunus
from prunus.tracer.fakes import FakeRun, Fakes

aten = torch.ops.aten


def ours_and_theirs(func, *args, **kwargs):
    """What both return, ours from the second call on, when it comes from memory."""
    fakes = Fakes()
    first, second = (fakes.run(func, args, kwargs) for _ in range(2))
    mode = FakeTensorMode()
    fake_args, fake_kwargs = tree_map(
        lambda v: mode.from_tensor(v) if isinstance(v, Tensor) else v, (args, kwargs)
    )
    with mode:
        theirs = func(*fake_args, **fake_kwargs)
    return first, second, theirs


def described(value):
    return [
        (tuple(t.shape), t.stride(), t.dtype, t.device, t.storage_offset())
        for t in tree_leaves(value)
    ]


def normalised(data, training=False):
    args = (torch.ones(6), torch.ones(6), torch.zeros(6), torch.ones(6))
    args = tuple(one.to(data.dtype) for one in args)
    return aten.native_batch_norm.default, (data, *args, training, 0.1, 1e-5)


X = torch.randn(2, 6, 4, 5)
CALLS = [
    normalised(X),
    normalised(X.double()),
    normalised(X.bfloat16()),
    normalised(X.contiguous(memory_format=torch.channels_last)),
    normalised(X.transpose(2, 3)),
    normalised(torch.randn(3, 6)),
    normalised(torch.randn(3, 6, 4, 4, 4)),
    normalised(X, training=True),
    (aten.relu.default, (X,)),
    (aten.add.Tensor, (X, torch.randn(6, 1, 1))),
    (aten.add.Tensor, (X, 2)),
    (aten.add.Tensor, (torch.ones(3, dtype=torch.int64), 0.5)),
    (aten.add.Tensor, (torch.ones(3, dtype=torch.int64), 2)),
    (aten.add_.Tensor, (X, torch.randn(6, 1, 1))),
    (aten.t.default, (torch.randn(3, 4),)),
    (aten.view.default, (X, [2, 120])),
    (aten.convolution.default, (X, torch.randn(8, 6, 3, 3), None, [1, 1], [1, 1], [1, 1],
                                False, [0, 0], 1)),
    (aten.max_pool2d_with_indices.default, (X, [2, 2])),
    (aten.split.Tensor, (X, 2, 1)),
    (aten.cat.default, ([X, X], 1)),
    (aten.contiguous.default, (X,)),
    (aten.contiguous.default, (X.transpose(2, 3),)),
    (aten._to_copy.default, (X,), {"dtype": torch.float16}),
]  # fmt: skip


@pytest.mark.parametrize("call", CALLS, ids=lambda call: str(call[0]))
def test_the_second_answer_is_that_of_pytorch(call) -> None:
    func, args, *rest = call
    first, second, theirs = ours_and_theirs(func, *args, **(rest[0] if rest else {}))
    assert described(first) == described(second) == described(theirs)


def test_answers_are_fresh_and_in_place_operators_return_their_argument() -> None:
    fakes = Fakes()
    data = fakes.of(X)
    a, b = (fakes.run(aten.relu.default, (data,), {}) for _ in range(2))
    assert a is not b
    assert a.untyped_storage()._cdata != b.untyped_storage()._cdata
    assert all(fakes.run(aten.relu_.default, (data,), {}) is data for _ in range(2))


def test_resizing_in_place_is_seen() -> None:
    fakes = Fakes()
    for _ in range(2):
        data = fakes.run(aten.clone.default, (X,), {})
        assert tuple(fakes.run(aten.resize_.default, (data, [3, 3]), {}).shape) == (3, 3)


def test_values_decide_where_pytorch_says_so() -> None:
    fakes = Fakes()
    for _ in range(2):
        with pytest.raises(Exception, match="nonzero"):
            fakes.run(aten.nonzero.default, (X,), {})


def test_nothing_is_written_to() -> None:
    before = X.clone()
    with FakeRun():
        X.add_(1)
        torch.nn.functional.relu(X, inplace=True)
    assert torch.equal(before, X)


@pytest.mark.parametrize("name", ["resnet20", "vit_tiny", "bert_tiny", "llama_tiny", "yolov8n"])
def test_the_models_of_the_zoo_need_no_real_run(name, monkeypatch) -> None:
    monkeypatch.setattr("prunus.tracer.trace.deep_copy", None)
    prunus.trace(models_zoo.build(name), models_zoo.example_inputs(name))
