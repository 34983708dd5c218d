"""What a compressed model stores as real numbers, as leaves that a tuner descends on.

Codes, ranks and widths stay as they are, so that no byte is added. Every leaf is a change relative
to the size of what it changes, zero at first: one learning rate fits scales, norms and biases.

Shapes: out and in are the channels of a linear.
"""

from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from compressed_tensors.offload import update_offload_parameter
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy, fake_quantize
from compressed_tensors.quantization.utils import calculate_range
from torch import nn
from torch.nn import functional

from casp_plugin.model.codebook_linear import CodebookLinear
from casp_plugin.model.codebook_schemes import SCALE
from casp_plugin.model.low_rank_linear import LowRankLinear
from casp_plugin.system.distributed import barrier

__all__ = ["Tunable", "in_place", "is_integer", "round_weight", "store", "tunables"]

#: codes of more bits do not survive in a weight of 16 bits with other scales
_MOST_BITS = 6
#: rounding offsets start no nearer than this to the border of their code
_FURTHEST = 0.45
#: scales of integers stay above this share of what they were
_LEAST_SCALE = 0.05


class Tunable(ABC):
    """A tensor of a module as a function of a leaf.

    :param module: the module
    :param shape: of the leaf
    :ivar leaf: float32, on the module's device
    """

    def __init__(self, module: nn.Module, shape: Iterable[int], device: torch.device):
        self.module = module
        self.leaf = torch.zeros(*shape, device=device, requires_grad=True)

    @property
    def leaves(self) -> list[torch.Tensor]:
        """Return all leaves."""
        return [self.leaf]

    @abstractmethod
    def put(self) -> contextmanager:
        """Return a context in which the module computes with the tensor that the leaf gives."""

    @abstractmethod
    def stored(self) -> dict[str, torch.Tensor]:
        """Return the tensors that the module will store, by name; they are of its dtypes, and none
        of its own."""


class _Vector(Tunable):
    """A norm, a bias, or a matrix in 16 bits: what it was, plus the leaf times its size."""

    def __init__(self, module: nn.Module, name: str):
        before = getattr(module, name).detach().float().clone()
        super().__init__(module, before.shape, before.device)
        self._name, self._before = name, before
        self._size = before.square().mean().sqrt()

    def _value(self) -> torch.Tensor:
        return self._before + self._size * self.leaf

    @contextmanager
    def put(self) -> Iterator[None]:
        # found before the module's parameters, which an offloading cache may hold
        value = self._value().to(getattr(self.module, self._name).dtype)
        vars(self.module)[self._name] = value
        try:
            yield
        finally:
            del vars(self.module)[self._name]

    @torch.no_grad()
    def stored(self) -> dict[str, torch.Tensor]:
        return {self._name: self._value().to(getattr(self.module, self._name).dtype)}


class _Weight(Tunable):
    """The weight of a linear, computed anew in every call."""

    @abstractmethod
    def weight(self) -> torch.Tensor:
        """Return the weight, shape (out, in), float32."""

    @contextmanager
    def put(self) -> Iterator[None]:
        def forward(x: torch.Tensor) -> torch.Tensor:
            return functional.linear(x, self.weight().to(x.dtype), self.module.bias)

        before = vars(self.module).get("forward")  # of a quantized or an offloaded module
        self.module.forward = forward
        try:
            yield
        finally:
            del self.module.forward
            if before is not None:
                self.module.forward = before


class _CodedRows(_Weight):
    """The rows of a codebook layer, each times one plus its leaf."""

    def __init__(self, module: CodebookLinear):
        super().__init__(module, (module.out_features,), getattr(module, SCALE).device)

    def weight(self) -> torch.Tensor:
        return self.module.weight.float() * (1 + self.leaf)[:, None]

    @torch.no_grad()
    def stored(self) -> dict[str, torch.Tensor]:
        scale = getattr(self.module, SCALE)
        return {SCALE: (scale * (1 + self.leaf)).to(scale.dtype)}


