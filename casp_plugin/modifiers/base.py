"""What the plugin's modifiers share: one calibration pass, one plan, one lifecycle.

llm-compressor initialises modifiers in recipe order, before any calibration event, and a
quantizer attaches its schemes there. So a modifier that replaces modules or chooses schemes
does all its work in ``on_initialize``.
"""

import tempfile
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import psutil
import torch
from compressed_tensors.offload import set_onload_device
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.transform import TransformConfig
from llmcompressor.core import State, active_session
from llmcompressor.modeling.moe.context import moe_calibration_context
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization import QuantizationMixin
from llmcompressor.modifiers.transform import QuIPModifier, SpinQuantModifier
from llmcompressor.recipe import Recipe
from llmcompressor.utils.dev import get_main_device
from loguru import logger
from pydantic import Field, PrivateAttr
from torch import nn
from transformers import PreTrainedModel

from casp_plugin.checkpoint.format import save_with_plan
from casp_plugin.model.components import LANGUAGE, component_of, find_components, outside_language
from casp_plugin.model.experts import linearize_experts, name_experts_as_on_disk
from casp_plugin.model.load import skeleton
from casp_plugin.model.low_rank_linear import LowRankLinear, stored_tensors
from casp_plugin.model.transforms import check_transforms, input_block
from casp_plugin.modifiers.rehearsal import find_copied, rehearse
from casp_plugin.modifiers.run_estimate import Data, Estimate, estimate
from casp_plugin.plan.plan import CompressionPlan, CopiedTensor
from casp_plugin.statistics.cache import MeasurementCache
from casp_plugin.statistics.layer_by_layer import measure, noted, try_first_batch
from casp_plugin.statistics.layer_notes import Measured
from casp_plugin.statistics.statistics import Request, Statistics
from casp_plugin.system.distributed import barrier, shared
from casp_plugin.system.machine import trim_memory

__all__ = ["CaspModifier", "estimate_recipe", "plan_recipe", "shape_model"]

_RECORDED = ("llmcompressor", "compressed-tensors", "transformers", "torch", "casp-plugin")


@dataclass
class _Run:
    """One compression: the plan under way and the measurements it rests on."""

    plan: CompressionPlan
    measured: Measured | None


