"""The command that finds the parts of a model that can take fewer bits."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from casp_plugin.cli.app import command
from casp_plugin.cli.data import (
    CalibrationOptions,
    HeldoutOptions,
    TaskColumn,
    tell_text_alone,
    within_positions,
)
from casp_plugin.cli.options import Model, TrustRemoteCode
from casp_plugin.cli.output import console, show


@dataclass(frozen=True, kw_only=True)
class StudyCalibrationOptions(CalibrationOptions):
    """Data that the quantizers of a study are calibrated on."""

    dataset: Annotated[str, typer.Option(help="Data that GPTQ and AWQ are calibrated on.")] = (
        "bundled"
    )
    samples: Annotated[int, typer.Option(help="Calibration samples.", min=1)] = 128


@dataclass(frozen=True, kw_only=True)
class StudyHeldoutOptions(HeldoutOptions):
    """Data that the models of a study are scored on."""

    heldout_samples: Annotated[int, typer.Option(help="Texts or questions at most.", min=1)] = 128
    task_column: TaskColumn = None


@command()
def sensitivity(
    model: Model,
    output: Annotated[
        Path, typer.Option(help="Folder of the study; one that was stopped goes on.")
    ],
    calibration: StudyCalibrationOptions,
    heldout: StudyHeldoutOptions,
    metric: Annotated[
        str,
        typer.Option(
            help="Metric that importance comes from: perplexity, exact_match or f1. Without the "
            "last two no model answers, which takes less time."
        ),
    ] = "perplexity",
    methods: Annotated[
        str, typer.Option(help="Of uniform, gptq and awq, by commas.")
    ] = "uniform,gptq,awq",
    max_points: Annotated[
        int | None,
        typer.Option(
            help="Models to score at most, those first that cover the grid best; all unless told.",
            min=1,
        ),
    ] = None,
    group_size: Annotated[int, typer.Option(help="Of GPTQ and AWQ; -1 for one scale a row.")] = 128,
    ignore: Annotated[
        list[str] | None,
        typer.Option(help="Layers that stay as they are; the output head unless told."),
    ] = None,
    processes: Annotated[
        int,
        typer.Option(help="Models scored at a time; fewer where memory does not allow it.", min=1),
    ] = 1,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Find the parts of a model that can take fewer bits.

    Parts are quantized one by one and together, and every model is scored. The grid and the
    analysis are those of arXiv 2601.15287. Writes points.parquet, analysis.json, sensitivity.md,
    pictures, and sensitivity.json for BitAllocationModifier(importance: ...).
    """
    from casp_plugin.data.data_source import load_processor
    from casp_plugin.model.load import bare_source_model
    from casp_plugin.model.units import OUTPUT_HEAD
    from casp_plugin.sensitivity.grid import UNIFORM
    from casp_plugin.sensitivity.scoring import processes_of
    from casp_plugin.sensitivity.study import (
        Calibration,
        Study,
        check_method,
        find_layers,
        points_of,
    )
    from casp_plugin.sensitivity.study_run import StudySettings, run_study

    bare = bare_source_model(model, trust_remote_code)
    max_length = within_positions(bare.config, calibration.max_length)
    calibration = replace(calibration, max_length=max_length)
    settings = StudySettings(
        model=model,
        source=calibration.source(),
        samples=calibration.samples,
        heldout=heldout.source(calibration),
        heldout_samples=heldout.heldout_samples,
        task_column=heldout.task_column,
        metric=metric,
        group_size=group_size,
        ignore=ignore,
        max_length=max_length,
        seed=calibration.seed,
    )
    layers = find_layers(bare, ignore or [OUTPUT_HEAD])
    wanted = list(dict.fromkeys(method.strip() for method in methods.split(",")))
    for method in wanted:
        check_method(method, bare, layers, group_size)
    configurations = points_of(wanted, layers, bare.dtype, group_size, max_points)
    processor = load_processor(model, trust_remote_code)
    tell_text_alone(settings.heldout, bare.config)
    data = settings.scored_data(bare.config, processor)
    batches = None
    if set(wanted) - {UNIFORM}:
        batches = calibration.batches(bare.config, processor)
    allowed = processes_of(processes, sum(tensor.nbytes for tensor in bare.state_dict().values()))
    if allowed < processes:
        console.print(f"Memory allows {allowed} processes")
    console.print(f"{len(configurations)} models of {len(layers)} layers in {output}")
    study = Study(
        model,
        layers,
        bare.dtype,
        data,
        Calibration(batches, group_size, calibration.seed),
        output,
        allowed,
        trust_remote_code,
    )
    for title, table in run_study(settings, study, configurations).items():
        console.print(title)
        show(table)
    console.print(f"Wrote {output}: {', '.join(sorted(path.name for path in output.iterdir()))}")
