"""A recipe run on a model as a whole: checked, measured once, then decided modifier by modifier."""

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version

import psutil
import torch
from compressed_tensors.offload import set_onload_device
from llmcompressor.modeling.moe.context import moe_calibration_context
from llmcompressor.modifiers import Modifier
from llmcompressor.recipe import Recipe
from llmcompressor.utils.dev import get_main_device
from torch import nn
from transformers import PreTrainedModel

from casp_plugin.model.experts import linearize_experts
from casp_plugin.model.load import copy_without_weights
from casp_plugin.model.low_rank_linear import stored_tensors
from casp_plugin.modifiers.base import (
    CaspModifier,
    Offers,
    RecipeContext,
    casp_modifiers,
    without_data,
)
from casp_plugin.modifiers.rehearsal import find_copied, rehearse
from casp_plugin.modifiers.run_estimate import Data, Estimate, estimate
from casp_plugin.plan.plan import CompressionPlan, CopiedTensor
from casp_plugin.statistics.cache import StatisticsCache
from casp_plugin.statistics.layer_by_layer import measure, take_notes, try_first_batch
from casp_plugin.statistics.layer_notes import LayerNotes
from casp_plugin.statistics.statistics import Request, Statistics
from casp_plugin.system.distributed import barrier, shared
from casp_plugin.system.machine import trim_memory

__all__ = ["RecipeRun", "estimate_recipe", "plan_recipe", "shape_model"]

#: packages whose versions a plan records
_RECORDED = ("llmcompressor", "compressed-tensors", "transformers", "torch", "casp-plugin")


@dataclass
class RecipeRun:
    """One compression under way.

    :param context: the recipe, and what its modifiers may know of it
    :param plan: the plan so far
    :param notes: layer notes of all modifiers; None without data, and once all have decided
    :param offers: of the modifiers that have decided, to those that come later
    """

    context: RecipeContext
    plan: CompressionPlan
    notes: LayerNotes | None
    offers: Offers = field(default_factory=Offers)

    @classmethod
    def start(
        cls,
        model: nn.Module,
        dataloader: Iterable | None,
        modifiers: Sequence[Modifier],
        statistics: Statistics | None = None,
    ) -> "RecipeRun":
        """Check a recipe as a whole, then measure what all its modifiers need.

        :param dataloader: calibration batches
        :param statistics: measured before, instead of ``dataloader``
        :raises ValueError: if the recipe cannot work on this model and data
        """
        rehearsed = _dry_run(model, modifiers)
        _check_finite(model)
        plan = _new_plan(model, rehearsed.plan.copied)
        plan.warnings += rehearsed.warnings
        context = RecipeContext.of(modifiers)
        if dataloader is not None and statistics is None:
            if torch.accelerator.is_available():  # as the pipeline of the quantizer will
                set_onload_device(model, get_main_device())
            context = _with_first_batch(context, model, dataloader, plan)
        notes = _layer_notes(model, dataloader, statistics, context, plan)
        plan.calibration_tokens = notes.statistics.tokens or None
        return cls(context, plan, notes)

    def prepare(self, modifier: CaspModifier, model: nn.Module) -> None:
        """Let one modifier of the recipe decide and change the model."""
        modifier.prepare(model, self.plan, self.notes, self.offers, self.context)

    def forget(self) -> None:
        """Let go of all but the plan."""
        self.notes, self.offers = None, Offers()


def plan_recipe(
    model: nn.Module,
    recipe: str | Recipe | list[Modifier],
    dataloader: Iterable[dict] | None = None,
    statistics: Statistics | None = None,
) -> CompressionPlan:
    """Return the plan that a recipe leads to, without quantizing anything.

    :param model: the model; it may live on the meta device if nothing is known about the data.
        Otherwise its q/k are replaced where the recipe says so. Experts become linear layers, as in
        oneshot
    :param recipe: anything that llm-compressor takes as a recipe
    :param dataloader: calibration batches; without them everything that needs statistics
        stays unknown
    :param statistics: measured before, instead of ``dataloader``
    :raises ValueError: for any setting that cannot work on this model
    """
    modifiers = _modifiers_of(recipe)
    linearize_experts(model)
    with moe_calibration_context():  # every expert gets all tokens, as in oneshot
        if dataloader is None and statistics is None:
            return _dry_run(model, modifiers).plan
        run = RecipeRun.start(model, dataloader, modifiers, statistics)
        for modifier in casp_modifiers(modifiers):
            run.prepare(modifier, model)
    for modifier in casp_modifiers(modifiers):
        modifier.take_back()
    return run.plan


