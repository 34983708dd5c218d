"""The command that makes a model at many sizes."""

import io
import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from casp_plugin.cli.app import app
from casp_plugin.cli.compress import compress, skeleton
from casp_plugin.cli.data import (
    DataSource,
    calibration_batches,
    load_processor,
    within_positions,
)
from casp_plugin.cli.measure import score
from casp_plugin.cli.options import (
    DATASET,
    AnswerColumn,
    Column,
    ConfigName,
    Heldout,
    HeldoutSamples,
    HeldoutSplit,
    ImageColumn,
    Length,
    Model,
    QuestionColumn,
    Samples,
    Seed,
    Split,
    TrustRemoteCode,
    VideoColumn,
    console,
)


@app.command(context_settings={"allow_extra_args": True})
def sweep(
    context: typer.Context,
    model: Model,
    recipe: Annotated[
        list[Path],
        typer.Option(
            help="Recipe in YAML. Several times for several lines; one without "
            "BitAllocationModifier is one point.",
            exists=True,
            dir_okay=False,
        ),
    ],
    average_bits: Annotated[
        list[str], typer.Option(help="Budgets: 2.1 2.25 2.5 3 4, or by commas.")
    ],
    dataset: Annotated[str, DATASET],
    output: Annotated[
        Path, typer.Option(help="Folder of the sweep; one that was stopped goes on.")
    ],
    heldout: Heldout = "bundled-heldout",
    heldout_split: HeldoutSplit = "test",
    heldout_samples: HeldoutSamples = 512,
    text_column: Column = "text",
    image_column: ImageColumn = "image",
    video_column: VideoColumn = None,
    question_column: QuestionColumn = "question",
    answer_column: AnswerColumn = "answer",
    split: Split = "train",
    dataset_config: ConfigName = None,
    samples: Samples = 512,
    max_length: Length = 2048,
    kv_cache: Annotated[
        list[str] | None,
        typer.Option(help="Score each size with this cache too, as casp eval takes it."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    seed: Seed = 0,
) -> None:
    """Compress a model to many sizes and score each: what is measured of it is measured once."""
    from casp_plugin.evaluation.results import Evaluation
    from casp_plugin.evaluation.sweep import Point, begin, finished, frontier_table
    from casp_plugin.kv_cache import CompressedCache
    from casp_plugin.model.load import bytes_on_disk, load_model
    from casp_plugin.modifiers.recipes import load_recipe
    from casp_plugin.plan.plan import CompressionPlan
    from casp_plugin.report.figures.results import draw_frontier
    from casp_plugin.system.files import write_whole
    from casp_plugin.system.machine import installed_versions

    budgets = _numbers([*average_bits, *context.args])
    bare = skeleton(model, trust_remote_code)
    max_length = within_positions(bare.config, max_length)
    for scheme in kv_cache or ():
        CompressedCache(bare.config, scheme)
    wanted = _wanted(bare, recipe, budgets)
    columns = (text_column, image_column, video_column, question_column, answer_column)
    source = DataSource(dataset, split, dataset_config, *columns)
    judged = DataSource(heldout, heldout_split, dataset_config, *columns)
    facts = {
        "model": model,
        "dataset": [dataset, split, dataset_config, *columns],
        "heldout": [heldout, heldout_split, heldout_samples],
        "samples": samples,
        "max_length": max_length,
        "seed": seed,
    }
    scoring = {"samples": heldout_samples, "max_length": max_length, "stride": max_length}
    processor = load_processor(model, trust_remote_code)
    batches = calibration_batches(bare.config, processor, source, samples, max_length, seed)
    judged.read(bare.config, processor, heldout_samples, seed)  # that it can be read at all
    begin(output, facts, recipe)

    def point(name: str, scheme: str | None) -> Point:
        path, bits = wanted.get(name, (None, None))
        folder = output / name if path else model
        if path and not folder.exists():
            filled = load_recipe(path, bits, cache_dir=output / "cache")
            compress(model, filled, batches, folder, seed, None, trust_remote_code)
        reference = load_model(model, trust_remote_code)
        chosen = (reference if path or scheme else None, None, False, seed, scheme)
        measured = score(str(folder), judged, *chosen, trust_remote_code, **scoring)
        plan = CompressionPlan.load(folder) if bits else None
        return Point(
            name=_label(name, scheme),
            series=_label(_series(path) if path else name, scheme) if path or scheme else None,
            average_bits=plan and plan.reached_bits,
            bytes=bytes_on_disk(folder) or sum(each.nbytes for each in reference.parameters()),
            evaluation=Evaluation(
                model=str(folder),
                settings={"seed": seed, "dataset": heldout, "kv_cache": scheme, **scoring},
                versions=installed_versions(),
                measurements=measured,
            ),
        )

    schemes = (None, *(kv_cache or ()))
    makers = {
        _label(name, scheme): lambda name=name, scheme=scheme: point(name, scheme)
        for name in (model, *wanted)
        for scheme in schemes
    }
    points = finished(output, makers)
    table = frontier_table(points)
    console.print(table)
    text, picture = Console(file=io.StringIO(), width=1000), io.BytesIO()
    text.print(table)
    draw_frontier(points).savefig(picture, dpi=120)
    versions = ", ".join(f"{name} {each}" for name, each in installed_versions().items())
    note = (
        f"{model}, calibrated on {dataset} ({samples} x {max_length} tokens at most), scored "
        f"on {heldout} ({heldout_samples}), with 95 % intervals; seed {seed}; {versions}."
    )
    write_whole(output / "sweep.md", f"{text.file.getvalue().strip()}\n\n{note}\n")
    write_whole(output / "sweep.png", picture.getvalue())
    console.print(f"Wrote {output}: sweep.md, sweep.png, sweep.json, {len(wanted)} checkpoints")


def _wanted(
    bare, recipes: list[Path], budgets: list[float]
) -> dict[str, tuple[Path, float | None]]:
    """Recipe and budget of each point, by its name; no budget where a recipe takes none.

    :param bare: the model without weights
    :raises ValueError: if a budget cannot be reached, or two recipes are called the same
    """
    from casp_plugin.modifiers import plan_recipe
    from casp_plugin.modifiers.recipes import allocates_bits, load_recipe

    found = {}
    for path in recipes:
        allocates = allocates_bits(load_recipe(path))
        for bits in budgets if allocates else [None]:
            if allocates:
                plan_recipe(bare, load_recipe(path, bits))
            name = f"{_series(path)}_{str(bits).removesuffix('.0')}" if allocates else path.stem
            if found.setdefault(name, (path, bits))[0] != path:
                raise ValueError(f"--recipe: {path} and {found[name][0]} both make {name}")
    return found


def _label(name: str, scheme: str | None) -> str:
    """What a point is called with a cache."""
    return name if scheme is None else f"{name}, {scheme}"


def _series(recipe: Path) -> str:
    """Name of a recipe without the budget that it ends with."""
    return re.sub(r"_\d+(\.\d+)?$", "", recipe.stem)


def _numbers(words: list[str]) -> list[float]:
    """Budgets from ``2.1,2.5 3``."""
    try:
        return [float(number) for word in words for number in word.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"--average-bits {' '.join(words)}: numbers are needed") from None
