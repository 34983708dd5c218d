"""What measuring a model takes, told before it starts: memory, disk, time.

Operations are counted from shapes alone and divided by what this machine does in a second, which is
measured on small tensors. That tells hours from minutes, and whether the memory is enough;
``benchmarks/growth.py`` puts it beside what was used.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from llmcompressor.utils.transformers import get_embeddings
from torch import nn
from torch.utils.benchmark import Timer

from casp_plugin.model.low_rank_linear import named_linears
from casp_plugin.model.schemes import weight_args
from casp_plugin.model.units import decoder_layers, reading_together
from casp_plugin.plan.plan import UnitPlan
from casp_plugin.pricing.rounding_error import SAMPLED_ROWS, WAITING_BYTES, rounding_delta
from casp_plugin.statistics.derivatives import CHUNK, SAMPLES, TOKENS
from casp_plugin.statistics.forward import PART_BYTES
from casp_plugin.statistics.statistics import Request

__all__ = ["Data", "Estimate", "Work", "disk_of", "estimate", "memory_of", "speed_of", "work_of"]

#: what a pass takes beside its matrix products: norms, softmax, attention
BESIDE = 2
#: what libraries need for themselves, and pages between blocks
SLACK = 1.1


@dataclass(frozen=True)
class Data:
    """Calibration data.

    :param sequences: how many
    :param tokens: of a sequence, at most
    """

    sequences: int
    tokens: int

    @property
    def all_tokens(self) -> int:
        return self.sequences * self.tokens

    @property
    def derived_tokens(self) -> int:
        """That derivatives are taken from."""
        return min(self.all_tokens, max(SAMPLES * self.tokens, TOKENS))


@dataclass(frozen=True)
class Work:
    """Counts of what there is to do; or of what a machine does in a second.

    :param passes: floating-point operations of the model, in its own dtype
    :param products: the same of second moments, in float32
    :param eigenvalues: cubes of the sizes of symmetric matrices, in float64
    :param inverses: cubes of the sizes of moments that GPTQ inverts, in float32
    :param columns: steps of GPTQ through the columns of weights that are rounded together
    :param entries: of weights that are rounded
    """

    passes: float
    products: float
    eigenvalues: float
    inverses: float
    columns: float
    entries: float

    def seconds(self, speed: "Work") -> float:
        """What it takes a machine.

        :param speed: what that does in a second
        """
        return sum(getattr(self, each.name) / getattr(speed, each.name) for each in fields(self))


def speed_of(dtype: torch.dtype) -> Work:
    """What this machine does in a second, on the device that calibration will use; takes about a
    second itself.

    :param dtype: of the model
    """
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    size = 512
    generator = torch.Generator(device).manual_seed(0)  # the run's own chance stays as it was
    wide = torch.randn(size, 4 * size, device=device, generator=generator)
    tall = wide.to(dtype)
    square = wide[:, :size].double()
    moment = (square @ square.T + size * torch.eye(size, device=device)).float()
    narrow = moment[:256, :256]
    args = weight_args(4, -1)

    def rounding(rows: int) -> float:
        weight = wide[:rows, :256]
        return _seconds(lambda: rounding_delta(weight, args, narrow))

    column, block = rounding(1), rounding(size)
    return Work(
        passes=8 * size**3 / _seconds(lambda: tall @ tall.T) / BESIDE,
        products=8 * size**3 / _seconds(lambda: wide @ wide.T),
        eigenvalues=size**3 / _seconds(lambda: torch.linalg.eigh(square + square.T)),
        inverses=size**3 / _seconds(lambda: torch.linalg.cholesky(_inverse(moment))),
        columns=256 / column,
        entries=size * 256 / max(block - column, column / 100),
    )


@dataclass(frozen=True)
class Estimate:
    """What measuring is expected to take.

    :param memory: bytes of resident memory at the peak, this process and the model in it; on a
        machine with an accelerator a part of it lies there
    :param disk: bytes that the cache takes
    :param seconds: on the clock
    """

    memory: int
    disk: int
    seconds: float

    @property
    def duration(self) -> str:
        """The time in words, as exact as it is known."""
        if self.seconds < 90:
            return f"{self.seconds:.0f} seconds"
        minutes = self.seconds / 60
        return f"{minutes:.0f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"


def estimate(
    model: nn.Module, request: Request, units: list[UnitPlan], data: Data, resident: int
) -> Estimate:
    """What it takes to measure all that is requested.

    :param model: the dense model, which may live on the meta device
    :param request: what will be measured
    :param units: with their candidates; what rounding is measured of
    :param data: that it is measured on
    :param resident: bytes that the process holds already
    """
    speed = speed_of(next(model.parameters()).dtype)
    return Estimate(
        resident + memory_of(model, request, data),
        disk_of(model, request),
        work_of(model, request, units, data).seconds(speed),
    )


def work_of(model: nn.Module, request: Request, units: list[UnitPlan], data: Data) -> Work:
    """Counts from shapes; see :func:`estimate`."""
    linears = dict(named_linears(model))
    head = get_embeddings(model)[1]
    weights = sum(each.weight.numel() for each in linears.values() if each is not head)
    derived = data.derived_tokens
    passes = 2 * weights * data.all_tokens
    if request.gradients or request.gradient_moments:  # there, again in every layer, and back
        passes += (6 * weights + 4 * (head.weight.numel() if head is not None else 0)) * derived
    if request.attention_maps:
        passes += 2 * weights * derived
    if request.attention_moments:
        passes += 4 * weights * derived
    inputs = _inputs(linears, request)
    products = sum(2 * columns**2 * data.all_tokens for columns in inputs)
    products += 2 * _metric_entries(linears, request) * derived
    eigenvalues = sum(linears[name].out_features ** 3 for name in _metrics(request))
    for rows, columns in _factored(linears, request):
        eigenvalues += rows**3
        products += 2 * rows * columns * (rows + columns)
    return Work(passes, products, eigenvalues, *_rounding(units, bool(request.second_moments)))


def memory_of(model: nn.Module, request: Request, data: Data) -> int:
    """Bytes beside the process itself: the model and the larger of what the passes hold."""
    linears = dict(named_linears(model))
    layers = [model.get_submodule(name) for name in decoder_layers(model)]
    stored = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
    size = next(model.parameters()).element_size()
    embeddings, head = get_embeddings(model)
    hidden = embeddings.weight.shape[1] if embeddings is not None else 0
    back = derived = 4 * _metric_entries(linears, request)
    if request.gradients or request.gradient_moments:
        parts = layers or [model]  # nothing is run again on the way back where there are none
        outputs = (sum(each.out_features for _, each in named_linears(part)) for part in parts)
        logits = (head.out_features if head is not None else 0) * (data.tokens * size + 16 * CHUNK)
        back += logits + data.tokens * size * (len(layers) * hidden + 4 * max(outputs))
    inputs = [4 * columns**2 for columns in _inputs(linears, request)]
    largest = max(inputs, default=0)
    part = min(sum(inputs) + derived, PART_BYTES + (sum(inputs) + derived) // max(len(layers), 1))
    waiting = 4 * max(min(sum(inputs), WAITING_BYTES), largest)  # stacked, inverted, factored
    # eigenvectors and what a solver works in, in float64
    shapes = _factored(linears, request)
    solving = 8 * max((rows * (5 * rows + columns) for rows, columns in shapes), default=0)
    forward = data.all_tokens * hidden * size + part + max(waiting, solving)
    return round(SLACK * (stored + max(back, forward)))


def disk_of(model: nn.Module, request: Request) -> int:
    """Bytes of derivatives and of spectra."""
    linears = dict(named_linears(model))
    # factors of the largest rank are as large as the layers
    factors = sum(rows * columns for rows, columns in _factored(linears, request))
    return 4 * (_metric_entries(linears, request) + factors)


def _factored(linears: dict[str, nn.Linear], request: Request) -> list[tuple[int, int]]:
    """Shapes (rows, columns) of the stacked weights of linears that may share a latent."""
    return [
        (sum(linears[name].out_features for name in names), linears[names[0]].in_features)
        for names in reading_together(sorted(request.reached))
    ]


def _metric_entries(linears: dict[str, nn.Linear], request: Request) -> int:
    """Entries of the second moments of derivatives."""
    return sum(linears[name].out_features ** 2 for name in _metrics(request))


def _metrics(request: Request) -> frozenset[str]:
    """Linears whose derivatives' second moments are wanted."""
    return request.gradient_moments | request.attention_moments


