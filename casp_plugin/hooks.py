"""Watching a model run: hooks that go away together, tokens that count, means over them."""

from collections.abc import Callable

import torch
from torch import nn

__all__ = ["Hooks", "TokenMean", "on_device", "token_mask", "tokens_of"]


class Hooks:
    """Forward hooks that go away together."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.handles = []

    def __enter__(self) -> "Hooks":
        return self

    def __exit__(self, *exc) -> None:
        for handle in self.handles:
            handle.remove()

    def add(self, name: str, hook: Callable, **options) -> None:
        """Call ``hook`` after the module of this name has run."""
        module = self.model.get_submodule(name)
        self.handles.append(module.register_forward_hook(hook, **options))

    def add_before(self, name: str, hook: Callable) -> None:
        """Call ``hook(module, args, kwargs)`` before the module of this name runs."""
        module = self.model.get_submodule(name)
        self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))


class TokenMean:
    """Running mean of per-token values."""

    def __init__(self):
        self.total = None
        self.tokens = 0

    def add(self, summed: torch.Tensor, tokens: int) -> None:
        """
        :param summed: sum of the values over tokens; kept and added to in place
        :param tokens: how many
        """
        self.total = summed if self.total is None else self.total.add_(summed)
        self.tokens += tokens

    def finish(self) -> torch.Tensor:
        """The mean, in the place of the sum: moments are large, and asked for once."""
        return self.total.div_(self.tokens)


def on_device(batch: dict, model: nn.Module) -> dict:
    """The batch with its tensors where the model is."""
    device = next(model.parameters()).device
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}


def token_mask(batch: dict) -> torch.Tensor | None:
    """Which tokens count, (batch, tokens); None where all do: picking rows is slow."""
    mask = batch.get("attention_mask")
    mask = mask.bool() if mask is not None and mask.ndim == 2 else None
    return None if mask is None or mask.all() else mask


def tokens_of(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Activations as (tokens, channels), padding dropped where the mask fits."""
    if mask is not None and values.shape[:-1] == mask.shape:
        return values[mask]
    return values.reshape(-1, values.shape[-1])
