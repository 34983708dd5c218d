"""Kernels of humming compiled at load: with stand-ins for humming, which needs a GPU, and with
humming itself, where it is installed, up to the compiler."""

import json
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from threading import Barrier, Event
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

import vllm.utils.humming as vllm_humming
from vllm.model_executor.kernels.linear import CPUWNA16LinearKernel
from vllm.model_executor.kernels.linear.mixed_precision import HummingLinearKernel

from casp_plugin.runtime import warm_up
from casp_plugin.runtime.warm_up import WarmUp

pytestmark = pytest.mark.vllm

#: what vLLM 0.32 gives humming beside the shape
COMPUTE = {"use_batch_invariant": False, "use_f16_accum": False, "gemm_type": "dense"}


@pytest.fixture(autouse=True)
def said(monkeypatch):
    """Lines of the log."""
    lines = []

    def line(message, *args):
        lines.append(message % args)

    monkeypatch.setattr(warm_up, "logger", SimpleNamespace(info_once=line, warning=line))
    return lines


@pytest.fixture(autouse=True)
def device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())


def linear_kernel(bits, layer_config):
    """vLLM's kernel of a layer, as it leaves it once the weights are loaded."""
    kernel = object.__new__(HummingLinearKernel)
    kernel.config = SimpleNamespace(weight_type=SimpleNamespace(size_bits=bits))
    kernel.layer_config, kernel.compute_config = layer_config, json.dumps(COMPUTE)
    return kernel


def load(kernels):
    made = WarmUp()
    for kernel in kernels:
        made.expect(kernel)
    for kernel in kernels:
        made.loaded(kernel)
    return made


# --- stand-ins for humming -----------------------------------------------------------------------


@dataclass(kw_only=True)
class LayerConfig:
    shape_n: int
    shape_k: int
    b_dtype: str

    def to_str(self):
        return json.dumps(asdict(self))


def get_heuristics_config(
    layer_config,
    shape_m=None,
    use_f16_accum=False,
    use_batch_invariant=False,
    use_m_major_input_scale=False,
    gemm_type="dense",
    device=None,
):
    """Two kernels a shape, one of them for two ranges of tokens."""
    assert isinstance(layer_config, LayerConfig)
    assert device == 0
    few, many = {"block_shape": [8, 64, 64]}, {"block_shape": [16, 64, 64], "num_sms": 132}
    return [(0, 8, few), (8, 16, many), (16, 24, {**few, "num_sms": 66}), (24, 1 << 30, many)]


class Humming:
    """The package: its kernels, as they were asked for.

    :param workers: kernels that are compiled at a time
    """

    def __init__(self, workers=2):
        self.compiled = compiled = []
        self.hook = hook = SimpleNamespace(compiling=lambda: None)

        class HummingKernel:
            def __init__(
                self,
                *,
                shape_n,
                shape_k,
                b_dtype,
                use_batch_invariant,
                use_f16_accum,
                gemm_type,
                block_shape,
            ):
                hook.compiling()
                compiled.append((shape_n, shape_k, b_dtype, block_shape[0]))

        self.modules = {
            "humming.kernel.humming": {"HummingKernel": HummingKernel},
            "humming.utils.cpu": {"get_parallel_build_workers": lambda: workers},
            "humming.utils.jit": {"get_humming_cache_dir": lambda: "/cache"},
        }

    def install(self, monkeypatch):
        for package in ("humming", "humming.kernel", "humming.utils"):
            monkeypatch.setitem(sys.modules, package, ModuleType(package))
        for name, members in self.modules.items():
            monkeypatch.setitem(sys.modules, name, module := ModuleType(name))
            vars(module).update(members)
        stand_ins = {"LayerConfig": LayerConfig, "get_heuristics_config": get_heuristics_config}
        for name, member in stand_ins.items():
            monkeypatch.setitem(vars(vllm_humming), name, member)
        return self


def stand_in(rows, columns, bits):
    layer_config = LayerConfig(shape_n=rows, shape_k=columns, b_dtype=f"uint{bits}")
    return linear_kernel(bits, layer_config)


def test_each_kernel_once(monkeypatch, said):
    humming = Humming().install(monkeypatch)
    load([stand_in(64, 32, 2), stand_in(64, 32, 3), stand_in(64, 32, 2)])
    assert sorted(humming.compiled) == [
        (64, 32, "uint2", 8),
        (64, 32, "uint2", 16),
        (64, 32, "uint3", 8),
        (64, 32, "uint3", 16),
    ]
    assert not said


def test_not_before_the_last_layer(monkeypatch):
    humming = Humming().install(monkeypatch)
    made, (first, last) = WarmUp(), (stand_in(64, 32, 2), stand_in(64, 64, 2))
    made.expect(first)
    made.expect(last)
    made.loaded(first)
    assert not humming.compiled
    made.loaded(last)
    assert len(humming.compiled) == 4
    made.loaded(last)  # its weights are loaded again
    assert len(humming.compiled) == 4


def test_kernels_of_all_shapes_at_a_time(monkeypatch, said):
    """Four at a time of two shapes: shape after shape there would be two."""
    humming = Humming(workers=4).install(monkeypatch)
    humming.hook.compiling = Barrier(4, timeout=10).wait
    load([stand_in(64, 32, 2), stand_in(64, 64, 3)])
    assert len(humming.compiled) == 4
    assert not said


