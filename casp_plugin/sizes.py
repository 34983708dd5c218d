"""What the bytes of a checkpoint are spent on, read from the headers of its files."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

from safetensors import safe_open

from casp_plugin.components import component_of
from casp_plugin.loading import bare_checkpoint
from casp_plugin.models import names_in_memory
from casp_plugin.modules import LowRankLinear

__all__ = ["KINDS", "Header", "read_headers", "size_breakdown", "tensor_bytes"]

#: shape and dtype of a tensor on disk, as safetensors writes it
Header = tuple[tuple[int, ...], str]
#: what tensors hold, in the order that people read
KINDS = (
    "codes",
    "codes of factors",
    "scales",
    "zero points",
    "embedding",
    "output head",
    "other matrices",
    "norms, biases, shapes",
)
_QUANTIZED = {
    "weight_packed": "codes",
    "weight_scale": "scales",
    "weight_zero_point": "zero points",
}


def read_headers(folder: Path) -> dict[str, Header]:
    """Headers of all tensors of a folder, by name, without reading data.

    :raises ValueError: if the folder holds no safetensors file
    """
    headers = {}
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ValueError(f"{folder} holds no safetensors file")
    for path in paths:
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118, not a dict
                view = shard.get_slice(name)
                headers[name] = (tuple(view.get_shape()), view.get_dtype())
    return headers


def tensor_bytes(header: Header) -> int:
    """Bytes of a tensor's data."""
    shape, dtype = header
    bits = re.search(r"\d+", dtype)  # BF16, F8_E4M3, BOOL
    return prod(shape) * (int(bits[0]) if bits else 8) // 8


def size_breakdown(
    folder: Path, patterns: Mapping[str, Iterable[str]] | None = None
) -> dict[str, dict[str, int]]:
    """Bytes of a checkpoint's tensors by component of the model, then by kind.

    :param folder: checkpoint folder
    :param patterns: ``component_patterns`` of the recipe
    :return: kinds are those of ``KINDS``, in that order; what takes nothing is left out
    :raises ValueError: if the folder holds no safetensors file
    """
    headers = read_headers(folder)
    model, _ = bare_checkpoint(folder)
    modules = dict(model.named_modules())
    special = {model.get_output_embeddings(): "output head"}
    special |= {model.get_input_embeddings(): "embedding", None: None}
    names = names_in_memory(list(headers), model)
    found: dict[str, Counter] = {}
    for name, header in headers.items():
        module = names[name].rpartition(".")[0]
        kind = _quantized(name, header[1]) or special.get(modules.get(module))
        if kind == "codes" and isinstance(modules.get(module.rpartition(".")[0]), LowRankLinear):
            kind = "codes of factors"
        elif kind is None:
            kind = "other matrices" if len(header[0]) > 1 else "norms, biases, shapes"
        found.setdefault(component_of(module, patterns), Counter())[kind] += tensor_bytes(header)
    return {
        component: {kind: counts[kind] for kind in KINDS if counts[kind]}
        for component, counts in found.items()
    }


def _quantized(name: str, dtype: str) -> str | None:
    """What a tensor of a quantized layer holds, by its name on disk; None if it is of no such."""
    tensor = name.rpartition(".")[2]
    if tensor == "weight" and dtype.startswith(("I8", "F8")):  # stored as they are
        return "codes"
    return _QUANTIZED.get(tensor)
