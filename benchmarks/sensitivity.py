"""Find out whether the answer of ``casp sensitivity`` makes better models.

    python benchmarks/sensitivity.py questions DATA FOLDER
    python benchmarks/sensitivity.py allocate MODEL RECIPE --average-bits 2.28 --study S \\
        --dataset D --heldout H

``questions`` splits the questions of the small vision-language model: study.parquet for the study,
heldout.parquet for the models made by its answer; both tell captions from other questions.
``allocate`` compresses by a recipe as it is and with ``importance`` from the study, at equal bytes.
"""

import tempfile
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
import yaml
from budgets import at_budgets
from common import command, show, write_markdown
from compress import compress
from datasets import Dataset, concatenate_datasets

from casp_plugin.data.conversations import load_conversations
from casp_plugin.data.data_source import load_processor
from casp_plugin.evaluation.answers import AnswerScores, evaluate_answers
from casp_plugin.evaluation.results import compare
from casp_plugin.model.load import bytes_on_disk, load_model
from casp_plugin.plan.plan import Budget, CompressionPlan

app = typer.Typer(add_completion=False)
CAPTION, OTHERS = "caption", "vqa"


@app.command()
def questions(data: str, folder: Path, captions: int = 24, others: int = 4) -> None:
    """Write study.parquet and heldout.parquet.

    The study gets so many captions, and so many questions of each other kind.
    """
    rows = Dataset.from_parquet(data)
    parts: dict[str, list[Dataset]] = {"study": [], "heldout": []}
    for task in sorted(set(rows["task"]) - {"countsame"}):  # which the model never learned
        inside = rows.filter(lambda row, task=task: row["task"] == task).shuffle(seed=0)
        taken = captions if task == CAPTION else others
        called = [CAPTION if task == CAPTION else OTHERS] * len(inside)
        inside = inside.remove_columns("task").add_column("task", called)
        parts["study"].append(inside.select(range(taken)))
        parts["heldout"].append(inside.select(range(taken, len(inside))))
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in parts.items():
        together = concatenate_datasets(found)
        together.to_parquet(folder / f"{name}.parquet")
        print(f"{folder / name}.parquet: {len(together)} questions")


@app.command()
def allocate(
    model: str,
    recipe: Path,
    study: Annotated[Path, typer.Option(help="sensitivity.json")],
    dataset: Annotated[str, typer.Option(help="Questions to calibrate on.")],
    heldout: Annotated[str, typer.Option(help="Questions to score on, with a column task.")],
    average_bits: Annotated[list[float] | None, typer.Option(help="Budgets.")] = None,
    samples: int = 256,
    seed: int = 0,
    table: Path | None = None,
) -> None:
    """Tell bytes, bits of components and scores, by the default importance and by the study's."""
    asked = load_conversations(heldout, 10**6, task_column="task")
    processor = load_processor(model)
    rows = []
    for name, text in at_budgets([recipe], average_bits or (), model):
        before = None
        for importance in ("fisher", str(study)):
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "out"
                stages = yaml.safe_load(text)
                modifiers = stages["casp_stage"]["casp_modifiers"]
                modifiers["BitAllocationModifier"]["importance"] = importance
                chosen = yaml.safe_dump(stages, sort_keys=False)
                compress(model, chosen, dataset, samples, 512, seed, out)
                scores = evaluate_answers(load_model(str(out)), processor, asked).by_task
                plan, taken = CompressionPlan.load(out), bytes_on_disk(out)
            source = "fisher" if before is None else "study"
            rows.append([name, source, f"{taken:,}", _bits(plan), *_cells(scores, before)])
            before = before or scores
            show(COLUMNS, rows)
    if table is not None:
        counts = Counter(question.task for question in asked)
        questions = ", ".join(f"{counts[task]} {task}" for task in TASKS)
        note = (
            f"Made by `{command()}` ({questions} questions; ratios and differences to fisher with "
            f"95 % intervals; seed {seed});"
        )
        write_markdown(table, [(COLUMNS, rows)], note)


TASKS = (CAPTION, OTHERS)
COLUMNS = (
    *("recipe", "importance", "bytes", "average bits"),
    *(f"{task}: {metric}" for task in TASKS for metric in ("perplexity", "exact match")),
)


def _bits(plan: CompressionPlan) -> str:
    """Return the average bits of the components."""
    found = {}
    for component in dict.fromkeys(unit.component for unit in plan.units):
        units = [unit for unit in plan.units if unit.component == component]
        found[component] = Budget(component, plan.average_bits, units).reached_bits
    return ", ".join(f"{name} {bits:.2f}" for name, bits in found.items())


def _cells(scores: dict[str, AnswerScores], before: dict[str, AnswerScores] | None) -> list[str]:
    cells = []
    for task in TASKS:
        measured = {one.metric: one for one in scores[task].measurements(task)}
        for metric, spec in (("perplexity", ".3f"), ("exact_match", ".1%")):
            cell = f"{measured[metric].value:{spec}}"
            if before is not None:
                old = {one.metric: one for one in before[task].measurements(task)}[metric]
                found = compare(measured[metric], old)
                sign = "" if found.ratio else "+"
                numbers = (f"{v:{sign}{spec}}" for v in (found.change, found.low, found.high))
                cell += " ({} [{}, {}])".format(*numbers)
            cells.append(cell)
    return cells


if __name__ == "__main__":
    app()
