"""Measuring a model part by part: what is noted down of one is kept before the next one runs."""

from collections.abc import Callable, Iterable
from functools import reduce
from operator import or_

from llmcompressor.pipelines.sequential.helpers import Subgraph
from loguru import logger
from torch import nn

from casp_plugin.cache import MeasurementCache
from casp_plugin.collection import Part, collect_derivatives, collect_parts
from casp_plugin.measured import Measured
from casp_plugin.ranks import barrier, number_of_ranks, own_share
from casp_plugin.statistics import Request, Statistics
from casp_plugin.tracing import subgraphs_of
from casp_plugin.units import reading_together

__all__ = ["measure", "noted"]

#: notes down what will be needed of some layers
Note = Callable[[Statistics, Measured], None]


def measure(
    model: nn.Module,
    dataloader: Iterable[dict],
    request: Request,
    cache: MeasurementCache,
    note: Note,
) -> Measured:
    """What is noted down of all layers; what the cache has is not measured again.

    :param model: the dense model
    :param dataloader: calibration batches
    :param request: what is to be noted down from
    :raises ValueError: if there is no data
    """
    parts, derivatives = cache.parts(), cache.derivatives()
    barrier()  # all have looked before any writes
    if derivatives is None:
        derivatives = cache.keep_derivatives(collect_derivatives(model, dataloader, request))
    densities = derivatives.attention_densities
    del derivatives
    whole = reduce(or_, parts, Measured(last=False))
    if not whole.last:
        subgraphs = _subgraphs(model, dataloader)
        for part in collect_parts(model, dataloader, request, subgraphs, whole.end):
            new = part.statistics.reached - whole.statistics.reached  # but for what runs twice
            mine = new if number_of_ranks() == 1 else _own_share(new, model)
            # read again, so that pages which were looked at are let go
            parts.append(cache.keep_part(len(parts), _noted(part, cache.derivatives(), mine, note)))
            whole |= parts[-1]
            del part  # before the next one sums up its own
    whole.statistics |= Statistics(attention_densities=densities)
    return whole


def _noted(part: Part, derivatives: Statistics, mine: frozenset[str], note: Note) -> Measured:
    """What is noted down of the layers of a part that are this rank's."""
    here = part.statistics
    found = noted(here.of(mine | here.influences.keys()) | derivatives.of(mine), note)
    found.end, found.last = part.end, part.last
    return found


def noted(statistics: Statistics, note: Note) -> Measured:
    """What is noted down of some layers."""
    small = ("influences", "attention_densities", "routed", "reached", "tokens")
    kept = Statistics(**{name: getattr(statistics, name) for name in small})
    found = Measured(statistics=kept)
    note(statistics, found)
    return found


def _own_share(names: frozenset[str], model: nn.Module) -> frozenset[str]:
    """Linears whose factorisations and prices are this rank's; those that read one input stay
    together."""

    def work(group: tuple[str, ...]) -> float:
        return sum(model.get_submodule(name).weight.numel() for name in group)

    groups = own_share(map(tuple, reading_together(sorted(names))), work)
    return frozenset(name for group in groups for name in group)


def _subgraphs(model: nn.Module, dataloader: Iterable[dict]) -> list[Subgraph]:
    """None where the model must run as a whole."""
    try:
        return subgraphs_of(model, dataloader)
    except ValueError as error:  # unless oneshot was given another pipeline or tracing_ignore
        logger.warning(f"statistics of all layers at once, and calibration may fail: {error}")
        return []
