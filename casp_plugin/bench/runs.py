"""Models side by side: a process for each, asked in turns, so that what else the machine does falls
on all of them alike."""

import multiprocessing
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from statistics import median

from pydantic import BaseModel, ConfigDict
from rich.table import Table
from tqdm import tqdm

from casp_plugin.bench.engines import ENGINES, Round, Workload, answer
from casp_plugin.model.load import bytes_on_disk
from casp_plugin.system.machine import device_name, installed_versions

__all__ = ["Speed", "measure", "speed_table"]


class Speed(BaseModel):
    """Rounds of one model.

    :param model: folder or Hugging Face id
    :param engine: ``hf`` or ``vllm``
    :param bytes_on_disk: of its safetensors files; None where it is no folder
    :param device: what it ran on
    :param versions: of the packages that took part
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
        """Median seconds to the first new token."""
        return median(each.prefill for each in self.rounds)

    @property
    def decode(self) -> float:
        """Median tokens a second after the first, all prompts of the batch together.

        :raises ValueError: if the tokens are so few that they took no longer than one
        """
        return median(map(self._decode, self.rounds))

    @property
    def prefill_memory(self) -> int:
        """Largest memory until the first new token, bytes."""
        return max(each.prefill_memory for each in self.rounds)

    @property
    def memory(self) -> int:
        """Largest memory until the last token, bytes."""
        return max(each.memory for each in self.rounds)

    def _decode(self, one: Round) -> float:
        made = self.workload.batch_size * (self.workload.new_tokens - 1)
        if one.total <= one.prefill:
            raise ValueError(
                f"{self.model}: {self.workload.new_tokens} new tokens took no longer than one: "
                "more are needed to tell the time of each"
            )
        return made / (one.total - one.prefill)

    def against(self, baseline: "Speed") -> dict[str, tuple[float, float, float]]:
        """Ratios to a baseline asked in the same rounds: median, lowest, highest of the rounds'."""

        def of(ratios: list[float]) -> tuple[float, float, float]:
            return median(ratios), min(ratios), max(ratios)

        pairs = list(zip(self.rounds, baseline.rounds, strict=True))
        return {
            "prefill": of([one.prefill / other.prefill for one, other in pairs]),
            "decode": of([self._decode(one) / baseline._decode(other) for one, other in pairs]),
        }


def measure(
    models: Sequence[str],
    workload: Workload,
    engine: str = "hf",
    rounds: int = 5,
    warmup: int = 1,
    arguments: dict | None = None,
) -> list[Speed]:
    """Ask models in turns, all of which are in memory at the same time.

    :param models: folders or Hugging Face ids
    :param workload: what they are asked
    :param engine: a key of ``ENGINES``
    :param rounds: that count
    :param warmup: rounds before, that do not
    :param arguments: more for ``from_pretrained`` or ``vllm.LLM``
    :raises ChildProcessError: if a model cannot be loaded or run
    """
    found = [[] for _ in models]
    with _workers(models, workload, engine, arguments or {}) as workers:
        for index in tqdm(range(warmup + rounds), desc="Rounds"):
            for model, worker, rows in zip(models, workers, found, strict=True):
                worker.send("round")
                one = _received(worker, model)
                if index >= warmup:
                    rows.append(one)
    shared = {"engine": engine, "device": device_name(), "versions": installed_versions()}
    return [
        Speed(
            model=model,
            workload=workload,
            bytes_on_disk=bytes_on_disk(model),
            rounds=rows,
            **shared,
        )
        for model, rows in zip(models, found, strict=True)
    ]


def speed_table(speeds: Sequence[Speed]) -> Table:
    """A column a model, with ratios to the first."""
    first = speeds[0]
    table = Table(title=f"{first.engine}, {first.device}", title_justify="left")
    for column in ("", *(speed.model for speed in speeds)):
        table.add_column(column, justify="right" if column else "left")

    def cells(value, spec, ratio=None, scale=1.0):
        for speed in speeds:
            one = value(speed)
            text = "" if one is None else f"{one * scale:{spec}}"
            if speed is not first and None not in (one, value(first)):
                middle, *ends = ratio(speed) if ratio else [one / value(first)]
                text += f"  x{middle:.3g}"
                text += f" [{ends[0]:.3g}, {ends[1]:.3g}]" if ends else ""
            yield text

    gib = {"spec": ".3f", "scale": 1 / 2**30}
    table.add_row("files, GiB", *cells(lambda speed: speed.bytes_on_disk, **gib))
    ratios = {speed.model: speed.against(first) for speed in speeds}
    for name, value, spec in (
        ("prefill, s", "prefill", ".4f"),
        ("decode, tokens/s", "decode", ".2f"),
    ):
        found = cells(
            lambda speed, value=value: getattr(speed, value),
            spec,
            lambda speed, value=value: ratios[speed.model][value],
        )
        table.add_row(name, *found)
    table.add_row("peak memory, prefill, GiB", *cells(lambda speed: speed.prefill_memory, **gib))
    table.add_row("peak memory, GiB", *cells(lambda speed: speed.memory, **gib))
    return table


@contextmanager
def _workers(models, workload, engine, arguments) -> Iterator[list[Connection]]:
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
            _received(ours, model)  # loaded: one after the other, peaks of loading do not meet
        yield [ours for _, ours in started]
    finally:
        for process, ours in started:
            ours.close()
            process.join(60)
            process.terminate()


def _received(worker: Connection, model: str):
    try:
        found = worker.recv()
    except EOFError:
        raise ChildProcessError(f"{model}: the process that ran it died; out of memory?") from None
    if isinstance(found, str):
        raise ChildProcessError(f"{model}: {found}")
    return found


def _work(asked: Connection, model: str, workload: Workload, engine: str, arguments: dict) -> None:
    try:
        loaded = ENGINES[engine](model, workload, **arguments)
        asked.send(None)
        while asked.recv():
            asked.send(answer(loaded, workload))
    except EOFError:  # no more rounds
        return
    except Exception as error:
        traceback.print_exc()
        asked.send(f"{type(error).__name__}: {error}")
