"""Codes of weights and tuned numbers on disk, for a run that is started again."""

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from loguru import logger
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from casp_plugin.model.codebook_schemes import Tensors
from casp_plugin.statistics.cache import RESULTS_NAME, code_digest, content_digest
from casp_plugin.system.distributed import is_source_process
from casp_plugin.system.files import whole_file

__all__ = ["ResultCache"]


class ResultCache:
    """Results, found again by a digest of all that they are made from.

    Nothing can be stale: other weights, inputs or settings have another digest.

    :param root: folder of the caches of any number of models
    """

    def __init__(self, root: Path | str):
        self._folder = Path(root) / RESULTS_NAME
        self._folder.mkdir(parents=True, exist_ok=True)
        self.found = 0

    def key(self, facts: Iterable, tensors: Iterable[torch.Tensor | None]) -> Path:
        """Return the file of a result.

        :param facts: all settings that it depends on, each as its text tells it
        :param tensors: all numbers that it depends on, such as weights and statistics of inputs
        """
        named = ((str(place), tensor) for place, tensor in enumerate(tensors) if tensor is not None)
        digest = content_digest([code_digest(), *map(str, facts)], named)
        return self._folder / f"{digest}.safetensors"

    def read(self, key: Path) -> list[Tensors] | None:
        """Return the tensors of layers; None where they are not there, or cannot be read."""
        if not key.exists():
            return None
        try:
            stored = load_file(key)
        except (OSError, SafetensorError) as error:
            logger.warning(f"{key} cannot be read, what it held is made again: {error}")
            return None
        layers: dict[int, Tensors] = {}
        for name, tensor in stored.items():
            number, _, leaf = name.partition(".")
            layers.setdefault(int(number), {})[leaf] = tensor
        self.found += len(layers)
        os.utime(key)  # time of the last use
        return [layers[number] for number in range(len(layers))]

    def limit(self, most: int) -> None:
        """Delete the files used longest ago until all fit.

        :param most: largest size of them, in bytes
        """
        if not is_source_process():
            return
        sizes = {path: path.stat().st_size for path in self._folder.iterdir()}
        for path in sorted(sizes, key=lambda path: path.stat().st_mtime):
            if sum(sizes.values()) > most:
                path.unlink()
                del sizes[path]

    def keep(self, key: Path, layers: list[Tensors]) -> None:
        """Write the tensors of layers, whole or not at all."""
        if not is_source_process():
            return
        stored = {
            f"{number}.{leaf}": tensor.to("cpu", copy=True).contiguous()  # layers share signs
            for number, tensors in enumerate(layers)
            for leaf, tensor in tensors.items()
        }
        with whole_file(key) as partial:
            save_file(stored, partial)
