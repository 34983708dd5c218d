"""Densities of a model's attention maps, measured on a few sequences.

Shapes: B sequences of a batch, H heads, Q queries, K keys.
"""

from collections.abc import Iterable
from contextlib import contextmanager

import torch
from llmcompressor.utils.helpers import disable_lm_head
from torch import nn
from transformers import PreTrainedModel

from casp_plugin.maths.attention_density import THRESHOLD, density, entropy_density, visible
from casp_plugin.statistics.hooks import Hooks, first_batches, image_mask, on_device, token_mask
from casp_plugin.statistics.statistics import AttentionDensity
from casp_plugin.system.distributed import gathered

__all__ = ["AttentionDensities", "visible_in"]

#: number of sequences: maps take tokens^2 numbers per head and sequence
SAMPLES = 4


class AttentionDensities:
    """Densities of attention maps, from eager attention on a few sequences.

    :param modules: names of attention modules
    """

    def __init__(self, modules: frozenset[str]):
        self._modules = modules
        self._rows: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
        self._mask: torch.Tensor | None = None
        self._images: torch.Tensor | None = None

    def collect(self, model: PreTrainedModel, dataloader: Iterable[dict]) -> None:
        """Run the first batches through a model and keep the densities.

        :param model: the model, in the state in which calibration runs it
        :param dataloader: batches
        """
        with _eager_attention(model), disable_lm_head(model), Hooks(model) as hooks:
            for name in self._modules:
                hooks.add(name, self._on_attention(name), with_kwargs=True)
            for batch in first_batches(dataloader, SAMPLES, "Looking at attention maps"):
                batch = on_device(batch, model)
                self._mask, self._images = token_mask(batch), image_mask(batch, model)
                with torch.no_grad():
                    model(**batch)
        ranks = gathered(self._rows)
        self._rows = {n: [row for rows in ranks for row in rows[n]] for n in self._modules}

    @property
    def densities(self) -> dict[str, AttentionDensity]:
        """Return the densities by module, without modules that showed no map."""
        return {name: _mean_densities(rows) for name, rows in self._rows.items() if rows}

    def _on_attention(self, name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict, output) -> None:
            # (B, H, Q, K)
            attention = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if attention is None or attention.ndim != 4:
                return
            mask, images = self._mask, self._images
            keys = attention.shape[-1]
            fits = images is not None and images.shape[-1] == keys
            mask = mask if mask is not None and mask.shape[-1] == keys else None
            seen = visible_in(module, kwargs, attention, mask)  # (B, 1, Q, K)
            over_images = over_text = torch.full((attention.shape[1],), torch.nan)  # (H,)
            if fits:
                over_images = density(attention, seen & images[:, None, None], THRESHOLD)
                over_text = density(attention, seen & ~images[:, None, None], THRESHOLD)
            rows = [density(attention, seen, THRESHOLD), entropy_density(attention, seen)]
            rows += [over_images, over_text]
            # (4, H)
            self._rows[name].append(torch.stack([row.double().cpu() for row in rows]))

        return hook


def visible_in(
    module: nn.Module, kwargs: dict, attention: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the entries of a module's attention maps that may differ from zero.

    :param module: the attention module
    :param kwargs: keyword arguments of its call
    :param attention: its maps, shape (B, H, Q, K)
    :param mask: tokens that are no padding, shape (B, K), bool; None for all
    :return: bool, shape (B, 1, Q, K), see :func:`~casp_plugin.maths.attention_density.visible`
    """
    allowed = kwargs.get("attention_mask")  # has sliding windows, and images that see themselves
    if allowed is None or allowed.ndim != 4:
        allowed = getattr(module, "is_causal", True)
    return visible(attention, mask, allowed)


def _mean_densities(rows: list[torch.Tensor]) -> AttentionDensity:
    """Return the means over batches.

    :param rows: densities, entropies, densities over images and over text of a batch, shape (4, H)
    """
    heads, entropy, *by_kind = torch.stack(rows).nanmean(0)
    image, text = (None if row.isnan().any() else row.tolist() for row in by_kind)
    return AttentionDensity(heads.tolist(), entropy.tolist(), image, text)


@contextmanager
def _eager_attention(model: PreTrainedModel):
    """Run a model's attention eagerly, so that it returns its maps."""
    config = model.config
    sub_configs = [key for key in config.sub_configs if getattr(config, key, None) is not None]
    before = {key: getattr(config, key)._attn_implementation for key in sub_configs}
    before[""] = config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
