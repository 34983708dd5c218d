"""Small random models of all families that transformers builds, and what compressing them leads to.

The sizes of a family follow from its default config: every field that `SMALL` knows by name takes
the value there, in nested configs too, and whatever transformers derives from these stays derived.
`OVERRIDES` has what a family calls otherwise or ties to other sizes.
"""

import copy
import dataclasses
import random
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from inspect import signature
from pathlib import Path

import numpy
import torch
from safetensors import safe_open
from torch.utils.data import DataLoader, Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from casp_plugin.checkpoint.check import check
from casp_plugin.model.load import bare_source_model, load_model, names_in_memory
from casp_plugin.modifiers import estimate_recipe, plan_recipe
from casp_plugin.modifiers.compression import compress
from casp_plugin.modifiers.recipes import load_recipe
from casp_plugin.modifiers.run_estimate import Data
from support.tiny_models import VOCABULARY, save_tokenizer

_BITS = """
    BitAllocationModifier: {average_bits: 5, candidates: [2, 3, 4, 8], group_size: 16}
    GPTQModifier: {}
"""
#: bits only, and ranks before them
RECIPES = {
    "B": f"casp_stage:\n  casp_modifiers:{_BITS}",
    "R": f"casp_stage:\n  casp_modifiers:\n    LowRankQKModifier: {{}}{_BITS}",
}

WORDS = 64  # token ids from here on stand for images and other things

