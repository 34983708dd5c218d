"""A CPU kernel for the widths that vLLM's own does not run, and messages about missing kernels."""

from dataclasses import replace

import torch
from vllm.logger import init_logger
from vllm.model_executor.kernels.linear import CPUWNA16LinearKernel
from vllm.model_executor.kernels.linear.mixed_precision import (
    MPLinearKernel,
    MPLinearLayerConfig,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsWNA16,
)
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types
from vllm.utils.import_utils import has_humming

from casp_plugin.maths.packing import dequantize, pack, unpack
from casp_plugin.runtime.warm_up import WarmUp

__all__ = ["WNA16", "CPULinearKernel"]

# part of the vllm logger tree, so that its settings apply
logger = init_logger("vllm.casp_plugin")


class CPULinearKernel(MPLinearKernel):
    """Kernel for integer weights on CPUs: 2 to 8 bits, any shape, float32 too.

    vLLM's own CPU kernel takes 4 bits, 16-bit activations and multiples of 32. Codes of 2 and
    3 bits are widened for it, which is exact: asymmetric codes and zero points stay as they are,
    symmetric codes move by the difference of the two offsets. All other weights are dequantized
    when they load and take the memory of an unquantized layer.
    """

    @classmethod
    def get_min_capability(cls) -> int:
        """Return -1: CPUs have no compute capability."""
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        """Tell whether the kernel runs a layer, and why not."""
        if not current_platform.is_cpu():
            return False, "only for CPUs"
        if not c.weight_type.is_integer() or not 2 <= c.weight_type.size_bits <= 8:
            return False, f"{c.weight_type} is no integer type of 2 to 8 bits"
        if c.group_size > 0 and c.partition_weight_shape[0] % c.group_size:
            return False, f"group size {c.group_size} does not divide the input size"
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Widen the codes of a layer to 4 bits, or dequantize them.

        :raises ValueError: if the weight is stored input dimension first
        """
        config = self.config
        bits, signed_offset = config.weight_type.size_bits, config.weight_type.bias
        columns, rows = config.partition_weight_shape
        self.widened = None
        packed, scales, zeros = self._get_weight_params(layer)
        if packed.output_dim != 0:
            raise ValueError(
                f"{type(self).__name__} reads the layout of compressed-tensors only; the "
                "weight of this layer is stored input dimension first"
            )
        codes = unpack(packed.data, bits, columns)  # (rows, columns)
        if config.zero_points:
            offsets = unpack(zeros.data.t(), bits, rows).t()  # (rows, groups)
        else:
            offsets = torch.full_like(scales.data, signed_offset, dtype=torch.uint8)

        wide = _widened(config)
        if bits < 4 and _runs_on_stock_kernel(wide):
            if config.zero_points:
                zeros.data = pack(offsets.t(), 4).t().contiguous()
            else:
                codes += wide.weight_type.bias - signed_offset
            packed.data = pack(codes, 4)
            self.widened = CPUWNA16LinearKernel(wide, self.w_q_name, self.w_s_name, self.w_zp_name)
            self.widened.process_weights_after_loading(layer)
            logger.info_once("%d bits: widened to the 4-bit kernel", bits)
            return

        weight = dequantize(codes, offsets, scales.data, config.act_type)  # (rows, columns)
        for name in (self.w_q_name, self.w_s_name, self.w_zp_name):
            if getattr(layer, name, None) is not None:
                delattr(layer, name)
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
        logger.info_once("%d bits: dequantized, takes the memory of %s", bits, config.act_type)

    def apply_weights(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the outputs of a layer, (..., rows), from its inputs ``x``, (..., columns)."""
        if self.widened is not None:
            return self.widened.apply_weights(layer, x, bias)
        return layer.cpu_linear(x, layer.weight, bias)


class WNA16(CompressedTensorsWNA16):
    """vLLM's weight-only scheme, which also logs its kernel, and replaces the CPU's for float32.

    :param warm_up: compiles the kernels of the whole model; the others are vLLM's
    """

    def __init__(self, *args, warm_up: WarmUp, **kwargs):
        super().__init__(*args, **kwargs)
        self.warm_up = warm_up

    def create_weights(self, layer: torch.nn.Module, **kwargs) -> None:
        """Create the parameters of a layer.

        :raises ValueError: if a rank's columns do not fill whole words, or no kernel runs the width
        """
        columns = kwargs["input_size_per_partition"]
        if columns != kwargs["input_size"] and columns * self.num_bits % 32:
            raise ValueError(
                f"{self.layer_name}: {columns} columns a rank at {self.num_bits} bits do not fill "
                "whole 32-bit words: use a smaller --tensor-parallel-size"
            )
        try:
            super().create_weights(layer=layer, **kwargs)
        except ValueError as error:
            if current_platform.is_cuda() and not has_humming() and self.num_bits not in (4, 8):
                raise ValueError(
                    f"{self.layer_name}: no kernel for {self._described()}: "
                    "pip install humming-kernels"
                ) from error
            raise
        stock = isinstance(self.kernel, CPUWNA16LinearKernel)
        if stock and not _runs_on_stock_kernel(self.kernel.config):
            self.kernel = CPULinearKernel(
                self.kernel.config,
                self.kernel.w_q_name,
                self.kernel.w_s_name,
                self.kernel.w_zp_name,
            )
        logger.info_once("%s: %s", self._described(), type(self.kernel).__name__)
        self.warm_up.expect(self.kernel)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Bring the weights into the kernel's layout; after the last layer, compile kernels."""
        super().process_weights_after_loading(layer)
        self.warm_up.loaded(self.kernel)

    def _described(self) -> str:
        return f"{self.num_bits} bits {'symmetric' if self.symmetric else 'asymmetric'}"


def _widened(config: MPLinearLayerConfig) -> MPLinearLayerConfig:
    """Return the config of a layer with its weights at 4 bits."""
    return replace(
        config, weight_type=scalar_types.uint4 if config.zero_points else scalar_types.uint4b8
    )


def _runs_on_stock_kernel(config: MPLinearLayerConfig) -> bool:
    """Tell whether vLLM's CPU kernel runs a layer. Its ``can_implement`` does not check the
    activations, but the kernel has no float32."""
    return config.act_type.itemsize == 2 and CPUWNA16LinearKernel.can_implement(config)[0]
