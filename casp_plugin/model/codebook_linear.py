"""The module that replaces a linear layer whose weight is stored as codes of a codebook."""

import torch
from compressed_tensors.offload import OffloadCache
from torch import nn
from torch.nn import functional

from casp_plugin.model.codebook_schemes import SCALE, CodebookScheme

__all__ = ["CodebookLinear"]


class CodebookLinear(nn.Module):
    """A linear layer whose weight is decoded when it is first needed, and kept beside its codes.

    It is no subclass of :class:`torch.nn.Linear`: other quantizers must leave it alone.

    :param scheme: how the weight is stored
    :param shape: (out, in) of the weight
    :param dtype: data type of the scales, and of the decoded weight
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
        for name, (size, kind) in scheme.layout(shape, dtype).items():
            tensor = torch.empty(size, dtype=kind, device=device)
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))
        self.register_parameter("bias", bias)
        self._decoded: torch.Tensor | None = None  # no buffer: it is neither saved nor offloaded
        self._keeps = True

    @classmethod
    def like(cls, linear: nn.Linear, scheme: CodebookScheme) -> "CodebookLinear":
        """Return an empty layer with the shape, bias, device and dtype of ``linear``."""
        weight = linear.weight
        module = cls(scheme, tuple(weight.shape), weight.dtype, linear.bias, weight.device)
        return module.train(linear.training)

    def __getattr__(self, name: str):
        """Return ``weight``, shape (out, in), decoded when it is first read.

        It is no property, so that loading can put a stand-in in its place.
        """
        return self._weight() if name == "weight" else super().__getattr__(name)

    def _weight(self) -> torch.Tensor:
        like = getattr(self, SCALE)
        known = self._decoded
        if known is not None and (known.device, known.dtype) == (like.device, like.dtype):
            return known
        weight = self.decode()
        if self._keeps:
            self._decoded = weight
        return weight

    def decode(self) -> torch.Tensor:
        """Return the weight, shape (out, in), in the dtype of its scales, without keeping it."""
        shape = self.out_features, self.in_features
        with torch.inference_mode(False), torch.no_grad():
            names = self.scheme.layout(shape, torch.float32)
            tensors = {name: getattr(self, name) for name in names}
            return self.scheme.decode(tensors).to(tensors[SCALE].dtype)

    def forget(self) -> None:
        """Let go of the decoded weight, until it is needed again; and for good where the codes are
        not on the device that runs them, as those of a model that is larger than it."""
        self._decoded = None
        cache = self._parameters
        if isinstance(cache, OffloadCache):
            self._keeps = str(cache.onload_device) == str(cache.offload_device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"scheme={self.scheme.name}"
        )
