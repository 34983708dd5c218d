"""A study under way: its models are made and scored one after the other, what is done is kept."""

import multiprocessing
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby, islice, zip_longest
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch
from loguru import logger
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from casp_plugin.data.conversations import Conversation
from casp_plugin.evaluation.answers import evaluate_answers
from casp_plugin.evaluation.text import evaluate
from casp_plugin.model.experts import linearize_experts
from casp_plugin.model.load import load_model
from casp_plugin.model.location import find_parts, levels
from casp_plugin.model.units import matched_linears
from casp_plugin.sensitivity.grid import (
    METHODS,
    UNIFORM,
    Configuration,
    Layer,
    features,
    grid,
    space_filling,
)
from casp_plugin.sensitivity.rounding import changed_by, mappings_of, uniform
from casp_plugin.system.files import whole_file

__all__ = [
    "POINTS_NAME",
    "Calibration",
    "Judged",
    "Study",
    "check_method",
    "find_layers",
    "points_of",
    "processes_of",
]

POINTS_NAME = "points.parquet"
#: copies of the model that a process holds at most: one to score, one to restore it from
_COPIES = 2.5


@dataclass(frozen=True)
class Judged:
    """What every model of a study is scored on, texts or questions about images.

    :param processor: tokenizer, or processor of a model that sees
    :param texts: each on its own
    :param questions: their tasks are told apart
    :param max_length: tokens of a window of text
    :param add_special_tokens: whether the tokenizer adds its own to the texts: not to chats
    :param answers: whether models answer the questions; else only the loss of the right answers is
        measured, which takes less time
    """

    processor: object
    texts: tuple[str, ...] = ()
    questions: tuple[Conversation, ...] = ()
    max_length: int = 2048
    answers: bool = True
    add_special_tokens: bool = True

    def scores(self, model: nn.Module) -> dict[str, float]:
        """Values of metrics, by ``task/metric``."""
        if self.texts:
            tokenizer = getattr(self.processor, "tokenizer", self.processor)
            found = evaluate(
                model,
                tokenizer,
                self.texts,
                self.max_length,
                stride=self.max_length,
                add_special_tokens=self.add_special_tokens,
            )
            by_task = {"text": found}
        else:
            longest = {} if self.answers else {"max_new_tokens": 0}
            by_task = evaluate_answers(model, self.processor, self.questions, **longest).by_task
        return {
            f"{task or 'answers'}/{one.metric}": one.value
            for task, scores in by_task.items()
            for one in scores.measurements(task)
        }


@dataclass(frozen=True)
class Calibration:
    """What GPTQ and AWQ take.

    :param batches: calibration batches
    :param group_size: columns that share a scale
    :param seed: of all that is random
    """

    batches: Iterable[dict]
    group_size: int
    seed: int


