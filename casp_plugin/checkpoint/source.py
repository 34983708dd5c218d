"""Tensors and files of the original checkpoint that the model's class does not build: they are
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

#: weights in any format, which ``save_pretrained`` writes anew
_WEIGHT_PATTERNS = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.ot", "*.gguf"),
    *("*.onnx", "*.onnx_data", "*.tflite", "*.npz"),
)
#: indexes of weights; adapters, which loading would apply
_WEIGHT_SIDECARS = ("*.safetensors.index.json", "*.bin.index.json", "adapter_config.json")
#: the file of the tensors that the class does not build
_UNBUILT = "model-unbuilt.safetensors"
#: name of a single file once there is another
_SHARD = "model-00001-of-00001.safetensors"


def source_folder(name: str) -> Path | None:
    """Return the folder of a model, with all its files except weights in other formats; None for a
    model that was made in memory or cannot be reached.

    :param name: folder or Hugging Face id; a model on the hub is downloaded
    """
    if not name or Path(name).is_dir():
        return Path(name) if name else None
    try:
        return Path(snapshot_download(name, ignore_patterns=list(_WEIGHT_PATTERNS)))
    except (OSError, ValueError, HFValidationError) as error:
        logger.debug(f"no folder of {name}: {error}")
        return None


def unbuilt_tensors(folder: Path, bare: PreTrainedModel) -> dict[str, Header]:
    """Return the tensors of a checkpoint that a model's class does not build, by name on disk, such
    as layers that predict several tokens (``mtp``) and heads of another task.

    :param folder: checkpoint folder with safetensors
    :param bare: the model as loading builds it from the folder, on any device, meta too
    :raises ValueError: if the folder holds no weights, or broken ones
    """
    headers = read_headers(folder)
    names, known = names_in_memory(headers, bare), bare.state_dict()
    return {name: headers[name] for name in headers if names[name] not in known}


def copy_tensors(source: Path, names: Iterable[str], folder: Path) -> None:
    """Add tensors of a checkpoint to another one, in a file of their own that its index lists.

    :param source: folder that holds the tensors
    :param names: names on disk; tensors that ``folder`` holds already are left as they are
    :param folder: checkpoint folder, with a single file of weights or an index
    :raises ValueError: if ``source`` lacks a tensor
    """
    files = _weight_map(folder)
    wanted = [name for name in names if name not in files]
    copied = {}
    for path in weight_files(source) if wanted else ():
        with safe_open(path, framework="pt") as shard:
            copied |= {name: shard.get_tensor(name) for name in {*wanted} & {*shard.keys()}}
    missing = [name for name in wanted if name not in copied]
    if missing:
        raise ValueError(f"{source} does not hold {missing[0]}, which is copied unchanged")
    if copied:
        save_file(copied, folder / _UNBUILT, metadata={"format": "pt"})
        files |= dict.fromkeys(copied, _UNBUILT)
    # a single file would be read instead of the index
    renamed = len({*files.values()}) > 1 and (folder / SINGLE).exists()
    if renamed:
        (folder / SINGLE).rename(folder / _SHARD)
        files = {name: _SHARD if file == SINGLE else file for name, file in files.items()}
    if copied or renamed:
        total = sum((folder / file).stat().st_size for file in {*files.values()})
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def copy_files(source: Path, folder: Path) -> None:
    """Copy files and folders of a model that a checkpoint lacks: code, prompts, poolings, licences.

    Weights are copied only of the modules that ``modules.json`` lists; a warning names weights that
    are neither copied nor read by transformers.

    :param source: folder of the original model
    :param folder: checkpoint folder
    """
    modules, left_out = _listed_modules(source), []
    for path in _files(source):
        name = path.relative_to(source)
        patterns = (*_WEIGHT_PATTERNS, *_WEIGHT_SIDECARS)
        weights = any(fnmatch(path.name, pattern) for pattern in patterns)
        if weights and name.parts[0] not in modules:
            left_out.append(str(name))
        elif not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
    try:
        read = {INDEX, *(path.name for path in weight_files(source))}
    except ValueError:  # the source has no safetensors
        read = set()
    others = [name for name in left_out if name not in read]
    if others:
        logger.warning(f"other weights of {source} are not copied: {', '.join(others[:4])}")


def _files(source: Path) -> list[Path]:
    """Return the files of a model in all folders, without hidden files and folders and without
    checkpoints that were written inside the model's folder."""
    files, seen = [], set()
    for folder, folders, names in os.walk(source, followlinks=True):
        inner = Path(folder) != source
        if Path(folder).resolve() in seen or (inner and PLAN_NAME in names):
            folders.clear()
            continue
        seen.add(Path(folder).resolve())
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(folder) / name for name in names if not name.startswith(".")]
    return sorted(path for path in files if path.is_file())


def _weight_map(folder: Path) -> dict[str, str]:
    """Return the file of every tensor of a checkpoint, by the tensor's name. An index's files count
    too where llm-compressor has written one beside a single file (tensors of ``mtp``)."""
    index = (folder / INDEX).read_text() if (folder / INDEX).exists() else '{"weight_map": {}}'
    more = {folder / name for name in json.loads(index)["weight_map"].values()}
    files = {}
    for path in sorted({*weight_files(folder), *more}):
        with safe_open(path, framework="pt") as shard:
            files |= dict.fromkeys(shard.keys(), path.name)
    return files


def _listed_modules(source: Path) -> set[str]:
    """Return the folders that the ``modules.json`` of sentence-transformers lists."""
    try:
        listed = json.loads((source / "modules.json").read_text())
        return {Path(module["path"]).parts[0] for module in listed if module["path"]}
    except (OSError, ValueError, TypeError, KeyError):
        return set()
