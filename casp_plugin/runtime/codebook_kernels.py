"""Triton kernels of codebook layers: weights stay codes, and are decoded as they are used.

``y = r * H_o V H_i (s * x)`` runs in three steps: the input is rotated, the values V of the codes
are multiplied, and the output is rotated and scaled. Up to 16 tokens V is decoded inside the
product; more tokens take a dense product with V, which is decoded for it.

Shapes: M tokens; in and out are the channels of the layer, P parts that share out the columns.
"""

import json
from functools import cache

import torch
import triton
import triton.language as tl

from casp_plugin.maths.codecs.lattice import decode_e8p, short_vectors
from casp_plugin.maths.hadamard import largest_block
from casp_plugin.model.codebook_schemes import (
    CODES,
    SCALE,
    SIGNS,
    TABLES,
    CodebookScheme,
    LatticeScheme,
    Tensors,
    TrellisScheme,
    read_scheme,
)

__all__ = ["MOST_TOKENS", "Kernel", "codebook_linear", "kernel_fault", "random_layer"]

#: tokens up to which V is decoded inside the product
MOST_TOKENS = 16
#: rows and columns of V that a program has in registers
_ROWS, _COLUMNS = 64, 64
#: programs of a product on each multiprocessor, which share out the columns
_PROGRAMS = 4
#: relative error of products, from 16 bits
_MOST_ERROR = 0.02
#: largest Hadamard block that the kernels rotate
_MOST_BLOCK = 256


