"""Batches of questions about images, made by the model's own processor.

For calibration one conversation is a batch, so that images may differ in size and number; images
are processed when their batch is read.
"""

from collections.abc import Iterable
from typing import get_type_hints

import torch
from loguru import logger
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import BatchFeature, ProcessorMixin

from casp_plugin.data.conversations import Conversation, warn_broken
from casp_plugin.data.tokens import begins_by_itself
from casp_plugin.system.distributed import number_of_ranks, rank

__all__ = ["conversation_loader", "image_prefix", "processed", "prompt_text"]


def conversation_loader(
    conversations: Iterable[Conversation], processor: ProcessorMixin, max_length: int
) -> DataLoader:
    """Return a loader of batches of one conversation: token ids, pixels, further processor outputs.

    The processor's chat template formats question and answer. llm-compressor traces a model once,
    on its first batch, so that all batches must be alike: where some conversations have images,
    conversations without images are left out with a warning.

    :param processor: the model's own processor
    :param max_length: largest number of tokens of a batch, tokens of images included; the end of an
        answer is cut, a conversation whose images do not fit is left out with a warning
    :raises ValueError: if images and placeholders of a question differ in number, the processor
        refuses the images of more than ``BROKEN_SHARE`` of the conversations, or none fits
    """
    conversations = list(conversations)
    if not conversations:
        raise ValueError("no conversations to make batches of")
    usable = [c for c in conversations if c.images] or conversations
    if len(usable) < len(conversations):
        logger.warning(f"{len(conversations) - len(usable)} conversations without images left out")
    batches = _Batches(usable, processor, max_length)
    for conversation in usable:
        prompt_text(conversation, processor)  # raises where images and placeholders disagree
    fits, lengths, refused = [], [], []
    for conversation in tqdm(usable, desc="Checking images"):
        try:
            lengths.append(batches.tokens_with_images(conversation))
        except ValueError as error:  # of the processor, for an image too wide for instance
            refused.append(str(error))
            continue
        if lengths[-1] <= max_length:
            fits.append(conversation)
    if refused:
        warn_broken(refused, len(usable), "images that the processor refuses")
    if not fits:
        raise ValueError(
            f"no conversation fits max_length {max_length}: with its images the shortest takes "
            f"{min(lengths)} tokens"
        )
    if len(fits) < len(lengths):
        logger.warning(
            f"{len(lengths) - len(fits)} of {len(lengths)} conversations left out: with their "
            f"images they take up to {max(lengths)} tokens, over max_length {max_length}"
        )
    batches.conversations = fits[rank() :: number_of_ranks()]
    return DataLoader(batches, batch_size=None)


class _Batches(torch.utils.data.Dataset):
    """Conversations, processed when their batch is read."""

    def __init__(self, conversations: list[Conversation], processor, max_length: int):
        self.conversations = conversations
        self.processor = processor
        self.max_length = max_length

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        batch = self.tensors(self.conversations[index])
        tokens = batch["input_ids"].shape[1]
        return {
            name: value[:, : self.max_length] if value.shape[:2] == (1, tokens) else value
            for name, value in batch.items()
        }

    def tensors(self, conversation: Conversation) -> dict[str, torch.Tensor]:
        batch = processed([conversation], self.processor)
        return {name: value for name, value in batch.items() if torch.is_tensor(value)}

    def tokens_with_images(self, conversation: Conversation) -> int:
        """Return the number of tokens up to the last token of an image."""
        ids = self.tensors(conversation)["input_ids"][0]  # (tokens,)
        # Gemma 3 turns the placeholder into another token
        medium = "video" if conversation.video else "image"
        known = set(getattr(self.processor, f"{medium}_token_ids", None) or ())
        if token := _placeholder(self.processor, conversation.video):
            known.add(self.processor.tokenizer.convert_tokens_to_ids(token))
        where = torch.isin(ids, torch.tensor(sorted(known - {None}), dtype=ids.dtype)).nonzero()
        return int(where[-1]) + 1 if conversation.images and len(where) else 1


def processed(
    conversations: list[Conversation], processor: ProcessorMixin, answered: bool = True, **padding
) -> BatchFeature:
    """Return conversations as one batch of the model's inputs.

    :param answered: whether to include the answers, without white space after them; if not, texts
        end where the assistant's turn begins
    :param padding: the processor's arguments for padding
    """
    images = [conversation.decoded() for conversation in conversations]
    arguments = {"images": images} if any(images) else {}
    if any(conversation.video for conversation in conversations):
        arguments = {"videos": images, "do_sample_frames": False}
    if answered and _takes_suffix(processor):
        arguments["suffix"] = [conversation.answer for conversation in conversations]
        answered = False
    texts = [prompt_text(conversation, processor, answered) for conversation in conversations]
    if answered:
        texts = [text.rstrip() for text in texts]
    bos = processor.tokenizer.bos_token
    # as transformers' own apply_chat_template does, and for beginnings of several tokens
    begins_with_bos = bos and texts[0].startswith(bos)
    if begins_with_bos or begins_by_itself(texts[0], processor.tokenizer):
        arguments["add_special_tokens"] = False
    batch = processor(text=texts, return_tensors="pt", **arguments, **padding)
    if "suffix" not in arguments:  # without an answer, labels mean nothing
        batch.pop("labels", None)
    return batch


def _takes_suffix(processor: ProcessorMixin) -> bool:
    """Tell whether a processor takes the answer apart from the question.

    PaliGemma does: all tokens of a question attend to each other.
    """
    accepted = getattr(processor, "valid_processor_kwargs", None)
    texts = get_type_hints(accepted).get("text_kwargs") if accepted else None
    return "suffix" in getattr(texts, "__annotations__", {})


def prompt_text(
    conversation: Conversation, processor: ProcessorMixin, answered: bool = True
) -> str:
    """Return a conversation as text with placeholders for images, by the processor's chat template.

    :param answered: whether to include the answer; if not, the text ends where the assistant's
        turn begins
    :raises ValueError: if images and placeholders of the question differ in number
    """
    question = conversation.question
    token = _placeholder(processor, conversation.video)
    medium, count = ("video", 1) if conversation.video else ("image", len(conversation.images))
    marked = question.count(token) if token else 0
    if marked not in (0, count):
        raise ValueError(
            f"question {question[:80]!r} holds {marked} placeholders {token!r} for "
            f"{count} {medium}s"
        )
    placed = [] if marked else [{"type": medium}] * count
    messages = [{"role": "user", "content": [*placed, {"type": "text", "text": question}]}]
    if answered:
        content = [{"type": "text", "text": conversation.answer}]
        messages.append({"role": "assistant", "content": content})
    if getattr(processor, "chat_template", None):
        return processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not answered
        )
    text = f"{image_prefix(processor, conversation.video) * len(placed)}{question}"
    # the space belongs to the answer's first token
    return f"{text} {conversation.answer}" if answered else text


def _placeholder(processor: ProcessorMixin, video: bool = False) -> str | None:
    """Return the text that stands for an image or a video; None if the processor has none."""
    token = getattr(processor, "video_token" if video else "image_token", None)
    return None if token is None else str(token)


def image_prefix(processor: ProcessorMixin, video: bool = False) -> str:
    """Return the text to write before a question about an image or a video.

    It is empty where the processor itself adds query tokens (BLIP-2).
    """
    return "" if hasattr(processor, "num_query_tokens") else _placeholder(processor, video) or ""
