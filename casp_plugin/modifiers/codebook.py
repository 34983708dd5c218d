"""Modifiers that store weights as codes of a codebook, layer by layer on the compressed inputs."""

from abc import abstractmethod
from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

import torch
from compressed_tensors.offload import OffloadCache, get_cache_init_kwargs, offload_module
from llmcompressor.core import Event, State
from loguru import logger
from pydantic import Field, PrivateAttr, ValidationError
from torch import nn
from tqdm import tqdm

from casp_plugin.maths.codecs.trellis import TrellisCode
from casp_plugin.maths.incoherence import Input
from casp_plugin.model.codebook_linear import CodebookLinear
from casp_plugin.model.codebook_schemes import (
    AdditiveScheme,
    CodebookScheme,
    LatticeScheme,
    TrellisScheme,
)
from casp_plugin.model.low_rank_linear import LowRankLinear, is_up
from casp_plugin.model.schemes import missing_kernel
from casp_plugin.model.units import OUTPUT_HEAD, decoder_layers, matched_linears
from casp_plugin.modifiers.base import Offers, RecipeContext, Targets, casp_modifiers
from casp_plugin.modifiers.layer_inputs import InputStatistics, LayerInputs
from casp_plugin.modifiers.lifecycle import OneshotModifier
from casp_plugin.modifiers.result_cache import ResultCache
from casp_plugin.plan.plan import Candidate, CompressionPlan, UnitPlan
from casp_plugin.pricing.candidates import stored_shapes
from casp_plugin.pricing.other_bytes import other_bytes
from casp_plugin.statistics.layer_notes import LayerNotes
from casp_plugin.statistics.statistics import Request

__all__ = ["AQLMModifier", "CodebookModifier", "QuIPSharpModifier", "TrellisModifier"]

#: tokens that gradients are taken from, by output of the widest layer
TOKENS_BY_OUTPUT = 10

Scheme = TypeVar("Scheme", bound=CodebookScheme)


