"""The command that tells which parts of a model can take fewer bits."""

from dataclasses import astuple, dataclass, replace
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
from casp_plugin.cli.options import Model, TrustRemoteCode, console, show

#: metrics that need models to answer
ANSWERED = ("exact_match", "f1")
METRICS = ("perplexity", *ANSWERED)


@dataclass(frozen=True, kw_only=True)
class StudyCalibrationOptions(CalibrationOptions):
    """What the quantizers of a study are calibrated on."""

    dataset: Annotated[
        str, typer.Option("--dataset", "--data", help="What GPTQ and AWQ are calibrated on.")
    ] = "bundled"
    samples: Annotated[int, typer.Option(help="Calibration samples.", min=1)] = 128


@dataclass(frozen=True, kw_only=True)
class StudyHeldoutOptions(HeldoutOptions):
    """What the models of a study are scored on."""

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
            help="What importance is told from: perplexity, exact_match or f1. Without the last "
            "two no model answers, which takes less time."
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
    """Quantize parts of a model one by one and together, score each, tell what matters.

    The grid and the analysis are those of arXiv 2601.15287. Writes points.parquet, analysis.json,
    sensitivity.md, pictures, and sensitivity.json for BitAllocationModifier(importance: ...).
    """
    from casp_plugin.data.data_source import load_processor
    from casp_plugin.data.sources import adds_special_tokens
    from casp_plugin.evaluation.study_folder import begin
    from casp_plugin.model.units import OUTPUT_HEAD
    from casp_plugin.modifiers.compression import bare_source_model
    from casp_plugin.sensitivity.grid import UNIFORM
    from casp_plugin.sensitivity.scoring import Judged, processes_of
    from casp_plugin.sensitivity.study import (
        Calibration,
        Study,
        check_method,
        find_layers,
        points_of,
    )
    from casp_plugin.sensitivity.summary import analyse_all, summarise
    from casp_plugin.system.machine import installed_versions

    if metric not in METRICS:
        raise ValueError(f"--metric {metric!r} must be one of {', '.join(METRICS)}")
    bare = bare_source_model(model, trust_remote_code)
    max_length = within_positions(bare.config, calibration.max_length)
    calibration, seed = replace(calibration, max_length=max_length), calibration.seed
    layers = find_layers(bare, ignore or [OUTPUT_HEAD])
    wanted = list(dict.fromkeys(method.strip() for method in methods.split(",")))
    for method in wanted:
        check_method(method, bare, layers, group_size)
    configurations = points_of(wanted, layers, bare.dtype, group_size, max_points)
    processor = load_processor(model, trust_remote_code)
    source, judged = calibration.source(), heldout.source(calibration)
    tell_text_alone(judged, bare.config)
    shown = judged.shows_images(bare.config)
    if metric in ANSWERED and not shown:
        raise ValueError(f"--metric {metric} needs questions about images; texts have perplexity")
    if shown:
        questions = judged.conversations(heldout.heldout_samples, seed, heldout.task_column)
        data = {"questions": tuple(questions), "answers": metric in ANSWERED}
    else:
        tokenizer = getattr(processor, "tokenizer", processor)
        read = judged.texts(tokenizer, heldout.heldout_samples, seed)
        data = {"texts": tuple(read["text"]), "add_special_tokens": adds_special_tokens(read)}
    batches = None
    if set(wanted) - {UNIFORM}:
        batches = calibration.batches(bare.config, processor)
    facts = {
        "model": model,
        "dataset": [*astuple(source), calibration.samples],
        "heldout": [*astuple(heldout)],
        "metric": metric,
        "group_size": group_size,
        "ignore": ignore,
        "max_length": max_length,
        "seed": seed,
    }
    begin(output, facts, kind="study")
    model_bytes = sum(tensor.nbytes for tensor in bare.state_dict().values())
    allowed = processes_of(processes, model_bytes)
    if allowed < processes:
        console.print(f"Memory allows {allowed} processes")
    console.print(f"{len(configurations)} models of {len(layers)} layers in {output}")
    study = Study(
        model,
        layers,
        bare.dtype,
        Judged(processor, max_length=max_length, **data),
        Calibration(batches, group_size, seed),
        output,
        allowed,
        trust_remote_code,
    )
    points = study.run(configurations)
    analyses = analyse_all(points, layers, metric)
    versions = ", ".join(f"{name} {version}" for name, version in installed_versions().items())
    note = (
        f"{model}, {len(points)} models, calibrated on {source.dataset} ({calibration.samples} x "
        f"{max_length} tokens at most), scored on {judged.dataset} ({heldout.heldout_samples}); "
        f"group size {group_size}; seed {seed}; {versions}."
    )
    for title, table in summarise(output, model, points, analyses, metric, note).items():
        console.print(title)
        show(table)
    console.print(f"Wrote {output}: {', '.join(sorted(path.name for path in output.iterdir()))}")
