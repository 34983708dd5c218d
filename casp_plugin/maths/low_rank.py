"""Low-rank factorisation of linear layers: pure functions on tensors.

A linear layer ``y = W x`` with ``W`` of shape (out, in) is replaced by ``y = U (D x)`` with
``D`` of shape (r, in) and ``U`` of shape (out, r), rank r. The best factors change the *output*
least over the calibration inputs, measured where the loss feels it:

    min_{rank r} E[dy^T G dy],  dy = (W - W') x,   = min ||G^(1/2) (W - W') H^(1/2)||_F^2

with ``H = E[x x^T]`` and an output metric ``G``. Any roots ``H = R R^T``, ``G = L L^T`` will do;
here they are Cholesky factors. The best factors are the truncated SVD of
``M = L^T W R = P S Q^T``, taken back: ``W' = L^-T P S Q^T R^-1``. Q are the eigenvectors of
``M^T M = R^T (W^T G W) R``, which takes no root of G, and P those of
``M M^T = L^T (W H W^T) L``, which takes none of H. So the smaller of the two is solved:
``W' = (W R Q) (Q^T R^-1)`` or ``(L^-T P) (P^T L^T W)``.

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
from functools import lru_cache

import torch

__all__ = [
    "Factors",
    "Spectrum",
    "losses_by_rank",
    "random_rotation",
    "uniform_rank",
    "whitened_spectrum",
]


@dataclass(frozen=True)
class Factors:
    """Two factors of one matrix.

    :param down: D, shape (r, in)
    :param up: U, shape (out, r)
    :param error: share of the output energy that is lost, in [0, 1]
    """

    down: torch.Tensor
    up: torch.Tensor
    error: float


@dataclass(frozen=True)
class Spectrum:
    """Spectrum of a weight, which gives factors of any rank.

    The factors are balanced: both carry the square roots of the singular values.

    :param energies: squared singular values of L^T W R, descending, shape (k,)
    :param up: shape (out, k)
    :param down: shape (k, in)
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
        """Return the best factors of a rank.

        :param rank: r, from 1 to the number of rows of ``down``
        :param rotation: R, orthogonal, shape (r, r), rotates the latent; None for no rotation
        :raises ValueError: if the rank is out of range
        """
        limit = self.down.shape[0]
        if not 1 <= rank <= limit:
            raise ValueError(f"rank must lie in [1, {limit}], got {rank}")
        up, down = self.up[:, :rank], self.down[:rank]  # (out, r), (r, in)
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
    """Return the spectrum of a weight under an input and an output metric.

    Cholesky factors are taken in float64; products and eigenvectors are in the precision of the
    weight, at least float32. Of the energy, factors from float32 lose 1e-6 more than those from
    float64.

    :param weight: W, shape (out, in); several matrices may be stacked along out
    :param second_moment: H = E[x x^T], shape (in, in); None for the plain SVD (H = I)
    :param output_metric: blocks along the diagonal of G, one per stacked matrix, each of shape
        (its out, its out), symmetric, positive semidefinite; None for the identity
    :param dampening_frac: share of the mean diagonal of H and of G that is added to their
        diagonals, so that directions absent from the calibration data still count a little
    :raises ValueError: if a shape does not fit, or a value is not finite
    """
    weight = weight.detach()
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))  # (out, in)
    if not torch.isfinite(weight).all():
        raise ValueError("weight holds NaN or infinite values")
    rows, columns = weight.shape
    moment = metric = None
    if second_moment is not None:
        _fits("second moment", [second_moment], columns, "columns")
        [moment] = damped([second_moment], dampening_frac, "second moment")
    if output_metric is not None:
        _fits("output metric", output_metric, rows, "rows")
        metric = damped(output_metric, dampening_frac, "output metric")
    solve = _by_inputs if columns <= rows else _by_outputs
    return Spectrum(*solve(weight, moment, metric))


