"""The run of a sweep: one model compressed to many sizes, and every size scored."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from casp_plugin.evaluation.checkpoints import Scoring, score
from casp_plugin.evaluation.results import Evaluation
from casp_plugin.evaluation.sweep import Point, finished
from casp_plugin.model.load import bytes_on_disk, load_model
from casp_plugin.modifiers import plan_recipe
from casp_plugin.modifiers.compression import compress
from casp_plugin.modifiers.recipes import allocates_bits, load_recipe
from casp_plugin.plan.plan import CompressionPlan
from casp_plugin.system.machine import installed_versions

__all__ = ["Size", "Sweep", "sizes_of"]


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
        """Name of the recipe, without a budget at its end."""
        return re.sub(r"_\d+(\.\d+)?$", "", self.recipe.stem)

    @property
    def name(self) -> str:
        """Name of the checkpoint's folder."""
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
    :param batches: calibration batches
    :param scoring: data that each size is scored on, against the original model
    :param kv_caches: schemes of stored keys and values that each size is scored with too
    :param seed: seed of all that is random
    :param trust_remote_code: whether Python code that comes with the model may run
    """

    model: str
    folder: Path
    sizes: Mapping[str, Size]
    batches: Iterable[dict]
    scoring: Scoring
    kv_caches: Sequence[str] = ()
    seed: int = 0
    trust_remote_code: bool = False

    def run(self) -> list[Point]:
        """Make the points that the folder lacks; return all, as ``finished`` does."""
        makers = {
            _label(name, kv_cache): partial(self._point, name, kv_cache)
            for name in (self.model, *self.sizes)
            for kv_cache in (None, *self.kv_caches)
        }
        return finished(self.folder, makers)

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
        measured = score(
            checkpoint,
            self.scoring,
            original if size or kv_cache else None,
            self.seed,
            kv_cache,
            self.trust_remote_code,
        )
        allocated = size is not None and size.average_bits is not None
        series = size.series if size else name
        return Point(
            name=_label(name, kv_cache),
            series=_label(series, kv_cache) if size or kv_cache else None,
            average_bits=CompressionPlan.load(checkpoint).reached_bits if allocated else None,
            bytes=bytes_on_disk(checkpoint) or sum(p.nbytes for p in original.parameters()),
            evaluation=Evaluation(
                model=checkpoint,
                settings={
                    "seed": self.seed,
                    "dataset": self.scoring.source.dataset,
                    "kv_cache": kv_cache,
                    "samples": self.scoring.samples,
                    "max_length": self.scoring.max_length,
                    "stride": self.scoring.stride,
                },
                versions=installed_versions(),
                measurements=measured,
            ),
        )


def _label(name: str, kv_cache: str | None) -> str:
    """Return the name of a point that is scored with a cache."""
    return name if kv_cache is None else f"{name}, {kv_cache}"
