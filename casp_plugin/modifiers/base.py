"""The base of the plugin's modifiers: fields, hooks, and the context of the recipe around them.

``recipe_run`` calls the hooks, ``lifecycle`` joins them to llm-compressor's.
"""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.transform import TransformConfig
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization import QuantizationMixin
from llmcompressor.modifiers.transform import QuIPModifier, SpinQuantModifier
from pydantic import BeforeValidator, Field, PrivateAttr
from torch import nn

from casp_plugin.model.components import (
    LANGUAGE,
    component_of,
    find_components,
    merged_patterns,
    outside_language,
)
from casp_plugin.model.latent import Latent
from casp_plugin.model.low_rank_linear import LowRankLinear
from casp_plugin.model.transforms import check_transforms, input_block
from casp_plugin.plan.plan import CompressionPlan
from casp_plugin.statistics.layer_notes import LayerNotes
from casp_plugin.statistics.statistics import Request, Statistics

__all__ = ["CaspModifier", "Offers", "RecipeContext", "Targets", "casp_modifiers", "without_data"]


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


#: names of modules or `re:` patterns; one alone needs no list
Targets = Annotated[list[str], BeforeValidator(_listed)]


@dataclass(frozen=True)
class RecipeContext:
    """The recipe around a modifier, and the layers that the first batch of the data reaches.

    :param modifiers: all modifiers of the recipe, in order
    :param component_patterns: parts of module paths that begin a component, beside the built-in
        table
    :param transforms: rotations of inputs that the recipe will apply once the plan is made
    :param other_quantizers: quantizers of the recipe that have a config of their own
    :param reached: linears that the first batch reaches; None before it has run
    :param uncalled: linears whose weights the model reads without calling them
    """

    modifiers: Sequence[Modifier]
    component_patterns: Mapping[str, Sequence[str]]
    transforms: TransformConfig | None
    other_quantizers: Sequence[QuantizationConfig]
    reached: frozenset[str] | None = None
    uncalled: frozenset[str] = frozenset()

    @classmethod
    def of(cls, modifiers: Sequence[Modifier]) -> "RecipeContext":
        """Return the context of a recipe before any data has run.

        :raises ValueError: if its modifiers disagree, or its transforms do not go with a plan
        """
        own = casp_modifiers(modifiers)
        weights = {modifier.image_weight for modifier in own} - {None}
        if len(weights) > 1:
            raise ValueError(
                f"image_weight must be the same in all modifiers, got {sorted(weights)}"
            )
        patterns = merged_patterns(modifier.component_patterns for modifier in own)
        return cls(modifiers, patterns, _transforms(modifiers), _other_quantizers(modifiers))

    def following(self, modifier: Modifier) -> list[Modifier]:
        """Return the modifiers that come after one of the recipe."""
        place = next(i for i, other in enumerate(self.modifiers) if other is modifier)
        return list(self.modifiers[place + 1 :])

    def name_of(self, modifier: Modifier) -> str:
        """Return the class name of a modifier, numbered from the second one of its class on."""
        kin = [other for other in self.modifiers if type(other) is type(modifier)]
        number = next(i for i, other in enumerate(kin, 1) if other is modifier)
        name = type(modifier).__name__
        return name if number == 1 else f"{name} {number}"

    def component_of(self, name: str) -> str:
        """Return the component that a module lies in."""
        return component_of(name, self.component_patterns)

    def outside_language(self, model: nn.Module) -> list[str]:
        """Return the outermost modules that are not of the language model."""
        names = (name for name, _ in model.named_modules())
        return outside_language(names, self.component_patterns)

    def input_block(self, name: str, module: nn.Linear | LowRankLinear) -> int:
        """Return the size of the Hadamard blocks by which a transform of the recipe rotates the
        input of a layer, of its `down` where it is factored; 1 without a transform."""
        if isinstance(module, LowRankLinear):
            name, module = f"{name}.down", module.latent
        return input_block(self.transforms, name, module, module.in_features)


@dataclass
class Offers:
    """Choices that LowRankQKModifier leaves to BitAllocationModifier, for the layers in hand.

    :param latents: layers that may become factors, of the model that the same call gets
    :param rank_multiple: ranks are multiples of this; None for the largest group size
    :param pending: linears without a price until ranks are known, after all layers were seen
    """

    latents: list[Latent] = field(default_factory=list)
    rank_multiple: int | None = None
    pending: frozenset[str] = frozenset()


