"""Reads folders with transformers alone: a process of its own, which never imports prunus.

Each line of stdin names a folder, a model class, a file of inputs and a file to write answers to;
each line of stdout says ``ok`` or what went wrong.  The answers are the outputs of a forward and,
where the model writes, greedy tokens and logits with and without a KV cache.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import torch

Answer = tuple[list[torch.Tensor], list[torch.Tensor]]
"""Tokens that were chosen, if any, and floating-point outputs."""


def forward(model: Any, inputs: Mapping[str, Any]) -> Answer:
    """The floating-point outputs."""
    with torch.no_grad():
        found = model(**inputs)
    return [], [v for v in found.values() if isinstance(v, torch.Tensor) and v.is_floating_point()]


def decode(model: Any, inputs: Mapping[str, Any], *, cached: bool) -> Answer:
    """Greedy tokens, and the logits that they were chosen by."""
    given = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    found = model.generate(
        **given, max_new_tokens=6, do_sample=False, pad_token_id=1, eos_token_id=None,
        use_cache=cached, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return [found.sequences], list(found.logits)


def writes(model: Any) -> bool:
    """Whether it generates text."""
    return hasattr(model, "generate") and bool(model.can_generate())


def answers(model: Any, inputs: Mapping[str, Any]) -> dict[str, Answer]:
    """Those of the forward, and of decoding with and without a cache."""
    found = {"forward": forward(model, inputs)}
    if writes(model):
        found |= {str(cached): decode(model, inputs, cached=cached) for cached in (True, False)}
    return found


def serve() -> None:
    """Answer line by line until stdin ends."""
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            model = getattr(transformers, asked["kind"]).from_pretrained(asked["folder"]).eval()
            torch.save(
                answers(model, torch.load(asked["inputs"], weights_only=True)), asked["answers"]
            )
            said = "ok" if "prunus" not in sys.modules else "prunus was imported"
        except Exception as error:  # what the library says of the folder
            said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    serve()
