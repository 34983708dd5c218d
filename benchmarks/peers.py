"""Ours beside what else there is, at the same bytes on disk: quality, wall time, peak memory.

    python benchmarks/peers.py MODEL 2.56 --recipes recipes/smollm2 --dataset D --heldout H

Recipes of llm-compressor, stock ones and ours, run in this environment; AutoScheme of auto-round
chooses a mix that its AutoRound then runs; GPTQModel and HQQ run in environments of their own,
which are made below --work, at what is nearest to the bytes of uniform GPTQ. Seconds and memory are
those of a whole process: from reading the model to the written checkpoint. Quality is that of the
checkpoint read back from disk: for GPTQModel and HQQ by their own code, into a model that
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
from common import measured, scores_of, show, timed, write_markdown
from transformers import AutoConfig, AutoTokenizer

from casp_plugin.checkpoint.format import copy_processor
from casp_plugin.data.sources import load_text
from casp_plugin.evaluation.answers import AnswerScores
from casp_plugin.evaluation.results import compare
from casp_plugin.model.load import bytes_on_disk, is_multimodal

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
#: in this order; those whose recipe is not there are left out
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
#: bits and group size of each package by budget, and what it is called; HQQ's scales and zero
#: points take 16 bits each
NEAREST = {
    "2.56": {
        "hqq": (2, 64, "HQQ, 2 bits, groups of 64"),
        "gptqmodel": (2, 32, "GPTQModel, 2 bits, groups of 32"),
    },
    "3.30": {"gptqmodel": (3, 64, "GPTQModel, 3 bits, groups of 64")},
}


def main(
    model: str,
    budget: str,
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
    """
    :param budget: what the recipes' names end with
    :param only: methods to run now, by commas; the table tells all that were run so far
    """
    sees = is_multimodal(AutoConfig.from_pretrained(model))
    rows_path = work / "rows.jsonl"
    done = {}
    if rows_path.exists():
        done = {row["key"]: row for row in map(json.loads, rows_path.read_text().splitlines())}
    evaluation = [heldout, str(heldout_samples), str(max_length)]
    work = work.resolve()
    calibration = ["--dataset", dataset, "--samples", str(samples), "--max-length", str(max_length)]
    found = []

    def add(name: str, title: str, make, facts: str) -> None:
        """Run a method unless it was.

        :param make: fills a folder; tells what it took, and the folder to score
        :param facts: what the result depends on beside the arguments
        """
        key = f"{model} {budget} {name} {dataset} {samples} {max_length} {evaluation} {facts}"
        wanted = not only or name in only.split(",")
        if key not in done and wanted:
            out = work / Path(model).name / f"{name}_{budget}"
            spent, scored = make(out)
            row = {"key": key, "name": name, "title": title, **asdict(spent)}
            scores = measured(str(scored), model, evaluation)
            done[key] = row | scores | {"bytes": bytes_on_disk(out)}
            rows_path.parent.mkdir(parents=True, exist_ok=True)
            with rows_path.open("a") as file:
                file.write(json.dumps(done[key]) + "\n")
        if key in done:
            found.append(done[key])
            show(COLUMNS, _rows(found))

    def by_recipe(recipe: Path):
        def make(out: Path):
            command = [sys.executable, str(HERE / "compress.py"), model, str(recipe), str(out)]
            return timed([*command, *calibration]), out

        return make

    def by_autoscheme(out: Path):
        recipe = out.with_name(f"{out.name}.yaml")
        texts = _texts(model, dataset, samples, work / "texts.jsonl")
        script = [sys.executable, str(HERE / "autoscheme.py")]
        chosen = timed([*script, model, str(start), str(recipe), texts, *calibration[2:]])
        tuned, out = by_recipe(recipe)(out)
        return chosen + tuned, out

    def by_package(package: str, bits: int, group_size: int):
        def make(out: Path):
            python = _environment(package, work)
            script = [python, str(HERE / f"peer_{package}.py")]
            texts = [] if sees else [_texts(model, dataset, samples, work / "texts.jsonl")]
            source = str(Path(model).resolve()) if Path(model).exists() else model
            settings = [str(bits), str(group_size), *texts, str(max_length)]
            spent = timed([*script, "quantize", source, str(out), *settings], work)
            dense = out.with_name(f"{out.name}_dense")
            timed([*script, "dense", source, str(out), str(dense)], work)
            copy_processor(model, dense)
            return spent, dense

        return make

    for name, title in RECIPES.items():
        recipe = recipes / f"{name}_{budget}.yaml"
        if recipe.exists():
            add(name, title, by_recipe(recipe), recipe.read_text())
    start = recipes / f"autoround_{budget}.yaml"
    if start.exists() and not sees:
        add("autoscheme", "AutoScheme's mix + AutoRound", by_autoscheme, start.read_text())
    for package, (bits, group_size, title) in NEAREST.get(budget, {}).items():
        if not (sees and package == "gptqmodel"):
            made = by_package(package, bits, group_size)
            add(package, title, made, f"{bits} {group_size} {ENVIRONMENTS[package]}")
    if table is not None:
        packages = ", ".join(pin for pins in ENVIRONMENTS.values() for pin in pins[:1])
        note = f"Made by `python benchmarks/peers.py {' '.join(sys.argv[1:])}`; {packages};"
        write_markdown(table, [(COLUMNS, _rows(found))], note)


def _environment(package: str, work: Path) -> str:
    """Python of a package's environment, made if it is not there."""
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
    """The calibration texts of the others, as a file."""
    texts = load_text(dataset, AutoTokenizer.from_pretrained(model), samples)["text"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n")
    return str(path)


def _rows(found: list[dict]) -> list[list[str]]:
    first = next((row for row in found if row["name"] == "uniform"), None)
    rows = []
    for row in found:
        scores = scores_of(row)
        answers = isinstance(scores, AnswerScores)
        ratio = ""
        if first and row is not first:
            pair = [scores_of(each).measurements("")[0] for each in (row, first)]
            change = compare(*pair)
            ratio = f"{change.change:.3f} [{change.low:.3f}, {change.high:.3f}]"
        rows.append(
            [
                row["title"],
                f"{row['bytes']:,}",
                f"{row['bytes'] / first['bytes']:.3f}" if first else "",
                f"{scores.perplexity:.2f}",
                f"{scores.kl or 0:.3f}",
                ratio,
                f"{scores.exact_match:.1%}" if answers else "",
                f"{scores.f1:.1%}" if answers else "",
                f"{row['seconds']:.0f}",
                f"{row['cpu_seconds']:.0f}",
                f"{row['memory']:.2f}",
            ]
        )
    return rows


if __name__ == "__main__":
    typer.run(main)
