"""Modifiers for llm-compressor recipes; importing this package needs llm-compressor."""

from llmcompressor.modifiers import ModifierFactory

from casp_plugin.modifiers import awq
from casp_plugin.modifiers.auto_round import AutoRoundModifier
from casp_plugin.modifiers.base import CaspModifier, estimate_recipe, plan_recipe
from casp_plugin.modifiers.bit_allocation import BitAllocationModifier
from casp_plugin.modifiers.low_rank_qk import LowRankQKModifier
from casp_plugin.statistics import tracing

__all__ = [
    "AutoRoundModifier",
    "BitAllocationModifier",
    "CaspModifier",
    "LowRankQKModifier",
    "estimate_recipe",
    "plan_recipe",
]

for _modifier in (LowRankQKModifier, BitAllocationModifier, AutoRoundModifier):
    ModifierFactory.register(_modifier.__name__, _modifier)

tracing.register()
awq.register()
