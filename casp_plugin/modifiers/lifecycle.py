"""The plugin's modifiers in llm-compressor's lifecycle.

llm-compressor initialises modifiers in recipe order, before any calibration event, and a quantizer
attaches its schemes there. So a modifier that replaces modules or chooses schemes does all its work
in ``on_initialize``.
"""

from llmcompressor.core import State, active_session
from loguru import logger

from casp_plugin.checkpoint.format import save_with_plan
from casp_plugin.model.experts import name_experts_as_on_disk
from casp_plugin.modifiers.base import CaspModifier, casp_modifiers
from casp_plugin.modifiers.recipe_run import RecipeRun

__all__ = ["OneshotModifier"]


class OneshotModifier(CaspModifier):
    """A casp modifier that runs in ``oneshot``.

    The first one of a recipe starts the run, which lies on llm-compressor's state for the others.
    """

    def on_initialize(self, state: State, **kwargs) -> bool:
        """Decide and change the model; the first modifier of the recipe measures for all.

        :raises ValueError: for any setting that cannot work on this model, recipe or data
        """
        run: RecipeRun | None = getattr(state, "casp_run", None)
        if run is None:
            modifiers = active_session().lifecycle.recipe.modifiers
            run = state.casp_run = RecipeRun.start(state.model, state.data.calib, modifiers)
            for modifier in casp_modifiers(modifiers):
                modifier.see_dense(state.model)
            name_experts_as_on_disk(state.model)
            save_with_plan(state.model, run.plan)
        run.prepare(self, state.model)
        if self is casp_modifiers(run.context.modifiers)[-1]:
            for warning in run.plan.warnings:
                logger.warning(warning)
            run.forget()  # the quantizer that follows needs the memory
        return True

    def on_finalize(self, state: State, **kwargs) -> bool:
        """Take back what was handed over."""
        self.take_back()
        return True
