"""Low-rank factorisation of linear layers: pure functions on tensors.

A linear layer ``y = W x`` with ``W`` of shape (out, in) is replaced by ``y = U (D x)`` with
``D`` of shape (r, in) and ``U`` of shape (out, r). The best factors in the sense that
matters, the error of the *output* over the calibration inputs,

    min_{rank r} E ||W x - W' x||^2 = min ||(W - W') H^(1/2)||_F^2,   H = E[x x^T],

are the truncated SVD of the whitened weight, ``W H^(1/2) = P S Q^T`` (CASP, arXiv
2503.05936, eq. 7; SVD-LLM, arXiv 2403.07378). Since ``P S Q^T H^(-1/2) = P P^T W``, the
solution is the projection of W on the leading left singular vectors P, the eigenvectors of
``W H W^T``: nothing has to be inverted, so rank-deficient statistics do no harm.
"""

import math
from dataclasses import dataclass

import torch

__all__ = ["Factors", "WhitenedWeight", "kept_share", "saves_parameters", "uniform_rank"]


@dataclass(frozen=True)
class Factors:
    """Two factors of one matrix.

    :param down: shape (rank, in), float64
    :param up: shape (out, rank), float64
    :param error: share of the output energy that is lost, in [0, 1]
    """

    down: torch.Tensor
    up: torch.Tensor
    error: float


class WhitenedWeight:
    """The spectrum of one weight under its input statistics, and factors of any rank from it.

    :param weight: W, shape (out, in)
    :param second_moment: H = E[x x^T], shape (in, in); None for the plain SVD (H = I)
    :param dampening_frac: share of the mean diagonal of H that is added to its diagonal, so
        that directions the calibration data never showed still count a little
    :raises ValueError: if a shape does not fit, or a value is not finite
    """

    def __init__(
        self,
        weight: torch.Tensor,
        second_moment: torch.Tensor | None = None,
        dampening_frac: float = 0.01,
    ):
        self.weight = weight.detach().to(torch.float64)
        if not torch.isfinite(self.weight).all():
            raise ValueError("weight holds NaN or infinite values")
        if second_moment is None:
            gram = self.weight @ self.weight.T
        else:
            moment = damped(second_moment, dampening_frac)
            if moment.shape[0] != self.weight.shape[1]:
                raise ValueError(
                    f"second moment of {moment.shape[0]} channels does not fit a weight of "
                    f"{self.weight.shape[1]} columns"
                )
            gram = self.weight @ moment @ self.weight.T
        energies, vectors = torch.linalg.eigh((gram + gram.T) / 2)
        #: squared singular values of W H^(1/2), descending, shape (out,)
        self.energies = energies.flip(0).clamp_min(0)
        self._left = vectors.flip(1)

    def error(self, rank: int) -> float:
        """Share of the output energy lost at this rank (0 for a zero matrix)."""
        total = self.energies.sum().item()
        return self.energies[rank:].sum().item() / total if total > 0 else 0.0

    def factors(self, rank: int) -> Factors:
        """The best factors of this rank, balanced: both carry the square root of the spectrum.

        :param rank: 1 <= rank <= min(out, in)
        :raises ValueError: if the rank is out of range
        """
        limit = min(self.weight.shape)
        if not 1 <= rank <= limit:
            raise ValueError(f"rank must lie in [1, {limit}], got {rank}")
        left = self._left[:, :rank]
        root = self.energies[:rank].pow(0.25)  # sqrt of the singular values
        # a vanishing direction cannot be balanced: it stays as it is, its output is zero anyway
        root = torch.where(root > root.max() * 1e-8, root, torch.ones_like(root))
        return Factors(
            down=(left.T @ self.weight) / root[:, None],
            up=left * root,
            error=self.error(rank),
        )


def damped(second_moment: torch.Tensor, dampening_frac: float) -> torch.Tensor:
    """H + dampening_frac * mean(diag H) * I in float64; the identity where H is all zero.

    :raises ValueError: if H is not square or holds NaN or infinite values
    """
    moment = second_moment.detach().to(torch.float64)
    if moment.ndim != 2 or moment.shape[0] != moment.shape[1]:
        raise ValueError(f"second moment must be square, got shape {tuple(moment.shape)}")
    if not torch.isfinite(moment).all():
        raise ValueError("second moment holds NaN or infinite values")
    eye = torch.eye(moment.shape[0], dtype=moment.dtype, device=moment.device)
    mean = moment.diagonal().mean()
    return moment + dampening_frac * mean * eye if mean > 0 else eye


def uniform_rank(out_features: int, in_features: int, keep: float, multiple: int) -> int:
    """The rank, a multiple of ``multiple`` and at least one, whose factors come nearest to
    ``keep`` times the parameters of the matrix."""
    exact = keep * out_features * in_features / (out_features + in_features)
    return max(1, math.floor(exact / multiple + 0.5)) * multiple


def saves_parameters(out_features: int, in_features: int, rank: int) -> bool:
    """Whether factors of this rank have fewer parameters than the matrix."""
    return rank * (out_features + in_features) < out_features * in_features


def kept_share(out_features: int, in_features: int, rank: int) -> float:
    """Parameters of the factors over parameters of the matrix."""
    return rank * (out_features + in_features) / (out_features * in_features)