class Study:
    """The models of a study of one model, in a folder that keeps their scores.

    :param model: folder or Hugging Face id
    :param layers: what may be quantized, of that model, by name
    :param dtype: of its weights
    :param judged: what it is scored on
    :param calibration: for methods other than ``uniform``
    :param folder: holds ``points.parquet``, a row for each model that is done
    :param processes: that score models at a time
    :param trust_remote_code: whether Python code that comes with the model may run
    """

    def __init__(
        self,
        model: str,
        layers: Mapping[str, Layer],
        dtype: torch.dtype,
        judged: Judged,
        calibration: Calibration,
        folder: Path,
        processes: int = 1,
        trust_remote_code: bool = False,
    ):
        self.trust_remote_code = trust_remote_code
        self.model, self.layers, self.dtype = model, layers, dtype
        self.judged, self.calibration = judged, calibration
        self.folder, self.processes = folder, processes
        parts = {name: layer.part for name, layer in layers.items()}
        several = len(levels(parts.values(), "component")) > 1
        self.cell = {
            name: part.component if several else f"{part.block}-{part.kind}"
            for name, part in parts.items()
        }

    def run(self, configurations: Sequence[Configuration]) -> pd.DataFrame:
        """Score the models that are not there yet, the original first.

        :return: all rows of the folder, by method: columns of ``Configuration.row``, of
            ``features`` and of ``Judged.scores``
        """
        path = self.folder / POINTS_NAME
        rows = pd.read_parquet(path).to_dict("records") if path.exists() else []
        done = {_key(row) for row in rows}
        original = Configuration("original", self.dtype.itemsize * 8, (), (), ())
        wanted = [one for one in (original, *configurations) if _key(one.row()) not in done]
        methods = list(dict.fromkeys(one.method for one in wanted))
        wanted.sort(key=lambda one: (methods.index(one.method), one.bits))  # what shares weights
        progress = tqdm(total=len(wanted), desc="Models scored", smoothing=0)
        with self._scoring() as score, progress:
            for (method, bits), group in groupby(wanted, key=lambda one: (one.method, one.bits)):
                group = list(group)
                needed = {cell for one in group for cell in self._cells(one)}
                with self._weights(method, bits, sorted(needed)) as files:
                    jobs = [self._job(one, files) for one in group]
                    for one, scores in zip(group, score(jobs), strict=True):
                        rows.append(self._row(one) | scores)
                        with whole_file(path) as partly:
                            pd.DataFrame(rows).to_parquet(partly, index=False)
                        progress.update()
        order = ["original", *METHODS]
        rows.sort(key=lambda row: order.index(row["method"]))
        return pd.DataFrame(rows)

    def _row(self, one: Configuration) -> dict:
        return one.row() | features(one, self.layers, self.dtype, self.calibration.group_size)

    def _job(self, one: Configuration, files: Mapping[str, Path]) -> "_Job":
        if one.method == UNIFORM:
            return _Job(uniform_bits=one.bits, names=tuple(self._taken(one)))
        return _Job(files=tuple(files[cell] for cell in self._cells(one)))

    def _taken(self, one: Configuration) -> list[str]:
        return [name for name, layer in self.layers.items() if one.takes(layer.part)]

    def _cells(self, one: Configuration) -> list[str]:
        """What a quantizer is run on by itself, of a configuration: components, or where there is
        but one, the attention or feed-forward layers of a third of the blocks."""
        return list(dict.fromkeys(self.cell[name] for name in self._taken(one)))

    @contextmanager
    def _scoring(self) -> Iterator:
        """A function that scores models, in their order."""
        devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
        if self.processes == 1:
            scorer = _Scorer(self.model, self.judged, devices[0], self.trust_remote_code)
            yield lambda jobs: map(scorer.score, jobs)
            return
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        for i in range(self.processes):
            queue.put(devices[i % len(devices)])
        threads = max(1, torch.get_num_threads() // self.processes)
        given = (self.model, self.judged, queue, threads, self.trust_remote_code)
        with ProcessPoolExecutor(self.processes, context, _begin, given) as pool:
            yield partial(pool.map, _score)

    @contextmanager
    def _weights(self, method: str, bits: int, cells: Sequence[str]) -> Iterator[dict[str, Path]]:
        """Files of tensors that a method changes in each cell; gone afterwards."""
        if method in (UNIFORM, "original"):
            yield {}
            return
        folder = self.folder / "weights"
        files = {cell: folder / f"{method}-{bits}-{cell}.safetensors" for cell in cells}
        for cell, path in files.items():
            if not path.exists():
                with whole_file(path) as partly:
                    save_file(self._changed(method, bits, cell), partly)
        _check_apart(method, files)
        yield files
        shutil.rmtree(folder)

    def _changed(self, method: str, bits: int, cell: str) -> dict[str, torch.Tensor]:
        model = _load(self.model, self.trust_remote_code)
        names = [name for name in self.layers if self.cell[name] == cell]
        chosen = (self.calibration.group_size, self.calibration.batches, self.calibration.seed)
        return changed_by(method, model, names, bits, *chosen)


@dataclass(frozen=True)
class _Job:
    """What to change in the original model: files of tensors, or layers to round."""

    files: tuple[Path, ...] = ()
    names: tuple[str, ...] = ()
    uniform_bits: int | None = None


class _Scorer:
    """A model whose tensors are changed and restored."""

    def __init__(self, model: str, judged: Judged, device: str, trust_remote_code: bool):
        self.model = _load(model, trust_remote_code).to(device).eval()
        self.tensors = self.model.state_dict()
        self.original = {name: tensor.cpu().clone() for name, tensor in self.tensors.items()}
        self.judged = judged

    @torch.no_grad()
    def score(self, job: _Job) -> dict[str, float]:
        changed = {}
        for file in job.files:
            changed |= load_file(file)
        for name in job.names:
            changed[f"{name}.weight"] = uniform(self.original[f"{name}.weight"], job.uniform_bits)
        try:
            for name, tensor in changed.items():
                self.tensors[name].copy_(tensor)
            return self.judged.scores(self.model)
        finally:
            for name in changed:
                self.tensors[name].copy_(self.original[name])


def find_layers(model: nn.Module, ignore: Sequence[str]) -> dict[str, Layer]:
    """Linear layers that a study may quantize; experts become linear layers.

    :param model: on the meta device, or with weights
    :param ignore: what stays as it is, in llm-compressor's matching syntax
    :raises ValueError: if nothing is left
    """
    linearize_experts(model)
    linears = matched_linears(model, ["Linear"], list(ignore), "--ignore")
    parts = find_parts(model, linears)
    return {name: Layer(parts[name], tuple(each.weight.shape)) for name, each in linears.items()}


def check_method(
    method: str, model: nn.Module, layers: Mapping[str, Layer], group_size: int
) -> None:
    """
    :param model: on the meta device
    :raises ValueError: if a method is not known, or cannot quantize the model
    """
    if method not in METHODS:
        raise ValueError(f"--methods: {method!r} must be one of {', '.join(METHODS)}")
    if method == UNIFORM:
        return
    for name, layer in layers.items():
        columns = layer.shape[1]
        if group_size != -1 and (group_size < 1 or columns % group_size):
            raise ValueError(
                f"--group-size {group_size} does not divide the {columns} columns of {name}: give "
                "another, or leave the layer out by --ignore"
            )
    for component in levels((layer.part for layer in layers.values()), "component"):
        names = [name for name, each in layers.items() if each.part.component == component]
        try:
            if method == "awq" and not mappings_of(model, names):
                logger.warning(f"AWQ finds nothing to scale in {component}: rounded to nearest")
        except ValueError as error:
            raise ValueError(f"--methods awq: {error}") from None


def points_of(
    methods: Sequence[str],
    layers: Mapping[str, Layer],
    dtype: torch.dtype,
    group_size: int,
    most: int | None = None,
) -> list[Configuration]:
    """The models of a study. With fewer than all, whole components and then those that cover the
    grids best, as many of each method as it has; a larger number adds to those of a smaller one.

    :param methods: some of ``METHODS``
    :param most: of all methods together; None for all
    """
    orders = []
    for method in methods:
        found = grid(method, layers)
        made = [list(features(one, layers, dtype, group_size).values()) for one in found]
        widest = max(len(one.block) + len(one.kind) for one in found)
        whole = [i for i, one in enumerate(found) if len(one.block) + len(one.kind) == widest]
        orders.append([found[i] for i in space_filling(np.array(made), whole)])
    taken_in_turns = filter(None, chain.from_iterable(zip_longest(*orders)))
    return list(islice(taken_in_turns, most))


def processes_of(wanted: int, model_bytes: int) -> int:
    """Processes that memory allows, at least one.

    :param wanted: at most
    :param model_bytes: of the model's weights
    """
    one = _COPIES * model_bytes
    spare = psutil.virtual_memory().available - one  # of what makes the weights
    allowed = [wanted, int(spare // one)]
    if torch.cuda.is_available():
        free = [torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())]
        # a model and what runs through it; on the first device another one is quantized
        allowed.append(sum(int(each // (2 * model_bytes)) for each in free) - 1)
    return max(1, min(allowed))


def _check_apart(method: str, files: Mapping[str, Path]) -> None:
    """
    :raises ValueError: if two cells change one tensor, so that they do not go together
    """
    owners = {}
    for cell, path in files.items():
        with safe_open(path, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118  not a dict
                if owners.setdefault(name, cell) != cell:
                    raise ValueError(
                        f"--methods {method}: {name} is changed for {owners[name]} and for {cell}, "
                        "which this model cannot have apart: leave the method out"
                    )


def _load(model: str, trust_remote_code: bool) -> nn.Module:
    loaded = load_model(model, trust_remote_code)
    linearize_experts(loaded)
    return loaded


_scorer: _Scorer | None = None  # of a process of the pool


def _begin(model: str, judged: Judged, devices, threads: int, trust_remote_code: bool) -> None:
    global _scorer
    torch.set_num_threads(threads)
    _scorer = _Scorer(model, judged, devices.get(), trust_remote_code)


def _score(job: _Job) -> dict[str, float]:
    return _scorer.score(job)


def _key(row: Mapping) -> tuple:
    return tuple(row[name] for name in ("method", "bits", "component", "block", "kind"))
