"""AutoRoundModifier of llm-compressor, for plans of several bit widths and zero points."""

import torch
from compressed_tensors.quantization.utils import is_module_quantized
from compressed_tensors.utils import is_match
from llmcompressor.core import Event, State
from llmcompressor.modifiers.autoround import AutoRoundModifier as _AutoRoundModifier
from pydantic import PrivateAttr
from torch import nn

from casp_plugin.model.tunable import round_weight
from casp_plugin.model.units import decoder_layers

__all__ = ["AutoRoundModifier", "signed_zero_point"]

#: configuration of a layer that AutoRound leaves alone
_UNQUANTIZED = {"bits": 16, "act_bits": 16, "data_type": "float", "act_data_type": "float"}


class AutoRoundModifier(_AutoRoundModifier):
    """
    Tune roundings like llm-compressor's AutoRoundModifier, for plans of several bit widths and
    asymmetric weights too; recipes that name `AutoRoundModifier` get this class once casp_plugin is
    imported. Fields and lifecycle are the same.

    llm-compressor 0.14 looks for targets among the names inside a decoder layer: whole names, as in
    every plan, match none, and all layers are tuned under the first scheme. It takes over
    AutoRound's scales but not its zero points, so that asymmetric weights are clamped to a wrong
    range. Norms and all else of a float32 model's layers are rounded to bfloat16. See
    ``system.patches``.
    """

    #: parameters of decoder layers in float32 by name; None for weights that are rounded
    _wide: dict[str, torch.Tensor | None] = PrivateAttr(default_factory=dict)

    def on_calibration_start(self, state: State, event: Event, **kwargs) -> None:
        """Keep what AutoRound would round to bfloat16."""
        super().on_calibration_start(state, event, **kwargs)
        for layer in decoder_layers(state.model):
            for owner, module in state.model.get_submodule(layer).named_modules(prefix=layer):
                for leaf, value in module.named_parameters(recurse=False):
                    if value.dtype == torch.float32:
                        rounded = is_module_quantized(module) and leaf == "weight"
                        kept = None if rounded else value.detach().to("cpu", copy=True)
                        self._wide[f"{owner}.{leaf}"] = kept

    def on_calibration_end(self, state: State, event: Event, **kwargs) -> None:
        """Give back what AutoRound has rounded to bfloat16, beside the weights that it tuned."""
        super().on_calibration_end(state, event, **kwargs)
        for name, value in self._wide.items():
            owner, _, leaf = name.rpartition(".")
            module = state.model.get_submodule(owner)
            current = getattr(module, leaf)
            if current.dtype == torch.float32:
                continue
            wide = current.float() if value is None else value.to(current.device)
            del module._parameters[leaf]  # whose place in an offloading cache keeps its dtype
            module._parameters[leaf] = nn.Parameter(wide, requires_grad=False)
            if value is None:
                round_weight(module)
        self._wide.clear()

    def _match_autoround_targets(self, model: nn.Module) -> set[nn.Module]:
        """Return the targets by their names in the whole model.

        :param model: a decoder layer, or its wrapper
        """
        return {
            module
            for module in model.modules()
            if is_match(
                getattr(module, "_tmp_name", ""), module, self.resolved_targets, self.ignore
            )
        }

    def _build_layer_config_for_autoround(self, wrapped_model: nn.Module) -> dict[str, dict]:
        """Return by layer the schemes that differ from the first; layers without one stay as they
        are."""
        config = super()._build_layer_config_for_autoround(wrapped_model)
        targets = self._match_autoround_targets(wrapped_model)
        for name, module in wrapped_model.named_modules():
            if isinstance(module, nn.Linear) and module not in targets:
                config[name] = dict(_UNQUANTIZED)
        return config

    def _postprocess_qparams(
        self, model: nn.Module, llmc_registered_qparams: dict[str, dict[str, torch.Tensor]]
    ) -> None:
        """Take AutoRound's zero points over, then its scales, as llm-compressor does."""
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
    Move zero points from AutoRound's range of codes to that of compressed-tensors.

    :param zero_point: (rows, groups), in 0 to 2^bits - 1
    :param bits: width of the codes
    :return: (rows, groups), in -2^(bits-1) to 2^(bits-1) - 1
    :raises ValueError: if a zero point lies outside its range
    """
    wrong = ~((zero_point >= 0) & (zero_point < 2**bits))  # NaN is wrong, too
    if wrong.any():
        first = zero_point[wrong].flatten()[0].item()
        raise ValueError(f"AutoRound's zero points must lie in 0..{2**bits - 1}, got {first}")
    return zero_point - 2 ** (bits - 1)
