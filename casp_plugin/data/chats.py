"""Chats as text, by a tokenizer's chat template."""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

__all__ = ["CHAT_COLUMNS", "chat_writer", "messages_of"]

#: columns that hold chats, as the Hugging Face hub and ShareGPT call them
CHAT_COLUMNS = ("messages", "conversations")
#: role of a speaker in ShareGPT's tables
_ROLES = {"human": "user", "gpt": "assistant"} | {
    role: role for role in ("system", "user", "assistant", "tool")
}
_VALID = "a list of {role, content} or {from, value} tables"


def chat_writer(tokenizer: PreTrainedTokenizerBase) -> Callable[[Any], str | None]:
    """Return a function that turns a chat, a cell of a dataset, into text.

    It takes the chats that :func:`messages_of` takes, returns None for an empty chat, and raises
    ValueError for a chat that the chat template refuses.

    :raises ValueError: if the tokenizer has no chat template
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template to write chats with: name a column of text, or use "
            "a model with a chat template"
        )
    in_parts = not _reads_strings(tokenizer)

    def write(cell: Any) -> str | None:
        messages = messages_of(cell)
        if not messages:
            return None
        if in_parts:
            messages = [
                {**message, "content": [{"type": "text", "text": message["content"]}]}
                for message in messages
            ]
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # templates raise anything
            raise ValueError(f"the tokenizer's chat template refuses it: {error}") from error

    return write


def messages_of(cell: Any) -> list[dict]:
    """Return the turns of a chat as tables of ``role``, ``content`` (a string) and other keys.

    :param cell: a list of {role, content} tables, whose content may be a list of texts, or of
        ShareGPT's {from, value} tables; None for an empty chat
    :raises ValueError: if it is anything else
    """
    if cell is None:
        return []
    if not isinstance(cell, list):
        raise ValueError(f"it holds {cell!r:.60}, not {_VALID}")
    return [_message_of_turn(turn) for turn in cell]


def _message_of_turn(turn: Any) -> dict:
    # Arrow gives every table the keys of all rows, None where a row lacks them
    turn = {k: v for k, v in turn.items() if v is not None} if isinstance(turn, dict) else {}
    if "role" in turn:
        return {**turn, "content": _content_text(turn.get("content"))}
    if "from" not in turn:
        raise ValueError(f"it is not {_VALID}")
    if turn["from"] not in _ROLES:
        raise ValueError(f"speaker {turn['from']!r} is none of {', '.join(_ROLES)}")
    return {"role": _ROLES[turn["from"]], "content": _content_text(turn.get("value"))}


def _content_text(content: Any) -> str:
    """Return the text of a turn; an empty text where the turn only calls tools."""
    if isinstance(content, list):
        return "".join(_content_text(_text_of_part(part)) for part in content)
    if not isinstance(content, str | None):
        raise ValueError(f"a turn says {content!r:.60}, which is no text")
    return content or ""


def _text_of_part(part: Any) -> str:
    if isinstance(part, dict) and part.get("type", "text") == "text" and "text" in part:
        return part["text"]
    raise ValueError(f"a turn holds {part!r:.60}; only texts are read, as {{type: text, text}}")


def _reads_strings(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether the template writes contents that are strings; LLaVA's leaves them out."""
    probe = "casp"
    try:
        return probe in tokenizer.apply_chat_template(
            [{"role": "user", "content": probe}], tokenize=False
        )
    except Exception:  # raised again with the row that the template refuses
        return True
