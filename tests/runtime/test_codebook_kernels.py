"""Triton kernels of codebooks: run by Triton's interpreter on a CPU, and compiled for GPUs."""

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode

pytest.importorskip("triton")
pytest.importorskip("vllm")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from casp_plugin.maths.codecs import viterbi, viterbi_triton
from casp_plugin.maths.codecs.trellis import state_values
from casp_plugin.model.codebook_schemes import (
    CODES,
    SCALE,
    SIGNS,
    TABLES,
    AdditiveScheme,
    LatticeScheme,
    TrellisScheme,
)
from casp_plugin.runtime import codebook, codebook_kernels
from casp_plugin.runtime.codebook_kernels import (
    MOST_TOKENS,
    Kernel,
    codebook_linear,
    kernel_fault,
    random_layer,
)

pytestmark = pytest.mark.vllm

TRELLIS = [TrellisScheme(bits=bits) for bits in range(1, 9)]
TRELLIS += [TrellisScheme(bits=3, state_bits=16, code="3inst", columns=8)]
TRELLIS += [TrellisScheme(bits=2, state_bits=10, columns=16, block=32)]
LATTICE = [LatticeScheme(bits=bits) for bits in (2, 3, 4)]
ADDITIVE = [AdditiveScheme(bits=3), AdditiveScheme(bits=2, code_bits=16)]


def name(scheme):
    return scheme.name


def random_tensors(scheme, shape, dtype=torch.float32):
    return random_layer(scheme, shape, dtype, torch.device("cpu"))


@pytest.mark.parametrize(("bits", "state_bits"), [(1, 10), (2, 10), (3, 10), (5, 10), (2, 12)])
def test_paths(bits, state_bits):
    tiles = torch.randn(3, 256, generator=torch.Generator().manual_seed(bits))
    values, around = state_values("mul1", state_bits), 5 * state_bits // bits
    found = viterbi_triton.encode(tiles, values, bits, around)
    expected = viterbi._by_torch(tiles, values, bits, around)
    assert all(map(torch.equal, found, expected))


def test_paths_a_few_tiles_at_a_time(monkeypatch):
    monkeypatch.setattr(viterbi_triton, "_BACK_BYTES", 2 * 256 * 256)
    test_paths(2, 10)


@pytest.mark.parametrize("scheme", TRELLIS + LATTICE + ADDITIVE, ids=name)
def test_values(scheme):
    """Bit by bit those of the codec, in a weight whose last pieces are not full."""
    shape = (192, 72 if scheme in LATTICE + ADDITIVE else 80)
    tensors, kernel = random_tensors(scheme, shape), Kernel(scheme)
    values = kernel.decode(kernel.tensors(tensors), torch.empty(shape))
    if isinstance(scheme, AdditiveScheme):
        codes = tensors[CODES].long() & (1 << scheme.code_bits) - 1
        expected = scheme.coder().sums(codes, tensors[TABLES]).flatten(1)
        torch.testing.assert_close(values, expected, atol=1e-6, rtol=1e-6)
    elif isinstance(scheme, LatticeScheme):
        expected = scheme.coder().decode(tensors[CODES])
        torch.testing.assert_close(values, expected, atol=1e-6, rtol=1e-6)
    else:
        assert torch.equal(values, scheme.coder().decode(tensors[CODES]))


@pytest.mark.parametrize("tokens", [1, 5, MOST_TOKENS, MOST_TOKENS + 1])
@pytest.mark.parametrize(
    "scheme", [TRELLIS[1], TRELLIS[2], TRELLIS[9], LATTICE[1], ADDITIVE[0]], ids=name
)
def test_products(scheme, tokens, monkeypatch):
    """Outputs are those of the decoded weight in float64, the columns shared out over programs."""
    monkeypatch.setattr(codebook_kernels, "_PROGRAMS", 6)
    codebook_kernels._parts.cache_clear()
    shape = (192, 320)
    tensors, kernel = random_tensors(scheme, shape), Kernel(scheme)
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, shape[1], generator=generator)
    bias = torch.randn(shape[0], generator=generator) if tokens > 1 else None
    y = kernel.product(x, kernel.tensors(tensors), shape[0], bias)
    expected = x.double() @ scheme.decode(tensors).double().T
    expected = expected if bias is None else expected + bias
    torch.testing.assert_close(y.double(), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("tokens", [1, MOST_TOKENS + 1])
def test_large_inputs_in_16_bits(tokens):
    """What is summed up before the small scales of a layer stays in the range of float16."""
    scheme, shape = TRELLIS[1], (128, 1024)
    tensors, kernel = random_tensors(scheme, shape, torch.float16), Kernel(scheme)
    tensors[SCALE] *= 0.01
    x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(0)).half()
    x[:, 5] = 32000
    y = kernel.product(x, kernel.tensors(tensors), shape[0])
    expected = x.double() @ scheme.decode(tensors).double().T
    assert (y - expected).norm() < 0.01 * expected.norm()


def test_products_in_16_bits():
    """Those of float16: the interpreter has no bfloat16 products."""
    scheme = TRELLIS[1]
    shape = (128, 256)
    tensors, kernel = random_tensors(scheme, shape, torch.float16), Kernel(scheme)
    x = torch.randn(4, shape[1]).half()
    y = kernel.product(x, kernel.tensors(tensors), shape[0])
    expected = x.double() @ scheme.decode(tensors).double().T
    assert y.dtype == torch.float16
    assert (y - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("scheme", [TRELLIS[1], LATTICE[0], ADDITIVE[1]], ids=name)
def test_operator(scheme):
    """What vLLM calls, with inputs of any shape and a compiler's stand-ins."""
    tensors = random_tensors(scheme, (128, 256))
    names = (CODES, SCALE, SIGNS, TABLES)
    arguments = [*map(tensors.get, names), None, scheme.model_dump_json()]
    x = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(0))
    y = codebook_linear(x, *arguments)
    torch.testing.assert_close(y, x @ scheme.decode(tensors).T, atol=1e-3, rtol=1e-4)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = codebook_linear(mode.from_tensor(x), *arguments)
    assert (fake.shape, fake.dtype) == (y.shape, y.dtype)


