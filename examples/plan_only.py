"""Show a recipe's plan for a model: units, candidates and exact bytes.

    python examples/plan_only.py [MODEL RECIPE PLAN]

The config of the model is enough. With calibration batches the plan decides bits and ranks, too.
"""

import sys

from rich import print

from casp_plugin import plan_recipe
from casp_plugin.model.load import bare_model, read_model_config
from casp_plugin.plan.tables import plan_tables

MODEL, RECIPE, PLAN = sys.argv[1:] or (
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "recipes/smollm2/casp.yaml",
    "plan.json",
)

model = bare_model(read_model_config(MODEL))  # without weights
plan = plan_recipe(model, RECIPE)

print(*plan_tables(plan))
for budget in plan.budgets:
    least, most = budget.reachable_bits
    print(f"{budget.average_bits} bits a weight, of {least:.2f} to {most:.2f} that can be reached")

plan.save(PLAN)
