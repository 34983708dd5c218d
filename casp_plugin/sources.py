"""Text from files, folders and the hub."""

from importlib.resources import files
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from transformers import PreTrainedTokenizerBase

__all__ = ["BUNDLED", "CHAT_COLUMN", "load_text", "read_source"]

#: texts that ship with the package (the Jargon File, public domain): to calibrate and to score on
BUNDLED = {"bundled": "calibration.jsonl", "bundled-heldout": "heldout.jsonl"}
#: column that holds chats, as the Hugging Face hub calls it
CHAT_COLUMN = "messages"
_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def load_text(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    column: str = "text",
    split: str = "train",
    config_name: str | None = None,
    seed: int = 0,
) -> Dataset:
    """Texts to calibrate on, one sample a row, shuffled.

    A column ``messages`` is turned into text by the tokenizer's chat template.

    :param source: one of ``BUNDLED``; a .jsonl, .json, .parquet, .csv or .txt file (a .txt file is
        cut at empty lines); a folder made by ``save_to_disk``; or a dataset id on the Hugging Face
        hub
    :param tokenizer: tokenizer of the model
    :param samples: largest number of samples to take
    :param column: column that holds the text
    :param split: split to read, where the source has several
    :param config_name: configuration of a hub dataset
    :param seed: seed of the shuffle
    :return: a dataset with the one column ``text``
    :raises ValueError: if the source does not exist, has no such column or split, or no text
    """
    data = read_source(source, split, config_name)
    if CHAT_COLUMN in data.column_names and column not in data.column_names:
        data = data.map(
            lambda row: {column: tokenizer.apply_chat_template(row[CHAT_COLUMN], tokenize=False)},
            desc="Applying the chat template",
        )
    if column not in data.column_names:
        raise ValueError(
            f"dataset {source!r} has no column {column!r}; its columns are {data.column_names}"
        )
    data = data.select_columns([column]).rename_columns(
        {column: "text"} if column != "text" else {}
    )
    data = data.filter(lambda row: bool(row["text"] and row["text"].strip()))
    if not len(data):
        raise ValueError(f"dataset {source!r} holds no text in column {column!r}")
    return data.shuffle(seed=seed).select(range(min(samples, len(data))))


def read_source(source: str, split: str = "train", config_name: str | None = None) -> Dataset:
    """
    :param source: a file, a folder, a hub id or one of ``BUNDLED``, as in ``load_text``
    :raises ValueError: if it cannot be read
    """
    path = Path(source)
    if source in BUNDLED:
        path = Path(str(files("casp_plugin") / "text" / BUNDLED[source]))
    try:
        if path.suffix == ".txt" and path.is_file():
            return load_dataset("text", data_files=str(path), split="train", sample_by="paragraph")
        if path.suffix in _FORMATS and path.is_file():
            return load_dataset(_FORMATS[path.suffix], data_files=str(path), split="train")
        if path.is_dir() and any(path.glob("metadata.*")):  # images and a table about them
            return load_dataset("imagefolder", data_dir=str(path), split=split)
        if path.is_dir():
            data = load_from_disk(str(path))
            return data[split] if isinstance(data, DatasetDict) else data
        if path.suffix in {".txt", *_FORMATS} or path.is_absolute():
            raise FileNotFoundError("no such file")
        return load_dataset(source, config_name, split=split)
    except Exception as error:  # each reader has exceptions of its own
        raise ValueError(f"cannot read dataset {source!r} (split {split!r}): {error}") from error