def test_tells_what_takes_long(monkeypatch, said):
    humming, told = Humming(workers=4).install(monkeypatch), Event()
    humming.hook.compiling = partial(told.wait, timeout=10)
    line = warm_up.logger.info_once
    monkeypatch.setattr(warm_up.logger, "info_once", lambda *message: (line(*message), told.set()))
    monkeypatch.setattr(warm_up, "PATIENCE", 0.05)
    load([stand_in(64, 32, 2), stand_in(64, 64, 3)])
    assert said == [
        "compiling 4 of 4 kernels, for 2 shapes at 2, 3 bits: about 3 s on 4 cores, once; they "
        "are kept in /cache",
        "kernels compiled in 0 s",
    ]


def test_nothing_without_humming(monkeypatch, said):
    """As on a CPU, where vLLM has other kernels."""
    monkeypatch.setitem(sys.modules, "humming", None)
    load([object.__new__(CPUWNA16LinearKernel)])
    load([])
    assert not said


@pytest.mark.parametrize("lost", ["humming.kernel.humming", "humming.utils.cpu"])
def test_another_humming(lost, monkeypatch, said):
    """Whatever it lacks, vLLM serves as it would without us."""
    humming = Humming()
    humming.modules[lost] = {}
    humming.install(monkeypatch)
    load([stand_in(64, 32, 2)])
    assert not humming.compiled
    assert len(said) == 1
    assert "kernels will be compiled at their first use: ImportError" in said[0]


def test_a_kernel_that_does_not_compile(monkeypatch, said):
    humming = Humming().install(monkeypatch)

    def fail():
        raise RuntimeError("NVRTCCompiler failed")

    humming.hook.compiling = fail
    load([stand_in(64, 32, 2)])
    assert len(said) == 1
    assert "NVRTCCompiler failed" in said[0]


# --- humming itself ------------------------------------------------------------------------------

H100 = {
    "index": 0,
    "name": "NVIDIA H100 80GB HBM3",
    "is_ppu": False,
    "sm_count": 132,
    "sm_major": 9,
    "sm_minor": 0,
    "sm_version": 90,
    "max_threads_per_block": 1024,
    "max_threads_per_sm": 2048,
    "max_registers_per_sm": 65536,
    "default_smem_size": 48 << 10,
    "max_smem_size": 227 << 10,
    "max_smem_size_kb": 227.0,
    "l1_cache_size": 256 << 10,
    "l1_cache_size_kb": 256.0,
    "l2_cache_size": 50 << 20,
    "sm_clock_khz": 1980000,
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="pretends to have another card")
def test_the_first_call_compiles_nothing(monkeypatch, said):
    """Ask the real humming for kernels of four shapes as vLLM does; only its compiler is ours."""
    pytest.importorskip("humming", reason="pip install --no-deps humming-kernels")
    import humming.utils.device
    from humming.jit.compiler import Compiler, NVRTCCompiler
    from humming.kernel.humming import HummingKernel
    from humming.schema import BaseWeightSchema, HummingInputSchema
    from humming.transform import prepare_layer_config

    card = type("Card", (), {**H100, "__init__": lambda self, index: None})
    monkeypatch.setattr(humming.utils.device, "_extension", SimpleNamespace(_DeviceInfo=card))
    sources, registered = [], []

    def compile_(cls, code, *args, **kwargs):
        sources.append(code)
        return f"{len(sources)}.cubin"

    def register(kernel):
        registered.append(kernel.kernel_filename)
        kernel.kernel_id = len(registered)

    monkeypatch.setattr(Compiler, "compile", classmethod(compile_))
    monkeypatch.setattr(NVRTCCompiler, "signature", lambda: "nvrtc+13.0")
    monkeypatch.setattr(HummingKernel, "register_kernel", register)
    monkeypatch.setattr(HummingKernel, "_instances", {})
    monkeypatch.setattr(HummingKernel, "_str2kernel_cache", {})

    def layer(rows, columns, bits):
        """As ``HummingLinearKernel.process_weights_after_loading`` of vLLM."""
        schema = {"quant_method": "humming", "dtype": f"int{bits}", "group_size": 128}
        layer_config = prepare_layer_config(
            shape_n=rows,
            shape_k=columns,
            weight_schema=BaseWeightSchema.from_config({**schema, "has_zero_point": True}),
            input_schema=HummingInputSchema(),
            pad_n_to_multiple=256,
            pad_k_to_multiple=128,
            has_bias=False,
            torch_dtype=torch.bfloat16,
            device=0,
        )
        return linear_kernel(bits, layer_config)

    # rows, columns, bits: the last reads a latent
    shapes = [(12288, 4096, 2), (4096, 11008, 3), (4608, 4096, 2), (8192, 512, 2)]
    layers = [layer(*shape) for shape in shapes]
    load(layers)
    assert not said
    compiled = len(sources)
    assert 20 * len(shapes) <= compiled == len(set(sources)) <= 33 * len(shapes)
    for each in layers:
        HummingKernel.prepare_kernels(each.layer_config.to_str(), each.compute_config, device=0)
    assert len(sources) == len(registered) == compiled
