"""Texts become token ids, and how many of them a model reads."""

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

__all__ = ["begins_by_itself", "most_tokens", "token_ids"]

#: what configs call the positions that a model knows; the second is that of speech decoders, the
#: third MPT's
_POSITIONS = ("max_position_embeddings", "max_target_positions", "max_seq_len")
#: families whose positions begin after that of padding
_AFTER_PADDING = ("roberta", "camembert", "data2vec-text", "xmod", "ibert")


def token_ids(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None = None,
    add_special_tokens: bool = True,
) -> list[int]:
    """Turn a text into token ids, with what the tokenizer adds to a text by itself.

    What it adds comes once where the text begins or ends with it already, as one does that a chat
    template wrote before.

    :param limit: tokens at most; what is over goes from the text, on the side that the tokenizer
        truncates
    :param add_special_tokens: False for chats: their template writes all that belongs there
    :return: none for a text that has no tokens of its own
    """
    body = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if not body:
        return []
    begin, end = [], []
    if add_special_tokens:
        begin, body, end = _parted(tokenizer(text, verbose=False).input_ids, body)
    body = body[_overlap(begin, body) :]
    body = body[: len(body) - _overlap(body, end)]
    if limit is not None:
        over = max(0, len(begin) + len(body) + len(end) - limit)
        left = tokenizer.truncation_side == "left"
        body = body[over:] if left else body[: max(0, len(body) - over)]
    return [*begin, *body, *end][:limit]


def begins_by_itself(text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether a text begins with all that the tokenizer would add before it."""
    body = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    begin, body, _ = _parted(tokenizer(text, verbose=False).input_ids, body)
    return bool(begin) and body[: len(begin)] == begin


def most_tokens(config: PreTrainedConfig) -> int | None:
    """Tokens that a model of this config has positions for; None where nothing limits them, as
    with ALiBi and with recurrent models."""
    config = config.get_text_config(decoder=True)
    if getattr(config, "alibi", False):
        return None
    found = [getattr(config, name, None) for name in _POSITIONS]
    most = next((each for each in found if isinstance(each, int) and each > 0), None)
    if most is not None and any(family in config.model_type for family in _AFTER_PADDING):
        most -= (config.pad_token_id or 0) + 1
    return most


def _parted(whole: list[int], body: list[int]) -> tuple[list[int], list[int], list[int]]:
    """What a tokenizer adds before, the text, and what it adds after.

    :param whole: token ids with what is added; the text if that changes more than its ends
    :param body: token ids without
    """
    for start in range(len(whole) - len(body) + 1):
        end = start + len(body)
        if whole[start:end] == body:
            return whole[:start], body, whole[end:]
    return [], whole, []


def _overlap(first: list[int], second: list[int]) -> int:
    """Length of the longest end of the first that the second begins with."""
    longest = min(len(first), len(second))
    return next((n for n in range(longest, 0, -1) if first[-n:] == second[:n]), 0)
