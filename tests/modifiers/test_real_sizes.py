"""Models of docs/vision-language.md at their real sizes and without weights: the recipes fit."""

from pathlib import Path

import pytest
import yaml
from support.tiers import tiered
from transformers import AutoConfig

from casp_plugin.model.components import LANGUAGE
from casp_plugin.model.load import bare_model
from casp_plugin.modifiers import plan_recipe

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "vision-language.md"
GPTQ, LLAVA, SMALL = (
    f"recipes/{name}.yaml" for name in ("casp_gptq", "llava_gptq", "smollm2/casp")
)


def text(width, inner, layers, heads, kv_heads=None, **more):
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or heads,
        **more,
    }


def rope(*sections, **more):
    return {"rope_parameters": {"rope_type": "default", "mrope_section": sections, **more}}


CLIP = text(1024, 4096, 24, 16, model_type="clip_vision_model", image_size=336, patch_size=14)
SIGLIP = text(1152, 4304, 27, 16, patch_size=14)
SIGLIP_TOWER = {**SIGLIP, "model_type": "siglip_vision_model", "vision_use_head": False}
VICUNA = text(4096, 11008, 32, 32, model_type="llama", vocab_size=32064)
MISTRAL = text(4096, 14336, 32, 32, 8, model_type="mistral", vocab_size=32064)
LLAMA3 = text(4096, 14336, 32, 32, 8, model_type="llama", vocab_size=128259)
SMOLLM2 = text(576, 1536, 30, 9, 3, model_type="llama", vocab_size=49280)
QWEN2 = text(3584, 18944, 28, 28, 4, vocab_size=152064, **rope(16, 24, 24))
QWEN3 = text(4096, 12288, 36, 32, 8, head_dim=128, vocab_size=151936, **rope(24, 20, 20))
GEMMA3 = text(2560, 10240, 34, 8, 4, head_dim=256, vocab_size=262208)
GEMMA2 = text(2304, 9216, 26, 8, 4, head_dim=256, vocab_size=257216, model_type="gemma2")
OPT = {
    **text(2560, 10240, 32, 32, model_type="opt", vocab_size=50304),
    "ffn_dim": 10240,
    "word_embed_proj_dim": 2560,
}
QWEN_VISION = {"depth": 32, "num_heads": 16}

# hub id: family, sizes, billions of parameters, recipe
MODELS = {
    "llava-hf/llava-1.5-7b-hf": ("llava", CLIP, VICUNA, 7.06, LLAVA),
    "llava-hf/llava-v1.6-mistral-7b-hf": ("llava_next", CLIP, MISTRAL, 7.57, LLAVA),
    "llava-hf/LLaVA-NeXT-Video-7B-hf": ("llava_next_video", CLIP, VICUNA, 7.06, GPTQ),
    "Qwen/Qwen2-VL-7B-Instruct": (
        "qwen2_vl",
        {**QWEN_VISION, "embed_dim": 1280, "hidden_size": 3584},
        QWEN2,
        8.29,
        GPTQ,
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": (
        "qwen2_5_vl",
        {
            **QWEN_VISION,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "out_hidden_size": 3584,
        },
        QWEN2,
        8.29,
        GPTQ,
    ),
    "Qwen/Qwen3-VL-8B-Instruct": (
        "qwen3_vl",
        {
            **QWEN_VISION,
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "out_hidden_size": 4096,
            "deepstack_visual_indexes": [8, 16, 24],
        },
        QWEN3,
        8.77,
        GPTQ,
    ),
    "HuggingFaceM4/Idefics3-8B-Llama3": ("idefics3", SIGLIP, LLAMA3, 8.46, GPTQ),
    "HuggingFaceTB/SmolVLM-256M-Instruct": (
        "idefics3",
        text(768, 3072, 12, 12, patch_size=16, image_size=512),
        SMOLLM2,
        0.257,
        SMALL,
    ),
    "google/gemma-3-4b-it": ("gemma3", {**SIGLIP_TOWER, "image_size": 896}, GEMMA3, 4.30, GPTQ),
    "google/paligemma2-3b-pt-224": (
        "paligemma",
        {**SIGLIP_TOWER, "image_size": 224, "projection_dim": 2304},
        GEMMA2,
        3.03,
        GPTQ,
    ),
    "Salesforce/blip2-opt-2.7b": (
        "blip-2",
        text(1408, 6144, 39, 16),
        OPT,
        3.74,
        GPTQ,
    ),
}
MORE = {
    "HuggingFaceTB/SmolVLM-256M-Instruct": {"scale_factor": 4},
    "google/paligemma2-3b-pt-224": {"projection_dim": 2304},
    "Salesforce/blip2-opt-2.7b": {
        "qformer_config": {"hidden_size": 768, "encoder_hidden_size": 1408}
    },
}


@pytest.mark.parametrize("name", tiered(MODELS, "llava-hf/llava-1.5-7b-hf"))
def test_recipe_fits(name):
    family, vision, language, billions, recipe = MODELS[name]
    sizes = {"vision_config": vision, "text_config": language, "dtype": "float16"}
    sizes |= MORE.get(name, {})
    model = bare_model(AutoConfig.for_model(family, **sizes))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.01)
    plan = plan_recipe(model, str(ROOT / recipe))
    budgets = {budget.component or LANGUAGE: budget.average_bits for budget in plan.budgets}
    bits = {LANGUAGE: 2.25, "vision": 4.25, "connector": 4.25} if recipe == LLAVA else {}
    assert budgets == (bits or {LANGUAGE: 2.281503 if recipe == SMALL else 2.25})
    assert f"| `{name}` | `{recipe}` | {_ignored(name)} |" in PAGE.read_text()
    if recipe == GPTQ:
        bits = {"average_bits": {LANGUAGE: 2.25, "vision": 4.25}, "candidates": [2, 3, 4, 8]}
        ignore = ["re:.*lm_head$", _ignored(name).strip("`")]
        bits["ignore"] = [pattern for pattern in ignore if pattern != "nothing"]
        modifiers = {"LowRankQKModifier": {}, "BitAllocationModifier": bits, "GPTQModifier": {}}
        text = yaml.safe_dump({"casp_stage": {"casp_modifiers": modifiers}}, sort_keys=False)
        plan = plan_recipe(model, text)
        assert {budget.component for budget in plan.budgets} == {LANGUAGE, "vision"}


def _ignored(name):
    """What the page says to ignore so that the vision tower can be quantized."""
    family, vision, *_ = MODELS[name]
    if family.startswith("qwen"):
        odd = {"qwen2_5_vl": "down_proj", "qwen3_vl": "linear_fc2"}.get(family)
        return f"`re:.*visual.*{odd}$`" if odd else "nothing"
    return "`re:.*vision.*fc[12]$`" if vision["intermediate_size"] % 64 else "nothing"
