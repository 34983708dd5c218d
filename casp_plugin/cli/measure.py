"""Commands that measure checkpoints: eval, bench."""

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from casp_plugin.cli.app import app
from casp_plugin.cli.data import DataSource, load_processor, within_positions
from casp_plugin.cli.options import (
    AnswerColumn,
    Column,
    ConfigName,
    ImageColumn,
    QuestionColumn,
    Seed,
    Split,
    TaskColumn,
    TrustRemoteCode,
    VideoColumn,
    console,
)


@app.command("eval")
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(help="Checkpoint folders or Hugging Face ids.", metavar="OUT..."),
    ],
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Text, or questions about images, to score: a file, a datasets folder, a hub id. "
            "Without --tasks too: held-out text that ships with casp-plugin (bundled-heldout)."
        ),
    ] = None,
    text_column: Column = "text",
    image_column: ImageColumn = "image",
    video_column: VideoColumn = None,
    question_column: QuestionColumn = "question",
    answer_column: AnswerColumn = "answer",
    task_column: TaskColumn = None,
    split: Split = "test",
    dataset_config: ConfigName = None,
    samples: Annotated[int, typer.Option(help="Texts or questions at most.", min=1)] = 512,
    max_length: Annotated[int, typer.Option(help="Tokens of a window of text.", min=2)] = 2048,
    stride: Annotated[
        int | None,
        typer.Option(help="Tokens from one window to the next; --max-length unless told.", min=1),
    ] = None,
    join: Annotated[
        bool, typer.Option("--join", help="One text of all, as is usual for WikiText-2.")
    ] = False,
    reference: Annotated[
        str | None,
        typer.Option(help="Model, as a rule the original, to measure KL and agreement against."),
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of the harness, by commas.")] = None,
    harness: Annotated[str, typer.Option(help="lm-eval or lmms-eval.")] = "lm-eval",
    backend: Annotated[
        str,
        typer.Option(
            help="The harness's name of a model class. lm-eval: hf, vllm, hf-multimodal, vllm-vlm. "
            "lmms-eval: llava_hf, qwen2_5_vl, vllm and so on."
        ),
    ] = "hf",
    model_args: Annotated[str, typer.Option(help="More of its arguments: key=value,...")] = "",
    num_fewshot: Annotated[int | None, typer.Option(help="Examples in the prompt.", min=0)] = None,
    limit: Annotated[int | None, typer.Option(help="Documents of a task at most.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Documents a batch.", min=1)] = 1,
    apply_chat_template: Annotated[bool, typer.Option("--apply-chat-template")] = False,
    include_path: Annotated[
        str | None, typer.Option(help="Folder with more tasks of the harness.")
    ] = None,
    use_cache: Annotated[
        str | None, typer.Option(help="Keep the harness's answers here, to go on after a stop.")
    ] = None,
    kv_cache: Annotated[
        str | None,
        typer.Option(
            help="How transformers stores keys and values while it is scored: "
            "NAME:option=value,... (kcvt:bits=2,g=128); names: "
            "uniform, outlier_reduced, per_channel, per_token, kcvt, ktvc.",
        ),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(
            help="--output of an earlier call: compare with its first model, not with the first "
            "OUT.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write results as JSON here.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    seed: Seed = 0,
) -> None:
    """Measure checkpoints, with 95 % intervals, and compare them on the same documents."""
    from casp_plugin.evaluation import results
    from casp_plugin.evaluation.harness import find_tasks, run_tasks
    from casp_plugin.evaluation.records import load_records, save_records
    from casp_plugin.kv_cache import CompressedCache
    from casp_plugin.model.load import load_model, read_model_config
    from casp_plugin.system.machine import installed_versions

    for name in models:  # now, not after hours, as all that follows
        config = read_model_config(name, trust_remote_code)
        max_length = within_positions(config, max_length) if dataset or not tasks else max_length
        if kv_cache:
            CompressedCache(config, kv_cache)
    if reference:
        config = read_model_config(reference, trust_remote_code)
        max_length = within_positions(config, max_length)
    if kv_cache and tasks and "vllm" in backend:
        raise ValueError(f"--kv-cache is for models of transformers, not --backend {backend}")
    compared = load_records(results.Evaluation, baseline, "casp eval") if baseline else []
    wanted = tasks.split(",") if tasks else []
    if wanted:
        find_tasks(wanted, harness, include_path)
    scoring = {"samples": samples, "max_length": max_length, "stride": stride or max_length}
    if scoring["stride"] > max_length:
        raise ValueError(f"--stride {stride} is more than --max-length {max_length}")
    columns = (text_column, image_column, video_column, question_column, answer_column)
    dataset = dataset or (None if wanted else "bundled-heldout")
    source = DataSource(dataset, split, dataset_config, *columns) if dataset else None
    asking = {"num_fewshot": num_fewshot, "limit": limit, "batch_size": batch_size}
    asking |= {"apply_chat_template": apply_chat_template}
    original = load_model(reference, trust_remote_code) if reference and source else None
    if trust_remote_code:
        model_args = ",".join(filter(None, ["trust_remote_code=True", model_args]))
    for model in models:
        measured, settings = [], {"seed": seed, "kv_cache": kv_cache}
        if source:
            chosen = (task_column, join, seed, kv_cache)
            measured += score(model, source, original, *chosen, trust_remote_code, **scoring)
            settings |= {"dataset": dataset, "reference": reference, "join": join, **scoring}
        if wanted:
            chosen = (wanted, harness, backend, model_args, include_path)
            keeping = {"kv_cache": kv_cache, "use_cache": use_cache}
            measured += run_tasks(model, *chosen, **keeping, **asking)
            settings |= {"tasks": tasks, "harness": harness, "backend": backend}
            settings |= {"model_args": model_args, **asking}
        found = results.Evaluation(
            model=model,
            settings=settings,
            versions=installed_versions(),
            measurements=measured,
        )
        compared.append(found)
        console.print(found.table())
        if output is not None:  # what is done is done, should a later model fail
            save_records(compared[1:] if baseline else compared, output)
    first, *others = compared
    for other in others:
        title = f"{other.model} against {first.model}"
        console.print(results.comparison_table(title, results.compare_all(other, first)))


def score(
    model,
    source,
    reference,
    task_column,
    join,
    seed,
    kv_cache,
    trust_remote_code,
    samples,
    max_length,
    stride,
):
    """Measurements on texts, or on questions about images, in all and by task."""
    from casp_plugin.data.sources import adds_special_tokens
    from casp_plugin.evaluation.answers import evaluate_answers
    from casp_plugin.evaluation.text import evaluate as evaluate_text
    from casp_plugin.kv_cache import with_kv_cache
    from casp_plugin.model.load import load_model

    processor = load_processor(model, trust_remote_code)
    loaded = load_model(model, trust_remote_code)
    name = Path(source.dataset).stem
    if not source.shows_images(loaded.config):
        tokenizer = getattr(processor, "tokenizer", processor)
        read = source.texts(tokenizer, samples, seed)
        chosen = (read["text"], max_length, reference, stride, join, adds_special_tokens(read))
        with with_kv_cache(loaded, kv_cache):
            scores = evaluate_text(loaded, tokenizer, *chosen)
        return scores.measurements(name)
    asked = source.conversations(samples, seed, task_column=task_column)
    scores = evaluate_answers(loaded, processor, asked, reference, kv_cache=kv_cache)
    found = scores.measurements(name)
    for task, each in scores.by_task.items() if task_column else ():
        found += each.measurements(f"{name}: {task}")
    return found


@app.command()
def bench(
    model: Annotated[
        str | None, typer.Argument(help="Checkpoint folder.", metavar="[OUT]", show_default=False)
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Model, as a rule the original, to compare with.")
    ] = None,
    random_weights: Annotated[
        str | None,
        typer.Option(
            help="Instead of OUT: folder with a config.json (and a processor, for images). A model "
            "of these shapes is made up, and with --recipe what that would make of it."
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="For --random-weights, in YAML.", exists=True, dir_okay=False),
    ] = None,
    keep: Annotated[
        Path | None, typer.Option(help="Folder for what --random-weights makes; else thrown away.")
    ] = None,
    engine: Annotated[str, typer.Option(help="hf (transformers) or vllm.")] = "hf",
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a prompt.", min=1)] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.", min=2)] = 128,
    batch_size: Annotated[int, typer.Option(help="Prompts at a time.", min=1)] = 1,
    images: Annotated[int, typer.Option(help="Images in a prompt.", min=0)] = 0,
    frames: Annotated[int, typer.Option(help="Frames of a video in a prompt.", min=0)] = 0,
    image_size: Annotated[int, typer.Option(help="Their edge in pixels.", min=1)] = 336,
    rounds: Annotated[int, typer.Option(help="Rounds that count.", min=1)] = 5,
    warmup: Annotated[int, typer.Option(help="Rounds before.", min=0)] = 1,
    engine_args: Annotated[
        str,
        typer.Option(help="For from_pretrained or vllm.LLM: key=value,... (dtype=float16)"),
    ] = "",
    output: Annotated[Path | None, typer.Option(help="Write results as JSON here.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    seed: Seed = 0,
) -> None:
    """Size, prefill time, decode throughput and peak memory, in turns with a baseline's."""
    from casp_plugin.bench.engines import ENGINES, Workload
    from casp_plugin.bench.runs import measure, speed_table
    from casp_plugin.evaluation.records import save_records

    if (model is None) == (random_weights is None):
        raise ValueError("bench takes either OUT or --random-weights")
    if random_weights is None and (recipe or keep):
        raise ValueError("--recipe and --keep go with --random-weights")
    if random_weights is not None and baseline:
        raise ValueError("--baseline goes with OUT: of --random-weights it is the model as it is")
    if engine not in ENGINES:
        raise ValueError(f"--engine {engine!r} must be one of {', '.join(ENGINES)}")
    if images and frames:
        raise ValueError("--images and --frames: a prompt has images or a video, not both")
    workload = Workload(
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch_size=batch_size,
        images=images,
        frames=frames,
        image_size=image_size,
        seed=seed,
    )
    with ExitStack() as stack:
        if random_weights:
            folder = keep or Path(stack.enter_context(TemporaryDirectory()))
            models = _random_models(random_weights, recipe, folder, trust_remote_code)
        else:
            models = [*([baseline] if baseline else []), model]
        arguments = _arguments(engine_args)
        if trust_remote_code:
            arguments["trust_remote_code"] = True
        speeds = measure(models, workload, engine, rounds, warmup, arguments)
    console.print(speed_table(speeds))
    if output is not None:
        save_records(speeds, output)


def _random_models(
    source: str, recipe: Path | None, folder: Path, trust_remote_code: bool
) -> list[str]:
    """Checkpoints with random weights: the model as it is, and as a recipe leaves it."""
    from casp_plugin.bench.shapes import Shapes
    from casp_plugin.modifiers.recipes import load_recipe

    name = source.rstrip("/").rpartition("/")[2]
    wanted = {folder / name: Shapes.of(source, None, trust_remote_code)}
    if recipe is not None:
        load_recipe(recipe)  # says what is wrong with it
        made = Shapes.of(source, str(recipe), trust_remote_code)
        wanted[folder / f"{name}-{recipe.stem}"] = made
    for target, shapes in wanted.items():
        if target.exists():
            raise ValueError(f"--keep {folder} holds {target.name} already")
        shapes.write(target)
    return list(map(str, wanted))


def _arguments(text: str) -> dict:
    """``key=value,...`` with values read as YAML reads them."""
    import yaml

    pairs = [pair.partition("=") for pair in text.split(",") if pair]
    if any(not value for *_, value in pairs):
        raise ValueError(f"--engine-args {text!r} must be key=value,key=value")
    return {key: yaml.safe_load(value) for key, _, value in pairs}
