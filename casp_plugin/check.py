"""Does a checkpoint hold what it should, and does it come back?"""

from collections import Counter
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import numpy
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.quant_metadata import KVCacheScaleType
from safetensors import SafetensorError
from transformers import AutoProcessor, PreTrainedModel

from casp_plugin.checkpoint import read_config, read_section
from casp_plugin.loading import bare_checkpoint
from casp_plugin.models import is_multimodal, load_model, names_in_memory
from casp_plugin.plan import PLAN_NAME, CompressionPlan
from casp_plugin.processing import image_prefix
from casp_plugin.runtime.architectures import TESTED, refusal
from casp_plugin.schemes import missing_kernel
from casp_plugin.sizes import read_headers, tensor_bytes
from casp_plugin.transforms import stored_transforms

__all__ = ["Finding", "check"]

#: tensors that a quantizer's `kv_cache_scheme` adds
_KV_CACHE_SCALES = tuple(f".{kind.value}" for kind in KVCacheScaleType)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    :param what: what was checked
    :param passed: False if the checkpoint is broken, None for a remark
    :param detail: what was found
    """

    what: str
    passed: bool | None
    detail: str


def check(folder: Path | str, reload: bool = True) -> list[Finding]:
    """Look at a checkpoint folder: section, tensors, sizes, kernels, reload, vLLM.

    :param folder: checkpoint folder
    :param reload: also load the model and run a few tokens through it
    :return: findings, in order; the checkpoint is sound if none has ``passed`` False
    :raises ValueError: if the folder is no checkpoint at all
    """
    folder = Path(folder)
    config = read_config(folder)
    quantization = config.get("quantization_config")
    if not quantization:
        raise ValueError(f"{folder} is not quantized: config.json has no quantization_config")
    try:
        on_disk = read_headers(folder)
        expected, found = _expected_tensors(folder, on_disk)
    except (ValueError, SafetensorError, OSError) as error:
        return [Finding("checkpoint", False, str(error))]
    findings = [
        Finding("low-rank layers", None, f"{len(read_section(quantization).ranks)}"),
        _compare(found, expected),
        _sizes(folder, on_disk),
        _kernels(quantization),
    ]
    if reload and all(finding.passed is not False for finding in findings):
        findings.append(_reload(folder))
    findings.append(_served(config.get("architectures") or [], quantization))
    return findings


def _expected_tensors(folder: Path, on_disk: dict) -> tuple[dict, dict]:
    """Shapes that the config promises, and what is on disk by the names that the model has for it.
    Both without the tensors that loading merges into one (experts)."""
    model, transforms = bare_checkpoint(folder)
    tensors = model.state_dict() | stored_transforms(transforms, model)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, module in model.named_modules():
        zeros = f"{name}.weight_zero_point"
        if zeros in shapes:  # packed along the rows, which compressing on meta leaves out
            rows, groups = shapes[zeros]
            bits = module.quantization_scheme.weights.num_bits
            shapes[zeros] = (ceil(rows * bits / 32), groups)
    for tied in model.all_tied_weights_keys:
        shapes.pop(tied, None)
    names = names_in_memory(list(on_disk), model)
    merged = {name for name, parts in Counter(names.values()).items() if parts > 1}
    for name in merged:
        shapes.pop(name, None)
    found = {names[name]: header for name, header in on_disk.items() if names[name] not in merged}
    return shapes, found


def _compare(on_disk: dict, expected: dict) -> Finding:
    what = "tensor names and shapes"
    missing = sorted(expected.keys() - on_disk.keys())
    surplus = sorted(on_disk.keys() - expected.keys())
    wrong = sorted(n for n in expected.keys() & on_disk.keys() if expected[n] != on_disk[n][0])
    if missing:
        return Finding(what, False, f"{len(missing)} missing, first {missing[0]}")
    if surplus:
        return Finding(what, False, f"{len(surplus)} unexpected, first {surplus[0]}")
    if wrong:
        name = wrong[0]
        detail = f"{len(wrong)} of the wrong shape, first {name}: {on_disk[name][0]} on disk, "
        return Finding(what, False, f"{detail}{expected[name]} expected")
    return Finding(what, True, f"{len(on_disk)} tensors")


def _sizes(folder: Path, on_disk: dict) -> Finding:
    total = sum(
        tensor_bytes(header)
        for name, header in on_disk.items()
        if not name.endswith(_KV_CACHE_SCALES)
    )
    if not (folder / PLAN_NAME).exists():
        return Finding("bytes", None, f"{total:,} bytes of tensors; no {PLAN_NAME} to compare with")
    planned = CompressionPlan.load(folder).total_bytes
    if planned is None:
        return Finding("bytes", None, f"{total:,} bytes of tensors; the plan allocates no bits")
    detail = f"{total:,} on disk, {planned:,} planned"
    return Finding("bytes as planned", total == planned, detail)


def _kernels(quantization: dict) -> Finding:
    if not quantization.get("config_groups"):
        return Finding("kernels on vLLM CUDA", None, "no quantized layer")
    groups = QuantizationConfig.model_validate(quantization).config_groups.values()
    needs = Counter()
    for group in groups:
        needs[missing_kernel(group.weights)] += len(group.targets)
    extra = [package for package in needs if package]
    if not extra:
        return Finding("kernels on vLLM CUDA", True, "all in the box")
    count = sum(needs[package] for package in extra)
    detail = f"{count} of {needs.total()} targets need {', '.join(extra)}"
    return Finding("kernels on vLLM CUDA", None, f"{detail}: pip install {' '.join(extra)}")


def _served(architectures: list[str], quantization: dict) -> Finding:
    """Whether vLLM with this plugin runs the architecture."""
    why = refusal(architectures, quantization)
    if why is not None:
        return Finding("vLLM", False, why)
    untested = ", ".join(name for name in architectures if name not in TESTED)
    known = f"not tested with {untested}" if untested else "tested with this architecture"
    return Finding("vLLM", None, f"casp-plugin beside vLLM: {known}")


def _reload(folder: Path) -> Finding:
    try:
        model = load_model(str(folder))
        sample, what = _sample(folder, model)
        with torch.no_grad():
            finite = bool(torch.isfinite(model(**sample).logits).all())
    except Exception as error:  # whatever a user would meet when loading
        return Finding("reload", False, f"{type(error).__name__}: {error}")
    found = "finite logits" if finite else "logits hold NaN or infinity"
    return Finding("reload", finite, f"{found} for {what}")


def _sample(folder: Path, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], str]:
    """A few tokens, with an image where the model takes one; and what that is in words."""
    ids = torch.arange(1, 9)[None] % model.config.get_text_config().vocab_size
    words = {"input_ids": ids.to(model.device)}
    if not is_multimodal(model.config):
        return words, "text"
    try:
        processor = AutoProcessor.from_pretrained(folder)
        image = numpy.full((224, 224, 3), 128, dtype=numpy.uint8)
        text = [f"{image_prefix(processor)} a"]
        made = processor(text=text, images=[[image]], return_tensors="pt")
    except Exception as error:  # packages of its own, files that are not there
        why = " ".join(str(error).split())[:80]
        return words, f"text; no image: {type(error).__name__}: {why}"
    return dict(made.to(model.device)), "an image"
