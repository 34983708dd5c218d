"""Run recipes on one model in one go, reload each result from disk in a new process, and
print quality and cost side by side.

    python benchmarks/compare.py MODEL RECIPE... --dataset D --heldout H --table T.md

The first row is the model as it is. ``casp time`` is what LowRankQK and BitAllocation took
over what the rest of the same oneshot call took, saving included.
"""

import json
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(pretty_exceptions_enable=False)
COLUMNS = ("recipe", "bits", "tensor bytes", "perplexity", "KL", "seconds", "casp time")


@app.command()
def compare(
    model: str,
    recipes: list[Path],
    dataset: str = "bundled",
    heldout: str = "bundled",
    samples: int = 32,
    heldout_samples: int = 32,
    max_length: int = 512,
    keep: Annotated[Path | None, typer.Option(help="Keep the checkpoints here.")] = None,
    table: Annotated[Path | None, typer.Option(help="Write the table in Markdown here.")] = None,
    seed: int = 0,
) -> None:
    """Compress by each recipe and compare."""
    evaluation = [heldout, str(heldout_samples), str(max_length)]
    rows = [{"recipe": "unquantized", "seconds": 0.0, **_measure(model, model, evaluation)}]
    with TemporaryDirectory() as temporary:
        for recipe in recipes:
            out = (keep or Path(temporary)) / recipe.stem
            cost = _compress(model, recipe, dataset, samples, max_length, seed, out)
            rows.append({"recipe": recipe.stem, **cost, **_measure(str(out), model, evaluation)})
            _show(rows)
    print(f"\n{rows[-1]['recipe']} continues {PROMPT!r}:\n{rows[-1]['text']}\n")
    if table is not None:
        table.parent.mkdir(parents=True, exist_ok=True)
        table.write_text(_markdown(rows, sys.argv[2:]))


PROMPT = "A compiler is a program that"


def _compress(model, recipe, dataset, samples, max_length, seed, out) -> dict:
    """One oneshot run; seconds in all and in the casp modifiers."""
    from llmcompressor import oneshot
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

    import casp_plugin
    from casp_plugin.calibration import load_text
    from casp_plugin.evaluation import evaluate

    if heldout == "bundled":
        heldout = str(Path(casp_plugin.__file__).parent / "text" / "heldout.jsonl")
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
    texts = load_text(heldout, tokenizer, samples)["text"]
    same = folder == reference
    scores = evaluate(model, tokenizer, texts, max_length, None if same else original)
    set_seed(0)
    ids = tokenizer(PROMPT, return_tensors="pt")
    text = tokenizer.decode(model.generate(**ids, max_new_tokens=40, do_sample=False)[0])
    print(
        json.dumps(
            {
                "bits": (total - other) * 8 / weights,
                "bytes": total,
                "perplexity": scores.perplexity,
                "kl": scores.kl or 0.0,
                "tokens": scores.tokens,
                "text": text,
            }
        )
    )


def _cells(row: dict) -> list[str]:
    casp = row.get("casp_time")
    return [
        row["recipe"],
        f"{row['bits']:.4f}",
        f"{row['bytes']:,}",
        f"{row['perplexity']:.2f}",
        f"{row['kl']:.4f}",
        f"{row['seconds']:.0f}",
        f"+{casp:.0%}" if casp else "",
    ]


def _show(rows: list[dict]) -> None:
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*_cells(row))
    Console(width=110).print(table)


def _markdown(rows: list[dict], arguments: list[str]) -> str:
    names = ("casp-plugin", "llmcompressor", "compressed-tensors", "transformers", "torch")
    lines = [
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
        *("| " + " | ".join(_cells(row)) + " |" for row in rows),
        "",
        f"Made by `python benchmarks/compare.py {' '.join(arguments)}`",
        f"({rows[0]['tokens']:,} tokens scored; "
        + ", ".join(f"{name} {version(name)}" for name in names)
        + ").",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    # the bare form is the comparison; ``measure`` is its other half, in a process of its own
    if sys.argv[1:2] != ["measure"]:
        sys.argv.insert(1, "compare")
    app()