def _by_inputs(
    weight: torch.Tensor,
    moment: torch.Tensor | None,
    metric: list[torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return energies and balanced factors by the eigenvectors Q of M^T M, shape (in, in)."""
    root = None if moment is None else _root(moment).to(weight)  # R
    gram = weight.T @ _by_block(metric, weight)  # W^T G W: (in, out) @ (out, in)
    if root is not None:
        gram = root.T @ gram @ root
    energies, vectors = _eigenvectors(gram)
    up, down = weight, vectors.T
    if root is not None:
        up = weight @ root  # (out, in) @ (in, in)
        down = torch.linalg.solve_triangular(root, down, upper=False, left=False)  # Q^T R^-1
    balance = _balance(energies)
    return energies, (up @ vectors) / balance, down * balance[:, None]


def _by_outputs(
    weight: torch.Tensor,
    moment: torch.Tensor | None,
    metric: list[torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return energies and balanced factors by the eigenvectors P of M M^T, shape (out, out)."""
    roots = metric and [_root(block).to(weight) for block in metric]  # L, block by block
    transposed = roots and [root.T for root in roots]
    seen = weight if moment is None else weight @ moment.to(weight)  # W H
    gram = weight @ seen.T  # (out, out)
    gram = _by_block(transposed, _by_block(transposed, gram).T)
    energies, vectors = _eigenvectors(gram)
    down = vectors.T @ _by_block(transposed, weight)  # (out, out) @ (out, in)
    up = vectors
    if roots:
        parts = zip(roots, vectors.split([len(root) for root in roots]), strict=True)
        solved = [torch.linalg.solve_triangular(root.T, part, upper=True) for root, part in parts]
        up = torch.cat(solved)  # L^-T P
    balance = _balance(energies)
    return energies, up * balance, down / balance[:, None]


def _by_block(blocks: Sequence[torch.Tensor] | None, matrix: torch.Tensor) -> torch.Tensor:
    """Return the product of a block-diagonal matrix, None for the identity, and a matrix."""
    if blocks is None:
        return matrix
    parts = matrix.split([len(block) for block in blocks])
    return torch.cat([block.to(part) @ part for block, part in zip(blocks, parts, strict=True)])


def _root(metric: torch.Tensor) -> torch.Tensor:
    """Return the Cholesky factor of a positive semidefinite matrix, with the least dampening that
    gives it one: sums in float32 leave a singular matrix with slightly negative eigenvalues."""
    dampening = 1e-9 * (metric.diagonal().mean().item() or 1.0)
    root, failed = torch.linalg.cholesky_ex(metric)
    while failed:
        dampened = metric.diagonal() + dampening
        root, failed = torch.linalg.cholesky_ex(metric.diagonal_scatter(dampened))
        dampening *= 10
    return root


def _eigenvectors(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return eigenvalues of a positive semidefinite matrix, descending, and eigenvectors in
    columns."""
    energies, vectors = torch.linalg.eigh(gram)
    return energies.flip(0).clamp_min(0), _signed(vectors.flip(1))


def _balance(energies: torch.Tensor) -> torch.Tensor:
    """Return the square roots of singular values. A vanishing direction cannot be balanced, and
    its output is zero: it stays as it is."""
    root = energies.pow(0.25)
    return torch.where(root > root.max() * 1e-8, root, torch.ones_like(root))


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


@lru_cache(maxsize=16)  # every layer takes those of the same few ranks
def random_rotation(size: int, seed: int = 0) -> torch.Tensor:
    """Return a random orthogonal matrix (Haar), shape (size, size), float64, fixed by the seed."""
    generator = torch.Generator().manual_seed(seed)
    gauss = torch.randn(size, size, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gauss)
    return q * r.diagonal().sign()


def losses_by_rank(
    up: torch.Tensor,
    down: torch.Tensor,
    second_moment: torch.Tensor,
    output_metric: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Return ``E[dy^T G dy]`` of factors cut off at every rank, ``dW = up[:, r:] down[r:]``.

    That is the sum over i, j >= r of ``(up^T G up)_ij (down H down^T)_ij``.

    :param up: shape (out, k), k = min(out, in), of matrices stacked along out
    :param down: shape (k, in)
    :param second_moment: H, shape (in, in)
    :param output_metric: blocks along the diagonal of G, of shape (its out, its out), or (its out,)
        for a diagonal one
    :return: by rank from 0 to k, shape (k + 1,), float64
    """
    outputs = 0  # (k, k)
    for part, metric in zip(up.split([len(m) for m in output_metric]), output_metric, strict=True):
        metric = metric.to(part)
        weighted = metric @ part if metric.ndim == 2 else metric[:, None] * part  # (its out, k)
        outputs = outputs + part.T @ weighted
    inputs = down @ second_moment.to(down) @ down.T  # (k, in) @ (in, in) @ (in, k)
    last_first = (outputs * inputs).double().flip(0, 1)
    sums = last_first.cumsum(0).cumsum(1).diagonal().flip(0)  # (k,)
    return torch.cat([sums, sums.new_zeros(1)]).clamp_min(0)


def uniform_rank(out_features: int, in_features: int, keep: float, multiple: int) -> int:
    """Return the rank whose factors come nearest to ``keep`` times the parameters of the matrix.

    :param multiple: the rank is a multiple of this, at least one
    """
    exact = keep * out_features * in_features / (out_features + in_features)
    return max(1, math.floor(exact / multiple + 0.5)) * multiple
