"""Densities of a model's attention maps, measured on a few sequences."""

from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from llmcompressor.utils.helpers import disable_lm_head
from torch import nn
from transformers import PreTrainedModel

from casp_plugin.maths.attention_density import THRESHOLD, density, entropy_density, visible
from casp_plugin.statistics.hooks import Hooks, first_batches, image_mask, on_device, token_mask
from casp_plugin.system.distributed import gathered

__all__ = ["AttentionDensities", "AttentionDensity", "visible_in"]

#: sequences whose attention maps are looked at: each takes tokens^2 numbers a head
SAMPLES = 4


@dataclass(frozen=True)
class AttentionDensity:
    """Densities of the maps of one attention module, means over sequences.

    :param heads: share of entries above ``THRESHOLD``, one a head
    :param entropy: keys effectively looked at over visible keys, one a head
    :param image: share of entries above the threshold over keys that stand for images, one a head;
        None where there are none
    :param text: the same over the other keys; None where there are no images
    """

    heads: list[float]
    entropy: list[float]
    image: list[float] | None = None
    text: list[float] | None = None


class AttentionDensities:
    """Runs attention eagerly on a few sequences and keeps the densities of its maps.

    :param modules: names of attention modules
    """

    def __init__(self, modules: frozenset[str]):
        self._modules = modules
        self._found: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
        self._mask: torch.Tensor | None = None
        self._images: torch.Tensor | None = None

    def collect(self, model: PreTrainedModel, dataloader: Iterable[dict]) -> None:
        """
        :param model: the model, ready to be run
        :param dataloader: batches, of which the first are used
        """
        with _eager_attention(model), disable_lm_head(model), Hooks(model) as hooks:
            for name in self._modules:
                hooks.add(name, self._on_attention(name), with_kwargs=True)
            for batch in first_batches(dataloader, SAMPLES, "Looking at attention maps"):
                batch = on_device(batch, model)
                self._mask, self._images = token_mask(batch), image_mask(batch, model)
                with torch.no_grad():
                    model(**batch)
        every = gathered(self._found)
        self._found = {n: [row for found in every for row in found[n]] for n in self._modules}

    @property
    def densities(self) -> dict[str, AttentionDensity]:
        """By module; without those that ran without showing a map."""
        return {name: _mean(rows) for name, rows in self._found.items() if rows}

    def _on_attention(self, name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict, output) -> None:
            attention = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if attention is None or attention.ndim != 4:
                return
            mask, images = self._mask, self._images
            keys = attention.shape[-1]
            fits = images is not None and images.shape[-1] == keys
            mask = mask if mask is not None and mask.shape[-1] == keys else None
            seen = visible_in(module, kwargs, attention, mask)
            over_images = over_text = torch.full((attention.shape[1],), torch.nan)
            if fits:
                over_images = density(attention, seen & images[:, None, None], THRESHOLD)
                over_text = density(attention, seen & ~images[:, None, None], THRESHOLD)
            rows = [density(attention, seen, THRESHOLD), entropy_density(attention, seen)]
            rows += [over_images, over_text]
            self._found[name].append(torch.stack([row.double().cpu() for row in rows]))

        return hook


def visible_in(
    module: nn.Module, kwargs: dict, attention: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Entries of the maps of an attention module that may be other than zero, see ``visible``.

    :param kwargs: that the module was called with
    """
    allowed = kwargs.get("attention_mask")  # windows; images that see all of themselves
    if allowed is None or allowed.ndim != 4:
        allowed = getattr(module, "is_causal", True)
    return visible(attention, mask, allowed)


def _mean(rows: list[torch.Tensor]) -> AttentionDensity:
    """
    :param rows: a sequence each: densities, entropies, densities over images and over text,
        (4, heads)
    """
    heads, entropy, *kinds = torch.stack(rows).nanmean(0)
    image, text = (None if part.isnan().any() else part.tolist() for part in kinds)
    return AttentionDensity(heads.tolist(), entropy.tolist(), image, text)


@contextmanager
def _eager_attention(model: PreTrainedModel):
    """Attention that shows its maps."""
    config = model.config
    parts = [key for key in config.sub_configs if getattr(config, key, None) is not None]
    before = {key: getattr(config, key)._attn_implementation for key in parts}
    before[""] = config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
