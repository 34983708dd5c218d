"""The model of a checkpoint without its weights, as loading builds it: it tells which tensors the
checkpoint must hold, and by which names."""

import io
from collections.abc import Iterable
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path

from compressed_tensors.transform import TransformConfig
from transformers import PreTrainedConfig, PreTrainedModel

from casp_plugin.checkpoint.load import CaspHfQuantizer, CompressedTensorsConfig, drop_stand_ins
from casp_plugin.model.load import (
    bare_model,
    names_in_memory,
    parted_in_memory,
    read_model_config,
)

__all__ = ["BareCheckpoint", "bare_checkpoint", "bare_from_config"]


@dataclass(frozen=True)
class BareCheckpoint:
    """The model of a checkpoint without its weights, as loading builds it.

    :param model: the model, on the meta device
    :param quantizer: the quantizer that would load it
    """

    model: PreTrainedModel
    quantizer: CaspHfQuantizer

    @property
    def transforms(self) -> TransformConfig | None:
        """Return the rotations of inputs."""
        return self.quantizer.transforms

    def names_in_memory(self, names: Iterable[str]) -> dict[str, str]:
        """Return the names of tensors once they are loaded, by their names on disk. All tensors
        that merge into the stacked weights of experts share one name.

        :param names: names on disk
        """
        return names_in_memory(names, self.model, self.quantizer)

    def parted_in_memory(self, names: Iterable[str]) -> set[str]:
        """Return the tensors of the model that loading cuts out of larger ones (q, k and v of one
        matrix).

        :param names: names on disk
        """
        return parted_in_memory(names, self.model, self.quantizer)


def bare_checkpoint(folder: Path | str, trust_remote_code: bool = False) -> BareCheckpoint:
    """Return the model of a checkpoint folder without its weights.

    :param trust_remote_code: whether Python code that comes with the model may run
    :raises ValueError: if our section names layers that the model lacks, or the class that
        ``architectures`` names is neither a causal language nor an image-text model
    """
    return bare_from_config(read_model_config(folder, trust_remote_code), trust_remote_code)


def bare_from_config(config: PreTrainedConfig, trust_remote_code: bool = False) -> BareCheckpoint:
    """Return the model that a config promises, without weights.

    :param config: with a ``quantization_config``, which is taken out of it
    :param trust_remote_code: whether Python code that comes with the model may run
    :raises ValueError: as ``bare_checkpoint``
    """
    quantization = CompressedTensorsConfig.from_dict(config.quantization_config)
    del config.quantization_config
    model = bare_model(config, trust_remote_code)
    quantizer = CaspHfQuantizer(quantization, pre_quantized=True)
    quantizer.validate_environment()
    with redirect_stderr(io.StringIO()):  # progress bars of an instant
        quantizer.preprocess_model(model)
    drop_stand_ins(model)
    return BareCheckpoint(model, quantizer)
