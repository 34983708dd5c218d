"""Every recipe that ships runs, saves and reloads, whatever its quantizer."""

import re
from importlib import import_module
from operator import attrgetter
from pathlib import Path

import pytest
import torch
import yaml
from llmcompressor import oneshot
from llmcompressor.recipe import Recipe
from support.tiers import tiered
from support.tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig

from casp_plugin import plan_recipe
from casp_plugin.checkpoint.check import check
from casp_plugin.model.codebook_linear import CodebookLinear
from casp_plugin.model.load import bare_model, read_model_config

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
# those of vision-language models: test_real_sizes.py
OF_TEXT = sorted(path for path in RECIPES.glob("*.yaml") if not path.stem.startswith("llava"))
# budgets beside those that are written in the recipes
BUDGETS = {
    "casp_gptq": (2.5, 3, 4),
    "casp_hadamard": (3,),
    "casp_autoround": (3,),
    "casp_awq": (3,),
    "paper_casp": (3,),
}
AT_BUDGETS = [(path, bits) for path in OF_TEXT for bits in (None, *BUDGETS.get(path.stem, ()))]
SCALAR = ["2.28", "2.56", "3.30"]
# budgets that recipes of one width have
ONE_WIDTH = {"trellis": ["2.02", "3.02"], "quip": ["2.02", "3.02"], "aqlm": ["2.15", "3.22"]}
BENCHMARKS = sorted((RECIPES / "smollm2").glob("*.yaml"))


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory):
    """A random llama wide enough for groups of 128."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 64}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    folder = tmp_path_factory.mktemp("wide_llama")
    return save_tiny_model(folder, "llama", torch.bfloat16, **sizes, **heads)


@pytest.mark.parametrize(
    "at_budget",
    tiered(AT_BUDGETS, (RECIPES / "casp_awq.yaml", None), (RECIPES / "casp_rtn.yaml", None)),
    ids=lambda case: case[0].stem if case[1] is None else f"{case[0].stem}_{case[1]}",
)
def test_recipe(at_budget, wide_llama, batches, tmp_path):
    path, average_bits = at_budget
    recipe = path.read_text().replace("iters: 200", "iters: 2")
    if average_bits is not None:
        recipe = re.sub("average_bits: .*", f"average_bits: {average_bits}", recipe)
        if average_bits >= 3.5:  # as docs/recipes.md says
            recipe = recipe.replace("[2, 3, 4]", "[3, 4, 5, 6]")
    model = oneshot(
        model=wide_llama, recipe=recipe, dataset=batches, output_dir=str(tmp_path / "out")
    )
    plan = model.casp_plan
    budget = yaml.safe_load(recipe)["casp_stage"]["casp_modifiers"]["BitAllocationModifier"][
        "average_bits"
    ]
    assert plan.reached_bits <= budget
    used = set()
    for module in model.modules():
        if isinstance(module, CodebookLinear):
            used.add(module.scheme.bits)
        elif getattr(module, "quantization_scheme", None):
            used.add(module.quantization_scheme.weights.num_bits)
    assert used == {unit.choice.bits for unit in plan.units}
    assert all(finding.passed is not False for finding in check(tmp_path / "out"))
    ids = torch.randint(3, 96, (1, 16))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, reloaded(ids).logits, atol=1e-2, rtol=0)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """Folder with the config of SmolLM2-135M."""
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152}
    config = LlamaConfig(**sizes, **heads, tie_word_embeddings=True, dtype=torch.bfloat16)
    folder = tmp_path_factory.mktemp("smollm2")
    config.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "path", tiered(BENCHMARKS, RECIPES / "smollm2" / "casp.yaml"), ids=attrgetter("stem")
)
def test_recipe_of_the_benchmarks(path, smollm2, monkeypatch):
    """Every budget of the benchmarks can be filled in, and reached on SmolLM2-135M."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    at_budgets = import_module("budgets").at_budgets
    filled = dict(at_budgets([path], [2.02, 2.15, 2.28, 2.56, 3.02, 3.22, 3.30], smollm2))
    if path.stem == "mix_2.56":
        assert filled == {"mix_2.56": path.read_text()}
        return
    budgets = ONE_WIDTH.get(path.stem.split("_")[0], SCALAR)
    if "BitAllocationModifier" in path.read_text():
        budgets = sorted([*SCALAR, "2.02", "2.15", "3.02", "3.22"])
        [budget] = plan_recipe(bare_model(read_model_config(smollm2)), str(path)).budgets
        least, most = budget.reachable_bits
        assert all(least <= budget_bits <= most for budget_bits in (2.281503, 2.562753, 3.297128))
    assert list(filled) == [f"{path.stem}_{bits}" for bits in budgets]
    # the recipe as it is
    shipped = "2.28" if "2.28" in budgets else budgets[0]
    assert yaml.safe_load(filled[f"{path.stem}_{shipped}"]) == yaml.safe_load(path.read_text())
    assert all(Recipe.create_instance(text).modifiers for text in filled.values())


def test_budgets_are_the_bytes_of_one_width(smollm2, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    at_budget = import_module("budgets").at_budget
    stock, ours = (RECIPES / "smollm2" / f"{name}.yaml" for name in ("uniform", "casp"))
    found = {}
    for budget in (2.28, 2.56, 3.30):
        [modifiers] = yaml.safe_load(at_budget(stock, budget, smollm2))["casp_stage"].values()
        weights = modifiers["GPTQModifier"]["config_groups"]["group_0"]["weights"]
        [modifiers] = yaml.safe_load(at_budget(ours, budget, smollm2))["casp_stage"].values()
        bits = modifiers["BitAllocationModifier"]["average_bits"]
        found[budget] = (weights["num_bits"], weights["group_size"], bits)
    assert found == {2.28: (2, 64, 2.281503), 2.56: (2, 32, 2.562753), 3.30: (3, 64, 3.297128)}
    for budget, name in ((2.02, "trellis"), (3.02, "quip"), (2.15, "aqlm"), (3.22, "aqlm")):
        alone, chosen = (RECIPES / "smollm2" / f"{file}.yaml" for file in (name, "casp_trellis"))
        model = bare_model(read_model_config(smollm2))
        plan = plan_recipe(model, at_budget(alone, budget, smollm2))
        [modifiers] = yaml.safe_load(at_budget(chosen, budget, smollm2))["casp_stage"].values()
        bits = modifiers["BitAllocationModifier"]["average_bits"]
        assert round(bits, 2) == budget
        assert 0 <= plan.reached_bits - bits < 1e-6
    with pytest.raises(ValueError, match=r"trellis.yaml: no width of its quantizer takes 2.28"):
        at_budget(RECIPES / "smollm2" / "trellis.yaml", 2.28, smollm2)
    with pytest.raises(ValueError, match=r"--average-bits 2.5: one width takes 2.02, 2.15"):
        list(import_module("budgets").at_budgets([stock], [2.5], smollm2))
