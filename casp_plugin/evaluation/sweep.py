"""A sweep: one model compressed to many sizes, and every size scored."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path

from torch import nn

from casp_plugin.data.data_source import DataSource
from casp_plugin.evaluation import study_folder
from casp_plugin.evaluation.checkpoints import Scoring, evaluate
from casp_plugin.evaluation.sweep_points import Point, finished, frontier_table
from casp_plugin.model.load import bytes_on_disk, load_model
from casp_plugin.modifiers import plan_recipe
from casp_plugin.modifiers.compression import compress
from casp_plugin.modifiers.recipes import allocates_bits, load_recipe
from casp_plugin.plan.plan import CompressionPlan
from casp_plugin.system.machine import versions_text

__all__ = ["Size", "Sweep", "sizes_of"]

TABLE_NAME = "sweep.md"


@dataclass(frozen=True)
class Size:
    """Recipe and budget of one checkpoint of a sweep.

    :param recipe: file
    :param average_bits: budget in bits; None where the recipe takes none
    """

    recipe: Path
    average_bits: float | None

    @property
    def series(self) -> str:
        """Return the name of the recipe, without a budget at its end."""
        return re.sub(r"_\d+(\.\d+)?$", "", self.recipe.stem)

    @property
    def name(self) -> str:
        """Return the name of the checkpoint's folder."""
        if self.average_bits is None:
            return self.recipe.stem
        return f"{self.series}_{str(self.average_bits).removesuffix('.0')}"


def sizes_of(bare: nn.Module, recipes: Iterable[Path], budgets: Iterable[float]) -> dict[str, Size]:
    """Return the sizes that recipes and budgets make, by name; one size for a recipe that takes no
    budget.

    :param bare: the model without weights
    :param budgets: average bits
    :raises ValueError: if a budget cannot be reached, or two recipes make the same name
    """
    sizes: dict[str, Size] = {}
    for recipe in recipes:
        allocates = allocates_bits(load_recipe(recipe))
        for average_bits in budgets if allocates else [None]:
            if allocates:
                plan_recipe(bare, load_recipe(recipe, average_bits))
            size = Size(recipe, average_bits)
            other = sizes.setdefault(size.name, size).recipe
            if other != recipe:
                raise ValueError(f"--recipe: {recipe} and {other} both make {size.name}")
    return sizes


@dataclass(frozen=True)
class Sweep:
    """One model at many sizes, in a folder that a stopped sweep goes on in.

    :param model: folder or Hugging Face id
    :param folder: folder of the checkpoints, the points and what is measured of the model
    :param sizes: checkpoints to make, by name
    :param source: data that each size is calibrated on
    :param samples: calibration samples
    :param batches: calibration batches, made of these samples
    :param scoring: data that each size is scored on, against the original model
    :param kv_caches: schemes of stored keys and values that each size is scored with too
    :param seed: seed of all that is random
    :param trust_remote_code: whether Python code that comes with the model may run
    """

    model: str
    folder: Path
    sizes: Mapping[str, Size]
    source: DataSource
    samples: int
    batches: Iterable[dict]
    scoring: Scoring
    kv_caches: Sequence[str] = ()
    seed: int = 0
    trust_remote_code: bool = False

    def run(self) -> list[Point]:
        """Make the points that the folder lacks, and write their table, ``sweep.md``.

        :return: all points, as ``finished`` returns them
        :raises ValueError: if the folder holds something else, or points made in another way
        """
        recipes = dict.fromkeys(size.recipe for size in self.sizes.values())
        study_folder.begin(self.folder, self._facts(), list(recipes))
        makers = {
            _label(name, kv_cache): partial(self._point, name, kv_cache)
            for name in (self.model, *self.sizes)
            for kv_cache in (None, *self.kv_caches)
        }
        points = finished(self.folder, makers)
        tables = {"": frontier_table(points)}
        study_folder.write_tables(self.folder / TABLE_NAME, tables, self._note())
        return points

    def _facts(self) -> dict:
        """Return all that the points depend on except recipes and budgets, for ``begin``."""
        heldout = self.scoring.source
        return {
            "model": self.model,
            "dataset": list(astuple(self.source)),
            "heldout": [heldout.dataset, heldout.split, self.scoring.samples],
            "samples": self.samples,
            "max_length": self.scoring.max_length,
            "seed": self.seed,
        }

    def _note(self) -> str:
        """Return model, data and versions in words."""
        scoring = self.scoring
        return (
            f"{self.model}, calibrated on {self.source.dataset} ({self.samples} x "
            f"{scoring.max_length} tokens at most), scored on {scoring.source.dataset} "
            f"({scoring.samples}), with 95 % intervals; seed {self.seed}; {versions_text()}."
        )

    def _point(self, name: str, kv_cache: str | None) -> Point:
        """Compress the model to one size, unless its checkpoint is there, and score it."""
        size = self.sizes.get(name)  # None of the original model
        checkpoint = str(self.folder / name) if size else self.model
        if size and not Path(checkpoint).exists():
            recipe = load_recipe(size.recipe, size.average_bits, cache_dir=self.folder / "cache")
            compress(
                self.model,
                recipe,
                self.batches,
                Path(checkpoint),
                self.seed,
                trust_remote_code=self.trust_remote_code,
            )
        original = load_model(self.model, self.trust_remote_code)
        evaluation = evaluate(
            checkpoint,
            self.scoring,
            reference=original if size or kv_cache else None,
            seed=self.seed,
            kv_cache=kv_cache,
            trust_remote_code=self.trust_remote_code,
        )
        allocated = size is not None and size.average_bits is not None
        series = size.series if size else name
        return Point(
            name=_label(name, kv_cache),
            series=_label(series, kv_cache) if size or kv_cache else None,
            average_bits=CompressionPlan.load(checkpoint).reached_bits if allocated else None,
            bytes=bytes_on_disk(checkpoint) or sum(p.nbytes for p in original.parameters()),
            evaluation=evaluation,
        )


def _label(name: str, kv_cache: str | None) -> str:
    """Return the name of a point that is scored with a cache."""
    return name if kv_cache is None else f"{name}, {kv_cache}"
