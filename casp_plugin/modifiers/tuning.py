"""TuningModifier: what a compressed model stores as real numbers is trained, codes stay."""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
from compressed_tensors.offload import set_onload_device
from compressed_tensors.transform import TransformConfig
from llmcompressor.core import Event, State
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.utils.dev import get_main_device
from llmcompressor.utils.helpers import DisableQuantization, disable_cache, eval_context
from loguru import logger
from pydantic import Field, PrivateAttr
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import RandomSampler
from tqdm import tqdm

from casp_plugin.maths.descent import Descent, descend
from casp_plugin.maths.predictions import TopPredictions, divergence, top_predictions
from casp_plugin.model.codebook_linear import CodebookLinear
from casp_plugin.model.load import mapped_copy
from casp_plugin.model.low_rank_linear import LowRankLinear
from casp_plugin.model.tunable import (
    Tunable,
    in_place,
    is_integer,
    round_weight,
    store,
    tunables,
)
from casp_plugin.model.units import decoder_layers
from casp_plugin.modifiers.base import Offers, RecipeContext
from casp_plugin.modifiers.layer_inputs import LayerCalls, LayerInputs
from casp_plugin.modifiers.lifecycle import OneshotModifier
from casp_plugin.modifiers.quantizer import Quantizer
from casp_plugin.modifiers.result_cache import ResultCache
from casp_plugin.plan.plan import CompressionPlan, TunedPart
from casp_plugin.statistics.derivatives import (
    checkpointed,
    no_parameter_gradients,
    predicting_text,
)
from casp_plugin.statistics.hooks import image_mask, on_device, token_mask
from casp_plugin.statistics.layer_notes import LayerNotes
from casp_plugin.statistics.statistics import Request
from casp_plugin.system.distributed import (
    gathered,
    is_source_process,
    number_of_ranks,
    shared,
    sum_over_ranks,
)

__all__ = ["TuningModifier"]

#: learning rate of rounding offsets, in codes
_ROUNDING_RATE = 0.01
#: entries of the dense model's predictions that are kept of a token
_KEPT_ENTRIES = 256