def estimate_recipe(
    model: nn.Module,
    recipe: str | Recipe | list[Modifier],
    data: Data,
    planned: CompressionPlan | None = None,
) -> Estimate:
    """Return the memory, disk and time that measuring a model for a recipe takes.

    :param model: the model; the meta device will do. Experts become linear layers, as in oneshot
    :param recipe: anything that llm-compressor takes as a recipe
    :param data: how much calibration data there will be
    :param planned: the plan of the recipe without data, where it is known already
    :raises ValueError: for any setting that cannot work on this model
    """
    linearize_experts(model)
    modifiers = [modifier.model_copy(deep=True) for modifier in _modifiers_of(recipe)]
    units = (planned or _dry_run(model, modifiers).plan).units
    resident = psutil.Process().memory_info().rss
    request = _requested(model, RecipeContext.of(modifiers))
    by_gptq = any(m.settings.get("rounding") == "gptq" for m in casp_modifiers(modifiers))
    return estimate(model, request, units, data, resident, by_gptq)


def shape_model(
    model: nn.Module, recipe: str | Recipe | list[Modifier]
) -> tuple[nn.Module, CompressionPlan]:
    """Return a copy of a model on the meta device with factors where a recipe puts them, and the
    plan.

    :param recipe: anything that llm-compressor takes as a recipe; choices that only statistics can
        make leave the model as it is
    :raises ValueError: for any setting that cannot work on this model
    """
    rehearsed = _dry_run(model, _modifiers_of(recipe))
    return rehearsed.bare, rehearsed.plan


def _modifiers_of(recipe: str | Recipe | list[Modifier]) -> list[Modifier]:
    """Return the modifiers of a recipe.

    :raises ValueError: if none is of casp
    """
    modifiers = Recipe.create_instance(recipe).modifiers
    if not casp_modifiers(modifiers):
        raise ValueError(
            "the recipe holds neither LowRankQKModifier nor BitAllocationModifier nor a quantizer "
            "of casp_plugin: "
            f"{[type(modifier).__name__ for modifier in modifiers]}"
        )
    return modifiers


@dataclass(frozen=True)
class _DryRun:
    """
    :param bare: copy of the model without weights, changed by the modifiers
    :param plan: as far as it can be known without data
    :param warnings: what a user should know of the checkpoint
    """

    bare: nn.Module
    plan: CompressionPlan
    warnings: Sequence[str] = ()


def _dry_run(model: nn.Module, modifiers: Sequence[Modifier]) -> _DryRun:
    """Plan on a copy without weights and on copies of the modifiers: nothing is changed.

    :raises ValueError: if the recipe cannot work on this model, or its checkpoint would not load
    """
    _check_order(modifiers)
    modifiers = [modifier.model_copy(deep=True) for modifier in modifiers]
    if not isinstance(model, PreTrainedModel):  # which has no checkpoint
        return _DryRun(*_planned_bare(model, modifiers, []))
    copied = find_copied(model)
    bare, plan = _planned_bare(model, modifiers, copied)
    others = RecipeContext.of(modifiers).other_quantizers
    warnings = rehearse(*_planned_bare(model, without_data(modifiers), copied), others)
    plan.warnings += warnings
    return _DryRun(bare, plan, warnings)


def _planned_bare(
    model: nn.Module, modifiers: Sequence[Modifier], copied: list[CopiedTensor]
) -> tuple[nn.Module, CompressionPlan]:
    """Return a copy of a model without weights that modifiers have changed, and their plan."""
    bare = copy_without_weights(model)
    run = RecipeRun(RecipeContext.of(modifiers), _new_plan(model, copied), None)
    for modifier in casp_modifiers(modifiers):
        run.prepare(modifier, bare)
    return bare, run.plan


def _check_order(modifiers: Sequence[Modifier]) -> None:
    """Check the order of the modifiers.

    :raises ValueError: if factors would be made after the bits were chosen, or bits twice
    """
    own = casp_modifiers(modifiers)
    deciding = [type(modifier).__name__ for modifier in own if modifier.stage == 0]
    stages = [modifier.stage for modifier in own]
    if stages != sorted(stages) or "BitAllocationModifier" in deciding[:-1]:
        names = ", then ".join(type(modifier).__name__ for modifier in own)
        raise ValueError(
            f"the recipe has {names}: LowRankQKModifier comes first, then one "
            "BitAllocationModifier, then quantizers, then TuningModifier"
        )