def _inputs(linears: dict[str, nn.Linear], request: Request) -> list[int]:
    """Columns of the second moments that are summed up; those of experts that read what the layer
    reads are one."""
    first = {}
    for names in reading_together(sorted(request.second_moments)):
        layer = names[0].rpartition(".experts.")[0]
        own = not layer or names[0].endswith("down_proj")
        first.setdefault(names[0] if own else layer, linears[names[0]].in_features)
    return list(first.values())


def _rounding(units: list[UnitPlan], by_gptq: bool) -> tuple[float, float, float]:
    """(inverses, columns, entries) of measuring what rounding costs."""
    inverses = entries = 0
    waiting = defaultdict(int)  # bytes by width
    bits = max((len({c.bits for c in unit.candidates}) for unit in units), default=0)
    for unit in units:
        ranks = {c.rank for c in unit.candidates} - {None}
        for names in reading_together(unit.modules):
            up = sum(min(unit.modules[name][0], SAMPLED_ROWS) for name in names)
            rows = up + sum(min(rank, SAMPLED_ROWS) for rank in ranks)  # dense, and every `down`
            columns = unit.modules[names[0]][1]
            entries += bits * (rows * columns + up * sum(ranks))
            inverses += bits * (columns**3 + len(names) * sum(rank**3 for rank in ranks))
            waiting[columns] += 4 * columns * (rows + columns)
            for rank in ranks:
                waiting[rank] += 4 * len(names) * rank**2
    steps = sum(bits * columns * -(-held // WAITING_BYTES) for columns, held in waiting.items())
    return (inverses, steps, entries) if by_gptq else (0, 0, entries)


def _inverse(moment: torch.Tensor) -> torch.Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(moment))


def _seconds(work: Callable[[], object]) -> float:
    """What a call takes, on as many threads as torch has."""
    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return timer.timeit(4).mean
