"""What rounding a weight would cost: the error of a scheme, measured before it is chosen.

The codes and scales come from llm-compressor's own observer and GPTQ, or compressed-tensors' own
``fake_quantize``, so that the measurement and the quantizer that follows agree.
"""

from collections import defaultdict

import torch
from compressed_tensors.quantization import ActivationOrdering, QuantizationArgs
from compressed_tensors.quantization.lifecycle import fake_quantize
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.observers import Observer
from torch import nn

from casp_plugin.maths.errors import output_error
from casp_plugin.model.low_rank_linear import LowRankLinear
from casp_plugin.model.transforms import rotate
from casp_plugin.system.machine import trim_memory

__all__ = ["RoundingErrors", "WeightedError", "rounding_delta"]

#: rows of a large matrix that are rounded to estimate its error; rows are exchangeable
SAMPLED_ROWS = 128
#: bytes of weights and moments that wait to be rounded together
WAITING_BYTES = 2**24


def rounding_delta(
    weight: torch.Tensor, args: QuantizationArgs, moment: torch.Tensor
) -> torch.Tensor:
    """Rounding error ``Q(W) - W`` under a scheme.

    :param weight: W, shape (out, in)
    :param args: the weight scheme, with its observer
    :param moment: of the input. Given E[x x^T], shape (in, in), W is rounded by GPTQ, with the
        defaults of GPTQModifier; given its diagonal E[x^2], shape (in,), to nearest.
        Importance-weighted observers read the diagonal either way
    :return: shape (out, in), float32
    """
    return _deltas([weight], args, [moment])[0]


class RoundingErrors:
    """Output errors of many layers under many schemes. Weights of one width and scheme are rounded
    together: GPTQ walks through the columns one by one, and many rows take as long as few. Those
    that read one input share its factorisation as well.

    Ask for all of them; the values are there once :meth:`finish` has been called.
    """

    def __init__(self):
        self._rounded: dict[tuple, _Rounded] = {}
        self._waiting: dict[tuple, list[_Rounded]] = defaultdict(list)
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
        """Weighted output error of a linear layer under a scheme: ``sum_r w_r E[(dW x)_r^2]``.

        A factored layer has both factors rounded: the error of ``down`` passes through ``up``.

        :param module: the layer, dense or factored
        :param args: the scheme of its weight, or of both its factors
        :param moment: E[x x^T] or E[x^2] of its input, of the rotated one where it is rotated; it
            decides on the rounding, see :func:`rounding_delta`. With E[x^2] rounding errors of
            different columns count as uncorrelated
        :param row_weights: w, shape (out,): one over the output energy for the relative error, the
            squared gradients for the expected change of the loss
        :param latent: the same of the latent ``D x``; where it is not known, it follows from the
            input's mean squares, channels taken as uncorrelated
        :param block: size of the Hadamard blocks that rotate the input
        """
        if not isinstance(module, LowRankLinear):
            return WeightedError([(self._of(module, args, moment, block), row_weights)])
        up = module.up.weight.float()
        if latent is None:
            mean_square = moment.diagonal() if moment.ndim == 2 else moment
            down = rotate(module.latent.weight.float(), block)
            latent = down.square() @ mean_square.to(down)
        # E||U dD x||^2 with uncorrelated rows: row k of dD weighs sum_r w_r U_rk^2
        through = up.square().T @ row_weights.to(up)
        return WeightedError(
            [
                (self._of(module.up, args, latent, 1), row_weights),
                (self._of(module.latent, args, moment, block), through),
            ]
        )

    @torch.no_grad()
    def finish(self) -> None:
        """Round what waits."""
        for waiting in self._waiting.values():
            # rows of whatever reads one input are rounded as one weight
            reading = defaultdict(list)
            for each in waiting:
                reading[id(each.moment)].append(each)
            alike = defaultdict(list)
            for stack in reading.values():
                alike[sum(len(each.weight) for each in stack)].append(stack)
            for stacks in alike.values():
                deltas = _deltas(
                    [torch.cat([each.weight for each in stack]) for stack in stacks],
                    waiting[0].args,
                    [stack[0].moment for stack in stacks],
                )
                for stack, delta in zip(stacks, deltas, strict=True):
                    heights = [len(each.weight) for each in stack]
                    for each, rows in zip(stack, delta.split(heights), strict=True):
                        each.errors = output_error(rows, each.moment)
            for each in waiting:
                each.weight = each.moment = None
            trim_memory()  # or it creeps up by the moments of a layer
        self._waiting.clear()
        self._rounded.clear()
        self._bytes = 0

    def _of(
        self, linear: nn.Linear, args: QuantizationArgs, moment: torch.Tensor, block: int
    ) -> "_Rounded":
        how = (moment.ndim, args.model_dump_json())
        rounded = self._rounded.get((linear, how))  # a latent is asked for by all who share it
        if rounded is None:
            rounded = self._rounded[linear, how] = _Rounded(linear.weight, args, moment, block)
            waiting = self._waiting[rounded.weight.shape[1], how]
            self._bytes += rounded.weight.nbytes
            if not any(each.moment is moment for each in waiting):
                self._bytes += moment.nbytes
            waiting.append(rounded)
            if self._bytes > WAITING_BYTES:
                self.finish()
        return rounded


