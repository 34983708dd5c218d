"""Measure how memory and time grow with depth and width: the casp modifiers beside GPTQ.

    python benchmarks/growth.py demo/SmolLM2-135M-Instruct recipes/smollm2/casp.yaml \\
        recipes/smollm2/uniform.yaml --dataset D

The models are of the config's kind, of the given sizes, with random weights. A recipe of casp
measures them without quantizing, and a recipe without casp quantizes them, in processes of their
own, from reading the model on; peaks are of resident memory. Beside them are the expectations of
`casp plan`, and the time in which GPTQ sums up the moments of its inputs: the most that it could
save by taking those of the dense model.
"""

import shutil
import sys
import tempfile
import time
from multiprocessing import Process
from pathlib import Path
from typing import Annotated

import torch
import typer
from common import command, show, timed, write_markdown
from compress import calibration, compress
from llmcompressor.modifiers.gptq import base
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from casp_plugin.model.load import bare_model, bytes_on_disk, load_model
from casp_plugin.modifiers import estimate_recipe, plan_recipe
from casp_plugin.modifiers.recipes import load_recipe
from casp_plugin.modifiers.run_estimate import Data
from casp_plugin.system.files import whole_folder

COLUMNS = (
    "width x layers",
    "model, MB",
    "casp, peak GB (expected)",
    "GPTQ, peak GB",
    "ratio",
    "casp, s (expected)",
    "casp, CPU s",
    "GPTQ, CPU s",
    "of that Hessians, s",
    "ratio ",
    "cache, MB (expected)",
)
SIZES = ["576x10", "576x40", "1152x10", "1152x30"]
HESSIANS = "hessians.txt"


def main(
    source: Annotated[str, typer.Argument(help="Model whose config is scaled.")],
    recipe: Path,
    stock: Path,
    dataset: str = "bundled",
    samples: int = 16,
    max_length: int = 512,
    sizes: Annotated[list[str], typer.Option(help="WIDTHxLAYERS.")] = SIZES,
    work: Path = Path("demo/growth"),
    table: Path | None = None,
    measure: Annotated[str, typer.Option(hidden=True)] = "",
    quantize: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Print the table."""
    data = ["--dataset", dataset, "--samples", str(samples), "--max-length", str(max_length)]
    if measure:  # the process whose memory is looked at
        _, batches = calibration(measure, dataset, samples, max_length, 0)
        filled = load_recipe(recipe, cache_dir=work / "cache")
        plan_recipe(load_model(measure), filled, batches)
        return
    if quantize:  # the other one
        _quantize(quantize, stock, dataset, samples, max_length, work)
        return
    rows = []
    for size in sizes:
        model = work / size
        if not model.exists():
            # in a process of its own: what this one holds counts as expected
            making = Process(target=_make, args=(source, *map(int, size.split("x")), model))
            making.start()
            making.join()
        shutil.rmtree(work / "cache", ignore_errors=True)
        again = [source, str(recipe), str(stock), *data, "--work", str(work)]
        ours = timed([sys.executable, __file__, *again, "--measure", str(model)])
        theirs = timed([sys.executable, __file__, *again, "--quantize", str(model)])
        kept = sum(path.stat().st_size for path in (work / "cache").rglob("*.*"))
        config = AutoConfig.from_pretrained(model)
        expected = estimate_recipe(bare_model(config), str(recipe), Data(samples, max_length))
        rows.append(
            [
                size,
                f"{bytes_on_disk(model) / 1e6:.0f}",
                f"{ours.memory:.2f} ({expected.memory / 1e9:.2f})",
                f"{theirs.memory:.2f}",
                f"{ours.memory / theirs.memory:.2f}",
                f"{ours.seconds:.0f} ({expected.seconds:.0f})",
                f"{ours.cpu_seconds:.0f}",
                f"{theirs.cpu_seconds:.0f}",
                (work / HESSIANS).read_text(),
                f"{ours.cpu_seconds / theirs.cpu_seconds:.2f}",
                f"{kept / 1e6:.0f} ({expected.disk / 1e6:.0f})",
            ]
        )
        show(COLUMNS, rows)
    if table is not None:
        write_markdown(table, [(COLUMNS, rows)], f"Made by `{command()}`;")


def _quantize(model: str, stock: Path, dataset: str, samples: int, length: int, work: Path) -> None:
    """Run GPTQ alone; seconds that it spends on summing up moments go into a file."""
    spent = []

    def watched(*args, **kwargs):
        start = time.perf_counter()
        try:
            return accumulate(*args, **kwargs)
        finally:
            spent.append(time.perf_counter() - start)

    accumulate, base.accumulate_hessian = base.accumulate_hessian, watched
    with tempfile.TemporaryDirectory(dir=work) as out:
        compress(model, stock.read_text(), dataset, samples, length, 0, Path(out) / "out")
    (work / HESSIANS).write_text(f"{sum(spent):.0f}")


def _make(source: str, width: int, layers: int, folder: Path) -> None:
    """Save a model with random weights in the proportions of another."""
    config = AutoConfig.from_pretrained(source)
    scale = width / config.hidden_size
    for field in ("intermediate_size", "num_attention_heads", "num_key_value_heads"):
        setattr(config, field, round(getattr(config, field) * scale))
    config.hidden_size, config.num_hidden_layers = width, layers
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with whole_folder(folder) as partial:
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(source).save_pretrained(partial)


if __name__ == "__main__":
    typer.run(main)