def _check_finite(model: nn.Module) -> None:
    for name, weight in model.named_parameters():
        leaf = name.rpartition(".")[2]  # scales of a quantizer before ours are not measured yet
        if not leaf.startswith("weight_") and not torch.isfinite(weight).all():
            raise ValueError(f"{name} of the model holds NaN or infinite values")


def _new_plan(model: nn.Module, copied: list[CopiedTensor]) -> CompressionPlan:
    stored = sum(tensor.nbytes for tensor in stored_tensors(model).values())
    return CompressionPlan(
        model=getattr(model, "name_or_path", "") or type(model).__name__,
        versions={name: version(name) for name in _RECORDED},
        seed=torch.initial_seed(),
        copied=copied,
        original_bytes=stored + sum(tensor.bytes for tensor in copied),
    )


def _with_first_batch(
    context: RecipeContext, model: nn.Module, dataloader: Iterable, plan: CompressionPlan
) -> RecipeContext:
    """Return the context with the layers that one batch reaches.

    :param plan: gets a warning where layers stay as they are
    :raises ValueError: if the batch misses a layer that a modifier must see
    """
    tried = try_first_batch(model, dataloader)
    context = replace(context, reached=tried.reached, uncalled=tried.read)
    for modifier in casp_modifiers(context.modifiers):
        modifier.check_reached(model, context)
    if tried.read:
        names = ", ".join(sorted(tried.read)[:4])
        plan.warnings.append(
            f"{len(tried.read)} layers stay as they are, because the model reads their weights "
            f"without calling them: {names}"
        )
    return context


def _requested(model: nn.Module, context: RecipeContext) -> Request:
    """Return the statistics that all modifiers of a recipe need."""
    request = Request()
    for modifier in casp_modifiers(context.modifiers):
        asked = modifier.request(model, context)
        request |= replace(asked, image_weight=modifier.image_weight)
    return request


def _layer_notes(
    model: nn.Module,
    dataloader: Iterable | None,
    statistics: Statistics | None,
    context: RecipeContext,
    plan: CompressionPlan,
) -> LayerNotes:
    """Return the notes of all modifiers on all layers, measured unless ``statistics`` are there.

    :raises ValueError: if they need data, and there is none
    """
    own = casp_modifiers(context.modifiers)
    request = _requested(model, context)

    def note(of_layers: Statistics, notes: LayerNotes) -> None:
        offers = Offers()
        for modifier in own:
            modifier.note(model, of_layers, notes, offers, context)
            trim_memory()

    if not request:
        return LayerNotes()
    if statistics is not None:
        notes = take_notes(statistics, note)
        notes.statistics.gradient_moments = statistics.gradient_moments
        return notes
    if dataloader is None:
        names = " and ".join(type(modifier).__name__ for modifier in own)
        raise ValueError(f"{names} need calibration data: pass a dataset to oneshot")
    # without a cache, a temporary folder takes what would fill the memory; mapped files
    # outlive their names
    with tempfile.TemporaryDirectory(prefix="casp-") as folder:
        cache = _cache(shared(folder), model, dataloader, request, context, plan)
        notes = measure(model, dataloader, request, cache, note)
        barrier()
        limits = [modifier.cache_limit for modifier in own if modifier.cache_limit]
        if limits:
            cache.limit(int(min(limits) * 1e9))
    return notes


def _cache(
    folder: str,
    model: nn.Module,
    dataloader: Iterable,
    request: Request,
    context: RecipeContext,
    plan: CompressionPlan,
) -> StatisticsCache:
    """Return the cache that the recipe names, or one in ``folder`` for this run only."""
    own = casp_modifiers(context.modifiers)
    roots = [modifier.cache_dir for modifier in own if modifier.cache_dir]
    if not roots:
        return StatisticsCache(folder, {}, {})
    facts = {"model": plan.model, "versions": plan.versions, "seed": plan.seed}
    settings = {context.name_of(m): m.note_facts(model, context) for m in own}
    cache = StatisticsCache.of(roots[0], model, dataloader, request, facts, settings)
    cache.begin()
    return cache