SMALL = {
    # widths
    **dict.fromkeys(
        [
            *("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim", "embed_dim"),
            *("word_embed_proj_dim", "embedding_size", "input_embedding_size"),
            *("output_embedding_size", "hidden_size_global", "lru_width", "out_hidden_size"),
            *("projection_dim", "text_hidden_size", "decoder_hidden_size", "vision_output_dim"),
            *("encoder_hidden_size", "qformer_hidden_size", "projector_hidden_size"),
            *("projector_input_dim", "projector_output_dim", "image_token_embed_dim"),
            *("backbone_hidden_size", "output_dim", "attention_hidden_size"),
            *("patch_embed_hidden_size", "image_text_hidden_size", "pronunciation_embed_dim"),
            *("shape_embed_dim", "projection_hidden_size", "hidden_dim", "mlp_hidden_size"),
            *("merged_hidden_size", "router_hidden_size", "output_channels", "embed_dim_per_layer"),
        ],
        64,
    ),
    **dict.fromkeys(
        [
            *("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff"),
            *("n_inner", "ffn_hidden_size", "expert_ffn_hidden_size", "dim_ff", "dff"),
            *("intermediate_size_mlp", "dense_intermediate_size", "moe_intermediate_size"),
            *("shared_expert_intermediate_size", "shared_intermediate_size", "mlp_dim"),
            *("moe_shared_expert_intermediate_size", "share_expert_dim", "feed_forward_size"),
            *("d_inner", "alignment_intermediate_size", "projection_intermediate_size"),
            *("prompt_mid_dim", "block_auto_adjust_ff_dim", "mamba_d_ssm"),
        ],
        128,
    ),
    # depths
    **dict.fromkeys(
        [
            *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers"),
            *("decoder_layers", "num_encoder_layers", "num_decoder_layers", "depth", "num_blocks"),
            *("layers", "resampler_depth", "num_layers_per_stack", "conf_num_hidden_layers"),
            *("num_global_layers", "max_window_layers", "aligner_num_add_layers"),
        ],
        2,
    ),
    # heads
    **dict.fromkeys(
        [
            *("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"),
            *("decoder_attention_heads", "num_encoder_attention_heads", "attention_heads"),
            *("num_decoder_attention_heads", "resampler_n_heads", "swa_num_attention_heads"),
            *("num_sliding_attention_heads", "linear_num_heads", "conf_num_attention_heads"),
            *("linear_num_value_heads", "resampler_heads", "num_query_groups"),
        ],
        4,
    ),
    **dict.fromkeys(
        [
            *("num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads"),
            *("linear_num_key_heads", "n_mamba_heads", "index_n_heads"),
            *("num_global_key_value_heads", "heads_per_ngram"),
        ],
        2,
    ),
    **dict.fromkeys(
        [
            *("head_dim", "d_kv", "dim_head", "d_head", "attention_head_size", "kv_channels"),
            *("resampler_head_dim", "resampler_dim_head", "swa_head_dim", "linear_head_dim"),
            *("linear_key_head_dim", "linear_value_head_dim", "index_head_dim", "v_head_dim"),
            *("global_head_dim", "swa_v_head_dim", "attention_head_dim", "qk_nope_head_dim"),
            *("qk_rope_head_dim", "mamba_head_dim", "query_pre_attn_scalar"),
        ],
        16,
    ),
    "qk_head_dim": 32,
    **dict.fromkeys(
        ["kv_lora_rank", "q_lora_rank", "o_lora_rank", "laurel_rank", "gated_norm_rank"], 32
    ),
    "hc_lowrank": 16,
    "d_rel": 16,
    "adapter_rank": 16,
    # experts
    **dict.fromkeys(
        [
            *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
            *("moe_num_routed_experts",),
        ],
        4,
    ),
    **dict.fromkeys(
        [
            *("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k"),
            *("top_k_experts",),
        ],
        2,
    ),
    **dict.fromkeys(
        [
            *("n_group", "topk_group", "num_expert_group", "n_shared_experts", "zero_expert_num"),
            *("moe_num_shared_experts", "num_shared_experts", "num_dense_layers"),
            *("first_k_dense_replace", "moe_layer_end_index", "index_local_blocks"),
        ],
        1,
    ),
    # states of recurrent layers
    **dict.fromkeys(["state_size", "mamba_d_state", "ssm_state_size"], 16),
    **dict.fromkeys(["time_step_rank", "mamba_dt_rank"], 16),
    **dict.fromkeys(["chunk_size", "mamba_chunk_size", "block_size"], 16),
    **dict.fromkeys(["mamba_n_heads", "mamba_num_heads"], 8),
    **dict.fromkeys(["mamba_d_head", "mamba_headdim"], 16),
    # positions and windows
    **dict.fromkeys(
        [
            *("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"),
            *("max_target_positions", "model_max_length", "max_source_positions"),
            *("original_max_position_embeddings", "max_2d_position_embeddings"),
        ],
        64,
    ),
    **dict.fromkeys(
        [
            *("sliding_window", "attention_window_size", "local_attention", "keep_window_size"),
            *("sliding_window_size", "attention_chunk_size", "window_size", "index_topk"),
        ],
        16,
    ),
    "rotary_dim": 16,
    # vocabularies
    **dict.fromkeys(
        [
            *("vocab_size", "vocab_size_per_layer_input", "codebook_size", "decoder_vocab_size"),
            *("pronunciation_vocab_size", "shape_vocab_size", "encoder_hash_byte_group_vocab"),
        ],
        VOCABULARY,
    ),
    "hidden_size_per_layer_input": 16,
    "num_centroids": 16,
    "centroid_intermediate_top_k": 4,
    "ngram_vocab_size_base": 128,
    "split_ngram_parts": 4,
    "ple_embed_dim": 64,
    # images
    **dict.fromkeys(["image_size", "crop_size"], 32),
    **dict.fromkeys(["patch_size"], 8),
    **dict.fromkeys(["num_query_tokens", "mm_tokens_per_image", "latent_query_num"], 4),
    **dict.fromkeys(["resampler_n_latents", "resampler_num_latents"], 4),
    **dict.fromkeys(["num_position_embeddings", "image_seq_length", "num_image_tokens"], 16),
    "vision_soft_tokens_per_image": 16,
    "num_patches": 16,
    "num_embeddings": 32,
    "base_channels": 32,
    "latent_channels": 16,
    "num_res_blocks": 1,
    "pos_emb_height": 8,
    "pos_emb_width": 8,
    "audio_vocab_size": 32,
    "num_codebooks": 2,
    # what a model does only while it trains, or tells apart from evaluation
    "attention_dropout": 0.0,
}

TOKENS = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 2,
}

#: fields that are small even where the default leaves them out
ALWAYS = ("num_key_value_heads", "head_dim", "num_experts_per_tok", "n_routed_experts")

