"""Running a model as it is with a compressed cache, where nobody passes one."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps

import torch
from transformers import PreTrainedModel

from casp_plugin.hooks import image_mask
from casp_plugin.kv_cache.cache import CompressedCache
from casp_plugin.kv_cache.schemes import CacheScheme

__all__ = ["with_kv_cache"]


@contextmanager
def with_kv_cache(model: PreTrainedModel, scheme: CacheScheme | str | None) -> Iterator[None]:
    """Let the model keep its keys and values compressed, in ``generate`` and in plain calls.

    A plain call, as that of a perplexity or of a likelihood in lm-eval, reads its tokens as
    decoding would: in steps of the scheme's residual, each of which sees those before it as the
    cache stores them. Tokens wait there as long as a step is, so the scores are those of reading
    token by token. A prompt with images is read up to the last of them in one go.

    :param model: whose calls and ``generate`` change in here
    :param scheme: as ``CompressedCache`` takes it; None changes nothing
    :raises ValueError: in a call that cannot be read in steps: embeddings, or labels
    """
    if scheme is None:
        yield
        return
    scheme = CacheScheme.parse(scheme) if isinstance(scheme, str) else scheme
    forward, generate = model.forward, model.generate
    before = {name: vars(model).get(name) for name in ("forward", "generate")}

    @wraps(forward)
    def reading(input_ids=None, *, past_key_values=None, **inputs):
        if past_key_values is not None:
            return forward(input_ids=input_ids, past_key_values=past_key_values, **inputs)
        return _in_steps(model, forward, scheme, input_ids, inputs)

    @wraps(generate)
    def generating(*args, **settings):
        settings.setdefault("past_key_values", CompressedCache(model.config, scheme))
        return generate(*args, **settings)

    model.forward, model.generate = reading, generating
    try:
        yield
    finally:
        for name, own in before.items():
            if own is None:
                delattr(model, name)
            else:
                setattr(model, name, own)


def _in_steps(model, forward, scheme: CacheScheme, ids: torch.Tensor | None, inputs: dict):
    """A call without a cache: logits of all tokens."""
    for name in ("labels", "inputs_embeds", "position_ids"):
        if inputs.get(name) is not None or ids is None:
            raise ValueError(f"kv cache {scheme.name!r}: give the model input_ids, and no {name}")
    cache, step = CompressedCache(model.config, scheme), scheme.residual
    images = image_mask({"input_ids": ids, **inputs}, model)
    first = 0 if images is None else int(images.any(0).nonzero().max()) + 1
    mask = inputs.pop("attention_mask", None)
    by_token = {name: inputs.pop(name) for name in _BY_TOKEN if inputs.get(name) is not None}
    logits, start = [], 0
    while start < ids.shape[1]:
        end = max(start // step * step + step, first if not start else 0)
        part = {name: values[:, start:end] for name, values in by_token.items()}
        if mask is not None:
            part["attention_mask"] = mask[:, :end]
        out = forward(
            input_ids=ids[:, start:end],
            past_key_values=cache,
            use_cache=True,
            **part,
            **(inputs if not start else {}),
        )
        logits.append(out.logits)
        start = min(end, ids.shape[1])
    out.logits = torch.cat(logits, dim=1)
    return out


#: inputs beside the ids that have one entry a token
_BY_TOKEN = ("token_type_ids", "mm_token_type_ids")
