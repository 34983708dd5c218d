"""All that is known of a checkpoint, read from its folder and from measurements."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from casp_plugin.bench.runs import Speed
from casp_plugin.checkpoint import RECIPE_NAME, read_config
from casp_plugin.evaluation.results import Comparison, Evaluation, compare_all
from casp_plugin.plan import PLAN_NAME, CompressionPlan
from casp_plugin.records import load_records
from casp_plugin.sizes import size_breakdown

__all__ = ["Facts", "read_facts"]


@dataclass(frozen=True)
class Facts:
    """What is known of one checkpoint.

    :param folder: where it is
    :param config: its ``config.json``
    :param plan: None where no casp modifier made it
    :param recipe: text of its ``recipe.yaml``; None where there is none
    :param breakdown: bytes of its tensors by component, then by kind
    :param evaluations: of it, with the one each is compared with, if any
    :param speeds: the same of its speed
    """

    folder: Path
    config: dict
    plan: CompressionPlan | None
    recipe: str | None
    breakdown: dict[str, dict[str, int]]
    evaluations: list[tuple[Evaluation, Evaluation | None]]
    speeds: list[tuple[Speed, Speed | None]]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def base_model(self) -> str | None:
        """What it was made from; None if unknown."""
        return self.plan and self.plan.model

    @property
    def base_id(self) -> str | None:
        """Hugging Face id of that; None where it was a folder."""
        name = self.base_model
        return name if name and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not _path(name) else None

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(size for kinds in self.breakdown.values() for size in kinds.values())

    @property
    def original_bytes(self) -> int | None:
        """Bytes of the original model's tensors, in the checkpoint's dtype; None if unknown."""
        if self.plan is None or not self.plan.units or self.plan.other_bytes is None:
            return None
        dtype = getattr(torch, self.config.get("dtype") or "bfloat16")
        return self.plan.other_bytes + self.plan.weights * dtype.itemsize

    @cached_property
    def comparisons(self) -> list[tuple[str, list[Comparison]]]:
        """Quality against each baseline, by its name."""
        pairs = [(one, base) for one, base in self.evaluations if base is not None]
        return [(base.model, compare_all(one, base)) for one, base in pairs]

    @property
    def warnings(self) -> list[str]:
        return self.plan.warnings if self.plan else []


def read_facts(folder: Path, evals: Sequence[Path] = (), benches: Sequence[Path] = ()) -> Facts:
    """
    :param folder: checkpoint folder
    :param evals: files that ``casp eval --output`` wrote
    :param benches: files that ``casp bench --output`` wrote
    :raises ValueError: if the folder is no quantized checkpoint, or a file is about other models
    """
    config = read_config(folder)
    if not config.get("quantization_config"):
        raise ValueError(f"{folder} is not quantized: config.json has no quantization_config")
    recipe = folder / RECIPE_NAME
    return Facts(
        folder=folder,
        config=config,
        plan=CompressionPlan.load(folder) if (folder / PLAN_NAME).exists() else None,
        recipe=recipe.read_text() if recipe.exists() else None,
        breakdown=size_breakdown(folder),
        evaluations=[_about(folder, path, Evaluation, "casp eval") for path in evals],
        speeds=[_about(folder, path, Speed, "casp bench") for path in benches],
    )


class _Record(Protocol):
    model: str


Kind = TypeVar("Kind", bound=_Record)


def _about(folder: Path, path: Path, kind: type[Kind], command: str) -> tuple[Kind, Kind | None]:
    """A checkpoint's record of a file, and the first other one, which it is compared with."""
    records = load_records(kind, path, command)
    mine = [each for each in records if _path(each.model) == folder.resolve()]
    if not mine:
        known = ", ".join(each.model for each in records)
        raise ValueError(f"{path} measured {known}, not {folder}")
    others = [each for each in records if _path(each.model) != folder.resolve()]
    return mine[-1], others[0] if others else None


def _path(name: str) -> Path | None:
    """The folder that a name means; None where it is no folder."""
    return Path(name).resolve() if Path(name).exists() else None
