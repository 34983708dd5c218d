"""Run recipes on one model, reload the checkpoints from disk and print quality and cost.

    python benchmarks/compare.py MODEL RECIPE... --average-bits 2.28 --average-bits 2.56 \\
        --dataset D --heldout H --table T.md

The first row is the model as it is. ``budgets.py`` says how a recipe meets a budget. The rows of a
budget are compared with its first recipe, ``casp_awq`` with ``awq`` where that is there, seed by
seed. Of several seeds a row tells the median, with the range; bits, bytes and seconds are those of
the first. ``casp time`` is what the casp modifiers took over what the rest of the same oneshot call
took, saving included. A vision-language model is calibrated and scored on questions about images:
perplexity is then that of the answers, and a second table tells the tasks apart.

With --rows a run that was stopped goes on where it was: finished runs are known by model, recipe,
data and seed, so delete the file after a change of the code.
"""

import hashlib
from pathlib import Path
from statistics import median_high
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from budgets import at_budgets
from common import Log, command, perplexity_ratio, ratio_cell, show, write_markdown
from compress import compress
from measure import Judge, scores_of

from casp_plugin.cli.progress import quiet
from casp_plugin.evaluation.answers import AnswerScores
from casp_plugin.evaluation.text import Scores

COLUMNS = (
    "recipe",
    "bits",
    "whole model",
    "tensor bytes",
    "perplexity",
    "KL",
    "perplexity ratio",
    "exact match",
    "F1",
    "seconds",
    "casp time",
)


def main(
    model: str,
    recipes: list[Path],
    average_bits: Annotated[
        list[float] | None, typer.Option(help="Budget of the recipes; several times for several.")
    ] = None,
    dataset: str = "bundled",
    heldout: str = "bundled-heldout",
    samples: int = 32,
    heldout_samples: int = 32,
    max_length: int = 512,
    seed: Annotated[list[int], typer.Option(help="Several times for several runs.")] = (0,),
    keep: Annotated[Path | None, typer.Option(help="Keep the checkpoints here.")] = None,
    table: Annotated[Path | None, typer.Option(help="Write the table in Markdown here.")] = None,
    rows: Annotated[Path | None, typer.Option(help="Keep finished runs here.")] = None,
) -> None:
    """Compress by each recipe and compare."""
    judge, log = Judge(model, heldout, heldout_samples, max_length), Log(rows)

    def run(name: str, recipe: str | None, seed: int) -> dict:
        def make() -> dict:
            if recipe is None:
                return {"recipe": name, "seconds": 0.0, **judge.score(model)}
            out = (keep or Path(temporary)) / name
            cost = compress(model, recipe, dataset, samples, max_length, seed, out)
            return {"recipe": name, **cost, **judge.score(out)}

        facts = [model, recipe or "", dataset, str(samples), str(seed), *judge.facts]
        return log.run(hashlib.sha256("\0".join(facts).encode()).hexdigest(), make)

    with TemporaryDirectory() as temporary, quiet():
        runs = [[run("unquantized", None, seed[0])]]
        for name, recipe in at_budgets(recipes, average_bits or (), model):
            runs.append([run(name, recipe, number) for number in seed])
            show(COLUMNS, _rows(runs))
    print(f"\n{runs[-1][0]['recipe']} says: {runs[-1][0]['text']}\n")
    tables = [(COLUMNS, _rows(runs))]
    if judge.multimodal:
        tables.append(_by_task(runs))
        show(*tables[1])
    if table is not None:
        tokens = scores_of(runs[0][0]).tokens
        note = (
            f"Made by `{command()}`, {tokens:,} tokens scored; perplexity ratio with the 95 % "
            "interval of a paired bootstrap over the texts;"
        )
        write_markdown(table, tables, note)


def _middle(scores: list[Scores]) -> Scores:
    """Return the scores of the seed whose perplexity is the median."""
    perplexities = [seed.perplexity for seed in scores]
    return scores[perplexities.index(median_high(perplexities))]


def _range(values: list[float], spec: str) -> str:
    return f" ({min(values):{spec}} to {max(values):{spec}})" if len(values) > 1 else ""


def _cells(runs: list[dict], baseline: list[dict] | None) -> list[str]:
    """
    :param runs: of one recipe, seed by seed
    :param baseline: runs to compare with
    """
    first = runs[0]
    scores = [scores_of(run) for run in runs]
    middle = _middle(scores)
    perplexity = f"{middle.perplexity:.2f}{_range([seed.perplexity for seed in scores], '.1f')}"
    ratio = ""
    if baseline is not None and baseline is not runs:
        pairs = zip(scores, map(scores_of, baseline), strict=True)
        ratios = [perplexity_ratio(*pair) for pair in pairs]
        changes = [ratio.change for ratio in ratios]
        ratio = ratio_cell(ratios[changes.index(median_high(changes))]) + _range(changes, ".3f")
    answers = isinstance(middle, AnswerScores)
    casp = first.get("casp_time")
    return [
        first["recipe"],
        f"{first['bits']:.4f}",
        f"{first['whole']:.3f}",
        f"{first['bytes']:,}",
        perplexity,
        f"{middle.kl or 0:.4f}",
        ratio,
        f"{middle.exact_match:.1%}" if answers else "",
        f"{middle.f1:.1%}" if answers else "",
        f"{first['seconds']:.0f}",
        f"+{casp:.0%}" if casp else "",
    ]


def _by_task(runs: list[list[dict]]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Return perplexity, exact match and F1 of every recipe, task by task."""
    scores = [_middle([scores_of(run) for run in seeds]).by_task for seeds in runs]
    columns = ("task", "questions", *(seeds[0]["recipe"] for seeds in runs))
    rows = []
    for task, reference in scores[0].items():
        inside = [of_recipe[task] for of_recipe in scores]
        cells = [f"{s.perplexity:.2f} / {s.exact_match:.0%} / {s.f1:.0%}" for s in inside]
        rows.append([task, str(len(reference.texts)), *cells])
    return columns, rows


def _rows(runs: list[list[dict]]) -> list[list[str]]:
    """Return the cells of every recipe, compared with the baseline of its budget."""
    by_name = {seeds[0]["recipe"]: seeds for seeds in runs[1:]}
    first_of = {}
    for name, seeds in by_name.items():
        first_of.setdefault(name.rpartition("_")[2], seeds)
    rows = []
    for seeds in runs:
        name = seeds[0]["recipe"]
        plain = by_name.get(name.removeprefix("casp_")) if name.startswith("casp_") else None
        rows.append(_cells(seeds, plain or first_of.get(name.rpartition("_")[2])))
    return rows


if __name__ == "__main__":
    typer.run(main)
