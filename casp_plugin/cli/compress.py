"""Commands that make checkpoints: plan, run, check, fold."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from casp_plugin.cli.app import command
from casp_plugin.cli.data import DATASET, CalibrationOptions
from casp_plugin.cli.options import (
    AverageBits,
    CacheOptions,
    Checkpoint,
    Model,
    Pipeline,
    RecipeFile,
    TrustRemoteCode,
    parse_budget,
)
from casp_plugin.cli.output import console, show
from casp_plugin.cli.progress import tell


@dataclass(frozen=True, kw_only=True)
class PlanCalibrationOptions(CalibrationOptions):
    """Data that a model is calibrated on, if any."""

    dataset: Annotated[str | None, DATASET] = None


@command()
def plan(
    model: Model,
    recipe: RecipeFile,
    calibration: PlanCalibrationOptions,
    cache: CacheOptions,
    average_bits: AverageBits = None,
    trust_remote_code: TrustRemoteCode = False,
    units: Annotated[
        bool, typer.Option("--units", help="Show every unit, factored layer and attention module.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="Save the plan as JSON here.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw bits per layer here.")] = None,
) -> None:
    """Show the plan of a recipe: units, bits, ranks, exact bytes.

    Without --dataset nothing heavy runs, not even the weights are read, and what only
    statistics can tell shows as '?'.
    """
    from transformers import set_seed

    from casp_plugin.data.data_source import load_processor
    from casp_plugin.model.load import bare_source_model, load_model
    from casp_plugin.modifiers import plan_recipe
    from casp_plugin.plan.tables import plan_tables, unit_tables

    for path in filter(None, (json, png)):
        path.parent.mkdir(parents=True, exist_ok=True)  # now, not after hours
    # refuses a quantized model before its weights are read
    bare = bare_source_model(model, trust_remote_code)
    filled = _load_recipe(recipe, average_bits, cache)
    made = plan_recipe(bare, filled)
    _tell_estimate(bare, filled, made, calibration)
    if calibration.dataset is not None:
        processor = load_processor(model, trust_remote_code)
        batches = calibration.batches(bare.config, processor)
        set_seed(calibration.seed)
        tell("loading")
        made = plan_recipe(load_model(model, trust_remote_code), filled, batches)
    show(*plan_tables(made))
    if units:
        show(*unit_tables(made))
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


@command()
def run(
    model: Model,
    recipe: RecipeFile,
    output: Annotated[Path, typer.Option(help="Folder to write; must not exist or be empty.")],
    calibration: CalibrationOptions,
    cache: CacheOptions,
    average_bits: AverageBits = None,
    batch_size: Annotated[int, typer.Option(help="Samples a batch.", min=1)] = 1,
    pipeline: Pipeline = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Compress a model: llm-compressor's oneshot with the plugin, written whole or not at all.

    On several GPUs, or processes: torchrun --nproc-per-node N --no-python casp run ...
    """
    from casp_plugin.checkpoint.vllm_support import quantized_connector
    from casp_plugin.data.data_source import load_processor
    from casp_plugin.model.load import bare_source_model
    from casp_plugin.modifiers import plan_recipe
    from casp_plugin.modifiers.compression import compress
    from casp_plugin.plan.tables import total_table
    from casp_plugin.system.distributed import barrier, join_torchrun, leave_torchrun

    join_torchrun()
    check_output(output)
    barrier()  # all have looked before any writes
    bare = bare_source_model(model, trust_remote_code)
    filled = _load_recipe(recipe, average_bits, cache)
    planned = plan_recipe(bare, filled)
    _tell_estimate(bare, filled, planned, calibration)
    quantized = [name for unit in planned.units for name in unit.modules]
    if why := quantized_connector([type(bare).__name__], quantized):
        raise ValueError(why)
    show(total_table(planned))
    processor = load_processor(model, trust_remote_code)
    batches = calibration.batches(bare.config, processor, batch_size)
    del bare
    tell("loading")
    made = compress(
        model, filled, batches, output, calibration.seed, pipeline, trust_remote_code
    ).casp_plan
    show(total_table(made))
    console.print(f"Wrote {output}")
    if leave_torchrun():
        tell("checking")
        _check(output, True, trust_remote_code)


def _load_recipe(recipe: Path, average_bits: str | None, cache: CacheOptions):
    """Return a recipe with the budget and the cache of the command line filled in.

    :raises ValueError: if it is no recipe, or takes no such budget
    """
    from casp_plugin.modifiers.recipes import load_recipe

    budget = None if average_bits is None else parse_budget(average_bits)
    return load_recipe(recipe, budget, cache.folder, cache.cache_limit)


def _tell_estimate(bare, recipe, planned, calibration: CalibrationOptions) -> None:
    """Say what measuring will take, before it starts.

    :param recipe: an instance of llm-compressor's ``Recipe``
    :param planned: its ``CompressionPlan`` without data
    """
    from casp_plugin.modifiers import estimate_recipe
    from casp_plugin.modifiers.run_estimate import Data
    from casp_plugin.system.messages import size_text

    samples, max_length = calibration.samples, calibration.max_length
    expected = estimate_recipe(bare, recipe, Data(samples, max_length), planned)
    console.print(
        f"Measuring {samples} samples of {max_length} tokens takes about "
        f"{size_text(expected.memory)} of memory, {size_text(expected.disk)} on disk and "
        f"{expected.duration}; what the cache has is not measured again"
    )


