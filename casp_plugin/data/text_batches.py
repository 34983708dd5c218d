"""Texts become the batches that llm-compressor calibrates on."""

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
    """Batches of texts as ``oneshot`` takes them, the longest first; of the share of this rank,
    where several calibrate together.

    The texts of a batch have the same number of tokens, so that none is cut to the shortest and
    none padded: llm-compressor's GPTQ and observers count padding as they count tokens (it offers
    a mask for AWQ alone). Where fewer than ``batch_size`` texts are of a length, a batch is
    smaller.

    :param texts: as ``load_text`` gives them, or any dataset with a column ``text``; rows without
        tokens are left out, with a warning that counts them
    :param max_seq_length: tokens of a text at most
    :param batch_size: texts of a batch at most
    :raises ValueError: if no text has tokens, or fewer have than there are ranks
    """
    special = adds_special_tokens(texts)
    found = [token_ids(text, tokenizer, max_seq_length, special) for text in texts["text"]]
    rows, found = len(found), [ids for ids in found if ids]
    if len(found) < rows:
        logger.warning(f"{rows - len(found)} of {rows} texts left out: they have no tokens")
    if len(found) < number_of_ranks():
        raise ValueError(f"{len(found)} of {rows} texts have tokens to calibrate on")
    masks = [[1] * len(ids) for ids in found]
    data = Dataset.from_dict({"input_ids": found, "attention_mask": masks})
    data = data.shard(number_of_ranks(), rank(), contiguous=True)
    lengths = [len(ids) for ids in data["input_ids"]]
    batches = [
        same[start : start + batch_size]
        for _, alike in groupby(LengthAwareSampler(data), key=lengths.__getitem__)
        for same in [list(alike)]
        for start in range(0, len(same), batch_size)
    ]
    return DataLoader(data, batch_sampler=batches, collate_fn=default_data_collator)