class CaspModifier(Modifier):
    """A modifier that decides on a plan and changes the model before calibration starts.

    The first one of a recipe checks the whole recipe on a copy of the model without weights
    and runs the calibration data once, for all of them. All note down what they need of one
    decoder layer after the other, then each decides in turn.

    :param components: parts of a multimodal model that this modifier works on: `language`,
        `vision`, `connector`, `audio`
    :param component_patterns: parts of module paths (regular expressions) that begin a component,
        where the built-in table knows none, for instance `{vision: [my_encoder]}`. Those that any
        modifier gives count for all modifiers of the recipe
    :param image_weight: what a token that stands for an image counts in the statistics of layers'
        inputs, one of text being 1; the same in all modifiers of a recipe that give it
    :param cache_dir: folder that keeps what was measured, layer by layer. A run that died goes on
        from there, and another run of the same model, data, recipe and seed, whatever its budget,
        measures nothing; one in any modifier is for all of the recipe
    :param cache_limit: bytes that this folder may hold, in GB; what was used longest ago goes first
    """

    components: list[str] = Field(default_factory=lambda: [LANGUAGE], min_length=1)
    component_patterns: dict[str, list[str]] = Field(default_factory=dict)
    image_weight: float | None = Field(default=None, ge=0)
    # of a machine, not of the recipe
    cache_dir: str | None = Field(default=None, exclude=True)
    cache_limit: float | None = Field(default=None, gt=0, exclude=True)

    _handed_over: list[tuple[Modifier, str]] = PrivateAttr(default_factory=list)
    _transforms: TransformConfig | None = PrivateAttr(default=None)
    _patterns: dict[str, list[str]] = PrivateAttr(default_factory=dict)
    _beside: list[QuantizationConfig] = PrivateAttr(default_factory=list)
    # of the first batch of the data; None as long as nobody knows
    _reached: frozenset[str] | None = PrivateAttr(default=None)
    _read: frozenset[str] = PrivateAttr(default=frozenset())

    @abstractmethod
    def request(self, model: nn.Module, following: list[Modifier]) -> Request:
        """Statistics of the dense model that this modifier needs.

        :param following: modifiers that come later in the recipe
        """

    def check_reached(self, model: nn.Module) -> None:
        """Refuse data whose first batch does not reach what this modifier must see.

        :raises ValueError: if it misses one
        """

    @abstractmethod
    def note(
        self,
        model: nn.Module,
        statistics: Statistics,
        measured: Measured,
        following: list[Modifier],
    ) -> None:
        """Note down what will be needed of some layers whose statistics are there now.

        :param statistics: of these layers; gone afterwards
        :param measured: where to note it
        :param following: modifiers that come later in the recipe
        """

    @abstractmethod
    def prepare(
        self,
        model: nn.Module,
        plan: CompressionPlan,
        measured: Measured | None,
        following: list[Modifier],
    ) -> None:
        """Decide, change ``model`` and the modifiers that follow, and record it on ``plan``.

        :param model: the model; on the meta device when only a plan is wanted
        :param plan: the plan so far
        :param measured: what was noted down of all layers; None when only a plan is wanted: what
            needs it stays unknown
        :param following: modifiers that come later in the recipe
        :raises ValueError: for any setting that cannot work on this model and recipe
        """

    @abstractmethod
    def without_data(self) -> "CaspModifier":
        """Return the same modifier with choices that need no data, to see where they would lead."""

    def note_facts(self, model: nn.Module, following: list[Modifier]) -> dict[str, Any]:
        """What is noted down depends on, beside the statistics, as JSON values."""
        return self.settings

    def on_initialize(self, state: State, **kwargs) -> bool:
        modifiers = active_session().lifecycle.recipe.modifiers
        run = getattr(state, "casp_run", None)
        if run is None:
            run = state.casp_run = _start(state.model, state.data.calib, modifiers)
            name_experts_as_on_disk(state.model)
            save_with_plan(state.model, run.plan)
        self.prepare(state.model, run.plan, run.measured, _after(self, modifiers))
        if self is _own(modifiers)[-1]:
            for warning in run.plan.warnings:
                logger.warning(warning)
            run.measured = None  # the quantizer that follows needs the memory
        return True

    def on_finalize(self, state: State, **kwargs) -> bool:
        self.release()  # the recipe saved beside the checkpoint is the user's own
        return True

    def release(self) -> None:
        """Take back what was handed over."""
        for modifier, field in self._handed_over:
            setattr(modifier, field, None)

    def input_block(self, name: str, module: nn.Linear | LowRankLinear) -> int:
        """Size of the Hadamard blocks by which a transform of the recipe rotates the input of a
        layer, of its `down` where it is factored; 1 for none."""
        if isinstance(module, LowRankLinear):
            name, module = f"{name}.down", module.latent
        return input_block(self._transforms, name, module, module.in_features)

    def in_components(self, linears: dict[str, nn.Module]) -> dict[str, nn.Module]:
        """Those of some linears that lie in the components of this modifier, but for those whose
        weights the model reads without calling them.

        :raises ValueError: if a component has none
        """
        linears = {name: each for name, each in linears.items() if name not in self._read}
        found = find_components(linears, self._patterns)
        for component in self.components:
            if component not in found:
                raise ValueError(
                    f"{type(self).__name__}.components: no matching linear layer lies in "
                    f"{component!r}; there are some in {', '.join(found)}"
                )
        return {n: m for n, m in linears.items() if self.component_of(n) in self.components}

    def outside_language(self, model: nn.Module) -> list[str]:
        """Outermost modules that are not of the language model."""
        return outside_language((name for name, _ in model.named_modules()), self._patterns)

    def component_of(self, name: str) -> str:
        """The component that a module lies in."""
        return component_of(name, self._patterns)

    @property
    def settings(self) -> dict[str, Any]:
        """This modifier's own fields, without llm-compressor's lifecycle."""
        return self.model_dump(mode="json", exclude_none=True, exclude=set(Modifier.model_fields))

    def hand_over(self, modifier: Modifier, field: str, value: Any) -> None:
        """Fill a field, None so far, of a modifier that follows, until the run is over."""
        setattr(modifier, field, value)
        self._handed_over.append((modifier, field))


