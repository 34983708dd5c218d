"""Schemes of codebook layers: the tensors that a layer stores, their bytes, and its weight.

``docs/codebooks.md`` holds the format.
"""

from abc import abstractmethod
from math import ceil, prod
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, field_validator, model_validator

from casp_plugin.maths.codecs.additive import AdditiveCodec, additive_distortion, learn
from casp_plugin.maths.codecs.lattice import LatticeCodec
from casp_plugin.maths.codecs.trellis import TILE, TrellisCode, TrellisCodec
from casp_plugin.maths.incoherence import Input, code_weights, decoded_weight, random_signs
from casp_plugin.maths.packing import pack, unpack

__all__ = [
    "SCALE",
    "AdditiveScheme",
    "CodebookScheme",
    "LatticeScheme",
    "TrellisScheme",
    "pack_signs",
    "read_scheme",
    "unpack_signs",
]

#: names of the tensors of a layer
CODES, SCALE, SIGNS, TABLES = "weight_codes", "weight_scale", "weight_signs", "weight_codebooks"

_WORD = 32
#: weights that one code of a lattice or of codebooks stands for
_VECTOR = LatticeCodec.columns

#: shape and dtype
Layout = tuple[tuple[int, ...], torch.dtype]
Tensors = dict[str, torch.Tensor]


