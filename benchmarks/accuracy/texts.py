"""English text with clear terms, in two parts that share no run of thirteen words.

The text is Python's own documentation of its language, which every Python ships as
``pydoc_data.topics`` (PSF License 2.0; examples in it also under 0BSD): 79 topics, some 60,000
words.  Nothing is downloaded.  Two versions of Python have slightly different texts, so a result
names the version.

A part has whole topics.  Topics quote one another, so a paragraph for calibration that shares
thirteen words in a row with the test part is dropped (the same rule by which training sets of
language models are cleaned of their tests), and the result is checked again by hashes.
"""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

SOURCE = f"documentation of Python {platform.python_version()}"
TEST_SHARE = 0.4
"""Of the words; topics are taken whole, so it is met roughly."""

RUN = 13
"""Words in a row that no two parts share."""

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_UNDERLINE = re.compile(r"([*=~^\"'+-])\1{2,}")
_ITEM = re.compile(r"(?:[*•-]|\d+\.) +")


@dataclass(frozen=True)
class Parts:
    """Paragraphs to calibrate on, and paragraphs to be scored on; never mixed."""

    calibration: tuple[str, ...]
    test: tuple[str, ...]


@cache
def load() -> Parts:
    """The two parts of Python's documentation of its language."""
    from pydoc_data.topics import topics

    return split(topics)


def split(documents: Mapping[str, str], share: float = TEST_SHARE) -> Parts:
    """Split by document, in an order that only depends on the names.

    >>> parts = split({"a": "One is a first text here, it is long enough for this.",
    ...                "b": "Two is the second text here, and is long enough as well."}, 0.5)
    >>> len(parts.calibration), len(parts.test)
    (1, 1)
    """
    found = {name: paragraphs(documents[name]) for name in sorted(documents, key=_digest)}
    wanted = share * sum(_words(ps) for ps in found.values())
    test: dict[str, None] = {}
    rest: dict[str, None] = {}
    taken = 0
    for own in found.values():
        part = test if taken < wanted else rest
        taken += _words(own)
        part |= dict.fromkeys(own)
    scored = {run for paragraph in test for run in _runs(paragraph)}
    calibration = tuple(p for p in rest if scored.isdisjoint(_runs(p)))
    check_disjoint(calibration, tuple(test))
    return Parts(calibration, tuple(test))


def check_disjoint(calibration: Iterable[str], test: Iterable[str]) -> None:
    """Refuse parts that share thirteen words in a row, or a shorter paragraph."""
    scored = {run for paragraph in test for run in _runs(paragraph)}
    for paragraph in calibration:
        if not scored.isdisjoint(_runs(paragraph)):
            raise ValueError(f"calibration and test text overlap: {paragraph[:80]!r}")


def paragraphs(document: str) -> list[str]:
    """The prose of a document, a line a paragraph; no headings, grammars, code or tables.

    >>> paragraphs("Title\\n=====\\n\\nSome text that goes on,\\nover two lines of it.\\n\\n   x")
    ['Some text that goes on, over two lines of it.']
    """
    found = []
    for block in re.split(r"\n\s*\n", document):
        lines = block.rstrip().split("\n")
        indents = [len(line) - len(line.lstrip()) for line in lines]
        headed = any(_UNDERLINE.fullmatch(line.strip()) for line in lines)
        text = _ITEM.sub("", " ".join(" ".join(lines).split()), count=1)
        if not headed and indents[0] < 3 and _is_prose(text):
            found.append(text)
    return found


def _is_prose(text: str) -> bool:
    """Whether it has the words and the end of a sentence, and few signs."""
    letters = sum(c.isalpha() or c.isspace() for c in text)
    return (
        len(text.split()) >= 8
        and text[0].isupper()
        and text.endswith((".", ":", "?", "!", ")"))
        and letters >= 0.85 * len(text)
    )


def sentences(part: Sequence[str], count: int, words: tuple[int, int] = (8, 40)) -> list[str]:
    """So many different sentences, evenly spread over a part.

    >>> sentences(["This is one of them. This is another one. Short. And here is the last."], 2,
    ...           words=(4, 9))
    ['This is one of them.', 'And here is the last.']
    """
    all_of_them = dict.fromkeys(
        sentence
        for paragraph in part
        for sentence in _SENTENCE_END.split(paragraph)
        if words[0] <= len(sentence.split()) <= words[1] and sentence.endswith(".")
    )
    return _spread(list(all_of_them), count)


def blocks(part: Sequence[str], tokenizer: Any, count: int, length: int = 256) -> Tensor:
    """Token ids, shape ``(count, length)``: blocks that don't overlap, spread over a part."""
    text = "\n\n".join(part)
    ids = torch.as_tensor(tokenizer(text, verbose=False)["input_ids"])
    whole = list(ids[: len(ids) // length * length].reshape(-1, length))
    return torch.stack(_spread(whole, count))


def _spread(items: list[Any], count: int) -> list[Any]:
    """So many of the items, from the first to the last in even steps."""
    if count > len(items):
        raise ValueError(f"the text has {len(items)} such pieces, and {count} were asked for")
    return [items[i * (len(items) - 1) // max(count - 1, 1)] for i in range(count)]


def _runs(paragraph: str) -> set[str]:
    """Hashes of every run of words, by letters and digits alone; a shorter text is one run."""
    words = re.findall(r"\w+", paragraph.lower())
    starts = range(max(1, len(words) - RUN + 1))
    return {_digest(" ".join(words[start : start + RUN])) for start in starts}


def _words(part: Iterable[str]) -> int:
    return sum(len(paragraph.split()) for paragraph in part)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
