"""What each candidate of a unit takes and costs: bytes, and the measured error."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import nn

from casp_plugin.maths.low_rank import quadratic_error
from casp_plugin.model.latent import Latent
from casp_plugin.model.low_rank_linear import LowRankLinear
from casp_plugin.model.schemes import missing_kernel, stored_bytes
from casp_plugin.model.transforms import rotate_moment
from casp_plugin.plan.plan import Candidate, UnitPlan
from casp_plugin.pricing.rounding_error import RoundingErrors, WeightedError
from casp_plugin.statistics.statistics import Statistics

__all__ = ["Pricing", "joined", "stored_shapes"]

Layers = dict[str, nn.Linear | LowRankLinear]


@dataclass
class Pricing:
    """Prices the candidates of layers: every bit width and, with a latent, every rank.

    Errors are expected changes of the loss in nats a token with `fisher`; otherwise they are
    relative to each layer's output energy, for an expert times the share of the tokens that are
    routed to it, and summed over the unit's layers.

    :param schemes: weight scheme of each bit width on offer
    :param statistics: of the dense model; None leaves the errors unknown
    :param fisher: weigh output errors by the squared gradients of the loss
    :param by_gptq: round by GPTQ, which takes the second moments of every layer's input, not to
        nearest, which takes its mean squares
    :param input_block: size of the Hadamard blocks that will rotate the input of a layer
    :param rank_multiple: ranks are multiples of this
    """

    schemes: dict[int, QuantizationArgs]
    statistics: Statistics | None
    fisher: bool
    by_gptq: bool
    input_block: Callable[[str, nn.Linear | LowRankLinear], int]
    rank_multiple: int
    _errors: RoundingErrors = field(default_factory=RoundingErrors, init=False)
    _moments: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict, init=False)
    _asked: list[tuple[Candidate, float, list[WeightedError]]] = field(
        default_factory=list, init=False
    )

    def layers(self, dense: Layers, latent: Latent | None = None) -> UnitPlan:
        """Layers with all candidates; their errors are there after :meth:`finish`.

        :param dense: one, or those of a latent, as they are
        :param latent: what they may become
        :raises ValueError: if a group size does not divide the columns of a weight
        """
        candidates = []
        for rank in (None, *self._ranks(latent)):
            layers = dense if rank is None else latent.layers(rank)
            stored = _stored(layers)
            self._check_groups(stored)
            known = self.statistics is not None
            lost = self._lost(dense, layers) if known and rank is not None else 0.0
            rounding = self._rounding(layers) if known else {}
            for bits, args in self.schemes.items():
                candidate = Candidate(
                    bits=bits,
                    rank=rank,
                    group_size=args.group_size or -1,
                    bytes=sum(stored_bytes(w.shape, args, w.dtype) for w in stored.values()),
                    needs=missing_kernel(args),
                )
                candidates.append(candidate)
                if known:
                    self._asked.append((candidate, lost, rounding[bits]))
        return UnitPlan(
            name=next(iter(dense)),
            modules=stored_shapes(dense),
            weights=sum(layer.in_features * layer.out_features for layer in dense.values()),
            candidates=candidates,
        )

    def finish(self) -> None:
        """Fill in the errors of all candidates."""
        self._errors.finish()
        for candidate, lost, rounding in self._asked:
            candidate.error = lost + sum(error.value for error in rounding)
        self._asked.clear()

    def _ranks(self, latent: Latent | None) -> list[int]:
        """Ranks on offer, 1, 2, 3, 4, 6, 8, 12, ... times the multiple: every one is measured."""
        ranks = [] if latent is None else latent.ranks(self.rank_multiple)
        steps = {base << i for i in range(32) for base in (1, 2, 3)}
        return [rank for rank in ranks if rank // self.rank_multiple in steps]

    def _rounding(self, layers: Layers) -> dict[int, list[WeightedError]]:
        """Errors of rounding layers, or their factors, under each scheme."""
        asked = {bits: [] for bits in self.schemes}
        for name, layer in layers.items():
            known = self.statistics.second_moments if self.by_gptq else self.statistics.mean_squares
            if name not in known:  # no token reached it
                continue
            block = self.input_block(name, layer)
            moment = self._rotated(known[name], block) if self.by_gptq else known[name]
            latent = None
            second = self.statistics.second_moments.get(name)
            if isinstance(layer, LowRankLinear) and second is not None:
                down = layer.latent.weight.float()
                latent = down @ second @ down.T
                latent = latent if self.by_gptq else latent.diagonal()
            weights = self._row_weights(name, layer)
            for bits, args in self.schemes.items():
                asked[bits].append(self._errors.of(layer, args, moment, weights, latent, block))
        return asked

    def _rotated(self, moment: torch.Tensor, block: int) -> torch.Tensor:
        """A moment of rotated inputs, one tensor for all that read them."""
        key = id(moment), block
        if key not in self._moments:
            self._moments[key] = rotate_moment(moment, block)
        return self._moments[key]

    def _lost(self, dense: Layers, factored: dict[str, LowRankLinear]) -> float:
        """Error of factors that are not rounded."""
        error = 0.0
        for name, layer in factored.items():
            metric = self._row_weights(name, layer)
            if self.fisher and name in self.statistics.gradient_moments:
                metric = self.statistics.gradient_moments[name] / 2
            product = layer.up.weight.double() @ layer.latent.weight.double()
            moment = self.statistics.second_moments[name]
            error += quadratic_error(product - dense[name].weight, moment, metric)
        return error

    def _row_weights(self, name: str, layer: nn.Linear | LowRankLinear) -> torch.Tensor:
        """What a squared error at each output channel of a layer costs, shape (out,)."""
        if self.fisher:  # second-order: half the curvature
            squares = self.statistics.gradient_squares.get(name)
            return torch.zeros(layer.out_features) if squares is None else squares / 2
        energy = self.statistics.output_energies[name]
        share = self.statistics.routed.get(name, 1.0)  # gradients know it by themselves
        return torch.full((layer.out_features,), share / energy if energy > 0 else 0.0)

    def _check_groups(self, stored: dict[str, torch.Tensor]) -> None:
        for name, weight in stored.items():
            for bits, args in self.schemes.items():
                if args.group_size and weight.shape[1] % args.group_size:
                    raise ValueError(
                        f"BitAllocationModifier.group_size: {args.group_size} ({bits} bits) does "
                        f"not divide the {weight.shape[1]} columns of {name}; use a divisor, -1 "
                        "for one scale a row, or ignore the layer"
                    )


def joined(name: str, parts: list[UnitPlan]) -> UnitPlan:
    """The unit of layers that were priced apart, candidate by candidate.

    :param parts: with the same bits and ranks on offer
    """
    candidates = []
    for alike in zip(*(part.candidates for part in parts), strict=True):
        errors = [candidate.error for candidate in alike]
        total = {
            "bytes": sum(candidate.bytes for candidate in alike),
            "error": None if None in errors else sum(errors),
        }
        candidates.append(alike[0].model_copy(update=total))
    return UnitPlan(
        name=name,
        modules={module: shape for part in parts for module, shape in part.modules.items()},
        weights=sum(part.weights for part in parts),
        candidates=candidates,
    )


def stored_shapes(layers: Layers) -> dict[str, tuple[int, int]]:
    """Shapes of the weights that a checkpoint stores for layers, by module name."""
    return {name: tuple(weight.shape) for name, weight in _stored(layers).items()}


def _stored(layers: Layers) -> dict[str, torch.Tensor]:
    stored = {}
    for name, layer in layers.items():
        if isinstance(layer, LowRankLinear):
            stored |= {f"{name}.{part}": child.weight for part, child in layer.named_children()}
        else:
            stored[name] = layer.weight
    return stored
