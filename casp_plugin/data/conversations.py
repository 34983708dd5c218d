"""Questions about images and their answers, read from files, folders and the hub.

Memory holds the files of images, which are decoded when they are used.
"""

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Image, List
from loguru import logger
from PIL import Image as PILImage
from PIL import ImageOps
from tqdm import tqdm

from casp_plugin.data.sources import read_source

__all__ = ["Conversation", "load_conversations", "warn_broken"]

#: share of the rows whose images may be unreadable before it is an error
BROKEN_SHARE = 0.1


@dataclass(frozen=True)
class Conversation:
    """A question about images, and its answer.

    :param images: bytes or path of an image file; none for plain text
    :param question: the user's text
    :param answer: the assistant's text
    :param task: kind of the question, to tell scores apart
    :param video: whether the images are the frames of one video
    """

    images: tuple[bytes | Path, ...]
    question: str
    answer: str
    task: str = ""
    video: bool = False

    def decoded(self) -> list[PILImage.Image]:
        """Return the images in RGB, rotated as their EXIF data says.

        :raises OSError: if an image cannot be read
        """
        files = [BytesIO(image) if isinstance(image, bytes) else image for image in self.images]
        images = [ImageOps.exif_transpose(PILImage.open(file)) for file in files]
        return [image.convert("RGB") for image in images]


def load_conversations(
    source: str | Dataset,
    samples: int,
    image_column: str = "image",
    question_column: str = "question",
    answer_column: str = "answer",
    split: str = "train",
    config_name: str | None = None,
    seed: int = 0,
    task_column: str | None = None,
    video_column: str | None = None,
) -> list[Conversation]:
    """Read questions about images, shuffled.

    Rows with an image that cannot be read, or with neither question nor answer, are left out, with
    a warning that counts them.

    :param source: a .jsonl, .json, .parquet or .csv file, in which paths of images are relative to
        it; a folder made by ``save_to_disk``; a folder of images beside a ``metadata.jsonl`` or
        ``metadata.csv`` whose ``file_name`` names them (they come as column ``image``); a dataset
        id on the Hugging Face hub; or a dataset
    :param samples: largest number of rows to take
    :param image_column: column that holds an image, a list of images or nothing; an image is a
        path or the bytes of a file
    :param question_column: column that holds the user's text
    :param answer_column: column that holds the assistant's text
    :param split: split to read, where the source has several
    :param config_name: configuration of a hub dataset
    :param seed: seed of the shuffle
    :param task_column: column that names the kind of question, if any
    :param video_column: column that holds the frames of a video, a list of images, instead of an
        ``image_column``
    :raises ValueError: if the source does not exist, has no such column or no rows, or if more
        than ``BROKEN_SHARE`` of the rows have an image that cannot be read
    """
    if isinstance(source, DatasetDict):
        raise ValueError(f"a dataset of splits {list(source)}: pass one of them")
    if isinstance(source, Dataset):
        data, source, folder = source, "given", Path()
    else:
        data = read_source(source, split, config_name)
        folder = Path(source) if Path(source).is_dir() else Path(source).parent
    visual_column = video_column or image_column
    columns = [visual_column, question_column, answer_column, *filter(None, [task_column])]
    missing = [column for column in columns if column not in data.column_names]
    if missing:
        raise ValueError(
            f"dataset {source!r} has no column {missing[0]!r}; its columns are {data.column_names}"
        )
    data = _undecoded(data.select_columns(columns), visual_column).shuffle(seed=seed)
    conversations, broken, empty = [], [], 0
    for row in tqdm(data, desc="Reading images", total=min(samples, len(data))):
        texts = [
            _cell_text(row[column], column, source) for column in (question_column, answer_column)
        ]
        if not any(map(str.strip, texts)):
            empty += 1
            continue
        task = str(row[task_column]) if task_column else ""
        try:
            images = tuple(_image_file(image, folder) for image in _listed(row[visual_column]))
            conversation = Conversation(images, *texts, task, video=bool(video_column and images))
            conversation.decoded()
        except (OSError, SyntaxError, ValueError, TypeError, PILImage.DecompressionBombError) as e:
            broken.append(f"{type(e).__name__}: {e}")  # Pillow raises all these for broken files
            continue
        conversations.append(conversation)
        if len(conversations) == samples:
            break
    if broken:
        rows = len(broken) + len(conversations)
        warn_broken(broken, rows, f"images that cannot be read, of dataset {source!r}")
    if empty:
        rows = empty + len(broken) + len(conversations)
        logger.warning(
            f"{empty} of {rows} rows of dataset {source!r} left out: no question and no answer"
        )
    if not conversations:
        raise ValueError(f"dataset {source!r} holds no rows with a question or an answer")
    return conversations


def _undecoded(data: Dataset, column: str) -> Dataset:
    """Return a dataset whose images stay files: a broken image must not stop the reading."""
    feature = data.features[column]
    if isinstance(feature, Image):
        return data.cast_column(column, Image(decode=False))
    if isinstance(feature, List) and isinstance(feature.feature, Image):
        return data.cast_column(column, List(Image(decode=False)))
    return data


def warn_broken(errors: list[str], rows: int, problem: str) -> None:
    """Warn of broken rows that are left out.

    :param errors: one message per broken row
    :param rows: number of all rows
    :param problem: words for what is wrong, after "rows have"
    :raises ValueError: if more than ``BROKEN_SHARE`` of the rows are broken
    """
    message = f"{len(errors)} of {rows} rows have {problem}: {errors[0]}"
    if len(errors) > BROKEN_SHARE * rows:
        raise ValueError(message)
    logger.warning(f"{message}; left out")


def _cell_text(value: Any, column: str, source: str) -> str:
    """Return the text of a cell.

    :raises ValueError: if the cell holds a list or a table
    """
    if isinstance(value, list | dict):
        raise ValueError(
            f"dataset {source!r}: column {column!r} holds {value!r:.80}, not one text a row"
        )
    return "" if value is None else str(value)


def _listed(value: Any) -> list:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _image_file(image: str | bytes | dict, folder: Path) -> bytes | Path:
    """Return the bytes or the path of an image.

    :raises TypeError: if the cell holds neither
    """
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path") or ""
    return image if isinstance(image, bytes) else folder / image
