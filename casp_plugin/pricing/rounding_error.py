"""Output errors of rounding weights under every scheme, before one is chosen.

The codes and scales come from llm-compressor's own observer and GPTQ, or compressed-tensors' own
``fake_quantize``, so that the errors and the quantizer that follows agree.

Shapes: in and out are the channels of a linear, r the rank of its factors, s the sampled rows of a
weight, n weights that are rounded together.
"""

from collections import defaultdict
from typing import Literal

import torch
from compressed_tensors.quantization import (
    ActivationOrdering,
    QuantizationArgs,
    QuantizationStrategy,
)
from compressed_tensors.quantization.lifecycle import fake_quantize
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.observers import Observer
from torch import nn

from casp_plugin.maths.errors import output_error
from casp_plugin.maths.gptq_error import ColumnCosts, column_costs
from casp_plugin.maths.hadamard import rotate
from casp_plugin.model.low_rank_linear import LowRankLinear
from casp_plugin.system.machine import trim_memory

__all__ = ["Rounding", "RoundingErrors", "WeightedError", "rounding_delta"]

#: ``gptq``: rounded by GPTQ; ``first_order``: what GPTQ leaves to first order, see
#: ``maths.gptq_error``; ``nearest``: rounded to nearest
Rounding = Literal["gptq", "first_order", "nearest"]

#: number of rows of a large matrix that are rounded to estimate its error
SAMPLED_ROWS = 128
#: bytes of waiting weights and moments that start a common rounding
WAITING_BYTES = 2**24


def rounding_delta(
    weight: torch.Tensor, args: QuantizationArgs, moment: torch.Tensor
) -> torch.Tensor:
    """Return the rounding error ``Q(W) - W`` under a scheme.

    :param weight: W, shape (out, in)
    :param args: the weight scheme, with its observer
    :param moment: moment of the input. With E[x x^T], shape (in, in), W is rounded by GPTQ with the
        defaults of GPTQModifier; with its diagonal E[x^2], shape (in,), to nearest.
        Importance-weighted observers read the diagonal in both cases
    :return: shape (out, in), float32
    """
    return _deltas([weight], args, [moment])[0]


