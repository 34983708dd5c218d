"""Pictures of one colour, drawn when they are asked for."""

from pathlib import Path

from datasets import DatasetDict, load_dataset
from PIL import Image


def read(**_) -> DatasetDict:
    path = Path(__file__).parents[1] / "colours.jsonl"
    return load_dataset("json", data_files={"test": str(path)})


def image(doc: dict) -> list[Image.Image]:
    return [Image.new("RGB", (96, 96), doc["colour"])]