def plan_recipe(
    model: nn.Module,
    recipe: str | Recipe | list[Modifier],
    dataloader: Iterable[dict] | None = None,
    statistics: Statistics | None = None,
) -> CompressionPlan:
    """The plan that a recipe leads to, without quantizing anything.

    :param model: the model; it may live on the meta device if nothing is known about the data.
        Otherwise its q/k are replaced where the recipe says so. Experts become linear layers, as in
        oneshot
    :param recipe: anything that llm-compressor takes as a recipe
    :param dataloader: calibration batches; without them everything that needs statistics
        stays unknown
    :param statistics: what was measured before, instead of ``dataloader``
    :raises ValueError: for any setting that cannot work on this model
    """
    modifiers = _casp_modifiers(recipe)
    linearize_experts(model)
    with moe_calibration_context():  # all tokens through each, as in oneshot
        if dataloader is None and statistics is None:
            return _dry_run(model, modifiers)[1]
        run = _start(model, dataloader, modifiers, statistics)
        for modifier in _own(modifiers):
            modifier.prepare(model, run.plan, run.measured, _after(modifier, modifiers))
    for modifier in _own(modifiers):
        modifier.release()
    return run.plan


def estimate_recipe(
    model: nn.Module, recipe: str | Recipe | list[Modifier], data: Data
) -> Estimate:
    """What it takes to measure a model for a recipe, before anything is measured.

    :param model: the model; the meta device will do. Experts become linear layers, as in oneshot
    :param recipe: anything that llm-compressor takes as a recipe
    :param data: how much calibration data there will be
    :raises ValueError: for any setting that cannot work on this model
    """
    linearize_experts(model)
    modifiers = [modifier.model_copy(deep=True) for modifier in _casp_modifiers(recipe)]
    units = _dry_run(model, modifiers)[1].units
    resident = psutil.Process().memory_info().rss
    return estimate(model, _requested(model, modifiers), units, data, resident)


def shape_model(
    model: nn.Module, recipe: str | Recipe | list[Modifier]
) -> tuple[nn.Module, CompressionPlan]:
    """A copy of a model on the meta device with factors where a recipe puts them, and the plan.

    :param recipe: anything that llm-compressor takes as a recipe; what it can only choose by
        statistics stays as it is in the model
    :raises ValueError: for any setting that cannot work on this model
    """
    return _dry_run(model, _casp_modifiers(recipe))[:2]


def _casp_modifiers(recipe: str | Recipe | list[Modifier]) -> list[Modifier]:
    """Modifiers of a recipe.

    :raises ValueError: if none is of casp
    """
    modifiers = Recipe.create_instance(recipe).modifiers
    if not _own(modifiers):
        raise ValueError(
            "the recipe holds neither LowRankQKModifier nor BitAllocationModifier: "
            f"{[type(modifier).__name__ for modifier in modifiers]}"
        )
    return modifiers


