"""What rounding a weight would cost: the error of a scheme, measured before it is chosen.

The codes and scales come from llm-compressor's own observer and compressed-tensors' own
``fake_quantize``, so that the measurement and the quantizer that follows agree.
"""

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle import fake_quantize
from llmcompressor.observers import Observer
from torch import nn

from casp_plugin.importance import output_error
from casp_plugin.modules import LowRankLinear

__all__ = ["relative_error", "rounding_delta"]

#: rows of a large matrix that are rounded to estimate its error; rows are exchangeable
SAMPLED_ROWS = 128


def rounding_delta(
    weight: torch.Tensor, args: QuantizationArgs, mean_square: torch.Tensor
) -> torch.Tensor:
    """Round-to-nearest error ``Q(W) - W`` under a scheme.

    :param weight: W, shape (out, in)
    :param args: the weight scheme, with its observer
    :param mean_square: E[x^2] per input channel, shape (in,); importance-weighted observers
        read it
    :return: shape (out, in), float32
    """
    carrier = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    carrier.weight = nn.Parameter(weight.detach().float(), requires_grad=False)
    args = args.model_copy(deep=True)
    observer = Observer.load_from_registry(args.observer, base_name="weight", args=args)
    observer.attach(carrier)
    # an observer that watches activations sees one token whose squares are the mean squares
    carrier(mean_square.float().clamp_min(0).sqrt()[None])
    qparams = observer(carrier.weight).get_qparams()
    observer.detach(carrier)
    rounded = fake_quantize(carrier.weight, qparams["scale"], qparams["zero_point"], args)
    return rounded.data - carrier.weight.data


@torch.no_grad()
def relative_error(
    module: nn.Linear | LowRankLinear,
    args: QuantizationArgs,
    mean_square: torch.Tensor,
    output_energy: float,
) -> float:
    """Output error of a linear layer under a scheme, over its output energy.

    A factored layer has both factors rounded: the error of ``down`` passes through ``up``,
    and the latent's second moment follows from the input's.

    :param module: the layer, dense or factored
    :param args: the scheme of its weight, or of both its factors
    :param mean_square: E[x^2] per channel of its input, shape (in,)
    :param output_energy: E||W x||^2 of the dense layer
    """
    if isinstance(module, LowRankLinear):
        down, up = module.down.weight.float(), module.up.weight.float()
        latent = down.square() @ mean_square.to(down)
        error = _error(up, args, latent)
        delta = rounding_delta(down, args, mean_square)
        # E||U dD x||^2 with uncorrelated columns: row r of dD weighs ||U[:, r]||^2
        error += (output_error(delta, mean_square) @ up.square().sum(0)).item()
    else:
        error = _error(module.weight, args, mean_square)
    return error / output_energy if output_energy > 0 else 0.0


def _error(weight: torch.Tensor, args: QuantizationArgs, mean_square: torch.Tensor) -> float:
    """Squared output error summed over the rows, from a sample of them where there are many."""
    rows = weight.shape[0]
    if rows > SAMPLED_ROWS:
        picked = torch.linspace(0, rows - 1, SAMPLED_ROWS, device=weight.device).long()
        weight = weight[picked]
    per_row = output_error(rounding_delta(weight, args, mean_square), mean_square)
    return (per_row.mean() * rows).item()
