"""Commands that make checkpoints: plan, run, check, fold."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from casp_plugin.cli.app import app
from casp_plugin.cli.data import DataSource, calibration_batches, load_processor
from casp_plugin.cli.options import (
    CACHE,
    CACHE_LIMIT,
    DATASET,
    AnswerColumn,
    Cache,
    CacheLimit,
    Checkpoint,
    Column,
    ConfigName,
    ImageColumn,
    Length,
    Model,
    NoCache,
    QuestionColumn,
    RecipeFile,
    Samples,
    Seed,
    Split,
    VideoColumn,
    console,
)


@app.command()
def plan(
    model: Model,
    recipe: RecipeFile,
    dataset: Annotated[str | None, DATASET] = None,
    text_column: Column = "text",
    image_column: ImageColumn = "image",
    video_column: VideoColumn = None,
    question_column: QuestionColumn = "question",
    answer_column: AnswerColumn = "answer",
    split: Split = "train",
    dataset_config: ConfigName = None,
    samples: Samples = 512,
    max_length: Length = 2048,
    seed: Seed = 0,
    cache: Cache = CACHE,
    no_cache: NoCache = False,
    cache_limit: CacheLimit = CACHE_LIMIT,
    json: Annotated[Path | None, typer.Option(help="Save the plan as JSON here.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw bits per layer here.")] = None,
) -> None:
    """Show what a recipe would do: units, bits, ranks, exact bytes.

    Without --dataset nothing heavy runs, not even the weights are read, and what only
    statistics can tell shows as '?'.
    """
    from casp_plugin.models import load_model
    from casp_plugin.modifiers import plan_recipe
    from casp_plugin.modifiers.recipes import load_recipe

    bare = skeleton(model)  # refuses a quantized model before its weights are read
    filled = load_recipe(recipe, None, None if no_cache else cache, cache_limit)
    _tell_estimate(bare, filled, samples, max_length)
    if dataset is None:
        made = plan_recipe(bare, filled)
    else:
        columns = (text_column, image_column, video_column, question_column, answer_column)
        source = DataSource(dataset, split, dataset_config, *columns)
        batches = calibration_batches(
            bare.config, load_processor(model), source, samples, max_length, seed
        )
        _seed(seed)
        made = plan_recipe(load_model(model), filled, batches)
    for table in made.tables():
        console.print(table)
    if json is not None:
        made.save(json)
    if png is not None:
        made.plot(png)


@app.command()
def run(
    model: Model,
    recipe: RecipeFile,
    dataset: Annotated[str, DATASET],
    output: Annotated[Path, typer.Option(help="Folder to write; must not exist or be empty.")],
    text_column: Column = "text",
    image_column: ImageColumn = "image",
    video_column: VideoColumn = None,
    question_column: QuestionColumn = "question",
    answer_column: AnswerColumn = "answer",
    split: Split = "train",
    dataset_config: ConfigName = None,
    samples: Samples = 512,
    max_length: Length = 2048,
    batch_size: Annotated[int, typer.Option(help="Samples a batch.", min=1)] = 1,
    seed: Seed = 0,
    cache: Cache = CACHE,
    no_cache: NoCache = False,
    cache_limit: CacheLimit = CACHE_LIMIT,
) -> None:
    """Compress a model: llm-compressor's oneshot with the plugin, written whole or not at all.

    On several GPUs, or processes: torchrun --nproc-per-node N --no-python casp run ...
    """
    from casp_plugin.modifiers import plan_recipe
    from casp_plugin.modifiers.recipes import load_recipe
    from casp_plugin.ranks import barrier, join_torchrun

    join_torchrun()
    check_output(output)
    barrier()  # all have looked before any writes
    bare = skeleton(model)
    filled = load_recipe(recipe, None, None if no_cache else cache, cache_limit)
    _tell_estimate(bare, filled, samples, max_length)
    console.print(plan_recipe(bare, filled).tables()[-1])
    columns = (text_column, image_column, video_column, question_column, answer_column)
    source = DataSource(dataset, split, dataset_config, *columns)
    amount = (samples, max_length, seed, batch_size)
    batches = calibration_batches(bare.config, load_processor(model), source, *amount)
    compressed = compress(model, filled, batches, output, seed)
    console.print(compressed.casp_plan.tables()[-1])
    console.print(f"Wrote {output}. Next: casp check {output}")


def _tell_estimate(bare, recipe, samples: int, max_length: int) -> None:
    """Say what measuring will take, before it starts.

    :param recipe: an instance of llm-compressor's ``Recipe``
    """
    from casp_plugin.estimate import Data
    from casp_plugin.modifiers import estimate_recipe

    expected = estimate_recipe(bare, recipe, Data(samples, max_length))
    console.print(
        f"Measuring {samples} samples of {max_length} tokens takes about "
        f"{expected.memory / 1e9:.1f} GB of memory, {expected.disk / 1e9:.1f} GB on disk and "
        f"{expected.duration}; what the cache has is not measured again"
    )


def compress(model: str, recipe, batches, output: Path, seed: int):
    """A model, compressed by a recipe and written to a folder.

    :param recipe: an instance of llm-compressor's ``Recipe``
    :param batches: calibration batches
    """
    from llmcompressor import oneshot

    from casp_plugin.checkpoint import copy_processor
    from casp_plugin.files import whole_folder
    from casp_plugin.models import load_model
    from casp_plugin.ranks import barrier, is_source_process
    from casp_plugin.tracing import check_traceable

    loaded = load_model(model)
    check_traceable(loaded, batches)
    _seed(seed)
    with whole_folder(output) as partial:
        compressed = oneshot(
            model=loaded,
            processor=load_processor(model),
            recipe=recipe,
            dataset=batches,
            output_dir=str(partial),
        )
        barrier()
        if is_source_process():
            copy_processor(model, partial)
    return compressed


@app.command()
def check(
    checkpoint: Checkpoint,
    reload: Annotated[bool, typer.Option(help="Also load the model and run it.")] = True,
) -> None:
    """Verify a checkpoint: tensors, sizes against the plan, kernels, reload."""
    from casp_plugin.check import check as findings_of

    table = Table(title=str(checkpoint), title_justify="left")
    for column in ("check", "result", "detail"):
        table.add_column(column)
    findings = findings_of(checkpoint, reload=reload)
    marks = {True: "ok", False: "FAILED", None: "note"}
    for finding in findings:
        table.add_row(finding.what, marks[finding.passed], finding.detail)
    console.print(table)
    if any(finding.passed is False for finding in findings):
        raise typer.Exit(1)


@app.command()
def fold(
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Argument(help="Folder to write.", metavar="OUT2")],
) -> None:
    """Write a copy without factors, for transformers and vLLM without this package.

    Layers that stock vLLM cannot fuse become dense, so the copy is larger. Its bits need kernels
    all the same: stock vLLM on CPU has one for 4 bits only.
    """
    from casp_plugin.fold import fold as fold_checkpoint
    from casp_plugin.models import bytes_on_disk

    dense = fold_checkpoint(checkpoint, output)
    before, after = map(bytes_on_disk, (checkpoint, output))
    console.print(
        f"Wrote {output}: {len(dense)} layers are dense now, {before:,} -> {after:,} bytes"
    )


def skeleton(model: str):
    """The model without weights, from its config alone.

    :raises ValueError: if the model cannot be found, or is quantized already
    """
    from transformers import AutoConfig

    from casp_plugin.models import bare_model

    config = AutoConfig.from_pretrained(model)
    if getattr(config, "quantization_config", None):
        method = config.quantization_config.get("quant_method")
        raise ValueError(
            f"{model} is already quantized ({method}): start from the full-precision model"
        )
    bare = bare_model(config)
    bare.config._name_or_path = model
    return bare


def _seed(seed: int) -> None:
    from transformers import set_seed

    set_seed(seed)


def check_output(output: Path) -> None:
    """Fail now rather than after hours.

    :raises ValueError: if the folder cannot be written
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {output} exists and is not an empty folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        tempfile.TemporaryFile(dir=output if output.exists() else output.parent).close()
    except OSError as error:
        raise ValueError(f"--output {output} cannot be written: {error}") from None