class _Rounded:
    """Rows of a weight that wait to be rounded, then their errors ``E[(dW x)_r^2]``."""

    def __init__(
        self, weight: torch.Tensor, args: QuantizationArgs, moment: torch.Tensor, block: int
    ):
        self.rows = torch.arange(weight.shape[0], device=weight.device)
        if weight.shape[0] > SAMPLED_ROWS:
            self.rows = torch.linspace(
                0, weight.shape[0] - 1, SAMPLED_ROWS, device=weight.device
            ).long()
        self.weight = rotate(weight[self.rows].float(), block)
        self.args = args
        self.moment = moment
        self.errors: torch.Tensor | None = None


class WeightedError:
    """An error that was asked for."""

    def __init__(self, parts: list[tuple[_Rounded, torch.Tensor]]):
        self._parts = parts

    @property
    def value(self) -> float:
        """The error, from a sample of the rows where there are many."""
        total = 0.0
        for rounded, row_weights in self._parts:
            row_weights = row_weights.to(rounded.errors)
            seen = row_weights[rounded.rows]
            if seen.sum() > 0:
                share = row_weights.sum() / seen.sum()
                total += ((rounded.errors @ seen) * share).item()
        return total


def _deltas(
    weights: list[torch.Tensor], args: QuantizationArgs, moments: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Rounding errors of weights of one shape under one scheme, see :func:`rounding_delta`."""
    weights = [weight.detach().float() for weight in weights]
    qparams = [_observed(weight, args, m) for weight, m in zip(weights, moments, strict=True)]
    if moments[0].ndim == 1:
        return [
            fake_quantize(weight, scale, zero_point, args) - weight
            for weight, (scale, zero_point) in zip(weights, qparams, strict=True)
        ]
    args = args.model_copy(deep=True)
    args.actorder = ActivationOrdering.STATIC
    scales, zero_points = (torch.stack(each) for each in zip(*qparams, strict=True))
    batch = torch.stack(weights)
    hessians = torch.stack([moment.float() for moment in moments])
    rounded = quantize_weight(batch.clone(), hessians, scales, zero_points, None, args)[0]
    return list(rounded - batch)


def _observed(
    weight: torch.Tensor, args: QuantizationArgs, moment: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point by the scheme's observer."""
    mean_square = moment.diagonal() if moment.ndim == 2 else moment
    carrier = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    carrier.weight = nn.Parameter(weight, requires_grad=False)
    args = args.model_copy(deep=True)
    observer = Observer.load_from_registry(args.observer, base_name="weight", args=args)
    observer.attach(carrier)
    # an observer that watches activations sees one token whose squares are the mean squares
    carrier(mean_square.float().clamp_min(0).sqrt()[None])
    qparams = observer(carrier.weight).get_qparams()
    observer.detach(carrier)
    return qparams["scale"], qparams["zero_point"]
