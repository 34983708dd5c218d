"""Tasks of lm-eval and lmms-eval on checkpoints of any kind; their results as measurements."""

import hashlib
import math
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

import casp_plugin  # noqa: F401  registers loading with transformers
from casp_plugin.evaluation.results import Measurement
from casp_plugin.kv_cache import with_kv_cache

__all__ = ["HARNESSES", "TASK_GROUPS", "find_tasks", "lmms_models", "measurements_of", "run_tasks"]

#: extra of this package that installs a harness, by its name
HARNESSES = {"lm-eval": "eval", "lmms-eval": "lmms"}
_LISTS = {"lm-eval": "lm_eval ls tasks", "lmms-eval": "lmms_eval --tasks list"}
#: folder of task groups for lmms-eval: the data sets of the paper
TASK_GROUPS = Path(__file__).parent / "tasks"
#: half the 95 % interval of a normal distribution, in standard errors
_NORMAL = 1.959963984540054


def find_tasks(names: Sequence[str], harness: str = "lm-eval", include_path: str | None = None):
    """Return the harness's task manager and the names of its tasks that are meant.

    :param names: tasks, groups, tags or patterns (``mmlu_*``)
    :param harness: one of ``HARNESSES``
    :param include_path: folder with more tasks
    :raises ValueError: if the harness is not installed, or has no such task
    """
    manager = _task_manager(_package(harness), include_path)
    matched = {name: manager.match_tasks([name]) for name in names}
    unknown = [name for name, matches in matched.items() if not matches]
    if unknown:
        raise ValueError(
            f"{harness} has no task {', '.join(unknown)}: `{_LISTS[harness]}` lists them, "
            "--include-path takes a folder with more"
        )
    return manager, [match for matches in matched.values() for match in matches]


def run_tasks(
    model: str,
    tasks: Sequence[str],
    harness: str = "lm-eval",
    backend: str = "hf",
    model_args: str = "",
    include_path: str | None = None,
    kv_cache: str | None = None,
    use_cache: str | None = None,
    **settings,
) -> list[Measurement]:
    """Run tasks on a model, as the harness's own command would.

    :param model: folder or Hugging Face id
    :param tasks: names, as in ``find_tasks``
    :param harness: one of ``HARNESSES``
    :param backend: the harness's name for a kind of model: ``hf``, ``vllm``, ``hf-multimodal``,
        ``vllm-vlm`` of lm-eval; ``llava_hf``, ``qwen2_5_vl``, ``vllm`` of lmms-eval
    :param model_args: more arguments of the backend, ``key=value,key=value``
    :param include_path: folder with more tasks
    :param kv_cache: scheme in which a transformers backend stores keys and values, see
        ``with_kv_cache``
    :param use_cache: beginning of the paths that answers are cached in, one file for every model
        and backend, because the harnesses' caches know the request but not the model
    :param settings: more arguments of the harness's ``simple_evaluate``: ``num_fewshot``,
        ``limit``, ``batch_size``, ``device``, ``gen_kwargs``, ``apply_chat_template``
    :raises ValueError: as ``find_tasks``; if a folder's name has a comma or an equals sign, which
        separate arguments for the harnesses; if the backend cannot take ``kv_cache``
    """
    if "," in model or "=" in model:
        raise ValueError(f"{model!r}: {harness} takes no folder with a comma or an equals sign")
    manager, names = find_tasks(tasks, harness, include_path)
    if backend == "hf" and "softmax_dtype" not in model_args:
        # lm-eval sums in the model's dtype; bfloat16 rounds a text's likelihood to four digits
        model_args = f"softmax_dtype=float32,{model_args}"
    if not (backend.startswith("vllm") or torch.accelerator.is_available()):
        settings = {"device": "cpu", **settings}  # else the harnesses take CUDA
    arguments = f"pretrained={model},{model_args}".rstrip(",")
    if use_cache is not None:
        answering = repr((model, harness, backend, arguments, kv_cache))
        use_cache = f"{use_cache}_{hashlib.sha256(answering.encode()).hexdigest()[:8]}"
    asking = {"tasks": names, "task_manager": manager, "use_cache": use_cache}
    evaluate = import_module(f"{_package(harness)}.evaluator").simple_evaluate
    with ExitStack() as stack:
        running = {"model": backend, "model_args": arguments}
        if kv_cache is not None:
            running = {"model": _harness_model(harness, backend, arguments, settings)}
            stack.enter_context(
                with_kv_cache(_transformers_model(running["model"], backend), kv_cache)
            )
        results = evaluate(**running, **asking, log_samples=True, **settings)
    return measurements_of(results)


