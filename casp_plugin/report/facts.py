"""Facts of a checkpoint, read from its folder and from files of measurements."""

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
from casp_plugin.model.components import merged_patterns
from casp_plugin.model.load import is_multimodal, read_model_config
from casp_plugin.plan.plan import PLAN_NAME, CompressionPlan

__all__ = ["Facts", "read_facts"]


@dataclass(frozen=True)
class Facts:
    """Everything that is known of one checkpoint.

    :param folder: its folder
    :param config: its ``config.json``
    :param plan: its plan; None where no casp modifier made it
    :param recipe: text of its ``recipe.yaml``; None without one
    :param takes_images: whether it is a vision-language model
    :param breakdown: bytes of its tensors by component, then by kind
    :param evaluations: its evaluations, with their baselines or None
    :param speeds: its benchmarks, with their baselines or None
    """

    folder: Path
    config: dict
    plan: CompressionPlan | None
    recipe: str | None
    takes_images: bool
    breakdown: dict[str, dict[str, int]]
    evaluations: list[tuple[Evaluation, Evaluation | None]]
    speeds: list[tuple[Speed, Speed | None]]

    @property
    def by_casp(self) -> bool:
        """Tell whether a casp modifier made it, so that serving takes this package."""
        return self.plan is not None or SECTION in self.config["quantization_config"]

    @property
    def name(self) -> str:
        """Return the name of the checkpoint: that of its folder."""
        return self.folder.resolve().name

    @property
    def base_model(self) -> str | None:
        """Return the folder or Hugging Face id of the original model; None if unknown."""
        return self.plan and self.plan.model

    @property
    def base_id(self) -> str | None:
        """Return the Hugging Face id of the original model; None if it is a folder or unknown."""
        name = self.base_model
        is_id = name and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not _local_folder(name)
        return name if is_id else None

    @property
    def total_bytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(size for kinds in self.breakdown.values() for size in kinds.values())

    @property
    def original_bytes(self) -> int | None:
        """Return the bytes of the original model's tensors; None if unknown."""
        return self.plan and self.plan.original_bytes

    @cached_property
    def comparisons(self) -> list[tuple[str, list[Comparison]]]:
        """Return comparisons with every baseline, by the baseline's name."""
        return [
            (baseline.model, compare_all(evaluation, baseline))
            for evaluation, baseline in self.evaluations
            if baseline is not None
        ]

    @property
    def measurements(self) -> list[Measurement]:
        """Return the measurements of its quality, the last one of every task and metric."""
        by_metric = {
            (measured.task, measured.metric): measured
            for evaluation, _ in self.evaluations
            for measured in evaluation.measurements
        }
        return list(by_metric.values())

    @property
    def warnings(self) -> list[str]:
        """Return the warnings of its plan."""
        return self.plan.warnings if self.plan else []


def read_facts(
    folder: Path,
    evals: Sequence[Path] = (),
    benches: Sequence[Path] = (),
    trust_remote_code: bool = False,
) -> Facts:
    """Read everything that is known of a checkpoint.

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
        takes_images=is_multimodal(read_model_config(folder, trust_remote_code)),
        breakdown=size_breakdown(folder, _patterns(plan), trust_remote_code),
        evaluations=[_about(folder, path, Evaluation, "casp eval") for path in evals],
        speeds=[_about(folder, path, Speed, "casp bench") for path in benches],
    )


def _patterns(plan: CompressionPlan | None) -> dict[str, list[str]]:
    """Return the ``component_patterns`` of the modifiers that made a plan."""
    settings = plan.settings.values() if plan else ()
    return merged_patterns(own.get("component_patterns", {}) for own in settings)


class _OfModel(Protocol):
    model: str


Kind = TypeVar("Kind", bound=_OfModel)


def _about(folder: Path, path: Path, kind: type[Kind], command: str) -> tuple[Kind, Kind | None]:
    """Return the last record of a checkpoint in a file, and the first of another model, its
    baseline.

    :raises ValueError: if the file has no record of the checkpoint
    """
    records = load_records(kind, path, command)
    own = [record for record in records if _local_folder(record.model) == folder.resolve()]
    if not own:
        known = ", ".join(record.model for record in records)
        raise ValueError(f"{path} measured {known}, not {folder}")
    others = [record for record in records if _local_folder(record.model) != folder.resolve()]
    return own[-1], others[0] if others else None


def _local_folder(name: str) -> Path | None:
    """Return the folder of a model's name; None for other names."""
    return Path(name).resolve() if Path(name).exists() else None
