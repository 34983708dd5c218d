"""Hooks on a model, masks of tokens, and means over tokens.

Shapes: B sequences of a batch, T tokens of a sequence, N tokens without padding, C channels.
"""

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
    "row_blocks",
    "squared_norms",
    "token_mask",
    "tokens_of",
]


#: least number of rows of a block of x x^T
LEAST_BLOCK = 256


class Hooks:
    """Forward hooks that are removed together, at the end of a ``with`` block."""

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
    """Running mean of values per token.

    Of products x x^T only the upper triangle is summed up, in blocks of rows; :meth:`finish` fills
    in the rest.
    """

    def __init__(self):
        self.total = None
        self.tokens = 0

    def add(self, summed: torch.Tensor, tokens: float) -> None:
        """Add the values of some tokens.

        :param summed: sum of the values over the tokens; kept, and changed in place later
        :param tokens: number of tokens, or the sum of their weights
        """
        self.total = summed if self.total is None else self.total.add_(summed)
        self.tokens += tokens

    def add_products(self, rows: torch.Tensor, tokens: float) -> None:
        """Add x x^T of some tokens, without a second matrix of that size.

        :param rows: x of the tokens, shape (N, C)
        :param tokens: number of tokens, or the sum of their weights
        """
        channels = rows.shape[1]
        if self.total is None:
            self.total = rows.new_zeros(channels, channels)
        for start, end in row_blocks(channels):
            # (block, N) @ (N, rest)
            self.total[start:end, start:].addmm_(rows[:, start:end].T, rows[:, start:])
        self.tokens += tokens

    def finish(self) -> torch.Tensor:
        """Return the mean, which overwrites the sum: moments are large, and read once."""
        total = self.total
        if total.ndim == 2:
            for start, end in row_blocks(len(total)):
                total[end:, start:end] = total[start:end, end:].T
        return total.div_(self.tokens)


def row_blocks(channels: int) -> list[tuple[int, int]]:
    """Return first and last row, exclusive, of the blocks in which products are summed up."""
    size = max(LEAST_BLOCK, channels // 8)
    return [(start, min(start + size, channels)) for start in range(0, channels, size)]


def add_ranks(means: dict, device: torch.device) -> None:
    """Sum running means over all ranks, in place.

    :param means: ``TokenMean`` by key; keys that only other ranks have are added
    """
    if number_of_ranks() == 1:
        return
    here = {key: (mean.total.shape, mean.total.dtype) for key, mean in means.items() if mean.tokens}
    anywhere = {key: layout for layouts in gathered(here) for key, layout in layouts.items()}
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
    """Yield the first batches, with a progress bar, until they hold enough sequences and tokens.

    :param samples: least number of sequences, of all ranks together
    :param desc: text of the progress bar
    :param tokens: least number of tokens, of all ranks together: short sequences say little
    """
    samples, tokens = (-(-amount // number_of_ranks()) for amount in (samples, tokens))
    seen = 0
    with tqdm(desc=desc, total=samples) as bar:
        for batch in dataloader:
            yield batch
            # input_ids first: pixels may come in patches, not in sequences
            values = (batch.get("input_ids"), *batch.values())
            rows = next(value for value in values if torch.is_tensor(value))  # (B, T, ...)
            bar.update(len(rows))
            seen += rows.shape[:2].numel()
            if bar.n >= samples and seen >= tokens:
                return


def on_device(batch: dict, model: nn.Module) -> dict:
    """Return a batch with its tensors on the model's device.

    :raises ValueError: if it holds tokens that the model does not know
    """
    check_tokens(batch, model)
    device = next(model.parameters()).device
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}


def check_tokens(batch: dict, model: nn.Module) -> None:
    """Check that the model's vocabulary has all tokens of a batch.

    :raises ValueError: if it does not
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
    """Return the tokens that are no padding, shape (B, T), bool; None where none is padding.

    None saves picking rows, which is slow.
    """
    mask = batch.get("attention_mask")
    mask = mask.bool() if mask is not None and mask.ndim == 2 else None
    return None if mask is None or mask.all() else mask


def image_mask(batch: dict, model: nn.Module) -> torch.Tensor | None:
    """Return the tokens that stand for images or videos, shape (B, T), bool; None without any."""
    config, ids = model.config, batch.get("input_ids")
    media = ("image", "video")
    names = (f"{medium}_token_{key}" for medium in media for key in ("id", "index"))
    known = {getattr(config, name, None) for name in names} - {None}
    if ids is None or not known:
        return None
    mask = torch.isin(ids, torch.tensor(sorted(known), device=ids.device))
    return mask if mask.any() else None


def by_token(values: torch.Tensor, tokens: torch.Tensor) -> bool:
    """Tell whether activations belong to the tokens of a batch.

    Some models (OPT) run parts of a layer on the tokens of all sequences in a row.

    :param values: activations, shape (B, T, C) or (B * T, C) if they do
    :param tokens: any values per token, shape (B, T)
    """
    return values.shape[:-1] in (tokens.shape, (tokens.numel(),))


def tokens_of(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return activations as rows, shape (N, C), without padding where the mask fits.

    :param values: shape (..., C)
    :param mask: tokens that are no padding, shape (B, T), bool; None for all
    """
    rows = values.reshape(-1, values.shape[-1])  # (B * T, C)
    return rows[mask.flatten()] if mask is not None and by_token(values, mask) else rows


def squared_norms(rows: torch.Tensor) -> torch.Tensor:
    """Return the sum of squares of every channel, without a tensor of squares.

    :param rows: shape (N, C)
    :return: shape (C,), float32
    """
    return torch.linalg.vector_norm(rows, dim=0, dtype=torch.float32).square()
