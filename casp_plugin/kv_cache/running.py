"""Run a model with a compressed cache in calls that pass no cache."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from casp_plugin.kv_cache.cache import CompressedCache
from casp_plugin.kv_cache.schemes import CacheScheme

__all__ = ["with_kv_cache"]

#: inputs with an entry for every token; the first of these in a call tells the number of tokens
_BY_TOKEN = ("input_ids", "inputs_embeds", "token_type_ids", "mm_token_type_ids")


@contextmanager
def with_kv_cache(model: PreTrainedModel, scheme: CacheScheme | str | None) -> Iterator[None]:
    """Let a model keep its keys and values compressed, in ``generate`` and in plain calls.

    A plain call, as for perplexity or for a likelihood in lm-eval, reads its tokens as decoding
    would: in steps of the scheme's residual, where every step sees the tokens before it as the
    cache stores them. The cache quantizes just as many tokens together, so the scores are those of
    reading token by token. (Scales of a whole prompt are those of the first step.)

    :param model: the model whose calls and ``generate`` change in the context
    :param scheme: as ``CompressedCache`` takes it; None changes nothing
    :raises ValueError: in a plain call with images, with padding on the left, or with any other
        input than tokens
    """
    if scheme is None:
        yield
        return
    scheme = CacheScheme.parse(scheme) if isinstance(scheme, str) else scheme
    forward, generate = model.forward, model.generate

    @wraps(forward)
    def reading(*args, **inputs):
        inputs = inspect.signature(forward).bind(*args, **inputs).arguments
        inputs |= inputs.pop("kwargs", {})
        if inputs.get("past_key_values") is not None:
            return forward(**inputs)
        return _in_steps(model, forward, scheme, inputs)

    @wraps(generate)
    def generating(*args, **settings):
        if settings.get("use_cache") is False:
            raise ValueError(f"kv cache {scheme.name!r}: generate was asked to use no cache")
        if settings.get("past_key_values") is None:
            settings["past_key_values"] = CompressedCache(model.config, scheme)
        return generate(*args, **settings)

    with _replaced(model, "forward", reading), _replaced(model, "generate", generating):
        yield


def _in_steps(
    model: PreTrainedModel,
    forward: Callable[..., ModelOutput],
    scheme: CacheScheme,
    inputs: dict[str, torch.Tensor],
) -> ModelOutput:
    """Run a call without a cache.

    :return: output with the logits of all tokens, (B, T, vocabulary)
    """
    by_token = {n: inputs.pop(n) for n in _BY_TOKEN if inputs.get(n) is not None}
    mask = inputs.pop("attention_mask", None)
    inputs.pop("use_cache", None)
    rest = [name for name, value in inputs.items() if not _is_default(name, value)]
    if rest:
        raise ValueError(
            f"kv cache {scheme.name!r}: a plain call reads tokens alone, not {', '.join(rest)}; "
            "generate takes them"
        )
    # tokens see no padding that comes after them
    if mask is not None and (mask.ndim != 2 or bool((mask.diff(dim=1) > 0).any())):
        raise ValueError(f"kv cache {scheme.name!r}: a plain call takes padding on the right only")
    for module in model.modules():  # kept from the images of an earlier call
        if getattr(module, "rope_deltas", None) is not None:
            module.rope_deltas = None
    cache, step = CompressedCache(model.config, scheme), scheme.residual
    logits = []
    for start in range(0, next(iter(by_token.values())).shape[1], step):
        part = {name: values[:, start : start + step] for name, values in by_token.items()}
        out = forward(**part, past_key_values=cache, use_cache=True)
        logits.append(out.logits)
    out.logits = torch.cat(logits, dim=1)
    return out


def _is_default(name: str, value) -> bool:
    """Tell whether a call means the same without an input."""
    if name == "return_dict":
        return value is not False
    return value is None or (isinstance(value, int) and not value)


@contextmanager
def _replaced(module: torch.nn.Module, name: str, method: Callable) -> Iterator[None]:
    """Replace a method of one object in the context."""
    before = vars(module).get(name)  # set by an offloading hook
    setattr(module, name, method)
    try:
        yield
    finally:
        delattr(module, name)
        if before is not None:
            setattr(module, name, before)