def _start(
    model: nn.Module,
    dataloader: Iterable | None,
    modifiers: list[Modifier],
    statistics: Statistics | None = None,
) -> _Run:
    """Check the recipe as a whole, then measure what all its modifiers need."""
    _, dry, warnings = _dry_run(model, modifiers)
    _check_finite(model)
    plan = _new_plan(model, dry.copied)
    plan.warnings += warnings
    if dataloader is not None and statistics is None:
        if torch.accelerator.is_available():  # as the pipeline of the quantizer will
            set_onload_device(model, get_main_device())
        plan.warnings += _try_first_batch(model, dataloader, modifiers)
    request = _requested(model, modifiers)

    def note(found: Statistics, measured: Measured) -> None:
        for modifier in _own(modifiers):
            modifier.note(model, found, measured, _after(modifier, modifiers))
            trim_memory()

    if not request:
        measured = Measured()
    elif statistics is not None:
        measured = noted(statistics, note)
    elif dataloader is not None:
        # without a cache, a temporary folder takes what would fill the memory; mapped files
        # outlive their names
        with tempfile.TemporaryDirectory(prefix="casp-") as folder:
            cache = _cache(shared(folder), model, dataloader, request, modifiers, plan)
            measured = measure(model, dataloader, request, cache, note)
            barrier()
            limits = [each.cache_limit for each in _own(modifiers) if each.cache_limit]
            if limits:
                cache.limit(int(min(limits) * 1e9))
    else:
        names = " and ".join(type(modifier).__name__ for modifier in _own(modifiers))
        raise ValueError(f"{names} need calibration data: pass a dataset to oneshot")
    plan.calibration_tokens = measured.statistics.tokens or None
    return _Run(plan, measured)


def _try_first_batch(
    model: nn.Module, dataloader: Iterable, modifiers: list[Modifier]
) -> list[str]:
    """Tell all modifiers what one batch reaches; return what a user should know."""
    request = _requested(model, modifiers)
    tried = try_first_batch(model, dataloader, request.gradients | request.gradient_moments)
    for modifier in _own(modifiers):
        modifier._reached, modifier._read = tried.reached, tried.read
        modifier.check_reached(model)
    if not tried.read:
        return []
    names = ", ".join(sorted(tried.read)[:4])
    return [
        f"{len(tried.read)} layers stay as they are, because the model reads their weights without "
        f"calling them: {names}"
    ]


def _requested(model: nn.Module, modifiers: list[Modifier]) -> Request:
    """What the modifiers of a recipe need measured."""
    request = Request()
    _share(modifiers)
    for modifier in _own(modifiers):
        request |= replace(
            modifier.request(model, _after(modifier, modifiers)),
            image_weight=modifier.image_weight,
        )
    return request


def _cache(
    folder: str,
    model: nn.Module,
    dataloader: Iterable,
    request: Request,
    modifiers: list[Modifier],
    plan: CompressionPlan,
) -> MeasurementCache:
    """
    :param folder: to use where the recipe names none
    """
    own = _own(modifiers)
    roots = [modifier.cache_dir for modifier in own if modifier.cache_dir]
    if not roots:
        return MeasurementCache(folder, {}, {})
    facts = {"model": plan.model, "versions": plan.versions, "seed": plan.seed}
    settings = {type(m).__name__: m.note_facts(model, _after(m, modifiers)) for m in own}
    cache = MeasurementCache.of(roots[0], model, dataloader, request, facts, settings)
    cache.begin()
    return cache


def _share(modifiers: list[Modifier]) -> None:
    """Tell every modifier what all of the recipe must know.

    :raises ValueError: if they disagree
    """
    weights = {modifier.image_weight for modifier in _own(modifiers)} - {None}
    if len(weights) > 1:
        raise ValueError(f"image_weight must be the same in all modifiers, got {sorted(weights)}")
    transforms, beside = _transforms(modifiers), _beside(modifiers)
    patterns: dict[str, list[str]] = {}
    for modifier in _own(modifiers):
        for component, found in modifier.component_patterns.items():
            patterns.setdefault(component, []).extend(found)
    for modifier in _own(modifiers):
        modifier._transforms, modifier._patterns = transforms, patterns
        modifier._beside = beside


def _beside(modifiers: list[Modifier]) -> list[QuantizationConfig]:
    """What quantizers of the recipe do by a config of their own, beside the plan."""
    quantizers = [each for each in modifiers if isinstance(each, QuantizationMixin)]
    return [each.resolved_config for each in quantizers if each.config_groups or each.scheme]


