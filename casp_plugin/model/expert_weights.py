"""Quantized experts read as transformers keeps them: dense, stacked.

transformers 5.17 reads all experts of a model under one scheme and without zero points; here
schemes differ from layer to layer.
"""

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.utils.match import match_name
from transformers.core_model_loading import WeightConverter, WeightTransform
from transformers.integrations.compressed_tensors import DecompressExperts

__all__ = ["STACKED", "read_each_expert", "reads_each_expert"]

#: quantized layers of an expert, by the stacked weight that they belong to
STACKED = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "up_proj": ("up_proj",),  # without a gate
    "down_proj": ("down_proj",),
}
_WEIGHT = ".weight_packed$"


def read_each_expert(converter: WeightConverter) -> WeightConverter:
    """Return a converter that decompresses every expert under its own scheme.

    :param converter: returned as it is where it decompresses no experts
    """
    operations = getattr(converter, "operations", [])
    packed = [pattern for pattern in converter.source_patterns if pattern.endswith(_WEIGHT)]
    if not packed or not isinstance(operations[0], DecompressExperts):
        return converter
    zero_points = [pattern.replace("packed$", "zero_point$") for pattern in packed]
    return WeightConverter(
        source_patterns=[*converter.source_patterns, *zero_points],
        target_patterns=converter._original_target_patterns,
        operations=[_DecompressEach(operations[0].hf_quantizer), *operations[1:]],
    )


def reads_each_expert(converter: WeightTransform) -> bool:
    """Tell whether a converter comes from :func:`read_each_expert`: it cannot be reversed."""
    operations = getattr(converter, "operations", ())
    return any(isinstance(operation, _DecompressEach) for operation in operations)


class _DecompressEach(DecompressExperts):
    """Decompression of every layer of every expert under its own scheme."""

    def convert(
        self,
        input_dict: dict[str, list[torch.Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str | None = None,
        **kwargs,
    ) -> dict[str, torch.Tensor]:
        """Return stacked weights, shape (experts, out, in), by the pattern of their codes.

        :raises ValueError: if the config has no scheme for an expert
        """
        experts, _, stacked = full_layer_name.rpartition(".")
        packed = [pattern for pattern in source_patterns if pattern.endswith(_WEIGHT)]
        weights = {}
        for pattern, layer in zip(packed, STACKED[stacked], strict=True):
            if pattern not in input_dict:
                continue
            parts = {
                f"weight_{part}": input_dict[pattern.replace("packed$", f"{part}$")]
                for part in ("packed", "scale", "shape", "zero_point")
                if pattern.replace("packed$", f"{part}$") in input_dict
            }
            states = (
                dict(zip(parts, tensors, strict=True))
                for tensors in zip(*parts.values(), strict=True)
            )
            weights[pattern] = torch.stack(
                [self._dense(f"{experts}.{i}.{layer}", state) for i, state in enumerate(states)]
            )
        return weights

    def _dense(self, name: str, state: dict[str, torch.Tensor]) -> torch.Tensor:
        scheme = self._scheme(name)
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        return compressor.decompress(state, scheme)["weight"]

    def _scheme(self, name: str) -> QuantizationScheme:
        for scheme in self.hf_quantizer.compressor.quantization_config.config_groups.values():
            if any(match_name(name, target) for target in scheme.targets):
                return scheme
        raise ValueError(f"quantization_config.config_groups: none of the targets is {name}")