class CodebookScheme(BaseModel):
    """How a weight is stored, the same for all layers of a scheme.

    :param codec: name of the method
    :param bits: bits of a weight, without scales
    :param block: size of the Hadamard blocks at most, on both sides of a weight, smaller powers of
        two where it does not divide the size; 1 for no rotation
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    codec: str
    bits: int
    block: int

    @property
    def name(self) -> str:
        """Return a name for the scheme, the codec and its rate."""
        return f"{self.codec}_{self.bits}"

    @property
    @abstractmethod
    def tile(self) -> tuple[int, int]:
        """Return (rows, columns) of the weights that are coded together."""

    @property
    @abstractmethod
    def distortion(self) -> float:
        """Return the mean squared error of coding Gaussian numbers of variance one."""

    @abstractmethod
    def layout(self, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Layout]:
        """Return shape and dtype of the tensors of a layer, by name.

        :param shape: (out, in) of its weight
        :param dtype: of the model
        """

    @abstractmethod
    def encode(
        self,
        weights: list[torch.Tensor],
        input: Input,
        seed: int,
        change: torch.Tensor | None = None,
        share: float = 0.0,
        metrics: list[torch.Tensor] | None = None,
    ) -> list[Tensors]:
        """Return the tensors of layers that read one input.

        :param weights: shape (out, in) each, float32
        :param input: of :meth:`input`
        :param seed: of all that is random
        :param change: C = E[(x_dense - x) x^T], shape (in, in); None for none
        :param share: of the change that the weights make up for
        :param metrics: of the outputs of every layer, positive definite, shape (out, out) each;
            None for identities
        """

    @abstractmethod
    def decode(self, tensors: Tensors) -> torch.Tensor:
        """Return the weight of a layer, shape (out, in), float32.

        :param tensors: as :meth:`layout` names them
        """

    def input(self, moment: torch.Tensor, seed: int, damping: float) -> Input:
        """Return an input as encoding needs it.

        :param moment: E[x x^T], shape (in, in), float32
        :param seed: of the signs of its rotation
        :param damping: share of the mean diagonal that is added to the diagonal
        """
        count = len(moment)
        signs = random_signs(count, seed) if self.block > 1 else torch.ones(count)
        return Input(moment, signs.to(moment), self.block, self.tile[1], damping)

    def fitting(self, shape: tuple[int, int]) -> "CodebookScheme":
        """Return the scheme, or one of the same bits whose tiles divide a weight, if there is one.

        :param shape: (out, in)
        """
        return self

    def check(self, name: str, shape: tuple[int, int]) -> None:
        """Check that a weight can be coded.

        :param name: of its layer
        :param shape: (out, in)
        :raises ValueError: if it cannot
        """
        rows, columns = self.tile
        if shape[0] % rows or shape[1] % columns:
            raise ValueError(
                f"{name}: its weight of {shape[0]} x {shape[1]} does not divide into tiles of "
                f"{rows} x {columns}; put it into ignore"
            )

    def stored_bytes(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """Return the bytes of all tensors of a layer, by the scheme that fits its shape."""
        layout = self.fitting(shape).layout(shape, dtype).values()
        return sum(prod(size) * kind.itemsize for size, kind in layout)


class _RotatedScheme(CodebookScheme):
    """A fixed code on a weight that is rotated on both sides, see ``maths.incoherence``."""

    block: int = Field(default=128, ge=2, le=4096)

    @field_validator("block")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError(f"must be a power of two, got {value}")
        return value

    @abstractmethod
    def coder(self) -> TrellisCodec | LatticeCodec:
        """Return the codec."""

    @property
    def tile(self) -> tuple[int, int]:
        return self.coder().rows, self.coder().columns

    @property
    def distortion(self) -> float:
        return self.coder().distortion

    @abstractmethod
    def _codes(self, shape: tuple[int, int]) -> Layout:
        """Return shape and dtype of the codes of a weight."""

    def layout(self, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Layout]:
        return {
            CODES: self._codes(shape),
            SCALE: ((shape[0],), dtype),
            SIGNS: ((ceil(shape[1] / _WORD),), torch.int32),
        }

    def encode(
        self,
        weights: list[torch.Tensor],
        input: Input,
        seed: int,
        change: torch.Tensor | None = None,
        share: float = 0.0,
        metrics: list[torch.Tensor] | None = None,
    ) -> list[Tensors]:
        coded = code_weights(weights, input, self.coder(), self.block, seed, change, share, metrics)
        signs = pack_signs(input.signs)
        return [{CODES: own.codes, SCALE: own.scale, SIGNS: signs} for own in coded]

    def decode(self, tensors: Tensors) -> torch.Tensor:
        values = self.coder().decode(tensors[CODES])
        signs = unpack_signs(tensors[SIGNS], values.shape[1])
        return decoded_weight(values, tensors[SCALE].float(), signs, self.block)


class TrellisScheme(_RotatedScheme):
    """A trellis code, see ``maths.codecs.trellis``.

    :param bits: K, bits of a weight
    :param state_bits: L, bits that a weight is read from
    :param code: function from these bits to a value
    :param columns: columns of a tile of 256 weights; fewer round better, since a tile makes up for
        nothing inside
    """

    codec: Literal["trellis"] = "trellis"
    bits: int = Field(ge=1, le=8)
    state_bits: int = Field(default=12, ge=10, le=16)
    code: TrellisCode = "mul1"
    columns: Literal[4, 8, 16] = 4

    def fitting(self, shape: tuple[int, int]) -> "TrellisScheme":
        for columns in (4, 8, 16):
            fits = shape[0] % (TILE // columns) == 0 == shape[1] % columns
            if fits and columns >= self.columns:
                return self.model_copy(update={"columns": columns})
        return self.model_copy(update={"columns": 16})

    def coder(self) -> TrellisCodec:
        return TrellisCodec(self.bits, self.state_bits, self.code, self.columns)

    def _codes(self, shape: tuple[int, int]) -> Layout:
        (rows, columns), words = self.tile, self.coder().words
        return (shape[0] // rows, shape[1] // columns, words), torch.int32


class LatticeScheme(_RotatedScheme):
    """A lattice code of eight weights, see ``maths.codecs.lattice``.

    :param bits: bits of a weight
    """

    codec: Literal["e8p"] = "e8p"
    bits: Literal[2, 3, 4]

    def coder(self) -> LatticeCodec:
        return LatticeCodec(self.bits)

    def _codes(self, shape: tuple[int, int]) -> Layout:
        return (shape[0], shape[1] // _VECTOR, self.bits), torch.uint8


class AdditiveScheme(CodebookScheme):
    """Sums of vectors from learned codebooks, see ``maths.codecs.additive``.

    :param bits: bits of a weight, eight times that for eight weights
    :param code_bits: bits of a code; a codebook has 2^bits vectors of eight numbers
    """

    codec: Literal["aqlm"] = "aqlm"
    bits: int = Field(ge=1, le=8)
    block: Literal[1] = 1
    code_bits: Literal[8, 16] = 8

    @model_validator(mode="after")
    def _whole_codes(self) -> "AdditiveScheme":
        if self.bits * _VECTOR % self.code_bits:
            raise ValueError(
                f"codes of {self.code_bits} bits do not make {self.bits} bits a weight"
            )
        return self

    def coder(self) -> AdditiveCodec:
        """Return the codec."""
        return AdditiveCodec(self.bits * _VECTOR // self.code_bits, self.code_bits)

    @property
    def tile(self) -> tuple[int, int]:
        return 1, _VECTOR

    @property
    def distortion(self) -> float:
        return additive_distortion(self.coder())

    def layout(self, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Layout]:
        count = self.coder().codebooks
        kind = torch.uint8 if self.code_bits == 8 else torch.int16  # of 16 bits, read unsigned
        return {
            CODES: ((shape[0], shape[1] // _VECTOR, count), kind),
            SCALE: ((shape[0],), dtype),
            TABLES: ((count, 1 << self.code_bits, _VECTOR), dtype),
        }

    def encode(
        self,
        weights: list[torch.Tensor],
        input: Input,
        seed: int,
        change: torch.Tensor | None = None,
        share: float = 0.0,
        metrics: list[torch.Tensor] | None = None,
    ) -> list[Tensors]:
        if metrics is not None:
            raise ValueError("learned codebooks have no metric of outputs")
        made = []
        for weight in weights:
            target = input.corrected(weight, change, share)
            own = learn(target, input.moment, input.ldl, self.coder(), seed)
            codes = own.codes - (own.codes >> 15 << 16) if self.code_bits == 16 else own.codes
            kind = torch.int16 if self.code_bits == 16 else torch.uint8
            made.append({CODES: codes.to(kind), SCALE: own.scale, TABLES: own.tables})
        return made

    def decode(self, tensors: Tensors) -> torch.Tensor:
        codes = tensors[CODES].long() & (1 << self.code_bits) - 1
        values = self.coder().sums(codes, tensors[TABLES].float()).flatten(1)
        return values * tensors[SCALE].float()[:, None]


_SCHEMES: TypeAdapter = TypeAdapter(
    Annotated[TrellisScheme | LatticeScheme | AdditiveScheme, Field(discriminator="codec")]
)


def read_scheme(fields: dict[str, Any]) -> CodebookScheme:
    """Return the scheme of some fields.

    :raises pydantic.ValidationError: if there is no such scheme
    """
    return _SCHEMES.validate_python(fields, strict=True)


def pack_signs(signs: torch.Tensor) -> torch.Tensor:
    """Return signs as bits, the first in the lowest bit of the first word; 1 is minus.

    :param signs: shape (count,)
    :return: int32, shape (ceil(count / 32),)
    """
    return pack((signs < 0).to(torch.uint8), 1)


def unpack_signs(words: torch.Tensor, count: int) -> torch.Tensor:
    """Return the signs of :func:`pack_signs`, shape (count,), float32."""
    return 1.0 - 2.0 * unpack(words, 1, count).float()
