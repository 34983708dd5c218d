"""Every recipe that ships runs, saves and reloads: GPTQ, RTN, AWQ and AutoRound."""

from pathlib import Path

import pytest
import torch
import yaml
from conftest import save_tiny_model
from llmcompressor import oneshot
from llmcompressor.recipe import Recipe
from transformers import AutoModelForCausalLM, LlamaConfig

from casp_plugin import plan_recipe
from casp_plugin.checkpoint.check import check

RECIPES = Path(__file__).parents[2] / "recipes"
# those of vision-language models: test_real_sizes.py
OF_TEXT = sorted(path for path in RECIPES.glob("*.yaml") if not path.stem.startswith("llava"))


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory):
    """A random llama wide enough for groups of 128."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 64}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    folder = tmp_path_factory.mktemp("wide_llama")
    return save_tiny_model(folder, "llama", torch.bfloat16, **sizes, **heads)


@pytest.mark.parametrize("path", OF_TEXT, ids=lambda path: path.stem)
def test_recipe(path, wide_llama, batches, tmp_path):
    recipe = path.read_text().replace("iters: 200", "iters: 2")
    model = oneshot(
        model=wide_llama, recipe=recipe, dataset=batches, output_dir=str(tmp_path / "out")
    )
    plan = model.casp_plan
    budget = yaml.safe_load(recipe)["casp_stage"]["casp_modifiers"]["BitAllocationModifier"][
        "average_bits"
    ]
    assert plan.reached_bits <= budget
    used = {
        module.quantization_scheme.weights.num_bits
        for name, module in model.named_modules()
        if getattr(module, "quantization_scheme", None)
    }
    assert used == {unit.choice.bits for unit in plan.units}
    assert all(finding.passed is not False for finding in check(tmp_path / "out"))
    ids = torch.randint(3, 96, (1, 16))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, reloaded(ids).logits, atol=1e-2, rtol=0)


@pytest.mark.parametrize(
    "path", sorted((RECIPES / "smollm2").glob("*.yaml")), ids=lambda path: path.stem
)
def test_recipe_of_the_benchmarks(path):
    """Those of ours fit SmolLM2-135M; all are recipes."""
    text = path.read_text()
    if "BitAllocationModifier" not in text:
        assert Recipe.create_instance(str(path)).modifiers
        return
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152}
    config = LlamaConfig(**sizes, **heads, tie_word_embeddings=True, dtype=torch.bfloat16)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plan = plan_recipe(model, str(path))
    [budget] = plan.budgets
    least, most = budget.reachable_bits
    assert least <= budget.average_bits <= most