def test_schemes_are_tried_before_they_are_used(monkeypatch):
    given = torch.float32, torch.device("cpu")
    for scheme in (TRELLIS[3], LATTICE[1], ADDITIVE[0]):
        assert kernel_fault(scheme, *given) is None
    fault = kernel_fault(TrellisScheme(bits=2, block=512), *given)
    assert fault == "kernels rotate blocks of at most 256"
    product = Kernel.product
    kernel_fault.cache_clear()
    monkeypatch.setattr(Kernel, "product", lambda *args: 1.5 * product(*args))
    assert kernel_fault(TRELLIS[3], *given) == "they are off by 50.0% for 1 tokens"
    kernel_fault.cache_clear()
    monkeypatch.setattr(Kernel, "product", lambda *args: 1 / 0)
    assert kernel_fault(TRELLIS[3], *given) == "ZeroDivisionError: division by zero"
    kernel_fault.cache_clear()


@pytest.mark.parametrize("works", [True, False])
def test_layers_on_cuda(works, monkeypatch):
    """A layer keeps its codes where kernels run them, and is decoded where they do not."""
    monkeypatch.setattr(codebook.current_platform, "is_cuda", lambda: True)
    monkeypatch.setattr(codebook.current_platform, "is_cpu", lambda: False)
    fault = None if works else "broken"
    monkeypatch.setattr(codebook_kernels, "kernel_fault", lambda *args: fault)
    shape, layer = (128, 256), torch.nn.Module()
    method = codebook.CodebookMethod(TRELLIS[1], shape)
    layer.prefix = "layer"
    sizes = {"input_size": shape[1], "output_size": shape[0]}
    method.create_weights(
        layer, shape[1], [shape[0]], **sizes, params_dtype=torch.float32, weight_loader=None
    )
    tensors = random_tensors(TRELLIS[1], shape)
    for key, value in tensors.items():
        getattr(layer, key).data.copy_(value)
    method.process_weights_after_loading(layer)
    assert hasattr(layer, CODES) == works
    assert hasattr(layer, "weight") != works
    x = torch.randn(3, shape[1], generator=torch.Generator().manual_seed(0))
    expected = x @ TRELLIS[1].decode(tensors).T
    torch.testing.assert_close(method.apply(layer, x), expected, atol=1e-3, rtol=1e-4)
    # as vLLM compiles a model
    whole = torch.compile(lambda x: method.apply(layer, x), fullgraph=True, backend="eager")
    torch.testing.assert_close(whole(x), expected, atol=1e-3, rtol=1e-4)


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from casp_plugin.maths.codecs import viterbi_triton
from casp_plugin.runtime import codebook_kernels as kernels
from casp_plugin.model.codebook_schemes import AdditiveScheme, LatticeScheme, TrellisScheme

def compiled(function, types, constants, warps=4):
    types |= dict.fromkeys(constants, "constexpr")
    for capability in (80, 90):
        target = GPUTarget("cuda", capability, 32)
        made = triton.compile(
            ASTSource(function, types, constants), target=target, options={"num_warps": warps}
        )
        assert made.asm["cubin"]
        yield made.asm["ptx"]

paths = {name: "*fp32" for name in ("tiles", "seams", "values")}
paths |= {"back": "*u8", "states": "*i32", "steps": "i32", "around": "i32"}
sizes = {"SYMBOLS": 4, "OVERLAPS": 1024, "BITS": 2}
list(compiled(viterbi_triton._encode, paths, sizes, 8))
columns = {"columns": "i32"}
rotate = {"x": "*bf16", "signs": "*i32", "rotated": "*bf16", **columns}
list(compiled(kernels._rotate_input, rotate, {"BLOCK": 128}))
finish = {"partial": "*fp32", "scale": "*bf16", "bias": "*bf16", "y": "*bf16"}
finish |= {"factor": "fp32"} | {name: "i32" for name in ("tokens", "rows", "parts")}
list(compiled(kernels._finish, finish, {"WIDTH": 128, "ROTATES": True, "BIAS": True}))
for scheme in (
    TrellisScheme(bits=3),
    TrellisScheme(bits=2, code="3inst"),
    LatticeScheme(bits=3),
    AdditiveScheme(bits=2),
):
    codec = kernels.Kernel(scheme)._codec | {"ROWS": 64, "COLUMNS": 64}
    trellis = isinstance(scheme, TrellisScheme)
    stored = {"codes": "*i32" if trellis else "*u8", "tables": "*fp32"}
    sizes = {name: "i32" for name in ("rows", "columns")}
    list(compiled(kernels._decode, {**stored, "values": "*bf16", "factor": "fp32", **sizes}, codec))
    types = {"x": "*bf16", **stored, "partial": "*fp32", "tokens": "i32", **sizes, "length": "i32"}
    for ptx in compiled(kernels._product, types, codec | {"TOKENS": 16, "EXACT": False}):
        assert "mma" in ptx
        assert ("dp4a" in ptx) == (trellis and scheme.code == "mul1")
print("compiled")
"""


def test_kernels_compile_for_gpus():
    """Triton brings the assembler along: no GPU is needed."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
    )
    assert run.stdout.strip() == "compiled", run.stderr
