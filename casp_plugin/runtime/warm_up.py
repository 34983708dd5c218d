"""Compilation of humming's kernels for all layers of a model at once, before the first token.

humming has one set of kernels for every shape and scheme, some 28 of them, and vLLM has it compiled
when it first calls a layer of that shape: shape after shape, as many kernels at a time as one shape
keeps cores busy. A model of mixed widths and factored layers has more shapes than one of a single
width.
"""

import json
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, wait

import torch
from vllm.logger import init_logger
from vllm.model_executor.kernels.linear.mixed_precision import HummingLinearKernel, MPLinearKernel

__all__ = ["WarmUp"]

# part of the vllm logger tree, so that its settings apply
logger = init_logger("vllm.casp_plugin")

#: seconds before the log tells what takes so long; kernels on disk are all read by then
PATIENCE = 3.0
#: seconds that a core takes for a kernel (nvrtc 13.0)
SECONDS = 2


class WarmUp:
    """Compiles the kernels of all layers on humming as soon as the last of them is loaded.

    Kernels that humming has on disk are read. Without humming nothing happens.
    """

    def __init__(self):
        self._loading: set[MPLinearKernel] = set()
        self._loaded: set[MPLinearKernel] = set()

    def expect(self, kernel: MPLinearKernel) -> None:
        """Take note of the kernel of a layer that is to be loaded."""
        if isinstance(kernel, HummingLinearKernel):
            self._loading.add(kernel)

    def loaded(self, kernel: MPLinearKernel) -> None:
        """Compile everything if all other layers are loaded, too.

        :param kernel: kernel of a layer whose weights are processed
        """
        if kernel not in self._loading:
            return
        self._loading.remove(kernel)
        self._loaded.add(kernel)
        if self._loading:
            return
        try:
            _compile(self._loaded)
        except Exception as error:  # vLLM has them compiled at the first call, or fails there
            logger.warning("kernels will be compiled at their first use: %r", error)
        self._loaded.clear()


def _compile(layers: Iterable[HummingLinearKernel]) -> None:
    """Compile the kernels of layers on all cores, and tell how many if that takes long.

    :raises Exception: anything that humming raises, or that another version of it lacks
    """
    from humming.kernel.humming import HummingKernel
    from humming.utils.cpu import get_parallel_build_workers
    from humming.utils.jit import get_humming_cache_dir
    from vllm.utils.humming import LayerConfig, get_heuristics_config

    device = torch.cuda.current_device()
    widths = {layer.config.weight_type.size_bits for layer in layers}
    shapes = {(layer.layer_config.to_str(), layer.compute_config) for layer in layers}
    kernels = {}
    for shape, compute in sorted(shapes):
        shape, compute = json.loads(shape), json.loads(compute)
        # from one number of tokens to another, and the kernel that runs them
        for _, _, tuning in get_heuristics_config(LayerConfig(**shape), **compute, device=device):
            arguments = shape | compute | tuning
            arguments.pop("num_sms", None)  # of the launch
            kernels[json.dumps(arguments, sort_keys=True)] = arguments

    def compile_one(arguments: dict) -> None:
        with torch.cuda.device(device):
            HummingKernel(**arguments)

    began, workers = time.perf_counter(), get_parallel_build_workers()
    with ThreadPoolExecutor(workers) as pool:
        made = [pool.submit(compile_one, arguments) for arguments in kernels.values()]
        missing = len(wait(made, PATIENCE).not_done)
        if missing:
            logger.info_once(
                "compiling %d of %d kernels, for %d shapes at %s bits: about %d s on %d cores, "
                "once; they are kept in %s",
                missing,
                len(kernels),
                len(shapes),
                ", ".join(map(str, sorted(widths))),
                missing * SECONDS / workers + 1,
                workers,
                get_humming_cache_dir(),
            )
    for kernel in made:
        kernel.result()
    if missing:
        logger.info_once("kernels compiled in %.0f s", time.perf_counter() - began)