@cache
def _task_manager(package: str, include_path: str | None):
    """Return a harness's index of tasks, for which it reads thousands of files."""
    paths = [*([include_path] if include_path else []), str(TASK_GROUPS)]
    return import_module(f"{package}.tasks").TaskManager(
        include_path=paths if package == "lmms_eval" else include_path
    )


def _harness_model(harness: str, backend: str, arguments: str, settings: dict):
    """Return the harness's own object for a model, as ``simple_evaluate`` would make it."""
    where = {"lm-eval": "lm_eval.api.registry", "lmms-eval": "lmms_eval.models"}[harness]
    more = {name: settings.get(name) for name in ("batch_size", "max_batch_size", "device")}
    return import_module(where).get_model(backend).create_from_arg_string(arguments, more)


def _transformers_model(answering, backend: str) -> PreTrainedModel:
    """Return the transformers model inside a harness's object.

    :raises ValueError: if there is none
    """
    model = getattr(answering, "model", None)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"--kv-cache works with models of transformers, not backend {backend!r}")
    return model


def measurements_of(results: dict) -> list[Measurement]:
    """Return every metric of every task and group in a harness's results.

    Where a metric is a mean over documents, or exp of one, its documents are kept for comparisons
    in pairs, and its 95 % interval is that of a bootstrap (Wilson's for shares of right answers);
    else it reaches 1.96 of the harness's standard errors to either side.

    :param results: as ``simple_evaluate`` returns them
    """
    measured = []
    for task, metrics in results["results"].items():
        documents = results.get("samples", {}).get(task, [])
        better = results.get("higher_is_better", {}).get(task, {})
        for key, value in metrics.items():
            metric, _, filtered = key.partition(",")
            if not filtered or "_stderr" in metric or not _is_number(value):
                continue
            fields = {
                "task": task,
                "metric": metric if filtered == "none" else key,
                "higher_is_better": better.get(metric),
                "documents": _fingerprint(documents),
            }
            rows = [row for row in documents if row.get("filter", filtered) == filtered]
            mean = _as_mean([row.get(metric) for row in rows], value)
            if mean:
                measured.append(Measurement.of_mean(*mean, **fields))
            else:
                interval = _normal_interval(value, metrics.get(f"{metric}_stderr,{filtered}"))
                measured.append(Measurement(value=value, **interval, **fields))
    return measured


def _as_mean(rows: list, value: float) -> tuple[list[float], list[float], bool] | None:
    """Return totals, weights and whether to take exp, such that their mean is the harness's value;
    None where there are none."""
    if not rows or any(row is None for row in rows):
        return None
    if all(_is_number(row) for row in rows):
        totals, weights = [float(row) for row in rows], [1.0] * len(rows)
        candidates = [(totals, weights, False), ([-t for t in totals], weights, True)]
    elif all(isinstance(row, list | tuple) and len(row) == 2 for row in rows):
        losses, weights = ([-float(row[0]) for row in rows], [float(row[1]) for row in rows])
        bits = [loss / math.log(2) for loss in losses]
        candidates = [(losses, weights, True), (bits, weights, False)]
    else:
        return None
    for totals, weights, exponential in candidates:
        mean = math.fsum(totals) / math.fsum(weights)
        if exponential and mean > 700:  # exp of it exceeds a float
            continue
        if math.isclose(math.exp(mean) if exponential else mean, value, rel_tol=1e-6):
            return totals, weights, exponential
    return None


def _is_number(value) -> bool:
    return isinstance(value, int | float | np.number) and not math.isnan(value)


def _normal_interval(value: float, error) -> dict[str, float]:
    """Return the 95 % interval of a value with a standard error; empty without one."""
    if not _is_number(error):
        return {}
    return {"low": value - _NORMAL * error, "high": value + _NORMAL * error}


def _fingerprint(documents: list[dict]) -> str:
    """Return a fingerprint of the requests, the same for all models that were asked them."""
    keys = ("doc_hash", "prompt_hash", "target_hash")
    asked = sorted((row["doc_id"], *(str(row.get(key, "")) for key in keys)) for row in documents)
    return hashlib.sha256(repr(asked).encode()).hexdigest()[:16]


def lmms_models() -> tuple:
    """Return no models: lmms-eval calls this entry point, and the import of this module lets its
    own models load our checkpoints."""
    return ()


def _package(harness: str) -> str:
    """Return the name of a harness's package.

    :raises ValueError: if it is not known or not installed
    """
    if harness not in HARNESSES:
        raise ValueError(f"harness {harness!r} must be one of {', '.join(HARNESSES)}")
    package = harness.replace("-", "_")
    if not find_spec(package):
        raise ValueError(
            f"{harness} is not installed: pip install 'casp-plugin[{HARNESSES[harness]}]'"
        )
    return package
