"""Low-rank factorisation of linear layers: pure functions on tensors.

A linear layer ``y = W x`` with ``W`` of shape (out, in) is replaced by ``y = U (D x)`` with
``D`` of shape (r, in) and ``U`` of shape (out, r). The best factors in the sense that matters
are those that change the *output* least over the calibration inputs, where it hurts:

    min_{rank r} E[dy^T G dy],  dy = (W - W') x,   = min ||G^(1/2) (W - W') H^(1/2)||_F^2

with ``H = E[x x^T]`` and an output metric ``G``. They are the truncated SVD of
``M = G^(1/2) W H^(1/2) = P S Q^T``, and since ``P P^T M H^(-1/2) = P P^T G^(1/2) W``, only G has
to be inverted, never the often rank-deficient H: P are the eigenvectors of ``M M^T``.

What to take for G:

- the identity: every output counts the same. CASP (arXiv 2503.05936, eq. 7), SVD-LLM
  (arXiv 2403.07378).
- how much the attention output moves with the outputs of W_q and W_k, E[J^T J], J its derivative
  at each token: what A3 (arXiv 2505.12942) and KQ-SVD (arXiv 2512.05916) weigh by hand, with
  softmax, RoPE, norms and values of every head included.
- the second moment of the gradient of the loss, E[g g^T]: the Kronecker factors of the Fisher
  information (K-FAC, arXiv 1503.05671). Half the lost energy is then the change of the loss.

Matrices that read one input, W_q and W_k, stacked as one of (out_q + out_k, in), share one
latent ``D x``: each keeps its own rows of U.

A product ``U D`` stays what it is for any orthogonal R in ``(U R)(R^T D)``. Factors of an SVD
have a few large columns and many small ones, which rounds badly; balanced and rotated, all
columns look alike (QuIP, arXiv 2307.13304, on weights; here on the latent, at no cost).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = [
    "Factors",
    "Spectrum",
    "quadratic_error",
    "random_rotation",
    "uniform_rank",
    "whitened_spectrum",
]


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


@dataclass(frozen=True)
class Spectrum:
    """The spectrum of a weight, and factors of any rank from it.

    :param energies: squared singular values of G^(1/2) W H^(1/2), descending, shape (out,), float64
    :param up: G^(-1/2) P, shape (out, largest rank)
    :param down: P^T G^(1/2) W, shape (largest rank, in)
    """

    energies: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    def lost(self, rank: int) -> float:
        """Energy lost at this rank, E[dy^T G dy]."""
        return self.energies[rank:].sum().item()

    def error(self, rank: int) -> float:
        """Share of the output energy lost at this rank (0 for a zero matrix)."""
        total = self.energies.sum().item()
        return self.lost(rank) / total if total > 0 else 0.0

    def factors(self, rank: int, rotation: torch.Tensor | None = None) -> Factors:
        """The best factors of this rank, balanced: both carry the square root of the spectrum.

        :param rank: 1 <= rank <= the largest that is kept
        :param rotation: R, orthogonal, shape (rank, rank), turns the latent; None for none
        :raises ValueError: if the rank is out of range
        """
        limit = self.down.shape[0]
        if not 1 <= rank <= limit:
            raise ValueError(f"rank must lie in [1, {limit}], got {rank}")
        root = self.energies[:rank].pow(0.25)  # sqrt of the singular values
        # a vanishing direction cannot be balanced: it stays as it is, its output is zero anyway
        root = torch.where(root > root.max() * 1e-8, root, torch.ones_like(root))
        down = self.down[:rank].to(root) / root[:, None]
        up = self.up[:, :rank].to(root) * root
        if rotation is not None:
            rotation = rotation.to(up)
            up, down = up @ rotation, rotation.T @ down
        return Factors(down=down, up=up, error=self.error(rank))

    def truncated(self, rank: int) -> "Spectrum":
        """The same, with factors up to this rank only."""
        return Spectrum(self.energies, self.up[:, :rank].clone(), self.down[:rank].clone())


def whitened_spectrum(
    weight: torch.Tensor,
    second_moment: torch.Tensor | None = None,
    output_metric: Sequence[torch.Tensor] | None = None,
    dampening_frac: float = 0.01,
) -> Spectrum:
    """The spectrum of a weight under both its metrics, solved in float64.

    :param weight: W, shape (out, in); several matrices may be stacked
    :param second_moment: H = E[x x^T], shape (in, in); None for the plain SVD (H = I)
    :param output_metric: blocks along the diagonal of G, one for each of the stacked matrices,
        shape (out, out) of each, symmetric, positive semidefinite; None for the identity
    :param dampening_frac: share of the mean diagonal of H and of G that is added to their
        diagonals, so that directions the calibration data never showed still count a little
    :raises ValueError: if a shape does not fit, or a value is not finite
    """
    weighted = weight.detach().to(torch.float64, copy=True)
    if not torch.isfinite(weighted).all():
        raise ValueError("weight holds NaN or infinite values")
    rows, columns = weight.shape
    inverses = None  # blocks of G^(-1/2)
    if output_metric is not None:
        _fits("output metric", output_metric, rows, "rows")
        blocks = damped(output_metric, dampening_frac, "output metric")
        inverses = []
        parts = weighted.split([len(block) for block in blocks])
        for part in parts:  # in place: matrices of this size decide on the memory it all takes
            root, inverse = _roots(blocks.pop(0))
            part.copy_(root @ part)  # G^(1/2) W
            inverses.append(inverse)
            del root
    if second_moment is not None:
        _fits("second moment", [second_moment], columns, "columns")
        [moment] = damped([second_moment], dampening_frac, "second moment")
        gram = (weighted @ moment) @ weighted.T
        del moment
    else:
        gram = weighted @ weighted.T
    energies, vectors = torch.linalg.eigh(gram)
    del gram
    left = _signed(vectors.flip(1)[:, : min(rows, columns)])
    del vectors
    up = left
    if inverses is not None:
        parts = left.split([len(inverse) for inverse in inverses])
        up = torch.cat([inverse @ part for inverse, part in zip(inverses, parts, strict=True)])
    # what is kept is of the weight's own precision, at least float32: models have many of these
    kept = torch.promote_types(weight.dtype, torch.float32)
    return Spectrum(
        energies.flip(0).clamp_min(0),
        up.to(kept),
        (left.T @ weighted).to(kept),
    )


def _signed(vectors: torch.Tensor) -> torch.Tensor:
    """Eigenvectors in columns with the sign that makes the largest entry positive: which of both a
    solver finds hangs on the last bit of its input."""
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * largest.sign()


def damped(blocks: Sequence[torch.Tensor], dampening_frac: float, what: str) -> list[torch.Tensor]:
    """H + dampening_frac * mean(diag H) * I in float64; the identity where H is all zero.

    :param blocks: along the diagonal of H
    :param what: how errors call it
    :raises ValueError: if a block is not square or holds NaN or infinite values
    """
    blocks = [block.detach().to(torch.float64, copy=True) for block in blocks]
    for block in blocks:
        if block.ndim != 2 or block.shape[0] != block.shape[1]:
            raise ValueError(f"{what} must be square, got shape {tuple(block.shape)}")
        if not torch.isfinite(block).all():
            raise ValueError(f"{what} holds NaN or infinite values")
    mean = torch.cat([block.diagonal() for block in blocks]).mean()
    for block in blocks:
        if mean > 0:
            block.diagonal().add_(dampening_frac * mean)
        else:
            block.copy_(torch.eye(len(block)))
    return blocks


def _fits(what: str, blocks: Sequence[torch.Tensor], size: int, side: str) -> None:
    channels = sum(len(block) for block in blocks)
    if channels != size:
        raise ValueError(f"{what} of {channels} channels does not fit a weight of {size} {side}")


def _roots(metric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """G^(1/2) and G^(-1/2); directions without any weight are left out of both."""
    values, vectors = torch.linalg.eigh(metric)
    del metric
    kept = values > values.max() * 1e-12
    root = torch.where(kept, values, 0).clamp_min(0).sqrt()
    inverse = torch.where(kept, root, 1).reciprocal() * kept
    return (vectors * root) @ vectors.T, (vectors * inverse) @ vectors.T


def random_rotation(size: int, seed: int = 0) -> torch.Tensor:
    """A random orthogonal matrix (Haar), shape (size, size), float64, the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    gauss = torch.randn(size, size, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gauss)
    return q * r.diagonal().sign()


def quadratic_error(
    delta: torch.Tensor, second_moment: torch.Tensor, output_metric: torch.Tensor
) -> float:
    """``E[dy^T G dy] = tr(G dW H dW^T)`` of a weight error.

    :param delta: dW, shape (out, in)
    :param second_moment: H, shape (in, in)
    :param output_metric: G, shape (out, out), or its diagonal, shape (out,)
    """
    delta = delta.to(torch.float64)
    output = delta @ second_moment.to(delta) @ delta.T
    metric = output_metric.to(delta)
    metric = metric if metric.ndim == 2 else metric.diag()
    return (metric * output).sum().item()


def uniform_rank(out_features: int, in_features: int, keep: float, multiple: int) -> int:
    """The rank, a multiple of ``multiple`` and at least one, whose factors come nearest to
    ``keep`` times the parameters of the matrix."""
    exact = keep * out_features * in_features / (out_features + in_features)
    return max(1, math.floor(exact / multiple + 0.5)) * multiple
