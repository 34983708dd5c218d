"""Components of multimodal models, found by name."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from casp_plugin.model.components import component_of, find_components
from casp_plugin.model.low_rank_linear import named_linears

FAMILIES = {
    "llava": {"vision", "connector", "language"},
    "llava_next": {"vision", "connector", "language"},
    "llava_next_video": {"vision", "connector", "language"},
    "qwen2_vl": {"vision", "connector", "language"},
    "qwen2_5_vl": {"vision", "connector", "language"},
    "qwen3_vl": {"vision", "connector", "language"},
    "idefics2": {"vision", "connector", "language"},
    "paligemma": {"vision", "connector", "language"},
    "gemma3": {"vision", "language"},  # its projector is a bare matrix
    "blip-2": {"vision", "connector", "language"},
    "internvl": {"vision", "connector", "language"},
    "glm4v": {"vision", "connector", "language"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(family))
    found = find_components([name for name, _ in named_linears(model)])
    assert set(found) == FAMILIES[family]
    layers = [name for name in found["language"] if "lm_head" not in name]
    assert all("language_model" in name or "text_model" in name for name in layers)
    assert not any("language_model" in name for name in found["vision"])


def test_first_match_wins_and_users_come_first():
    assert component_of("model.visual.merger.mlp.0") == "connector"
    assert component_of("model.visual.blocks.0.attn.qkv") == "vision"
    assert component_of("model.layers.0.mlp.up_proj") == "language"
    mine = {"vision": ["eyes?"], "depth": ["visual"]}
    assert component_of("model.eye.0", mine) == "vision"
    assert component_of("model.visual.merger", mine) == "depth"
