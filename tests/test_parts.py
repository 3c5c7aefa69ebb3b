"""A named part of a model: encoder or decoder, a tower, the language model behind an image."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import prunus
from prunus.errors import PlanError
from prunus.integrations import hf

transformers = pytest.importorskip("transformers")

TEXT = {"vocab_size": 160, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 96, "max_position_embeddings": 64}  # fmt: skip
IMAGE = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
         "intermediate_size": 96, "image_size": 32, "patch_size": 8}  # fmt: skip
PAIR = {"d_model": 48, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96,
        "vocab_size": 160, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "decoder_start_token_id": 1}  # fmt: skip
IDS = torch.randint(3, 160, (2, 12), generator=torch.Generator().manual_seed(0))


def llava() -> tuple[nn.Module, dict[str, Any]]:
    """A vision tower, a projector and a LLaMA; 16 patches stand where the text has token 3."""
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**IMAGE, projection_dim=32),
        text_config=transformers.LlamaConfig(**TEXT, num_key_value_heads=2),
        image_token_index=3, vision_feature_layer=-2, image_seq_length=16,
    )  # fmt: skip
    ids = torch.cat([torch.full((2, 16), 3), IDS.clamp(min=4)], 1)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "pixel_values": pixels, "use_cache": False}
    return transformers.LlavaForConditionalGeneration(config), inputs


def of_library(kind: str, **sizes: Any) -> tuple[nn.Module, dict[str, Any]]:
    model = getattr(transformers, kind)
    model = model(model.config_class(**sizes))
    return model, hf.example_inputs(model, tokens=(2, 12))


T5 = {"vocab_size": 160, "d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 3,
      "num_heads": 4, "decoder_start_token_id": 0}  # fmt: skip
PARTS: dict[str, tuple[Any, str]] = {
    "t5": (lambda: of_library("T5ForConditionalGeneration", **T5), "decoder"),
    "bart": (lambda: of_library("BartForConditionalGeneration", **PAIR), "model.encoder"),
    "whisper": (
        lambda: of_library(
            "WhisperForConditionalGeneration", **PAIR, max_source_positions=32,
            max_target_positions=64, num_mel_bins=16,
        ),
        "model.decoder",
    ),
    "clip": (
        lambda: of_library("CLIPModel", text_config={**TEXT, "eos_token_id": 2},
                           vision_config=IMAGE, projection_dim=32),
        "vision_model",
    ),
    "siglip": (
        lambda: of_library("SiglipModel", text_config={**TEXT, "projection_size": 48},
                           vision_config=IMAGE),
        "text_model",
    ),
    "llava": (llava, "model.language_model"),
    "llava tower": (llava, "model.vision_tower"),
}  # fmt: skip


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model, inputs = PARTS[name][0]()
    return model.eval(), inputs


@pytest.mark.parametrize("name", PARTS)
def test_a_part_loses_heads_widths_and_layers_and_the_rest_nothing(name: str) -> None:
    (model, inputs), part = build(name), PARTS[name][1]
    before = {n: tuple(p.shape) for n, p in model.named_parameters()}
    amounts = {"heads": 0.5, "ffn": 0.25, "layers": 1}
    small = prunus.shrink(model, (), inputs, remove=amounts, part=part, each_group=False)
    assert small.certificate is not None
    assert small.certificate.verdict == "exact"
    assert [drop.startswith(f"{part}.") for drop in small.plan.drops] == [True]
    after = {n: tuple(p.shape) for n, p in model.named_parameters()}
    outside = {n: shape for n, shape in before.items() if not n.startswith(f"{part}.")}
    assert {n: after[n] for n in outside} == outside
    assert small.plan.origin["part"] == part
    groups = [group for group in small.plan.groups if group.removed]
    assert groups
    assert all(group.name.startswith(f"{part}.") for group in groups)


def test_a_budget_is_of_the_part() -> None:
    model, inputs = build("llava")
    part = model.get_submodule("model.language_model")
    before = sum(p.numel() for p in part.parameters())
    rest = sum(p.numel() for p in model.parameters()) - before
    small = prunus.shrink(
        model, (), inputs, budget=prunus.Budget(params=0.8), part="model.language_model",
        each_group=False,
    )  # fmt: skip
    after = sum(p.numel() for p in part.parameters())
    assert 0.78 * before < after <= 0.8 * before
    assert sum(p.numel() for p in model.parameters()) - after == rest
    assert small.certificate is not None
    assert small.certificate.verdict == "exact"


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("model.language", "the model has no part 'model.language'"),
        ("model.multi_modal_projector.linear_2", "nothing that can be pruned lies inside"),
    ],
)
def test_a_part_without_groups_is_refused_before_anything_is_cut(part: str, said: str) -> None:
    model, inputs = build("llava")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PlanError, match=said):
        prunus.shrink(model, (), inputs, ratio=0.3, part=part)
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())
