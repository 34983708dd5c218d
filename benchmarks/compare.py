"""Run recipes on one model in one go, reload each result from disk in a new process, and
print quality and cost side by side.

    python benchmarks/compare.py MODEL RECIPE... --dataset D --heldout H --table T.md

A vision-language model is calibrated and scored on questions about images: perplexity is then that
of the answers, with exact match and F1 beside it, and a second table tells them by task.

The first row is the model as it is. Recipes whose names end alike (``_2.28``) are compared with
the first of them, ``casp_awq_2.28`` with ``awq_2.28`` where that is there, seed by seed. Of several
seeds a row tells the median, with the range; bits, bytes and seconds are those of the first. ``casp
time`` is what LowRankQK and BitAllocation took over what the rest of the same oneshot call took,
saving included. With --rows a run that was stopped goes on where it was: finished runs are known by
model, recipe, data and seed, so delete the file after a change of the code.
"""

import hashlib
import json
import sys
from pathlib import Path
from statistics import median_high
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from common import measured, scores_of, show, write_markdown
from compress import compress

from casp_plugin.evaluation.answers import AnswerScores
from casp_plugin.evaluation.results import compare
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
    dataset: str = "bundled",
    heldout: str = "bundled-heldout",
    samples: int = 32,
    heldout_samples: int = 32,
    max_length: int = 512,
    seed: Annotated[list[int], typer.Option(help="Give it several times for several runs.")] = (0,),
    keep: Annotated[Path | None, typer.Option(help="Keep the checkpoints here.")] = None,
    table: Annotated[Path | None, typer.Option(help="Write the table in Markdown here.")] = None,
    rows: Annotated[Path | None, typer.Option(help="Keep finished runs here, one a line.")] = None,
) -> None:
    """Compress by each recipe and compare."""
    evaluation = [heldout, str(heldout_samples), str(max_length)]
    done = {}
    if rows is not None and rows.exists():
        done = {row["key"]: row for row in map(json.loads, rows.read_text().splitlines())}

    def run(recipe: Path | None, seed: int) -> dict:
        text = "" if recipe is None else recipe.read_text()
        facts = [model, text, dataset, str(samples), str(seed), *evaluation]
        key = hashlib.sha256("\0".join(facts).encode()).hexdigest()
        if key not in done:
            if recipe is None:
                row = {"recipe": "unquantized", "seconds": 0.0}
                row |= measured(model, model, evaluation)
            else:
                out = (keep or Path(temporary)) / recipe.stem
                row = {"recipe": recipe.stem}
                row |= compress(model, recipe, dataset, samples, max_length, seed, out)
                row |= measured(str(out), model, evaluation)
            done[key] = {"key": key, **row}
            if rows is not None:
                rows.parent.mkdir(parents=True, exist_ok=True)
                with rows.open("a") as file:
                    file.write(json.dumps(done[key]) + "\n")
        return done[key]

    with TemporaryDirectory() as temporary:
        found = [[run(None, seed[0])]]
        for recipe in recipes:
            found.append([run(recipe, number) for number in seed])
            show(COLUMNS, _rows(found))
    print(f"\n{found[-1][0]['recipe']} says: {found[-1][0]['text']}\n")
    tables = [(COLUMNS, _rows(found))]
    if isinstance(scores_of(found[0][0]), AnswerScores):
        tables.append(_by_task(found))
        show(*tables[1])
    if table is not None:
        tokens = scores_of(found[0][0]).tokens
        note = (
            f"Made by `python benchmarks/compare.py {' '.join(sys.argv[1:])}`, {tokens:,} tokens "
            "scored; perplexity ratio with the 95 % interval of a paired bootstrap over the texts;"
        )
        write_markdown(table, tables, note)


def _middle(each: list[Scores]) -> Scores:
    """Those of the seed whose perplexity is the median."""
    perplexities = [one.perplexity for one in each]
    return each[perplexities.index(median_high(perplexities))]


def _range(values: list[float], spec: str) -> str:
    return f" ({min(values):{spec}} to {max(values):{spec}})" if len(values) > 1 else ""


def _cells(runs: list[dict], baseline: list[dict] | None) -> list[str]:
    first = runs[0]
    each = [scores_of(run) for run in runs]
    scores = _middle(each)
    perplexity = f"{scores.perplexity:.2f}{_range([one.perplexity for one in each], '.1f')}"
    ratio = ""
    if baseline is not None and baseline is not runs:
        pairs = list(zip(each, map(scores_of, baseline), strict=True))
        ratios = [one.perplexity / other.perplexity for one, other in pairs]
        middle = median_high(ratios)
        pair = pairs[ratios.index(middle)]
        found = compare(*(scores.measurements("")[0] for scores in pair))
        ratio = f"{middle:.3f} [{found.low:.3f}, {found.high:.3f}]"
        ratio += _range(ratios, ".3f")
    answers = isinstance(scores, AnswerScores)
    casp = first.get("casp_time")
    return [
        first["recipe"],
        f"{first['bits']:.4f}",
        f"{first['whole']:.3f}",
        f"{first['bytes']:,}",
        perplexity,
        f"{scores.kl or 0:.4f}",
        ratio,
        f"{scores.exact_match:.1%}" if answers else "",
        f"{scores.f1:.1%}" if answers else "",
        f"{first['seconds']:.0f}",
        f"+{casp:.0%}" if casp else "",
    ]


def _by_task(found: list[list[dict]]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Perplexity, exact match and F1 of every recipe, task by task."""
    scores = [_middle([scores_of(run) for run in runs]).by_task for runs in found]
    columns = ("task", "questions", *(runs[0]["recipe"] for runs in found))
    rows = []
    for task, reference in scores[0].items():
        each = [one[task] for one in scores]
        cells = [f"{s.perplexity:.2f} / {s.exact_match:.0%} / {s.f1:.0%}" for s in each]
        rows.append([task, str(len(reference.texts)), *cells])
    return columns, rows


def _rows(found: list[list[dict]]) -> list[list[str]]:
    """Cells of every row."""
    by_name = {runs[0]["recipe"]: runs for runs in found[1:]}
    first_of = {}
    for name, runs in by_name.items():
        first_of.setdefault(name.rpartition("_")[2], runs)
    rows = []
    for runs in found:
        name = runs[0]["recipe"]
        plain = by_name.get(name.removeprefix("casp_")) if name.startswith("casp_") else None
        rows.append(_cells(runs, plain or first_of.get(name.rpartition("_")[2])))
    return rows


if __name__ == "__main__":
    typer.run(main)