class CodebookModifier(OneshotModifier):
    """A quantizer that stores weights as codes of a codebook.

    After BitAllocationModifier it runs at the chosen widths. Alone it needs ``bits``.

    :param bits: width of all weights, for a recipe without BitAllocationModifier
    :param targets: layers to quantize, in llm-compressor's matching syntax; after
        BitAllocationModifier those of its plan
    :param ignore: layers to leave unquantized although they match; by default the output head
    :param block: size of the Hadamard blocks at most; smaller powers of two where it does not
        divide a size. Tensor parallelism cuts between blocks
    :param dampening_frac: share of the mean diagonal of a second moment that is added to it
    :param output_metric: what an error at the outputs of a layer costs: by the second moment of the
        loss's gradient there (``fisher``), so that outputs make up for each other, or the same for
        all (``identity``)
    :param output_dampening_frac: share of the mean diagonal of that moment that is added to it;
        little of it trusts the moment, much of it is ``identity``
    :param correction: share of the change of a layer's inputs, through the layers compressed
        before it, that its weights make up for; 0 for none, 1 for least squares
    :param true_sequential: whether the linears of a decoder layer are compressed one after another,
        each on what the ones before it have changed, which runs the layer once more for each input
    """

    stage: ClassVar[int] = 1
    #: name of the codec of its schemes
    codec: ClassVar[str]

    bits: int | None = None
    targets: Targets = Field(default_factory=lambda: ["Linear"])
    ignore: list[str] = Field(default_factory=lambda: [OUTPUT_HEAD])
    block: int = 128
    dampening_frac: float = Field(default=0.01, gt=0)
    output_metric: Literal["fisher", "identity"] = "fisher"
    output_dampening_frac: float = Field(default=3.0, gt=0)
    correction: float = Field(default=0.5, ge=0, le=1)
    true_sequential: bool = True
    requires_calibration_data: bool = Field(default=True, exclude=True)

    _schemes: dict[str, CodebookScheme] = PrivateAttr(default_factory=dict)
    _seed: int = PrivateAttr(default=0)
    _metrics: dict[str, torch.Tensor] = PrivateAttr(default_factory=dict)
    _inputs: LayerInputs | None = PrivateAttr(default=None)
    _progress: tqdm | None = PrivateAttr(default=None)
    _cache: ResultCache | None = PrivateAttr(default=None)
    _decoded: list[CodebookLinear] = PrivateAttr(default_factory=list)

    @abstractmethod
    def scheme(self, bits: int) -> CodebookScheme:
        """Return the scheme of a width.

        :raises ValueError: if the codec has no such width
        """

    def _valid(self, scheme: type[Scheme], **fields) -> Scheme:
        """Return a scheme of this modifier.

        :raises ValueError: if a field, the width most likely, is not one that it can have
        """
        try:
            return scheme(**fields)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "bits"
            raise ValueError(
                f"{type(self).__name__} cannot have {field} {fields.get(field)!r}: {first['msg']}"
            ) from None

    def request(self, model: nn.Module, context: RecipeContext) -> Request:
        if self.output_metric == "identity":
            return Request()
        names = frozenset()
        if self.bits is not None:
            names = frozenset(self._own_linears(model, context))
        else:
            for modifier in casp_modifiers(context.modifiers):
                names |= frozenset(modifier.chosen_linears(model, context))
        widest = max((model.get_submodule(name).out_features for name in names), default=0)
        return Request(gradient_moments=names, gradient_tokens=TOKENS_BY_OUTPUT * widest)

    def prepare(
        self,
        model: nn.Module,
        plan: CompressionPlan,
        notes: LayerNotes | None,
        offers: Offers,
        context: RecipeContext,
    ) -> None:
        name = context.name_of(self)
        if context.transforms is not None:
            raise ValueError(f"{name} rotates weights by itself: leave QuIPModifier out")
        plan.settings[name] = self.settings
        if self.bits is not None:
            units = self._own_units(model, plan, context)
            plan.units += units
            plan.other_bytes = other_bytes(model, plan, None, context.other_quantizers)
        elif not plan.units:
            raise ValueError(f"{name}.bits: set it, or put BitAllocationModifier before")
        elif not plan.decided:
            return
        else:
            units = [unit for unit in plan.units if self._is_left(model, unit)]
            if not units:
                raise ValueError(f"{name}.bits: set it, for another quantizer runs at the plan's")
        schemes = {
            module: self.scheme(unit.choice.bits).fitting(shape)
            for unit in units
            for module, shape in unit.modules.items()
        }
        experts = [module for module in schemes if ".experts." in module]
        if experts:
            chooser = name if self.bits is not None else "BitAllocationModifier"
            raise ValueError(
                f"{name}: {experts[0]} is an expert, which codebooks cannot store yet: put "
                f"'re:.*experts.*' into {chooser}.ignore"
            )
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        shared = {f"{module}.weight" for module in schemes} & {*tied, *tied.values()}
        if shared:
            raise ValueError(
                f"{name}: {min(shared)} is tied to another weight, which codebooks cannot store: "
                "put its layer into ignore"
            )
        if notes is None:  # only shapes are wanted
            for module, scheme in schemes.items():
                model.set_submodule(
                    module, CodebookLinear.like(model.get_submodule(module), scheme)
                )
        else:
            self._schemes, self._seed = schemes, plan.seed or 0
            if self.output_metric == "fisher":
                self._metrics = notes.statistics.gradient_moments

    def _is_left(self, model: nn.Module, unit: UnitPlan) -> bool:
        """Tell whether a unit is of this modifier's codec, and no other one has taken it."""
        first = model.get_submodule(next(iter(unit.modules)))
        of_codec = unit.choice.codec == self.codec
        return of_codec and not isinstance(first, CodebookLinear)

    def without_data(self) -> "CodebookModifier":
        return self.model_copy(deep=True)

    def on_calibration_start(self, state: State, event: Event, **kwargs) -> None:
        """Start to collect the second moments of inputs."""
        layers = decoder_layers(state.model)
        # the latent of factors follows from the input of `down`
        read = [name for name in self._schemes if not is_up(state.model, name)]
        changes, in_order = self.correction > 0, self.true_sequential
        self._inputs = LayerInputs(self, state.model, read, layers, changes, in_order)
        self._cache = ResultCache(self.cache_dir) if self.cache_dir and self._schemes else None
        weights = sum(state.model.get_submodule(n).weight.numel() for n in self._schemes)
        self._progress = tqdm(desc="Encoding weights", total=weights, unit_scale=True)

    def on_sequential_epoch_end(
        self, state: State, event: Event, modules: list[nn.Module], **kwargs
    ) -> None:
        """Encode the layers that were just calibrated."""
        for module in self._decoded:  # of the layers before
            module.forget()
        self._decoded.clear()
        here = set(modules)
        names = [n for n in self._schemes if state.model.get_submodule(n) in here]
        self._encode(state.model, names)

    def on_calibration_end(self, state: State, event: Event, **kwargs) -> None:
        """Encode the layers that no token reached, and remove the hooks."""
        left = [
            name
            for name in self._schemes
            if not isinstance(state.model.get_submodule(name), CodebookLinear)
        ]
        self._encode(state.model, left)
        for module in self._decoded:
            module.forget()
        self._decoded.clear()
        self.remove_hooks()
        run = getattr(state, "casp_run", None)
        if run is not None and run.plan.calibration_tokens is None:  # nothing was measured before
            run.plan.calibration_tokens = self._inputs.tokens or None
        self._inputs.close()
        self._progress.close()
        if self._cache is not None:
            if self._cache.found:
                logger.info(f"{self._cache.found} weights were encoded before, by a run that ended")
            if self.cache_limit:
                self._cache.limit(int(self.cache_limit * 1e9))
        self._inputs = self._progress = self._cache = None
        self._metrics = {}

    @torch.no_grad()
    def _encode(self, model: nn.Module, names: list[str]) -> None:
        """Replace layers by their codes, in the order in which they read.

        :param names: of the layers, whole low-rank layers
        """
        ups = [name for name in names if is_up(model, name)]
        for known in self._inputs.stages(name for name in names if name not in ups):
            downs = self._encode_stage(model, known)
            for name in ups:
                layer = model.get_submodule(name.rpartition(".")[0])
                if layer.latent in downs:
                    self._encode_up(model, name, downs[layer.latent])

    def _encode_stage(
        self, model: nn.Module, known: dict[str, InputStatistics | None]
    ) -> dict[nn.Module, "_Down"]:
        """Replace layers by their codes, and return what their latents' readers need of them.

        :param known: statistics of their inputs by name
        """
        groups: dict[tuple, list[str]] = defaultdict(list)  # that read one input, by scheme
        for name, statistics in known.items():
            alone = name if statistics is None else id(statistics)
            groups[alone, self._schemes[name]].append(name)
        inputs: dict[tuple, Input] = {}
        downs = {}
        for (key, scheme), group in groups.items():
            weights = [model.get_submodule(name).weight.detach().float() for name in group]
            statistics = known[group[0]]
            at = key, scheme.tile, scheme.block
            if at not in inputs:
                inputs[at] = self._input(scheme, statistics, weights[0])
            change = None if statistics is None else statistics.mean_change
            coded = self._encoded(model, group, weights, inputs[at], change)
            for name, weight, tensors in zip(group, weights, coded, strict=True):
                layer = self._install(model, name, tensors)
                downs[layer] = _Down(inputs[at], weight, change)
        return downs

    def _encode_up(self, model: nn.Module, name: str, down: "_Down") -> None:
        """Fit the second factor to what the first one is by now, and encode it.

        ``U' = M H D'^T (D' H D'^T)^-1``, with M the weight that both factors stand for.
        """
        layer, scheme = model.get_submodule(name.rpartition(".")[0]), self._schemes[name]
        whole = layer.up.weight.float() @ down.dense  # (out, in)
        target = down.input.corrected(whole, down.change, self.correction)
        coded = layer.latent.weight.float()  # (rank, in)
        seen = down.input.moment @ coded.T  # (in, rank)
        latent = coded @ seen  # (rank, rank)
        input = scheme.input(latent, self._seed, self.dampening_frac)
        fitted = torch.linalg.solve(input.moment, (target @ seen).T).T  # (out, rank)
        self._install(model, name, self._encoded(model, [name], [fitted], input)[0])

    def _encoded(
        self,
        model: nn.Module,
        names: list[str],
        weights: list[torch.Tensor],
        input: Input,
        change: torch.Tensor | None = None,
    ) -> list[dict[str, torch.Tensor]]:
        """Return the tensors of layers that read one input, from a run before if it had the same.

        :param names: of the layers, all of one scheme
        :param weights: shape (out, in) each, float32
        :param change: of the input, see ``InputStatistics``
        """
        cache, scheme = self._cache, self._schemes[names[0]]
        metrics = self._output_metrics(model, names, weights)
        if cache is not None:
            facts = scheme.model_dump_json(), self._seed, self.correction
            key = cache.key(facts, [input.moment, change, *weights, *(metrics or ())])
            known = cache.read(key)
            if known is not None:
                return known
        coded = scheme.encode(weights, input, self._seed, change, self.correction, metrics)
        if cache is not None:
            cache.keep(key, coded)
        return coded

    def _output_metrics(
        self, model: nn.Module, names: list[str], weights: list[torch.Tensor]
    ) -> list[torch.Tensor] | None:
        """Return the metrics of the outputs of layers, dampened, shape (out, out) each; None for
        identities.

        :param weights: of the layers
        """
        if not self._metrics:
            return None
        metrics = []
        for name, weight in zip(names, weights, strict=True):
            metric = self._output_metric(model, name)
            identity = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
            size = 0.0 if metric is None else metric.diagonal().mean().item()
            if size > 0:
                metric = metric.to(weight) / size
                metrics.append(metric + self.output_dampening_frac * identity)
            else:  # the loss does not depend on it
                metrics.append(identity)
        return metrics

    def _output_metric(self, model: nn.Module, name: str) -> torch.Tensor | None:
        """Return E[g g^T] of the outputs of a layer, or of a factor."""
        parent, _, leaf = name.rpartition(".")
        layer = model.get_submodule(parent)
        if not isinstance(layer, LowRankLinear):
            return self._metrics.get(name)
        if leaf == "up":
            return self._metrics.get(parent)
        through = None
        for reader_name, reader in model.named_modules():
            reads = isinstance(reader, LowRankLinear) and reader.latent is layer.latent
            if reads and reader_name in self._metrics:
                up = reader.up.weight.float()  # (out, rank)
                own = up.T @ self._metrics[reader_name].to(up) @ up
                through = own if through is None else through + own
        return through

    def _input(
        self, scheme: CodebookScheme, known: InputStatistics | None, weight: torch.Tensor
    ) -> Input:
        """Return the input of weights; of unit variance where no token reached them."""
        if known is None:
            moment = torch.eye(weight.shape[1], device=weight.device)
        else:
            moment = known.mean_moment
        return scheme.input(moment, self._seed, self.dampening_frac)

    def _install(
        self, model: nn.Module, name: str, tensors: dict[str, torch.Tensor]
    ) -> CodebookLinear:
        """Put a coded layer in the place of a dense one."""
        linear = model.get_submodule(name)
        layer = CodebookLinear.like(linear, self._schemes[name])
        for leaf, value in tensors.items():
            getattr(layer, leaf).copy_(value)
        self._decoded.append(layer)
        if isinstance(linear._parameters, OffloadCache):
            offload_module(layer, **get_cache_init_kwargs(linear))
        self._inputs.replace(name, layer)
        self._progress.update(linear.weight.numel())
        return layer

    def _own_linears(self, model: nn.Module, context: RecipeContext) -> dict[str, nn.Module]:
        """Return the linears that a modifier with ``bits`` codes, by name."""
        field = f"{type(self).__name__}.targets"
        return self.in_components(matched_linears(model, self.targets, self.ignore, field), context)

    def _own_units(
        self, model: nn.Module, plan: CompressionPlan, context: RecipeContext
    ) -> list[UnitPlan]:
        """Return a unit for every layer, all of one width.

        :raises ValueError: if a layer has a width already
        """
        name = type(self).__name__
        taken = {module for unit in plan.units for module in unit.modules}
        matched = self._own_linears(model, context)
        scheme = self.scheme(self.bits)
        units = []
        for linear, module in matched.items():
            shapes = stored_shapes({linear: module})
            if twice := taken & shapes.keys():
                raise ValueError(
                    f"{name}.targets: another modifier before it codes {min(twice)} already"
                )
            size = 0
            for stored, shape in shapes.items():
                scheme.fitting(shape).check(stored, shape)
                size += scheme.stored_bytes(shape, model.get_submodule(stored).weight.dtype)
            candidate = Candidate(
                bits=scheme.bits,
                group_size=-1,
                bytes=size,
                codec=scheme.codec,
                needs=missing_kernel(scheme),
            )
            units.append(
                UnitPlan(
                    name=linear,
                    modules=shapes,
                    weights=module.in_features * module.out_features,
                    component=context.component_of(linear),
                    importance=1.0,
                    candidates=[candidate],
                    chosen=0,
                )
            )
        return units


