"""Measure a model section by section: notes of one are stored before the next one runs."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import or_

import torch
from llmcompressor.pipelines.sequential.helpers import Subgraph
from loguru import logger
from torch import nn

from casp_plugin.model.low_rank_linear import named_linears
from casp_plugin.model.units import decoder_layers, reading_together
from casp_plugin.statistics.cache import StatisticsCache
from casp_plugin.statistics.derivatives import weights_read
from casp_plugin.statistics.forward import (
    SectionStatistics,
    calibrating,
    collect_derivatives,
    collect_sections,
    derivative_parts,
)
from casp_plugin.statistics.hooks import Hooks, on_device
from casp_plugin.statistics.layer_notes import LayerNotes
from casp_plugin.statistics.statistics import Request, Statistics
from casp_plugin.statistics.tracing import subgraphs_of
from casp_plugin.system.distributed import barrier, gathered, number_of_ranks, own_share
from casp_plugin.system.messages import one_line

__all__ = ["FirstBatch", "measure", "take_notes", "try_first_batch"]

#: adds to the notes what the modifiers need of the measured layers
Note = Callable[[Statistics, LayerNotes], None]


def measure(
    model: nn.Module,
    dataloader: Iterable[dict],
    request: Request,
    cache: StatisticsCache,
    note: Note,
) -> LayerNotes:
    """Return the notes of all layers; sections in the cache are not measured again.

    :param model: the dense model
    :param dataloader: calibration batches
    :param request: the statistics that ``note`` needs
    :param cache: notes of earlier runs; new ones are added
    :param note: takes the notes of a section's layers
    :raises ValueError: if there is no data
    """
    sections, parts = cache.sections(), derivative_parts(model, request)
    missing = [part for part in range(len(parts)) if cache.derivatives(part) is None]
    barrier()  # all ranks have read before any rank writes
    for part in missing:
        with _explained(model):
            collected = collect_derivatives(model, dataloader, parts[part])
        cache.keep_derivatives(part, collected)
        del collected

    def derivatives() -> Statistics:
        """Return all parts, mapped anew, so that pages in use are released."""
        return reduce(or_, map(cache.derivatives, range(len(parts))))

    densities = derivatives().attention_densities
    whole = reduce(or_, sections, LayerNotes(last=not request.forward))
    if not whole.last:
        for section in _collect_sections(model, dataloader, request, whole.end):
            new = section.statistics.reached - whole.statistics.reached  # a layer may run twice
            mine = new if number_of_ranks() == 1 else _own_share(new, model)
            notes = _notes_of_section(section, derivatives(), mine, note)
            sections.append(cache.keep_section(len(sections), notes))
            whole |= sections[-1]
            del section, notes  # frees its statistics before the next section runs
    metrics = derivatives().gradient_moments
    whole.statistics |= Statistics(attention_densities=densities, gradient_moments=metrics)
    return whole


@dataclass(frozen=True)
class FirstBatch:
    """Linears of a model that one batch uses.

    :param reached: linears that were called
    :param read: linears that were not called, but whose weights the loss depends on
    """

    reached: frozenset[str] = frozenset()
    read: frozenset[str] = frozenset()


def try_first_batch(model: nn.Module, dataloader: Iterable[dict]) -> FirstBatch:
    """Run one batch through a model, so that a model that cannot be measured fails early.

    :raises ValueError: if the batches hold no ``input_ids``, or the model cannot run them
    """
    with torch.random.fork_rng(devices=[]):  # reading a batch must not change later draws
        batch = next(iter(dataloader), None)
    if batch is None:
        return FirstBatch()
    if "input_ids" not in batch:
        raise ValueError(f"batches of the data hold {', '.join(batch)}, but no input_ids")
    linears, layers = dict(named_linears(model)), decoder_layers(model)
    reached: set[str] = set()
    with calibrating(model), _explained(model):
        with Hooks(model) as hooks, torch.no_grad():
            for name in linears:
                hooks.add(name, lambda *_, name=name: reached.add(name))
            model(**on_device(batch, model))
        called = frozenset().union(*gathered(frozenset(reached)))
        unseen = {name: linear for name, linear in linears.items() if name not in called}
        return FirstBatch(called, weights_read(model, batch, layers, unseen))


@contextmanager
def _explained(model: nn.Module) -> Iterator[None]:
    """Name the model in errors of its own code.

    :raises ValueError: instead of them
    """
    try:
        yield
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the model's code raises anything
        raise ValueError(
            f"{type(model).__name__} cannot be measured on the data: {type(error).__name__}: "
            f"{one_line(error)[:300]}"
        ) from error


def _notes_of_section(
    section: SectionStatistics, derivatives: Statistics, mine: frozenset[str], note: Note
) -> LayerNotes:
    """Return the notes of this rank's layers of a section."""
    forward = section.statistics.of(mine | section.statistics.influences.keys())
    notes = take_notes(forward | derivatives.of(mine), note)
    notes.end, notes.last = section.end, section.last
    return notes


def take_notes(statistics: Statistics, note: Note) -> LayerNotes:
    """Return the notes of measured layers, with the small ones of their statistics."""
    small = ("influences", "attention_densities", "routed", "reached", "tokens")
    kept = Statistics(**{name: getattr(statistics, name) for name in small})
    notes = LayerNotes(statistics=kept)
    note(statistics, notes)
    return notes


def _own_share(names: frozenset[str], model: nn.Module) -> frozenset[str]:
    """Return this rank's linears to factor and price; linears with one input stay together."""

    def work(group: tuple[str, ...]) -> float:
        return sum(model.get_submodule(name).weight.numel() for name in group)

    groups = own_share(map(tuple, reading_together(sorted(names))), work)
    return frozenset(name for group in groups for name in group)


def _collect_sections(
    model: nn.Module, dataloader: Iterable[dict], request: Request, after: int
) -> Iterator[SectionStatistics]:
    """Yield statistics section by section, or of the whole model where running sections fails."""
    subgraphs = _subgraphs(model, dataloader)
    try:
        yield from collect_sections(model, dataloader, request, subgraphs, after)
    except (OSError, ValueError):  # a full disk, faulty data
        raise
    except Exception as error:  # code that branches differently for some batch
        if len(subgraphs) < 2:
            raise
        logger.warning(
            f"{type(model).__name__} cannot be run part by part ({type(error).__name__}: {error}): "
            "statistics of all layers at once. Where the quantizer fails too, calibrate as a "
            "whole: --pipeline basic, oneshot(pipeline='basic')"
        )
        yield from collect_sections(model, dataloader, request)


def _subgraphs(model: nn.Module, dataloader: Iterable[dict]) -> list[Subgraph]:
    """Return the subgraphs of a model; an empty list where it must run as a whole."""
    try:
        return subgraphs_of(model, dataloader)
    except ValueError as error:  # unless oneshot was given another pipeline or tracing_ignore
        logger.warning(f"statistics of all layers at once, and calibration may fail: {error}")
        return []
