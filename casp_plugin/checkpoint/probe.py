"""What a compressed model says about a fixed sample: a reload is held against the run by it."""

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
#: tokens of a sample of text, and entries of the vocabulary that are kept
TOKENS, ENTRIES = 16, 32
#: what logits may differ by, relative to their spread: of devices and kernels, not of weights
_TOLERANCES = {"float32": 1e-4}
_TOLERANCE = 2e-2


class Probe(BaseModel):
    """What the compressed model said in the run that made it, which a reload must say again.

    :param sample: what it was shown
    :param dtype: of the model
    :param logits: some of them, (tokens, entries of the vocabulary)
    """

    model_config = ConfigDict(extra="forbid")

    sample: str
    dtype: str
    logits: list[list[float]]


class Record(BaseModel):
    """What a checkpoint is held against.

    :param probes: what the compressed model said
    :param checksums: CRC-32 of the data of each tensor, by its name on disk
    """

    model_config = ConfigDict(extra="forbid")

    probes: list[Probe] = Field(default_factory=list)
    checksums: dict[str, int] = Field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write it beside a checkpoint."""
        (folder / PROBES_NAME).write_text(self.model_dump_json() + "\n")

    @classmethod
    def load(cls, path: Path) -> "Record":
        """Return the record of a checkpoint; an empty one where it has none.

        :param path: folder or file
        :raises pydantic.ValidationError: if it is malformed
        """
        path = path / PROBES_NAME if path.is_dir() else path
        return cls.model_validate_json(path.read_text()) if path.exists() else cls()


def _samples(
    model: PreTrainedModel, folder: Path | str, trust_remote_code: bool
) -> dict[str, dict[str, torch.Tensor]]:
    """What a model can be shown: tokens, and a grey image where it takes images. Arguments of the
    model by what they are."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(1, 1 + TOKENS)[None] % vocabulary
    found = {"text": {"input_ids": ids.to(model.device)}}
    if not is_multimodal(model.config):
        return found
    try:
        from casp_plugin.data.conversation_batches import (
            image_prefix,  # takes what only calibration needs
        )

        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
        image = numpy.full((224, 224, 3), 128, dtype=numpy.uint8)
        text = [f"{image_prefix(processor)} a"]
        made = processor(text=text, images=[[image]], return_tensors="pt")
        return found | {"an image": dict(made.to(model.device))}
    except Exception as error:  # packages of its own, files that are not there
        why = f"{type(error).__name__}: {one_line(error)[:80]}"
        logger.warning(f"{folder} is not shown an image: {why}")
        return found


@torch.no_grad()
def probe(
    model: PreTrainedModel, folder: Path | str, trust_remote_code: bool = False
) -> tuple[list[Probe], dict[str, str]]:
    """Return what a model says about every sample that it can be shown, and the errors of others.

    :param folder: with the files of its processor
    :param trust_remote_code: whether Python code that comes with the model may run
    """
    found, errors, training = [], {}, model.training
    config = model.config.get_text_config()
    had_cache, cached = hasattr(config, "use_cache"), getattr(config, "use_cache", None)
    model.eval()
    config.use_cache = False  # what is said does not hang on it, and some caches need more
    for name, arguments in _samples(model, folder, trust_remote_code).items():
        try:
            logits = model(**arguments).logits.flatten(0, -2)  # (tokens, vocabulary)
        except Exception as error:  # a class that takes more than that
            errors[name] = f"{type(error).__name__}: {one_line(error)}"
            continue
        columns = torch.linspace(0, logits.shape[1] - 1, ENTRIES).long()
        kept = logits[-TOKENS:, columns.to(logits.device)].float()
        dtype = str(model.dtype).removeprefix("torch.")
        found.append(Probe(sample=name, dtype=dtype, logits=kept.tolist()))
    model.train(training)
    if had_cache:
        config.use_cache = cached
    else:
        del config.use_cache
    return found, errors


def difference(found: Probe, expected: Probe) -> float:
    """Return by how much two probes differ: the root mean square of the differences over the
    standard deviation of the expected logits; NaN and infinite ones are infinitely far."""
    ours, theirs = (torch.tensor(each.logits, dtype=torch.float64) for each in (found, expected))
    if ours.shape != theirs.shape or not torch.isfinite(ours).all():
        return float("inf")
    spread = (theirs - theirs.mean(1, keepdim=True)).square().mean().sqrt()
    return ((ours - theirs).square().mean().sqrt() / spread.clamp_min(1e-12)).item()


def tolerance(probe: Probe) -> float:
    """Return the largest difference that rounding of the model's dtype explains."""
    return _TOLERANCES.get(probe.dtype, _TOLERANCE)
