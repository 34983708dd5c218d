"""Weights on disk: the files that transformers reads in a folder, and the tensors' headers."""

import json
import re
import zlib
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

__all__ = ["Header", "checksums", "read_headers", "tensor_bytes", "weight_files"]

#: shape and dtype of a tensor on disk, as safetensors writes it
Header = tuple[tuple[int, ...], str]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_files(folder: Path | str) -> list[Path]:
    """Return the safetensors files that transformers reads in a folder.

    By precedence: the file that ``transformers_weights`` of ``config.json`` names,
    ``model.safetensors``, the files of the index. Other files (``consolidated.safetensors``,
    adapters) do not belong to the model.

    :raises ValueError: if the folder holds none of these, or a file of the index is missing
    """
    folder = Path(folder)
    for name in (_file_of_config(folder), SINGLE, INDEX):
        if name is not None and (folder / name).is_file():
            return (
                [folder / name] if name.endswith(".safetensors") else _files_of_index(folder / name)
            )
    raise ValueError(f"{folder} holds neither {SINGLE} nor {INDEX}")


def read_headers(folder: Path | str) -> dict[str, Header]:
    """Return the headers of all tensors of a folder, by name, without reading data.

    :raises ValueError: if the folder holds no weights, or one of its files is broken or missing
    """
    headers = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118, not a dict
                    view = shard.get_slice(name)
                    headers[name] = tuple(view.get_shape()), view.get_dtype()
        except SafetensorError as error:
            raise ValueError(f"{path}: broken or cut off: {error}") from None
    return headers


def checksums(folder: Path | str) -> dict[str, int]:
    """Return the CRC-32 of every tensor's data in a folder, by name.

    :raises ValueError: if the folder holds no weights, or one of its files is missing
    """
    sums = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118, not a dict
                data = shard.get_tensor(name).contiguous().reshape(-1).view(torch.uint8)
                sums[name] = zlib.crc32(data.numpy())
    return sums


def tensor_bytes(header: Header) -> int:
    """Return the bytes of a tensor's data."""
    shape, dtype = header
    bits = re.search(r"\d+", dtype)  # BF16, F8_E4M3, BOOL
    return prod(shape) * (int(bits[0]) if bits else 8) // 8


def _file_of_config(folder: Path) -> str | None:
    """Return the name of the weight file that ``config.json`` names; None if it names none."""
    try:
        name = json.loads((folder / "config.json").read_text()).get("transformers_weights")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return name if isinstance(name, str) and ".." not in Path(name).parts else None


def _files_of_index(path: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(path.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: no table 'weight_map' of file names: {error}") from None
    wrong = [name for name in names if not isinstance(name, str) or ".." in Path(name).parts]
    if wrong:
        raise ValueError(f"{path}: weight_map must name files of the folder, got {wrong[0]!r}")
    shards = [path.parent / name for name in names]
    for shard in shards:
        if not shard.is_file():
            raise ValueError(f"{path} names {shard.name}, which is missing")
    return shards
