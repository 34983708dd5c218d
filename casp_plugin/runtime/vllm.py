"""The ``vllm.general_plugins`` entry point, which vLLM calls in every one of its processes."""

from functools import cache

__all__ = ["register"]


@cache
def register() -> None:
    """Register our quantization config, and a CPU kernel for 2 to 8 bits, with vLLM.

    Further calls do nothing. vLLM is imported here and not before.
    """
    from vllm.model_executor.kernels.linear import register_linear_kernel
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.platforms import PlatformEnum

    from casp_plugin.runtime.config import METHOD, CaspConfig
    from casp_plugin.runtime.kernels import CPULinearKernel

    register_quantization_config(METHOD)(CaspConfig)
    register_linear_kernel(CPULinearKernel, PlatformEnum.CPU, "mp")
