"""Prices of candidates: bytes, and the output error.

Shapes: in and out are the channels of a linear, r the rank of its factors.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from casp_plugin.maths.hadamard import rotate_moment
from casp_plugin.maths.low_rank import losses_by_rank
from casp_plugin.model.codebook_schemes import CodebookScheme
from casp_plugin.model.latent import Latent
from casp_plugin.model.low_rank_linear import LowRankLinear
from casp_plugin.model.schemes import WeightScheme, missing_kernel, stored_bytes
from casp_plugin.plan.plan import Candidate, UnitPlan
from casp_plugin.pricing.codebook_error import CodebookErrors
from casp_plugin.pricing.rounding_error import Rounding, RoundingErrors, WeightedError
from casp_plugin.statistics.statistics import Statistics

__all__ = ["Pricing", "join_units", "stored_shapes"]

Layers = dict[str, nn.Linear | LowRankLinear]


@dataclass
class Pricing:
    """Prices of the candidates of layers: every bit width and, with a latent, every rank.

    With `fisher`, errors are expected changes of the loss in nats per token. Otherwise they are
    relative to the layer's output energy, times the share of tokens that is routed to an expert.
    Both are summed over the layers.

    :param schemes: weight scheme by bit width on offer
    :param statistics: statistics of the dense model; None leaves the errors unknown
    :param fisher: whether to weight output errors by the squared gradients of the loss
    :param rounding: of weights; to nearest it needs the mean squares of inputs, else their second
        moments
    :param input_block: returns the size of the Hadamard blocks that will rotate a layer's input
    :param rank_multiple: ranks are multiples of this
    """

    schemes: dict[int, WeightScheme]
    statistics: Statistics | None
    fisher: bool
    rounding: Rounding
    input_block: Callable[[str, nn.Linear | LowRankLinear], int]
    rank_multiple: int
    _errors: RoundingErrors | CodebookErrors = field(init=False)
    _moments: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict, init=False)
    _pending: list[tuple[Candidate, float, list[WeightedError]]] = field(
        default_factory=list, init=False
    )

    def __post_init__(self):
        coded = any(isinstance(scheme, CodebookScheme) for scheme in self.schemes.values())
        self._errors = CodebookErrors() if coded else RoundingErrors(self.rounding)

    def layers(self, dense: Layers, latent: Latent | None = None) -> UnitPlan:
        """Return layers with all candidates, whose errors :meth:`finish` fills in.

        :param dense: one layer, or the layers of a latent, by name
        :param latent: the latent that gives their factors; None for no factors
        :raises ValueError: if a weight cannot have a scheme on offer
        """
        candidates = []
        ranks = self._ranks(latent)
        known = self.statistics is not None
        losses = self._factoring_losses(latent) if known and ranks else None
        for rank in (None, *ranks):
            layers = dense if rank is None else latent.layers(rank)
            stored = _stored_weights(layers)
            self._check_shapes(stored)
            lost = 0.0 if rank is None or losses is None else losses[rank].item()
            rounding = self._rounding(layers) if known else {}
            for bits, args in self.schemes.items():
                candidate = Candidate(
                    bits=bits,
                    rank=rank,
                    group_size=getattr(args, "group_size", None) or -1,
                    bytes=sum(stored_bytes(w.shape, args, w.dtype) for w in stored.values()),
                    needs=missing_kernel(args),
                    codec=getattr(args, "codec", None),
                )
                candidates.append(candidate)
                if known:
                    self._pending.append((candidate, lost, rounding[bits]))
        return UnitPlan(
            name=next(iter(dense)),
            modules=stored_shapes(dense),
            weights=sum(layer.in_features * layer.out_features for layer in dense.values()),
            candidates=candidates,
        )

    def finish(self) -> None:
        """Fill in the errors of all candidates so far."""
        self._errors.finish()
        for candidate, lost, rounding in self._pending:
            candidate.error = lost + sum(error.value for error in rounding)
        self._pending.clear()

    def _ranks(self, latent: Latent | None) -> list[int]:
        """Return the ranks on offer, 1, 2, 3, 4, 6, 8, 12, ... times the multiple, to save time."""
        ranks = [] if latent is None else latent.ranks(self.rank_multiple)
        steps = {base << i for i in range(32) for base in (1, 2, 3)}
        return [rank for rank in ranks if rank // self.rank_multiple in steps]

    def _rounding(self, layers: Layers) -> dict[int, list[WeightedError]]:
        """Return the errors of rounding layers, or their factors, by bit width."""
        errors = {bits: [] for bits in self.schemes}
        nearest = self.rounding == "nearest"
        latents = {}
        for name, layer in layers.items():
            known = self.statistics.mean_squares if nearest else self.statistics.second_moments
            if name not in known:  # no token reached the layer
                continue
            block = self.input_block(name, layer)
            # (in,) to nearest, else (in, in)
            moment = known[name] if nearest else self._rotated(known[name], block)
            latent = None
            second = self.statistics.second_moments.get(name)
            factored = isinstance(layer, LowRankLinear) and second is not None
            if factored and not isinstance(self._errors, CodebookErrors):
                if layer.latent not in latents:
                    down = layer.latent.weight.float()  # (r, in)
                    latents[layer.latent] = down @ second @ down.T  # (r, in) @ (in, in) @ (in, r)
                latent = latents[layer.latent]
                latent = latent.diagonal() if nearest else latent
            weights = self._row_weights(name, layer)  # (out,)
            for bits, args in self.schemes.items():
                errors[bits].append(self._errors.of(layer, args, moment, weights, latent, block))
        return errors

    def _rotated(self, moment: torch.Tensor, block: int) -> torch.Tensor:
        """Return the moment of rotated inputs, shape (in, in), one tensor for all their readers."""
        key = id(moment), block
        if key not in self._moments:
            self._moments[key] = rotate_moment(moment, block)
        return self._moments[key]

    def _factoring_losses(self, latent: Latent) -> torch.Tensor:
        """Return the error of factors before rounding, by rank."""
        metrics = []
        for name, linear in latent.linears.items():
            metric = self._row_weights(name, linear)  # (out,)
            if self.fisher and name in self.statistics.gradient_moments:
                metric = self.statistics.gradient_moments[name] / 2  # (out, out)
            metrics.append(metric)
        spectrum = latent.spectrum
        moment = self.statistics.second_moments[next(iter(latent.linears))]  # (in, in), of all
        return losses_by_rank(spectrum.up, spectrum.down, moment, metrics)

    def _row_weights(self, name: str, layer: nn.Linear | LowRankLinear) -> torch.Tensor:
        """Return the cost of a squared error at the output channels of a layer, shape (out,)."""
        if self.fisher:  # second order: half the curvature
            squares = self.statistics.gradient_squares.get(name)
            return torch.zeros(layer.out_features) if squares is None else squares / 2
        energy = self.statistics.output_energies[name]
        share = self.statistics.routed.get(name, 1.0)  # squared gradients include it
        return torch.full((layer.out_features,), share / energy if energy > 0 else 0.0)

    def _check_shapes(self, stored: dict[str, torch.Tensor]) -> None:
        """Check that all weights can have the schemes on offer."""
        for name, weight in stored.items():
            for bits, args in self.schemes.items():
                if isinstance(args, CodebookScheme):
                    args.fitting(tuple(weight.shape)).check(name, tuple(weight.shape))
                elif args.group_size and weight.shape[1] % args.group_size:
                    raise ValueError(
                        f"BitAllocationModifier.group_size: {args.group_size} ({bits} bits) does "
                        f"not divide the {weight.shape[1]} columns of {name}; use a divisor, -1 "
                        "for one scale a row, or ignore the layer"
                    )


def join_units(name: str, pieces: list[UnitPlan]) -> UnitPlan:
    """Return the unit of layers that were priced apart, with bytes and errors of candidates summed.

    :param name: name of the unit
    :param pieces: prices of the layers, with the same bits and ranks on offer
    """
    candidates = []
    for same_scheme in zip(*(piece.candidates for piece in pieces), strict=True):
        errors = [candidate.error for candidate in same_scheme]
        total = {
            "bytes": sum(candidate.bytes for candidate in same_scheme),
            "error": None if None in errors else sum(errors),
        }
        candidates.append(same_scheme[0].model_copy(update=total))
    return UnitPlan(
        name=name,
        modules={module: shape for piece in pieces for module, shape in piece.modules.items()},
        weights=sum(piece.weights for piece in pieces),
        candidates=candidates,
    )


def stored_shapes(layers: Layers) -> dict[str, tuple[int, int]]:
    """Return (out, in) of the weights that a checkpoint stores for layers, by module name."""
    return {name: tuple(weight.shape) for name, weight in _stored_weights(layers).items()}


def _stored_weights(layers: Layers) -> dict[str, torch.Tensor]:
    stored = {}
    for name, layer in layers.items():
        if isinstance(layer, LowRankLinear):
            stored |= {f"{name}.{factor}": part.weight for factor, part in layer.named_children()}
        else:
            stored[name] = layer.weight
    return stored
