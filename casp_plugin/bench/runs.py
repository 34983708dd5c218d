"""Rounds of a benchmark: every model runs in a process of its own, and all answer in turns, so that
other load on the machine affects all of them alike."""

import multiprocessing
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from statistics import median

from pydantic import BaseModel, ConfigDict
from rich.table import Table
from tqdm import tqdm

from casp_plugin.bench.engines import ENGINES, Round, Workload, answer
from casp_plugin.model.load import bytes_on_disk
from casp_plugin.system.machine import device_name, installed_versions

__all__ = ["QUANTITIES", "Quantity", "Speed", "measure", "ratios_to", "speed_table"]


class Speed(BaseModel):
    """Rounds of one model.

    :param model: folder or Hugging Face id
    :param engine: a key of ``ENGINES``
    :param device: name of the device that it ran on
    :param versions: versions of the packages that took part
    :param workload: request that it answered
    :param bytes_on_disk: bytes of its safetensors files; None if it is no folder
    :param rounds: measurements of all answers
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    engine: str
    device: str
    versions: dict[str, str]
    workload: Workload
    bytes_on_disk: int | None
    rounds: tuple[Round, ...]

    @property
    def prefill(self) -> float:
        """Return the median seconds to the first new token."""
        return median(answered.prefill for answered in self.rounds)

    @property
    def decode(self) -> float:
        """Return the median tokens per second after the first token, of all prompts of the batch
        together.

        :raises ValueError: if all tokens of an answer took no longer than one
        """
        return median(map(self._decode, self.rounds))

    @property
    def prefill_memory(self) -> int:
        """Return the largest memory until the first new token, bytes."""
        return max(answered.prefill_memory for answered in self.rounds)

    @property
    def memory(self) -> int:
        """Return the largest memory until the last token, bytes."""
        return max(answered.memory for answered in self.rounds)

    def _decode(self, answered: Round) -> float:
        """Return the tokens per second of one round after the first token."""
        tokens = self.workload.batch_size * (self.workload.new_tokens - 1)
        if answered.total <= answered.prefill:
            raise ValueError(
                f"{self.model}: {self.workload.new_tokens} new tokens took no longer than one: "
                "more are needed to tell the time of each"
            )
        return tokens / (answered.total - answered.prefill)

    def against(self, baseline: "Speed") -> dict[str, tuple[float, float, float]]:
        """Return ratios of ``prefill`` and ``decode`` to a baseline in the same rounds: their
        median, the lowest and the highest."""
        pairs = list(zip(self.rounds, baseline.rounds, strict=True))
        ratios = {
            "prefill": [ours.prefill / theirs.prefill for ours, theirs in pairs],
            "decode": [self._decode(ours) / baseline._decode(theirs) for ours, theirs in pairs],
        }
        return {name: (median(rows), min(rows), max(rows)) for name, rows in ratios.items()}


@dataclass(frozen=True)
class Quantity:
    """A quantity of a benchmark, as tables show it.

    :param label: name and unit
    :param attribute: attribute of ``Speed`` that holds it
    :param spec: format of its values
    :param scale: factor from the attribute to the unit
    """

    label: str
    attribute: str
    spec: str
    scale: float = 1.0

    def text(self, speed: Speed) -> str:
        """Return the value of a model as text; empty where it is not known."""
        value = getattr(speed, self.attribute)
        return "" if value is None else f"{value * self.scale:{self.spec}}"


QUANTITIES = (
    Quantity("files, GB", "bytes_on_disk", ".3f", 1e-9),
    Quantity("prefill, s", "prefill", ".3f"),
    Quantity("decode, tokens/s", "decode", ".1f"),
    Quantity("peak memory at prefill, GB", "prefill_memory", ".2f", 1e-9),
    Quantity("peak memory, GB", "memory", ".2f", 1e-9),
)


def ratios_to(speed: Speed, baseline: Speed) -> dict[str, tuple[float, ...]]:
    """Return ratios to a baseline by attribute of ``Speed``, followed by the lowest and the highest
    of all rounds where rounds were compared."""
    ratios = {}
    for quantity in QUANTITIES:
        pair = getattr(speed, quantity.attribute), getattr(baseline, quantity.attribute)
        if all(pair):
            ratios[quantity.attribute] = (pair[0] / pair[1],)
    return ratios | speed.against(baseline)


def measure(
    models: Sequence[str],
    workload: Workload,
    engine: str = "hf",
    rounds: int = 5,
    warmup: int = 1,
    arguments: dict | None = None,
) -> list[Speed]:
    """Measure models in turns, with all of them in memory at the same time.

    :param models: folders or Hugging Face ids
    :param workload: request that they answer
    :param engine: a key of ``ENGINES``
    :param rounds: rounds that count
    :param warmup: rounds before these, which do not count
    :param arguments: more arguments of ``from_pretrained`` or ``vllm.LLM``
    :raises ChildProcessError: if a model cannot be loaded or run
    """
    measured = [[] for _ in models]
    with _workers(models, workload, engine, arguments or {}) as workers:
        for index in tqdm(range(warmup + rounds), desc="Rounds"):
            for model, worker, rows in zip(models, workers, measured, strict=True):
                worker.send("round")
                answered = _received(worker, model)
                if index >= warmup:
                    rows.append(answered)
    shared = {"engine": engine, "device": device_name(), "versions": installed_versions()}
    return [
        Speed(
            model=model,
            workload=workload,
            bytes_on_disk=bytes_on_disk(model),
            rounds=rows,
            **shared,
        )
        for model, rows in zip(models, measured, strict=True)
    ]


def speed_table(speeds: Sequence[Speed]) -> Table:
    """Return a table with a column for every model, and ratios to the first model."""
    first = speeds[0]
    table = Table(title=f"{first.engine}, {first.device}", title_justify="left")
    for column in ("", *(speed.model for speed in speeds)):
        table.add_column(column, justify="right" if column else "left")

    ratios = [{} if speed is first else ratios_to(speed, first) for speed in speeds]
    for quantity in QUANTITIES:
        cells = []
        for speed, to_first in zip(speeds, ratios, strict=True):
            middle, *ends = to_first.get(quantity.attribute, (None,))
            ratio = "" if middle is None else f"  x{middle:.3g}"
            ratio += f" [{ends[0]:.3g}, {ends[1]:.3g}]" if ends else ""
            cells.append(quantity.text(speed) + ratio)
        table.add_row(quantity.label, *cells)
    return table


@contextmanager
def _workers(models, workload, engine, arguments) -> Iterator[list[Connection]]:
    """Start a process for every model; end them afterwards."""
    context = multiprocessing.get_context("spawn")
    started = []
    try:
        for model in models:
            ours, theirs = context.Pipe()
            target = (theirs, model, workload, engine, arguments)
            process = context.Process(target=_work, args=target)
            process.start()
            theirs.close()
            started.append((process, ours))
            _received(ours, model)  # one model loads at a time, so that peaks of memory do not add
        yield [ours for _, ours in started]
    finally:
        for process, ours in started:
            ours.close()
            process.join(60)
            process.terminate()


def _received(worker: Connection, model: str) -> Round | None:
    """Return the message of a worker: None when its model is loaded, then rounds.

    :raises ChildProcessError: if the worker failed
    """
    try:
        message = worker.recv()
    except EOFError:
        raise ChildProcessError(f"{model}: the process that ran it died; out of memory?") from None
    if isinstance(message, str):
        raise ChildProcessError(f"{model}: {message}")
    return message


def _work(parent: Connection, model: str, workload: Workload, engine: str, arguments: dict) -> None:
    """Load a model, and answer the workload whenever the parent asks."""
    try:
        loaded = ENGINES[engine](model, workload, **arguments)
        parent.send(None)
        while parent.recv():
            parent.send(answer(loaded, workload))
    except EOFError:  # no more rounds
        return
    except Exception as error:
        traceback.print_exc()
        parent.send(f"{type(error).__name__}: {error}")
