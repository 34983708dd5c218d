"""GPTQModifier of llm-compressor, with targets that make up for what layers before have changed."""

import torch
from compressed_tensors.offload import update_offload_parameter
from compressed_tensors.utils import match_named_modules
from llmcompressor.core import Event, State
from llmcompressor.modifiers.gptq import GPTQModifier as _GPTQModifier
from loguru import logger
from pydantic import Field, PrivateAttr
from torch import nn

from casp_plugin.maths.block_ldl import corrected, dampened
from casp_plugin.model.low_rank_linear import is_up
from casp_plugin.model.units import decoder_layers
from casp_plugin.modifiers.layer_inputs import LayerInputs
from casp_plugin.system.distributed import barrier

__all__ = ["GPTQModifier"]

#: share of the mean diagonal that is added to a second moment where none is given
_DAMPENING = 0.01


class GPTQModifier(_GPTQModifier):
    """
    Rounds weights like llm-compressor's GPTQModifier, towards targets that make up for the inputs
    which the layers quantized before have changed, if asked to (asymmetric calibration: GPTAQ,
    arXiv 2504.02692). Recipes that name `GPTQModifier` get this class once casp_plugin is imported.
    The other fields and the lifecycle are the same.

    :param correction: share of the change of a layer's inputs that its weights make up for; 1 for
        least squares, which fits the calibration data too well. It runs every decoder layer on the
        dense model's inputs as well
    """

    # without it the recipe beside a checkpoint is llm-compressor's own
    correction: float = Field(default=0.0, ge=0, le=1, exclude_if=lambda share: share == 0)

    _names: list[str] = PrivateAttr(default_factory=list)
    _inputs: LayerInputs | None = PrivateAttr(default=None)
    _corrected: int = PrivateAttr(default=0)

    def on_calibration_start(self, state: State, event: Event, **kwargs) -> None:
        """Start to collect the second moments of inputs, and of their changes."""
        super().on_calibration_start(state, event, **kwargs)
        if not self.correction:
            return
        matched = match_named_modules(state.model, self.resolved_targets, self.ignore)
        self._names = [
            name
            for name, module in matched
            if isinstance(module, nn.Linear)
            and getattr(module, "quantization_scheme", None) is not None
            # the latent of factors is what a corrected `down` puts out
            and not is_up(state.model, name)
            # the dense model may send other tokens to an expert
            and ".experts." not in name
        ]
        layers = decoder_layers(state.model)
        self._inputs = LayerInputs(self, state.model, self._names, layers, True, in_order=False)

    def on_sequential_epoch_end(
        self, state: State, event: Event, modules: list[nn.Module], **kwargs
    ) -> None:
        """Change the weights of the layers that were just calibrated, and round them."""
        if self._inputs is not None:
            here = set(modules)
            names = [name for name in self._names if state.model.get_submodule(name) in here]
            self._correct(state.model, names)
        super().on_sequential_epoch_end(state, event, modules, **kwargs)

    def on_calibration_end(self, state: State, event: Event, **kwargs) -> None:
        """Remove the hooks."""
        super().on_calibration_end(state, event, **kwargs)
        if self._inputs is not None:
            self._inputs.close()
            self._inputs = None
            if not self._corrected:
                logger.warning(
                    "GPTQModifier.correction changed nothing: no layer saw what a quantized one "
                    "before it puts out, as layers do in the sequential pipeline"
                )

    @torch.no_grad()
    def _correct(self, model: nn.Module, names: list[str]) -> None:
        """Change the weights of layers that were calibrated together."""
        changed: list[tuple[nn.Linear, torch.Tensor]] = []
        for known in self._inputs.stages(names):
            moments: dict[int, torch.Tensor] = {}  # dampened, by the identity of their statistics
            for name, statistics in known.items():
                change = None if statistics is None else statistics.mean_change
                if change is None or not change.any():
                    continue
                if id(statistics) not in moments:
                    moment = dampened(statistics.mean_moment, self.dampening_frac or _DAMPENING)
                    moments[id(statistics)] = moment
                linear, moment = model.get_submodule(name), moments[id(statistics)]
                weight = corrected(linear.weight.float(), moment, change, self.correction)
                changed.append((linear, weight.to(linear.weight.dtype)))
        barrier()  # processes share the memory of an offloaded model: all have read
        for linear, weight in changed:
            update_offload_parameter(linear, "weight", weight)
        barrier()
        self._corrected += len(changed)
