"""Codebook layers in vLLM: by Triton kernels on CUDA, elsewhere decoded when they load, which takes
the memory of the dense model."""

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.model_executor.layers.utils import (
    default_unquantized_gemm,
    dispatch_cpu_unquantized_gemm,
)
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform

from casp_plugin.maths.hadamard import largest_block
from casp_plugin.model.codebook_schemes import CODES, SCALE, SIGNS, TABLES, CodebookScheme

__all__ = ["CodebookMethod"]

#: signs of inputs in a word
_WORD = 32
#: dimension of a tensor that runs over the input
_INPUT_DIM = {CODES: 1, SIGNS: 0}

# part of the vllm logger tree, so that its settings apply
logger = init_logger("vllm.casp_plugin")


class CodebookMethod(LinearMethodBase):
    """Runs a linear whose weight is stored as codes of a codebook.

    :param scheme: how the weight is stored
    :param shape: (out, in) of the whole weight, on all ranks
    """

    def __init__(self, scheme: CodebookScheme, shape: tuple[int, int]):
        self.scheme = scheme
        self.shape = shape
        self._scheme_json = scheme.model_dump_json()  # compilers cannot trace it in `apply`

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        weight_loader,
        **extra_weight_attrs,
    ) -> None:
        """Put the tensors of a scheme into a layer.

        :raises ValueError: if tensor parallelism cuts a Hadamard block
        """
        part = sum(output_partition_sizes), input_size_per_partition
        words = _WORD if SIGNS in self.scheme.layout(part, params_dtype) else 1
        for name, size, whole, tile, word in zip(
            ("rows", "columns"), part, self.shape, self.scheme.tile, (1, words), strict=True
        ):
            block = max(largest_block(whole, self.scheme.block), tile, word)
            if size != whole and size % block:
                raise ValueError(
                    f"{layer.prefix}: {size} of its {whole} {name} cannot run on one rank, whose "
                    f"share must be a multiple of {block}: use fewer tensor-parallel ranks"
                )
        layer.codebook_dtype = params_dtype
        layout = self.scheme.layout(part, params_dtype)
        layer.codebook_tensors = list(layout)
        for name, (size, dtype) in layout.items():
            parameter = torch.nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False)
            layer.register_parameter(name, parameter)
            dims = {}
            if name in _INPUT_DIM:
                dims["input_dim"] = _INPUT_DIM[name]
            if name in (CODES, SCALE):
                # rows of the weight that one row of the tensor stands for
                dims |= {"output_dim": 0, "rows_each": part[0] // size[0]}
            set_weight_attrs(parameter, {"weight_loader": weight_loader, **dims})

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Decode the weight, where no kernel reads its codes."""
        layer.codebook_runs = self._runs(layer)
        if layer.codebook_runs:
            return
        tensors = {name: getattr(layer, name) for name in layer.codebook_tensors}
        weight = self.scheme.decode(tensors).to(layer.codebook_dtype)
        for name in tensors:
            delattr(layer, name)
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        if current_platform.is_cpu():
            dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
        logger.info_once("codebook layers are decoded, and take the memory of %s", weight.dtype)

    def _runs(self, layer: LinearBase) -> bool:
        """Tell whether kernels run the layer, and why not."""
        if not current_platform.is_cuda():
            return False
        from casp_plugin.runtime.codebook_kernels import kernel_fault  # takes Triton

        codes = getattr(layer, CODES)
        fault = kernel_fault(self.scheme, layer.codebook_dtype, codes.device)
        if fault is not None:
            logger.warning_once("no kernels for %s: %s", self.scheme.name, fault)
        return fault is None

    def apply(
        self, layer: LinearBase, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the outputs of the layer, (tokens, rows of this rank).

        :param x: inputs, (tokens, columns of this rank)
        :param bias: bias of the layer, (rows of this rank,)
        """
        if layer.codebook_runs:
            from casp_plugin.runtime.codebook_kernels import codebook_linear

            names = (CODES, SCALE, SIGNS, TABLES)
            tensors = [getattr(layer, name, None) for name in names]
            return codebook_linear(x, *tensors, bias, self._scheme_json)
        if current_platform.is_cpu():
            return layer.cpu_linear(x, layer.weight, bias)
        return default_unquantized_gemm(layer, x, layer.weight, bias)
