"""The ``casp`` command: plan, run, check, fold."""

import sys
import tempfile
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

app = typer.Typer(
    name="casp",
    help="Compress language models to 2 to 4 bits a weight with CASP and llm-compressor.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
console = Console()

Model = Annotated[str, typer.Argument(help="Model folder or Hugging Face id.", metavar="MODEL")]
Checkpoint = Annotated[
    Path, typer.Argument(help="Checkpoint folder.", metavar="OUT", exists=True, file_okay=False)
]
RecipeFile = Annotated[
    Path, typer.Option("--recipe", help="Recipe in YAML.", exists=True, dir_okay=False)
]
_DATASET = typer.Option(
    "--dataset",
    help="Calibration text: .jsonl, .parquet, .csv or .txt file, a datasets folder, a hub id, or "
    "'bundled' for the text that ships with casp-plugin.",
)
Column = Annotated[str, typer.Option("--text-column", help="Column that holds the text.")]
ImageColumn = Annotated[
    str, typer.Option("--image-column", help="Column that holds images, for models that see.")
]
VideoColumn = Annotated[
    str | None,
    typer.Option("--video-column", help="Column that holds a video's frames, instead of images."),
]
QuestionColumn = Annotated[
    str, typer.Option("--question-column", help="Column that holds the questions about them.")
]
AnswerColumn = Annotated[
    str, typer.Option("--answer-column", help="Column that holds the answers.")
]
Split = Annotated[str, typer.Option("--split", help="Split of the dataset.")]
ConfigName = Annotated[
    str | None, typer.Option("--dataset-config", help="Configuration of a hub dataset.")
]
Samples = Annotated[int, typer.Option("--samples", help="Calibration samples.", min=1)]
Length = Annotated[int, typer.Option("--max-length", help="Tokens a sample at most.", min=2)]
Seed = Annotated[int, typer.Option("--seed", help="Seed of all that is random.")]


@app.command()
def plan(
    model: Model,
    recipe: RecipeFile,
    dataset: Annotated[str | None, _DATASET] = None,
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
    json: Annotated[Path | None, typer.Option(help="Save the plan as JSON here.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw bits per layer here.")] = None,
) -> None:
    """Show what a recipe would do: units, bits, ranks, exact bytes.

    Without --dataset nothing heavy runs, not even the weights are read, and what only
    statistics can tell shows as '?'.
    """
    from casp_plugin.models import load_model
    from casp_plugin.modifiers import plan_recipe

    bare = _skeleton(model)  # refuses a quantized model before its weights are read
    if dataset is None:
        made = plan_recipe(bare, str(recipe))
    else:
        source = (dataset, split, dataset_config)
        columns = (text_column, image_column, video_column, question_column, answer_column)
        batches = _batches(bare, _processor(bare), source, columns, samples, max_length, seed)
        _seed(seed)
        made = plan_recipe(load_model(model), str(recipe), batches)
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
    dataset: Annotated[str, _DATASET],
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
) -> None:
    """Compress a model: llm-compressor's oneshot with the plugin, written whole or not at all."""
    from llmcompressor import oneshot

    from casp_plugin.checkpoint import copy_processor, whole_folder
    from casp_plugin.models import load_model
    from casp_plugin.modifiers import plan_recipe
    from casp_plugin.modifiers.tracing import check_traceable

    _check_output(output)
    bare = _skeleton(model)
    console.print(plan_recipe(bare, str(recipe)).tables()[-1])
    processor = _processor(bare)
    source = (dataset, split, dataset_config)
    columns = (text_column, image_column, video_column, question_column, answer_column)
    batches = _batches(bare, processor, source, columns, samples, max_length, seed, batch_size)
    loaded = load_model(model)
    check_traceable(loaded, batches)
    _seed(seed)
    with whole_folder(output) as partial:
        compressed = oneshot(
            model=loaded,
            processor=processor,
            recipe=str(recipe),
            dataset=batches,
            output_dir=str(partial),
        )
        copy_processor(model, partial)
    console.print(compressed.casp_plan.tables()[-1])
    console.print(f"Wrote {output}. Next: casp check {output}")


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

    dense = fold_checkpoint(checkpoint, output)
    before, after = map(_weights_on_disk, (checkpoint, output))
    console.print(
        f"Wrote {output}: {len(dense)} layers are dense now, {before:,} -> {after:,} bytes"
    )


def _weights_on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def main() -> None:
    """Entry point: what a user got wrong is one line, not a traceback."""
    try:
        app()
    except ModuleNotFoundError as error:  # where the package only serves
        _fail(f"{error}: this command needs pip install 'casp-plugin[compress]'")
    except (ValueError, ValidationError, OSError, ImportError) as error:
        _fail(error)


def _fail(error: Exception | str) -> NoReturn:
    Console(stderr=True).print(f"[bold red]error[/]: {escape(str(error))}", highlight=False)
    sys.exit(1)


def _skeleton(model: str):
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


def _processor(bare):
    """Tokenizer of a language model, processor of one that takes images too."""
    from transformers import AutoProcessor, AutoTokenizer

    from casp_plugin.models import is_multimodal

    kind = AutoProcessor if is_multimodal(bare.config) else AutoTokenizer
    return kind.from_pretrained(bare.config._name_or_path)


def _batches(bare, processor, source, columns, samples, max_length, seed, batch_size=1):
    """Calibration batches: of questions about images where the model sees and the data has any,
    else of text.

    :param source: dataset, split, configuration
    :param columns: of text, image, video, question, answer
    """
    from casp_plugin.calibration import CHAT_COLUMN, calibration_loader, load_text, read_source
    from casp_plugin.image_text import load_conversations
    from casp_plugin.models import is_multimodal
    from casp_plugin.processing import conversation_loader

    dataset, split, config_name = source
    text, image, video, question, answer = columns
    tokenizer = processor
    if is_multimodal(bare.config):
        tokenizer = processor.tokenizer
        found = read_source(*source).column_names
        shown = video or image
        if shown in found or not {text, CHAT_COLUMN} & set(found):
            if batch_size > 1:
                raise ValueError("--batch-size is for text: questions about images run one by one")
            rows = load_conversations(
                dataset,
                samples,
                image_column=image,
                video_column=video,
                question_column=question,
                answer_column=answer,
                split=split,
                config_name=config_name,
                seed=seed,
            )
            return conversation_loader(rows, processor, max_length)
        console.print(f"{dataset} has no column {shown!r}: calibrating on text alone")
    texts = load_text(dataset, tokenizer, samples, text, split, config_name, seed)
    return calibration_loader(texts, tokenizer, max_length, batch_size)


def _seed(seed: int) -> None:
    from transformers import set_seed

    set_seed(seed)


def _check_output(output: Path) -> None:
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
