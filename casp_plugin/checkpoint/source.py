"""What a model's own checkpoint holds beside what its class builds: tensors and files that are
copied unchanged, so that nothing is lost."""

import json
import os
import shutil
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from loguru import logger
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from casp_plugin.model.load import names_in_memory
from casp_plugin.model.weights import INDEX, SINGLE, Header, read_headers, weight_files
from casp_plugin.plan.plan import PLAN_NAME

__all__ = ["copy_files", "copy_tensors", "source_folder", "unbuilt_tensors"]

#: weights in any format, which `save_pretrained` writes anew; adapters, which loading would apply
_WEIGHTS = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.ot", "*.gguf"),
    *("*.onnx", "*.onnx_data", "*.tflite", "*.npz"),
)
_BESIDE = ("*.safetensors.index.json", "*.bin.index.json", "adapter_config.json")
#: the file that holds tensors which the class does not build
_UNBUILT = "model-unbuilt.safetensors"
#: what a single file is called once there is another
_SHARD = "model-00001-of-00001.safetensors"


def source_folder(name: str) -> Path | None:
    """Return the folder of a model, with all its files but other formats of the weights; None for
    one that was made in memory or cannot be reached.

    :param name: folder or Hugging Face id
    """
    if not name or Path(name).is_dir():
        return Path(name) if name else None
    try:
        return Path(snapshot_download(name, ignore_patterns=list(_WEIGHTS)))
    except (OSError, ValueError, HFValidationError) as error:
        logger.debug(f"no folder of {name}: {error}")
        return None


def unbuilt_tensors(folder: Path, bare: PreTrainedModel) -> dict[str, Header]:
    """Return the tensors of a checkpoint that a model's class does not build, by name on disk:
    layers that predict several tokens (``mtp``), heads of another task.

    :param folder: with safetensors
    :param bare: the model that was loaded from it, as loading builds it; the meta device will do
    :raises ValueError: if the folder holds no weights, or broken ones
    """
    headers = read_headers(folder)
    names, known = names_in_memory(headers, bare), bare.state_dict()
    return {name: headers[name] for name in headers if names[name] not in known}


def copy_tensors(source: Path, names: Iterable[str], folder: Path) -> None:
    """Copy tensors into a file of their own beside a checkpoint, listed in its index; those that
    are there already stay.

    :param source: folder that holds them
    :param names: names on disk
    :param folder: the checkpoint, with one file or an index
    :raises ValueError: if one is not there
    """
    there = _weight_map(folder)
    wanted = [name for name in names if name not in there]
    found = {}
    for path in weight_files(source) if wanted else ():
        with safe_open(path, framework="pt") as shard:
            found |= {name: shard.get_tensor(name) for name in {*wanted} & {*shard.keys()}}
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ValueError(f"{source} does not hold {missing[0]}, which is copied unchanged")
    if found:
        save_file(found, folder / _UNBUILT, metadata={"format": "pt"})
        there |= dict.fromkeys(found, _UNBUILT)
    if len({*there.values()}) > 1 and (folder / SINGLE).exists():  # read instead of the index
        (folder / SINGLE).rename(folder / _SHARD)
        there = {name: _SHARD if file == SINGLE else file for name, file in there.items()}
        found = there
    if found:
        total = sum((folder / file).stat().st_size for file in {*there.values()})
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(there.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def copy_files(source: Path, folder: Path) -> None:
    """Copy the files of a model that are no weights and that a checkpoint does not have yet,
    folders too: code, prompts, poolings, licences; and the weights of parts that ``modules.json``
    lists. Other weights that stay behind are named in a warning.

    :param source: the original model
    :param folder: the checkpoint
    """
    parts, left = _listed_parts(source), []
    for path in _files(source):
        name = path.relative_to(source)
        weights = any(fnmatch(path.name, pattern) for pattern in (*_WEIGHTS, *_BESIDE))
        if weights and name.parts[0] not in parts:
            left.append(str(name))
        elif not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
    try:
        read = {INDEX, *(each.name for each in weight_files(source))}
    except ValueError:  # none that transformers reads from safetensors
        read = set()
    others = [name for name in left if name not in read]
    if others:
        logger.warning(f"other weights of {source} are not copied: {', '.join(others[:4])}")


def _files(source: Path) -> list[Path]:
    """Files of a model, of folders too, but for hidden ones and for checkpoints that were written
    there."""
    found, seen = [], set()
    for folder, folders, names in os.walk(source, followlinks=True):
        inner = Path(folder) != source
        if Path(folder).resolve() in seen or (inner and PLAN_NAME in names):
            folders.clear()
            continue
        seen.add(Path(folder).resolve())
        folders[:] = [each for each in folders if not each.startswith(".")]
        found += [Path(folder) / name for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def _weight_map(folder: Path) -> dict[str, str]:
    """The file of every tensor of a checkpoint, by name; of its index too where llm-compressor has
    written one beside a single file (tensors of `mtp`)."""
    index = (folder / INDEX).read_text() if (folder / INDEX).exists() else '{"weight_map": {}}'
    more = {folder / name for name in json.loads(index)["weight_map"].values()}
    found = {}
    for path in sorted({*weight_files(folder), *more}):
        with safe_open(path, framework="pt") as shard:
            found |= dict.fromkeys(shard.keys(), path.name)
    return found


def _listed_parts(source: Path) -> set[str]:
    """Folders that the ``modules.json`` of sentence-transformers lists."""
    try:
        listed = json.loads((source / "modules.json").read_text())
        return {Path(each["path"]).parts[0] for each in listed if each["path"]}
    except (OSError, ValueError, TypeError, KeyError):
        return set()
