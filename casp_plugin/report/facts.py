"""All that is known of a checkpoint, read from its folder and from measurements."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeVar

from casp_plugin.bench.runs import Speed
from casp_plugin.checkpoint.format import RECIPE_NAME, SECTION, read_config
from casp_plugin.checkpoint.sizes import size_breakdown
from casp_plugin.evaluation.records import load_records
from casp_plugin.evaluation.results import Comparison, Evaluation, Measurement, compare_all
from casp_plugin.model.load import is_multimodal, read_model_config
from casp_plugin.plan.plan import PLAN_NAME, CompressionPlan

__all__ = ["Facts", "read_facts"]


@dataclass(frozen=True)
class Facts:
    """What is known of one checkpoint.

    :param folder: where it is
    :param config: its ``config.json``
    :param plan: None where no casp modifier made it
    :param recipe: text of its ``recipe.yaml``; None where there is none
    :param sees: whether it takes images
    :param breakdown: bytes of its tensors by component, then by kind
    :param evaluations: of it, with the one each is compared with, if any
    :param speeds: the same of its speed
    """

    folder: Path
    config: dict
    plan: CompressionPlan | None
    recipe: str | None
    sees: bool
    breakdown: dict[str, dict[str, int]]
    evaluations: list[tuple[Evaluation, Evaluation | None]]
    speeds: list[tuple[Speed, Speed | None]]

    @property
    def by_casp(self) -> bool:
        """Whether a casp modifier made it, so that it needs this package to be served."""
        return self.plan is not None or SECTION in self.config["quantization_config"]

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
        """Bytes of the original model's tensors; None if unknown."""
        return self.plan and self.plan.original_bytes

    @cached_property
    def comparisons(self) -> list[tuple[str, list[Comparison]]]:
        """Quality against each baseline, by its name."""
        pairs = [(one, base) for one, base in self.evaluations if base is not None]
        return [(base.model, compare_all(one, base)) for one, base in pairs]

    @property
    def measurements(self) -> list[Measurement]:
        """All that was measured of its quality, each once."""
        found = {(m.task, m.metric): m for one, _ in self.evaluations for m in one.measurements}
        return list(found.values())

    @property
    def warnings(self) -> list[str]:
        return self.plan.warnings if self.plan else []


def read_facts(
    folder: Path,
    evals: Sequence[Path] = (),
    benches: Sequence[Path] = (),
    trust_remote_code: bool = False,
) -> Facts:
    """Read all that is known of a checkpoint.

    :param folder: checkpoint folder
    :param evals: files that ``casp eval --output`` wrote
    :param benches: files that ``casp bench --output`` wrote
    :param trust_remote_code: whether Python code that comes with the model may run
    :raises ValueError: if the folder is no quantized checkpoint, or a file is about other models
    """
    config = read_config(folder)
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method != "compressed-tensors":
        raise ValueError(
            f"{folder} is no checkpoint of compressed-tensors: quant_method in config.json is "
            f"{method!r}"
        )
    recipe = folder / RECIPE_NAME
    plan = CompressionPlan.load(folder) if (folder / PLAN_NAME).exists() else None
    return Facts(
        folder=folder,
        config=config,
        plan=plan,
        recipe=recipe.read_text() if recipe.exists() else None,
        sees=is_multimodal(read_model_config(folder, trust_remote_code)),
        breakdown=size_breakdown(folder, _patterns(plan), trust_remote_code),
        evaluations=[_about(folder, path, Evaluation, "casp eval") for path in evals],
        speeds=[_about(folder, path, Speed, "casp bench") for path in benches],
    )


def _patterns(plan: CompressionPlan | None) -> dict[str, list[str]]:
    """``component_patterns`` of the modifiers that made a plan."""
    found: dict[str, list[str]] = {}
    for settings in plan.settings.values() if plan else ():
        for component, patterns in settings.get("component_patterns", {}).items():
            found.setdefault(component, []).extend(patterns)
    return found


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
