"""Low-rank factorisation of linear layers: pure functions on tensors.

A linear layer ``y = W x`` with ``W`` of shape (out, in) is replaced by ``y = U (D x)`` with
``D`` of shape (r, in) and ``U`` of shape (out, r), rank r. The best factors change the *output*
least over the calibration inputs, measured where the loss feels it:

    min_{rank r} E[dy^T G dy],  dy = (W - W') x,   = min ||G^(1/2) (W - W') H^(1/2)||_F^2

with ``H = E[x x^T]`` and an output metric ``G``. They are the truncated SVD of
``M = G^(1/2) W H^(1/2) = P S Q^T``, and since ``P P^T M H^(-1/2) = P P^T G^(1/2) W``, only G has
to be inverted, never the often rank-deficient H: P are the eigenvectors of ``M M^T``.

Choices of G:

- the identity: every output counts the same. CASP (arXiv 2503.05936, eq. 7), SVD-LLM
  (arXiv 2403.07378).
- E[J^T J], J the derivative of the attention output by the outputs of W_q and W_k at one token.
  A3 (arXiv 2505.12942) and KQ-SVD (arXiv 2512.05916) derive such weights by hand; here softmax,
  RoPE, norms and values of every head are included.
- the second moment of the gradient of the loss, E[g g^T]: the Kronecker factors of the Fisher
  information (K-FAC, arXiv 1503.05671). Half the lost energy is then the change of the loss.

Matrices that read one input, W_q and W_k, stacked as one of (out_q + out_k, in), share one
latent ``D x``; each has its own rows of U.

The product ``U D = (U R)(R^T D)`` is the same for any orthogonal R. Factors of an SVD have a few
large columns and many small ones, which rounds badly; balanced and rotated, all columns look alike
(QuIP, arXiv 2307.13304, on weights; here on the latent, at no cost).

Shapes: out and in are channels of W, r the rank of factors, k = min(out, in) the largest rank.
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

    :param down: D, shape (r, in), float64
    :param up: U, shape (out, r), float64
    :param error: share of the output energy that is lost, in [0, 1]
    """

    down: torch.Tensor
    up: torch.Tensor
    error: float


@dataclass(frozen=True)
class Spectrum:
    """Spectrum of a weight, which gives factors of any rank.

    :param energies: squared singular values of G^(1/2) W H^(1/2), descending, shape (out,), float64
    :param up: G^(-1/2) P, shape (out, k)
    :param down: P^T G^(1/2) W, shape (k, in)
    """

    energies: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    def lost(self, rank: int) -> float:
        """Return the energy lost at a rank, E[dy^T G dy]."""
        return self.energies[rank:].sum().item()

    def error(self, rank: int) -> float:
        """Return the share of the output energy lost at a rank; 0 for a zero matrix."""
        total = self.energies.sum().item()
        return self.lost(rank) / total if total > 0 else 0.0

    def factors(self, rank: int, rotation: torch.Tensor | None = None) -> Factors:
        """Return the best factors of a rank, balanced: both carry the square root of the spectrum.

        :param rank: r, from 1 to the number of rows of ``down``
        :param rotation: R, orthogonal, shape (r, r), rotates the latent; None for no rotation
        :raises ValueError: if the rank is out of range
        """
        limit = self.down.shape[0]
        if not 1 <= rank <= limit:
            raise ValueError(f"rank must lie in [1, {limit}], got {rank}")
        root = self.energies[:rank].pow(0.25)  # (r,), square roots of the singular values
        # a vanishing direction cannot be balanced, and its output is zero: it stays as it is
        root = torch.where(root > root.max() * 1e-8, root, torch.ones_like(root))
        down = self.down[:rank].to(root) / root[:, None]  # (r, in)
        up = self.up[:, :rank].to(root) * root  # (out, r)
        if rotation is not None:
            rotation = rotation.to(up)
            up, down = up @ rotation, rotation.T @ down  # (out, r) @ (r, r), (r, r) @ (r, in)
        return Factors(down=down, up=up, error=self.error(rank))

    def truncated(self, rank: int) -> "Spectrum":
        """Return the same spectrum with factors up to a rank only."""
        return Spectrum(self.energies, self.up[:, :rank].clone(), self.down[:rank].clone())