@dataclass(frozen=True)
class _Down:
    """A layer that was encoded, of which another one may read the latent.

    :param input: of the layer
    :param dense: its weight before, shape (out, in)
    :param change: of its input, see ``InputStatistics``
    """

    input: Input
    dense: torch.Tensor
    change: torch.Tensor | None


class TrellisModifier(CodebookModifier):
    """
    Stores weights as trellis codes (QTIP, arXiv 2406.11235): 1 to 8 bits a weight, rounded by
    BlockLDLQ on weights that are rotated at random on both sides.

    Sample yaml:

    ```yaml
    casp_stage:
      casp_modifiers:
        BitAllocationModifier:
          average_bits: 2.25
          candidates: [1, 2, 3, 4, 5, 6]
          granularity: matrix
        TrellisModifier: {}
    ```

    Lifecycle:

    - on_initialize
        - take the widths of the plan, or make one of a single width
    - on_calibration_start
        - add hooks that collect second moments of inputs
    - on_sequential_epoch_end
        - encode weights, and replace their layers
    - on_calibration_end
        - remove the hooks

    :param state_bits: L, bits that every weight is read from; each one more doubles the time that
        encoding takes and gains less than the one before. Decoding takes the same time
    :param code: function from these bits to a value
    :param columns: columns of a tile of 256 weights, more where its rows do not divide the outputs;
        fewer round better
    """

    codec: ClassVar[str] = "trellis"

    state_bits: int = Field(default=12, ge=10, le=16)
    code: TrellisCode = "mul1"
    columns: Literal[4, 8, 16] = 4

    def scheme(self, bits: int) -> TrellisScheme:
        return self._valid(
            TrellisScheme,
            bits=bits,
            block=self.block,
            state_bits=self.state_bits,
            code=self.code,
            columns=self.columns,
        )


