"""What measuring costs beside GPTQ, and what it is worth: this checkout against another one.

    python benchmarks/cost.py run MODEL --before CHECKOUT --dataset D --table T.md
    python benchmarks/cost.py shared MODEL --dataset D --heldout H --table S.md

``run`` compresses a model, and decoder layers of Llama-2-7B's shape with random weights, by GPTQ
alone and by casp and GPTQ, this code and the other checkout's, each in a process of its own; then
it measures again by both and tells the parts apart. Quality is read from two logs of
``compare.py --rows``, of runs with the same recipes, budgets and seeds.

``shared`` rounds by the dense model's second moments, as GPTQ could if it took those of casp, and
compares with GPTQ's own, of inputs that earlier layers have changed.
"""

import json
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from pkgutil import resolve_name
from statistics import median_high
from typing import Annotated
from unittest.mock import patch

import torch
import typer
import yaml
from ablation import Bench
from budgets import at_budget
from common import Log, Spent, command, perplexity_ratio, ratio_cell, show, timed, write_markdown
from compress import calibration, compress
from measure import scores_of
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

from casp_plugin.data.sources import load_text
from casp_plugin.model.load import load_model
from casp_plugin.modifiers import estimate_recipe, plan_recipe
from casp_plugin.modifiers.run_estimate import Data
from casp_plugin.system.files import whole_folder

app = typer.Typer(add_completion=False)

COSTS = ("model", "recipe", "seconds", "CPU seconds", "peak GB", "seconds over GPTQ's")
PARTS = ("model", "part", "before, s", "now, s")
QUALITY = ("recipe", "before", "now", "ratio, median of seeds", "ratios by seed")
SHARED = ("recipe", "second moments", "perplexity", "ratio", "seconds of GPTQ")

#: of 7B layers
WIDE = {
    "GPTQ": """
gptq_stage:
  gptq_modifiers:
    GPTQModifier:
      ignore: [lm_head]
      config_groups:
        group_0:
          targets: [Linear]
          weights: {num_bits: 2, type: int, symmetric: false, strategy: group, group_size: 128,
            observer: imatrix_mse}
""",
    "casp + GPTQ": Path("recipes/casp_gptq.yaml").read_text(),
}
#: parts of measuring: a function that both checkouts have
DERIVATIVES = "casp_plugin.statistics.layer_by_layer.collect_derivatives"
FACTORS = "casp_plugin.modifiers.low_rank_qk.LowRankQKModifier.note"
PRICES = "casp_plugin.modifiers.bit_allocation.BitAllocationModifier.note"
MEASURE = "casp_plugin.modifiers.recipe_run.measure"


