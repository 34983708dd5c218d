"""casp_plugin: CASP (CVPR 2025, arXiv 2503.05936) for llm-compressor, transformers and vLLM.

Importing it lets recipes of llm-compressor name the modifiers, and transformers load compressed
checkpoints. It imports neither of the two, nor torch: their functions that look up classes import
ours before they run, and names of this package are imported when they are first used.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec

import wrapt

#: the modules that register when they are imported
_LOADING, _MODIFIERS = "casp_plugin.checkpoint.load", "casp_plugin.modifiers"

#: module of each name, those that need llm-compressor apart
_ANYWHERE = {
    "CompressionPlan": "casp_plugin.plan.plan",
    "CodebookLinear": "casp_plugin.model.codebook_linear",
    "LowRankLinear": "casp_plugin.model.low_rank_linear",
}
_WITH_LLM_COMPRESSOR = {
    "AutoRoundModifier": _MODIFIERS,
    "BitAllocationModifier": _MODIFIERS,
    "GPTQModifier": _MODIFIERS,
    "LowRankQKModifier": _MODIFIERS,
    "AQLMModifier": _MODIFIERS,
    "QuIPSharpModifier": _MODIFIERS,
    "TrellisModifier": _MODIFIERS,
    "TuningModifier": _MODIFIERS,
    "plan_recipe": _MODIFIERS,
}

__all__ = ["register", *_ANYWHERE, *(_WITH_LLM_COMPRESSOR if find_spec("llmcompressor") else ())]
__version__ = version("casp-plugin")


def register() -> None:
    """Register the modifiers with llm-compressor, where that is installed, and the loading of
    compressed checkpoints with transformers, at once. Further calls change nothing."""
    import_module(_LOADING)
    if find_spec("llmcompressor"):
        import_module(_MODIFIERS)


def __getattr__(name: str):
    """Import a public name.

    :raises ImportError: if it needs llm-compressor, which is not installed
    :raises AttributeError: if there is no such name
    """
    module = {**_ANYWHERE, **_WITH_LLM_COMPRESSOR}.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in __all__:
        raise ImportError(
            f"{__name__}.{name} needs llm-compressor: pip install 'casp-plugin[compress]'"
        )
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _import_before(ours: str, owner: str, name: str) -> None:
    """Let a function of a dependency import a module of ours before it runs.

    :param ours: the module of ours
    :param owner: the module of the dependency, imported already or later
    :param name: of the function in ``owner``
    """

    def run(function: Callable, instance: object, args: tuple, kwargs: dict):
        import_module(ours)
        return function(*args, **kwargs)

    if owner in sys.modules:
        import_module(owner)  # waits for another thread that is importing it
    wrapt.register_post_import_hook(
        lambda module: wrapt.wrap_function_wrapper(module, name, run), owner
    )


_import_before(_LOADING, "transformers.quantizers.auto", "AutoQuantizationConfig.from_dict")
_import_before(_LOADING, "transformers.quantizers.auto", "AutoHfQuantizer.from_config")
_import_before(_MODIFIERS, "llmcompressor.modifiers.factory", "ModifierFactory.create")
# recipes of modifiers that the factory did not make, too: they need the patches
_import_before(_MODIFIERS, "llmcompressor.recipe.recipe", "Recipe.create_instance")
