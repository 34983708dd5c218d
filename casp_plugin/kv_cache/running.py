"""Running a model as it is with a compressed cache, where nobody passes one."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from casp_plugin.hooks import image_mask
from casp_plugin.kv_cache.cache import CompressedCache
from casp_plugin.kv_cache.schemes import CacheScheme

__all__ = ["with_kv_cache"]

#: inputs that have an entry for each token; the first that is given tells how many there are
_BY_TOKEN = ("input_ids", "inputs_embeds", "token_type_ids", "mm_token_type_ids")


@contextmanager
def with_kv_cache(
    model: PreTrainedModel, scheme: CacheScheme | str | None, prompt: int = 0
) -> Iterator[None]:
    """Let the model keep its keys and values compressed, in ``generate`` and in plain calls.

    A plain call, as that of a perplexity or of a likelihood in lm-eval, reads its tokens as
    decoding would: in steps of the scheme's residual, each of which sees those before it as the
    cache stores them. Tokens wait there as long as a step is, so the scores are those of reading
    token by token. A prompt with images is read up to the last of them in one go.

    :param model: whose calls and ``generate`` change in here
    :param scheme: as ``CompressedCache`` takes it; None changes nothing
    :param prompt: tokens that a plain call reads in one go at least, before it goes on in steps
    :raises ValueError: where the model cannot go on from a cache; in a plain call with labels or
        positions
    """
    if scheme is None:
        yield
        return
    scheme = CacheScheme.parse(scheme) if isinstance(scheme, str) else scheme
    reader = _reader(model, scheme)
    forward, generate = reader.forward, model.generate

    @wraps(forward)
    def reading(*args, **inputs):
        inputs = inspect.signature(forward).bind(*args, **inputs).arguments
        inputs |= inputs.pop("kwargs", {})
        if inputs.get("past_key_values") is not None:
            return forward(**inputs)
        return _in_steps(reader, forward, scheme, prompt, inputs)

    @wraps(generate)
    def generating(*args, **settings):
        settings.setdefault("past_key_values", CompressedCache(model.config, scheme))
        return generate(*args, **settings)

    with _replaced(reader, "forward", reading), _replaced(model, "generate", generating):
        yield


def _reader(model: PreTrainedModel, scheme: CacheScheme) -> PreTrainedModel:
    """What reads tokens with a cache: the model, or its language model (BLIP-2)."""
    for reader in (model, getattr(model, "language_model", None)):
        if reader is not None and "past_key_values" in inspect.signature(reader.forward).parameters:
            return reader
    raise ValueError(f"kv cache {scheme.name!r}: {type(model).__name__} takes no past_key_values")


def _in_steps(
    model: PreTrainedModel,
    forward: Callable[..., ModelOutput],
    scheme: CacheScheme,
    prompt: int,
    inputs: dict[str, torch.Tensor],
) -> ModelOutput:
    """A call without a cache: logits of all tokens."""
    for name in ("labels", "position_ids"):
        if inputs.get(name) is not None:
            raise ValueError(f"kv cache {scheme.name!r}: {name} cannot be given in a plain call")
    images = image_mask(inputs, model)
    if images is not None:
        prompt = max(prompt, int(images.any(0).nonzero().max()) + 1)
    by_token = {n: inputs.pop(n) for n in _BY_TOKEN if inputs.get(n) is not None}
    mask = inputs.pop("attention_mask", None)
    inputs.pop("use_cache", None)
    cache, step = CompressedCache(model.config, scheme), scheme.residual
    length = next(iter(by_token.values())).shape[1]
    logits, start = [], 0
    while start < length:
        aligned = start if scheme.by_prompt else start // step * step
        end = aligned + step if start else max(step, prompt)
        part = {name: values[:, start:end] for name, values in by_token.items()}
        if mask is not None:
            part["attention_mask"] = mask[:, :end]
        out = forward(**part, **inputs, past_key_values=cache, use_cache=True)
        logits.append(out.logits)
        inputs = {}  # images are seen now
        start = end
    out.logits = torch.cat(logits, dim=1)
    return out


@contextmanager
def _replaced(module: torch.nn.Module, name: str, method: Callable) -> Iterator[None]:
    """A method of one object, for a while."""
    before = vars(module).get(name)  # an offloading hook's own
    setattr(module, name, method)
    try:
        yield
    finally:
        delattr(module, name)
        if before is not None:
            setattr(module, name, before)