def whitened_spectrum(
    weight: torch.Tensor,
    second_moment: torch.Tensor | None = None,
    output_metric: Sequence[torch.Tensor] | None = None,
    dampening_frac: float = 0.01,
) -> Spectrum:
    """Return the spectrum of a weight under an input and an output metric, solved in float64.

    :param weight: W, shape (out, in); several matrices may be stacked along out
    :param second_moment: H = E[x x^T], shape (in, in); None for the plain SVD (H = I)
    :param output_metric: blocks along the diagonal of G, one per stacked matrix, each of shape
        (its out, its out), symmetric, positive semidefinite; None for the identity
    :param dampening_frac: share of the mean diagonal of H and of G that is added to their
        diagonals, so that directions absent from the calibration data still count a little
    :raises ValueError: if a shape does not fit, or a value is not finite
    """
    weighted = weight.detach().to(torch.float64, copy=True)  # (out, in)
    if not torch.isfinite(weighted).all():
        raise ValueError("weight holds NaN or infinite values")
    rows, columns = weight.shape
    inverses = None  # blocks of G^(-1/2)
    if output_metric is not None:
        _fits("output metric", output_metric, rows, "rows")
        blocks = damped(output_metric, dampening_frac, "output metric")
        inverses = []
        parts = weighted.split([len(block) for block in blocks])
        for part in parts:  # in place: matrices of this size dominate the memory
            root, inverse = _roots(blocks.pop(0))
            part.copy_(root @ part)  # G^(1/2) W: (out, out) @ (out, in), of one matrix
            inverses.append(inverse)
            del root
    if second_moment is not None:
        _fits("second moment", [second_moment], columns, "columns")
        [moment] = damped([second_moment], dampening_frac, "second moment")
        gram = (weighted @ moment) @ weighted.T  # M M^T: (out, in) @ (in, in) @ (in, out)
        del moment
    else:
        gram = weighted @ weighted.T
    energies, vectors = torch.linalg.eigh(gram)  # (out,), (out, out), ascending
    del gram
    left = _signed(vectors.flip(1)[:, : min(rows, columns)])  # P, (out, k)
    del vectors
    up = left
    if inverses is not None:
        parts = left.split([len(inverse) for inverse in inverses])
        # (out, out) @ (out, k), of one matrix
        up = torch.cat([inverse @ part for inverse, part in zip(inverses, parts, strict=True)])
    # kept in the weight's own precision, at least float32: a model has many spectra
    kept = torch.promote_types(weight.dtype, torch.float32)
    return Spectrum(
        energies.flip(0).clamp_min(0),
        up.to(kept),
        (left.T @ weighted).to(kept),  # (k, out) @ (out, in)
    )


def _signed(vectors: torch.Tensor) -> torch.Tensor:
    """Return eigenvectors, in columns, with the sign that makes the largest entry positive.

    Which sign a solver returns depends on the last bit of its input.

    :param vectors: shape (out, k)
    """
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))  # (1, k)
    return vectors * largest.sign()


def damped(blocks: Sequence[torch.Tensor], dampening_frac: float, name: str) -> list[torch.Tensor]:
    """Return H + dampening_frac * mean(diag H) * I in float64; the identity where H is zero.

    :param blocks: blocks along the diagonal of H, square
    :param name: name of H in errors
    :raises ValueError: if a block is not square or holds NaN or infinite values
    """
    blocks = [block.detach().to(torch.float64, copy=True) for block in blocks]
    for block in blocks:
        if block.ndim != 2 or block.shape[0] != block.shape[1]:
            raise ValueError(f"{name} must be square, got shape {tuple(block.shape)}")
        if not torch.isfinite(block).all():
            raise ValueError(f"{name} holds NaN or infinite values")
    mean = torch.cat([block.diagonal() for block in blocks]).mean()
    for block in blocks:
        if mean > 0:
            block.diagonal().add_(dampening_frac * mean)
        else:
            block.copy_(torch.eye(len(block)))
    return blocks


def _fits(name: str, blocks: Sequence[torch.Tensor], size: int, side: str) -> None:
    channels = sum(len(block) for block in blocks)
    if channels != size:
        raise ValueError(f"{name} of {channels} channels does not fit a weight of {size} {side}")


def _roots(metric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return G^(1/2) and G^(-1/2); directions of weight zero are left out of both."""
    values, vectors = torch.linalg.eigh(metric)  # (out,), (out, out)
    del metric
    kept = values > values.max() * 1e-12
    root = torch.where(kept, values, 0).clamp_min(0).sqrt()
    inverse = torch.where(kept, root, 1).reciprocal() * kept
    return (vectors * root) @ vectors.T, (vectors * inverse) @ vectors.T


def random_rotation(size: int, seed: int = 0) -> torch.Tensor:
    """Return a random orthogonal matrix (Haar), shape (size, size), float64, fixed by the seed."""
    generator = torch.Generator().manual_seed(seed)
    gauss = torch.randn(size, size, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gauss)
    return q * r.diagonal().sign()


def quadratic_error(
    delta: torch.Tensor, second_moment: torch.Tensor, output_metric: torch.Tensor
) -> float:
    """Return ``E[dy^T G dy] = tr(G dW H dW^T)`` of a weight error.

    :param delta: dW, shape (out, in)
    :param second_moment: H, shape (in, in)
    :param output_metric: G, shape (out, out), or its diagonal, shape (out,)
    """
    delta = delta.to(torch.float64)
    output = delta @ second_moment.to(delta) @ delta.T  # (out, in) @ (in, in) @ (in, out)
    metric = output_metric.to(delta)
    metric = metric if metric.ndim == 2 else metric.diag()  # (out, out)
    return (metric * output).sum().item()


def uniform_rank(out_features: int, in_features: int, keep: float, multiple: int) -> int:
    """Return the rank whose factors come nearest to ``keep`` times the parameters of the matrix.

    :param multiple: the rank is a multiple of this, at least one
    """
    exact = keep * out_features * in_features / (out_features + in_features)
    return max(1, math.floor(exact / multiple + 0.5)) * multiple
