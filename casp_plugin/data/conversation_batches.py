"""Questions about images become batches for a model, by the model's own processor.

One conversation a batch for calibration, so images may differ in size and number; an image is
processed when its batch is asked for.
"""

from collections.abc import Iterable
from typing import get_type_hints

import torch
from loguru import logger
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import BatchFeature, ProcessorMixin

from casp_plugin.data.conversations import Conversation, tell_broken
from casp_plugin.data.tokens import begins_by_itself
from casp_plugin.system.distributed import number_of_ranks, rank

__all__ = ["conversation_loader", "image_prefix", "processed", "prompt_text"]


def conversation_loader(
    conversations: Iterable[Conversation], processor: ProcessorMixin, max_length: int
) -> DataLoader:
    """Batches of one conversation each, as the model takes them: token ids, pixels and whatever
    else its processor makes. The processor's chat template sets question and answer.

    llm-compressor traces a model once, on its first batch, so that all batches must be of one kind:
    where some conversations have images, those without any are left out with a warning.

    :param processor: the model's own
    :param max_length: tokens a batch at most, those of images counted; the end of an answer is
        cut, a conversation whose images do not fit is left out with a warning
    :raises ValueError: if images and placeholders in a question do not agree in number, the
        processor refuses the images of more than ``BROKEN_SHARE``, or no conversation fits
    """
    conversations = list(conversations)
    if not conversations:
        raise ValueError("no conversations to make batches of")
    shown = [one for one in conversations if one.images] or conversations
    if len(shown) < len(conversations):
        logger.warning(f"{len(conversations) - len(shown)} conversations without images left out")
    batches = _Batches(shown, processor, max_length)
    for one in shown:
        prompt_text(one, processor)  # images and placeholders agree
    fits, lengths, refused = [], [], []
    for one in tqdm(shown, desc="Checking images"):
        try:
            lengths.append(batches.tokens_with_images(one))
        except ValueError as error:  # of the processor: too wide for it, for instance
            refused.append(str(error))
            continue
        if lengths[-1] <= max_length:
            fits.append(one)
    if refused:
        tell_broken(refused, len(shown), "images that the processor refuses")
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
    batches.all = fits[rank() :: number_of_ranks()]
    return DataLoader(batches, batch_size=None)


class _Batches(torch.utils.data.Dataset):
    """Conversations, processed when asked for."""

    def __init__(self, conversations: list[Conversation], processor, max_length: int):
        self.all = conversations
        self.processor = processor
        self.max_length = max_length

    def __len__(self) -> int:
        return len(self.all)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        made = self.tensors(self.all[index])
        tokens = made["input_ids"].shape[1]
        return {
            name: value[:, : self.max_length] if value.shape[:2] == (1, tokens) else value
            for name, value in made.items()
        }

    def tensors(self, one: Conversation) -> dict[str, torch.Tensor]:
        made = processed([one], self.processor)
        return {name: value for name, value in made.items() if torch.is_tensor(value)}

    def tokens_with_images(self, one: Conversation) -> int:
        """Tokens up to the last one of an image."""
        ids = self.tensors(one)["input_ids"][0]
        # what the placeholder becomes is another token in Gemma3
        kind = "video" if one.video else "image"
        known = set(getattr(self.processor, f"{kind}_token_ids", None) or ())
        if token := _placeholder(self.processor, one.video):
            known.add(self.processor.tokenizer.convert_tokens_to_ids(token))
        where = torch.isin(ids, torch.tensor(sorted(known - {None}), dtype=ids.dtype)).nonzero()
        return int(where[-1]) + 1 if one.images and len(where) else 1


def processed(
    conversations: list[Conversation], processor: ProcessorMixin, answered: bool = True, **padding
) -> BatchFeature:
    """Conversations as the model takes them, in one batch.

    :param answered: with the answers, and without the line break or space that may follow them; if
        not, the assistant's turn begins
    :param padding: arguments for the processor that say how to pad
    """
    shown = [one.decoded() for one in conversations]
    arguments = {"images": shown} if any(shown) else {}
    if any(one.video for one in conversations):
        arguments = {"videos": shown, "do_sample_frames": False}
    if answered and _takes_suffix(processor):
        arguments["suffix"] = [one.answer for one in conversations]
        answered = False
    texts = [prompt_text(one, processor, answered) for one in conversations]
    if answered:
        texts = [text.rstrip() for text in texts]
    begin = processor.tokenizer.bos_token
    # as transformers' own apply_chat_template does, and for beginnings of several tokens
    told = begin and texts[0].startswith(begin)
    if told or begins_by_itself(texts[0], processor.tokenizer):
        arguments["add_special_tokens"] = False
    made = processor(text=texts, return_tensors="pt", **arguments, **padding)
    if "suffix" not in arguments:  # labels of an answer that is not there
        made.pop("labels", None)
    return made


def _takes_suffix(processor: ProcessorMixin) -> bool:
    """Whether a processor wants the answer apart from the question (PaliGemma), whose tokens all
    see each other."""
    accepted = getattr(processor, "valid_processor_kwargs", None)
    texts = get_type_hints(accepted).get("text_kwargs") if accepted else None
    return "suffix" in getattr(texts, "__annotations__", {})


def prompt_text(one: Conversation, processor: ProcessorMixin, answered: bool = True) -> str:
    """A conversation as text with placeholders for its images, by the processor's chat template.

    :param answered: with the answer; without it the assistant's turn begins
    :raises ValueError: if images and placeholders in the question do not agree in number
    """
    token = _placeholder(processor, one.video)
    kind, wanted = ("video", 1) if one.video else ("image", len(one.images))
    marked = one.question.count(token) if token else 0
    if marked not in (0, wanted):
        raise ValueError(
            f"question {one.question[:80]!r} holds {marked} placeholders {token!r} for "
            f"{wanted} {kind}s"
        )
    shown = [] if marked else [{"type": kind}] * wanted
    messages = [{"role": "user", "content": [*shown, {"type": "text", "text": one.question}]}]
    if answered:
        content = [{"type": "text", "text": one.answer}]
        messages.append({"role": "assistant", "content": content})
    if getattr(processor, "chat_template", None):
        return processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not answered
        )
    text = f"{image_prefix(processor, one.video) * len(shown)}{one.question}"
    return f"{text} {one.answer}" if answered else text  # a token begins with the space


def _placeholder(processor: ProcessorMixin, video: bool = False) -> str | None:
    """What stands for an image, or a video, in a text, if the processor knows of any."""
    token = getattr(processor, "video_token" if video else "image_token", None)
    return None if token is None else str(token)


def image_prefix(processor: ProcessorMixin, video: bool = False) -> str:
    """What to write before a text about an image or a video: nothing where the processor itself
    puts its query tokens there (BLIP-2)."""
    return "" if hasattr(processor, "num_query_tokens") else _placeholder(processor, video) or ""
