"""Batches of texts that llm-compressor calibrates on."""

from itertools import groupby

from datasets import Dataset
from llmcompressor.datasets.utils import LengthAwareSampler
from loguru import logger
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, default_data_collator

from casp_plugin.data.sources import adds_special_tokens
from casp_plugin.data.tokens import token_ids
from casp_plugin.system.distributed import number_of_ranks, rank

__all__ = ["calibration_loader"]


def calibration_loader(
    texts: Dataset, tokenizer: PreTrainedTokenizerBase, max_seq_length: int, batch_size: int = 1
) -> DataLoader:
    """Return a loader of batches of texts for ``oneshot``, the longest texts first.

    Where several ranks calibrate together, it holds this rank's share. The texts of a batch have
    the same number of tokens, so that no text is cut to the shortest and none is padded:
    llm-compressor's GPTQ and observers count padding as tokens (only AWQ takes a mask). Where fewer
    than ``batch_size`` texts have one length, a batch is smaller.

    :param texts: result of :func:`~casp_plugin.data.sources.load_text`, or any dataset with a
        column ``text``; rows without tokens are left out, with a warning that counts them
    :param max_seq_length: largest number of tokens of a text
    :param batch_size: largest number of texts of a batch
    :return: loader of ``input_ids`` and ``attention_mask``, shape (texts, tokens)
    :raises ValueError: if fewer texts have tokens than there are ranks
    """
    special = adds_special_tokens(texts)
    rows = [token_ids(text, tokenizer, max_seq_length, special) for text in texts["text"]]
    kept = [ids for ids in rows if ids]
    if len(kept) < len(rows):
        logger.warning(
            f"{len(rows) - len(kept)} of {len(rows)} texts left out: they have no tokens"
        )
    if len(kept) < number_of_ranks():
        raise ValueError(f"{len(kept)} of {len(rows)} texts have tokens to calibrate on")
    masks = [[1] * len(ids) for ids in kept]
    data = Dataset.from_dict({"input_ids": kept, "attention_mask": masks})
    data = data.shard(number_of_ranks(), rank(), contiguous=True)
    lengths = [len(ids) for ids in data["input_ids"]]
    batches = [
        same[start : start + batch_size]
        for _, alike in groupby(LengthAwareSampler(data), key=lengths.__getitem__)
        for same in [list(alike)]
        for start in range(0, len(same), batch_size)
    ]
    return DataLoader(data, batch_sampler=batches, collate_fn=default_data_collator)
