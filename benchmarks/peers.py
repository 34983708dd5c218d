"""Compare our recipes with other packages at equal bytes on disk: quality, wall time, peak memory.

    python benchmarks/peers.py MODEL 2.56 --recipes recipes/smollm2 --dataset D --heldout H

Recipes of llm-compressor, stock ones and ours, run in this environment. AutoScheme of auto-round
chooses a mix that its AutoRound then runs. GPTQModel and HQQ run in environments of their own,
which are made below --work, as near to the bytes of uniform GPTQ as they come. Seconds and memory
are those of a whole process, from reading the model to the written checkpoint. Quality is that of
the checkpoint read back from disk: for GPTQModel and HQQ by their own code, into a model that
transformers runs.

A run that was stopped goes on where it was, as long as --work stays.
"""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from budgets import at_budgets
from common import Log, command, perplexity_ratio, ratio_cell, show, timed, write_markdown
from measure import Judge, scores_of
from transformers import AutoTokenizer

from casp_plugin.checkpoint.format import copy_processor
from casp_plugin.data.sources import load_text
from casp_plugin.evaluation.answers import AnswerScores
from casp_plugin.model.load import bytes_on_disk

HERE = Path(__file__).parent
COLUMNS = (
    "method",
    "bytes on disk",
    "against uniform",
    "perplexity",
    "KL",
    "perplexity ratio",
    "exact match",
    "F1",
    "seconds",
    "CPU seconds",
    "peak memory, GB",
)
#: titles in the order of the table; recipes that a folder lacks are left out
RECIPES = {
    "uniform": "GPTQ",
    "mix": "GPTQ, first and last layers at 3 bits",
    "awq": "AWQ",
    "autoround": "AutoRound",
    "casp": "casp + GPTQ",
    "casp_all": "casp + GPTQ, all components",
    "hadamard": "casp + GPTQ, Hadamard",
    "casp_autoround": "casp + AutoRound",
}
#: packages of each environment; torch first, or pip takes its CUDA build
ENVIRONMENTS = {
    "gptqmodel": ["gptqmodel==7.3.6", "transformers==5.17.0", "requests", "pillow"],
    "hqq": ["hqq==0.2.8.post1", "transformers==5.17.0"],
}
TORCH = "torch==2.13.0"
#: bits, group size and title of the packages by budget; HQQ's scales and zero points take 16 bits
NEAREST = {
    2.56: {
        "hqq": (2, 64, "HQQ, 2 bits, groups of 64"),
        "gptqmodel": (2, 32, "GPTQModel, 2 bits, groups of 32"),
    },
    3.30: {"gptqmodel": (3, 64, "GPTQModel, 3 bits, groups of 64")},
}


