"""Density of attention maps: pure functions on tensors.

CASP (arXiv 2503.05936, theorem 1) bounds the error that compressing W_q and W_k causes by the
density of the attention map: the share of its entries that are not (nearly) zero.

Shapes: B sequences of a batch, H heads, Q queries, K keys.
"""

import torch

__all__ = ["THRESHOLD", "density", "entropy_density", "visible"]

#: entries up to this count as zero
THRESHOLD = 0.01


def visible(
    attention: torch.Tensor,
    mask: torch.Tensor | None = None,
    allowed: torch.Tensor | bool = True,
) -> torch.Tensor:
    """Return the entries of attention maps that may differ from zero.

    :param attention: maps, shape (B, H, Q, K), queries aligned with the last keys
    :param mask: tokens that are no padding, shape (B, K), bool; None for all
    :param allowed: the mask that attention ran with, shape (B or 1, 1, Q, K): bool, or added to the
        scores and 0 where a query sees a key. Or one bool: whether attention is causal
    :return: bool, shape (B, 1, Q, K)
    """
    queries, keys = attention.shape[-2:]
    if isinstance(allowed, bool):
        # (1, 1, Q, K)
        seen = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=attention.device)
        seen = seen.tril(keys - queries) if allowed else seen
    else:
        seen = allowed[..., :keys].to(attention.device)  # (B or 1, 1, Q, K)
        seen = seen if seen.dtype is torch.bool else seen == 0
    if mask is not None:
        # (B, 1, Q, K) & (B, 1, 1, K) & (B, 1, Q, 1)
        seen = seen & mask[:, None, None, :] & mask[:, None, -queries:, None]
    return seen.expand(len(attention), 1, queries, keys)


def density(attention: torch.Tensor, seen: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return the share of a head's entries that exceed a threshold.

    :param attention: maps, shape (B, H, Q, K), rows sum to 1
    :param seen: entries that count, shape (B, 1, Q, K), bool
    :param threshold: in [0, 1)
    :return: in [0, 1], shape (H,), float64; NaN where no entry counts
    """
    above = ((attention > threshold) & seen).sum((0, 2, 3), dtype=torch.float64)  # (H,)
    return above / seen.sum(dtype=torch.float64)


def entropy_density(attention: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Return the share of visible keys that a query effectively looks at, exp(entropy of its row)
    over the number of visible keys, as the mean over queries. It needs no threshold.

    :param attention: maps, shape (B, H, Q, K), rows sum to 1
    :param seen: entries that count, shape (B, 1, Q, K), bool
    :return: in (0, 1], shape (H,), float64; NaN where no entry counts
    """
    keys = seen[:, 0].sum(-1)  # (B, Q), visible keys
    shares = []
    for head in attention.unbind(1):  # (B, Q, K), one head at a time: maps are large
        weights = torch.where(seen[:, 0], head.double(), 0)  # (B, Q, K)
        entropy = -torch.special.xlogy(weights, weights).sum(-1)  # (B, Q)
        share = torch.where(keys > 0, entropy.exp() / keys.clamp(min=1), 0)  # (B, Q)
        shares.append(share.sum() / (keys > 0).sum())
    return torch.stack(shares)  # (H,)
