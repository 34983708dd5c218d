"""casp_plugin: CASP (CVPR 2025, arXiv 2503.05936) for llm-compressor, transformers and vLLM.

Importing it registers the modifiers with llm-compressor, where that is installed, and lets
transformers load the checkpoints they lead to.
"""

from importlib.metadata import version
from importlib.util import find_spec

from casp_plugin.checkpoint.load import register
from casp_plugin.model.low_rank_linear import LowRankLinear
from casp_plugin.plan.plan import CompressionPlan

__all__ = ["CompressionPlan", "LowRankLinear"]
__version__ = version("casp-plugin")

register()

if find_spec("llmcompressor"):
    from casp_plugin.modifiers import (
        AutoRoundModifier,
        BitAllocationModifier,
        LowRankQKModifier,
        plan_recipe,
    )

    __all__ += ["AutoRoundModifier", "BitAllocationModifier", "LowRankQKModifier", "plan_recipe"]
