"""Texts become the batches that llm-compressor calibrates on."""

from datasets import Dataset
from llmcompressor.args import DatasetArguments
from llmcompressor.datasets import get_calibration_dataloader
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from casp_plugin.ranks import number_of_ranks, rank

__all__ = ["calibration_loader", "dataset_arguments"]


def dataset_arguments(texts: Dataset, max_seq_length: int) -> dict:
    """Arguments of ``oneshot`` that calibrate on all of these texts, in their order."""
    return {
        "dataset": texts,
        "max_seq_length": max_seq_length,
        "num_calibration_samples": len(texts),
        "shuffle_calibration_samples": False,  # shuffled already, by a seed
    }


def calibration_loader(
    texts: Dataset, tokenizer: PreTrainedTokenizerBase, max_seq_length: int, batch_size: int = 1
) -> DataLoader:
    """The batches that ``oneshot`` would make of these texts; of the share of this rank, where
    several calibrate together. llm-compressor 0.14 shares out only the indices of texts that are
    the same on all ranks, so that every rank would read the first share."""
    texts = texts.shard(number_of_ranks(), rank(), contiguous=True)
    arguments = dataset_arguments(texts, max_seq_length)
    arguments = DatasetArguments(**arguments, batch_size=batch_size)
    return get_calibration_dataloader(arguments, tokenizer)
