"""Messages, docstrings and pages are written in the words of the field."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PHRASES = [
    r"\bMind:", r"\bNot kept:", r"\bNothing is proven\b", r"\b[Pp]roofs?\b", r"\b[Pp]rove[nsd]?\b",
    r"columns that stay\b", r"what so few allow", r"moved them by\b", r"[Uu]nits that (stay|go)\b",
    r"\bhold [\d.{].*of all scores\b", r"no choice (under this budget )?keeps more",
    r"left before the end", r"\bis no number of\b",
    r"\blistens? first\b", r"(network|model) listen\b",
    r"what goes into what stays", r"again and again", r"\bTold, in words\b",
]  # fmt: skip
"""Each has a plain word: verified, kept, removed, warning, retained importance, randomized."""


def lines_with_phrases(text: str) -> list[str]:
    """The lines of a text that have one of the phrases, with their numbers."""
    found = re.compile("|".join(PHRASES))
    return [
        f"{n}: {line.strip()}" for n, line in enumerate(text.splitlines(), 1) if found.search(line)
    ]


PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = sorted((ROOT / "src").rglob("*.py"))


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=lambda p: str(p.relative_to(ROOT)))
def test_no_private_phrase(path: Path) -> None:
    assert lines_with_phrases(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "Mind: head.weight has 43 columns that stay, and is fitted to 8 samples.",
        "Not kept: batch norms (142.0 %), since it made the outputs worse",
        "Proof: exact. … the removal moved them by 5.4e+00",
        "Nothing is proven of: …",
        "The units that stay hold 87.3 % of all scores; no choice keeps more than 93.2 %",
        "who read stdout, `head` say, left before the end",
        "trials=-1 is no number of trials",
        "Make a network listen, so that a comparison proves something",
        "folds what goes into what stays",
        "both ask the whole model again and again, of different things",
        "Told, in words, what each number was",
    ],
)
def test_a_private_phrase_is_seen(line: str) -> None:
    assert lines_with_phrases(line)