class TuningModifier(OneshotModifier):
    """
    Trains what a compressed checkpoint stores as real numbers, after any quantizer: scales of
    integers of up to 6 bits and rows of codebooks, norms, biases, factors in 16 bits. No byte is
    added, codes and formats stay (EfficientQAT, arXiv 2407.11062, has these two stages).

    Sample yaml:

    ```yaml
    casp_stage:
      casp_modifiers:
        BitAllocationModifier:
          average_bits: 2.25
        GPTQModifier: {}
        TuningModifier: {}
    ```

    Lifecycle:

    - on_initialize
        - keep the dense model, mapped from disk
    - on_calibration_start
        - note the dense model's predictions, add hooks
    - on_sequential_epoch_end
        - tune decoder layers, each on what the tuned ones before it put out
    - on_calibration_end
        - remove the hooks
    - on_finalize
        - tune scales and norms of the whole model

    Every tenth batch is held out. What does not make its loss less is left as it was, and the plan
    says so.

    :param block_epochs: passes over the inputs of a decoder layer, towards what the dense layer put
        out on its own inputs; 0 for none. On trellis codes 4 gained nothing for twice the time
    :param whole_epochs: passes over the data, towards the dense model's predictions, for scales,
        norms and biases only; 0 for none
    :param learning_rate: of Adam, relative to the size of what is tuned
    :param rounding: whether tuning of decoder layers also changes how integers are rounded
    :param answer_weight: weight of tokens that answers are predicted from, others having 1; where
        the data has labels
    """

    stage: ClassVar[int] = 2

    block_epochs: int = Field(default=0, ge=0)
    whole_epochs: int = Field(default=3, ge=0)
    learning_rate: float = Field(default=3e-3, gt=0)
    rounding: bool = False
    answer_weight: float = Field(default=4.0, gt=0)
    requires_calibration_data: bool = Field(default=True, exclude=True)

    _dense: nn.Module | None = PrivateAttr(default=None)
    _ignored: set[nn.Module] = PrivateAttr(default_factory=set)
    _inputs: LayerInputs | None = PrivateAttr(default=None)
    _batches: list[dict] = PrivateAttr(default_factory=list)
    _predictions: tempfile.TemporaryDirectory | None = PrivateAttr(default=None)
    _seed: int = PrivateAttr(default=0)
    _cache: ResultCache | None = PrivateAttr(default=None)
    _left: set[str] = PrivateAttr(default_factory=set)

    def see_dense(self, model: nn.Module) -> None:
        self._dense = mapped_copy(model)

    def request(self, model: nn.Module, context: RecipeContext) -> Request:
        return Request()

    def note_facts(self, model: nn.Module, context: RecipeContext) -> dict[str, Any]:
        return {}

    def prepare(
        self,
        model: nn.Module,
        plan: CompressionPlan,
        notes: LayerNotes | None,
        offers: Offers,
        context: RecipeContext,
    ) -> None:
        name = context.name_of(self)
        if not any(isinstance(other, Quantizer) for other in context.modifiers):
            raise ValueError(f"{name} tunes what a quantizer has made: put one before it")
        if any(isinstance(other, Quantizer) for other in context.following(self)):
            raise ValueError(f"{name} must come after the last quantizer")
        scaled = isinstance(context.transforms, TransformConfig) or any(
            isinstance(other, AWQModifier) or getattr(other, "correction", 0)
            for other in context.modifiers
        )
        if self.rounding and scaled:
            raise ValueError(
                f"{name}.rounding starts from the model's own weights: it goes neither with "
                "QuIPModifier, AWQModifier nor with a correction of GPTQModifier"
            )
        plan.settings[name] = self.settings
        self._seed = plan.seed or 0

    def without_data(self) -> "TuningModifier":
        return self.model_copy(deep=True)

    def on_calibration_start(self, state: State, event: Event, **kwargs) -> None:
        """Note the dense model's predictions, and start to keep what decoder layers read.

        :raises ValueError: if there is no data, or a quantizer has not run yet
        """
        model, context = state.model, state.casp_run.context
        if state.data.calib is None:
            raise ValueError("TuningModifier needs calibration data: pass a dataset to oneshot")
        waiting = [m for m in context.modifiers if isinstance(m, Quantizer) and not m.ended_]
        if waiting:
            raise ValueError(
                f"TuningModifier runs after {type(waiting[0]).__name__} has ended: leave the "
                "pipeline at llm-compressor's default, which runs one modifier after the other"
            )
        self._batches = list(state.data.calib)
        self._cache = ResultCache(self.cache_dir) if self.cache_dir else None
        self._ignored = self._untouched(model, context)
        for module in filter(is_integer, model.modules()):
            if module not in self._ignored:
                round_weight(module)  # which rounding to nearest leaves to the forward pass
        if torch.accelerator.is_available():
            set_onload_device(self._dense, get_main_device())
        if self.whole_epochs:
            self._predictions = tempfile.TemporaryDirectory(prefix="casp-")
            for place, batch in enumerate(tqdm(self._batches, desc="Noting predictions")):
                self._note_predictions(place, batch)
        if self.block_epochs:
            self._left = {
                name
                for name in decoder_layers(model)
                if context.component_of(name) in self.components
                and any(map(_is_compressed, model.get_submodule(name).modules()))
            }
            layers = [name for name in decoder_layers(model) if name in self._left]
            self._inputs = LayerInputs(self, model, [], layers, True, True, self._dense)

    def _untouched(self, model: nn.Module, context: RecipeContext) -> set[nn.Module]:
        """Return modules that stay as they are: those of other components, and layers that no token
        has reached, which have no scales yet."""
        untouched = set()
        for name, module in model.named_modules():
            owner = name.removesuffix(".up").removesuffix(".down")
            unseen = context.reached is not None and owner not in context.reached
            if context.component_of(name) not in self.components or (is_integer(module) and unseen):
                untouched.add(module)
        return untouched

    def on_sequential_epoch_end(
        self, state: State, event: Event, modules: list[nn.Module], **kwargs
    ) -> None:
        """Tune the decoder layers that were just calibrated."""
        here = set(modules)
        for name in decoder_layers(state.model) if self._inputs is not None else ():
            layer = state.model.get_submodule(name)
            if name in self._left and here.intersection(layer.modules()):
                self._tune_layer(state, name, layer, self._inputs.calls(name))

    def on_calibration_end(self, state: State, event: Event, **kwargs) -> None:
        """Remove the hooks."""
        self.remove_hooks()
        if self._inputs is not None:
            self._inputs.close()
        if self._left:
            self._warn(state, f"{len(self._left)} decoder layers were not tuned: {min(self._left)}")
        self._inputs = self._dense = None

    def on_finalize(self, state: State, **kwargs) -> bool:
        """Tune the whole model: during calibration it has no head."""
        model = state.model
        if self.whole_epochs:
            with DisableQuantization(model), disable_cache(model), eval_context(model):
                self._tune_whole(state)
            self._predictions.cleanup()
        self._predictions = None
        for kept in (self._batches, self._ignored, self._left):
            kept.clear()
        if self._cache is not None and self.cache_limit:
            self._cache.limit(int(self.cache_limit * 1e9))
        self._cache = None
        return super().on_finalize(state, **kwargs)

    def _tune_layer(
        self, state: State, name: str, layer: nn.Module, calls: LayerCalls | None
    ) -> None:
        dense = self._dense.get_submodule(name) if self.rounding else None
        tuned = tunables(layer, matrices=True, dense=dense, ignored=self._ignored)
        count = 0 if calls is None else len(calls)
        weights = [self._token_weights(state, calls.batch(place)) for place in range(count)]

        def loss(place: int) -> torch.Tensor:
            with in_place(tuned):
                found, wanted = calls.run(layer, place)
                errors = (found.float() - wanted.float()).square().flatten(0, -2).mean(-1)
                tokens = weights[place]
                if tokens is None or tokens.numel() != len(errors):  # of a vision tower
                    return _sent_back(errors.mean())
                tokens = tokens.flatten().to(errors)
                return _sent_back(errors @ tokens / tokens.sum())

        data = chain(layer.state_dict().values(), weights, calls.tensors() if count else ())
        if self._descend(state, name, layer, tuned, loss, count, self.block_epochs, data):
            self._left.discard(name)

    def _tune_whole(self, state: State) -> None:
        model, layers = state.model, decoder_layers(state.model)
        tuned = tunables(model, ignored=self._ignored)

        def loss(place: int) -> torch.Tensor:
            # layers run again on the way back, where the leaves must still be in place
            with in_place(tuned), checkpointed(model, layers):
                logits = self._predicted(model, self._batches[place])
                if not len(logits):
                    return torch.zeros((), device=logits.device)
                return _sent_back(divergence(self._noted(place, logits.device), logits))

        batches = (value for batch in self._batches for value in batch.values())
        noted = (self._noted(place, "cpu").logs for place in range(len(self._batches)))
        data = chain(model.state_dict().values(), noted, filter(torch.is_tensor, batches))
        count = len(self._batches)
        self._descend(state, "", model, tuned, loss, count, self.whole_epochs, data)

    def _descend(
        self,
        state: State,
        name: str,
        module: nn.Module,
        tuned: list[Tunable],
        loss: Callable[[int], torch.Tensor],
        items: int,
        epochs: int,
        data: Iterable[torch.Tensor | None],
    ) -> bool:
        """Tune, store what was found, note it on the plan, and tell whether there was anything to
        tune.

        :param name: of the decoder layer; empty for the whole model
        :param module: that layer, or the model
        :param data: all that the loss depends on
        :raises ValueError: if the loss is not finite
        """
        own = [each.leaves for each in tuned]
        leaves = [leaf for each in own for leaf in each]
        rates = [
            _ROUNDING_RATE if place else self.learning_rate
            for each in own
            for place, _ in enumerate(each)
        ]
        items = min(gathered(items))  # ranks step together
        if not leaves or not items:
            return False
        found = key = None
        if self._cache is not None:
            own_key = self._cache.key([name, self.settings, self._seed], data)
            key = self._cache.key(gathered(own_key.stem), [])
            found = self._remembered(key, leaves)
        if found is None:
            progress = self._progress(state.model, name, epochs * items + items, loss)
            with progress as counted, no_parameter_gradients(module):
                try:
                    found = descend(
                        leaves, counted, items, epochs, rates, self._seed, _mean_over_ranks
                    )
                except ValueError as error:
                    where = name or "the whole model"
                    raise ValueError(f"TuningModifier, {where}: {error}") from None
            if key is not None:
                numbers = torch.tensor([found.before, found.after, found.epoch]).double()
                named = {f"leaf_{place}": leaf.detach() for place, leaf in enumerate(leaves)}
                self._cache.keep(key, [named | {"descent": numbers}])
        if found.epoch:
            store(tuned)
        self._note(state, name, found)
        return True

    def _remembered(self, key: Path, leaves: list[torch.Tensor]) -> Descent | None:
        """Set leaves to what an earlier run has found; None if there was none."""
        # of the source rank, which alone has written
        known = shared(self._cache.read(key) if is_source_process() else None)
        if known is None:
            return None
        [tensors] = known
        for place, leaf in enumerate(leaves):
            leaf.data.copy_(tensors[f"leaf_{place}"])
        before, after, epoch = tensors["descent"].tolist()
        return Descent(before, after, int(epoch))

    def _note(self, state: State, name: str, found: Descent) -> None:
        part = TunedPart(module=name, before=found.before, after=found.after, epoch=found.epoch)
        state.casp_run.plan.tuned.append(part)
        if not found.epoch:
            what = name or "the whole model"
            self._warn(state, f"tuning {what} gained nothing on held-out data: it is as it was")

    def _warn(self, state: State, text: str) -> None:
        state.casp_run.plan.warnings.append(text)
        logger.warning(text)

    @contextmanager
    def _progress(
        self, model: nn.Module, name: str, total: int, loss: Callable[[int], torch.Tensor]
    ) -> Iterator[Callable[[int], torch.Tensor]]:
        """Let a bar count the calls of a loss.

        :param name: of the decoder layer; empty for the whole model
        """
        desc = "Tuning the model"
        if name:
            layers = list(decoder_layers(model))
            desc = f"({layers.index(name) + 1}/{len(layers)}): Tuning"
        with tqdm(desc=desc, total=total, leave=False) as bar:

            def counted(batch: int) -> torch.Tensor:
                bar.update()
                return loss(batch)

            yield counted

    @torch.no_grad()
    def _note_predictions(self, place: int, batch: dict) -> None:
        """Write the dense model's predictions of a batch to disk."""
        top = top_predictions(self._predicted(self._dense, batch), _KEPT_ENTRIES)
        tensors = {"entries": top.entries.cpu(), "logs": top.logs.cpu()}
        save_file(tensors, Path(self._predictions.name) / f"{place}.safetensors")

    def _noted(self, place: int, device: torch.device | str) -> TopPredictions:
        stored = load_file(Path(self._predictions.name) / f"{place}.safetensors", str(device))
        return TopPredictions(stored["entries"], stored["logs"])

    def _predicted(self, model: nn.Module, batch: dict) -> torch.Tensor:
        """Return the logits of the tokens whose predictions count, shape (N, V)."""
        batch = on_device(batch, model)
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits.flatten(0, 1)
        text = predicting_text(batch, model, token_mask(batch))
        return logits if text is None else logits[text.flatten().to(logits.device)]

    def _token_weights(self, state: State, place: int) -> torch.Tensor | None:
        """Return the weights of the tokens of a batch, shape (B, T); None where all are alike, or
        batches come in another order every time."""
        batch = self._batches[place]
        ids = batch.get("input_ids")
        if ids is None or isinstance(getattr(state.data.calib, "sampler", None), RandomSampler):
            return None
        weights = torch.ones(ids.shape, device=ids.device)
        images, padding = image_mask(batch, state.model), token_mask(batch)
        if images is not None and self.image_weight is not None:
            weights[images] = self.image_weight
        if batch.get("labels") is not None:
            weights[predicting_text(batch, state.model, padding)] *= self.answer_weight
        if padding is not None:
            weights[~padding] = 0
        return weights


def _is_compressed(module: nn.Module) -> bool:
    return is_integer(module) or isinstance(module, CodebookLinear | LowRankLinear)


def _sent_back(loss: torch.Tensor) -> torch.Tensor:
    """Return a loss without its graph, whose gradients have been added where they are wanted."""
    if torch.is_grad_enabled():
        loss.backward()
    return loss.detach()


def _mean_over_ranks(mean: torch.Tensor) -> torch.Tensor:
    return sum_over_ranks(mean) / number_of_ranks()