class QuIPSharpModifier(CodebookModifier):
    """
    Stores weights as lattice codes (QuIP#, arXiv 2402.04396), without its fine-tuning: 2, 3 or 4
    bits a weight, rounded by BlockLDLQ on weights that are rotated at random on both sides. Sample
    and lifecycle are those of TrellisModifier.
    """

    codec: ClassVar[str] = "e8p"

    def scheme(self, bits: int) -> LatticeScheme:
        return self._valid(LatticeScheme, bits=bits, block=self.block)


class AQLMModifier(CodebookModifier):
    """
    Stores weights as sums of vectors from codebooks that are learned for each weight (AQLM, arXiv
    2401.06118): 1 to 8 bits a weight and the codebooks. Sample and lifecycle are those of
    TrellisModifier; nothing is rotated.

    :param code_bits: bits of a code. 8: one codebook for each bit of a weight, of 4 kB; 16: one
        codebook for each two bits, of 1 MB, for large models only
    """

    codec: ClassVar[str] = "aqlm"

    block: Literal[1] = 1
    output_metric: Literal["identity"] = "identity"
    code_bits: Literal[8, 16] = 8

    def scheme(self, bits: int) -> AdditiveScheme:
        return self._valid(AdditiveScheme, bits=bits, code_bits=self.code_bits)