#: fields that count layers from 0, or have a value a stage
LISTS = {
    "deepstack_visual_indexes": [0],
    "global_attn_indexes": [1],
    "fullatt_block_indexes": [1],
}

#: fields that tell what kind each layer is
KINDS = ("layer_types", "layers_block_type", "mlp_layer_types", "indexer_types")

#: what an assistant of gemma 4 must not have
_NO_EXTRAS = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}

#: an image as a family takes it, where that is neither `pixel_values` of 3 x 32 x 32 nor flattened
#: patches with `image_grid_thw`: shapes of random numbers as tuples, integers as lists
IMAGES: dict[str, dict] = {
    "deepseek_vl_hybrid": {
        "pixel_values": (1, 3, 32, 32),
        "high_res_pixel_values": (1, 3, 32, 32),
    },
    "emu3": {"pixel_values": (1, 3, 32, 32), "image_sizes": [[32, 32]]},
    **{
        family: {
            "pixel_values": (1, 16, width),
            "image_position_ids": [[[i % 4, i // 4] for i in range(16)]],
        }
        for family, width in (("gemma4", 192), ("gemma4_unified", 1728))
    },
    **{
        family: {"pixel_values": (1, 2, 3, 32, 32), "image_sizes": [[32, 32]]}
        for family in ("granite4_vision", "llava_next", "llava_next_video", "llava_onevision")
    },
    "idefics": {"pixel_values": (1, 1, 3, 32, 32), "image_attention_mask": [[[1]] * 8]},
    **{
        family: {"pixel_values": (1, 1, 3, 32, 32)}
        for family in ("idefics2", "idefics3", "smolvlm")
    },
    "instructblip": {"pixel_values": (1, 3, 32, 32), "qformer_input_ids": [[5, 6, 7]]},
    "instructblipvideo": {"pixel_values": (1, 4, 3, 32, 32), "qformer_input_ids": [[5, 6, 7]]},
    "kimi_k25": {"pixel_values": (16, 3, 8, 8), "image_grid_thw": [[1, 4, 4]]},
    "kosmos-2": {
        "pixel_values": (1, 3, 32, 32),
        "image_embeds_position_mask": [[0, 1, 1, 1, 1, 0, 0, 0]],
    },
    "kosmos-2.5": {
        "flattened_patches": (1, 16, 66),
        "image_embeds_position_mask": [[0, 1, 1, 1, 1, 0, 0, 0]],
    },
    "inkling_mm_model": {"pixel_values": (1, 2, 8, 8, 3)},
    "lfm2_vl": {
        "pixel_values": (1, 16, 192),
        "spatial_shapes": [[4, 4]],
        "pixel_attention_mask": [[1] * 16],
    },
    **{
        family: {"pixel_values": (1, 3, 32, 32), "image_sizes": [[32, 32]]}
        for family in ("lighton_ocr", "mistral3")
    },
    "minicpmv4_6": {"pixel_values": (1, 3, 8, 128), "target_sizes": [[4, 4]]},
    "mllama": {
        "pixel_values": (1, 1, 4, 3, 32, 32),
        "aspect_ratio_ids": [[1]],
        "aspect_ratio_mask": [[[1, 0, 0, 0]]],
        "cross_attention_mask": [[[[1, 0, 0, 0]]] * 8],
    },
    "muse_glimmer": {"pixel_values": (16, 384), "image_grid_thw": [[1, 4, 4]]},
    "paddleocr_vl": {"pixel_values": (16, 3, 8, 8), "image_grid_thw": [[1, 4, 4]]},
    "pi0": {
        "pixel_values": (1, 1, 3, 32, 32),
        "pixel_attention_mask": [[True]],
        "state": (1, 32),
        "noise": (1, 50, 32),
        "timestep": (1,),
    },
    "pix2struct": {"flattened_patches": (1, 16, 66)},
    "udop": {"pixel_values": (1, 3, 32, 32), "bbox": [[[0, 0, 1, 1]] * 8]},
    "video_llama_3": {
        "pixel_values": (16, 192),
        "image_grid_thw": [[1, 4, 4]],
        "image_merge_sizes": [2],
    },
    "video_llava": {"pixel_values_images": (1, 3, 32, 32)},
}

#: how many tokens stand for that image, where `get_image_features` does not tell
PLACES = {
    **dict.fromkeys(["blip", "git", "idefics", "mllama", "pp_formulanet", "udop"], 0),
    **dict.fromkeys(["kosmos-2", "kosmos-2.5", "pix2struct", "vision-encoder-decoder"], 0),
    "granite4_vision": 10,
    "instructblipvideo": 16,
    "llama4": 4,
    "pi0": 16,
}

#: families whose sample has no image, and why
WITHOUT_IMAGE = {
    "diffusion_gemma": "its encoder takes images by a processor's own fields",
    "fuyu": "its patches are text to it",
    "mistral4": "transformers names its language model",
}

#: nested configs, where a family has no default for them
PARTS: dict[str, dict] = {
    "diffusion_gemma": {"vision_config": {"model_type": "gemma4_vision"}},
    "gemma4": {"vision_config": {"model_type": "gemma4_vision"}},
    "gemma4_unified": {"vision_config": {"model_type": "gemma4_unified_vision"}},
    "granite4_vision": {"text_config": {"model_type": "granite4_vision_text"}},
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text", **_NO_EXTRAS}},
    "gemma4_unified_assistant": {
        "text_config": {"model_type": "gemma4_unified_text", **_NO_EXTRAS}
    },
    **{
        family: {
            "text_encoder": {"model_type": "t5"},
            "audio_encoder": {"model_type": "encodec"},
            "decoder": {"model_type": f"{family}_decoder"},
        }
        for family in ("musicgen", "musicgen_melody")
    },
    "vision-encoder-decoder": {
        "encoder": {"model_type": "vit"},
        "decoder": {"model_type": "bert", "is_decoder": True, "add_cross_attention": True},
    },
}

_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
_MROPE_HWT = _MROPE | {"mrope_section": [3, 3, 2]}
#: gemma 4: layers of both kinds, of which the last two use keys and values of the first two
_SHARED = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "ple_layer_ids": [1],
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 128}

#: where the names above do not lead to a small model
OVERRIDES: dict[str, dict] = {
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "bamba": {"attn_layer_indices": [1]},
    "blip-2": {"image_token_index": 64},
    "blt": {"use_cache": False, "encoder_config": {"intermediate_size": 128}},
    "chameleon": {
        "vocabulary_map": {"<image>": 64}
        | {f"IMGIMG{'AB'[i // 10]}{'ABCDEFGHIJ'[i % 10]}Z": 66 + i for i in range(16)},
        "vq_config": {"num_embeddings": 16, "resolution": 32},
    },
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": _MROPE_HWT}}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _MROPE_HWT}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse"]},
        "vision_config": {"sam_config": {"downsample_channels": [64, 64]}},
    },
    "diffusion_gemma": {"canvas_length": 8, "text_config": {"global_head_dim": 16, **_EXPERTS}},
    "dots1": {"n_shared_experts": 1},
    "emu3": {
        "vocabulary_map": {"<image>": 64, "<|extra_200|>": 65}
        | {f"<|visual token {i:06d}|>": 66 + i for i in range(16)},
        "vq_config": {"codebook_size": 16, "hidden_size": 128},
    },
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": _MROPE_HWT}},
    "florence2": {
        "vision_config": {
            "depths": [1, 1, 1, 1],
            "embed_dim": [16, 32, 32, 64],
            "num_heads": [1, 2, 2, 4],
            "num_groups": [1, 2, 2, 4],
        },
    },
    "gemma3n_text": {"intermediate_size": 128, **_SHARED},
    "gemma4": {"text_config": {"global_head_dim": 16, "enable_moe_block": True, **_EXPERTS}},
    "gemma4_assistant": {"text_config": {"global_head_dim": 16, **_NO_EXTRAS}},
    "gemma4_text": {"global_head_dim": 16, **_SHARED},
    "gemma4_unified": {"text_config": {"global_head_dim": 16}},
    "gemma4_unified_assistant": {"text_config": {"global_head_dim": 16, **_NO_EXTRAS}},
    "gemma4_unified_text": {"global_head_dim": 16},
    **{
        family: {"text_config": {"rope_parameters": _MROPE}}
        for family in ("glm46v", "glm4v", "glm_ocr", "glmga")
    },
    "glm4v_moe": {
        "text_config": {
            "rope_parameters": _MROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5},
        },
    },
    "glm5_next": {"text_config": {"qk_rope_head_dim": 0}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite4_vision": {
        "image_grid_pinpoints": [[32, 32]],
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [0, 0, 1, 1],
        "downsample_rate": "1/2",
        "vision_feature_select_strategy": "full",
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_vl": {"text_config": {"rope_parameters": _MROPE | {"mrope_section": [2, 2, 2, 2]}}},
    "inkling_mm_model": {
        "vision_config": {"num_hidden_layers": 4, "patch_size": 8, "text_hidden_size": 64}
    },
    "instructblip": {"image_token_index": 64},
    "instructblipvideo": {"video_token_index": 64},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    **{
        family: {"image_grid_pinpoints": [[32, 32]]}
        for family in ("llava_next", "llava_next_video", "llava_onevision")
    },
    "llama4": {"vision_config": {"intermediate_size": 256}},
    "mamba2": {"num_heads": 8},
    "minicpmv4_6": {"image_token_id": 64},
    "mllama": {
        "text_config": {"cross_attention_layers": [1]},
        "vision_config": {"intermediate_layers_indices": [0, 1], "vision_output_dim": 192},
    },
    "muse_glimmer": {"out_hidden_size": 256},
    "paddleocr_vl": {"text_config": {"rope_parameters": _MROPE}},
    "phi4_multimodal": {
        "audio_config": {
            "nemo_conv_channels": 64,
            "ext_pw_out_channel": 64,
            "depthwise_separable_out_channel": 64,
        },
    },
    "pp_formulanet": {
        "vision_config": {
            "post_conv_in_channels": 64,
            "post_conv_mid_channels": 64,
            "post_conv_out_channels": 64,
        },
    },
    "qwen2_5_vl": {"text_config": {"rope_parameters": _MROPE}},
    "qwen2_vl": {"text_config": {"rope_parameters": _MROPE}},
    "qwen2_5_omni_thinker": {
        "vision_start_token_id": 90,
        "text_config": {"rope_parameters": _MROPE},
    },
    "qwen3_omni_moe_thinker": {
        "vision_start_token_id": 90,
        "audio_config": {"downsample_hidden_size": 64},
    },
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds_dim": [32, 32],
        "axial_pos_shape": [8, 8],
        "num_buckets": 4,
    },
    "step3p7": {"text_config": {"sliding_window": 16}},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zaya": {"num_experts_per_tok": 1},
}


