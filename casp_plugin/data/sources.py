"""Texts from files, folders and the hub."""

import glob
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Value,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError
from loguru import logger
from transformers import PreTrainedTokenizerBase

from casp_plugin.data.chats import CHAT_COLUMNS, chat_writer

__all__ = ["BUNDLED", "adds_special_tokens", "check_utf8", "load_text", "read_source"]

#: texts that ship with the package (the Jargon File, public domain), to calibrate and to score on
BUNDLED = {"bundled": "calibration.jsonl", "bundled-heldout": "heldout.jsonl"}
#: reader of `datasets` and its settings, by suffix of a file
_READERS = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
    # only an empty cell is empty; NA and None are words
    ".csv": ("csv", {"keep_default_na": False, "na_values": [""]}),
    ".txt": ("text", {"sample_by": "paragraph", "encoding": "utf-8-sig"}),
}
_MARK = "add_special_tokens"


def load_text(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    column: str = "text",
    split: str = "train",
    config_name: str | None = None,
    seed: int = 0,
) -> Dataset:
    """Read texts to calibrate on, one sample per row, shuffled.

    Rows without text are left out, with a warning that counts them. A column of chats, lists of
    {role, content} or ShareGPT's {from, value}, is turned into text by the tokenizer's chat
    template. Where ``column`` is missing, ``messages`` or ``conversations`` is read.

    :param source: one of ``BUNDLED``; a .jsonl, .json, .parquet, .csv or .txt file in UTF-8 (a .txt
        file is cut at empty lines); a folder made by ``save_to_disk``; or a dataset id on the
        Hugging Face hub
    :param tokenizer: tokenizer of the model
    :param samples: largest number of samples to take
    :param column: column that holds the text
    :param split: split to read, where the source has several
    :param config_name: configuration of a hub dataset
    :param seed: seed of the shuffle
    :return: a dataset with the column ``text``; for chats also ``add_special_tokens``, False, an
        argument of the tokenizer
    :raises ValueError: if the source does not exist, has no such column or split, or no text; if a
        row holds neither text nor a chat, or a chat that the template refuses
    """
    data = read_source(source, split, config_name)
    names = (column, *CHAT_COLUMNS)
    column = next((name for name in names if name in data.column_names), column)
    if column not in data.column_names:
        raise ValueError(
            f"dataset {source!r} has no column {column!r}; its columns are {data.column_names}"
        )
    data = data.select_columns([column]).rename_columns(
        {column: "text"} if column != "text" else {}
    )
    feature = data.features["text"]
    if not isinstance(feature, Value) or feature.dtype not in ("string", "large_string", "null"):
        data = _column_as_text(data, tokenizer, f"dataset {source!r}", column)
    rows = len(data)
    data = data.filter(lambda row: bool(row["text"] and row["text"].strip()))
    if not len(data):
        raise ValueError(f"dataset {source!r} holds no text in column {column!r}")
    if len(data) < rows:
        logger.warning(
            f"{rows - len(data)} of {rows} rows of dataset {source!r} hold no text in column "
            f"{column!r}: left out"
        )
    return data.shuffle(seed=seed).select(range(min(samples, len(data))))


def adds_special_tokens(texts: Dataset) -> bool:
    """Tell whether the tokenizer must add its special tokens to the texts of :func:`load_text`.

    It must not for chats, whose template writes them.
    """
    return _MARK not in texts.column_names


def _column_as_text(
    data: Dataset, tokenizer: PreTrainedTokenizerBase, source: str, column: str
) -> Dataset:
    """Return a dataset whose column ``text`` holds strings, made from strings or from chats.

    :param source: name of the dataset in errors
    :param column: name of the column in errors
    :raises ValueError: if a row holds neither text nor a chat, or another type than the first
    """
    first = next((cell for cell in data["text"] if cell not in (None, [])), None)
    chats = isinstance(first, list)
    try:
        write = chat_writer(tokenizer) if chats else _cell_as_text
    except ValueError as error:
        raise ValueError(f"{source}, column {column!r}: {error}") from None

    def text_of(row: dict, index: int) -> dict:
        try:
            text = write(row["text"])
        except ValueError as error:
            message = f"{source}, row {index + 1}, column {column!r}: {error}"
            raise ValueError(message) from error
        return {"text": text, _MARK: False} if chats else {"text": text}

    features = {"text": Value("string"), **({_MARK: Value("bool")} if chats else {})}
    return data.map(
        text_of,
        with_indices=True,
        features=Features(features),
        desc="Applying the chat template" if chats else "Reading texts",
    )


