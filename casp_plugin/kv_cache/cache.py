"""A cache for transformers that stores keys and values as codes."""

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

#: pieces of a residual that are joined into one: fewer are read, and every token moves once
_JOINED = 16


class CompressedCache(Cache):
    """Stores packed codes and scales; a layer is decoded while its attention runs.

    Use it as ``model.generate(..., past_key_values=CompressedCache(model.config, scheme))``, and
    copy it (``copy.deepcopy``) where prompts have a common beginning. The tokens of a call are
    exact within that call, as in transformers' ``QuantizedCache``: a prompt reads itself in full
    precision.

    :param config: config of the model; a multimodal model's language model is taken
    :param scheme: the scheme, or its text as ``CacheScheme.parse`` reads it
    :raises ValueError: for layers that cache something else than keys and values of tokens, and for
        encoder-decoder models
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
        if channels and not hasattr(config, "kv_lora_rank"):  # latent attention has other widths
            for tensor in (self.scheme.keys, self.scheme.values):
                if tensor.bits < 16:
                    tensor.check_channels(channels)

    def _layer(self, kind: str, window: int | None, settings: dict):
        """Return the cache of a layer of some type.

        :param kind: one of transformers' layer types
        """
        if kind == "full_attention":
            return CompressedLayer(self.scheme)
        if kind in ("sliding_attention", "chunked_attention"):
            return CompressedLayer(self.scheme, window)
        stock = DYNAMIC_LAYER_TYPE_MAPPING.get(kind)
        if stock is LinearAttentionLayer:  # its state does not grow
            return stock(**settings)
        raise ValueError(f"kv cache {self.scheme.name!r}: layers of type {kind!r} cannot take it")

    @property
    def nbytes(self) -> int:
        """Return the bytes of all stored keys and values, with scales and waiting tokens."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, CompressedLayer))


class CompressedLayer(DynamicLayer):
    """Keys and values of a layer: codes of whole groups, then tokens that wait.

    ``keys`` and ``values`` hold the waiting tokens. Groups begin at multiples of the residual, so
    tokens are stored alike whether they come one by one or many at once, unless a whole prompt
    shares its scales.

    :param scheme: the scheme of the cache
    :param sliding_window: number of tokens that attention sees; whole groups before them are
        dropped
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
        """Add tokens, and return the keys and values of all tokens: earlier ones as they are
        stored, the added ones exactly.

        :param key_states: shape (sequences, heads, tokens, channels)
        :param value_states: the same for values
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            shape = (*key_states.shape[:2], 0)  # no tokens yet
            self.keys = key_states.new_empty(*shape, key_states.shape[3])
            self.values = value_states.new_empty(*shape, value_states.shape[3])
        first = self.cumulative_length == 0
        self.cumulative_length += key_states.shape[-2]
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        self.values = torch.cat([self.values, value_states], dim=-2)
        keys, values = self.decode()
        self._store(first and key_states.shape[-2] > 1)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of tokens that attention reads, coming ones too, and the number of
        dropped tokens before them."""
        return self.cumulative_length - self.dropped + query_length, self.dropped

    def get_seq_length(self) -> int:
        """Return the number of tokens so far."""
        return self.cumulative_length

    def get_max_length(self) -> int:
        """Return the window; -1 without one."""
        return -1 if self.sliding_window is None else self.sliding_window

    @property
    def nbytes(self) -> int:
        """Return the bytes of all stored keys and values, with scales and waiting tokens."""
        if not self.is_initialized:
            return 0
        codes = (tensor for pair in self.stored for piece in pair for tensor in piece.tensors)
        return sum(tensor.nbytes for tensor in (*codes, self.keys, self.values))

    def reset(self) -> None:
        """Forget all tokens."""
        self.stored.clear()
        self.cumulative_length = self.dropped = 0
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Put sequences in the order of beams, (sequences,)."""
        self._change(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        self._change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some sequences."""
        self._change(lambda tensor: tensor[indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to remove tokens.

        :raises ValueError: always
        """
        raise ValueError(
            f"kv cache {self.scheme.name!r} cannot give tokens back, as assisted generation asks: "
            "their groups are rounded by then"
        )

    def _change(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.is_initialized:
            self.stored = [tuple(piece.of(change) for piece in pair) for pair in self.stored]
            self.keys, self.values = change(self.keys), change(self.values)

    def decode(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all keys and values as they are stored, (sequences, heads, tokens, channels)."""
        if not self.stored:
            return self.keys, self.values
        pairs = [[piece.decode(self.dtype) for piece in pair] for pair in self.stored]
        keys, values = zip(*pairs, (self.keys, self.values), strict=True)
        return torch.cat(keys, dim=-2), torch.cat(values, dim=-2)

    def _store(self, prompt: bool) -> None:
        """Encode whole groups of waiting tokens, and drop those that attention cannot see any more.

        :param prompt: whether the waiting tokens are a prompt
        """
        residual = self.scheme.residual
        whole = prompt and self.scheme.by_prompt
        waiting = self.keys.shape[-2]
        count = waiting if whole else waiting - waiting % residual
        if self.is_sliding:
            seen = self.cumulative_length - self.sliding_window + 1  # the first token in sight
            while self.stored and self.dropped + self.stored[0][0].tokens <= seen:
                self.dropped += self.stored.pop(0)[0].tokens
            if not self.stored:
                unseen = min(max(seen - self.dropped, 0) // residual * residual, count)
                self._pop_waiting(unseen)
                self.dropped, count = self.dropped + unseen, count - unseen
        while count:  # groups in a window are dropped one by one
            length = residual if self.is_sliding and not whole else count
            keys, values = self._pop_waiting(length)
            key_scheme = self._of_residual(self.scheme.keys, whole)
            value_scheme = self._of_residual(self.scheme.values, whole)
            self.stored.append((encode(keys, key_scheme), encode(values, value_scheme)))
            count -= length
        last = self.stored[-_JOINED:]
        alike = all(pair[0].tokens == residual for pair in last)
        if len(last) == _JOINED and alike and not self.is_sliding:
            pair = tuple(map(joined, zip(*last, strict=True)))
            if None not in pair:
                self.stored[-_JOINED:] = [pair]

    def _pop_waiting(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Remove the first waiting tokens and return their keys and values."""
        popped = self.keys[..., :length, :], self.values[..., :length, :]
        # copies, because a view keeps the memory of the whole tensor
        self.keys, self.values = (
            self.keys[..., length:, :].clone(),
            self.values[..., length:, :].clone(),
        )
        return popped

    def _of_residual(self, scheme: TensorScheme, whole: bool) -> TensorScheme:
        """Return a scheme with groups of the residual where its scales are a whole prompt's.

        :param whole: whether the tokens are that prompt
        """
        if whole or scheme.group is not None or scheme.axis == "token":
            return scheme
        return scheme.model_copy(update={"group": self.scheme.residual})