#: families without a small model that can be saved, loaded and asked, and why
NOT_BUILT = {
    "evolla": "transformers' auto class knows its name and not its config",
    "fast_vlm": "takes the package timm",
    "gemma3n": "takes the package timm",
    "gemma4_assistant": "runs on keys and values of another model only",
    "gemma4_unified_assistant": "runs on keys and values of another model only",
    "musicgen": "transformers' auto class builds its decoder from the config of the whole",
    "musicgen_melody": "transformers' auto class builds its decoder from the config of the whole",
    "perception_lm": "takes the package timm",
    "shieldgemma2": "what transformers saves of it, it does not load by its auto class",
}


def families() -> list[str]:
    """Every model type that transformers has a causal language or image-text model for."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})


def kind(family: str) -> str:
    """`image` for what loads as an image-text model, else `text`."""
    return "image" if family in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES else "text"


def class_name(family: str) -> str:
    """What transformers calls the family's model."""
    names = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return (names if kind(family) == "image" else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)[family]


def has_query_and_key(family: str) -> bool:
    """Whether the model has layers that `LowRankQKModifier` looks for; one that cannot be built has
    none."""
    if family in NOT_BUILT:
        return False
    with torch.device("meta"):
        model = _auto_class(family).from_config(small_config(family))
    found = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return {"q_proj", "k_proj"} <= found