def _transforms(modifiers: list[Modifier]) -> TransformConfig | None:
    """Rotations that a modifier of the recipe will apply once the plan is made.

    :raises ValueError: for transforms that do not go with a plan
    """
    found = None
    for modifier in modifiers:
        if isinstance(modifier, SpinQuantModifier):
            raise ValueError(
                "SpinQuantModifier rotates the weights after they were measured: run it in a call "
                "of oneshot of its own first"
            )
        if isinstance(modifier, QuIPModifier):
            modifier = modifier.model_copy(deep=True)
            modifier.on_initialize(None)  # fills its transform_config, touches nothing else
            found = modifier.transform_config
            try:
                check_transforms(found)
            except ValueError as error:
                raise ValueError(f"QuIPModifier: {error}") from None
    return found


def _check_finite(model: nn.Module) -> None:
    for name, weight in model.named_parameters():
        leaf = name.rpartition(".")[2]  # scales of a quantizer before ours are not measured yet
        if not leaf.startswith("weight_") and not torch.isfinite(weight).all():
            raise ValueError(f"{name} of the model holds NaN or infinite values")


def _dry_run(
    model: nn.Module, modifiers: list[Modifier]
) -> tuple[nn.Module, CompressionPlan, list[str]]:
    """Plan on a copy without weights and on copies of the modifiers: nothing is changed.

    :return: the copy, its plan, and what a user should know of the checkpoint
    :raises ValueError: if the recipe cannot work on this model, or its checkpoint would not load
    """
    _check_order(modifiers)
    modifiers = [modifier.model_copy(deep=True) for modifier in modifiers]
    if not isinstance(model, PreTrainedModel):  # which has no checkpoint
        return *_planned_bare(model, modifiers, []), []
    copied = find_copied(model)
    bare, plan = _planned_bare(model, modifiers, copied)
    made_up = [m.without_data() if isinstance(m, CaspModifier) else m for m in modifiers]
    warnings = rehearse(*_planned_bare(model, made_up, copied), _beside(modifiers))
    plan.warnings += warnings
    return bare, plan, warnings


def _planned_bare(
    model: nn.Module, modifiers: list[Modifier], copied: list[CopiedTensor]
) -> tuple[nn.Module, CompressionPlan]:
    """A copy of a model without weights that modifiers have changed, and their plan."""
    plan, bare = _new_plan(model, copied), skeleton(model)
    _share(modifiers)
    for modifier in _own(modifiers):
        modifier.prepare(bare, plan, None, _after(modifier, modifiers))
    return bare, plan


def _check_order(modifiers: list[Modifier]) -> None:
    """
    :raises ValueError: if factors would be made after the bits were chosen, or bits twice
    """
    names = [type(modifier).__name__ for modifier in _own(modifiers)]
    if "BitAllocationModifier" in names[:-1]:
        raise ValueError(
            f"the recipe has {', then '.join(names)}: LowRankQKModifier comes first, then one "
            "BitAllocationModifier"
        )


def _new_plan(model: nn.Module, copied: list[CopiedTensor]) -> CompressionPlan:
    stored = sum(tensor.nbytes for tensor in stored_tensors(model).values())
    return CompressionPlan(
        model=getattr(model, "name_or_path", "") or type(model).__name__,
        versions={name: version(name) for name in _RECORDED},
        seed=torch.initial_seed(),
        copied=copied,
        original_bytes=stored + sum(each.bytes for each in copied),
    )


def _own(modifiers: list[Modifier]) -> list[CaspModifier]:
    return [modifier for modifier in modifiers if isinstance(modifier, CaspModifier)]


def _after(modifier: Modifier, modifiers: list[Modifier]) -> list[Modifier]:
    return modifiers[next(i for i, m in enumerate(modifiers) if m is modifier) + 1 :]
