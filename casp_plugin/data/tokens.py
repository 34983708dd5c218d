"""Token ids of texts, and the largest number of tokens that a model reads."""

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

__all__ = ["begins_by_itself", "most_tokens", "token_ids"]

#: fields of configs that hold the number of positions; the second belongs to speech decoders, the
#: third to MPT
_POSITIONS = ("max_position_embeddings", "max_target_positions", "max_seq_len")
#: families whose positions begin after the position of padding
_AFTER_PADDING = ("roberta", "camembert", "data2vec-text", "xmod", "ibert")


def token_ids(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None = None,
    add_special_tokens: bool = True,
) -> list[int]:
    """Return the token ids of a text, with the special tokens that the tokenizer adds.

    Special tokens that the text already begins or ends with, as a text from a chat template does,
    are not added twice.

    :param limit: largest number of tokens; the text is cut on the side that the tokenizer truncates
    :param add_special_tokens: False for chats, whose template writes the special tokens
    :return: token ids; an empty list for a text without tokens of its own
    """
    body = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if not body:
        return []
    begin, end = [], []
    if add_special_tokens:
        begin, body, end = _split_special_tokens(tokenizer(text, verbose=False).input_ids, body)
    body = body[_overlap(begin, body) :]
    body = body[: len(body) - _overlap(body, end)]
    if limit is not None:
        over = max(0, len(begin) + len(body) + len(end) - limit)
        left = tokenizer.truncation_side == "left"
        body = body[over:] if left else body[: max(0, len(body) - over)]
    return [*begin, *body, *end][:limit]


def begins_by_itself(text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether a text begins with all special tokens that the tokenizer adds before a text."""
    body = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    begin, body, _ = _split_special_tokens(tokenizer(text, verbose=False).input_ids, body)
    return bool(begin) and body[: len(begin)] == begin


def most_tokens(config: PreTrainedConfig) -> int | None:
    """Return the number of positions of a model; None where nothing limits them.

    Nothing does with ALiBi and in recurrent models.
    """
    config = config.get_text_config(decoder=True)
    if getattr(config, "alibi", False):
        return None
    values = [getattr(config, name, None) for name in _POSITIONS]
    most = next((value for value in values if isinstance(value, int) and value > 0), None)
    if most is not None and any(family in config.model_type for family in _AFTER_PADDING):
        most -= (config.pad_token_id or 0) + 1
    return most


def _split_special_tokens(
    whole: list[int], body: list[int]
) -> tuple[list[int], list[int], list[int]]:
    """Return the special tokens before a text, the text's tokens, the special tokens after it.

    :param whole: token ids with special tokens
    :param body: token ids without; where ``whole`` does not contain them, ``whole`` is the text
    """
    for start in range(len(whole) - len(body) + 1):
        end = start + len(body)
        if whole[start:end] == body:
            return whole[:start], body, whole[end:]
    return [], whole, []


def _overlap(first: list[int], second: list[int]) -> int:
    """Return the length of the longest end of ``first`` that ``second`` begins with."""
    longest = min(len(first), len(second))
    return next((n for n in range(longest, 0, -1) if first[-n:] == second[:n]), 0)