class RoundingErrors:
    """Output errors of many layers under many schemes, rounded together.

    GPTQ walks through columns one by one and takes as long for many rows as for few, so weights of
    one width and scheme are batched, and weights that read one input share its factorisation.

    Call :meth:`of` for every layer and scheme, then :meth:`finish`: then the errors have values.

    :param rounding: of all weights
    """

    def __init__(self, rounding: Rounding):
        self._rounding = rounding
        self._inputs: dict[int, _Input] = {}
        self._rows: dict[tuple, _RoundedRows] = {}
        self._waiting: dict[tuple, list[_RoundedRows]] = defaultdict(list)
        self._bytes = 0

    @torch.no_grad()
    def of(
        self,
        module: nn.Linear | LowRankLinear,
        args: QuantizationArgs,
        moment: torch.Tensor,
        row_weights: torch.Tensor,
        latent: torch.Tensor | None = None,
        block: int = 1,
    ) -> "WeightedError":
        """Return the weighted output error of a linear under a scheme: ``sum_o w_o E[(dW x)_o^2]``.

        Of a factored layer both factors are rounded: the error of ``down`` passes through ``up``.

        :param module: the layer, dense or factored
        :param args: scheme of its weight, or of both its factors
        :param moment: E[x x^T], shape (in, in), of the layer's input, after its rotation if there
            is one; E[x^2], shape (in,), with rounding to nearest, whose errors of different columns
            count as uncorrelated
        :param row_weights: w, shape (out,): one over the output energy for the relative error, the
            squared gradients for the expected change of the loss
        :param latent: moment of the latent ``D x``, shape (r, r), or (r,) likewise; None derives it
            from the input's mean squares, with uncorrelated channels
        :param block: size of the Hadamard blocks that rotate the input
        """
        if not isinstance(module, LowRankLinear):
            return WeightedError([(self._rounded_rows(module, args, moment, block), row_weights)])
        up = module.up.weight.float()  # (out, r)
        if latent is None:
            mean_square = moment.diagonal() if moment.ndim == 2 else moment  # (in,)
            down = rotate(module.latent.weight.float(), block)  # (r, in)
            latent = down.square() @ mean_square.to(down)  # (r, in) @ (in,)
        # E||U dD x||^2 with uncorrelated rows: row k of dD weighs sum_o w_o U_ok^2
        through = up.square().T @ row_weights.to(up)  # (r, out) @ (out,)
        return WeightedError(
            [
                (self._rounded_rows(module.up, args, latent, 1), row_weights),
                (self._rounded_rows(module.latent, args, moment, block), through),
            ]
        )

    @torch.no_grad()
    def finish(self) -> None:
        """Round all waiting weights, and forget their inputs."""
        self._round()
        self._inputs.clear()
        trim_memory()  # without it, memory grows by the moments of every layer

    def _round(self) -> None:
        """Round all waiting weights."""
        for waiting in self._waiting.values():  # of one width and scheme
            # weights that read one input are stacked, and rounded as one weight
            stack_by_input = defaultdict(list)
            for rows in waiting:
                stack_by_input[rows.input].append(rows)
            stacks_by_height = defaultdict(list)
            for stack in stack_by_input.values():
                stacks_by_height[sum(len(rows.weight) for rows in stack)].append(stack)
            for stacks in stacks_by_height.values():
                errors = _errors(
                    [torch.cat([rows.weight for rows in stack]) for stack in stacks],
                    waiting[0].args,
                    [stack[0].input for stack in stacks],
                )  # n times (height of a stack,)
                for stack, of_stack in zip(stacks, errors, strict=True):
                    heights = [len(rows.weight) for rows in stack]
                    for rows, own in zip(stack, of_stack.split(heights), strict=True):
                        rows.errors = own  # (s,)
            for rows in waiting:
                rows.weight = rows.input = None
        self._waiting.clear()
        self._rows.clear()
        if self._rounding == "gptq":  # whose moments are stacked
            self._inputs.clear()
        self._bytes = 0

    def _rounded_rows(
        self, linear: nn.Linear, args: QuantizationArgs, moment: torch.Tensor, block: int
    ) -> "_RoundedRows":
        """Return the rows of a linear, new ones waiting to be rounded."""
        scheme = args.model_dump_json()
        rows = self._rows.get((linear, scheme))  # layers of one latent share its rows
        if rows is None:
            rows = _RoundedRows(linear.weight, args, self._input(moment), block)
            self._rows[linear, scheme] = rows
            self._waiting[rows.weight.shape[1], moment.ndim, scheme].append(rows)
            self._bytes += rows.weight.nbytes
            if self._bytes > WAITING_BYTES:
                self._round()
        return rows

    def _input(self, moment: torch.Tensor) -> "_Input":
        """Return the input of a moment, one for all its readers."""
        known = self._inputs.get(id(moment))
        if known is None:
            known = self._inputs[id(moment)] = _Input(moment, self._rounding)
            if known.costs is None:
                self._bytes += moment.nbytes
        return known


class _Input:
    """An input that weights read.

    :param moment: E[x x^T], shape (in, in), or E[x^2], shape (in,)
    :param rounding: with ``first_order``, ``costs`` are those of rounding columns
    """

    def __init__(self, moment: torch.Tensor, rounding: Rounding):
        self.moment = moment
        self.costs: ColumnCosts | None = None
        if rounding == "first_order" and moment.ndim == 2:
            self.costs = column_costs(moment)


class _RoundedRows:
    """Rows of a weight that wait to be rounded, and later their errors ``E[(dW x)_o^2]``.

    Of a large weight it takes a sample, rows being exchangeable: ``rows`` (s,) are their indices,
    ``weight`` is (s, in), ``errors`` (s,).
    """

    def __init__(self, weight: torch.Tensor, args: QuantizationArgs, input: _Input, block: int):
        self.rows = torch.arange(weight.shape[0], device=weight.device)
        if weight.shape[0] > SAMPLED_ROWS:
            self.rows = torch.linspace(
                0, weight.shape[0] - 1, SAMPLED_ROWS, device=weight.device
            ).long()
        self.weight = rotate(weight[self.rows].float(), block)  # (s, in)
        self.args = args
        self.input: _Input | None = input
        self.errors: torch.Tensor | None = None


