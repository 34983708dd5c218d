"""transformers' cache with keys and values as codes."""

from collections.abc import Callable

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    DynamicLayer,
    LinearAttentionLayer,
    get_layer_types_and_kwargs,
)

from casp_plugin.kv_cache.quantization import Codes, Plain, encode, joined
from casp_plugin.kv_cache.schemes import CacheScheme, TensorScheme

__all__ = ["CompressedCache", "CompressedLayer"]


#: pieces of a residual that become one: fewer are read, and every token moves once
_JOINED = 16


class CompressedCache(Cache):
    """Stores packed codes and scales; each layer is decoded while its attention runs.

    For ``model.generate(..., past_key_values=CompressedCache(model.config, scheme))``, and copied
    (``copy.deepcopy``) where prompts begin alike. What a call of the model brings is seen exactly
    in that call, as in transformers' ``QuantizedCache``: a prompt reads itself in full precision.

    :param config: of the model; of a multimodal one that of its language model is taken
    :param scheme: how, or its name as ``CacheScheme.parse`` reads it
    :raises ValueError: for layers whose cache is something else than keys and values of tokens,
        and for encoder-decoder models
    """

    def __init__(self, config: PreTrainedConfig, scheme: CacheScheme | str):
        self.scheme = CacheScheme.parse(scheme) if isinstance(scheme, str) else scheme
        if config.is_encoder_decoder:
            raise ValueError(f"kv cache {self.scheme.name!r}: not for encoder-decoder models")
        text = config.get_text_config(decoder=True)
        if getattr(text, "cross_attention_layers", None):
            raise ValueError(
                f"kv cache {self.scheme.name!r}: not for models that attend to images apart "
                f"({text.model_type})"
            )
        self._check_channels(text)
        types, settings = get_layer_types_and_kwargs(text)
        window = settings.get("sliding_window")
        super().__init__(layers=[self._layer(kind, window, settings) for kind in types])

    def _check_channels(self, config: PreTrainedConfig) -> None:
        channels = getattr(config, "head_dim", None)
        if channels and not hasattr(config, "kv_lora_rank"):  # whose keys have other widths
            for tensor in (self.scheme.keys, self.scheme.values):
                if tensor.bits < 16:
                    tensor.check_channels(channels)

    def _layer(self, kind: str, window: int | None, settings: dict):
        if kind == "full_attention":
            return CompressedLayer(self.scheme)
        if kind in ("sliding_attention", "chunked_attention"):
            return CompressedLayer(self.scheme, window)
        stock = DYNAMIC_LAYER_TYPE_MAPPING.get(kind)
        if stock is LinearAttentionLayer:  # a state that does not grow
            return stock(**settings)
        raise ValueError(f"kv cache {self.scheme.name!r}: layers of type {kind!r} cannot take it")

    @property
    def nbytes(self) -> int:
        """Of all keys and values that are stored, scales and waiting tokens too."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, CompressedLayer))


class CompressedLayer(DynamicLayer):
    """Keys and values of a layer: codes of whole groups, then tokens that wait.

    ``keys`` and ``values`` are what waits. Groups begin at multiples of the residual, so whatever
    pieces tokens come in, they are stored alike; but for a prompt that shares its scales.

    :param scheme: how
    :param sliding_window: tokens that attention sees; whole groups before them are let go
    """

    is_croppable = False

    def __init__(self, scheme: CacheScheme, sliding_window: int | None = None):
        super().__init__()
        self.scheme = scheme
        self.is_sliding = sliding_window is not None
        self.sliding_window = sliding_window
        self.stored: list[tuple[Codes | Plain, Codes | Plain]] = []
        self.cumulative_length = self.dropped = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in tokens; returns those before, as stored, and these, as they are.

        :param key_states: shape (sequences, heads, tokens, channels)
        :param value_states: the same of values
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            shape = (*key_states.shape[:2], 0)
            self.keys = key_states.new_empty(*shape, key_states.shape[3])
            self.values = value_states.new_empty(*shape, value_states.shape[3])
        first = self.cumulative_length == 0
        self.cumulative_length += key_states.shape[-2]
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        self.values = torch.cat([self.values, value_states], dim=-2)
        keys, values = self._read()
        self._store(first and key_states.shape[-2] > 1)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens that are read, the coming ones too, and those before, that are gone."""
        return self.cumulative_length - self.dropped + query_length, self.dropped

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return self.cumulative_length

    def get_max_length(self) -> int:
        return -1 if self.sliding_window is None else self.sliding_window

    @property
    def nbytes(self) -> int:
        """Of all that is stored."""
        if not self.is_initialized:
            return 0
        codes = (tensor for pair in self.stored for each in pair for tensor in each.tensors)
        return sum(tensor.nbytes for tensor in (*codes, self.keys, self.values))

    def reset(self) -> None:
        self.stored.clear()
        self.cumulative_length = self.dropped = 0
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._change(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._change(lambda tensor: tensor[indices])

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError(
            f"kv cache {self.scheme.name!r} cannot give tokens back, as assisted generation asks: "
            "their groups are rounded by then"
        )

    def _change(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.is_initialized:
            self.stored = [tuple(each.of(change) for each in pair) for pair in self.stored]
            self.keys, self.values = change(self.keys), change(self.values)

    def _read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values, decoded."""
        if not self.stored:
            return self.keys, self.values
        pairs = [[each.decode(self.dtype) for each in pair] for pair in self.stored]
        keys, values = zip(*pairs, (self.keys, self.values), strict=True)
        return torch.cat(keys, dim=-2), torch.cat(values, dim=-2)

    def _store(self, prompt: bool) -> None:
        """Encode what has waited long enough, and let go what attention no longer sees.

        :param prompt: whether what waits is one
        """
        residual = self.scheme.residual
        whole = prompt and self.scheme.by_prompt
        waiting = self.keys.shape[-2]
        count = waiting if whole else waiting - waiting % residual
        if self.is_sliding:
            seen = self.cumulative_length - self.sliding_window + 1  # the first that is
            while self.stored and self.dropped + self.stored[0][0].tokens <= seen:
                self.dropped += self.stored.pop(0)[0].tokens
            if not self.stored:
                gone = min(max(seen - self.dropped, 0) // residual * residual, count)
                self._taken(gone)
                self.dropped, count = self.dropped + gone, count - gone
        while count:  # in a window each group goes by itself
            length = residual if self.is_sliding and not whole else count
            waiting = self._taken(length)
            tensors = (self.scheme.keys, self.scheme.values)
            pair = zip(waiting, tensors, strict=True)
            self.stored.append(tuple(encode(each, self._grouped(how, whole)) for each, how in pair))
            count -= length
        last = self.stored[-_JOINED:]
        alike = all(pair[0].tokens == residual for pair in last)
        if len(last) == _JOINED and alike and not self.is_sliding:
            pair = tuple(map(joined, zip(*last, strict=True)))
            if None not in pair:
                self.stored[-_JOINED:] = [pair]

    def _taken(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first tokens of those that wait, which are no longer theirs."""
        taken = self.keys[..., :length, :], self.values[..., :length, :]
        # copies: a part of a tensor keeps all of it
        self.keys, self.values = (
            self.keys[..., length:, :].clone(),
            self.values[..., length:, :].clone(),
        )
        return taken

    def _grouped(self, how: TensorScheme, whole: bool) -> TensorScheme:
        """A scale of a whole prompt holds for none but it."""
        if whole or how.group is not None or how.axis == "token":
            return how
        return how.model_copy(update={"group": self.scheme.residual})
