"""Checkpoints from strangers: whatever a config says, it is read or refused in one clear error."""

import json

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.tiny_models import SIZES
from transformers import AutoConfig

from casp_plugin.checkpoint.format import SECTION, read_config, read_section
from casp_plugin.checkpoint.load import install_factored_layers
from casp_plugin.model.load import bare_model
from casp_plugin.model.low_rank_linear import LowRankLinear

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=12,
)
LAYERS = [f"model.layers.{i}.self_attn.{part}_proj" for i in range(2) for part in "qk"]
NAMES = st.sampled_from(
    [
        *LAYERS,
        "model.layers.0.mlp",
        "lm_head",
        "",
        ".",
        "..",
        "../../etc/passwd",
        "model..layers",
        "0",
    ]
) | st.text(max_size=12)
RANKS = st.integers(-2, 2**40) | JSON
SECTIONS = st.fixed_dictionaries(
    {"format": st.sampled_from([1, 2, 3, "1", None]), "low_rank": st.dictionaries(NAMES, RANKS)},
    optional={"latent_of": st.dictionaries(NAMES, NAMES | JSON)},
)


def outcome(read, *arguments):
    """What a reader returns, or why it refuses."""
    try:
        return read(*arguments), None
    except ValueError as error:
        return None, str(error)


@given(JSON | SECTIONS)
@example({"format": 2, "low_rank": {LAYERS[0]: True}})
@example({"format": [], "low_rank": {}})
@example({"format": 2, "low_rank": {LAYERS[0]: 4}, "latent_of": {LAYERS[0]: LAYERS[0]}})
def test_sections_are_read_or_refused(section):
    found, refusal = outcome(read_section, {SECTION: section})
    if refusal:
        assert f"quantization_config.{SECTION}" in refusal
        return
    assert all(type(rank) is int and rank > 0 for rank in found.ranks.values())
    assert found.latent_of.keys() <= found.ranks.keys()


@given(SECTIONS)
@settings(deadline=None)
@example({"format": 2, "low_rank": {LAYERS[0]: 2**40}})
def test_layers_are_replaced_or_refused(section):
    """No name reaches outside the model, no rank takes memory that its matrix would not."""
    model = bare_model(AutoConfig.for_model("llama", **SIZES))
    before = {name for name, _ in model.named_modules()}
    try:
        found = read_section({SECTION: section})
        install_factored_layers(model, found)
    except ValueError:
        return
    factored = {n: m for n, m in model.named_modules() if isinstance(m, LowRankLinear)}
    assert factored.keys() == found.ranks.keys()
    assert factored.keys() <= before
    for layer in factored.values():
        assert layer.rank <= layer.in_features
        assert layer.up.weight.device == torch.device("meta")


@given(st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
@example(b"[" * 100_000)
@example(b"[1]")
@example(b"\xff")
def test_configs_are_read_or_refused(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("config")
    (folder / "config.json").write_bytes(content)
    found, refusal = outcome(read_config, folder)
    assert str(folder) in refusal if refusal else isinstance(found, dict)


def test_no_config(tmp_path):
    with pytest.raises(ValueError, match="is not a checkpoint folder"):
        read_config(tmp_path)