@command()
def check(
    checkpoint: Checkpoint,
    reload: Annotated[bool, typer.Option(help="Also load the model and run it.")] = True,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Verify a checkpoint: tensors, sizes against the plan, kernels, reload."""
    _check(checkpoint, reload, trust_remote_code)


def _check(checkpoint: Path, reload: bool, trust_remote_code: bool) -> None:
    """Print the findings; exit with 1 where the checkpoint is broken."""
    from casp_plugin.checkpoint.check import check as findings_of

    table = Table("check", "result", "detail", title=str(checkpoint), title_justify="left")
    findings = findings_of(checkpoint, reload, trust_remote_code)
    marks = {True: "ok", False: "FAILED", None: "note"}
    for finding in findings:
        table.add_row(finding.what, marks[finding.passed], finding.detail)
    show(table)
    if any(finding.passed is False for finding in findings):
        raise typer.Exit(1)


@command()
def fold(
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Argument(help="Folder to write.", metavar="OUT2")],
    calibration: PlanCalibrationOptions,
    bits: Annotated[
        int | None,
        typer.Option(
            help="Round what becomes dense to this width by GPTQ, which takes --dataset.",
            min=2,
            max=8,
        ),
    ] = None,
    group_size: Annotated[int, typer.Option(help="Columns that share a scale at --bits.")] = 128,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a copy without factors and codebooks, for transformers and vLLM without this package.

    Layers that stock vLLM cannot fuse become dense, so the copy is larger; --bits rounds them. Its
    bits need kernels all the same: stock vLLM on CPU has one for 4 bits only.
    """
    from casp_plugin.checkpoint.fold import fold as fold_checkpoint
    from casp_plugin.model.load import bytes_on_disk

    if (bits is None) != (calibration.dataset is None):
        raise ValueError("--bits and --dataset go together: GPTQ rounds on calibration data")
    if bits is None:
        dense = fold_checkpoint(checkpoint, output, trust_remote_code)
        became = "dense"
    else:
        from casp_plugin.modifiers.compression import compress  # takes seconds

        check_output(output)
        batches = _batches_to_fold(checkpoint, group_size, calibration, trust_remote_code)
        with tempfile.TemporaryDirectory(prefix="casp-", dir=output.parent) as folder:
            whole = Path(folder) / "dense"
            dense = fold_checkpoint(checkpoint, whole, trust_remote_code)
            recipe = _one_width(dense, bits, group_size)
            seed = calibration.seed
            compress(str(whole), recipe, batches, output, seed, None, trust_remote_code)
        became = f"of {bits} bits"
    before, after = map(bytes_on_disk, (checkpoint, output))
    console.print(
        f"Wrote {output}: {len(dense)} layers are {became} now, {before:,} -> {after:,} bytes"
    )


def _batches_to_fold(
    checkpoint: Path, group_size: int, calibration: CalibrationOptions, trust_remote_code: bool
):
    """Return the calibration batches for rounding what becomes dense.

    :raises ValueError: if it cannot be rounded, before anything is written
    """
    from casp_plugin.checkpoint.format import read_config, read_section
    from casp_plugin.data.data_source import load_processor
    from casp_plugin.model.load import bare_model, read_model_config

    quantization = read_config(checkpoint).get("quantization_config") or {}
    if quantization.get("config_groups"):
        raise ValueError(f"--bits: {checkpoint} holds integers already; fold it without")
    config = read_model_config(str(checkpoint), trust_remote_code)
    bare = bare_model(config, trust_remote_code)
    for name in sorted(read_section(quantization).layers):
        columns = bare.get_submodule(name).in_features
        if group_size < 1 or columns % group_size:
            raise ValueError(
                f"--group-size {group_size} does not divide the {columns} columns of {name}"
            )
    return calibration.batches(config, load_processor(str(checkpoint), trust_remote_code))


def _one_width(layers: list[str], bits: int, group_size: int):
    """Return a recipe that rounds layers to one width by GPTQ."""
    from compressed_tensors.quantization import QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.recipe import Recipe

    from casp_plugin.model.schemes import weight_args

    scheme = QuantizationScheme(targets=layers, weights=weight_args(bits, group_size))
    modifier = GPTQModifier(targets=layers, ignore=[], config_groups={"group_0": scheme})
    return Recipe.from_modifiers([modifier])


def check_output(output: Path) -> None:
    """Check that a folder can be written, now rather than after hours.

    :raises ValueError: if the folder cannot be written
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {output} exists and is not an empty folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        tempfile.TemporaryFile(dir=output if output.exists() else output.parent).close()
    except OSError as error:
        raise ValueError(f"--output {output} cannot be written: {error}") from None
