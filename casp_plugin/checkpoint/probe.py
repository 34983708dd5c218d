"""Logits of a compressed model on fixed samples: a reloaded checkpoint is compared with them."""

from pathlib import Path

import numpy
import torch
from loguru import logger
from pydantic import BaseModel, ConfigDict, Field
from transformers import AutoProcessor, PreTrainedModel

from casp_plugin.model.load import is_multimodal
from casp_plugin.system.messages import one_line

__all__ = ["PROBES_NAME", "Probe", "Record", "difference", "probe", "tolerance"]

PROBES_NAME = "casp_probes.json"
#: tokens of a text sample, and entries of the vocabulary whose logits are kept
TOKENS, ENTRIES = 16, 32
#: differences of logits, relative to their spread, that devices and kernels explain
_TOLERANCES = {"float32": 1e-4}
_TOLERANCE = 2e-2


class Probe(BaseModel):
    """Logits of a compressed model on one sample, which a reloaded checkpoint must give again.

    :param sample: name of the sample
    :param dtype: dtype of the model
    :param logits: a part of the logits, (tokens, entries of the vocabulary)
    """

    model_config = ConfigDict(extra="forbid")

    sample: str
    dtype: str
    logits: list[list[float]]


class Record(BaseModel):
    """Data that a checkpoint is checked against.

    :param probes: logits of the compressed model in the run that made it
    :param checksums: CRC-32 of the data of each tensor, by its name on disk
    """

    model_config = ConfigDict(extra="forbid")

    probes: list[Probe] = Field(default_factory=list)
    checksums: dict[str, int] = Field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write the record into a checkpoint folder."""
        (folder / PROBES_NAME).write_text(self.model_dump_json() + "\n")

    @classmethod
    def load(cls, path: Path) -> "Record":
        """Return the record of a checkpoint; an empty record where it has none.

        :param path: checkpoint folder, or the record's file
        :raises pydantic.ValidationError: if it is malformed
        """
        path = path / PROBES_NAME if path.is_dir() else path
        return cls.model_validate_json(path.read_text()) if path.exists() else cls()


def _samples(
    model: PreTrainedModel, folder: Path | str, trust_remote_code: bool
) -> dict[str, dict[str, torch.Tensor]]:
    """Return the model's arguments for every sample, by the sample's name: tokens, and a grey image
    where the model takes images."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(1, 1 + TOKENS)[None] % vocabulary
    samples = {"text": {"input_ids": ids.to(model.device)}}
    if not is_multimodal(model.config):
        return samples
    try:
        from casp_plugin.data.conversation_batches import (
            image_prefix,  # imports packages that only calibration needs
        )

        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
        image = numpy.full((224, 224, 3), 128, dtype=numpy.uint8)
        text = [f"{image_prefix(processor)} a"]
        inputs = processor(text=text, images=[[image]], return_tensors="pt")
        return samples | {"an image": dict(inputs.to(model.device))}
    except Exception as error:  # packages of the processor's own, missing files
        why = f"{type(error).__name__}: {one_line(error)[:80]}"
        logger.warning(f"{folder} is not shown an image: {why}")
        return samples


@torch.no_grad()
def probe(
    model: PreTrainedModel, folder: Path | str, trust_remote_code: bool = False
) -> tuple[list[Probe], dict[str, str]]:
    """Return the model's logits on every sample it takes, and errors by the names of the others.

    :param model: any model with logits; its mode and config are restored
    :param folder: folder with the files of the model's processor
    :param trust_remote_code: whether Python code that comes with the model may run
    """
    probes, errors, training = [], {}, model.training
    config = model.config.get_text_config()
    had_cache, cached = hasattr(config, "use_cache"), getattr(config, "use_cache", None)
    model.eval()
    config.use_cache = False  # logits do not depend on it, and some caches take more arguments
    for name, arguments in _samples(model, folder, trust_remote_code).items():
        try:
            logits = model(**arguments).logits.flatten(0, -2)  # (tokens, vocabulary)
        except Exception as error:  # a class that takes more arguments
            errors[name] = f"{type(error).__name__}: {one_line(error)}"
            continue
        columns = torch.linspace(0, logits.shape[1] - 1, ENTRIES).long()
        kept = logits[-TOKENS:, columns.to(logits.device)].float()  # (TOKENS, ENTRIES)
        dtype = str(model.dtype).removeprefix("torch.")
        probes.append(Probe(sample=name, dtype=dtype, logits=kept.tolist()))
    model.train(training)
    if had_cache:
        config.use_cache = cached
    else:
        del config.use_cache
    return probes, errors


def difference(measured: Probe, expected: Probe) -> float:
    """Return the root mean square difference of two probes over the standard deviation of the
    expected logits; infinity where logits are NaN, infinite or of another shape."""
    logits = torch.tensor(measured.logits, dtype=torch.float64)  # (tokens, entries)
    wanted = torch.tensor(expected.logits, dtype=torch.float64)
    if logits.shape != wanted.shape or not torch.isfinite(logits).all():
        return float("inf")
    spread = (wanted - wanted.mean(1, keepdim=True)).square().mean().sqrt()
    return ((logits - wanted).square().mean().sqrt() / spread.clamp_min(1e-12)).item()


def tolerance(probe: Probe) -> float:
    """Return the largest difference that rounding of the model's dtype explains."""
    return _TOLERANCES.get(probe.dtype, _TOLERANCE)
