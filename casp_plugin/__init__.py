"""casp_plugin: CASP (CVPR 2025, arXiv 2503.05936) for llm-compressor, transformers and vLLM.

Importing it registers the modifiers with llm-compressor, where that is installed, and lets
transformers load compressed checkpoints. Its names are imported when they are first used.
"""

import sys
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

#: module of each name, those that need llm-compressor apart
_ANYWHERE = {
    "CompressionPlan": "casp_plugin.plan.plan",
    "LowRankLinear": "casp_plugin.model.low_rank_linear",
}
_WITH_LLM_COMPRESSOR = {
    "AutoRoundModifier": "casp_plugin.modifiers",
    "BitAllocationModifier": "casp_plugin.modifiers",
    "LowRankQKModifier": "casp_plugin.modifiers",
    "plan_recipe": "casp_plugin.modifiers",
}

__all__ = ["register", *_ANYWHERE, *(_WITH_LLM_COMPRESSOR if find_spec("llmcompressor") else ())]
__version__ = version("casp-plugin")


def register() -> None:
    """Register the modifiers with llm-compressor, where that is installed, and the loading of
    compressed checkpoints with transformers. Further calls change nothing."""
    from casp_plugin.checkpoint.load import register as register_loading

    register_loading()
    if find_spec("llmcompressor"):
        import_module("casp_plugin.modifiers")


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


def _is_command() -> bool:
    """Tell whether this process is ``casp`` or ``python -m casp_plugin``. A child process has the
    ``sys.argv`` of its parent, but another ``sys.orig_argv``."""
    program = (getattr(sys, "argv", None) or [""])[0]
    if program not in sys.orig_argv:
        return False
    following = sys.orig_argv[sys.orig_argv.index(program) + 1 :]
    is_script = Path(program).name in ("casp", "casp.exe") and not Path(program).is_dir()
    return is_script or (program == "-m" and following[:1] == [__name__])


# `casp --help` is to appear at once: the command registers when it has work to do (cli/app.py)
if not _is_command():
    register()
