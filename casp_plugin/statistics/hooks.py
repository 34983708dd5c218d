"""Watching a model run: hooks that go away together, tokens that count, means over them."""

from collections.abc import Callable, Iterable, Iterator

import torch
from llmcompressor.utils.transformers import get_embeddings
from torch import nn
from tqdm import tqdm

from casp_plugin.system.distributed import gathered, number_of_ranks, sum_over_ranks

__all__ = [
    "Hooks",
    "TokenMean",
    "add_ranks",
    "by_token",
    "check_tokens",
    "first_batches",
    "image_mask",
    "on_device",
    "token_mask",
    "tokens_of",
]


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

    def add(self, summed: torch.Tensor, tokens: float) -> None:
        """
        :param summed: sum of the values over tokens; kept and added to in place
        :param tokens: how many, or the sum of their weights
        """
        self.total = summed if self.total is None else self.total.add_(summed)
        self.tokens += tokens

    def add_products(self, rows: torch.Tensor, tokens: float) -> None:
        """
        :param rows: of which the sum of x x^T is added, (tokens, channels), without a second
            matrix of that size
        :param tokens: how many, or the sum of their weights
        """
        if self.total is None:
            self.total = rows.new_zeros(rows.shape[1], rows.shape[1])
        self.total.addmm_(rows.T, rows)
        self.tokens += tokens

    def finish(self) -> torch.Tensor:
        """The mean, in the place of the sum: moments are large, and asked for once."""
        return self.total.div_(self.tokens)


def add_ranks(means: dict, device: torch.device) -> None:
    """Add up what all ranks have, where any of them has something.

    :param means: ``TokenMean`` by what they are of; those that only other ranks have are added
    """
    if number_of_ranks() == 1:
        return
    found = {
        key: (mean.total.shape, mean.total.dtype) for key, mean in means.items() if mean.tokens
    }
    anywhere = {key: kind for each in gathered(found) for key, kind in each.items()}
    for key, (shape, dtype) in sorted(anywhere.items(), key=lambda item: str(item[0])):
        mean = means.setdefault(key, TokenMean())
        if mean.total is None:
            mean.total = torch.zeros(shape, dtype=dtype, device=device)
        tokens = torch.tensor(mean.tokens, dtype=torch.float64, device=device)
        mean.tokens = sum_over_ranks(tokens).item()
        sum_over_ranks(mean.total)


def first_batches(
    dataloader: Iterable[dict], samples: int, desc: str, tokens: int = 0
) -> Iterator[dict]:
    """The batches that hold the first sequences, with a progress bar.

    :param samples: sequences at least, of all ranks together
    :param tokens: tokens at least: short sequences say little each
    """
    samples, tokens = (-(-amount // number_of_ranks()) for amount in (samples, tokens))
    seen = 0
    with tqdm(desc=desc, total=samples) as bar:
        for batch in dataloader:
            yield batch
            # pixels may come in patches
            first = next(v for v in (batch.get("input_ids"), *batch.values()) if torch.is_tensor(v))
            bar.update(len(first))
            seen += first.shape[:2].numel()
            if bar.n >= samples and seen >= tokens:
                return


def on_device(batch: dict, model: nn.Module) -> dict:
    """The batch with its tensors where the model is.

    :raises ValueError: if it holds tokens that the model does not know
    """
    check_tokens(batch, model)
    device = next(model.parameters()).device
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}


def check_tokens(batch: dict, model: nn.Module) -> None:
    """
    :raises ValueError: if a batch holds tokens that the model does not know
    """
    ids, embeddings = batch.get("input_ids"), get_embeddings(model)[0]
    if ids is None or not hasattr(embeddings, "num_embeddings"):
        return
    known, least, most = embeddings.num_embeddings, int(ids.min()), int(ids.max())
    if least < 0 or most >= known:
        raise ValueError(
            f"the calibration data holds token {most if most >= known else least}, but the "
            f"vocabulary of {type(model).__name__} has {known}: use the model's own tokenizer"
        )


def token_mask(batch: dict) -> torch.Tensor | None:
    """Which tokens count, (batch, tokens); None where all do: picking rows is slow."""
    mask = batch.get("attention_mask")
    mask = mask.bool() if mask is not None and mask.ndim == 2 else None
    return None if mask is None or mask.all() else mask


def image_mask(batch: dict, model: nn.Module) -> torch.Tensor | None:
    """Which tokens stand for images or videos, (batch, tokens); None where none does."""
    config, ids = model.config, batch.get("input_ids")
    kinds = (f"{what}_token_{key}" for what in ("image", "video") for key in ("id", "index"))
    known = {getattr(config, kind, None) for kind in kinds} - {None}
    if ids is None or not known:
        return None
    found = torch.isin(ids, torch.tensor(sorted(known), device=ids.device))
    return found if found.any() else None


def by_token(values: torch.Tensor, tokens: torch.Tensor) -> bool:
    """Whether activations are those of these tokens, (batch, tokens): some models (OPT) run parts
    of a layer on the tokens of all sequences in a row."""
    return values.shape[:-1] in (tokens.shape, (tokens.numel(),))


def tokens_of(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Activations as (tokens, channels), padding dropped where the mask fits."""
    rows = values.reshape(-1, values.shape[-1])
    return rows[mask.flatten()] if mask is not None and by_token(values, mask) else rows
