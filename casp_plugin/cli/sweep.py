"""The command that makes a model at many sizes."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from casp_plugin.cli.app import command
from casp_plugin.cli.data import (
    CalibrationOptions,
    HeldoutOptions,
    tell_text_alone,
    within_positions,
)
from casp_plugin.cli.options import Model, TrustRemoteCode, parse_bits
from casp_plugin.cli.output import console, show


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
    """Compress a model to many sizes and score them; its layers are measured once."""
    from casp_plugin.data.data_source import load_processor
    from casp_plugin.evaluation.checkpoints import Scoring
    from casp_plugin.evaluation.study_folder import write_figure
    from casp_plugin.evaluation.sweep import Sweep, sizes_of
    from casp_plugin.evaluation.sweep_points import frontier_table
    from casp_plugin.kv_cache import CompressedCache
    from casp_plugin.model.load import bare_source_model
    from casp_plugin.report.figures.results import draw_frontier

    words = ",".join([*average_bits, *context.args]).replace(",", " ").split()
    budgets = [parse_bits(word) for word in words]
    bare = bare_source_model(model, trust_remote_code)
    max_length = within_positions(bare.config, calibration.max_length)
    calibration = replace(calibration, max_length=max_length)
    for scheme in kv_cache or ():
        CompressedCache(bare.config, scheme)  # says what is wrong with it
    sizes = sizes_of(bare, recipe, budgets)
    processor = load_processor(model, trust_remote_code)
    batches = calibration.batches(bare.config, processor)
    scored = heldout.source(calibration)
    tell_text_alone(scored, bare.config)
    # that it can be read at all
    scored.read(bare.config, processor, heldout.heldout_samples, calibration.seed)
    points = Sweep(
        model,
        output,
        sizes,
        calibration.source(),
        calibration.samples,
        batches,
        Scoring(scored, heldout.heldout_samples, max_length, stride=max_length),
        kv_cache or (),
        calibration.seed,
        trust_remote_code,
    ).run()
    show(frontier_table(points))
    write_figure(output / "sweep.png", draw_frontier(points))
    console.print(f"Wrote {output}: sweep.md, sweep.png, sweep.json, {len(sizes)} checkpoints")
