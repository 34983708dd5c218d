"""AutoRoundModifier: llm-compressor's, with the zero points that AutoRound tuned."""

import torch
from llmcompressor.modifiers.autoround import AutoRoundModifier as _AutoRoundModifier
from torch import nn

__all__ = ["AutoRoundModifier", "signed_zero_point"]


class AutoRoundModifier(_AutoRoundModifier):
    """
    llm-compressor's AutoRoundModifier for asymmetric weights as well; recipes that name
    `AutoRoundModifier` get this one once casp_plugin is imported. Fields and lifecycle are the
    same.

    llm-compressor 0.14 takes over AutoRound's scales but not its zero points: a layer keeps the
    zeros it was initialized with, and asymmetric weights are clamped to a wrong range.
    """

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
