"""The models of the coverage benchmark: what is swept, how small, and with which inputs.

One representative of every architecture module of timm, torchvision's families, transformers
with their task heads made small, and the YAML families of ultralytics.  All have random weights.
The list is what the coverage is a share of: a removal needs a written reason (see ``LEFT_OUT``).
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
"""A model in eval mode, and the arguments of its forward."""

TIMM = {
    "beit_base_patch16_224": 224, "halonet_h1": 256, "mobileone_s1": 64, "cait_xxs24_224": 224,
    "coat_tiny": 224, "convit_tiny": 224, "convmixer_768_32": 64, "convnext_zepto_rms": 64,
    "cpubone_nano": 64, "crossvit_tiny_240": 240, "csatv2": 64, "cs3darknet_focus_s": 64,
    "cspnext_tiny": 64, "davit_tiny": 64, "deepseek_vit_412m": 224, "deit_tiny_patch16_224": 224,
    "densenet121": 64, "dla46x_c": 64, "dpn48b": 64, "edgenext_xx_small": 64,
    "efficientformer_l1": 224, "efficientformerv2_s0": 224, "mnasnet_small": 64,
    "efficientvim_m1": 64, "efficientvit_b0": 64, "efficientvit_m0": 224,
    "vit_tiny_patch16_dinov3_qkvb": 256, "fasternet_t0": 64, "fastvit_t8": 64,
    "focalnet_tiny_srf": 64, "gcvit_xxtiny": 224, "gemma4_vit_167m": 64, "ghostnet_050": 64,
    "hardcorenas_b": 64, "hgnetv2_b0": 64, "hiera_tiny_224": 224, "sam2_hiera_tiny": 64,
    "hrnet_w18_small": 64, "iformer_t": 64, "inception_next_atto": 64, "inception_resnet_v2": 96,
    "inception_v3": 96, "inception_v4": 96, "lcnetv2_small": 64, "levit_128s": 224,
    "lowformer_b0": 64, "mambaout_femto": 64, "maxvit_pico_rw_256": 256, "poolformerv2_s12": 64,
    "gmlp_ti16_224": 224, "mobilenetv3_small_050": 64, "mobilenetv5_300m": 64,
    "mobilevit_xxs": 64, "mvitv2_tiny": 224, "naflexvit_so150m2_patch16_reg1_gap": 64,
    "nasnetalarge": 64, "nest_tiny": 224, "nextvit_small": 64, "nf_regnet_b0": 64,
    "pit_ti_224": 224, "pnasnet5large": 64, "pvt_v2_b0": 64, "qwen3_vit_88m": 64,
    "rdnet_tiny": 64, "regnetx_002": 64, "repghostnet_050": 64, "repvit_m1": 64, "res2next50": 64,
    "resnest14d": 64, "resnet10t": 64, "resnetv2_18": 64, "rexnet_100": 64, "selecsls42": 64,
    "legacy_seresnet18": 64, "sequencer2d_s": 224, "shvit_s1": 64, "skresnet18": 64,
    "starnet_s050": 64, "swiftformer_xs": 224, "swin_tiny_patch4_window7_224": 224,
    "swinv2_tiny_window8_256": 256, "swinv2_cr_tiny_224": 224, "tiny_vit_5m_224": 64,
    "tnt_s_legacy_patch16_224": 224, "tresnet_m": 64, "twins_svt_small": 224, "vgg11": 64,
    "visformer_tiny": 224, "vit_dwee_patch16_reg1_gap_256": 256, "vit_tiny_r_s16_p8_224": 224,
    "vit_srelpos_small_patch16_224": 224, "samvit_base_patch16_224": 224,
    "vitamin_small_224": 224, "volo_d1_224": 224, "ese_vovnet19b_slim_dw": 64,
    "legacy_xception": 64, "xception41p": 64, "xcit_nano_12_p8_224": 224,
}  # fmt: skip
"""Name → side of the input image: the smallest at which an unfixed architecture still runs."""

TIMM_SETTINGS: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": {"depth": 4},
    "deepseek_vit_412m": {"depth": 2},
    "gemma4_vit_167m": {"depth": 2},
    "naflexvit_so150m2_patch16_reg1_gap": {"depth": 2},
    "qwen3_vit_88m": {"depth": 2},
    "samvit_base_patch16_224": {"depth": 4},
}
"""Families whose smallest member has 80 million parameters and more, made less deep."""

TORCHVISION = {
    "alexnet": 64, "convnext_tiny": 64, "densenet121": 64, "densenet161": 64,
    "efficientnet_b0": 64, "efficientnet_v2_s": 64, "googlenet": 64, "inception_v3": 96,
    "maxvit_t": 224, "mnasnet0_5": 64, "mnasnet1_0": 64, "mobilenet_v2": 64,
    "mobilenet_v3_large": 64, "mobilenet_v3_small": 64, "regnet_x_400mf": 64,
    "regnet_y_400mf": 64, "resnet18": 64, "resnet34": 64, "resnet50": 64,
    "resnext50_32x4d": 64, "shufflenet_v2_x0_5": 64, "shufflenet_v2_x1_0": 64,
    "squeezenet1_0": 64, "squeezenet1_1": 64, "swin_t": 64, "swin_v2_t": 64, "vgg11": 64,
    "vgg11_bn": 64, "vit_b_32": 224, "wide_resnet50_2": 64,
    "deeplabv3_mobilenet_v3_large": 96, "deeplabv3_resnet50": 96, "fcn_resnet50": 96,
    "lraspp_mobilenet_v3_large": 96,
    "r3d_18": 64, "mc3_18": 64, "r2plus1d_18": 64, "s3d": 224, "swin3d_t": 64,
    "mvit_v1_b": 224, "mvit_v2_s": 224,
    "raft_small": 128,
    "fcos_resnet50_fpn": 128, "retinanet_resnet50_fpn": 128, "retinanet_resnet50_fpn_v2": 128,
    "ssd300_vgg16": 300, "ssdlite320_mobilenet_v3_large": 320,
}  # fmt: skip
"""Name → side of the input: classification, segmentation, video, optical flow, detection."""

VIDEO = {"r3d_18": 8, "mc3_18": 8, "r2plus1d_18": 8, "s3d": 16, "swin3d_t": 8,
         "mvit_v1_b": 16, "mvit_v2_s": 16}  # fmt: skip
"""Name → frames."""

LEFT_OUT = {
    "torchvision:fasterrcnn_*, maskrcnn_*, keypointrcnn_*": "their forward needs the compiled "
    "operators nms and roi_align in its middle, which a CPU torch beside torchvision's wheel lacks",
    "torchvision:quantized_*": "quantised weights can't be pruned after the fact",
    "ultralytics:yolo11-cls-resnet18": "its first layer downloads weights when it is built",
    "transformers:dinat, nat": "need natten, compiled operators",
    "transformers:yoso, mra": "need CUDA kernels",
}

_TEXT = {
    "vocab_size": 160, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 96, "max_position_embeddings": 64,
}  # fmt: skip
_DECODER = {**_TEXT, "num_key_value_heads": 2, "head_dim": 12, "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
_PAIR = {
    "vocab_size": 160, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip
_T5 = {"vocab_size": 160, "d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 2,
       "num_decoder_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}  # fmt: skip
_IMAGE = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
          "intermediate_size": 96, "image_size": 32, "patch_size": 8}  # fmt: skip
_SPEECH = {
    **{k: v for k, v in _TEXT.items() if k != "max_position_embeddings"},
    "conv_dim": [32, 32, 32], "conv_stride": [5, 4, 4], "conv_kernel": [10, 8, 4],
    "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4, "pad_token_id": 0,
}  # fmt: skip
_MIXTURE = {**_DECODER, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 48}  # fmt: skip
_LATENT = {
    **{k: v for k, v in _DECODER.items() if k != "head_dim"}, "num_key_value_heads": 4,
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
}  # fmt: skip

TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    # encoders
    "albert": ("AlbertForMaskedLM", {**_TEXT, "embedding_size": 24}),
    "bert": ("BertForSequenceClassification", _TEXT),
    "big_bird": ("BigBirdForSequenceClassification", {**_TEXT, "block_size": 8}),
    "canine": ("CanineForSequenceClassification", {
        **_TEXT, "num_hash_buckets": 64, "local_transformer_stride": 8, "downsampling_rate": 4,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
    "convbert": ("ConvBertForSequenceClassification", {**_TEXT, "embedding_size": 48}),
    "deberta": ("DebertaForMaskedLM", {**_TEXT, "relative_attention": True,
                                       "pos_att_type": ["c2p", "p2c"]}),
    "deberta_v2": ("DebertaV2ForSequenceClassification", {
        **_TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"],
        "position_buckets": 16, "share_att_key": True, "norm_rel_ebd": "layer_norm"}),
    "distilbert": ("DistilBertForQuestionAnswering", {
        "vocab_size": 160, "dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 96,
        "max_position_embeddings": 64}),
    "electra": ("ElectraForPreTraining", {**_TEXT, "embedding_size": 24}),
    "ernie": ("ErnieForSequenceClassification", _TEXT),
    "esm": ("EsmForMaskedLM", {**_TEXT, "position_embedding_type": "rotary", "pad_token_id": 0,
                               "mask_token_id": 1}),
    "flaubert": ("FlaubertWithLMHeadModel", {"vocab_size": 160, "emb_dim": 48, "n_layers": 2,
                                             "n_heads": 4, "max_position_embeddings": 64}),
    "fnet": ("FNetForMaskedLM", _TEXT),
    "funnel": ("FunnelForSequenceClassification", {
        "vocab_size": 160, "d_model": 48, "n_head": 4, "d_head": 12, "d_inner": 96,
        "block_sizes": [1, 1], "num_decoder_layers": 1}),
    "ibert": ("IBertForSequenceClassification", _TEXT),
    "layoutlm": ("LayoutLMForTokenClassification", {**_TEXT, "max_2d_position_embeddings": 64}),
    "longformer": ("LongformerForSequenceClassification", {
        **_TEXT, "attention_window": [4, 4], "pad_token_id": 1}),
    "mobilebert": ("MobileBertForSequenceClassification", {
        **_TEXT, "embedding_size": 24, "intra_bottleneck_size": 24, "num_feedforward_networks": 2}),
    "modernbert": ("ModernBertForMaskedLM", {
        **_TEXT, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1,
        "sep_token_id": 2, "local_attention": 8}),
    "mpnet": ("MPNetForMaskedLM", _TEXT),
    "nystromformer": ("NystromformerForSequenceClassification", {
        **_TEXT, "num_landmarks": 4, "segment_means_seq_len": 12}),
    "roberta": ("RobertaForTokenClassification", {**_TEXT, "pad_token_id": 1}),
    "roformer": ("RoFormerForMaskedLM", {**_TEXT, "embedding_size": 48}),
    "squeezebert": ("SqueezeBertForSequenceClassification", {**_TEXT, "embedding_size": 48}),
    "xlnet": ("XLNetForSequenceClassification", {"vocab_size": 160, "d_model": 48, "n_layer": 2,
                                                 "n_head": 4, "d_inner": 96}),
    # decoders
    "biogpt": ("BioGptForCausalLM", _TEXT),
    "bloom": ("BloomForCausalLM", {"vocab_size": 160, "hidden_size": 48, "n_layer": 2,
                                   "n_head": 4}),
    "codegen": ("CodeGenForCausalLM", {"vocab_size": 160, "n_embd": 64, "n_layer": 2,
                                       "n_head": 4, "rotary_dim": 8, "n_positions": 64}),
    "cohere": ("CohereForCausalLM", {k: v for k, v in _DECODER.items() if k != "head_dim"}),
    "ctrl": ("CTRLLMHeadModel", {"vocab_size": 160, "n_embd": 48, "dff": 96, "n_layer": 2,
                                 "n_head": 4, "n_positions": 64}),
    "falcon": ("FalconForCausalLM", {**_TEXT, "pad_token_id": 0, "bos_token_id": 1,
                                     "eos_token_id": 2}),
    "gemma": ("GemmaForCausalLM", _DECODER),
    "gemma2": ("Gemma2ForCausalLM", {**_DECODER, "query_pre_attn_scalar": 12,
                                     "sliding_window": 8}),
    "gemma3": ("Gemma3ForCausalLM", {**_DECODER, "query_pre_attn_scalar": 12,
                                     "sliding_window": 8}),
    "glm": ("GlmForCausalLM", _DECODER),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 160, "n_embd": 48, "n_layer": 2, "n_head": 4,
                                 "n_positions": 64}),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", {"vocab_size": 160, "n_embd": 48, "n_layer": 2,
                                              "n_head": 4, "n_positions": 64}),
    "gpt_neo": ("GPTNeoForCausalLM", {
        "vocab_size": 160, "hidden_size": 48, "num_layers": 2, "num_heads": 4,
        "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64,
        "window_size": 8, "intermediate_size": 96}),
    "gpt_neox": ("GPTNeoXForCausalLM", _TEXT),
    "gptj": ("GPTJForCausalLM", {"vocab_size": 160, "n_embd": 48, "n_layer": 2, "n_head": 4,
                                 "rotary_dim": 8, "n_positions": 64}),
    "granite": ("GraniteForCausalLM", {k: v for k, v in _DECODER.items() if k != "head_dim"}),
    "llama": ("LlamaForCausalLM", _DECODER),
    "mistral": ("MistralForCausalLM", {**_DECODER, "sliding_window": 8}),
    "mpt": ("MptForCausalLM", {"vocab_size": 160, "d_model": 48, "n_layers": 2, "n_heads": 4,
                               "max_seq_len": 64, "expansion_ratio": 2}),
    "nemotron": ("NemotronForCausalLM", _DECODER),
    "olmo2": ("Olmo2ForCausalLM", {k: v for k, v in _DECODER.items() if k != "head_dim"}),
    "opt": ("OPTForCausalLM", {**_TEXT, "ffn_dim": 96, "word_embed_proj_dim": 48}),
    "persimmon": ("PersimmonForCausalLM", _TEXT),
    "phi": ("PhiForCausalLM", _TEXT),
    "phi3": ("Phi3ForCausalLM", {k: v for k, v in _DECODER.items() if k != "head_dim"}),
    "qwen2": ("Qwen2ForCausalLM", _DECODER),
    "qwen3": ("Qwen3ForCausalLM", _DECODER),
    "stablelm": ("StableLmForCausalLM", {
        **{k: v for k, v in _DECODER.items() if k != "head_dim"}, "hidden_size": 64}),
    "starcoder2": ("Starcoder2ForCausalLM", {k: v for k, v in _DECODER.items()
                                             if k != "head_dim"}),
    "xglm": ("XGLMForCausalLM", {"vocab_size": 160, "d_model": 48, "num_layers": 2,
                                 "attention_heads": 4, "ffn_dim": 96,
                                 "max_position_embeddings": 64}),
    # mixtures of experts
    "deepseek_v2": ("DeepseekV2ForCausalLM", {**_LATENT, "n_group": None, "topk_group": None}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", _LATENT),
    "gpt_oss": ("GptOssForCausalLM", {**_MIXTURE, "sliding_window": 8}),
    "granitemoe": ("GraniteMoeForCausalLM", {k: v for k, v in _MIXTURE.items()
                                             if k != "head_dim"}),
    "mixtral": ("MixtralForCausalLM", _MIXTURE),
    "olmoe": ("OlmoeForCausalLM", {k: v for k, v in _MIXTURE.items() if k != "head_dim"}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {**_MIXTURE, "shared_expert_intermediate_size": 48}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", _MIXTURE),
    "switch_transformers": ("SwitchTransformersForConditionalGeneration", {
        **_T5, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 4}),
    # state spaces and recurrences
    "falcon_mamba": ("FalconMambaForCausalLM", {
        "vocab_size": 160, "hidden_size": 48, "state_size": 8, "num_hidden_layers": 2}),
    "jamba": ("JambaForCausalLM", {
        **{k: v for k, v in _MIXTURE.items() if k != "head_dim"}, "attn_layer_period": 2,
        "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False}),
    "mamba": ("MambaForCausalLM", {"vocab_size": 160, "hidden_size": 48, "state_size": 8,
                                   "num_hidden_layers": 2}),
    "mamba2": ("Mamba2ForCausalLM", {
        "vocab_size": 160, "hidden_size": 48, "state_size": 8, "num_hidden_layers": 2,
        "num_heads": 8, "head_dim": 12, "n_groups": 2, "chunk_size": 8}),
    "recurrent_gemma": ("RecurrentGemmaForCausalLM", {
        **_DECODER, "lru_width": 48, "attention_window_size": 8, "num_hidden_layers": 3}),
    "rwkv": ("RwkvForCausalLM", {"vocab_size": 160, "hidden_size": 48, "num_hidden_layers": 2,
                                 "attention_hidden_size": 48, "intermediate_size": 96}),
    # encoder and decoder
    "bart": ("BartForConditionalGeneration", _PAIR),
    "blenderbot_small": ("BlenderbotSmallForConditionalGeneration", _PAIR),
    "led": ("LEDForConditionalGeneration", {
        **_PAIR, "attention_window": [4, 4], "max_encoder_position_embeddings": 64,
        "max_decoder_position_embeddings": 64}),
    "longt5": ("LongT5ForConditionalGeneration", {**_T5, "local_radius": 4}),
    "m2m_100": ("M2M100ForConditionalGeneration", _PAIR),
    "marian": ("MarianMTModel", {**_PAIR, "decoder_vocab_size": 160}),
    "mbart": ("MBartForConditionalGeneration", _PAIR),
    "pegasus": ("PegasusForConditionalGeneration", _PAIR),
    "prophetnet": ("ProphetNetForConditionalGeneration", {
        "vocab_size": 160, "hidden_size": 48, "num_encoder_layers": 2, "num_decoder_layers": 2,
        "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 96, "max_position_embeddings": 64, "decoder_start_token_id": 1}),
    "t5": ("T5ForConditionalGeneration", _T5),
    "umt5": ("UMT5ForConditionalGeneration", _T5),
    # vision
    "beit": ("BeitForImageClassification", {**_IMAGE, "use_relative_position_bias": True}),
    "bit": ("BitForImageClassification", {
        "embedding_size": 32, "hidden_sizes": [32, 64, 64, 128], "depths": [1, 1, 1, 1],
        "num_groups": 8}),
    "clip": ("CLIPModel", {
        "text_config": {**_TEXT, "eos_token_id": 2}, "vision_config": _IMAGE,
        "projection_dim": 32}),
    "convnext": ("ConvNextForImageClassification", {"hidden_sizes": [16, 24, 32, 48],
                                                    "depths": [1, 1, 1, 1]}),
    "convnextv2": ("ConvNextV2ForImageClassification", {"hidden_sizes": [16, 24, 32, 48],
                                                        "depths": [1, 1, 1, 1]}),
    "cvt": ("CvtForImageClassification", {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 4],
                                          "depth": [1, 2, 3]}),
    "deit": ("DeiTForImageClassification", _IMAGE),
    "depth_anything": ("DepthAnythingForDepthEstimation", {
        "backbone_config": {"model_type": "dinov2", **_IMAGE, "out_indices": [1, 2],
                            "reshape_hidden_states": False, "apply_layernorm": True},
        "neck_hidden_sizes": [16, 24], "reassemble_factors": [2, 1], "patch_size": 8,
        "reassemble_hidden_size": 48, "fusion_hidden_size": 16, "head_hidden_size": 8}),
    "detr": ("DetrForObjectDetection", {
        **{k: v for k, v in _PAIR.items() if k.startswith(("d_", "encoder", "decoder_l",
                                                           "decoder_a", "decoder_f"))},
        "num_queries": 6, "use_timm_backbone": False, "use_pretrained_backbone": False,
        "backbone": None, "backbone_config": {
            "model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 24, 32, 48],
            "depths": [1, 1, 1, 1], "layer_type": "basic", "out_features": ["stage4"]}}),
    "dinov2": ("Dinov2ForImageClassification", _IMAGE),
    "dpt": ("DPTForDepthEstimation", {
        **_IMAGE, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3],
        "neck_hidden_sizes": [16, 16, 24, 24], "fusion_hidden_size": 16}),
    "efficientnet": ("EfficientNetForImageClassification", {
        "width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640}),
    "focalnet": ("FocalNetForImageClassification", {
        "embed_dim": 24, "depths": [1, 1, 1, 1], "image_size": 64,
        "hidden_sizes": [24, 48, 96, 192]}),
    "glpn": ("GLPNForDepthEstimation", {
        "depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 64],
        "num_attention_heads": [1, 2, 3, 4], "decoder_hidden_size": 32}),
    "hiera": ("HieraForImageClassification", {
        "embed_dim": 24, "image_size": [64, 64], "depths": [1, 1, 1, 1],
        "num_heads": [1, 2, 4, 8]}),
    "levit": ("LevitForImageClassification", {
        "image_size": 64, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4],
        "depths": [1, 1, 1], "key_dim": [8, 8, 8]}),
    "mobilenet_v2": ("MobileNetV2ForImageClassification", {"depth_multiplier": 0.35}),
    "mobilevit": ("MobileViTForImageClassification", {
        "hidden_sizes": [32, 40, 48], "neck_hidden_sizes": [8, 16, 24, 24, 32, 32, 64],
        "image_size": 64}),
    "poolformer": ("PoolFormerForImageClassification", {"hidden_sizes": [16, 24, 32, 48],
                                                        "depths": [1, 1, 1, 1]}),
    "pvt": ("PvtForImageClassification", {
        "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "image_size": 64,
        "num_attention_heads": [1, 2, 3, 4]}),
    "regnet": ("RegNetForImageClassification", {
        "embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1],
        "groups_width": 8}),
    "resnet": ("ResNetForImageClassification", {
        "embedding_size": 16, "hidden_sizes": [32, 48, 64, 96], "depths": [1, 1, 1, 1]}),
    "segformer": ("SegformerForSemanticSegmentation", {
        "depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 64], "num_labels": 5,
        "num_attention_heads": [1, 2, 3, 4], "decoder_hidden_size": 48}),
    "siglip": ("SiglipModel", {"text_config": {**_TEXT, "projection_size": 48},
                               "vision_config": _IMAGE}),
    "swiftformer": ("SwiftFormerForImageClassification", {
        "embed_dims": [16, 24, 32, 48], "depths": [1, 1, 1, 1], "image_size": 64}),
    "swin": ("SwinForImageClassification", {
        "embed_dim": 24, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4,
        "image_size": 32, "patch_size": 4}),
    "swinv2": ("Swinv2ForImageClassification", {
        "embed_dim": 24, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4,
        "image_size": 32, "patch_size": 4}),
    "upernet": ("UperNetForSemanticSegmentation", {
        "hidden_size": 32, "num_labels": 5, "auxiliary_in_channels": 32, "backbone_config": {
            "model_type": "convnext", "hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1],
            "out_features": ["stage1", "stage2", "stage3", "stage4"]}}),
    "videomae": ("VideoMAEForVideoClassification", {**_IMAGE, "num_frames": 4}),
    "vit": ("ViTForImageClassification", _IMAGE),
    "yolos": ("YolosForObjectDetection", {**_IMAGE, "image_size": [32, 32],
                                          "num_detection_tokens": 6}),
    # audio
    "ast": ("ASTForAudioClassification", {
        **{k: v for k, v in _IMAGE.items() if k != "image_size"}, "patch_size": 8,
        "frequency_stride": 8, "time_stride": 8, "max_length": 32, "num_mel_bins": 16}),
    "hubert": ("HubertForCTC", _SPEECH),
    "sew": ("SEWForCTC", {**_SPEECH, "squeeze_factor": 2}),
    "speech_to_text": ("Speech2TextForConditionalGeneration", {
        **{k: v for k, v in _PAIR.items() if k != "max_position_embeddings"},
        "max_source_positions": 64, "max_target_positions": 32, "input_feat_per_channel": 16,
        "num_conv_layers": 2, "conv_channels": 32}),
    "unispeech": ("UniSpeechForCTC", {**_SPEECH, "num_codevectors_per_group": 8}),
    "wav2vec2": ("Wav2Vec2ForCTC", _SPEECH),
    "wav2vec2_bert": ("Wav2Vec2BertForCTC", {
        **_TEXT, "feature_projection_input_dim": 16, "position_embeddings_type": "relative_key",
        "left_max_position_embeddings": 8, "right_max_position_embeddings": 4,
        "conv_depthwise_kernel_size": 5}),
    "wav2vec2_conformer": ("Wav2Vec2ConformerForCTC", {
        **_SPEECH, "conv_depthwise_kernel_size": 5}),
    "wavlm": ("WavLMForSequenceClassification", {**_SPEECH, "num_buckets": 16,
                                                 "max_bucket_distance": 32}),
    "whisper": ("WhisperForConditionalGeneration", {
        **{k: v for k, v in _PAIR.items() if k != "max_position_embeddings"},
        "num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 32}),
}  # fmt: skip
"""Name → the class with its task head, and the settings of its config."""

IMAGE_SIDES = {"convnext": 64, "convnextv2": 64, "bit": 64, "cvt": 64, "detr": 64,
               "efficientnet": 64, "focalnet": 64, "glpn": 64, "hiera": 64, "levit": 64,
               "mobilenet_v2": 64, "mobilevit": 64, "poolformer": 64, "pvt": 64, "regnet": 64,
               "resnet": 64, "segformer": 64, "swiftformer": 64, "upernet": 64}  # fmt: skip
"""Sides of the images of transformers, where not 32."""

ULTRALYTICS = (
    "yolov3-tiny", "yolov3", "yolov3-spp", "yolov5n", "yolov5n-p6", "yolov6n", "yolov8n",
    "yolov8n-cls", "yolov8n-ghost", "yolov8n-ghost-p2", "yolov8n-obb", "yolov8n-p2",
    "yolov8n-p6", "yolov8n-pose", "yolov8n-rtdetr", "yolov8n-seg", "yolov8n-world",
    "yolov8n-worldv2", "yolov9t", "yolov9c-seg", "yolov9c", "yolov9e", "yolov10n", "yolov10s",
    "yolo11n", "yolo11n-cls", "yolo11n-obb", "yolo11n-pose",
    "yolo11n-seg", "yolo12n", "yolo12n-cls", "yolo12n-obb", "yolo12n-pose", "yolo12n-seg",
    "yolo26n", "yolo26n-cls", "yolo26n-depth", "yolo26n-obb", "yolo26n-p2", "yolo26n-pose",
    "yolo26n-seg", "yolo26n-sem",
    "yoloe-11n-seg", "yoloe-26n", "yoloe-v8n", "rtdetr-l", "rtdetr-resnet50",
)  # fmt: skip
"""YAML names with the smallest scale of their family."""

STRATA = {"timm": 20, "torchvision": 12, "transformers": 18, "ultralytics": 10}
"""How many of each library a sample of 60 holds; other sizes in proportion."""


def names() -> list[str]:
    """All models as ``"library:name"``, sorted within each library."""
    groups = {
        "timm": TIMM, "torchvision": TORCHVISION, "transformers": TRANSFORMERS,
        "ultralytics": ULTRALYTICS,
    }  # fmt: skip
    return [f"{library}:{name}" for library, group in groups.items() for name in sorted(group)]


def build(name: str) -> Built:
    """A model by ``"library:name"``, seeded, with its inputs."""
    library, _, short = name.partition(":")
    _stay_offline()
    torch.manual_seed(0)
    model, args, kwargs = _BUILDERS[library](short)
    return model.eval(), args, kwargs


def import_libraries() -> None:
    """Import all of them, for a process that others are forked from."""
    _stay_offline()
    for library in ("timm", "torchvision.models", "transformers", "ultralytics.nn.tasks"):
        importlib.import_module(library)


def _stay_offline() -> None:
    """Read when the libraries are first imported: no downloads, no settings in the home folder."""
    for key, value in (("HF_HUB_OFFLINE", "1"), ("YOLO_OFFLINE", "true"),
                       ("YOLO_AUTOINSTALL", "false"), ("MPLBACKEND", "agg")):  # fmt: skip
        os.environ.setdefault(key, value)
    if "YOLO_CONFIG_DIR" not in os.environ:
        os.environ["YOLO_CONFIG_DIR"] = tempfile.mkdtemp(prefix="prunus-yolo-")


def _timm(name: str) -> Built:
    import timm

    model = timm.create_model(name, pretrained=False, **TIMM_SETTINGS.get(name, {}))
    return model, (torch.randn(2, 3, TIMM[name], TIMM[name]),), {}


class RawDetections(nn.Module):
    """A detector of torchvision without what follows its head.

    Suppressing overlaps needs the compiled ``nms``, and picks other boxes as soon as two scores
    change places.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> Any:
        detector: Any = self.detector
        features = list(detector.backbone(images).values())
        if type(detector).__name__ in ("RetinaNet", "FCOS", "SSD"):
            return detector.head(features)
        raise TypeError(f"{type(detector).__name__} is no one-stage detector")


