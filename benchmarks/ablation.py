"""Measure what every choice is worth: low rank alone, and plans at equal bytes, on one model.

    python benchmarks/ablation.py MODEL --dataset D --heldout H --table T.md

Statistics and error tables are made once; every row is then assembled from them: weights rounded
by llm-compressor's GPTQ, each layer on the second moments of the unquantized model (one-shot), and
scored. ``compare.py`` runs whole recipes instead, with errors passed on from layer to layer.
"""

import copy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from common import perplexity_ratio, ratio_cell, show, write_markdown
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.transform import QuIPModifier
from measure import Remembered
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from casp_plugin import BitAllocationModifier, CompressionPlan, LowRankQKModifier, plan_recipe
from casp_plugin.data.sources import load_text
from casp_plugin.data.text_batches import calibration_loader
from casp_plugin.evaluation.text import Scores, evaluate
from casp_plugin.maths.average_bits import average_bits
from casp_plugin.maths.hadamard import rotate, rotate_moment
from casp_plugin.model.low_rank_linear import named_linears
from casp_plugin.model.schemes import weight_args
from casp_plugin.model.units import decoder_layers
from casp_plugin.pricing import rounding_error
from casp_plugin.pricing.rounding_error import rounding_delta
from casp_plugin.statistics.forward import collect
from casp_plugin.statistics.statistics import Request, Statistics

EACH = {"share_latent": False}
LOW_RANK = {
    "each matrix alone, plain SVD": {"method": "svd", **EACH},
    "each alone, whitened (paper)": {"method": "whitened", **EACH},
    "shared latent, whitened": {"method": "whitened"},
    "shared latent, attention": {"method": "attention"},
    "shared latent, fisher": {"method": "fisher"},
}
PAPER = {"keep": 0.25, "method": "whitened", "rank_allocation": "uniform", **EACH, "rotate": False}
BY_LAYER = {"granularity": "layer"}
#: low rank (None: none), bits, and whether inputs are rotated
PLANS = {
    "uniform": (None, {"importance": "uniform", "solver": "closed_form", **BY_LAYER}, False),
    "random layers": (None, {"importance": "random", "solver": "closed_form", **BY_LAYER}, False),
    "block influence, layers": (None, {"importance": "block_influence", **BY_LAYER}, False),
    "paper: low rank, block influence": (
        PAPER,
        {"importance": "block_influence", "solver": "closed_form", **BY_LAYER},
        False,
    ),
    "fisher, layers": (None, BY_LAYER, False),
    "fisher, fused units": (None, {}, False),
    "fisher, v apart": (None, {"granularity": "matrix"}, False),
    "one knapsack, nearest": ({}, {"rounding": "nearest"}, False),
    "one knapsack, attention": ({"method": "attention"}, {}, False),
    "one knapsack": ({}, {}, False),
    "one knapsack, not rotated latents": ({"rotate": False}, {}, False),
    "Hadamard, uniform": (None, {"importance": "uniform", "solver": "closed_form"}, True),
    "Hadamard, one knapsack": ({}, {}, True),
}
BASELINE = "uniform"
COLUMNS = ("table", "row", "bits", "whole model", "perplexity", "KL", "perplexity ratio")


class Bench:
    """A model, its statistics, and held-out texts to score assembled models on."""

    def __init__(self, model: str, texts, heldout: list[str], max_length: int, group_size: int):
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
        self.loader = calibration_loader(texts, self.tokenizer, max_length)
        self.heldout, self.max_length, self.group_size = heldout, max_length, group_size
        self.linears = [name for name, _ in named_linears(self.model) if name != "lm_head"]
        self.reference = Remembered(self.model)

    def collect(self) -> Statistics:
        """Collect the statistics of all rows."""
        linears = frozenset(self.linears)
        qk = frozenset(n for n in self.linears if n.endswith(("q_proj", "k_proj")))
        request = Request(
            second_moments=linears,
            mean_squares=frozenset((name, 1) for name in linears),
            energies=linears,
            influences=frozenset(decoder_layers(self.model)),
            gradients=linears,
            gradient_moments=qk,
            attention_moments=qk,
        )
        return collect(self.model, self.loader, request)

    def score(self, model: nn.Module) -> Scores:
        """Return scores against the unquantized model, whose predictions are kept."""
        return evaluate(model, self.tokenizer, self.heldout, self.max_length, self.reference)

    def low_rank(self, fields: dict, statistics: Statistics) -> nn.Module:
        model = copy.deepcopy(self.model)
        plan_recipe(model, [LowRankQKModifier(keep=0.25, **fields)], statistics=statistics)
        return model

    def plan(
        self, name: str, average_bits: float, statistics: Statistics, seed: int
    ) -> tuple[nn.Module, CompressionPlan]:
        """Return a copy of the model, factored and rounded as a row says, and its plan."""
        low_rank, bits, rotated = PLANS[name]
        if bits.get("importance") == "random":
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.randn(len(decoder_layers(self.model)), generator=generator)
            layers = zip(decoder_layers(self.model), drawn.exp().tolist(), strict=True)
            bits = {**bits, "importance": dict(layers)}
        recipe = [] if low_rank is None else [LowRankQKModifier(**low_rank)]
        if rotated:
            recipe.append(
                QuIPModifier(
                    transform_type="hadamard",
                    transform_block_size=self.group_size,
                    ignore=["lm_head", "re:.*_proj[.]up$"],
                )
            )
        recipe += [
            BitAllocationModifier(average_bits=average_bits, group_size=self.group_size, **bits),
            GPTQModifier(),
        ]
        model = copy.deepcopy(self.model)
        plan = plan_recipe(model, recipe, statistics=statistics)
        block = self.group_size if rotated else 1
        for unit in plan.units:
            args = weight_args(unit.choice.bits, self.group_size)
            for module in unit.modules:
                self.round(model, module, args, statistics, block)
        return model, plan

    @torch.no_grad()
    def round(self, model: nn.Module, name: str, args, statistics: Statistics, block: int) -> None:
        """Round one weight by GPTQ, rotated and back again where its input would be rotated."""
        owner, _, factor = name.rpartition(".")
        factor = factor if factor in ("down", "up") else ""
        moment = statistics.second_moments[owner if factor else name]
        if factor == "up":
            down = model.get_submodule(owner).latent.weight.float()
            moment, block = down @ moment @ down.T, 1
        weight = model.get_submodule(name).weight
        turned = rotate(weight.float(), block)
        delta = rounding_delta(turned, args, rotate_moment(moment, block))
        weight.add_(rotate(delta, block))


