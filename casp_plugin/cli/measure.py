"""Commands that measure checkpoints: eval, bench."""

from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from casp_plugin.cli.app import command
from casp_plugin.cli.data import DataOptions, TaskColumn, tell_text_alone, within_positions
from casp_plugin.cli.options import Seed, TrustRemoteCode
from casp_plugin.cli.output import show
from casp_plugin.cli.progress import tell


@dataclass(frozen=True, kw_only=True)
class ScoringOptions(DataOptions):
    """Data to score, and how."""

    dataset: Annotated[
        str | None,
        typer.Option(
            help="Text, or questions about images, to score: a file, a datasets folder, a hub id. "
            "Without --tasks too: held-out text that ships with casp-plugin (bundled-heldout)."
        ),
    ] = None
    task_column: TaskColumn = None
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "test"
    samples: Annotated[int, typer.Option(help="Texts or questions at most.", min=1)] = 512
    max_length: Annotated[int, typer.Option(help="Tokens of a window of text.", min=2)] = 2048
    stride: Annotated[
        int | None,
        typer.Option(help="Tokens from one window to the next; --max-length unless told.", min=1),
    ] = None
    join: Annotated[
        bool, typer.Option("--join", help="One text of all, as is usual for WikiText-2.")
    ] = False
    reference: Annotated[
        str | None,
        typer.Option(help="Model, as a rule the original, to measure KL and agreement against."),
    ] = None

    def scoring(self, max_length: int):
        """Return the ``Scoring`` that they name.

        :param max_length: tokens that the models have positions for, at most
        """
        from casp_plugin.evaluation.checkpoints import Scoring

        stride = self.stride or max_length
        source = self.source()
        return Scoring(source, self.samples, max_length, stride, self.join, self.task_column)


@dataclass(frozen=True, kw_only=True)
class HarnessOptions:
    """Tasks of a harness, and how it runs them."""

    tasks: Annotated[str | None, typer.Option(help="Tasks of the harness, by commas.")] = None
    harness: Annotated[str, typer.Option(help="lm-eval or lmms-eval.")] = "lm-eval"
    backend: Annotated[
        str,
        typer.Option(
            help="The harness's name of a model class. lm-eval: hf, vllm, hf-multimodal, vllm-vlm. "
            "lmms-eval: llava_hf, qwen2_5_vl, vllm and so on."
        ),
    ] = "hf"
    model_args: Annotated[str, typer.Option(help="More of its arguments: key=value,...")] = ""
    num_fewshot: Annotated[int | None, typer.Option(help="Examples in the prompt.", min=0)] = None
    limit: Annotated[int | None, typer.Option(help="Documents of a task at most.", min=1)] = None
    batch_size: Annotated[int, typer.Option(help="Documents a batch.", min=1)] = 1
    apply_chat_template: Annotated[bool, typer.Option("--apply-chat-template")] = False
    include_path: Annotated[
        str | None, typer.Option(help="Folder with more tasks of the harness.")
    ] = None
    use_cache: Annotated[
        str | None, typer.Option(help="Keep the harness's answers here, to go on after a stop.")
    ] = None

    def harness_tasks(self):
        """Return the ``HarnessTasks`` that they name; None without tasks.

        :raises ValueError: if the harness is not there, or has no such task
        """
        from casp_plugin.evaluation.checkpoints import HarnessTasks
        from casp_plugin.evaluation.harness import find_tasks

        if not self.tasks:
            return None
        names = self.tasks.split(",")
        find_tasks(names, self.harness, self.include_path)
        return HarnessTasks(**asdict(self) | {"tasks": names})