class CaspModifier(Modifier):
    """A modifier that decides on a plan and changes the model before calibration starts.

    The first one of a recipe checks the whole recipe on a copy of the model without weights and
    runs the calibration data once, for all of them. All write layer notes, one decoder layer after
    the other, then decide in turn.

    :param components: parts of a multimodal model that this modifier works on: `language`,
        `vision`, `connector`, `audio`
    :param component_patterns: parts of module paths (regular expressions) that begin a component,
        where the built-in table knows none, for instance `{vision: [my_encoder]}`. The patterns of
        any modifier count for all modifiers of the recipe
    :param image_weight: weight of a token that stands for an image in the statistics of layers'
        inputs, a token of text having 1; the same in all modifiers of a recipe that give it
    :param cache_dir: folder that keeps layer notes. A run that died goes on from there, and another
        run of the same model, data, recipe and seed, whatever its budget, measures nothing; the
        folder of any modifier is for all of the recipe
    :param cache_limit: size of this folder in GB at most; the longest unused entries go first
    """

    #: place in a recipe: 0 chooses ranks and widths, 1 encodes weights at these, 2 tunes the result
    stage: ClassVar[int] = 0

    components: list[str] = Field(default_factory=lambda: [LANGUAGE], min_length=1)
    component_patterns: dict[str, list[str]] = Field(default_factory=dict)
    image_weight: float | None = Field(default=None, ge=0)
    # of a machine, not of the recipe
    cache_dir: str | None = Field(default=None, exclude=True)
    cache_limit: float | None = Field(default=None, gt=0, exclude=True)

    _handed_over: list[tuple[Modifier, str]] = PrivateAttr(default_factory=list)

    def see_dense(self, model: nn.Module) -> None:
        """See the model before any modifier of the recipe changes it."""

    @abstractmethod
    def request(self, model: nn.Module, context: RecipeContext) -> Request:
        """Return the statistics of the dense model that this modifier needs."""

    def chosen_linears(self, model: nn.Module, context: RecipeContext) -> Iterable[str]:
        """Return the names of the linears whose widths this modifier chooses."""
        return ()

    def check_reached(self, model: nn.Module, context: RecipeContext) -> None:
        """Refuse data whose first batch does not reach the layers that this modifier must see.

        :raises ValueError: if it misses one
        """

    def note(
        self,
        model: nn.Module,
        statistics: Statistics,
        notes: LayerNotes,
        offers: Offers,
        context: RecipeContext,
    ) -> None:
        """Write into the layer notes what will be needed of the layers in hand; nothing, here.

        :param statistics: of these layers; gone afterwards
        :param notes: of these layers, written to
        :param offers: of the modifiers before this one; those of this one are added
        """

    @abstractmethod
    def prepare(
        self,
        model: nn.Module,
        plan: CompressionPlan,
        notes: LayerNotes | None,
        offers: Offers,
        context: RecipeContext,
    ) -> None:
        """Decide, change ``model`` and the modifiers that follow, and record it on ``plan``.

        :param model: the model; on the meta device when only a plan is wanted
        :param plan: the plan so far
        :param notes: of all layers; None when only a plan is wanted: what needs them stays unknown
        :param offers: of the modifiers before this one; those of this one are added
        :raises ValueError: for any setting that cannot work on this model and recipe
        """

    @abstractmethod
    def without_data(self) -> "CaspModifier":
        """Return the same modifier with choices that need no data, to see where they would lead."""

    def note_facts(self, model: nn.Module, context: RecipeContext) -> dict[str, Any]:
        """Return all that layer notes depend on beside the statistics, as JSON values."""
        return self.settings

    def in_components(
        self, linears: dict[str, nn.Module], context: RecipeContext
    ) -> dict[str, nn.Module]:
        """Return the linears that lie in the components of this modifier, without those whose
        weights the model reads without calling them.

        :raises ValueError: if a component has none
        """
        linears = {n: linear for n, linear in linears.items() if n not in context.uncalled}
        known = find_components(linears, context.component_patterns)
        for component in self.components:
            if component not in known:
                raise ValueError(
                    f"{type(self).__name__}.components: no matching linear layer lies in "
                    f"{component!r}; there are some in {', '.join(known)}"
                )
        return {n: m for n, m in linears.items() if context.component_of(n) in self.components}

    @property
    def settings(self) -> dict[str, Any]:
        """Return this modifier's own fields, without llm-compressor's lifecycle."""
        return self.model_dump(mode="json", exclude_none=True, exclude=set(Modifier.model_fields))

    def hand_over(self, modifier: Modifier, field: str, value: Any) -> None:
        """Fill a field, None so far, of a modifier that follows, until the run is over."""
        setattr(modifier, field, value)
        self._handed_over.append((modifier, field))

    def take_back(self) -> None:
        """Empty the fields that were handed over: the recipe saved beside the checkpoint is the
        user's own."""
        for modifier, field_name in self._handed_over:
            setattr(modifier, field_name, None)


def casp_modifiers(modifiers: Iterable[Modifier]) -> list[CaspModifier]:
    """Return the modifiers of a recipe that are this plugin's."""
    return [modifier for modifier in modifiers if isinstance(modifier, CaspModifier)]


def without_data(modifiers: Iterable[Modifier]) -> list[Modifier]:
    """Return a copy of a recipe that asks for no data: where data would choose, factors keep a
    quarter in every layer and bits are spread evenly."""
    return [
        m.without_data() if isinstance(m, CaspModifier) else m.model_copy(deep=True)
        for m in modifiers
    ]


def _other_quantizers(modifiers: Iterable[Modifier]) -> list[QuantizationConfig]:
    quantizers = [m for m in modifiers if isinstance(m, QuantizationMixin)]
    return [q.resolved_config for q in quantizers if q.config_groups or q.scheme]


def _transforms(modifiers: Iterable[Modifier]) -> TransformConfig | None:
    """Return the rotations that a modifier of the recipe will apply once the plan is made.

    :raises ValueError: for transforms that do not go with a plan
    """
    transforms = None
    for modifier in modifiers:
        if isinstance(modifier, SpinQuantModifier):
            raise ValueError(
                "SpinQuantModifier rotates the weights after they were measured: run it in a call "
                "of oneshot of its own first"
            )
        if isinstance(modifier, QuIPModifier):
            modifier = modifier.model_copy(deep=True)
            modifier.on_initialize(None)  # fills its transform_config, touches nothing else
            transforms = modifier.transform_config
            try:
                check_transforms(transforms)
            except ValueError as error:
                raise ValueError(f"QuIPModifier: {error}") from None
    return transforms
