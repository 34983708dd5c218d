"""Statistics and layer notes on disk, for a run that is started again and for other runs of the
same model and data.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, fields
from functools import cache, reduce
from hashlib import blake2b
from operator import or_
from pathlib import Path

import torch
from loguru import logger
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import casp_plugin
from casp_plugin.maths.low_rank import Spectrum
from casp_plugin.plan.plan import UnitPlan
from casp_plugin.statistics.layer_notes import LayerNotes
from casp_plugin.statistics.statistics import AttentionDensity, Request, Statistics
from casp_plugin.system.distributed import (
    barrier,
    gathered,
    is_source_process,
    number_of_ranks,
    rank,
)
from casp_plugin.system.files import whole_file, write_whole
from casp_plugin.system.messages import size_text

__all__ = ["RESULTS_NAME", "StatisticsCache", "code_digest", "content_digest"]

_TENSORS = [field.name for field in fields(Statistics) if "torch.Tensor" in str(field.type)]
_SPECTRUM = [field.name for field in fields(Spectrum)]
_UNITS = TypeAdapter(list[UnitPlan])
FACTS_NAME = "facts.json"
#: folder of codes and tuned numbers of all models, beside those of statistics
RESULTS_NAME = "results"
#: rooms whose code makes statistics, notes and results: those of other code are not read
_ROOMS = ("maths", "model", "modifiers", "pricing", "statistics")


class StatisticsCache:
    """Statistics and layer notes under one set of facts, in a folder below ``root``.

    ``facts.json`` holds the facts, ``derivatives-*`` the statistics that take passes of their own.
    A folder below, for the settings of a recipe, holds layer notes: a ``facts.json`` of the
    settings and one pair of files per section of the model. Tensors that are read back stay on
    disk, mapped into memory.

    :param root: folder for the caches of any number of models
    :param facts: everything that statistics depend on, as JSON values
    :param settings: everything else that layer notes depend on, as JSON values
    """

    def __init__(self, root: Path | str, facts: dict, settings: dict):
        self.folder = Path(root) / _json_digest(facts)
        self._sections_folder = self.folder / _json_digest(settings)
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
    ) -> "StatisticsCache":
        """Return the cache of a model, data and a request, told apart by their contents.

        :param facts: everything else that statistics depend on, as JSON values
        :param settings: everything else that layer notes depend on, as JSON values
        :raises OSError: if nothing can be written below ``root``
        """
        Path(root).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=root).close()  # fails before the long work, not after it
        requested = {field.name: getattr(request, field.name) for field in fields(Request)}
        requested = {n: sorted(v) if isinstance(v, frozenset) else v for n, v in requested.items()}
        contents = {
            "code": code_digest(),
            "config": _json_digest(model.config.to_json_string(use_diff=False)),
            "weights": _model_digest(model),
            "data": _json_digest("".join(gathered(_data_digest(dataloader)))),
        }
        return cls(root, {**facts, **contents, "request": requested}, settings)

    def begin(self) -> None:
        """Write the facts, and log which of them differ from the last run of the same model."""
        if is_source_process():
            for folder, facts in (
                (self.folder, self._facts),
                (self._sections_folder, self._settings),
            ):
                if not (folder / FACTS_NAME).exists():
                    _tell_changes(folder, facts)
                    write_whole(folder / FACTS_NAME, json.dumps(facts, indent=1))
                os.utime(folder)  # time of the last use
        barrier()

    def limit(self, most: int) -> None:
        """Delete the folders used longest ago, never this one, until the root fits; codes, which
        have their own limit, do not count.

        :param most: largest size of the whole root, in bytes
        """
        if not is_source_process():
            return
        os.utime(self.folder)
        folders = [path for path in self.folder.parent.iterdir() if (path / FACTS_NAME).exists()]
        sizes = {path: _bytes_of(path) for path in folders}
        for path in sorted(folders, key=lambda path: path.stat().st_mtime):
            if sum(sizes.values()) > most and path != self.folder:
                logger.warning(f"cache is over {size_text(most)}: {path} goes")
                shutil.rmtree(path)
                del sizes[path]

    def derivatives(self, part: int) -> Statistics | None:
        """Return a part of the derivatives, mapped from disk; None if it is not there."""
        pair = _read_pair(self.folder / f"derivatives-{part}")
        return pair and _statistics(*pair)

    def keep_derivatives(self, part: int, statistics: Statistics) -> None:
        """Write a part of the derivatives, whole or not at all."""
        if is_source_process():
            _write_pair(self.folder / f"derivatives-{part}", *_packed(statistics))
        barrier()

    def sections(self) -> list[LayerNotes]:
        """Return the notes of the model's first sections, as far as they are on disk."""
        sections: list[LayerNotes] = []
        while not (sections and sections[-1].last):
            section = self._read_section(len(sections))
            if section is None:
                break
            sections.append(section)
        if sections:
            progress = "measured before" if sections[-1].last else "measured so far"
            where = self._sections_folder
            logger.info(f"{progress}: {len(sections)} parts of the model, in {where}")
        return sections

    def keep_section(self, number: int, notes: LayerNotes) -> LayerNotes:
        """Write the notes of a section, whole or not at all; every rank writes its own piece.

        :param number: position of the section in the model, from 0
        :return: the notes of all ranks, mapped from disk
        """
        index, tensors = _packed(notes.statistics)
        for key, spectrum in enumerate(notes.spectra.values()):
            for name in _SPECTRUM:
                tensors[f"spectra/{key}/{name}"] = getattr(spectrum, name).cpu().contiguous()
        values = {
            "units": _UNITS.dump_python(notes.priced, mode="json"),
            "spectra": [list(names) for names in notes.spectra],
            "statistics": index,
            "end": notes.end,
            "last": notes.last,
            "pieces": number_of_ranks(),
        }
        _write_pair(self._piece(number, rank()), values, tensors)
        barrier()
        return self._read_section(number)

    def _piece(self, number: int, piece: int) -> Path:
        return self._sections_folder / (f"{number:04}-{piece}" if piece else f"{number:04}")

    def _read_section(self, number: int) -> LayerNotes | None:
        first = _read_pair(self._piece(number, 0))
        if first is None:
            return None
        pieces = [first]
        for piece in range(1, first[0]["pieces"]):
            pieces.append(_read_pair(self._piece(number, piece)))
        return None if None in pieces else reduce(or_, map(_layer_notes, pieces))


