"""The command that tells which parts of a model can take fewer bits."""

from pathlib import Path
from typing import Annotated

import typer

from casp_plugin.cli.app import app
from casp_plugin.cli.compress import skeleton
from casp_plugin.cli.data import (
    DataSource,
    calibration_batches,
    load_processor,
    within_positions,
)
from casp_plugin.cli.options import (
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
    TaskColumn,
    TrustRemoteCode,
    VideoColumn,
    console,
)

#: metrics that need models to answer
ANSWERED = ("exact_match", "f1")
METRICS = ("perplexity", *ANSWERED)


@app.command()
def sensitivity(
    model: Model,
    output: Annotated[
        Path, typer.Option(help="Folder of the study; one that was stopped goes on.")
    ],
    dataset: Annotated[
        str, typer.Option("--dataset", "--data", help="What GPTQ and AWQ are calibrated on.")
    ] = "bundled",
    heldout: Heldout = "bundled-heldout",
    heldout_split: HeldoutSplit = "test",
    heldout_samples: HeldoutSamples = 128,
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
    text_column: Column = "text",
    image_column: ImageColumn = "image",
    video_column: VideoColumn = None,
    question_column: QuestionColumn = "question",
    answer_column: AnswerColumn = "answer",
    task_column: TaskColumn = None,
    split: Split = "train",
    dataset_config: ConfigName = None,
    samples: Samples = 128,
    max_length: Length = 2048,
    processes: Annotated[
        int,
        typer.Option(help="Models scored at a time; fewer where memory does not allow it.", min=1),
    ] = 1,
    trust_remote_code: TrustRemoteCode = False,
    seed: Seed = 0,
) -> None:
    """Quantize parts of a model one by one and together, score each, tell what matters.

    The grid and the analysis are those of arXiv 2601.15287. Writes points.parquet, analysis.json,
    sensitivity.md, pictures, and sensitivity.json for BitAllocationModifier(importance: ...).
    """
    from casp_plugin.data.sources import adds_special_tokens
    from casp_plugin.evaluation.sweep import begin
    from casp_plugin.model.units import OUTPUT_HEAD
    from casp_plugin.sensitivity.grid import UNIFORM
    from casp_plugin.sensitivity.study import (
        Calibration,
        Judged,
        Study,
        check_method,
        find_layers,
        points_of,
        processes_of,
    )
    from casp_plugin.sensitivity.summary import analyse_all, summarise
    from casp_plugin.system.machine import installed_versions

    if metric not in METRICS:
        raise ValueError(f"--metric {metric!r} must be one of {', '.join(METRICS)}")
    bare = skeleton(model, trust_remote_code)
    max_length = within_positions(bare.config, max_length)
    layers = find_layers(bare, ignore or [OUTPUT_HEAD])
    wanted = list(dict.fromkeys(method.strip() for method in methods.split(",")))
    for method in wanted:
        check_method(method, bare, layers, group_size)
    configurations = points_of(wanted, layers, bare.dtype, group_size, max_points)
    columns = (text_column, image_column, video_column, question_column, answer_column)
    processor = load_processor(model, trust_remote_code)
    source = DataSource(dataset, split, dataset_config, *columns)
    judged = DataSource(heldout, heldout_split, dataset_config, *columns)
    shown = judged.shows_images(bare.config)
    if metric in ANSWERED and not shown:
        raise ValueError(f"--metric {metric} needs questions about images; texts have perplexity")
    if shown:
        asked = judged.conversations(heldout_samples, seed, task_column=task_column)
        data = {"questions": tuple(asked), "answers": metric in ANSWERED}
    else:
        tokenizer = getattr(processor, "tokenizer", processor)
        read = judged.texts(tokenizer, heldout_samples, seed)
        data = {"texts": tuple(read["text"]), "add_special_tokens": adds_special_tokens(read)}
    batches = None
    if set(wanted) - {UNIFORM}:
        batches = calibration_batches(bare.config, processor, source, samples, max_length, seed)
    facts = {
        "model": model,
        "dataset": [dataset, split, dataset_config, *columns, samples],
        "heldout": [heldout, heldout_split, heldout_samples, task_column],
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
    versions = ", ".join(f"{name} {each}" for name, each in installed_versions().items())
    note = (
        f"{model}, {len(points)} models, calibrated on {dataset} ({samples} x {max_length} tokens "
        f"at most), scored on {heldout} ({heldout_samples}); group size {group_size}; seed {seed}; "
        f"{versions}."
    )
    for title, table in summarise(output, model, points, analyses, metric, note).items():
        console.print(title, table)
    console.print(f"Wrote {output}: {', '.join(sorted(path.name for path in output.iterdir()))}")
