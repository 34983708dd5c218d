"""Checkpoints with random weights of the right shapes, for speed and memory of models whose weights
are not at hand."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform import QuIPModifier
from llmcompressor.recipe import Recipe
from torch import nn
from transformers import PreTrainedModel

from casp_plugin.checkpoint.format import copy_processor, save_with_plan
from casp_plugin.model.load import bare_model, read_model_config
from casp_plugin.modifiers.base import without_data
from casp_plugin.modifiers.recipe_run import shape_model
from casp_plugin.modifiers.rehearsal import planned_groups
from casp_plugin.plan.plan import CompressionPlan
from casp_plugin.system.files import whole_folder

__all__ = ["Shapes"]


@dataclass
class Shapes:
    """A model without weights, to be written with random ones.

    :param source: folder or Hugging Face id of its config
    :param bare: the model on the meta device, with factors where a recipe puts them
    :param plan: plan of the recipe; None for the model as it is
    :param transforms: modifiers of the recipe that rotate inputs
    """

    source: str
    bare: PreTrainedModel
    plan: CompressionPlan | None = None
    transforms: list[Modifier] = field(default_factory=list)

    @classmethod
    def of(
        cls, source: str, recipe: str | None = None, trust_remote_code: bool = False
    ) -> "Shapes":
        """Return the model of a config, as a recipe shapes it.

        :param source: folder with a ``config.json``, and with files of tokenizer and processor for
            a vision-language model; or a Hugging Face id
        :param recipe: casp recipe, applied as by :func:`without_data`; None for the model as it is
        :param trust_remote_code: whether Python code that comes with the model may run
        :raises ValueError: if the recipe cannot work on this model
        """
        config = read_model_config(source, trust_remote_code)
        config.dtype = config.dtype or torch.bfloat16
        bare = bare_model(config, trust_remote_code)
        bare.config._name_or_path = source
        if recipe is None:
            return cls(source, bare)
        modifiers = without_data(Recipe.create_instance(recipe).modifiers)
        bare, plan = shape_model(bare, modifiers)
        if not plan.decided:
            raise ValueError(f"{recipe} has no BitAllocationModifier, so that nothing is quantized")
        transforms = [modifier for modifier in modifiers if isinstance(modifier, QuIPModifier)]
        return cls(source, bare, plan, transforms)

    def write(self, folder: Path) -> None:
        """Write a checkpoint with random weights, whole or not at all; ``bare`` is used up."""
        model = self.bare.to_empty(device="cpu").requires_grad_(False)
        _fill(model)
        model.tie_weights()
        if self.plan is not None:
            rounding = QuantizationModifier(config_groups=planned_groups(self.plan))
            oneshot(model=model, recipe=[*self.transforms, rounding])
            save_with_plan(model, self.plan, probes=[])  # buffers are zero until a reload
        with whole_folder(folder) as partial:
            model.save_pretrained(partial)
            if self.plan is None:
                copy_processor(self.source, partial)


def _fill(model: nn.Module) -> None:
    """Fill matrices with random numbers, and norms, biases and buffers as before training."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.02, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    for buffer in model.buffers():
        buffer.zero_()