class WeightedError:
    """A weighted output error, whose value follows from rounded rows.

    :param terms: rows of a weight, or of both factors, and the weights of all its rows
    """

    def __init__(self, terms: list[tuple[_RoundedRows, torch.Tensor]]):
        self._terms = terms

    @property
    def value(self) -> float:
        """Return the error, estimated from the sampled rows."""
        total = 0.0
        for rounded, row_weights in self._terms:
            row_weights = row_weights.to(rounded.errors)  # (out,)
            sampled = row_weights[rounded.rows]  # (s,)
            if sampled.sum() > 0:
                scale = row_weights.sum() / sampled.sum()
                total += ((rounded.errors @ sampled) * scale).item()
        return total


def _errors(
    weights: list[torch.Tensor], args: QuantizationArgs, inputs: list[_Input]
) -> list[torch.Tensor]:
    """Return the output errors of n weights of one shape (s, in) by row, shape (s,) each."""
    moments = [input.moment for input in inputs]
    if inputs[0].costs is not None:
        return _first_order_errors(weights, args, moments, [input.costs for input in inputs])
    return list(map(output_error, _deltas(weights, args, moments), moments))


def _first_order_errors(
    weights: list[torch.Tensor],
    args: QuantizationArgs,
    moments: list[torch.Tensor],
    costs: list[ColumnCosts],
) -> list[torch.Tensor]:
    """Return the errors that GPTQ leaves in n weights of one shape, to first order."""
    qparams = [_observed(weight, args, m) for weight, m in zip(weights, moments, strict=True)]
    count = len(costs[0].leading)  # K
    leading = torch.stack([w[:, c.order[:count]] for w, c in zip(weights, costs, strict=True)])
    by_column = []  # scales and zero points of the leading columns, (s, K) each
    for qparam, cost in zip(qparams, costs, strict=True):
        groups = cost.order[:count] // args.group_size if (args.group_size or -1) > 0 else [0]
        by_column.append([of_group[:, groups].expand(-1, count) for of_group in qparam])
    scales, zero_points = map(torch.stack, zip(*by_column, strict=True))  # (n, s, K)
    single = {"strategy": QuantizationStrategy.GROUP, "group_size": 1, "actorder": None}
    rounded = quantize_weight(
        leading.clone(),
        torch.stack([cost.leading_moment for cost in costs]),
        scales,
        zero_points,
        None,
        args.model_copy(update=single, deep=True),
        percdamp=0.0,
    )[0]
    errors = []
    for weight, qparam, cost, delta in zip(weights, qparams, costs, rounded - leading, strict=True):
        following = cost.order[count:]
        moved = weight.clone()
        moved[:, following] += delta @ cost.moved  # (s, K) @ (K, F)
        codes = fake_quantize(moved, *qparam, args)[:, following]
        change, rest = codes - weight[:, following], codes - moved[:, following]  # (s, F)
        errors.append(cost.error(delta, change, rest))
    return errors


def _deltas(
    weights: list[torch.Tensor], args: QuantizationArgs, moments: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Return the rounding errors of n weights of one shape, see :func:`rounding_delta`."""
    weights = [weight.detach().float() for weight in weights]
    qparams = [_observed(weight, args, m) for weight, m in zip(weights, moments, strict=True)]
    if moments[0].ndim == 1:
        return [
            fake_quantize(weight, scale, zero_point, args) - weight
            for weight, (scale, zero_point) in zip(weights, qparams, strict=True)
        ]
    args = args.model_copy(deep=True)
    args.actorder = ActivationOrdering.STATIC
    scales, zero_points = map(torch.stack, zip(*qparams, strict=True))  # (n, out, groups)
    batch = torch.stack(weights)  # (n, out, in)
    hessians = torch.stack([moment.float() for moment in moments])  # (n, in, in)
    rounded = quantize_weight(batch.clone(), hessians, scales, zero_points, None, args)[0]
    return list(rounded - batch)


def _observed(
    weight: torch.Tensor, args: QuantizationArgs, moment: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and zero point, shape (out, groups), from the scheme's observer."""
    mean_square = moment.diagonal() if moment.ndim == 2 else moment  # (in,)
    carrier = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    carrier.weight = nn.Parameter(weight, requires_grad=False)
    args = args.model_copy(deep=True)
    observer = Observer.load_from_registry(args.observer, base_name="weight", args=args)
    observer.attach(carrier)
    # observers of activations get one token, whose squares are the mean squares
    carrier(mean_square.float().clamp_min(0).sqrt()[None])
    qparams = observer(carrier.weight).get_qparams()
    observer.detach(carrier)
    return qparams["scale"], qparams["zero_point"]
