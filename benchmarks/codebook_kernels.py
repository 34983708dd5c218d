"""Check and time the Triton kernels of codebooks on a GPU: products against bf16, and the encoder.

    python benchmarks/codebook_kernels.py --table benchmarks/results/codebook_kernels.md

Shapes are those of Llama-2-7B. Codes are random: no download. Products are captured in a CUDA
graph, as in vLLM. ``TRITON_INTERPRET=1 ... --interpret`` tries the script on a CPU.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from common import command, show, write_markdown

from casp_plugin.maths.codecs.trellis import TILE, TrellisCodec
from casp_plugin.maths.codecs.viterbi_triton import encode
from casp_plugin.model.codebook_schemes import (
    AdditiveScheme,
    CodebookScheme,
    LatticeScheme,
    TrellisScheme,
)
from casp_plugin.runtime.codebook_kernels import Kernel, random_layer

SHAPES = [(4096, 4096), (22016, 4096), (4096, 11008)]
SCHEMES = [TrellisScheme(bits=bits) for bits in (2, 3, 4)]
SCHEMES += [TrellisScheme(bits=2, code="3inst"), LatticeScheme(bits=2)]
SCHEMES += [AdditiveScheme(bits=2, code_bits=16), AdditiveScheme(bits=2)]
PRODUCTS = ("scheme", "out x in", "tokens", "error", "us", "us of bf16", "speed over bf16")
ENCODING = ("K", "L", "seconds a million weights", "minutes for 7B")


def main(
    tokens: Annotated[list[int], typer.Option(help="Tokens of a product.")] = (1, 8, 16, 32, 1024),
    interpret: Annotated[bool, typer.Option(help="Small shapes, on a CPU.")] = False,
    table: Annotated[Path | None, typer.Option(help="Write the tables in Markdown here.")] = None,
) -> None:
    """Print errors and times."""
    if not torch.cuda.is_available() and not interpret:
        sys.exit("no CUDA device: nothing measured")
    device = torch.device("cpu" if interpret else "cuda")
    shapes = [(256, 256)] if interpret else SHAPES
    products = [
        row
        for scheme in SCHEMES
        for shape in shapes
        for row in _products(scheme, shape, (1,) if interpret else tokens, device)
    ]
    show(PRODUCTS, products)
    sizes = [(2, 10)] if interpret else [(2, 12), (3, 12), (4, 12), (2, 14), (2, 16)]
    encoding = [_encoding(bits, states, device) for bits, states in sizes]
    show(ENCODING, encoding)
    if table is not None:
        card = "interpreted" if interpret else torch.cuda.get_device_name()
        tables = [(PRODUCTS, products), (ENCODING, encoding)]
        write_markdown(table, tables, f"Made by `{command()}`, {card};")


def _products(
    scheme: CodebookScheme, shape: tuple[int, int], tokens: list[int], device: torch.device
) -> list[list[str]]:
    dtype = torch.float16 if device.type == "cpu" else torch.bfloat16
    tensors = random_layer(scheme, shape, dtype, device)
    weight, kernel = scheme.decode(tensors), Kernel(scheme)
    dense, rows = weight.to(dtype), []
    for count in tokens:
        x = torch.randn(count, shape[1], device=device).to(dtype)
        expected = x.double() @ weight.double().T
        found = kernel.product(x, kernel.tensors(tensors), shape[0])
        error = (found - expected).norm() / expected.norm()
        ours = _microseconds(lambda x=x: kernel.product(x, kernel.tensors(tensors), shape[0]))
        theirs = _microseconds(lambda x=x: torch.nn.functional.linear(x, dense))
        cells = [f"{error:.1e}", f"{ours:.1f}", f"{theirs:.1f}", f"{theirs / ours:.2f}"]
        kind = getattr(scheme, "code", getattr(scheme, "code_bits", ""))
        rows.append([f"{scheme.name} {kind}", f"{shape[0]} x {shape[1]}", str(count), *cells])
    return rows


def _microseconds(work: Callable[[], object]) -> float:
    """Return the time of a call, in a CUDA graph where there is a GPU."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        work()
        return 1e6 * (time.perf_counter() - start)
    import triton

    return 1e3 * triton.testing.do_bench_cudagraph(work)


def _encoding(bits: int, state_bits: int, device: torch.device) -> list[str]:
    """Time the tiles of a band of 4096 rows, as BlockLDLQ encodes them one after the other."""
    codec = TrellisCodec(bits, state_bits)
    count = 2 if device.type == "cpu" else 4096 * 4 // TILE
    tiles = torch.randn(count, TILE, device=device)
    values, around = codec.values.to(device), min(-(-5 * state_bits // bits), TILE // 2)
    seconds = []
    for _ in range(1 if device.type == "cpu" else 20):
        start = time.perf_counter()
        encode(tiles, values, bits, around)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    by_million = sorted(seconds)[len(seconds) // 2] / tiles.numel() * 1e6
    return [str(bits), str(state_bits), f"{by_million:.3f}", f"{by_million * 6476 / 60:.1f}"]


if __name__ == "__main__":
    typer.run(main)