def _torchvision(name: str) -> Built:
    models = importlib.import_module("torchvision.models")
    side = TORCHVISION[name]
    settings: dict[str, Any] = {"weights": None}
    detects = name.startswith(("fcos", "retinanet", "ssd"))
    if detects or name.startswith(("deeplab", "fcn", "lraspp")):
        settings["weights_backbone"] = None
    if name.startswith(("googlenet", "inception")):
        settings["init_weights"] = False
    model = models.get_model(name, **settings)
    if detects:
        return RawDetections(model), (torch.randn(2, 3, side, side),), {}
    if name.startswith("raft"):
        pair = (torch.randn(1, 3, side, side), torch.randn(1, 3, side, side))
        return model, pair, {"num_flow_updates": 2}
    if name in VIDEO:
        batch = 1 if side > 96 else 2
        return model, (torch.randn(batch, 3, VIDEO[name], side, side),), {}
    return model, (torch.randn(2, 3, side, side),), {}


def _transformers(name: str) -> Built:
    transformers = importlib.import_module("transformers")
    class_name, settings = TRANSFORMERS[name]
    kind = getattr(transformers, class_name)
    model = kind(kind.config_class(**settings))
    return model, (), _inputs_of(name, model)


def _inputs_of(name: str, model: Any) -> dict[str, Any]:
    """Inputs by what the model calls its main one."""
    ids = torch.randint(3, 160, (2, 12))
    side = IMAGE_SIDES.get(name, 32)
    main = model.main_input_name
    kwargs: dict[str, Any] = {}
    if name in ("clip", "siglip"):
        return {"input_ids": ids, "pixel_values": torch.randn(2, 3, side, side)}
    if name == "videomae":
        return {"pixel_values": torch.randn(2, 4, 3, side, side)}
    if name == "ast":
        return {"input_values": torch.randn(2, 32, 16)}
    if main == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, side, side)}
    if main == "input_values":
        return {"input_values": torch.randn(2, 1600)}
    if main == "input_features":
        shape = {"whisper": (2, 16, 64), "speech_to_text": (2, 64, 16)}.get(name, (2, 20, 16))
        kwargs["input_features"] = torch.randn(*shape)
    else:
        kwargs["input_ids"] = ids
    if name == "layoutlm":
        kwargs["bbox"] = torch.randint(0, 30, (2, 12, 2)).repeat(1, 1, 2)
    if model.config.is_encoder_decoder:
        kwargs["decoder_input_ids"] = ids[:, :7]
    if getattr(model.config, "use_cache", False):
        kwargs["use_cache"] = False
    return kwargs


def _ultralytics(name: str) -> Built:
    tasks = importlib.import_module("ultralytics.nn.tasks")
    kinds = {
        "-cls": "ClassificationModel", "-seg": "SegmentationModel", "-pose": "PoseModel",
        "-obb": "OBBModel", "rtdetr": "RTDETRDetectionModel", "-world": "WorldModel",
        "-sem": "SemanticSegmentationModel", "-depth": "DepthModel",
    }  # fmt: skip
    kind = next((kinds[part] for part in kinds if part in name), "DetectionModel")
    if name.startswith("yoloe"):
        kind = "YOLOESegModel" if "-seg" in name else "YOLOEModel"
    model = getattr(tasks, kind)(f"{name}.yaml", verbose=False)
    side = 256 if "p6" in name else 128 if "rtdetr" in name else 96
    return model, (torch.randn(2, 3, side, side),), {}


_BUILDERS: dict[str, Callable[[str], Built]] = {
    "timm": _timm, "torchvision": _torchvision, "transformers": _transformers,
    "ultralytics": _ultralytics,
}  # fmt: skip
