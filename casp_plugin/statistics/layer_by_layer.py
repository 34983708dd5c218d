"""Measuring a model part by part: what is noted down of one is kept before the next one runs."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from operator import or_

import torch
from llmcompressor.pipelines.sequential.helpers import Subgraph
from loguru import logger
from torch import nn

from casp_plugin.model.low_rank_linear import named_linears
from casp_plugin.model.units import decoder_layers, reading_together
from casp_plugin.statistics.cache import MeasurementCache
from casp_plugin.statistics.derivatives import LossGradients, weights_read
from casp_plugin.statistics.forward import Part, calibrating, collect_derivatives, collect_parts
from casp_plugin.statistics.hooks import Hooks, on_device
from casp_plugin.statistics.layer_notes import Measured
from casp_plugin.statistics.statistics import Request, Statistics
from casp_plugin.statistics.tracing import subgraphs_of
from casp_plugin.system.distributed import barrier, gathered, number_of_ranks, own_share
from casp_plugin.system.messages import one_line

__all__ = ["FirstBatch", "measure", "noted", "try_first_batch"]

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
        for part in _parts(model, dataloader, request, whole.end):
            new = part.statistics.reached - whole.statistics.reached  # but for what runs twice
            mine = new if number_of_ranks() == 1 else _own_share(new, model)
            # read again, so that pages which were looked at are let go
            parts.append(cache.keep_part(len(parts), _noted(part, cache.derivatives(), mine, note)))
            whole |= parts[-1]
            del part  # before the next one sums up its own
    whole.statistics |= Statistics(attention_densities=densities)
    return whole


@dataclass(frozen=True)
class FirstBatch:
    """What one batch tells of the linears of a model.

    :param reached: those that were called
    :param read: those that were not, but whose weights the loss depends on
    """

    reached: frozenset[str] = frozenset()
    read: frozenset[str] = frozenset()


def try_first_batch(
    model: nn.Module, dataloader: Iterable[dict], gradients: frozenset[str] = frozenset()
) -> FirstBatch:
    """Run one batch through a model: what cannot be measured fails now.

    :param gradients: linears for whose outputs gradients will be wanted
    :raises ValueError: if the model cannot be run so
    """
    with torch.random.fork_rng(devices=[]):  # asking for a batch changes nothing that comes after
        batch = next(iter(dataloader), None)
    if batch is None:
        return FirstBatch()
    if "input_ids" not in batch:
        raise ValueError(f"batches of the data hold {', '.join(batch)}, but no input_ids")
    linears, layers = dict(named_linears(model)), decoder_layers(model)
    reached: set[str] = set()
    with calibrating(model):
        try:
            with Hooks(model) as hooks:
                for name in linears:
                    hooks.add(name, lambda *_, name=name: reached.add(name))
                if gradients:
                    squares = LossGradients(gradients, frozenset())
                    squares.collect(model, [batch], layers, "Trying one batch")
                else:
                    with torch.no_grad():
                        model(**on_device(batch, model))
            found = frozenset().union(*gathered(frozenset(reached)))
            unseen = {name: each for name, each in linears.items() if name not in found}
            return FirstBatch(found, weights_read(model, batch, layers, unseen))
        except (ValueError, OSError):
            raise
        except Exception as error:  # whatever its code meets
            raise ValueError(
                f"{type(model).__name__} cannot be measured on the first batch of the data: "
                f"{type(error).__name__}: {one_line(error)[:300]}"
            ) from error


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


def _parts(
    model: nn.Module, dataloader: Iterable[dict], request: Request, after: int
) -> Iterator[Part]:
    """Statistics part by part; of the model as a whole where that fails on the way."""
    subgraphs = _subgraphs(model, dataloader)
    try:
        yield from collect_parts(model, dataloader, request, subgraphs, after)
    except (OSError, ValueError):  # a full disk; data that is at fault
        raise
    except Exception as error:  # code that goes another way for some batch
        if len(subgraphs) < 2:
            raise
        logger.warning(
            f"{type(model).__name__} cannot be run part by part ({type(error).__name__}: {error}): "
            "statistics of all layers at once. Where the quantizer fails too, calibrate as a "
            "whole: --pipeline basic, oneshot(pipeline='basic')"
        )
        yield from collect_parts(model, dataloader, request)


def _subgraphs(model: nn.Module, dataloader: Iterable[dict]) -> list[Subgraph]:
    """None where the model must run as a whole."""
    try:
        return subgraphs_of(model, dataloader)
    except ValueError as error:  # unless oneshot was given another pipeline or tracing_ignore
        logger.warning(f"statistics of all layers at once, and calibration may fail: {error}")
        return []
