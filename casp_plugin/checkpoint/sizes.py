"""Bytes of a checkpoint by component and kind of tensor, read from the headers of its files."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from casp_plugin.checkpoint.bare import bare_checkpoint
from casp_plugin.model.components import component_of
from casp_plugin.model.low_rank_linear import LowRankLinear
from casp_plugin.model.weights import read_headers, tensor_bytes

__all__ = ["TENSOR_KINDS", "size_breakdown"]

#: kinds of tensors, in the order of reports
TENSOR_KINDS = (
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
    "weight_codes": "codes",
    "weight_codebooks": "codes",
    "weight_signs": "scales",
    "weight_scale": "scales",
    "weight_zero_point": "zero points",
}


def size_breakdown(
    folder: Path,
    patterns: Mapping[str, Iterable[str]] | None = None,
    trust_remote_code: bool = False,
) -> dict[str, dict[str, int]]:
    """Return the bytes of a checkpoint's tensors by component of the model, then by kind.

    :param folder: checkpoint folder
    :param patterns: ``component_patterns`` of the recipe
    :param trust_remote_code: whether Python code that comes with the model may run
    :return: kinds are those of ``TENSOR_KINDS``, in that order; kinds without bytes are left out
    :raises ValueError: if the folder holds no safetensors file
    """
    headers = read_headers(folder)
    bare = bare_checkpoint(folder, trust_remote_code)
    model = bare.model
    modules = dict(model.named_modules())
    special = {model.get_output_embeddings(): "output head"}
    special |= {model.get_input_embeddings(): "embedding", None: None}
    names = bare.names_in_memory(headers)
    sizes: dict[str, Counter] = {}
    for name, header in headers.items():
        module = names[name].rpartition(".")[0]
        kind = _quantized(name, header[1]) or special.get(modules.get(module))
        if kind == "codes" and isinstance(modules.get(module.rpartition(".")[0]), LowRankLinear):
            kind = "codes of factors"
        elif kind is None:
            kind = "other matrices" if len(header[0]) > 1 else "norms, biases, shapes"
        sizes.setdefault(component_of(module, patterns), Counter())[kind] += tensor_bytes(header)
    return {
        component: {kind: counts[kind] for kind in TENSOR_KINDS if counts[kind]}
        for component, counts in sizes.items()
    }


def _quantized(name: str, dtype: str) -> str | None:
    """Return the kind of a tensor of a quantized layer; None for tensors of other layers.

    :param name: name on disk
    """
    tensor = name.rpartition(".")[2]
    if tensor == "weight" and dtype.startswith(("I8", "F8")):  # codes that are not packed
        return "codes"
    return _QUANTIZED.get(tensor)
