"""Statistics layer by layer against those of the model as a whole."""

import pytest
import torch
from support import tiny_vlms
from support.tiny_models import VOCABULARY, save_tiny_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import casp_plugin.statistics.forward as collection
from casp_plugin.model.low_rank_linear import named_linears
from casp_plugin.model.units import decoder_layers
from casp_plugin.statistics.forward import collect, collect_sections
from casp_plugin.statistics.statistics import Request, Statistics
from casp_plugin.statistics.tracing import subgraphs_of


@pytest.fixture(autouse=True)
def a_part_for_each_layer(monkeypatch):
    monkeypatch.setattr(collection, "SECTION_BYTES", 1)


def everything(model, weight=None):
    linears = frozenset(n for n, _ in named_linears(model) if not n.endswith("lm_head"))
    return Request(
        second_moments=linears,
        mean_squares=frozenset((name, 16) for name in linears if "up_proj" in name),
        energies=linears,
        influences=frozenset(decoder_layers(model)),
        image_weight=weight,
    )


def assert_alike(found: Statistics, expected: Statistics):
    assert (found.tokens, found.reached) == (expected.tokens, expected.reached)
    for field in ("second_moments", "mean_squares"):
        ours, theirs = getattr(found, field), getattr(expected, field)
        assert ours.keys() == theirs.keys()
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-5)
    for field in ("output_energies", "influences"):
        assert getattr(found, field) == pytest.approx(getattr(expected, field), rel=1e-3)


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "opt", "mixtral", "qwen3_moe"])
def test_text(tmp_path, family, pad):
    extra = {"ffn_dim": 128, "word_embed_proj_dim": 64} if family == "opt" else {}
    path = save_tiny_model(tmp_path, family, **extra)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (6, 24), generator=generator)
    data = [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in ids.split(2)]
    if pad:
        data[0]["attention_mask"][0, -2:] = 0
    request = everything(model)
    subgraphs = subgraphs_of(model, data)
    assert len(subgraphs) == 3
    assert_alike(collect(model, data, request, subgraphs), collect(model, data, request))


@pytest.mark.parametrize("family", ["llava", "idefics3"])
@pytest.mark.parametrize("weight", [None, 0.25])
def test_images(tmp_path, family, weight):
    tiny_vlms.save_tiny_vlm(tmp_path, family)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.tensor([tiny_vlms.image_prompt(family, expanded=True)])
    batch = {"input_ids": ids, **tiny_vlms.image_inputs(tmp_path, family)}
    batch["attention_mask"] = torch.ones_like(ids)
    request = everything(model, weight)
    found = collect(model, [batch, batch], request, subgraphs_of(model, [batch]))
    assert_alike(found, collect(model, [batch, batch], request))
    assert any("vision" in name or "visual" in name for name in found.second_moments)


def test_section_by_section(load_tiny, batches):
    """Each layer once, forgotten afterwards; a run that goes on gets what was left."""
    model = load_tiny()
    request, subgraphs = everything(model), subgraphs_of(model, batches)
    sections = list(collect_sections(model, batches, request, subgraphs))
    assert [(section.end, section.last) for section in sections] == [(2, False), (3, True)]
    for section, layer in zip(sections, decoder_layers(model), strict=True):
        assert {name.startswith(f"{layer}.") for name in section.statistics.second_moments} == {
            True
        }
    [rest] = collect_sections(model, batches, request, subgraphs, after=2)
    for name, moment in sections[1].statistics.second_moments.items():
        assert torch.equal(rest.statistics.second_moments[name], moment)
    assert list(collect_sections(model, batches, request, subgraphs, after=3)) == []
    assert len(list(collect_sections(model, batches, request))) == 1


def test_the_head_too(tmp_path):
    """It is not run unless something is measured there."""
    path = save_tiny_model(tmp_path, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    data = DataLoader([{"input_ids": torch.arange(3, 20)}], batch_size=1)
    request = Request(second_moments=frozenset({"lm_head"}), energies=frozenset({"lm_head"}))
    found = collect(model, data, request, subgraphs_of(model, data))
    expected = collect(model, data, request)
    assert found.output_energies == pytest.approx(expected.output_energies, rel=1e-4)
    torch.testing.assert_close(found.second_moments, expected.second_moments)


def test_of_much_data_some_batches_run_and_all_are_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(collection, "SAMPLES", 3)
    monkeypatch.setattr(collection, "TOKENS", 0)
    monkeypatch.setattr(collection, "TOKENS_BY_COLUMN", 1)
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path), dtype=torch.float32)
    up, down = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"
    ids = torch.randint(3, VOCABULARY, (100, 24), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row} for row in ids.split(2)]
    # 3 of 100 sequences, then tokens for the wide input: evenly spread
    for names, batches in (({up}, [33]), ({up, down}, [9, 18, 28, 37, 46])):
        request = Request(second_moments=frozenset(names))
        found = collect(model, data, request)
        expected = collect(model, [data[number] for number in batches], request)
        assert torch.equal(found.second_moments[up], expected.second_moments[up])
        assert found.tokens == ids.numel()
    data[-1] = {"input_ids": torch.full((1, 24), VOCABULARY)}
    with pytest.raises(ValueError, match=f"holds token {VOCABULARY}"):
        collect(model, data, request)
