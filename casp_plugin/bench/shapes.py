"""Checkpoints of the right shapes with random weights: speed and memory of models that are not at
hand."""

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform import QuIPModifier
from llmcompressor.recipe import Recipe
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from casp_plugin.checkpoint import copy_processor, save_with_plan
from casp_plugin.files import whole_folder
from casp_plugin.models import bare_model
from casp_plugin.modifiers import BitAllocationModifier, LowRankQKModifier
from casp_plugin.modifiers.base import shape_model
from casp_plugin.plan import CompressionPlan
from casp_plugin.schemes import weight_args

__all__ = ["Shapes", "without_data"]

#: share of the q/k parameters that factors keep where a recipe leaves it to the data
KEEP = 0.25
_OBSERVER = "memoryless_minmax"


@dataclass
class Shapes:
    """A model to make up.

    :param source: folder or Hugging Face id of its config
    :param bare: the model on the meta device, with factors where a recipe puts them
    :param plan: what the recipe makes of it; None for the model as it is
    :param transforms: modifiers of the recipe that rotate inputs
    """

    source: str
    bare: PreTrainedModel
    plan: CompressionPlan | None = None
    transforms: list[Modifier] = field(default_factory=list)

    @classmethod
    def of(cls, source: str, recipe: str | None = None) -> "Shapes":
        """
        :param source: folder with a ``config.json``, and files of tokenizer and processor for what
            takes images; or a Hugging Face id
        :param recipe: of casp, see :func:`without_data`; None for the model as it is
        :raises ValueError: if the recipe cannot work on this model
        """
        config = AutoConfig.from_pretrained(source)
        config.dtype = config.dtype or torch.bfloat16
        bare = bare_model(config)
        bare.config._name_or_path = source
        if recipe is None:
            return cls(source, bare)
        modifiers = without_data(Recipe.create_instance(recipe).modifiers)
        bare, plan = shape_model(bare, modifiers)
        if not plan.decided:
            raise ValueError(f"{recipe} has no BitAllocationModifier, so that nothing is quantized")
        transforms = [each for each in modifiers if isinstance(each, QuIPModifier)]
        return cls(source, bare, plan, transforms)

    def write(self, folder: Path) -> None:
        """Write a checkpoint with random weights, whole or not at all; ``bare`` is used up."""
        model = self.bare.to_empty(device="cpu").requires_grad_(False)
        _fill(model)
        model.tie_weights()
        if self.plan is not None:
            rounding = QuantizationModifier(config_groups=_groups(self.plan))
            oneshot(model=model, recipe=[*self.transforms, rounding])
            save_with_plan(model, self.plan)
        with whole_folder(folder) as partial:
            model.save_pretrained(partial)
            copy_processor(self.source, partial)


def without_data(modifiers: list[Modifier]) -> list[Modifier]:
    """A recipe that asks for no data: where data would choose, factors keep ``KEEP`` in every
    layer and bits are spread evenly."""
    made = []
    for modifier in modifiers:
        changed = {}
        if isinstance(modifier, LowRankQKModifier):
            changed = {"method": "svd", "rank_allocation": "uniform"}
            changed |= {"keep": KEEP} if modifier.proposes else {}
        elif isinstance(modifier, BitAllocationModifier):
            changed = {"importance": "uniform", "solver": "closed_form"}
        made.append(modifier.model_copy(update=changed, deep=True))
    return made


def _fill(model: nn.Module) -> None:
    """Random matrices; norms as they are before training."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.02, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    for buffer in model.buffers():
        buffer.zero_()


def _groups(plan: CompressionPlan) -> dict[str, QuantizationScheme]:
    """The schemes of a plan, rounding to nearest."""
    symmetric = plan.settings["BitAllocationModifier"]["symmetric"]
    targets, sizes = defaultdict(list), {}
    for unit in plan.units:
        targets[unit.choice.bits] += unit.modules
        sizes[unit.choice.bits] = unit.choice.group_size
    return {
        f"w{bits}": QuantizationScheme(
            targets=names, weights=weight_args(bits, sizes[bits], symmetric, _OBSERVER)
        )
        for bits, names in targets.items()
    }
