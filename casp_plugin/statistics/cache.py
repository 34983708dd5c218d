"""Measurements on disk: what a run measured, for itself when it is started again, and for other
runs of the same model and data.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, fields
from functools import reduce
from hashlib import blake2b
from operator import or_
from pathlib import Path

import torch
from loguru import logger
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from casp_plugin.maths.low_rank import Spectrum
from casp_plugin.plan.plan import UnitPlan
from casp_plugin.statistics.attention_maps import AttentionDensity
from casp_plugin.statistics.layer_notes import Measured
from casp_plugin.statistics.statistics import Request, Statistics
from casp_plugin.system.distributed import (
    barrier,
    gathered,
    is_source_process,
    number_of_ranks,
    rank,
)
from casp_plugin.system.files import whole_file, write_whole

__all__ = ["MeasurementCache"]

_TENSORS = [each.name for each in fields(Statistics) if "torch.Tensor" in str(each.type)]
_SPECTRUM = [each.name for each in fields(Spectrum)]
_UNITS = TypeAdapter(list[UnitPlan])
FACTS_NAME = "facts.json"


class MeasurementCache:
    """What was measured under one set of facts, in a folder of its own below ``root``.

    ``facts.json`` tells the facts, ``derivatives.*`` hold what took passes of its own; a folder
    below, with the settings of a recipe as facts, one pair of files for each part of the model.
    Tensors that are read back stay on disk, mapped into memory.

    :param root: folder that may hold the measurements of many models
    :param facts: all that statistics depend on, as JSON values
    :param settings: what else the rest depends on
    """

    def __init__(self, root: Path | str, facts: dict, settings: dict):
        self.folder = Path(root) / _fingerprint(facts)
        self._parts = self.folder / _fingerprint(settings)
        self._facts, self._settings = facts, settings

    @classmethod
    def of(
        cls,
        root: Path | str,
        model: nn.Module,
        dataloader: Iterable[dict],
        request: Request,
        facts: dict,
        settings: dict,
    ) -> "MeasurementCache":
        """That of a model, data and a request, told apart by their contents.

        :param facts: what else the statistics depend on, as JSON values
        :raises OSError: if nothing can be written below ``root``
        """
        Path(root).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=root).close()  # now rather than when all is measured
        asked = {each.name: getattr(request, each.name) for each in fields(Request)}
        asked = {n: sorted(v) if isinstance(v, frozenset) else v for n, v in asked.items()}
        contents = {
            "config": _fingerprint(model.config.to_json_string(use_diff=False)),
            "weights": _model_digest(model),
            "data": _fingerprint("".join(gathered(_data_digest(dataloader)))),
        }
        return cls(root, {**facts, **contents, "request": asked}, settings)

    def begin(self) -> None:
        """Note the facts; tell a user whose facts are others than last time what has changed."""
        if is_source_process():
            for folder, facts in ((self.folder, self._facts), (self._parts, self._settings)):
                if not (folder / FACTS_NAME).exists():
                    _tell_changes(folder, facts)
                    write_whole(folder / FACTS_NAME, json.dumps(facts, indent=1))
                os.utime(folder)  # used last
        barrier()

    def limit(self, most: int) -> None:
        """Throw away what was used longest ago, but what this run uses, until the rest fits.

        :param most: bytes of the whole root
        """
        if not is_source_process():
            return
        os.utime(self.folder)
        folders = [path for path in self.folder.parent.iterdir() if (path / FACTS_NAME).exists()]
        sizes = {path: _bytes_of(path) for path in folders}
        for path in sorted(folders, key=lambda path: path.stat().st_mtime):
            if sum(sizes.values()) > most and path != self.folder:
                logger.info(f"cache is over {most / 1e9:.1f} GB: {path} goes")
                shutil.rmtree(path)
                del sizes[path]

    def derivatives(self) -> Statistics | None:
        """Those that were kept; None if there are none."""
        found = _load(self.folder / "derivatives")
        return found and _statistics(*found)

    def keep_derivatives(self, statistics: Statistics) -> Statistics:
        """Write them whole or not at all.

        :return: the same, on disk
        """
        if is_source_process():
            _save(self.folder / "derivatives", *_packed(statistics))
        barrier()
        return self.derivatives()

    def parts(self) -> list[Measured]:
        """The first parts of the model, as far as they were kept."""
        found: list[Measured] = []
        while not (found and found[-1].last):
            part = self._part(len(found))
            if part is None:
                break
            found.append(part)
        if found:
            what = "measured before" if found[-1].last else "measured so far"
            logger.info(f"{what}: {len(found)} parts of the model, in {self._parts}")
        return found

    def keep_part(self, number: int, part: Measured) -> Measured:
        """Write a part whole or not at all; every rank its own piece of it.

        :return: what all ranks have of it, on disk
        """
        index, tensors = _packed(part.statistics)
        for key, spectrum in enumerate(part.spectra.values()):
            for name in _SPECTRUM:
                tensors[f"spectra/{key}/{name}"] = getattr(spectrum, name).cpu().contiguous()
        found = {
            "units": _UNITS.dump_python(part.units, mode="json"),
            "spectra": [list(names) for names in part.spectra],
            "statistics": index,
            "end": part.end,
            "last": part.last,
            "pieces": number_of_ranks(),
        }
        _save(self._piece(number, rank()), found, tensors)
        barrier()
        return self._part(number)

    def _piece(self, number: int, piece: int) -> Path:
        return self._parts / (f"{number:04}-{piece}" if piece else f"{number:04}")

    def _part(self, number: int) -> Measured | None:
        first = _load(self._piece(number, 0))
        if first is None:
            return None
        pieces = [first]
        for piece in range(1, first[0]["pieces"]):
            pieces.append(_load(self._piece(number, piece)))
        return None if None in pieces else reduce(or_, map(_measured, pieces))


def _measured(kept: tuple[dict, dict[str, torch.Tensor]]) -> Measured:
    """A piece of a part."""
    found, tensors = kept
    return Measured(
        _UNITS.validate_python(found["units"]),
        {
            tuple(names): Spectrum(*(tensors[f"spectra/{key}/{name}"] for name in _SPECTRUM))
            for key, names in enumerate(found["spectra"])
        },
        _statistics(found["statistics"], tensors),
        found["end"],
        found["last"],
    )


def _packed(statistics: Statistics) -> tuple[dict, dict[str, torch.Tensor]]:
    """Statistics as JSON values, and the tensors that these name."""
    keys: dict[int, str] = {}
    tensors = {}
    found = {each.name: getattr(statistics, each.name) for each in fields(Statistics)}
    for field in _TENSORS:
        for name, tensor in sorted(found[field].items()):
            key = keys.setdefault(id(tensor), f"{field}/{name}")
            tensors[key] = tensor.cpu().contiguous()
        found[field] = {name: keys[id(tensor)] for name, tensor in found[field].items()}
    found["attention_densities"] = {
        name: asdict(each) for name, each in statistics.attention_densities.items()
    }
    found["reached"] = sorted(statistics.reached)
    return found, tensors


def _statistics(found: dict, tensors: dict[str, torch.Tensor]) -> Statistics:
    """What was packed."""
    found = dict(found)
    for name in _TENSORS:  # one object where modules share one
        found[name] = {module: tensors[key] for module, key in found[name].items()}
    found["attention_densities"] = {
        name: AttentionDensity(**each) for name, each in found["attention_densities"].items()
    }
    found["reached"] = frozenset(found["reached"])
    return Statistics(**found)


def _save(path: Path, found: dict, tensors: dict[str, torch.Tensor]) -> None:
    """A pair of files, of which the second says that both are there."""
    with whole_file(path.with_suffix(".safetensors")) as partial:
        save_file(tensors, partial)
    write_whole(path.with_suffix(".json"), json.dumps(found))


def _load(path: Path) -> tuple[dict, dict[str, torch.Tensor]] | None:
    index = path.with_suffix(".json")
    if not index.exists():
        return None
    try:
        return json.loads(index.read_text()), load_file(path.with_suffix(".safetensors"))
    except (OSError, ValueError, SafetensorError) as error:
        logger.warning(f"{path}.* cannot be read, and is measured again: {error}")
        return None


def _tell_changes(folder: Path, facts: dict) -> None:
    """Say why what was measured last, of the same model, is not used."""
    others = [path for path in folder.parent.glob(f"*/{FACTS_NAME}") if path.parent != folder]
    for path in sorted(others, key=lambda path: path.parent.stat().st_mtime, reverse=True):
        before = json.loads(path.read_text())
        if before.get("model") == facts.get("model"):
            changed = sorted(name for name, value in facts.items() if before.get(name) != value)
            logger.info(
                f"measuring anew: {', '.join(changed)} differ from what {path.parent} was measured "
                f"with (see its {FACTS_NAME})"
            )
            return


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _fingerprint(facts: dict | str) -> str:
    """16 hexadecimal digits that change with any of some JSON values."""
    return blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8).hexdigest()


def _model_digest(model: nn.Module) -> str:
    """Changes with any weight of a model."""
    digest = blake2b(digest_size=8)
    for name, tensor in model.state_dict().items():
        _add(digest, name, tensor)
    return digest.hexdigest()


def _data_digest(dataloader: Iterable[dict]) -> str:
    """Changes with any value of any batch."""
    digest = blake2b(digest_size=8)
    with torch.random.fork_rng(devices=[]):  # asking for a batch changes nothing that comes after
        for batch in dataloader:
            for name, value in batch.items():
                if isinstance(value, torch.Tensor):
                    _add(digest, name, value)
    return digest.hexdigest()


def _add(digest, name: str, tensor: torch.Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy())
