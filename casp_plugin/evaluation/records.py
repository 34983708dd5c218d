"""Measurements as JSON files: lists of pydantic models."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, TypeAdapter

from casp_plugin.system.files import write_whole

__all__ = ["load_records", "save_records"]

Kind = TypeVar("Kind", bound=BaseModel)


def save_records(records: Sequence[BaseModel], path: Path) -> None:
    """Write records of one class to a JSON file, whole or not at all."""
    write_whole(path, TypeAdapter(list[type(records[0])]).dump_json(list(records), indent=1))


def load_records(kind: type[Kind], path: Path, command: str) -> list[Kind]:
    """Read the records of a JSON file.

    :param kind: class of the records
    :param command: the command that writes such files, for the error
    :raises ValueError: if the file holds no records of this kind
    """
    try:
        records = TypeAdapter(list[kind]).validate_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} was not written by {command} --output: {error}") from None
    if not records:
        raise ValueError(f"{path} holds no results")
    return records
