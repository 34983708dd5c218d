"""What rounding a weight would cost: the error of a scheme, measured before it is chosen.

The codes and scales come from llm-compressor's own observer and GPTQ, or compressed-tensors' own
``fake_quantize``, so that the measurement and the quantizer that follows agree.
"""

import torch
from compressed_tensors.quantization import ActivationOrdering, QuantizationArgs
from compressed_tensors.quantization.lifecycle import fake_quantize
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.observers import Observer
from torch import nn

from casp_plugin.importance import output_error
from casp_plugin.modules import LowRankLinear
from casp_plugin.transforms import rotate

__all__ = ["rounding_delta", "rounding_error", "row_errors"]

#: rows of a large matrix that are rounded to estimate its error; rows are exchangeable
SAMPLED_ROWS = 128


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
    mean_square = moment.diagonal() if moment.ndim == 2 else moment
    carrier = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    carrier.weight = nn.Parameter(weight.detach().float(), requires_grad=False)
    args = args.model_copy(deep=True)
    observer = Observer.load_from_registry(args.observer, base_name="weight", args=args)
    observer.attach(carrier)
    # an observer that watches activations sees one token whose squares are the mean squares
    carrier(mean_square.float().clamp_min(0).sqrt()[None])
    qparams = observer(carrier.weight).get_qparams()
    observer.detach(carrier)
    scale, zero_point = qparams["scale"], qparams["zero_point"]
    if moment.ndim == 1:
        rounded = fake_quantize(carrier.weight, scale, zero_point, args).data
    else:
        args.actorder = ActivationOrdering.STATIC
        batch = (carrier.weight.data, moment.float(), scale, zero_point)
        batch = [tensor[None].clone() for tensor in batch]  # worked on in place
        rounded = quantize_weight(*batch, None, args)[0][0]
    return rounded - carrier.weight.data


@torch.no_grad()
def rounding_error(
    module: nn.Linear | LowRankLinear,
    args: QuantizationArgs,
    moment: torch.Tensor,
    row_weights: torch.Tensor,
    latent: torch.Tensor | None = None,
    block: int = 1,
) -> float:
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
    if isinstance(module, LowRankLinear):
        down, up = rotate(module.latent.weight.float(), block), module.up.weight.float()
        if latent is None:
            mean_square = moment.diagonal() if moment.ndim == 2 else moment
            latent = down.square() @ mean_square.to(down)
        # E||U dD x||^2 with uncorrelated rows: row k of dD weighs sum_r w_r U_rk^2
        through = up.square().T @ row_weights.to(up)
        return _error(up, args, latent, row_weights) + _error(down, args, moment, through)
    return _error(rotate(module.weight.float(), block), args, moment, row_weights)


def row_errors(
    weight: torch.Tensor, args: QuantizationArgs, moment: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared output error of rows of a weight, all of them or a sample where there are many.

    :return: indices of the rows, and ``E[(dW x)_r^2]`` of each
    """
    rows = torch.arange(weight.shape[0], device=weight.device)
    if weight.shape[0] > SAMPLED_ROWS:
        rows = torch.linspace(0, weight.shape[0] - 1, SAMPLED_ROWS, device=weight.device).long()
    return rows, output_error(rounding_delta(weight[rows], args, moment), moment)


def _error(
    weight: torch.Tensor,
    args: QuantizationArgs,
    moment: torch.Tensor,
    row_weights: torch.Tensor,
) -> float:
    """Weighted squared output error, from a sample of the rows where there are many."""
    row_weights = row_weights.to(weight.device, torch.float32)
    rows, errors = row_errors(weight, args, moment)
    seen = row_weights[rows].sum().item()
    if not seen:
        return 0.0
    return (errors @ row_weights[rows]).item() * row_weights.sum().item() / seen
