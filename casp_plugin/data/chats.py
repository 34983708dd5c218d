"""Chats become text, by a tokenizer's chat template."""

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
    """Make a function that turns a cell of a dataset into text.

    It takes a chat as ``messages_of`` does, gives None for one that is empty, and raises ValueError
    where the chat template refuses it.

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
            parts = [[{"type": "text", "text": each["content"]}] for each in messages]
            messages = [
                {**each, "content": content} for each, content in zip(messages, parts, strict=True)
            ]
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # whatever a template stumbles over
            raise ValueError(f"the tokenizer's chat template refuses it: {error}") from error

    return write


def messages_of(cell: Any) -> list[dict]:
    """The turns of a chat as ``role`` and ``content``, a string, and what else a turn has.

    :param cell: a list of {role, content} tables, whose content may be a list of texts, or of
        ShareGPT's {from, value} tables; or None
    :raises ValueError: if it is no such list
    """
    if cell is None:
        return []
    if not isinstance(cell, list):
        raise ValueError(f"it holds {cell!r:.60}, not {_VALID}")
    return [_message(turn) for turn in cell]


def _message(turn: Any) -> dict:
    # a table of Arrow has all keys that any row has
    turn = {k: v for k, v in turn.items() if v is not None} if isinstance(turn, dict) else {}
    if "role" in turn:
        return {**turn, "content": _words(turn.get("content"))}
    if "from" not in turn:
        raise ValueError(f"it is not {_VALID}")
    if turn["from"] not in _ROLES:
        raise ValueError(f"speaker {turn['from']!r} is none of {', '.join(_ROLES)}")
    return {"role": _ROLES[turn["from"]], "content": _words(turn.get("value"))}


def _words(content: Any) -> str:
    """What a turn says; nothing where it only calls tools."""
    if isinstance(content, list):
        return "".join(_words(_text_of_part(part)) for part in content)
    if not isinstance(content, str | None):
        raise ValueError(f"a turn says {content!r:.60}, which is no text")
    return content or ""


def _text_of_part(part: Any) -> str:
    if isinstance(part, dict) and part.get("type", "text") == "text" and "text" in part:
        return part["text"]
    raise ValueError(f"a turn holds {part!r:.60}; only texts are read, as {{type: text, text}}")


def _reads_strings(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template writes a content that is a string: that of LLaVA leaves it out."""
    said = "casp"
    try:
        return said in tokenizer.apply_chat_template(
            [{"role": "user", "content": said}], tokenize=False
        )
    except Exception:  # said with the row that it refuses
        return True
