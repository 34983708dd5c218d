"""Kill a run again and again: it must end as a run that was never killed.

    python benchmarks/kill.py demo/SmolLM2-135M-Instruct recipes/smollm2/casp.yaml \\
        --dataset D --log benchmarks/results/kill.md

`casp run` runs once without a cache; then with a cache, killed by SIGKILL at moments drawn from the
time of the first run. Whenever a run gets through, cache and checkpoint are thrown away. At the end
a run is left in peace: its plan and its safetensors must be those of the first, byte by byte.
"""

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import typer
from common import command, show, write_markdown

from casp_plugin.plan.plan import CompressionPlan

COLUMNS = ("kill", "after, s", "parts kept before", "after it", "checkpoint", "left over")


def main(
    model: str,
    recipe: Path,
    dataset: str = "bundled",
    samples: int = 8,
    max_length: int = 256,
    times: int = 20,
    seed: int = 0,
    work: Path = Path("demo/kill"),
    log: Path | None = None,
) -> None:
    """Print the log; fails if anything differs."""
    cache, out, first = work / "cache", work / "out", work / "undisturbed"
    shutil.rmtree(work, ignore_errors=True)
    casp = [sys.executable, "-m", "casp_plugin", "run", model, "--recipe", str(recipe)]
    casp += ["--dataset", dataset, "--samples", str(samples), "--max-length", str(max_length)]
    start = time.perf_counter()
    subprocess.run([*casp, "--no-cache", "--output", str(first)], check=True, **_QUIET)
    whole = time.perf_counter() - start
    casp += ["--cache", str(cache), "--output", str(out)]
    chance = random.Random(seed)
    rows = []
    for kill in range(times):
        before, moment = _parts(cache), chance.uniform(0, whole)
        process = subprocess.Popen(casp, **_QUIET)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        done = out.exists()  # then as a whole, also where the kill came right after
        if done:
            _compare(first, out)
        state = "complete, as undisturbed" if done else "none"
        left = len(list(work.rglob(".*")))
        row = (kill + 1, f"{moment:.1f}", before, _parts(cache), state, left)
        rows.append([str(value) for value in row])
        show(COLUMNS, rows)
        if done:
            shutil.rmtree(out)
            shutil.rmtree(cache)
    before = _parts(cache)
    subprocess.run(casp, check=True, **_QUIET)
    _compare(first, out)
    left = list(work.rglob(".*"))
    assert not left, left
    rows.append(["-", "in peace", str(before), str(_parts(cache)), "complete, as undisturbed", "0"])
    show(COLUMNS, rows)
    if log is not None:
        note = f"Made by `{command()}`; undisturbed it takes {whole:.0f} s;"
        write_markdown(log, [(COLUMNS, rows)], note)


_QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def _parts(cache: Path) -> int:
    """Count the files that say that something was measured: derivatives, parts of the model."""
    return sum(path.name != "facts.json" for path in cache.rglob("[!.]*.json"))


def _compare(first: Path, second: Path) -> None:
    plans = [CompressionPlan.load(folder) for folder in (first, second)]
    assert plans[0] == plans[1], "the plans differ"
    files = [
        {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
        for folder in (first, second)
    ]
    assert files[0] == files[1], "the weights differ"
    recipes = [(folder / "recipe.yaml").read_text() for folder in (first, second)]
    assert recipes[0] == recipes[1], "the recipes differ"


if __name__ == "__main__":
    typer.run(main)
