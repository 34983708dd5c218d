"""The command that makes a model at many sizes."""

import io
from dataclasses import astuple, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from casp_plugin.cli.app import command
from casp_plugin.cli.data import (
    CalibrationOptions,
    HeldoutOptions,
    tell_text_alone,
    within_positions,
)
from casp_plugin.cli.options import Model, TrustRemoteCode, console, parse_bits, show


@command(context_settings={"allow_extra_args": True})
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
    output: Annotated[
        Path, typer.Option(help="Folder of the sweep; one that was stopped goes on.")
    ],
    calibration: CalibrationOptions,
    heldout: HeldoutOptions,
    kv_cache: Annotated[
        list[str] | None,
        typer.Option(help="Score each size with this cache too, as casp eval takes it."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Compress a model to many sizes and score each: what is measured of it is measured once."""
    from casp_plugin.data.data_source import load_processor
    from casp_plugin.evaluation.checkpoints import Scoring
    from casp_plugin.evaluation.study_folder import begin
    from casp_plugin.evaluation.sweep import frontier_table
    from casp_plugin.evaluation.sweep_run import Sweep, sizes_of
    from casp_plugin.kv_cache import CompressedCache
    from casp_plugin.modifiers.compression import bare_source_model
    from casp_plugin.report.figures.results import draw_frontier
    from casp_plugin.system.files import write_whole
    from casp_plugin.system.machine import installed_versions

    words = ",".join([*average_bits, *context.args]).replace(",", " ").split()
    budgets = [parse_bits(word) for word in words]
    bare = bare_source_model(model, trust_remote_code)
    max_length = within_positions(bare.config, calibration.max_length)
    calibration = replace(calibration, max_length=max_length)
    for scheme in kv_cache or ():
        CompressedCache(bare.config, scheme)
    sizes = sizes_of(bare, recipe, budgets)
    source, judged = calibration.source(), heldout.source(calibration)
    facts = {
        "model": model,
        "dataset": list(astuple(source)),
        "heldout": [heldout.heldout, heldout.heldout_split, heldout.heldout_samples],
        "samples": calibration.samples,
        "max_length": max_length,
        "seed": calibration.seed,
    }
    processor = load_processor(model, trust_remote_code)
    batches = calibration.batches(bare.config, processor)
    tell_text_alone(judged, bare.config)
    # that it can be read at all
    judged.read(bare.config, processor, heldout.heldout_samples, calibration.seed)
    begin(output, facts, recipe)
    scoring = Scoring(judged, heldout.heldout_samples, max_length, stride=max_length)
    points = Sweep(
        model,
        output,
        sizes,
        batches,
        scoring,
        kv_cache or (),
        calibration.seed,
        trust_remote_code,
    ).run()
    table = frontier_table(points)
    show(table)
    text, picture = Console(file=io.StringIO(), width=1000), io.BytesIO()
    text.print(table)
    draw_frontier(points).savefig(picture, dpi=120)
    versions = ", ".join(f"{name} {version}" for name, version in installed_versions().items())
    note = (
        f"{model}, calibrated on {source.dataset} ({calibration.samples} x {max_length} tokens at "
        f"most), scored on {judged.dataset} ({heldout.heldout_samples}), with 95 % intervals; seed "
        f"{calibration.seed}; {versions}."
    )
    write_whole(output / "sweep.md", f"{text.file.getvalue().strip()}\n\n{note}\n")
    write_whole(output / "sweep.png", picture.getvalue())
    console.print(f"Wrote {output}: sweep.md, sweep.png, sweep.json, {len(sizes)} checkpoints")