class Kernel:
    """Products with the weights of one scheme.

    :param scheme: how the weights are stored
    """

    def __init__(self, scheme: CodebookScheme):
        self.scheme = scheme
        self._codec = {"CODEC": "vectors", "BITS": 0, "STATE_BITS": 0, "TILE_COLUMNS": 1}
        self._codec |= {"WIDE": 0, "NARROW": 0, "INTERPRETED": triton.knobs.runtime.interpret}
        if isinstance(scheme, TrellisScheme):
            self._codec |= {"CODEC": scheme.code, "BITS": scheme.bits}
            self._codec |= {"STATE_BITS": scheme.state_bits, "TILE_COLUMNS": scheme.columns}
        elif isinstance(scheme, LatticeScheme):  # a code of 16 bits, and of what is left
            self._codec |= {"WIDE": scheme.bits // 2, "NARROW": scheme.bits % 2}
        else:
            kind = "WIDE" if scheme.code_bits == 16 else "NARROW"
            self._codec[kind] = scheme.coder().codebooks

    def tensors(self, tensors: Tensors) -> Tensors:
        """Return the tensors of a layer as the kernels read them.

        :param tensors: as ``CodebookScheme.layout`` names them
        """
        made = {CODES: tensors[CODES], SCALE: tensors[SCALE]}
        if isinstance(self.scheme, TrellisScheme):
            return made | {SIGNS: tensors[SIGNS]}
        if isinstance(self.scheme, LatticeScheme):
            table = _lattice_table(self.scheme, tensors[CODES].device)
            return made | {SIGNS: tensors[SIGNS], TABLES: table}
        return made | {CODES: tensors[CODES].view(torch.uint8), TABLES: tensors[TABLES]}

    def decode(self, tensors: Tensors, values: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        """Write V times a factor, and return it.

        :param tensors: of :meth:`tensors`
        :param values: shape (out, in)
        :param factor: a power of two
        """
        rows, columns = values.shape
        grid = triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS)
        codes, tables = tensors[CODES], tensors.get(TABLES, tensors[CODES])
        sizes = {"ROWS": _ROWS, "COLUMNS": _COLUMNS}
        _decode[grid](codes, tables, values, factor, rows, columns, **sizes, **self._codec)
        return values

    def product(
        self,
        x: torch.Tensor,
        tensors: Tensors,
        rows: int,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the outputs of a layer, shape (M, out).

        :param x: inputs, shape (M, in)
        :param tensors: of :meth:`tensors`
        :param rows: out
        :param bias: shape (out,)
        """
        tokens, columns = x.shape
        block_in, block_out = (
            largest_block(size, self.scheme.block) for size in (columns, rows)
        )  # 1 where nothing is rotated
        rotated = x
        if block_in > 1:
            rotated = torch.empty_like(x)
            grid = tokens, columns // block_in
            _rotate_input[grid](x, tensors[SIGNS], rotated, columns, BLOCK=block_in)
        factor = 1.0
        if tokens > MOST_TOKENS:
            factor = 2.0 ** -(columns.bit_length() // 2)  # sums stay in the range of float16
            values = self.decode(tensors, x.new_empty(rows, columns), factor)
            partial = (rotated @ values.T)[None]  # (1, M, out)
        else:
            parts, length = _parts(rows, columns, x.device)
            partial = torch.empty(parts, tokens, rows, dtype=torch.float32, device=x.device)
            codes, tables = tensors[CODES], tensors.get(TABLES, tensors[CODES])
            _product[triton.cdiv(rows, _ROWS), parts](
                rotated,
                codes,
                tables,
                partial,
                tokens,
                rows,
                columns,
                length,
                TOKENS=MOST_TOKENS,
                ROWS=_ROWS,
                COLUMNS=_COLUMNS,
                EXACT=x.dtype == torch.float32,
                **self._codec,
            )
        y = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
        width = block_out if block_out > 1 else largest_block(rows, _MOST_BLOCK)
        _finish[tokens, rows // width](
            partial,
            tensors[SCALE],
            tensors[SCALE] if bias is None else bias,
            y,
            1 / factor,
            tokens,
            rows,
            len(partial),
            WIDTH=width,
            ROTATES=block_out > 1,
            BIAS=bias is not None,
        )
        return y


@torch.library.custom_op("casp_plugin::codebook_linear", mutates_args=())
def codebook_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    signs: torch.Tensor | None,
    tables: torch.Tensor | None,
    bias: torch.Tensor | None,
    scheme: str,
) -> torch.Tensor:
    """Return the outputs of a layer, an operator that compilers leave as it is.

    :param x: inputs, shape (..., in)
    :param codes: and the others as ``CodebookScheme.layout`` names them
    :param scheme: in JSON
    """
    kernel, rows = _kernel(scheme), len(scale)
    tensors = {CODES: codes, SCALE: scale, SIGNS: signs, TABLES: tables}
    y = kernel.product(x.flatten(0, -2).contiguous(), kernel.tensors(tensors), rows, bias)
    return y.unflatten(0, x.shape[:-1])


@codebook_linear.register_fake
def _(x, codes, scale, signs, tables, bias, scheme):
    return x.new_empty(*x.shape[:-1], len(scale))


@cache
def _kernel(scheme: str) -> Kernel:
    return Kernel(read_scheme(json.loads(scheme)))


@cache
def kernel_fault(scheme: CodebookScheme, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return why a scheme cannot be run by its kernels here, found out on a small layer; None where
    it can."""
    if scheme.block > _MOST_BLOCK:
        return f"kernels rotate blocks of at most {_MOST_BLOCK}"
    shape = 256, 256
    tensors = random_layer(scheme, shape, dtype, device)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(MOST_TOKENS + 1, shape[1], generator=generator).to(dtype).to(device)
    expected = x.float() @ scheme.decode(tensors).T
    kernel = Kernel(scheme)
    try:
        for tokens in (1, len(x)):
            found = kernel.product(x[:tokens], kernel.tensors(tensors), shape[0]).float()
            error = (found - expected[:tokens]).norm() / expected[:tokens].norm()
            if not error < _MOST_ERROR:
                return f"they are off by {error:.1%} for {tokens} tokens"
    except Exception as error:  # of a compiler, in its own words
        return f"{type(error).__name__}: {error}"
    return None


def random_layer(
    scheme: CodebookScheme, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Tensors:
    """Return the tensors of a layer with random codes, which all mean some weight.

    :param shape: (out, in)
    """
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (size, kind) in scheme.layout(shape, dtype).items():
        if kind.is_floating_point:
            made = torch.rand(size, generator=generator) + 0.5
        else:
            limits = torch.iinfo(kind)
            made = torch.randint(limits.min, limits.max + 1, size, generator=generator)
        tensors[name] = made.to(kind).to(device)
    return tensors


@cache
def _lattice_table(scheme: LatticeScheme, device: torch.device) -> torch.Tensor:
    """Return the vectors of all codes, those of 16 bits first, shape (codes, 8), float32."""
    every = decode_e8p(torch.arange(1 << 16, device="cpu"))
    outer, inner = scheme.coder().gains
    parts = [every / outer]
    if scheme.bits == 3:
        parts.append(short_vectors() / (outer * inner))
    elif scheme.bits == 4:
        parts.append(every / (outer * inner))
    return torch.cat(parts).to(device)


@cache
def _parts(rows: int, columns: int, device: torch.device) -> tuple[int, int]:
    """Return the number of parts that share out the columns, and the columns of one."""
    processors = 1
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = triton.cdiv(_PROGRAMS * processors, triton.cdiv(rows, _ROWS))
    length = triton.cdiv(triton.cdiv(columns, wanted), _COLUMNS) * _COLUMNS
    return triton.cdiv(columns, length), length


@triton.jit
def _signs_of_hadamard(BLOCK: tl.constexpr):
    """Return Sylvester's matrix divided by the square root of its size, shape (BLOCK, BLOCK)."""
    both = tl.arange(0, BLOCK)[:, None] & tl.arange(0, BLOCK)[None, :]
    both ^= both >> 8
    both ^= both >> 4
    both ^= both >> 2
    both ^= both >> 1
    return (1 - 2 * (both & 1)).to(tl.float32) * (BLOCK**-0.5)


@triton.jit
def _rotate_input(x, signs, rotated, columns, BLOCK: tl.constexpr):
    """Write H (s * x) of a token and a block."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    minus = (tl.load(signs + column // 32) >> (column % 32)) & 1
    value = tl.load(x + token * columns + column).to(tl.float32) * (1 - 2 * minus).to(tl.float32)
    turned = tl.sum(_signs_of_hadamard(BLOCK) * value[None, :], axis=1)
    tl.store(rotated + token * columns + column, turned.to(rotated.dtype.element_ty))


@triton.jit
def _finish(
    partial,
    scale,
    bias,
    y,
    factor,
    tokens,
    rows,
    parts,
    WIDTH: tl.constexpr,
    ROTATES: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Write r * H_o of the sum over the parts times a factor, of a token and a block."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    for part in range(parts):
        total += tl.load(partial + (part * tokens + token) * rows + row).to(tl.float32)
    if ROTATES:
        total = tl.sum(_signs_of_hadamard(WIDTH) * total[None, :], axis=1)
    total *= factor * tl.load(scale + row).to(tl.float32)
    if BIAS:
        total += tl.load(bias + row).to(tl.float32)
    tl.store(y + token * rows + row, total.to(y.dtype.element_ty))


@triton.jit
def _decode(
    codes,
    tables,
    values,
    factor,
    rows,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CODEC: tl.constexpr,
    BITS: tl.constexpr,
    STATE_BITS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
    NARROW: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Write a piece of V times a factor."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < rows) & (column < columns)
    value = _values(
        codes, tables, row, column, columns, inside,
        CODEC, BITS, STATE_BITS, TILE_COLUMNS, WIDE, NARROW, INTERPRETED,
    )  # fmt: skip
    at = row.to(tl.int64) * columns + column
    tl.store(values + at, (value * factor).to(values.dtype.element_ty), mask=inside)


@triton.jit
def _product(
    x,
    codes,
    tables,
    partial,
    tokens,
    rows,
    columns,
    length,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EXACT: tl.constexpr,
    CODEC: tl.constexpr,
    BITS: tl.constexpr,
    STATE_BITS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
    NARROW: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Write the product of a part of the columns, for some rows."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    part = tl.program_id(1)
    token = tl.arange(0, TOKENS)[:, None]
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    for start in range(part * length, tl.minimum((part + 1) * length, columns), COLUMNS):
        column = (start + tl.arange(0, COLUMNS))[None, :]
        known = (token < tokens) & (column < columns)
        inputs = tl.load(x + token * columns + column, mask=known, other=0.0)
        inside = (row < rows) & (column < columns)
        value = _values(
            codes, tables, row, column, columns, inside,
            CODEC, BITS, STATE_BITS, TILE_COLUMNS, WIDE, NARROW, INTERPRETED,
        )  # fmt: skip
        value = tl.trans(value.to(inputs.dtype))  # (COLUMNS, ROWS)
        if EXACT:
            total = tl.dot(inputs, value, total, input_precision="ieee")
        else:
            total = tl.dot(inputs, value, total)
    own = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :]
    at = (part * tokens + token).to(tl.int64) * rows + own
    tl.store(partial + at, total, mask=(token < tokens) & (own < rows))


@triton.jit
def _values(
    codes,
    tables,
    row,
    column,
    columns,
    inside,
    CODEC: tl.constexpr,
    BITS: tl.constexpr,
    STATE_BITS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
    NARROW: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Return entries of V, float32.

    :param CODEC: code of a trellis, or ``vectors``: sums of vectors of eight numbers from tables
    :param WIDE: number of codes of 16 bits of a vector
    :param NARROW: number of codes of 8 bits behind them
    """
    if CODEC == "vectors":
        return _vector_values(codes, tables, row, column, columns, inside, WIDE, NARROW)
    state = _states(codes, row, column, columns, inside, BITS, STATE_BITS, TILE_COLUMNS)
    if CODEC == "mul1":
        scrambled = state * -2082680531  # 0x83DCD12D
        if INTERPRETED:
            total = (scrambled & 255) + ((scrambled >> 8) & 255)
            total += ((scrambled >> 16) & 255) + ((scrambled >> 24) & 255)
        else:  # sums the four bytes
            total = tl.inline_asm_elementwise(
                "dp4a.u32.u32 $0, $1, 0x01010101, 0;",
                "=r,r",
                [scrambled],
                dtype=tl.int32,
                is_pure=True,
                pack=1,
            )
        return (total + 1024).to(tl.float32) * 0.0067673 - 10.3828
    scrambled = state * 89226354 + 64248484
    halves = (scrambled & -1879076865) ^ 0x3B603B60  # 0x8FFF8FFF
    high = (halves >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    low = halves.to(tl.int16).to(tl.float16, bitcast=True)
    return (high + low).to(tl.float32)


@triton.jit
def _states(
    codes,
    row,
    column,
    columns,
    inside,
    BITS: tl.constexpr,
    STATE_BITS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """Return the states of weights, int32, see ``maths.codecs.trellis.window_states``."""
    TILE_ROWS: tl.constexpr = 256 // TILE_COLUMNS
    WORDS: tl.constexpr = 8 * BITS
    tile = (row // TILE_ROWS).to(tl.int64) * (columns // TILE_COLUMNS) + column // TILE_COLUMNS
    index = row % TILE_ROWS * TILE_COLUMNS + column % TILE_COLUMNS
    end = (index + 1) * BITS - 1  # the last bit of the window
    word = end // 32
    before = tl.where(word == 0, WORDS - 1, word - 1)
    low = tl.load(codes + tile * WORDS + word, mask=inside, other=0).to(tl.uint32)
    high = tl.load(codes + tile * WORDS + before, mask=inside, other=0).to(tl.uint32)
    shift = (31 - end % 32).to(tl.uint32)
    # both words shifted as one of 64 bits; a shift by 32 is none
    window = (low >> shift) | ((high << 1) << (31 - shift))
    return (window & ((1 << STATE_BITS) - 1)).to(tl.int32)


@triton.jit
def _vector_values(
    codes, tables, row, column, columns, inside, WIDE: tl.constexpr, NARROW: tl.constexpr
):
    """Return entries of sums of vectors, float32."""
    BYTES: tl.constexpr = 2 * WIDE + NARROW
    own = codes + (row.to(tl.int64) * (columns // 8) + column // 8) * BYTES
    place = column % 8
    value = tl.zeros((row.shape[0], column.shape[1]), tl.float32)
    for wide in tl.static_range(WIDE):
        code = tl.load(own + 2 * wide, mask=inside, other=0).to(tl.int32)
        code |= tl.load(own + 2 * wide + 1, mask=inside, other=0).to(tl.int32) << 8
        value += tl.load(tables + (wide * 65536 + code) * 8 + place, mask=inside, other=0.0)
    for narrow in tl.static_range(NARROW):
        code = tl.load(own + 2 * WIDE + narrow, mask=inside, other=0).to(tl.int32)
        at = (WIDE * 65536 + narrow * 256 + code) * 8 + place
        value += tl.load(tables + at, mask=inside, other=0.0)
    return value
