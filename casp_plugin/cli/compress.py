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
    Pipeline,
    QuestionColumn,
    RecipeFile,
    Samples,
    Seed,
    Split,
    TrustRemoteCode,
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
    trust_remote_code: TrustRemoteCode = False,
    json: Annotated[Path | None, typer.Option(help="Save the plan as JSON here.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw bits per layer here.")] = None,
) -> None:
    """Show what a recipe would do: units, bits, ranks, exact bytes.

    Without --dataset nothing heavy runs, not even the weights are read, and what only
    statistics can tell shows as '?'.
    """
    from casp_plugin.model.load import load_model
    from casp_plugin.modifiers import plan_recipe
    from casp_plugin.modifiers.recipes import load_recipe
    from casp_plugin.plan.tables import plan_tables

    for path in filter(None, (json, png)):
        path.parent.mkdir(parents=True, exist_ok=True)  # now, not after hours
    # refuses a quantized model before its weights are read
    bare = skeleton(model, trust_remote_code)
    filled = load_recipe(recipe, None, None if no_cache else cache, cache_limit)
    _tell_estimate(bare, filled, samples, max_length)
    if dataset is None:
        made = plan_recipe(bare, filled)
    else:
        columns = (text_column, image_column, video_column, question_column, answer_column)
        source = DataSource(dataset, split, dataset_config, *columns)
        processor = load_processor(model, trust_remote_code)
        batches = calibration_batches(bare.config, processor, source, samples, max_length, seed)
        _seed(seed)
        made = plan_recipe(load_model(model, trust_remote_code), filled, batches)
    for table in plan_tables(made):
        console.print(table)
    if json is not None:
        made.save(json)
    if png is not None:
        _draw(made, png)


def _draw(plan, path: Path) -> None:
    """Draw bits over the layers, and how sparse the attention is, as a PNG.

    :param plan: a ``CompressionPlan``
    :raises ValueError: if its bits are not decided yet, or matplotlib is missing
    """
    if not plan.decided:
        raise ValueError("nothing to draw: the plan has no bits yet (it needs statistics)")
    try:  # an extra
        from casp_plugin.report.figures.plans import draw
    except ImportError:
        raise ValueError("drawing needs: pip install 'casp-plugin[report]'") from None
    draw(plan).savefig(path, dpi=120)


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
    pipeline: Pipeline = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Compress a model: llm-compressor's oneshot with the plugin, written whole or not at all.

    On several GPUs, or processes: torchrun --nproc-per-node N --no-python casp run ...
    """
    from casp_plugin.checkpoint.vllm_support import quantized_connector
    from casp_plugin.modifiers import plan_recipe
    from casp_plugin.modifiers.recipes import load_recipe
    from casp_plugin.plan.tables import plan_tables
    from casp_plugin.system.distributed import barrier, is_source_process, join_torchrun

    join_torchrun()
    check_output(output)
    barrier()  # all have looked before any writes
    bare = skeleton(model, trust_remote_code)
    filled = load_recipe(recipe, None, None if no_cache else cache, cache_limit)
    _tell_estimate(bare, filled, samples, max_length)
    planned = plan_recipe(bare, filled)
    quantized = [name for unit in planned.units for name in unit.modules]
    if why := quantized_connector([type(bare).__name__], quantized):
        raise ValueError(why)
    console.print(plan_tables(planned)[-1])
    columns = (text_column, image_column, video_column, question_column, answer_column)
    source = DataSource(dataset, split, dataset_config, *columns)
    amount = (samples, max_length, seed, batch_size)
    processor = load_processor(model, trust_remote_code)
    batches = calibration_batches(bare.config, processor, source, *amount)
    del bare
    made = compress(model, filled, batches, output, seed, pipeline, trust_remote_code).casp_plan
    console.print(plan_tables(made)[-1])
    console.print(f"Wrote {output}")
    if is_source_process():
        _check(output, True, trust_remote_code)


def _tell_estimate(bare, recipe, samples: int, max_length: int) -> None:
    """Say what measuring will take, before it starts.

    :param recipe: an instance of llm-compressor's ``Recipe``
    """
    from casp_plugin.modifiers import estimate_recipe
    from casp_plugin.modifiers.run_estimate import Data

    expected = estimate_recipe(bare, recipe, Data(samples, max_length))
    console.print(
        f"Measuring {samples} samples of {max_length} tokens takes about "
        f"{expected.memory / 1e9:.1f} GB of memory, {expected.disk / 1e9:.1f} GB on disk and "
        f"{expected.duration}; what the cache has is not measured again"
    )


def compress(
    model: str,
    recipe,
    batches,
    output: Path,
    seed: int,
    pipeline: str | None = None,
    trust_remote_code: bool = False,
):
    """Compress a model by a recipe, write it to a folder and return it.

    :param recipe: an instance of llm-compressor's ``Recipe``
    :param batches: calibration batches
    :param pipeline: of llm-compressor; None for its default
    :param trust_remote_code: whether Python code that comes with the model may run
    """
    from llmcompressor import oneshot

    from casp_plugin.model.experts import linearize_experts
    from casp_plugin.model.load import load_model
    from casp_plugin.statistics.tracing import check_traceable
    from casp_plugin.system.distributed import barrier
    from casp_plugin.system.files import whole_folder

    loaded = load_model(model, trust_remote_code)
    linearize_experts(loaded)
    if pipeline is None:
        check_traceable(loaded, batches)
    _seed(seed)
    with whole_folder(output) as partial:
        compressed = oneshot(
            model=loaded,
            processor=_OwnFiles(model),
            recipe=recipe,
            dataset=batches,
            output_dir=str(partial),
            trust_remote_code_model=trust_remote_code,
            **({"pipeline": pipeline} if pipeline else {}),
        )
        barrier()
    return compressed


class _OwnFiles:
    """Stands for the processor where oneshot saves it: transformers would write its files in
    another form, or not at all. The model's own are copied."""

    def __init__(self, model: str):
        self.model = model

    def save_pretrained(self, folder: str) -> None:
        """Copy what is not there yet."""
        from casp_plugin.checkpoint.source import copy_files, source_folder

        source = source_folder(self.model)
        if source is not None:
            copy_files(source, Path(folder))