class _Integers(_Weight):
    """Integers times their scales, each scale times one plus its leaf.

    :param dense: the weight before it was rounded; with it the integers are tuned too
    """

    def __init__(self, module: nn.Linear, dense: torch.Tensor | None = None):
        scale = module.weight_scale
        super().__init__(module, scale.shape, scale.device)
        self._scale = scale.detach().float().clone()
        self._args: QuantizationArgs = module.quantization_scheme.weights
        self._offset: torch.Tensor | None = None
        if dense is not None:
            exact = dense.to(scale.device).float() / self._by_column(self._scale)
            levels = self._levels()
            distance = (exact - levels).clamp(-_FURTHEST, _FURTHEST)
            self._offset = (levels + distance).requires_grad_(True)
            zero = getattr(module, "weight_zero_point", torch.zeros_like(self._scale))
            zero = self._by_column(zero.float())
            least, most = calculate_range(self._args, scale.device)
            self._range = least - zero, most - zero

    @property
    def leaves(self) -> list[torch.Tensor]:
        return [self.leaf] if self._offset is None else [self.leaf, self._offset]

    def _levels(self) -> torch.Tensor:
        """Return the integers, their zero points taken off, shape (out, in), float32."""
        return (self.module.weight.detach().float() / self._by_column(self._scale)).round()

    def _by_column(self, values: torch.Tensor) -> torch.Tensor:
        """Return values of groups for every weight, or in a shape that broadcasts to them."""
        if self._args.strategy != QuantizationStrategy.GROUP:
            return values
        places = getattr(self.module, "weight_g_idx", None)
        if places is None or (places < 0).any():
            return values.repeat_interleave(self._args.group_size, 1)
        return values[:, places.long()]

    def _factors(self) -> torch.Tensor:
        return (1 + self.leaf).clamp_min(_LEAST_SCALE)

    def weight(self) -> torch.Tensor:
        factors = self._by_column(self._factors())
        if self._offset is None:
            return self.module.weight.float() * factors
        offset = self._offset.clamp(*self._range)
        levels = offset + (offset.round() - offset).detach()  # straight through
        return levels * self._by_column(self._scale) * factors

    @torch.no_grad()
    def stored(self) -> dict[str, torch.Tensor]:
        offset = self._offset
        levels = self._levels() if offset is None else offset.clamp(*self._range).round()
        scale = (self._scale * self._factors()).to(self.module.weight_scale.dtype)
        weight = levels * self._by_column(scale.float())
        return {"weight": weight.to(self.module.weight.dtype), "weight_scale": scale}


def store(tuned: Iterable[Tunable]) -> None:
    """Let modules store what leaves give, as a checkpoint will.

    Several processes share the memory of an offloaded model: all have read before any writes.
    """
    found = [(each.module, each.stored()) for each in tuned]
    barrier()
    for module, tensors in found:
        for name, tensor in tensors.items():
            update_offload_parameter(module, name, tensor)
        if isinstance(module, CodebookLinear):
            module.forget()
    barrier()


def tunables(
    module: nn.Module,
    matrices: bool = False,
    dense: nn.Module | None = None,
    ignored: Container[nn.Module] = (),
) -> list[Tunable]:
    """Return what can be tuned in a module and all inside it.

    Scales of integers of up to 6 bits and of codebooks, norms, and biases.

    :param matrices: whether factors in 16 bits are tuned as well
    :param dense: the same module before compression, to tune how integers are rounded
    :param ignored: modules inside that stay as they are
    """
    found: list[Tunable] = []
    for name, inner in module.named_modules():
        if inner in ignored:
            continue
        if isinstance(inner, CodebookLinear):
            found.append(_CodedRows(inner))
        elif is_integer(inner):
            found.append(_Integers(inner, _weight_of(dense, name, inner)))
        elif matrices and _is_factor(module, name):
            found.append(_Vector(inner, "weight"))
        for leaf, value in inner.named_parameters(recurse=False):
            is_vector = leaf in ("weight", "bias") and value.ndim == 1
            if is_vector and value.is_floating_point() and value.any():
                found.append(_Vector(inner, leaf))
    return found


@contextmanager
def in_place(tuned: Iterable[Tunable]) -> Iterator[None]:
    """Let modules compute with what leaves give, as they are on entry."""
    with ExitStack() as stack:
        for each in tuned:
            stack.enter_context(each.put())
        yield


@torch.no_grad()
def round_weight(module: nn.Module) -> None:
    """Round the weight of a quantized layer in place, as a checkpoint will hold it."""
    rounded = fake_quantize(
        module.weight,
        module.weight_scale,
        getattr(module, "weight_zero_point", None),
        module.quantization_scheme.weights,
        getattr(module, "weight_g_idx", None),
    )
    update_offload_parameter(module, "weight", rounded.to(module.weight.dtype))


def is_integer(module: nn.Module) -> bool:
    """Tell whether the scales of a layer can be tuned."""
    args = getattr(getattr(module, "quantization_scheme", None), "weights", None)
    known = (QuantizationStrategy.GROUP, QuantizationStrategy.CHANNEL, QuantizationStrategy.TENSOR)
    return (
        isinstance(module, nn.Linear)
        and args is not None
        and args.type == "int"
        and args.num_bits <= _MOST_BITS
        and args.strategy in known
    )


def _is_factor(module: nn.Module, name: str) -> bool:
    """Tell whether a layer is a factor in 16 bits."""
    parent = module.get_submodule(name.rpartition(".")[0])
    inner = module.get_submodule(name)
    dense = isinstance(inner, nn.Linear) and not hasattr(inner, "quantization_scheme")
    return dense and isinstance(parent, LowRankLinear)


def _weight_of(dense: nn.Module | None, name: str, module: nn.Linear) -> torch.Tensor | None:
    """Return the weight that a layer had; None where it was another one."""
    try:
        weight = None if dense is None else dense.get_submodule(name).weight
    except AttributeError:  # a factor
        return None
    return weight if weight is not None and weight.shape == module.weight.shape else None