def main(
    model: str,
    budget: float,
    recipes: Annotated[Path, typer.Option(help="Folder of recipes.")],
    dataset: str = "bundled",
    heldout: str = "bundled-heldout",
    samples: int = 32,
    heldout_samples: int = 32,
    max_length: int = 512,
    work: Path = Path("demo/peers"),
    table: Path | None = None,
    only: str = "",
) -> None:
    """Run the methods and compare.

    :param budget: average bits, a key of ``budgets.ONE_WIDTH``
    :param only: methods to run now, by commas; the table tells all that were run so far
    """
    work = work.resolve()
    judge = Judge(model, heldout, heldout_samples, max_length)
    log = Log(work / "rows.jsonl")
    calibration = ["--dataset", dataset, "--samples", str(samples), "--max-length", str(max_length)]
    runs = []

    def add(name: str, title: str, make, facts: str) -> None:
        """Run a method unless it was.

        :param make: fills a folder; tells what it took, and the folder to score
        :param facts: what the result depends on beside the arguments
        """
        key = f"{model} {budget} {name} {dataset} {samples} {max_length} {judge.facts} {facts}"

        def row() -> dict:
            out = work / Path(model).name / f"{name}_{budget:.2f}"
            spent, scored = make(out)
            run = {"name": name, "title": title, **asdict(spent), **judge.score(scored)}
            return run | {"bytes": bytes_on_disk(out)}

        if key in log.runs or not only or name in only.split(","):
            runs.append(log.run(key, row))
            show(COLUMNS, _rows(runs))

    def by_recipe(recipe: str):
        def make(out: Path):
            path = out.with_name(f"{out.name}.yaml")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(recipe)
            script = [sys.executable, str(HERE / "compress.py"), model, str(path), str(out)]
            return timed([*script, *calibration]), out

        return make

    def by_autoscheme(start: str):
        def make(out: Path):
            before, mix = (out.with_name(f"{out.name}_{part}.yaml") for part in ("start", "mix"))
            before.parent.mkdir(parents=True, exist_ok=True)
            before.write_text(start)
            texts = _texts(model, dataset, samples, work / "texts.jsonl")
            script = [sys.executable, str(HERE / "autoscheme.py"), model, str(before), str(mix)]
            chosen = timed([*script, texts, *calibration[2:]])
            tuned, folder = by_recipe(mix.read_text())(out)
            return chosen + tuned, folder

        return make

    def by_package(package: str, width: int, group_size: int):
        def make(out: Path):
            python = _environment(package, work)
            script = [python, str(HERE / f"peer_{package}.py")]
            settings = [str(width), str(group_size)]
            if not judge.multimodal:
                settings.append(_texts(model, dataset, samples, work / "texts.jsonl"))
            source = str(Path(model).resolve()) if Path(model).exists() else model
            quantize = [*script, "quantize", source, str(out), *settings, str(max_length)]
            spent = timed(quantize, work)
            dense = out.with_name(f"{out.name}_dense")
            timed([*script, "dense", source, str(out), str(dense)], work)
            copy_processor(model, dense)
            return spent, dense

        return make

    names = [name + suffix for name in RECIPES for suffix in ("", f"_{budget:.2f}")]
    paths = [path for name in names if (path := recipes / f"{name}.yaml").exists()]
    filled = dict(at_budgets(paths, [budget], model))
    for name, recipe in filled.items():
        method = name.rpartition("_")[0]
        add(method, RECIPES[method], by_recipe(recipe), recipe)
    start = filled.get(f"autoround_{budget:.2f}")
    if start and not judge.multimodal:
        add("autoscheme", "AutoScheme's mix + AutoRound", by_autoscheme(start), start)
    for package, (width, group_size, title) in NEAREST.get(budget, {}).items():
        if not (judge.multimodal and package == "gptqmodel"):
            made = by_package(package, width, group_size)
            add(package, title, made, f"{width} {group_size} {ENVIRONMENTS[package]}")
    if table is not None:
        packages = ", ".join(pin for pins in ENVIRONMENTS.values() for pin in pins[:1])
        note = f"Made by `{command()}`; {packages};"
        write_markdown(table, [(COLUMNS, _rows(runs))], note)


def _environment(package: str, work: Path) -> str:
    """Return the python of a package's environment, made if it is not there."""
    folder = work / f"venv-{package}"
    ready = folder / ".ready"
    if not ready.exists():
        pip = [str(folder / "bin" / "pip"), "install", "--quiet"]
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([*pip, TORCH, "setuptools", "wheel"], check=True)
        subprocess.run([*pip, "--no-build-isolation", TORCH, *ENVIRONMENTS[package]], check=True)
        if package == "gptqmodel":
            subprocess.run([*pip, "--no-deps", "torchvision==0.28.0"], check=True)
        ready.touch()
    return str(folder / "bin" / "python")


def _texts(model: str, dataset: str, samples: int, path: Path) -> str:
    """Write the calibration texts of the other packages and return the path."""
    texts = load_text(dataset, AutoTokenizer.from_pretrained(model), samples)["text"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n")
    return str(path)


def _rows(runs: list[dict]) -> list[list[str]]:
    first = next((run for run in runs if run["name"] == "uniform"), None)
    rows = []
    for run in runs:
        scores = scores_of(run)
        answers = isinstance(scores, AnswerScores)
        compared = first is not None and run is not first
        ratio = ratio_cell(perplexity_ratio(scores, scores_of(first))) if compared else ""
        rows.append(
            [
                run["title"],
                f"{run['bytes']:,}",
                f"{run['bytes'] / first['bytes']:.3f}" if first else "",
                f"{scores.perplexity:.2f}",
                f"{scores.kl or 0:.3f}",
                ratio,
                f"{scores.exact_match:.1%}" if answers else "",
                f"{scores.f1:.1%}" if answers else "",
                f"{run['seconds']:.0f}",
                f"{run['cpu_seconds']:.0f}",
                f"{run['memory']:.2f}",
            ]
        )
    return rows


if __name__ == "__main__":
    typer.run(main)
