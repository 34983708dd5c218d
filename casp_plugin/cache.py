"""Measurements on disk: what a run measured, for other runs of the same model and data."""

import json
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, fields
from hashlib import blake2b
from pathlib import Path

import torch
from loguru import logger
from safetensors.torch import load_file, save_file
from torch import nn

from casp_plugin.attention_maps import AttentionDensity
from casp_plugin.files import whole_folder
from casp_plugin.plan import UnitPlan
from casp_plugin.records import load_records, save_records
from casp_plugin.statistics import Request, Statistics

__all__ = ["MeasurementCache"]

_TENSORS = [each.name for each in fields(Statistics) if "torch.Tensor" in str(each.type)]


class MeasurementCache:
    """What was measured under one set of facts, in a folder of its own below ``root``.

    ``facts.json`` tells the facts, ``statistics.json`` and ``statistics.safetensors`` hold the
    statistics, ``units-*.json`` the candidates of every unit with their bytes and errors.

    :param root: folder that may hold the measurements of many models
    :param facts: all that the statistics depend on, as JSON values
    :param device: where statistics are wanted
    """

    def __init__(self, root: Path | str, facts: dict, device: torch.device | str = "cpu"):
        self.folder = Path(root) / _fingerprint(facts)
        self._facts = facts
        self._device = device

    @classmethod
    def of(
        cls,
        root: Path | str,
        model: nn.Module,
        dataloader: Iterable[dict],
        request: Request,
        facts: dict,
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
            "data": _data_digest(dataloader),
        }
        device = next(model.parameters()).device
        return cls(root, {**facts, **contents, "request": asked}, device)

    def statistics(self) -> Statistics | None:
        """Those that were kept; None if there are none."""
        index = self.folder / "statistics.json"
        if not index.exists():
            return None
        logger.info(f"statistics from {self.folder}")
        found = json.loads(index.read_text())
        tensors = load_file(self.folder / "statistics.safetensors", device=str(self._device))
        for name in _TENSORS:  # one object where modules share one
            found[name] = {module: tensors[key] for module, key in found[name].items()}
        found["attention_densities"] = {
            name: AttentionDensity(**each) for name, each in found["attention_densities"].items()
        }
        return Statistics(**found)

    def keep_statistics(self, statistics: Statistics) -> None:
        """Write them whole or not at all."""
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
        with whole_folder(self.folder) as partial:
            save_file(tensors, partial / "statistics.safetensors")
            (partial / "facts.json").write_text(json.dumps(self._facts, indent=1))
            (partial / "statistics.json").write_text(json.dumps(found))

    def units(self, facts: dict) -> list[UnitPlan] | None:
        """Units as priced under these facts too; None if they were not.

        :param facts: what prices depend on beside the statistics, as JSON values
        """
        path = self._units_path(facts)
        if not path.exists():
            return None
        logger.info(f"rounding errors from {path}")
        return load_records(UnitPlan, path, "casp")

    def keep_units(self, units: list[UnitPlan], facts: dict) -> None:
        """Keep units that nothing was chosen for yet."""
        save_records(units, self._units_path(facts))

    def _units_path(self, facts: dict) -> Path:
        return self.folder / f"units-{_fingerprint(facts)}.json"


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