def remembering(function):
    """Wrap a function so that a weight is rounded under a scheme once, for all rows."""
    known = {}

    def facts(weight, args, moment):
        sums = (weight.double().sum(), weight.double().square().sum(), moment.double().sum())
        return (*(number.item() for number in sums), weight.shape, args.num_bits, moment.ndim)

    def remembered(weights, args, moments):
        pairs = list(zip(weights, moments, strict=True))
        keys = [facts(weight, args, moment) for weight, moment in pairs]
        new = [pair for key, pair in zip(keys, pairs, strict=True) if key not in known]
        if new:
            missing = [key for key in keys if key not in known]
            deltas = function([weight for weight, _ in new], args, [moment for _, moment in new])
            known.update(zip(missing, deltas, strict=True))
        return [known[key] for key in keys]

    return remembered


def rows(
    bench: Bench, budgets: list[float], seed: int
) -> Iterator[tuple[str, str, Scores, CompressionPlan | None]]:
    """Yield table, name, scores and plan of every row."""
    statistics = bench.collect()
    yield "bf16", "unquantized", bench.score(bench.model), None
    for allocation in ("uniform", "global"):
        for name, fields in LOW_RANK.items():
            model = bench.low_rank({**fields, "rank_allocation": allocation}, statistics)
            yield f"low rank, {allocation} ranks", name, bench.score(model), None
    rounding_error._deltas = remembering(rounding_error._deltas)
    for budget in budgets:
        model, plan = bench.plan(BASELINE, budget, statistics, seed)
        yield f"{budget:.2f} bits", BASELINE, bench.score(model), plan
        least, _ = plan.budgets[0].reachable_bits
        alike = least > budget - 0.01  # too low for any choice without factors
        for name, (low_rank, _, rotated) in PLANS.items():
            if name != BASELINE and not (alike and low_rank is None and not rotated):
                model, plan = bench.plan(name, budget, statistics, seed)
                yield f"{budget:.2f} bits", name, bench.score(model), plan


def main(
    model: str,
    dataset: str = "bundled",
    heldout: str = "bundled-heldout",
    samples: int = 32,
    heldout_samples: int = 8,
    max_length: int = 512,
    group_size: int = 64,
    budgets: Annotated[list[float], typer.Option(help="Average bits.")] = (2.2816, 2.79, 3.2972),
    table: Annotated[Path | None, typer.Option(help="Write the table in Markdown here.")] = None,
    seed: int = 0,
) -> None:
    """Score every row."""
    start = time.perf_counter()
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = load_text(dataset, tokenizer, samples, seed=seed)
    scored = load_text(heldout, tokenizer, heldout_samples)["text"]
    bench = Bench(model, texts, scored, max_length, group_size)
    found, baseline = [], {}
    for kind, name, scores, plan in rows(bench, list(budgets), seed):
        if name == BASELINE:
            baseline[kind] = scores
        found.append(_cells(kind, name, scores, plan, baseline.get(kind)))
        print(f"{time.perf_counter() - start:.0f} s:", *found[-1], flush=True)
    show(COLUMNS, found)
    if table is not None:
        note = (
            f"{model}, {samples} x {max_length} tokens of {dataset}, scored on {len(scored)} texts "
            f"of {heldout}, groups of {group_size}, seed {seed}; one-shot GPTQ; perplexity ratio "
            "with the 95 % interval of a paired bootstrap over the texts; "
            f"{time.perf_counter() - start:.0f} seconds;"
        )
        write_markdown(table, [(COLUMNS, found)], note)


def _cells(
    kind: str, name: str, scores: Scores, plan: CompressionPlan | None, baseline: Scores | None
) -> list[str]:
    cells = [kind, name, "", "", f"{scores.perplexity:.2f}", f"{scores.kl:.4f}", ""]
    if plan is not None:
        everything = average_bits(plan.total_bytes, plan.weights + plan.other_bytes / 2)
        cells[2:4] = f"{plan.reached_bits:.3f}", f"{everything:.3f}"
    if baseline is not None and baseline is not scores:
        cells[6] = ratio_cell(perplexity_ratio(scores, baseline))
    return cells


if __name__ == "__main__":
    typer.run(main)