def small_config(family: str) -> PreTrainedConfig:
    """The config of a small model."""
    kind = CONFIG_MAPPING[family]
    given = OVERRIDES.get(family, {})
    default = kind(**copy.deepcopy(PARTS.get(family, {})))  # which some take apart
    values = _small_values(default, {}, iter(range(WORDS, VOCABULARY)))
    if "is_decoder" in signature(kind).parameters:
        values["is_decoder"] = True  # causal
    return kind(**_merged(values, given))


def _small_values(default: PreTrainedConfig, ids: dict[str, int], fresh: Iterator[int]) -> dict:
    """Arguments by which a config becomes small.

    :param default: the config as it is when nothing is given
    :param ids: tokens that stand for something, by the name of their field, for all nested configs
    :param fresh: token ids that none has yet
    """
    values = {}
    fields = {field.name: field.default for field in dataclasses.fields(default)}
    nested = [name for name, value in vars(default).items() if isinstance(value, PreTrainedConfig)]
    for name in dict.fromkeys([*fields, *nested]):
        value = vars(default).get(default.attribute_map.get(name, name))
        if isinstance(value, PreTrainedConfig):
            inner = _small_values(value, ids, fresh)
            values[name] = {"model_type": value.model_type, **inner}
        elif name.endswith(("_token_id", "_token_index")):
            if name in TOKENS and value is not None:
                values[name] = TOKENS[name]
            elif isinstance(value, int) and value >= 0:
                if name not in ids:
                    ids[name] = next(fresh)
                values[name] = ids[name]
        elif name == "rope_parameters" and isinstance(value, dict):
            values[name] = _small_rope(value)
        elif name in LISTS and value:
            values[name] = LISTS[name]
        elif name in ALWAYS or (name in SMALL and _is_number(value) and fields[name] is not None):
            values[name] = SMALL[name]
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        values["num_key_value_heads"] = SMALL["num_attention_heads"]
    return values | _layer_kinds(default, fields)


