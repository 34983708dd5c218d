"""The module that replaces a factored linear layer."""

from functools import cache

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import skip_init

__all__ = ["LowRankLinear", "is_up", "named_linears", "stored_tensors"]


class LowRankLinear(nn.Module):
    """A linear layer stored as two factors: ``y = up(down(x))``, ``W ~= up.weight @ down.weight``.

    Both factors are ordinary :class:`torch.nn.Linear` modules, so that quantizers,
    observers and compressed-tensors treat them like any other layer. Layers that read one
    input may share one latent ``down(x)``: then only the first has a ``down``.

    :param in_features: size of the input
    :param out_features: size of the output
    :param rank: size of the latent between the factors
    :param bias: whether ``up`` has the original layer's bias; ``down`` has none
    :param device: where to create the factors
    :param dtype: data type of the factors
    :param latent_of: the factored layer whose ``down`` is used; None for an own ``down``
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        latent_of: "LowRankLinear | None" = None,
    ):
        super().__init__()
        # a tuple hides the other layer from torch, which would list its weights here as well
        self._latent_of = () if latent_of is None else (latent_of,)
        if latent_of is None:
            self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def like(
        cls, linear: nn.Linear, rank: int, latent_of: "LowRankLinear | None" = None
    ) -> "LowRankLinear":
        """Return an empty factored layer with the shapes, bias, device and dtype of ``linear``."""
        weight = linear.weight
        module = skip_init(
            cls,
            weight.shape[1],
            weight.shape[0],
            rank,
            bias=linear.bias is not None,
            device=weight.device,
            dtype=weight.dtype,
            latent_of=latent_of,
        )
        return module.train(linear.training)

    @classmethod
    def from_factors(
        cls,
        linear: nn.Linear,
        down: torch.Tensor,
        up: torch.Tensor,
        latent_of: "LowRankLinear | None" = None,
    ) -> "LowRankLinear":
        """Return the factored layer that replaces ``linear``.

        :param linear: layer to replace; gives bias, device and dtype
        :param down: first factor, shape (rank, in); not read with ``latent_of``
        :param up: second factor, shape (out, rank)
        :param latent_of: the factored layer that holds ``down``
        """
        module = cls.like(linear, up.shape[1], latent_of)
        with torch.no_grad():
            if latent_of is None:
                module.down.weight.copy_(down)
            module.up.weight.copy_(up)
            if linear.bias is not None:
                module.up.bias.copy_(linear.bias)
        return module.requires_grad_(linear.weight.requires_grad)

    @property
    def latent_of(self) -> "LowRankLinear | None":
        """Return the layer whose ``down`` is used; None where the layer has its own."""
        return self._latent_of[0] if self._latent_of else None

    @property
    def latent(self) -> nn.Linear:
        """Return the first factor, the layer's own or a shared one."""
        return self.down if self.latent_of is None else self.latent_of.down

    @property
    def rank(self) -> int:
        return self.up.in_features

    @property
    def in_features(self) -> int:
        return self.latent.in_features

    @property
    def out_features(self) -> int:
        return self.up.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.latent(x))

    def extra_repr(self) -> str:
        shared = ", shared latent" if self.latent_of is not None else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}{shared}"
        )


def named_linears(model: nn.Module) -> list[tuple[str, nn.Linear | LowRankLinear]]:
    """Return the linear layers of a model with their names, in module order.

    A factored layer counts as one. Left out are subclasses that do more than a linear layer
    (routers that choose experts) and layers whose weight another module reads (the output of
    ``nn.MultiheadAttention``).
    """
    linears = []
    factored = ""
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            factored = f"{name}."
            linears.append((name, module))
        elif _is_linear(module) and not (factored and name.startswith(factored)):
            linears.append((name, module))
    return linears


def is_up(model: nn.Module, name: str) -> bool:
    """Tell whether a layer is the second factor of a low-rank layer."""
    parent, _, leaf = name.rpartition(".")
    return leaf == "up" and isinstance(model.get_submodule(parent), LowRankLinear)


def _is_linear(module: nn.Module) -> bool:
    """Tell whether a module is called, and computes a matrix product and nothing else."""
    if not isinstance(module, nn.Linear) or isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    return type(module).forward is nn.Linear.forward or _puts_out_rows(type(module))


@cache
def _puts_out_rows(subclass: type[nn.Linear]) -> bool:
    """Tell whether a subclass, made without weights, maps (tokens, in) to (tokens, out)."""
    try:
        module, x = subclass(4, 3, device="meta"), torch.empty(2, 4, device="meta")
        output = module(x)
    except Exception:  # it takes other arguments
        return False
    return torch.is_tensor(output) and output.shape == (2, 3)


def stored_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors that a checkpoint of the model stores, by name; tied weights once."""
    state = model.state_dict()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in state}
    return dict(model.named_parameters()) | buffers