@app.command()
def check(
    checkpoint: Checkpoint,
    reload: Annotated[bool, typer.Option(help="Also load the model and run it.")] = True,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Verify a checkpoint: tensors, sizes against the plan, kernels, reload."""
    _check(checkpoint, reload, trust_remote_code)


def _check(checkpoint: Path, reload: bool, trust_remote_code: bool) -> None:
    """Print what is found; exit with 1 where the checkpoint is broken."""
    from casp_plugin.checkpoint.check import check as findings_of

    table = Table(title=str(checkpoint), title_justify="left")
    for column in ("check", "result", "detail"):
        table.add_column(column)
    findings = findings_of(checkpoint, reload, trust_remote_code)
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
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a copy without factors, for transformers and vLLM without this package.

    Layers that stock vLLM cannot fuse become dense, so the copy is larger. Its bits need kernels
    all the same: stock vLLM on CPU has one for 4 bits only.
    """
    from casp_plugin.checkpoint.fold import fold as fold_checkpoint
    from casp_plugin.model.load import bytes_on_disk

    dense = fold_checkpoint(checkpoint, output, trust_remote_code)
    before, after = map(bytes_on_disk, (checkpoint, output))
    console.print(
        f"Wrote {output}: {len(dense)} layers are dense now, {before:,} -> {after:,} bytes"
    )


def skeleton(model: str, trust_remote_code: bool = False):
    """Return the model without weights, from its config alone.

    :raises ValueError: if the model cannot be found, is quantized already, or is of a class that
        cannot be compressed
    """
    from casp_plugin.model.load import bare_model, read_model_config

    config = read_model_config(model, trust_remote_code)
    if getattr(config, "quantization_config", None):
        method = config.quantization_config.get("quant_method")
        raise ValueError(
            f"{model} is already quantized ({method}): start from the full-precision model"
        )
    bare = bare_model(config, trust_remote_code)
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