def _layer_kinds(default: PreTrainedConfig, fields: Iterable[str]) -> dict:
    """As many layers as there are kinds of them, at least two."""
    kinds = {
        name: list(dict.fromkeys(getattr(default, name)))
        for name in KINDS
        if name in fields and getattr(default, name, None)
    }
    if not kinds:
        return {}
    depth = max(2, *map(len, kinds.values()))
    values = {name: [*found, *found[-1:] * depth][:depth] for name, found in kinds.items()}
    return values | {name: depth for name in ("num_hidden_layers", "n_layers") if name in fields}


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _small_rope(parameters: dict) -> dict:
    found = {}
    for name, value in parameters.items():
        if isinstance(value, dict):
            found[name] = _small_rope(value)
        elif name == "mrope_section":
            rotary = int(16 * parameters.get("partial_rotary_factor", 1)) // 2
            rest = len(value) - 1
            found[name] = [rotary - rest * (rotary // (rest + 1)), *[rotary // (rest + 1)] * rest]
        elif name == "original_max_position_embeddings":
            found[name] = 32
        else:
            found[name] = value
    return found


def _merged(values: dict, overrides: dict) -> dict:
    merged = dict(values)
    for name, value in overrides.items():
        inner = merged.get(name)
        both = isinstance(value, dict) and isinstance(inner, dict) and name.endswith("config")
        merged[name] = _merged(inner, value) if both else value
    return merged


def build(family: str) -> PreTrainedModel:
    """A random model in float32, the same in every call."""
    _seed()
    model = _auto_class(family).from_config(small_config(family)).float().eval()
    known = model.state_dict()
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in known]
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *buffers]:
            if not tensor.is_floating_point():
                continue
            if name.endswith("bias"):
                tensor.normal_(std=0.5)
            elif not tensor.isfinite().all() or not tensor.any():
                tensor.normal_(std=0.02)
    return model


def save(family: str, folder: Path) -> None:
    """Write the model and a word-level tokenizer."""
    build(family).save_pretrained(folder)
    save_tokenizer(folder)


def batches(family: str, model: PreTrainedModel) -> DataLoader:
    """Four batches of one text, which goes with an image where the family sees."""
    generator = torch.Generator().manual_seed(0)
    return DataLoader(
        _Counted([_sample(family, model, generator) for _ in range(4)]), batch_size=None
    )


