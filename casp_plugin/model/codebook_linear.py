"""The module that replaces a linear layer whose weight is stored as codes of a codebook."""

import torch
from torch import nn
from torch.nn import functional

from casp_plugin.model.codebook_schemes import SCALE, CodebookScheme

__all__ = ["CodebookLinear"]


class CodebookLinear(nn.Module):
    """A linear layer whose weight is decoded when it is first needed, and kept beside its codes.

    It is no subclass of :class:`torch.nn.Linear`: other quantizers must leave it alone.

    :param scheme: how the weight is stored
    :param shape: (out, in) of the weight
    :param dtype: data type of the decoded weight
    :param bias: bias of the layer, shape (out,); None without one
    :param device: where to create the tensors
    """

    def __init__(
        self,
        scheme: CodebookScheme,
        shape: tuple[int, int],
        dtype: torch.dtype,
        bias: nn.Parameter | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.scheme = scheme
        self.out_features, self.in_features = shape
        self.dtype = dtype
        for name, (size, kind) in scheme.layout(shape, dtype).items():
            tensor = torch.empty(size, dtype=kind, device=device)
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))
        self.register_parameter("bias", bias)
        self._decoded: torch.Tensor | None = None  # no buffer: it is neither saved nor offloaded

    @classmethod
    def like(cls, linear: nn.Linear, scheme: CodebookScheme) -> "CodebookLinear":
        """Return an empty layer with the shape, bias, device and dtype of ``linear``."""
        weight = linear.weight
        module = cls(scheme, tuple(weight.shape), weight.dtype, linear.bias, weight.device)
        return module.train(linear.training)

    @property
    def weight(self) -> torch.Tensor:
        """Return the weight, shape (out, in); decoded when it is first read."""
        device = getattr(self, SCALE).device
        if self._decoded is None or self._decoded.device != device:
            self._decoded = self.decode()
        return self._decoded

    def decode(self) -> torch.Tensor:
        """Return the weight, shape (out, in), without keeping it."""
        shape = self.out_features, self.in_features
        tensors = {name: getattr(self, name) for name in self.scheme.layout(shape, self.dtype)}
        return self.scheme.decode(tensors).to(self.dtype)

    def forget(self) -> None:
        """Let go of the decoded weight, until it is needed again."""
        self._decoded = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"scheme={self.scheme.name}"
        )
