"""Modifiers for llm-compressor recipes; importing this package needs llm-compressor."""

from llmcompressor.modifiers import ModifierFactory

from casp_plugin.modifiers.auto_round import AutoRoundModifier
from casp_plugin.modifiers.base import CaspModifier
from casp_plugin.modifiers.bit_allocation import BitAllocationModifier
from casp_plugin.modifiers.codebook import (
    AQLMModifier,
    CodebookModifier,
    QuIPSharpModifier,
    TrellisModifier,
)
from casp_plugin.modifiers.gptq import GPTQModifier
from casp_plugin.modifiers.low_rank_qk import LowRankQKModifier
from casp_plugin.modifiers.recipe_run import estimate_recipe, plan_recipe
from casp_plugin.modifiers.tuning import TuningModifier
from casp_plugin.statistics import tracing
from casp_plugin.system import patches

__all__ = [
    "AQLMModifier",
    "AutoRoundModifier",
    "BitAllocationModifier",
    "CaspModifier",
    "CodebookModifier",
    "GPTQModifier",
    "LowRankQKModifier",
    "QuIPSharpModifier",
    "TrellisModifier",
    "TuningModifier",
    "estimate_recipe",
    "plan_recipe",
]

for _modifier in (
    LowRankQKModifier,
    BitAllocationModifier,
    GPTQModifier,
    AutoRoundModifier,
    TrellisModifier,
    QuIPSharpModifier,
    AQLMModifier,
    TuningModifier,
):
    ModifierFactory.register(_modifier.__name__, _modifier)

patches.apply(tracing.trace)