class _Counted(Dataset):
    """Samples, and how often one was taken."""

    def __init__(self, samples: list[dict]):
        self.samples = samples
        self.drawn = 0

    def __len__(self) -> int:
        return len(self.samples)

    def __deepcopy__(self, memo: dict) -> "_Counted":  # llm-compressor copies what it is given
        return self

    def __getitem__(self, index: int) -> dict:
        self.drawn += 1
        return self.samples[index]


def _sample(family: str, model: PreTrainedModel, generator: torch.Generator) -> dict:
    known = signature(model.forward).parameters
    seen = kind(family) == "image" and family not in WITHOUT_IMAGE
    image = _image(family, model, generator) if seen else {}
    places = _places(family, model, image) if seen else 0
    ids = torch.randint(3, WORDS, (1, 8 if seen else 20), generator=generator)
    if places:
        tokens = torch.full((1, places), _image_token(model.config))
        ids = torch.cat([ids[:, :4], tokens, ids[:, 4:]], dim=1)
    sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **image}
    if "mm_token_type_ids" in known and seen:
        sample["mm_token_type_ids"] = (ids == _image_token(model.config)).int()
    if "decoder_input_ids" in known:
        sample["decoder_input_ids"] = ids[:, :8]
    return {name: value for name, value in sample.items() if name in known}


