"""Influence of a layer and cost of a weight error: pure functions on tensors.

Shapes: in and out are the channels that a layer reads and puts out.
"""

import torch

__all__ = ["output_error", "token_influence"]


def token_influence(hidden_in: torch.Tensor, hidden_out: torch.Tensor) -> torch.Tensor:
    """Return the block influence of a decoder layer on every token: 1 - cos(input, output).

    The mean over all tokens is the block influence of the layer (CASP, arXiv 2503.05936,
    eq. 9; ShortGPT, arXiv 2403.03853, eq. 2): 0 for a layer that changes nothing.

    :param hidden_in: hidden states before the layer, shape (..., hidden)
    :param hidden_out: hidden states after it, same shape
    :return: values in [0, 2], shape (...), float32
    """
    return 1 - torch.nn.functional.cosine_similarity(hidden_in.float(), hidden_out.float(), dim=-1)


def output_error(delta: torch.Tensor, second_moment: torch.Tensor) -> torch.Tensor:
    """Return the expected squared output error of a weight error, by output row.

    ``E ||dW x||^2 = sum_r (dW H dW^T)_rr``. Given only the diagonal of H the errors of
    different columns count as uncorrelated, which rounding errors nearly are.

    :param delta: dW, shape (out, in)
    :param second_moment: H = E[x x^T], shape (in, in), or its diagonal E[x^2], shape (in,)
    :return: shape (out,), float32 or wider
    """
    delta = delta.to(torch.promote_types(delta.dtype, torch.float32))
    moment = second_moment.to(delta)
    if moment.ndim == 1:
        return delta.square() @ moment  # (out, in) @ (in,)
    return ((delta @ moment) * delta).sum(dim=1)  # (out, in) @ (in, in), then rows: (out,)
