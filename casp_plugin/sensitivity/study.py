"""A study of one model: its layers, the models to score, and the run that keeps every score."""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, groupby, islice, zip_longest
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from loguru import logger
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from casp_plugin.model.experts import linearize_experts
from casp_plugin.model.location import find_locations, levels
from casp_plugin.model.units import matched_linears
from casp_plugin.sensitivity.grid import (
    METHODS,
    UNIFORM,
    Configuration,
    Layer,
    features,
    grid,
    space_filling,
)
from casp_plugin.sensitivity.rounding import changed_by, mappings_of
from casp_plugin.sensitivity.scoring import Changes, ScoredData, load_linearized, scorer_pool
from casp_plugin.system.files import whole_file

__all__ = [
    "POINTS_NAME",
    "Calibration",
    "Study",
    "check_method",
    "find_layers",
    "points_of",
]

POINTS_NAME = "points.parquet"


@dataclass(frozen=True)
class Calibration:
    """Data and settings of GPTQ and AWQ.

    :param batches: calibration batches
    :param group_size: columns that share a scale; -1 for all columns of a row
    :param seed: seed of all random numbers
    """

    batches: Iterable[dict]
    group_size: int
    seed: int


class Study:
    """The models of a study of one model, in a folder that keeps their scores.

    :param model: folder or Hugging Face id of the original model
    :param layers: layers that may be quantized, by name
    :param dtype: dtype of the weights
    :param data: data that models are scored on
    :param calibration: for methods other than ``uniform``
    :param folder: holds ``points.parquet``, a row for every scored model
    :param processes: processes that score models at a time
    :param trust_remote_code: whether Python code that comes with the model may run
    """

    def __init__(
        self,
        model: str,
        layers: Mapping[str, Layer],
        dtype: torch.dtype,
        data: ScoredData,
        calibration: Calibration,
        folder: Path,
        processes: int = 1,
        trust_remote_code: bool = False,
    ):
        self.trust_remote_code = trust_remote_code
        self.model, self.layers, self.dtype = model, layers, dtype
        self.data, self.calibration = data, calibration
        self.folder, self.processes = folder, processes
        locations = {name: layer.location for name, layer in layers.items()}
        several = len(levels(locations.values(), "component")) > 1
        self.cell = {
            name: location.component if several else f"{location.block}-{location.layer_type}"
            for name, location in locations.items()
        }

    def run(self, configurations: Sequence[Configuration]) -> pd.DataFrame:
        """Score the models that the folder does not have yet, the original first.

        :param configurations: models of the study
        :return: all rows of the folder, by method: columns of ``Configuration.row``, of
            ``features`` and of ``ScoredData.scores``
        """
        path = self.folder / POINTS_NAME
        rows = pd.read_parquet(path).to_dict("records") if path.exists() else []
        done = {_key(row) for row in rows}
        original = Configuration("original", torch.finfo(self.dtype).bits, (), (), ())
        wanted = [point for point in (original, *configurations) if _key(point.row()) not in done]
        methods = list(dict.fromkeys(point.method for point in wanted))
        # points of one method and width share quantized weights
        wanted.sort(key=lambda point: (methods.index(point.method), point.bits))
        progress = tqdm(total=len(wanted), desc="Models scored", smoothing=0)
        scorer = scorer_pool(self.model, self.data, self.processes, self.trust_remote_code)
        with scorer as score, progress:
            shared = groupby(wanted, key=lambda point: (point.method, point.bits))
            for (method, bits), group in shared:
                group = list(group)
                needed = {cell for point in group for cell in self._cells(point)}
                with self._quantized_weights(method, bits, sorted(needed)) as files:
                    changes = [self._changes(point, files) for point in group]
                    for point, scores in zip(group, score(changes), strict=True):
                        rows.append(self._row(point) | scores)
                        with whole_file(path) as partly:
                            pd.DataFrame(rows).to_parquet(partly, index=False)
                        progress.update()
        order = ["original", *METHODS]
        rows.sort(key=lambda row: order.index(row["method"]))
        return pd.DataFrame(rows)

    def _row(self, point: Configuration) -> dict:
        return point.row() | features(point, self.layers, self.dtype, self.calibration.group_size)

    def _changes(self, point: Configuration, files: Mapping[str, Path]) -> Changes:
        if point.method == UNIFORM:
            return Changes(uniform_bits=point.bits, names=tuple(self._quantized_layers(point)))
        return Changes(files=tuple(files[cell] for cell in self._cells(point)))

    def _quantized_layers(self, point: Configuration) -> list[str]:
        return [name for name, layer in self.layers.items() if point.takes(layer.location)]

    def _cells(self, point: Configuration) -> list[str]:
        """Return the sets of layers of a configuration that a quantizer runs on one by one:
        components, or in a model of one component, the attention or feed-forward layers of a third
        of the blocks."""
        return list(dict.fromkeys(self.cell[name] for name in self._quantized_layers(point)))

    @contextmanager
    def _quantized_weights(
        self, method: str, bits: int, cells: Sequence[str]
    ) -> Iterator[dict[str, Path]]:
        """Make a file of the tensors that a method changes in every cell; remove them afterwards.

        :param cells: names of sets of layers, as ``_cells`` returns them
        """
        if method in (UNIFORM, "original"):
            yield {}
            return
        folder = self.folder / "weights"
        files = {cell: folder / f"{method}-{bits}-{cell}.safetensors" for cell in cells}
        for cell, path in files.items():
            if not path.exists():
                with whole_file(path) as partly:
                    save_file(self._changed(method, bits, cell), partly)
        _check_apart(method, files)
        yield files
        shutil.rmtree(folder)

    def _changed(self, method: str, bits: int, cell: str) -> dict[str, torch.Tensor]:
        model = load_linearized(self.model, self.trust_remote_code)
        names = [name for name in self.layers if self.cell[name] == cell]
        settings = (self.calibration.group_size, self.calibration.batches, self.calibration.seed)
        return changed_by(method, model, names, bits, *settings)