def _cell_as_text(cell: Any) -> str | None:
    if cell is None or cell == []:
        return None
    if isinstance(cell, str):
        return cell
    raise ValueError(f"it holds {cell!r:.60}, not text: name a column of strings (--text-column)")


def read_source(source: str, split: str = "train", config_name: str | None = None) -> Dataset:
    """Read a dataset.

    :param source: a file, a folder, a hub id or one of ``BUNDLED``, as in ``load_text``
    :raises ValueError: if it cannot be read
    """
    path = Path(source)
    if source in BUNDLED:
        path = Path(str(files("casp_plugin.data") / "text" / BUNDLED[source]))
    try:
        if path.is_file():
            return _read_file(path)
        if path.is_dir():
            return _read_folder(path, split)
        if path.suffix.lower() in _READERS or path.is_absolute():
            raise FileNotFoundError("no such file")
        return load_dataset(source, config_name, split=split)
    except Exception as error:  # readers have exceptions of their own
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        raise ValueError(
            f"cannot read dataset {source!r} (split {split!r}): {cause or error}"
        ) from error


def _read_file(path: Path) -> Dataset:
    """Read all rows of a file.

    :raises ValueError: if its suffix is unknown, or it is empty, not UTF-8 or no JSON
    """
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        raise ValueError(
            f"a file of kind {suffix!r} is not read; those that are: {', '.join(_READERS)}"
        )
    if not path.stat().st_size:
        raise ValueError("the file is empty")
    reader, settings = _READERS[suffix]
    if reader != "parquet":
        check_utf8(path)
    try:
        # escaped: data_files are patterns
        return load_dataset(reader, data_files=glob.escape(str(path)), split="train", **settings)
    except ValueError as error:
        if "corresponds to no data" in str(error):
            raise ValueError("the file has no rows") from None
        raise
    except DatasetGenerationError:
        if reader == "json":
            _check_json(path)
        raise


def _read_folder(path: Path, split: str) -> Dataset:
    """Read a split of a folder: images with a table, or a dataset of ``save_to_disk``.

    :raises ValueError: if there is no such split, or the table is not in UTF-8
    """
    tables = list(path.glob("metadata.*"))
    for table in tables:
        try:
            if table.suffix in (".csv", ".jsonl"):
                check_utf8(table)
        except ValueError as error:
            raise ValueError(f"{table.name}, {error}") from None
    if tables:
        return load_dataset("imagefolder", data_dir=glob.escape(str(path)), split=split)
    data = load_from_disk(str(path))
    if not isinstance(data, DatasetDict):
        return data
    if split not in data:
        raise ValueError(f"its splits are {', '.join(data)}")
    return data[split]


def check_utf8(path: Path) -> None:
    """Check that a file is in UTF-8.

    :raises ValueError: if it is not; the message names the first wrong line
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"line {number} is not UTF-8 (byte {line[error.start]:#04x}): save the file in "
                    "UTF-8"
                ) from None


def _check_json(path: Path) -> None:
    """Check that a file is JSON or JSON lines.

    :raises ValueError: if it is neither; the message names the first wrong line
    """
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {error.lineno} is no JSON: {error.msg}") from None
        return
    for number, line in enumerate(text.split("\n"), 1):
        try:
            row = json.loads(line) if line.strip() else {}
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} is no JSON: {error.msg}") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {number} holds {row!r:.60}, not a table {{column: value}}")
