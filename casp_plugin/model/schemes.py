"""Weight schemes of compressed-tensors: their arguments, their bytes, their kernels."""

import math

import torch
from compressed_tensors.compressors import compress_module
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStrategy,
    initialize_module_for_quantization,
)
from torch import nn

from casp_plugin.model.codebook_schemes import CodebookScheme

__all__ = [
    "DEFAULT_OBSERVER",
    "FORMAT",
    "WeightScheme",
    "missing_kernel",
    "quantized_bytes",
    "stored_bytes",
    "weight_args",
]

#: importance-weighted search for the scales; min-max scales destroy a model at 2 bits
DEFAULT_OBSERVER = "imatrix_mse"

#: set explicitly: compressed-tensors infers another format for subclasses of Linear (Falcon's)
FORMAT = CompressionFormat.pack_quantized.value

#: of a weight: integers with scales, or codes of a codebook
WeightScheme = QuantizationArgs | CodebookScheme

_INT32_BYTES = 4
_SHAPE_BYTES = 16  # weight_shape: two int64


def weight_args(
    bits: int, group_size: int, symmetric: bool = False, observer: str = DEFAULT_OBSERVER
) -> QuantizationArgs:
    """Return an integer weight scheme.

    :param bits: width of the codes
    :param group_size: columns that share a scale; -1 for one scale per output channel
    :param symmetric: whether to store no zero points
    :param observer: name of the llm-compressor observer that chooses the scales
    """
    return QuantizationArgs(
        num_bits=bits,
        type="int",
        symmetric=symmetric,
        strategy="channel" if group_size == -1 else "group",
        group_size=None if group_size == -1 else group_size,
        observer=observer,
    )


def stored_bytes(shape: tuple[int, int], args: WeightScheme, dtype: torch.dtype) -> int:
    """Return the bytes that a weight takes on disk: those of its codebook's tensors, or those of
    the ``pack-quantized`` format.

    There, codes are a dense bit stream per row, ``ceil(in * bits / 32)`` int32; scales are one
    value of the model's dtype per row and group; zero points (asymmetric only) are packed along the
    rows; ``weight_shape`` is two int64. Biases are not counted: no choice changes them.

    :param shape: (out, in) of the weight
    :param args: its scheme, of group or channel strategy
    :param dtype: data type of the scales, equal to the model's
    """
    if isinstance(args, CodebookScheme):
        return args.stored_bytes(shape, dtype)
    rows, columns = shape
    grouped = args.strategy == QuantizationStrategy.GROUP
    groups = columns // args.group_size if grouped else 1
    codes = rows * math.ceil(columns * args.num_bits / 32) * _INT32_BYTES
    scales = rows * groups * dtype.itemsize
    zeros = 0 if args.symmetric else _packed_zeros(rows, groups, args.num_bits)
    return codes + scales + zeros + _SHAPE_BYTES


def quantized_bytes(module: nn.Linear | nn.Embedding, scheme: QuantizationScheme) -> int:
    """Return the bytes that a layer's weight takes on disk under a scheme of any format.

    Biases are not counted.

    :param module: the dense layer, left unchanged
    """
    like = {"device": "meta", "dtype": module.weight.dtype}
    if isinstance(module, nn.Linear):
        bare = nn.Linear(module.in_features, module.out_features, bias=False, **like)
    else:
        bare = nn.Embedding(module.num_embeddings, module.embedding_dim, **like)
    bare.quantization_scheme = scheme
    initialize_module_for_quantization(bare)
    zeros = getattr(bare, "weight_zero_point", None)
    compress_module(bare)
    stored = {name: tensor.nbytes for name, tensor in bare.state_dict().items()}
    if "weight_zero_point" in stored and "weight_packed" in stored:  # packed along the rows
        rows, groups = zeros.shape
        stored["weight_zero_point"] = _packed_zeros(rows, groups, scheme.weights.num_bits)
    return sum(stored.values())


def _packed_zeros(rows: int, groups: int, bits: int) -> int:
    return math.ceil(rows * bits / 32) * groups * _INT32_BYTES


def missing_kernel(args: WeightScheme) -> str | None:
    """Return the extra package that stock vLLM on CUDA needs to run a scheme; None if none.

    Marlin runs 4 and 8 bits symmetric and 4 bits asymmetric, in groups of 32, 64, 128 or per
    channel; Humming runs everything else (package ``humming-kernels``). Machete, on
    Hopper, runs 8 bits asymmetric, too, and is not assumed. Codebooks need this package itself.
    """
    if isinstance(args, CodebookScheme):
        return "casp-plugin"
    in_box = (4, 8) if args.symmetric else (4,)
    sizes = (None, -1, 32, 64, 128)
    if args.num_bits in in_box and args.group_size in sizes:
        return None
    return "humming-kernels"