def find_layers(model: nn.Module, ignore: Sequence[str]) -> dict[str, Layer]:
    """Return the linear layers that a study may quantize, by name; experts become linear layers.

    :param model: the model, with weights or on the meta device; its experts are replaced
    :param ignore: layers that stay as they are, in llm-compressor's matching syntax
    :raises ValueError: if no layer is left
    """
    linearize_experts(model)
    linears = matched_linears(model, ["Linear"], list(ignore), "--ignore")
    locations = find_locations(model, linears)
    return {
        name: Layer(locations[name], tuple(linear.weight.shape)) for name, linear in linears.items()
    }


def check_method(
    method: str, model: nn.Module, layers: Mapping[str, Layer], group_size: int
) -> None:
    """Check that a method can quantize the layers of a model.

    :param method: one of ``METHODS``
    :param model: the model, on the meta device
    :param layers: layers that may be quantized, by name
    :param group_size: columns that share a scale; -1 for all columns of a row
    :raises ValueError: if the method is not known, or cannot quantize a layer
    """
    if method not in METHODS:
        raise ValueError(f"--methods: {method!r} must be one of {', '.join(METHODS)}")
    if method == UNIFORM:
        return
    for name, layer in layers.items():
        columns = layer.shape[1]
        if group_size != -1 and (group_size < 1 or columns % group_size):
            raise ValueError(
                f"--group-size {group_size} does not divide the {columns} columns of {name}: give "
                "another, or leave the layer out by --ignore"
            )
    for component in levels((layer.location for layer in layers.values()), "component"):
        names = [name for name, layer in layers.items() if layer.location.component == component]
        try:
            if method == "awq" and not mappings_of(model, names):
                logger.warning(f"AWQ finds nothing to scale in {component}: rounded to nearest")
        except ValueError as error:
            raise ValueError(f"--methods awq: {error}") from None


def points_of(
    methods: Sequence[str],
    layers: Mapping[str, Layer],
    dtype: torch.dtype,
    group_size: int,
    most: int | None = None,
) -> list[Configuration]:
    """Return the models of a study, methods in turns. If not all are wanted, whole components come
    first and then models that cover the grid best; a larger number adds models to a smaller one.

    :param methods: some of ``METHODS``
    :param layers: layers that may be quantized, by name
    :param dtype: dtype of the weights
    :param group_size: columns that share a scale
    :param most: number of models of all methods together; None for all
    """
    orders = []
    for method in methods:
        points = grid(method, layers)
        bits = [list(features(point, layers, dtype, group_size).values()) for point in points]
        levels_of = [len(point.block) + len(point.kind) for point in points]
        whole = [i for i, count in enumerate(levels_of) if count == max(levels_of)]
        orders.append([points[i] for i in space_filling(np.array(bits), whole)])
    taken_in_turns = filter(None, chain.from_iterable(zip_longest(*orders)))
    return list(islice(taken_in_turns, most))


def _check_apart(method: str, files: Mapping[str, Path]) -> None:
    """Check that no two cells change one tensor, so that their files can be combined.

    :param files: files of changed tensors, by cell
    :raises ValueError: if two cells do
    """
    owners = {}
    for cell, path in files.items():
        with safe_open(path, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118  not a dict
                if owners.setdefault(name, cell) != cell:
                    raise ValueError(
                        f"--methods {method}: {name} is changed for {owners[name]} and for {cell}, "
                        "which this model cannot have apart: leave the method out"
                    )


def _key(row: Mapping) -> tuple:
    """Return the columns of a row that tell models apart."""
    return tuple(row[name] for name in ("method", "bits", "component", "block", "kind"))