@app.command()
def run(
    model: str,
    before: Annotated[Path, typer.Option(help="Checkout to compare with.")],
    dataset: str = "bundled",
    samples: int = 32,
    max_length: int = 512,
    layers: Annotated[int, typer.Option(help="Decoder layers of 7B's shape.")] = 1,
    layer_samples: int = 16,
    rows: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Logs of compare.py, before and now.")
    ] = None,
    work: Path = Path("demo/cost"),
    table: Path | None = None,
) -> None:
    """Print costs, parts and quality."""
    work.mkdir(parents=True, exist_ok=True)
    wide = work / f"7b_{layers}"
    if not wide.exists():
        _make(model, layers, wide)
    name = f"{layers} layer{'s' * (layers > 1)} of 7B, {layer_samples} x {max_length}"
    sizes = {
        f"SmolLM2-135M, {samples} x {max_length}": (model, _small(model), samples),
        name: (str(wide), WIDE, layer_samples),
    }
    log = Log(work / "costs.jsonl")
    costs, parts = [], []
    for title, (folder, recipes, count) in sizes.items():
        data = ["--dataset", dataset, "--samples", str(count), "--max-length", str(max_length)]
        runs = {
            "GPTQ": (Path(), recipes["GPTQ"]),
            "casp + GPTQ, before": (before, recipes["casp + GPTQ"]),
            "casp + GPTQ": (Path(), recipes["casp + GPTQ"]),
        }
        spent = {}
        for row, (checkout, recipe) in runs.items():
            given = (checkout, folder, recipe, data, work)
            key = _key("compress", *given)
            made = log.run(key, lambda given=given: asdict(_compress(*given)))
            spent[row] = Spent(made["seconds"], made["cpu_seconds"], made["memory"])
            over = spent[row].seconds / spent["GPTQ"].seconds - 1
            cells = [f"{spent[row].seconds:.0f}", f"{spent[row].cpu_seconds:.0f}"]
            cells += [f"{spent[row].memory:.2f}", "" if row == "GPTQ" else f"+{over:.0%}"]
            costs.append([title, row, *cells])
            show(COSTS, costs)
        if folder != model:  # measured by the other checkout once, which takes long
            continue
        recipe = recipes["casp + GPTQ"]
        both = [(checkout, folder, recipe, data, work) for checkout in (before, Path())]
        theirs, ours = (
            log.run(_key("parts", *given), lambda given=given: _parts(*given)) for given in both
        )
        for part in ours:
            if part != "key":
                parts.append([title, part, f"{theirs[part]:.1f}", f"{ours[part]:.1f}"])
        show(PARTS, parts)
    tables = [(COSTS, costs), (PARTS, parts)]
    if rows is not None:
        tables.append((QUALITY, _quality(*rows)))
        show(*tables[-1])
    if table is not None:
        threads = torch.get_num_threads()
        write_markdown(table, tables, f"Made by `{command()}`, {threads} threads;")


@app.command()
def parts(
    model: str,
    recipe: Path,
    out: Path,
    dataset: str = "bundled",
    samples: int = 32,
    max_length: int = 512,
) -> None:
    """Measure a model, and write the seconds of every part."""
    _, batches = calibration(model, dataset, samples, max_length, 0)
    set_seed(0)
    loaded = load_model(model)
    expected = estimate_recipe(loaded, recipe.read_text(), Data(samples, max_length)).seconds
    spent = {}
    with ExitStack() as stack:
        for part in (MEASURE, DERIVATIVES, FACTORS, PRICES):
            stack.enter_context(_timed_function(part, spent))
        start = time.perf_counter()
        plan_recipe(loaded, recipe.read_text(), batches)
        whole = time.perf_counter() - start
    known = spent[DERIVATIVES] + spent[FACTORS] + spent[PRICES]
    out.write_text(
        json.dumps(
            {
                "gradients, attention maps": spent[DERIVATIVES],
                "second moments": spent[MEASURE] - known,
                "factors of q and k": spent[FACTORS],
                "errors of rounding": spent[PRICES],
                "checks, choice, installation": whole - spent[MEASURE],
                "all": whole,
                "all, as `casp plan` expects": expected,
            }
        )
    )


@app.command()
def shared(
    model: str,
    dataset: str = "bundled",
    heldout: str = "bundled-heldout",
    samples: int = 32,
    heldout_samples: int = 32,
    max_length: int = 512,
    average_bits: Annotated[list[float], typer.Option()] = (2.28, 3.30),
    table: Path | None = None,
) -> None:
    """Print what GPTQ by the dense model's moments saves and costs."""
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = load_text(dataset, tokenizer, samples)
    scored = load_text(heldout, tokenizer, heldout_samples)["text"]
    bench = Bench(model, texts, scored, max_length, 64)
    statistics = bench.collect()
    rows = []
    for budget in average_bits:
        for title, recipe in (("uniform", "uniform.yaml"), ("one knapsack", "casp.yaml")):
            text = at_budget(Path("recipes/smollm2") / recipe, budget, model)
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "out"
                cost = compress(model, text, dataset, samples, max_length, 0, out)
                own = bench.score(load_model(out))
            quantizing = cost["seconds"] / (1 + cost["casp_time"])
            casp = yaml.safe_load(at_budget(Path("recipes/smollm2/casp.yaml"), budget, model))
            bits = casp["casp_stage"]["casp_modifiers"]["BitAllocationModifier"]["average_bits"]
            start = time.perf_counter()
            # a little above: the least that one width everywhere takes
            rounded, _ = bench.plan(title, bits + 1e-3, statistics, 0)
            seconds = time.perf_counter() - start
            dense = bench.score(rounded)
            name = f"{recipe.removesuffix('.yaml')}_{budget:.2f}"
            rows.append([name, "of GPTQ", f"{own.perplexity:.2f}", "", f"{quantizing:.0f}"])
            ratio = ratio_cell(perplexity_ratio(dense, own))
            rows.append([name, "dense model's", f"{dense.perplexity:.2f}", ratio, f"{seconds:.0f}"])
            show(SHARED, rows)
    if table is not None:
        write_markdown(table, [(SHARED, rows)], f"Made by `{command()}`;")


