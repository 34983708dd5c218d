"""Estimate before a run the memory, disk and time that measuring a model takes.

Operations are counted from shapes alone and divided by the speed of this machine, which is measured
on small tensors. That tells hours from minutes, and whether the memory is enough;
``benchmarks/growth.py`` compares the estimate with real runs.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from timeit import timeit

import torch
from llmcompressor.utils.transformers import get_embeddings
from torch import nn

from casp_plugin.maths.gptq_error import LEADING
from casp_plugin.model.low_rank_linear import named_linears
from casp_plugin.model.schemes import weight_args
from casp_plugin.model.units import decoder_layers, reading_together
from casp_plugin.plan.plan import UnitPlan
from casp_plugin.pricing.rounding_error import SAMPLED_ROWS, WAITING_BYTES, rounding_delta
from casp_plugin.statistics import attention_maps, derivatives, forward
from casp_plugin.statistics.hooks import row_blocks
from casp_plugin.statistics.statistics import Request

__all__ = ["Data", "Estimate", "Work", "disk_of", "estimate", "memory_of", "speed_of", "work_of"]

#: multiplications that take as long as everything else about an output of a linear layer: norms,
#: softmax, attention
BESIDE = 1800
#: memory in units of the tensors, for libraries and for pages between blocks
SLACK = 1.1


@dataclass(frozen=True)
class Data:
    """Size of the calibration data.

    :param sequences: number of sequences
    :param tokens: tokens of the longest sequence
    """

    sequences: int
    tokens: int

    @property
    def all_tokens(self) -> int:
        return self.sequences * self.tokens

    def first_tokens(self, samples: int, tokens: int) -> int:
        """Return the number of tokens of the first batches that hold enough.

        :param samples: least number of sequences
        :param tokens: least number of tokens
        """
        sequences = max(samples, -(-tokens // self.tokens))
        return min(self.sequences, sequences) * self.tokens


@dataclass(frozen=True)
class Work:
    """Operations of a run; or of a machine in a second.

    :param passes: floating-point operations of the model, in its own dtype
    :param products: floating-point operations of matrix products in float32
    :param eigenvalues: sum of n^3 over the symmetric matrices (n, n) to decompose, in float32
    :param roots: sum of n^3 over the moments (n, n) with a Cholesky factor, in float32
    :param columns: steps of GPTQ through the columns of weights that are rounded together
    :param entries: entries of the weights to round, scales included
    """

    passes: float
    products: float
    eigenvalues: float
    roots: float
    columns: float
    entries: float

    def seconds(self, speed: "Work") -> float:
        """Return the seconds that a machine takes.

        :param speed: operations of the machine in a second
        """
        return sum(getattr(self, kind.name) / getattr(speed, kind.name) for kind in fields(self))


@cache
def speed_of(dtype: torch.dtype) -> Work:
    """Measure the operations of this machine in a second, on the device that calibration will use,
    once in a process.

    :param dtype: dtype of the model
    """
    device = _device()
    # launches would hide the speed of a GPU
    size, calls = (512, 4) if device.type == "cpu" else (2048, 1)
    generator = torch.Generator(device).manual_seed(0)  # leaves the run's generators alone
    wide = torch.randn(size, 4 * size, device=device, generator=generator)
    tall = wide.to(dtype)
    moment = wide @ wide.T + size * torch.eye(size, device=device)
    energies = moment.diagonal()
    weight = wide[:SAMPLED_ROWS, :size]
    args = weight_args(4, size // 8)

    def seconds(work: Callable[[], object]) -> float:
        def run() -> None:
            work()
            if device.type != "cpu":
                torch.accelerator.synchronize()

        run()
        return timeit(run, number=calls) / calls

    search = seconds(lambda: rounding_delta(weight, args, energies))
    gptq = seconds(lambda: rounding_delta(weight[:, :64], args, moment[:64, :64]))
    return Work(
        passes=8 * size**3 / seconds(lambda: tall @ tall.T),
        products=8 * size**3 / seconds(lambda: wide @ wide.T),
        eigenvalues=size**3 / seconds(lambda: torch.linalg.eigh(moment)),
        roots=size**3 / seconds(lambda: torch.linalg.cholesky(moment)),
        columns=64 / gptq,
        entries=weight.numel() / search,
    )


@dataclass(frozen=True)
class Estimate:
    """Memory, disk and time that measuring takes.

    :param memory: bytes of resident memory at the peak, with this process and its model; on a
        machine with an accelerator a part of it is there
    :param disk: bytes of the cache
    :param seconds: time on the clock
    """

    memory: int
    disk: int
    seconds: float

    @property
    def duration(self) -> str:
        """Return the time in words, rounded."""
        if self.seconds < 90:
            return f"{self.seconds:.0f} seconds"
        minutes = self.seconds / 60
        return f"{minutes:.0f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"


def estimate(
    model: nn.Module,
    request: Request,
    units: list[UnitPlan],
    data: Data,
    resident: int,
    by_gptq: bool = False,
) -> Estimate:
    """Return the memory, disk and time that measuring a request takes.

    :param model: the dense model, on the meta device too
    :param request: the statistics to collect
    :param units: the units to round, with their candidates
    :param data: size of the calibration data
    :param resident: bytes that the process holds already
    :param by_gptq: whether every candidate is rounded by GPTQ
    """
    speed = speed_of(next(model.parameters()).dtype)
    work = work_of(model, request, units, data, by_gptq)
    shapes = [linear.weight.shape for _, linear in named_linears(model)]
    outputs, weights = sum(rows for rows, _ in shapes), sum(map(math.prod, shapes))
    passes = work.passes * (1 + BESIDE * outputs / max(weights, 1))
    return Estimate(
        resident + memory_of(model, request, data),
        disk_of(model, request),
        replace(work, passes=passes).seconds(speed),
    )


def work_of(
    model: nn.Module, request: Request, units: list[UnitPlan], data: Data, by_gptq: bool = False
) -> Work:
    """Count the operations from shapes; see :func:`estimate`."""
    linears = dict(named_linears(model))
    head = get_embeddings(model)[1]
    weights = sum(linear.weight.numel() for linear in linears.values() if linear is not head)
    derived = data.first_tokens(derivatives.SAMPLES, derivatives.TOKENS)
    text = data.first_tokens(derivatives.SAMPLES, max(derivatives.TOKENS, request.gradient_tokens))
    if request.gradient_tokens <= derivatives.TOKENS:
        text = text * derivatives.derived_length(data.tokens) // data.tokens
    measured = data.first_tokens(forward.SAMPLES, forward.tokens_needed(model, request))
    passes = 2 * weights * measured
    if request.gradients or request.gradient_moments:  # there, again in every layer, and back
        layers = decoder_layers(model)
        again = 2 * weights if derivatives.runs_again(model, layers, data.tokens, _device()) else 0
        heads = 4 * (head.weight.numel() if head is not None else 0)
        rounds = len(forward.derivative_parts(model, request))
        passes += rounds * (4 * weights + again + heads) * text
    if request.attention_maps:
        passes += 2 * weights * data.first_tokens(attention_maps.SAMPLES, 0)
    if request.attention_moments:
        passes += 4 * weights * derived
    inputs = _inputs(linears, request)
    products = sum(map(_product, inputs)) * measured
    for names, tokens in ((request.gradient_moments, text), (request.attention_moments, derived)):
        products += sum(_product(linears[name].out_features) for name in names) * tokens
    eigenvalues = 0
    for rows, columns in _factored(linears, request):
        size = min(rows, columns)
        eigenvalues += size**3
        # products with G and H, with their roots, and with the eigenvectors
        products += 2 * rows**2 * columns + 6 * rows * columns * size + 7 * size**3
        products += 2 * rows**2 * size + 4 * columns * size**2  # losses of all ranks
    roots, steps, entries, of_ranks = _rounding(units, inputs, by_gptq)
    return Work(passes, products + of_ranks, eigenvalues, roots, steps, entries)


def memory_of(model: nn.Module, request: Request, data: Data) -> int:
    """Return the bytes beside the process itself: the model, and the tensors of the larger pass."""
    linears = dict(named_linears(model))
    layers = decoder_layers(model)
    stored = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    size = next(model.parameters()).element_size()
    embeddings, head = get_embeddings(model)
    hidden = embeddings.weight.shape[1] if embeddings is not None else 0
    gradients = _metric_bytes(linears, request.gradient_moments)
    together = max([forward.DERIVATIVE_BYTES, *gradients])  # of those that are summed up at once
    attention = sum(_metric_bytes(linears, request.attention_moments))
    back = derived = attention + min(sum(gradients), together)
    if request.gradients or request.gradient_moments:
        # nothing is run again on the way back where there are none
        parts = [model.get_submodule(name) for name in layers] or [model]
        outputs = (sum(linear.out_features for _, linear in named_linears(p)) for p in parts)
        vocabulary = head.out_features if head is not None else 0
        together = derivatives.chunk_tokens(vocabulary or 1, _device())
        logits = vocabulary * (data.tokens * size + 16 * together)
        kept = derivatives.activation_bytes(model, layers, data.tokens)
        if derivatives.runs_again(model, layers, data.tokens, _device()):
            kept = data.tokens * size * (len(layers) * hidden + 4 * max(outputs))
        back += logits + kept
    inputs = [4 * columns**2 for columns in _inputs(linears, request)]
    largest = max(inputs, default=0)
    sums = sum(inputs) + derived
    section = min(sums, forward.SECTION_BYTES + sums // max(len(layers), 1))
    waiting = min(sum(inputs), WAITING_BYTES) + 3 * largest  # copies in order, and their roots
    # moments and their roots in float64; weights, eigenvectors and the workspace of a solver
    solving = max(
        (
            8 * (rows**2 + 2 * columns**2) + 4 * (3 * rows * columns + 5 * min(rows, columns) ** 2)
            for rows, columns in _factored(linears, request)
        ),
        default=0,
    )
    measured = data.first_tokens(forward.SAMPLES, forward.tokens_needed(model, request))
    ahead = measured * hidden * size + section + max(waiting, solving)
    return round(SLACK * (stored + max(back, ahead)))


def disk_of(model: nn.Module, request: Request) -> int:
    """Return the bytes of derivatives and of spectra."""
    linears = dict(named_linears(model))
    # factors of the largest rank are as large as the layers
    factors = sum(rows * columns for rows, columns in _factored(linears, request))
    metrics = _metric_bytes(linears, request.gradient_moments | request.attention_moments)
    return sum(metrics) + 4 * factors


def _factored(linears: dict[str, nn.Linear], request: Request) -> list[tuple[int, int]]:
    """Return the shapes (rows, columns) of stacked weights of linears that may share a latent."""
    return [
        (sum(linears[name].out_features for name in names), linears[names[0]].in_features)
        for names in reading_together(sorted(request.reached))
    ]


def _product(channels: int) -> int:
    """Return the operations that sum up x x^T take for a token."""
    return sum(2 * (end - start) * (channels - start) for start, end in row_blocks(channels))


def _metric_bytes(linears: dict[str, nn.Linear], names: frozenset[str]) -> list[int]:
    """Return the bytes of the second moments of derivatives at the outputs of linears."""
    return [4 * linears[name].out_features ** 2 for name in names]


def _inputs(linears: dict[str, nn.Linear], request: Request) -> list[int]:
    """Return the columns of the second moments of inputs. Experts that read the input of their
    layer share its moment."""
    first = {}
    for names in reading_together(sorted(request.second_moments)):
        layer = names[0].rpartition(".experts.")[0]
        own = not layer or names[0].endswith("down_proj")
        first.setdefault(names[0] if own else layer, linears[names[0]].in_features)
    return list(first.values())


def _rounding(
    units: list[UnitPlan], inputs: list[int], by_gptq: bool
) -> tuple[float, float, float, float]:
    """Return (roots, columns, entries) of ``Work`` for the errors of rounding, and the operations
    of the factors of every rank.

    :param inputs: columns of the second moments; none where all rounds to nearest
    """
    roots = sum(columns**3 for columns in inputs)
    entries = products = 0
    waiting = defaultdict(int)  # bytes by columns
    bits = max((len({c.bits for c in unit.candidates}) for unit in units), default=0)
    for unit in units:
        ranks = {c.rank for c in unit.candidates} - {None}
        for names in reading_together(unit.modules):
            up = sum(min(unit.modules[name][0], SAMPLED_ROWS) for name in names)
            rows = up + sum(min(rank, SAMPLED_ROWS) for rank in ranks)  # dense, and every `down`
            out, columns = sum(unit.modules[name][0] for name in names), unit.modules[names[0]][1]
            entries += bits * (rows * columns + up * sum(ranks))
            roots += sum(rank**3 for rank in ranks)
            # rotated factors, and the moment of the latent
            products += sum(2 * r * (r * (out + 2 * columns) + columns**2) for r in ranks)
            waiting[columns] += 4 * columns * rows
            for rank in ranks:
                waiting[rank] += 4 * rank * up
    rounds = {columns: -(-held // WAITING_BYTES) for columns, held in waiting.items()}
    if not inputs:
        return 0, 0, entries, products
    if by_gptq:  # which takes two more operations of a Cholesky factor's cost and more, every width
        steps = sum(bits * columns * times for columns, times in rounds.items())
        return 6 * bits * roots, steps, entries, products
    steps = sum(bits * min(LEADING, columns) * times for columns, times in rounds.items())
    return roots, steps, entries, products


def _device() -> torch.device:
    """Return the device that calibration will use."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