def _image(family: str, model: PreTrainedModel, generator: torch.Generator) -> dict:
    """Random pixels as the family's processor would prepare them."""
    image = IMAGES.get(family)
    if image is None and "image_grid_thw" in signature(model.forward).parameters:
        vision = model.config.vision_config
        values = 3 * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
        image = {"pixel_values": (16, values), "image_grid_thw": [[1, 4, 4]]}
    elif image is None:
        image = {"pixel_values": (1, 3, 32, 32)}
    made = {
        name: torch.randn(value, generator=generator)
        if isinstance(value, tuple)
        else torch.tensor(value)
        for name, value in image.items()
    }
    if "flattened_patches" in made:  # which begin with row and column
        made["flattened_patches"][..., :2] = torch.tensor([[i // 4, i % 4] for i in range(16)])
    return made


def _places(family: str, model: PreTrainedModel, image: dict) -> int:
    """How many tokens stand for an image."""
    if family in PLACES:
        return PLACES[family]
    with_features = model if hasattr(model, "get_image_features") else model.base_model
    with torch.no_grad():
        features = with_features.get_image_features(**image)
    features = getattr(features, "pooler_output", features)
    if isinstance(features, torch.Tensor):
        features = [features]
    return sum(each.numel() for each in features) // features[0].shape[-1]


def _image_token(config: PreTrainedConfig) -> int:
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    config = getattr(config, "vlm_config", config)
    return next(getattr(config, name) for name in names if getattr(config, name, None) is not None)


@dataclass(frozen=True)
class Outcome:
    """What became of a family.

    :param kind: `compressed`, `refused`, `cannot be built`, or `third outcome`
    :param detail: in one line
    :param trace: the end of the traceback, where there is one
    """

    kind: str
    detail: str
    trace: str = ""


def outcome(family: str, recipe: str, folder: Path) -> Outcome:
    """What a user gets who compresses the family's small model, checks it and loads it again.

    :param recipe: text of a recipe
    :param folder: an empty folder to work in
    """
    source, out = folder / "source", folder / "out"
    try:
        save(family, source)
        stock = load_model(str(source), dtype=torch.float32).eval()
        data = batches(family, stock)
        if not _logits(stock, data.dataset.samples[0]).isfinite().all():
            raise ValueError("its logits are not finite")
        stock = load_model(str(source), dtype=torch.float32)  # as no forward pass left it
    except Exception as error:  # of transformers alone
        told = _told(error).replace(str(source), "its source")
        return Outcome("cannot be built", told, _trace(error))
    try:
        bare, filled = bare_source_model(str(source)), load_recipe(recipe)
        estimate_recipe(bare, filled, Data(len(data), 24))
        plan_recipe(bare, filled)
        model = compress(str(source), filled, data, out, seed=0)
    except Exception as error:
        if wrong := _no_refusal(error, data.dataset.drawn, source, folder):
            return Outcome("third outcome", f"{wrong}: {_told(error)}", _trace(error))
        return Outcome("refused", str(error), _trace(error))
    try:
        if wrong := _difference(model, stock, data.dataset.samples[0], source, out):
            return Outcome("third outcome", wrong)
    except Exception as error:
        return Outcome("third outcome", f"afterwards: {_told(error)}", _trace(error))
    return Outcome("compressed", f"{model.casp_plan.reached_bits:.2f} bits")


def _no_refusal(error: Exception, drawn: int, source: Path, folder: Path) -> str:
    """What keeps an error from being a refusal: one line by casp before the data runs, with nothing
    left behind. Empty if nothing does.

    :param drawn: batches that were handed out; two may serve to trace and to rehearse
    """
    left = [path.name for path in folder.iterdir() if path != source]
    frame = traceback.extract_tb(error.__traceback__)[-1]
    if not isinstance(error, ValueError | OSError | ImportError):
        return "no refusal"
    if drawn > 2:
        return f"refused after {drawn} batches"
    if left:
        return f"refused with {', '.join(left)} left behind"
    if "\n" in str(error).strip():
        return "refused in many lines"
    if "casp_plugin" not in Path(frame.filename).parts or not frame.line.startswith("raise"):
        return f"met in {Path(frame.filename).name}, not refused by casp"
    return ""


def _difference(
    model: PreTrainedModel, stock: PreTrainedModel, sample: dict, source: Path, out: Path
) -> str:
    """What is wrong with a checkpoint, first come first told; empty if nothing is.

    :param model: as it was compressed, in memory
    :param stock: the source, as transformers loads it
    """
    for finding in check(out):
        if finding.passed is False:
            return f"check: {finding.what}: {finding.detail}"
    reloaded = load_model(str(out), dtype=torch.float32)
    buffers = dict(reloaded.named_buffers())
    for name, buffer in stock.named_buffers():
        if name not in buffers:
            return f"buffer {name} is gone"
        if not torch.equal(buffers[name].nan_to_num(), buffer.nan_to_num()):
            return f"buffer {name} differs from a stock load"
    before, after = _logits(model, sample), _logits(reloaded, sample)
    if not before.isfinite().all() or before.std() < 1e-6:
        return "logits of the compressed model are constant or not finite"
    if not torch.allclose(before, after, rtol=1e-3, atol=1e-3):
        return f"logits differ by {(before - after).abs().max():.2g} after loading"
    if made_up := _made_up(reloaded, stock):
        return f"{len(made_up)} weights are not those of the source, first {made_up[0]}"
    if lost := _lost(stock, source, out):
        return f"{len(lost)} tensors of the source are gone, first {lost[0]}"
    return ""


def _made_up(reloaded: PreTrainedModel, stock: PreTrainedModel) -> list[str]:
    """Weights further from the source than rounding takes any; zero is as far as they are large.

    :param reloaded: after it ran, which makes its weights dense
    """
    weights = dict(reloaded.named_parameters())
    return [
        name
        for name, weight in stock.named_parameters()
        if name in weights
        and weight.shape == weights[name].shape
        and not (weights[name] - weight).norm() <= 0.95 * weight.norm()
    ]


def _lost(stock: PreTrainedModel, source: Path, out: Path) -> list[str]:
    """Tensors of the source that the output has neither under their name, nor quantized or factored
    there, nor as a part or the whole of a weight that loading fills."""
    stored, kept = _stored(source), _stored(out)
    known = stock.state_dict()
    return [
        name
        for name, inner in names_in_memory(stored, stock).items()
        if name not in kept
        and not any(each.startswith(f"{name.removesuffix('.weight')}.") for each in kept)
        and inner not in known
    ]


def _stored(folder: Path) -> list[str]:
    names = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names += file.keys()
    return names


def _logits(model: PreTrainedModel, sample: dict) -> torch.Tensor:
    _seed()
    with torch.no_grad():
        made = model.eval()(**sample)
    return (made.logits if hasattr(made, "logits") else made[0]).float()


def _auto_class(family: str) -> type:
    return AutoModelForImageTextToText if kind(family) == "image" else AutoModelForCausalLM


def _seed() -> None:
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


def _told(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def _trace(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)[-12:]
    return "\n".join(f"{frame.filename}:{frame.lineno} {frame.line}" for frame in frames)