def _timed_function(name: str, spent: dict[str, float]):
    """Return a patch of a function that adds up its seconds."""
    owner, _, attribute = name.rpartition(".")
    original = getattr(resolve_name(owner), attribute)

    def watched(*args, **kwargs):
        start = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            spent[name] = spent.get(name, 0) + time.perf_counter() - start

    return patch.object(resolve_name(owner), attribute, watched)


def _small(model: str) -> dict[str, str]:
    """Return the recipes of SmolLM2, at the bytes of 2 bits in groups of 64."""
    files = {"GPTQ": "uniform.yaml", "casp + GPTQ": "casp.yaml"}
    return {
        name: at_budget(Path("recipes/smollm2") / file, 2.28, model) for name, file in files.items()
    }


def _key(kind: str, checkout: Path, *arguments) -> str:
    """Return the key of a run: all that it depends on, the code of the checkout too."""
    code = sorted((checkout / "casp_plugin").rglob("*.py"))
    facts = [kind, *map(str, arguments), *(path.read_text() for path in code)]
    return sha256("\0".join([*facts, str(torch.get_num_threads())]).encode()).hexdigest()


def _command(checkout: Path, script: str, *arguments) -> Spent:
    """Run a benchmark with the package of a checkout, and return its cost."""
    with patch.dict(os.environ, {"PYTHONPATH": str(checkout.absolute())}):
        path = Path(__file__).with_name(script)
        return timed([sys.executable, str(path), *map(str, arguments)])


def _compress(checkout: Path, model: str, recipe: str, data: list[str], work: Path) -> Spent:
    with tempfile.TemporaryDirectory(dir=work) as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(recipe)
        return _command(checkout, "compress.py", model, file, Path(folder) / "out", *data)


def _parts(checkout: Path, model: str, recipe: str, data: list[str], work: Path) -> dict:
    with tempfile.TemporaryDirectory(dir=work) as folder:
        file, out = Path(folder) / "recipe.yaml", Path(folder) / "parts.json"
        file.write_text(recipe)
        _command(checkout, "cost.py", "parts", model, file, out, *data)
        return json.loads(out.read_text())


def _make(source: str, layers: int, folder: Path) -> None:
    """Save decoder layers of Llama-2-7B's shape with random weights, and another's vocabulary."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=len(tokenizer),
    )
    torch.manual_seed(0)
    with whole_folder(folder) as partial:
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def _quality(before: Path, now: Path) -> list[list[str]]:
    """Return the rows of compare.py's logs with casp recipes, ratios seed by seed."""
    runs = [{}, {}]
    for path, by_recipe in zip((before, now), runs, strict=True):
        for run in Log(path).runs.values():  # in the order of the seeds
            if run["recipe"] != "unquantized":
                by_recipe.setdefault(run["recipe"], []).append(scores_of(run))
    rows = []
    for recipe, theirs in runs[0].items():
        ours = runs[1][recipe]
        ratios = [perplexity_ratio(*pair) for pair in zip(ours, theirs, strict=True)]
        changes = [ratio.change for ratio in ratios]
        middle = ratios[changes.index(median_high(changes))]
        cells = [" ".join(f"{seed.perplexity:.2f}" for seed in seeds) for seeds in (theirs, ours)]
        changes = " ".join(f"{change:.3f}" for change in changes)
        rows.append([recipe, *cells, ratio_cell(middle), changes])
    return rows


if __name__ == "__main__":
    app()
