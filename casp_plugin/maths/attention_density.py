"""How sparse attention is: pure functions on attention maps.

CASP (arXiv 2503.05936, theorem 1) bounds the error that compressing W_q and W_k causes by the
density of the attention map: the share of its entries that are not (nearly) zero.
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
    """Entries of attention maps that may be other than zero.

    :param attention: maps, (batch, heads, queries, keys), queries aligned with the last keys
    :param mask: tokens that are no padding, (batch, keys); None for all
    :param allowed: the mask that attention ran with, (batch or 1, 1, queries, keys), bool, or what
        it adds to the scores, 0 where a query sees a key; or whether a query sees no key after it
    :return: bool, (batch, 1, queries, keys)
    """
    queries, keys = attention.shape[-2:]
    if isinstance(allowed, bool):
        seen = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=attention.device)
        seen = seen.tril(keys - queries) if allowed else seen
    else:
        seen = allowed[..., :keys].to(attention.device)
        seen = seen if seen.dtype is torch.bool else seen == 0
    if mask is not None:
        seen = seen & mask[:, None, None, :] & mask[:, None, -queries:, None]
    return seen.expand(len(attention), 1, queries, keys)


def density(attention: torch.Tensor, seen: torch.Tensor, threshold: float) -> torch.Tensor:
    """Share of the entries that exceed a threshold.

    :param attention: maps, (batch, heads, queries, keys), rows sum to 1
    :param seen: entries that count, (batch, 1, queries, keys)
    :param threshold: in [0, 1)
    :return: (heads,), in [0, 1]; NaN where nothing counts
    """
    found = ((attention > threshold) & seen).sum((0, 2, 3), dtype=torch.float64)
    return found / seen.sum(dtype=torch.float64)


def entropy_density(attention: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Keys that a query effectively looks at, exp(entropy of its row), over those it may look at;
    the mean over queries. Needs no threshold.

    :param attention: maps, (batch, heads, queries, keys), rows sum to 1
    :param seen: entries that count, (batch, 1, queries, keys)
    :return: (heads,), in (0, 1]; NaN where nothing counts
    """
    keys = seen[:, 0].sum(-1)  # (batch, queries)
    shares = []
    for head in attention.unbind(1):  # one at a time: maps are large
        weights = torch.where(seen[:, 0], head.double(), 0)
        entropy = -torch.special.xlogy(weights, weights).sum(-1)
        share = torch.where(keys > 0, entropy.exp() / keys.clamp(min=1), 0)
        shares.append(share.sum() / (keys > 0).sum())
    return torch.stack(shares)
