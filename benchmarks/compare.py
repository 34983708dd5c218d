"""Run recipes on one model in one go, reload each result from disk in a new process, and
print quality and cost side by side.

    python benchmarks/compare.py MODEL RECIPE... --dataset D --heldout H --table T.md

The first row is the model as it is. Recipes whose names end alike (``_2.28``) are compared with
the first of them, seed by seed. Of several seeds a row tells the median, with the range; bits,
bytes and seconds are those of the first. ``casp time`` is what LowRankQK and BitAllocation took
over what the rest of the same oneshot call took, saving included. With --rows a run that was
stopped goes on where it was: finished runs are known by model, recipe, data and seed, so delete the
file after a change of the code.
"""

import hashlib
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from statistics import median_high
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from common import heldout_source, show, write_markdown

app = typer.Typer(pretty_exceptions_enable=False)
COLUMNS = (
    "recipe",
    "bits",
    "whole model",
    "tensor bytes",
    "perplexity",
    "KL",
    "perplexity ratio",
    "seconds",
    "casp time",
)


@app.command()
def compare(
    model: str,
    recipes: list[Path],
    dataset: str = "bundled",
    heldout: str = "bundled",
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
                row |= _measure(model, model, evaluation)
            else:
                out = (keep or Path(temporary)) / recipe.stem
                row = {"recipe": recipe.stem}
                row |= _compress(model, recipe, dataset, samples, max_length, seed, out)
                row |= _measure(str(out), model, evaluation)
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
    print(f"\n{found[-1][0]['recipe']} continues {PROMPT!r}:\n{found[-1][0]['text']}\n")
    if table is not None:
        tokens = _scores(found[0][0]).tokens
        note = (
            f"Made by `python benchmarks/compare.py {' '.join(sys.argv[2:])}`, {tokens:,} tokens "
            "scored; perplexity ratio with the 95 % interval of a paired bootstrap over the texts;"
        )
        write_markdown(table, COLUMNS, _rows(found), note)


PROMPT = "A compiler is a program that"


def _compress(model, recipe, dataset, samples, max_length, seed, out) -> dict:
    """One oneshot run; seconds in all and in the casp modifiers."""
    import torch
    from llmcompressor import oneshot
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoTokenizer, set_seed

    from casp_plugin.calibration import dataset_arguments, load_text
    from casp_plugin.modifiers import CaspModifier

    spent = []
    initialize = CaspModifier.on_initialize

    def timed(self, *args, **kwargs):
        start = time.perf_counter()
        try:
            return initialize(self, *args, **kwargs)
        finally:
            spent.append(time.perf_counter() - start)

    if not torch.accelerator.is_available():  # AWQ pins host memory all the same
        IntermediatesCache.pin_memory = lambda *args, **kwargs: None
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = load_text(dataset, tokenizer, samples, seed=seed)
    set_seed(seed)
    CaspModifier.on_initialize = timed
    start = time.perf_counter()
    try:
        oneshot(
            model=model,
            processor=tokenizer,
            recipe=str(recipe),
            output_dir=str(out),
            **dataset_arguments(texts, max_length),
        )
    finally:
        CaspModifier.on_initialize = initialize
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "casp_time": sum(spent) / (seconds - sum(spent))}


def _measure(folder: str, reference: str, evaluation: list[str]) -> dict:
    """Scores of a checkpoint, loaded from disk by a new process."""
    command = [sys.executable, __file__, "measure", folder, reference, *evaluation]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    return json.loads(output.splitlines()[-1])  # llm-compressor logs to stdout as well


@app.command()
def measure(folder: str, reference: str, heldout: str, samples: int, max_length: int) -> None:
    """Print scores, size and a sample of text as JSON."""
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    from casp_plugin.calibration import load_text
    from casp_plugin.evaluation import evaluate

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    original = AutoModelForCausalLM.from_pretrained(reference, dtype="auto")
    linears = [
        module.weight
        for name, module in original.named_modules()
        if type(module).__name__ == "Linear" and name != "lm_head"
    ]
    weights = sum(weight.numel() for weight in linears)
    other = sum(p.nbytes for p in original.parameters()) - sum(w.nbytes for w in linears)
    total = 0
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(path, framework="pt") as shard:
            total += sum(shard.get_tensor(name).nbytes for name in shard.keys())  # noqa: SIM118
    texts = load_text(heldout_source(heldout), tokenizer, samples)["text"]
    same = folder == reference
    scores = evaluate(model, tokenizer, texts, max_length, None if same else original)
    set_seed(0)
    ids = tokenizer(PROMPT, return_tensors="pt")
    text = tokenizer.decode(model.generate(**ids, max_new_tokens=40, do_sample=False)[0])
    print(
        json.dumps(
            {
                "bits": (total - other) * 8 / weights,
                "whole": total * 8 / sum(p.numel() for p in original.parameters()),
                "bytes": total,
                "texts": [(one.tokens, one.loss, one.divergence or 0.0) for one in scores.texts],
                "text": text,
            }
        )
    )


def _scores(run: dict):
    from casp_plugin.evaluation import Scores, TextScore

    return Scores(tuple(TextScore(*text) for text in run["texts"]))


def _range(values: list[float], spec: str) -> str:
    return f" ({min(values):{spec}} to {max(values):{spec}})" if len(values) > 1 else ""


def _cells(runs: list[dict], baseline: list[dict] | None) -> list[str]:
    from casp_plugin.evaluation import loss_interval

    first = runs[0]
    each = [_scores(run) for run in runs]
    perplexities = [one.perplexity for one in each]
    scores = each[perplexities.index(median_high(perplexities))]
    perplexity = f"{scores.perplexity:.2f}{_range(perplexities, '.1f')}"
    ratio = ""
    if baseline is not None and baseline is not runs:
        pairs = list(zip(each, map(_scores, baseline), strict=True))
        ratios = [one.perplexity / other.perplexity for one, other in pairs]
        middle = median_high(ratios)
        low, high = loss_interval(*pairs[ratios.index(middle)])
        ratio = f"{middle:.3f} [{math.exp(low):.3f}, {math.exp(high):.3f}]"
        ratio += _range(ratios, ".3f")
    casp = first.get("casp_time")
    return [
        first["recipe"],
        f"{first['bits']:.4f}",
        f"{first['whole']:.3f}",
        f"{first['bytes']:,}",
        perplexity,
        f"{scores.kl:.4f}",
        ratio,
        f"{first['seconds']:.0f}",
        f"+{casp:.0%}" if casp else "",
    ]


def _rows(found: list[list[dict]]) -> list[list[str]]:
    """Cells of every row; the first recipe of a budget is what the others are compared with."""
    baselines = {}
    for runs in found[1:]:
        baselines.setdefault(runs[0]["recipe"].rpartition("_")[2], runs)
    return [_cells(runs, baselines.get(runs[0]["recipe"].rpartition("_")[2])) for runs in found]


if __name__ == "__main__":
    # the bare form is the comparison; ``measure`` is its other half, in a process of its own
    if sys.argv[1:2] != ["measure"]:
        sys.argv.insert(1, "compare")
    app()