def _layer_notes(pair: tuple[dict, dict[str, torch.Tensor]]) -> LayerNotes:
    """Return the notes of one piece of a section."""
    values, tensors = pair
    return LayerNotes(
        _UNITS.validate_python(values["units"]),
        {
            tuple(names): Spectrum(*(tensors[f"spectra/{key}/{name}"] for name in _SPECTRUM))
            for key, names in enumerate(values["spectra"])
        },
        _statistics(values["statistics"], tensors),
        values["end"],
        values["last"],
    )


def _packed(statistics: Statistics) -> tuple[dict, dict[str, torch.Tensor]]:
    """Return statistics as JSON values, and the tensors whose keys the values hold."""
    keys: dict[int, str] = {}
    tensors = {}
    values = {field.name: getattr(statistics, field.name) for field in fields(Statistics)}
    for field in _TENSORS:
        for name, tensor in sorted(values[field].items()):
            key = keys.setdefault(id(tensor), f"{field}/{name}")
            tensors[key] = tensor.cpu().contiguous()
        values[field] = {name: keys[id(tensor)] for name, tensor in values[field].items()}
    values["attention_densities"] = {
        name: asdict(density) for name, density in statistics.attention_densities.items()
    }
    values["reached"] = sorted(statistics.reached)
    return values, tensors


def _statistics(values: dict, tensors: dict[str, torch.Tensor]) -> Statistics:
    """Return the statistics that :func:`_packed` took apart."""
    values = dict(values)
    for name in _TENSORS:  # modules that shared a tensor share it again
        values[name] = {module: tensors[key] for module, key in values[name].items()}
    values["attention_densities"] = {
        name: AttentionDensity(**density) for name, density in values["attention_densities"].items()
    }
    values["reached"] = frozenset(values["reached"])
    return Statistics(**values)


def _write_pair(path: Path, values: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Write a pair of files; the JSON, written last, tells that both are there."""
    with whole_file(path.with_suffix(".safetensors")) as partial:
        save_file(tensors, partial)
    write_whole(path.with_suffix(".json"), json.dumps(values))


def _read_pair(path: Path) -> tuple[dict, dict[str, torch.Tensor]] | None:
    index = path.with_suffix(".json")
    if not index.exists():
        return None
    try:
        return json.loads(index.read_text()), load_file(path.with_suffix(".safetensors"))
    except (OSError, ValueError, SafetensorError) as error:
        logger.warning(f"{path}.* cannot be read, and is measured again: {error}")
        return None


@cache
def code_digest() -> str:
    """Return a digest of the code that makes statistics and notes."""
    package = Path(casp_plugin.__file__).parent
    files = sorted(path for room in _ROOMS for path in (package / room).rglob("*.py"))
    return _json_digest([path.read_text(encoding="utf-8") for path in files])


def _tell_changes(folder: Path, facts: dict) -> None:
    """Log which facts differ from the last measurement of the same model."""
    others = [path for path in folder.parent.glob(f"*/{FACTS_NAME}") if path.parent != folder]
    for path in sorted(others, key=lambda path: path.parent.stat().st_mtime, reverse=True):
        before = json.loads(path.read_text())
        if before.get("model") == facts.get("model"):
            changed = sorted(name for name, value in facts.items() if before.get(name) != value)
            logger.warning(
                f"measuring anew: {', '.join(changed)} differ from what {path.parent} was measured "
                f"with (see its {FACTS_NAME})"
            )
            return


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _json_digest(facts: dict | str) -> str:
    """Return 16 hexadecimal digits that change with any of the JSON values."""
    return blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8).hexdigest()


def content_digest(facts: list[str], tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return 16 hexadecimal digits that change with any fact and any value of any tensor."""
    digest = blake2b(json.dumps(facts).encode(), digest_size=8)
    for name, tensor in tensors:
        _add_tensor(digest, name, tensor)
    return digest.hexdigest()


def _model_digest(model: nn.Module) -> str:
    """Return a digest that changes with any weight of a model."""
    return content_digest([], model.state_dict().items())


def _data_digest(dataloader: Iterable[dict]) -> str:
    """Return a digest that changes with any value of any batch."""
    digest = blake2b(digest_size=8)
    with torch.random.fork_rng(devices=[]):  # reading batches must not change later draws
        for batch in dataloader:
            for name, value in batch.items():
                if isinstance(value, torch.Tensor):
                    _add_tensor(digest, name, value)
    return digest.hexdigest()


def _add_tensor(digest, name: str, tensor: torch.Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy())
