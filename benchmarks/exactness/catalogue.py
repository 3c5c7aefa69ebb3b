"""The models of the benchmarks by name, each built in one line, random weights unless trained."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
"""A model in eval mode, and the arguments of its forward."""

ZOO = ("resnet_fmnist", "resnet20", "resnet56", "resnet18", "resnet50", "hrnet_w18",
       "hrnet_w18_small", "mobilenetv2", "yolov8n", "yolov3_tiny", "vit_tiny", "bert_tiny",
       "llama_tiny")  # fmt: skip

TIMM = {
    "resnet50": 64, "hrnet_w18_small": 64, "mobilenetv2_100": 64, "efficientnet_b0": 64,
    "densenet121": 64, "resnext50_32x4d": 64, "convnext_atto": 64, "nf_regnet_b0": 64,
    "vit_tiny_patch16_224": 224, "deit_tiny_patch16_224": 224,
    "swin_tiny_patch4_window7_224": 224, "swinv2_tiny_window8_256": 256,
    "xcit_nano_12_p8_224": 224, "levit_128s": 224, "efficientformer_l1": 224,
    "pvt_v2_b0": 224, "mobilevit_xxs": 256,
}  # fmt: skip
"""Name → side of the input image."""

YOLO = ("yolov8n", "yolo11n", "yolo12n", "yolov9t")

SMALL = {
    "vocab_size": 160, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 96, "max_position_embeddings": 64,
}  # fmt: skip

TEXT_DECODER = {**SMALL, "num_hidden_layers": 2, "head_dim": 12}

HF: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", SMALL),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 160, "n_embd": 48, "n_layer": 2, "n_head": 4,
                                 "n_positions": 64}),
    "llama_1to1": ("LlamaForCausalLM", {**TEXT_DECODER, "num_key_value_heads": 4}),
    "llama_2to1": ("LlamaForCausalLM", {**TEXT_DECODER, "num_key_value_heads": 2}),
    "llama_4to1": ("LlamaForCausalLM", {**TEXT_DECODER, "num_attention_heads": 8,
                                        "num_key_value_heads": 2}),
    "qwen3": ("Qwen3ForCausalLM", {**TEXT_DECODER, "num_key_value_heads": 2}),
    "t5": ("T5ForConditionalGeneration", {"vocab_size": 160, "d_model": 48, "d_kv": 12,
                                          "d_ff": 96, "num_layers": 2, "num_heads": 6}),
    "vit": ("ViTForImageClassification", {**{k: v for k, v in SMALL.items() if "size" in k},
                                          "num_hidden_layers": 2, "num_attention_heads": 4,
                                          "image_size": 32, "patch_size": 8}),
    "whisper": ("WhisperForConditionalGeneration", {
        "vocab_size": 160, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 96, "num_mel_bins": 16, "max_source_positions": 32,
        "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "decoder_start_token_id": 1}),
    "segformer": ("SegformerForSemanticSegmentation", {
        "depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 64], "num_labels": 5,
        "num_attention_heads": [1, 2, 3, 4], "decoder_hidden_size": 48}),
}  # fmt: skip
"""Name → the class and its config's settings."""


HIDDEN_STATE = ("zoo:bert_tiny",)
"""Models that answer with a hidden state, of which no channel may go."""


def build(name: str, seed: int = 0) -> Built:
    """A model by ``"library:name"``, seeded."""
    library, _, short = name.partition(":")
    torch.manual_seed(seed)
    model, args, kwargs = _BUILDERS[library](short)
    return model.eval(), args, kwargs


def names(library: str | None = None) -> list[str]:
    """All names, or those of one library."""
    known = {"zoo": ZOO, "timm": TIMM, "hf": HF, "yolo": YOLO}
    return [f"{key}:{name}" for key, group in known.items() for name in group
            if library in (None, key)]  # fmt: skip


def _zoo(name: str) -> Built:
    import models_zoo

    return models_zoo.build(name), models_zoo.example_inputs(name), {}


def _timm(name: str) -> Built:
    import timm

    side = TIMM.get(name) or timm.get_pretrained_cfg(name).input_size[-1]
    return timm.create_model(name), (torch.randn(2, 3, side, side),), {}


def _yolo(name: str) -> Built:
    from ultralytics.nn.tasks import DetectionModel

    model = DetectionModel(f"{name}.yaml", verbose=False)
    return model, (torch.randn(2, 3, 96, 96),), {}


def _hf(name: str) -> Built:
    transformers = importlib.import_module("transformers")
    class_name, settings = HF[name]
    kind = getattr(transformers, class_name)
    model = kind(kind.config_class(**settings))
    ids = torch.randint(3, 160, (2, 12))
    kwargs: dict[str, Any] = {"use_cache": False}
    if class_name.startswith(("ViT", "Segformer")):
        side = 32 if class_name.startswith("ViT") else 64
        return model, (), {"pixel_values": torch.randn(2, 3, side, side)}
    if class_name.startswith("Whisper"):
        features = torch.randn(2, settings["num_mel_bins"], 64)
        return model, (), {"input_features": features, "decoder_input_ids": ids, **kwargs}
    if class_name.startswith("T5"):
        return model, (), {"input_ids": ids, "decoder_input_ids": ids[:, :7], **kwargs}
    if class_name.startswith("Bert"):
        kwargs = {}
    return model, (), {"input_ids": ids, **kwargs}


_BUILDERS: dict[str, Callable[[str], Built]] = {
    "zoo": _zoo, "timm": _timm, "yolo": _yolo, "hf": _hf,
}  # fmt: skip
