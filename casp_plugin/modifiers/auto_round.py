"""AutoRoundModifier: llm-compressor's, for the schemes and zero points that plans ask for."""

import torch
from compressed_tensors.utils import is_match
from llmcompressor.modifiers.autoround import AutoRoundModifier as _AutoRoundModifier
from torch import nn

__all__ = ["AutoRoundModifier", "signed_zero_point"]

#: how AutoRound is told to leave a layer alone
_UNQUANTIZED = {"bits": 16, "act_bits": 16, "data_type": "float", "act_data_type": "float"}


class AutoRoundModifier(_AutoRoundModifier):
    """
    llm-compressor's AutoRoundModifier for plans of several bit widths and asymmetric weights;
    recipes that name `AutoRoundModifier` get this one once casp_plugin is imported. Fields and
    lifecycle are the same.

    llm-compressor 0.14 looks for targets among the names inside a decoding layer. Those given as
    whole names, as in every plan, match none, and all layers are tuned under the first scheme. It
    takes over AutoRound's scales but not its zero points, so that asymmetric weights are clamped to
    a wrong range.
    """

    def _match_autoround_targets(self, model: nn.Module) -> set[nn.Module]:
        """Targets by their names in the whole model.

        :param model: a decoding layer, or what wraps it
        """
        return {
            module
            for module in model.modules()
            if is_match(
                getattr(module, "_tmp_name", ""), module, self.resolved_targets, self.ignore
            )
        }

    def _build_layer_config_for_autoround(self, wrapped_model: nn.Module) -> dict[str, dict]:
        """Schemes where they differ from the first, and which layers have none."""
        config = super()._build_layer_config_for_autoround(wrapped_model)
        targets = self._match_autoround_targets(wrapped_model)
        for name, module in wrapped_model.named_modules():
            if isinstance(module, nn.Linear) and module not in targets:
                config[name] = dict(_UNQUANTIZED)
        return config

    def _postprocess_qparams(
        self, model: nn.Module, llmc_registered_qparams: dict[str, dict[str, torch.Tensor]]
    ) -> None:
        for name, module in model.named_modules():
            initial = llmc_registered_qparams.get(name, {}).get("weight_zero_point")
            tuned = getattr(module, "zp", None)
            if initial is not None and isinstance(tuned, torch.Tensor):
                moved = signed_zero_point(tuned, module.quantization_scheme.weights.num_bits)
                moved = moved.to(initial.device, initial.dtype).reshape(initial.shape)
                llmc_registered_qparams[name]["weight_zero_point"] = moved
        super()._postprocess_qparams(model, llmc_registered_qparams)


def signed_zero_point(zero_point: torch.Tensor, bits: int) -> torch.Tensor:
    """
    From AutoRound's codes, 0 to 2^b - 1, to those of compressed-tensors, -2^(b-1) to 2^(b-1) - 1.

    :param zero_point: (rows, groups), in 0 to 2^b - 1
    :param bits: width b of the codes
    :return: (rows, groups), in -2^(b-1) to 2^(b-1) - 1
    :raises ValueError: if a zero point lies outside its range
    """
    wrong = ~((zero_point >= 0) & (zero_point < 2**bits))  # NaN is wrong, too
    if wrong.any():
        found = zero_point[wrong].flatten()[0].item()
        raise ValueError(f"AutoRound's zero points must lie in 0..{2**bits - 1}, got {found}")
    return zero_point - 2 ** (bits - 1)