@command("eval")
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(help="Checkpoint folders or Hugging Face ids.", metavar="OUT..."),
    ],
    data: ScoringOptions,
    tasks: HarnessOptions,
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
    from casp_plugin.evaluation import checkpoints, results
    from casp_plugin.evaluation.records import load_records, save_records
    from casp_plugin.kv_cache import CompressedCache
    from casp_plugin.model.load import load_model, read_model_config

    if data.dataset is None and not tasks.tasks:
        data = replace(data, dataset="bundled-heldout")
    if data.reference and data.dataset is None:
        raise ValueError("--reference is compared on data: give --dataset, or leave out --tasks")
    source = data.source() if data.dataset else None
    max_length = data.max_length
    for model in models:  # now, not after hours, as all that follows
        config = read_model_config(model, trust_remote_code)
        if source:
            max_length = within_positions(config, max_length)
            tell_text_alone(source, config)
        if kv_cache:
            CompressedCache(config, kv_cache)
    if data.reference:
        config = read_model_config(data.reference, trust_remote_code)
        max_length = within_positions(config, max_length)
    if data.stride and data.stride > max_length:
        raise ValueError(f"--stride {data.stride} is more than --max-length {max_length}")
    if kv_cache and tasks.tasks and "vllm" in tasks.backend:
        raise ValueError(f"--kv-cache is for models of transformers, not --backend {tasks.backend}")
    compared = load_records(results.Evaluation, baseline, "casp eval") if baseline else []
    wanted = tasks.harness_tasks()
    scoring = data.scoring(max_length) if source else None
    original = load_model(data.reference, trust_remote_code) if data.reference else None
    for model in models:
        tell(f"measuring {model}")
        conditions = {"seed": seed, "kv_cache": kv_cache, "trust_remote_code": trust_remote_code}
        measured = checkpoints.evaluate(model, scoring, wanted, original, **conditions)
        compared.append(measured)
        show(measured.table())
        if output is not None:  # what is done is done, should a later model fail
            save_records(compared[1:] if baseline else compared, output)
    first, *others = compared
    for other in others:
        title = f"{other.model} against {first.model}"
        show(results.comparison_table(title, results.compare_all(other, first)))


@dataclass(frozen=True, kw_only=True)
class WorkloadOptions:
    """Request that every model answers; fields of ``Workload``."""

    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a prompt.", min=1)] = 512
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.", min=2)] = 128
    batch_size: Annotated[int, typer.Option(help="Prompts at a time.", min=1)] = 1
    images: Annotated[int, typer.Option(help="Images in a prompt.", min=0)] = 0
    frames: Annotated[int, typer.Option(help="Frames of a video in a prompt.", min=0)] = 0
    image_size: Annotated[int, typer.Option(help="Their edge in pixels.", min=1)] = 336
    seed: Seed = 0


@command()
def bench(
    prompts: WorkloadOptions,
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
    rounds: Annotated[int, typer.Option(help="Rounds that count.", min=1)] = 5,
    warmup: Annotated[int, typer.Option(help="Rounds before.", min=0)] = 1,
    engine_args: Annotated[
        str,
        typer.Option(help="For from_pretrained or vllm.LLM: key=value,... (dtype=float16)"),
    ] = "",
    output: Annotated[Path | None, typer.Option(help="Write results as JSON here.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure size, prefill time, decode throughput and peak memory, in turns with a baseline."""
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
    if prompts.images and prompts.frames:
        raise ValueError("--images and --frames: a prompt has images or a video, not both")
    workload = Workload(**asdict(prompts))
    with ExitStack() as stack:
        if random_weights:
            folder = keep or Path(stack.enter_context(TemporaryDirectory()))
            models = _random_models(random_weights, recipe, folder, trust_remote_code)
        else:
            models = [*([baseline] if baseline else []), model]
        arguments = _arguments(engine_args)
        if trust_remote_code:
            arguments["trust_remote_code"] = True
        tell("loading")
        speeds = measure(models, workload, engine, rounds, warmup, arguments)
    show(speed_table(speeds))
    if output is not None:
        save_records(speeds, output)


def _random_models(
    source: str, recipe: Path | None, folder: Path, trust_remote_code: bool
) -> list[str]:
    """Write checkpoints with random weights: the model as it is, and as a recipe leaves it."""
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
    """Return ``key=value,...`` as a dictionary, with values read as YAML."""
    import yaml

    pairs = [pair.partition("=") for pair in text.split(",") if pair]
    if any(not value for *_, value in pairs):
        raise ValueError(f"--engine-args {text!r} must be key=value,key=value")
    return {key: yaml.safe_load(value) for key, _, value in pairs}
