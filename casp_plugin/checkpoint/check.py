"""Checks of a checkpoint folder: tensors, sizes, contents, kernels, a reload, vLLM."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import numpy as np
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.quant_metadata import KVCacheScaleType
from compressed_tensors.transform import TransformConfig
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from casp_plugin.checkpoint.bare import BareCheckpoint, bare_checkpoint
from casp_plugin.checkpoint.format import Section, read_config, read_section
from casp_plugin.checkpoint.probe import PROBES_NAME, Record, difference, probe, tolerance
from casp_plugin.checkpoint.vllm_support import (
    TESTED,
    Linear,
    compiled_matmuls,
    dense,
    quantized_experts,
    refusal,
    targets_of,
)
from casp_plugin.model.load import load_model
from casp_plugin.model.schemes import missing_kernel
from casp_plugin.model.transforms import stored_transforms
from casp_plugin.model.weights import Header, checksums, read_headers, tensor_bytes
from casp_plugin.plan.plan import PLAN_NAME, CompressionPlan
from casp_plugin.system.messages import one_line

__all__ = ["Finding", "check", "compare_tensors", "expected_shapes"]

_EXPERT_NUMBER = re.compile(r"\.(\d+)\.(?=[^.]*\.[^.]*$)")

#: tensors that a quantizer's `kv_cache_scheme` adds
_KV_CACHE_SCALES = tuple(f".{kind.value}" for kind in KVCacheScaleType)


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    :param what: subject of the check
    :param passed: False if the checkpoint is broken, None for a remark
    :param detail: the result in words
    """

    what: str
    passed: bool | None
    detail: str


def check(
    folder: Path | str, reload: bool = True, trust_remote_code: bool = False
) -> list[Finding]:
    """Check a checkpoint folder: section, tensors, sizes, kernels, contents, reload, vLLM.

    :param folder: checkpoint folder
    :param reload: whether to load the model too, and compare its logits with those of the run that
        made it
    :param trust_remote_code: whether Python code that comes with the model may run
    :return: findings in order; the checkpoint is sound if ``passed`` is False in none
    :raises ValueError: if the folder is no quantized checkpoint at all
    """
    folder = Path(folder)
    config = read_config(folder)
    quantization = config.get("quantization_config")
    if not quantization:
        raise ValueError(f"{folder} is not quantized: config.json has no quantization_config")
    last = []
    try:
        last.append(_served(config.get("architectures") or [], quantization))
        on_disk = read_headers(folder)
        bare = bare_checkpoint(folder, trust_remote_code)
        plan = CompressionPlan.load(folder) if (folder / PLAN_NAME).exists() else None
        tensors = compare_tensors(on_disk, bare, plan)
        record = Record.load(folder)
    except (ValueError, SafetensorError, OSError) as error:
        return [Finding("checkpoint", False, one_line(error)), *last]
    section = read_section(quantization)
    findings = [
        Finding("low-rank layers", None, f"{len(section.ranks)}"),
        *([Finding("codebook layers", None, _codebooks(section))] if section.codebooks else []),
        tensors,
        _sizes(on_disk, plan),
        _kernels(quantization, bare.model, section),
    ]
    sound = all(finding.passed is not False for finding in findings)
    findings.append(_contents(folder, record))
    if reload and sound:
        findings += _reload(folder, record, trust_remote_code)
    return findings + last


def compare_tensors(
    on_disk: Mapping[str, Header], bare: BareCheckpoint, plan: CompressionPlan | None
) -> Finding:
    """Compare the tensors of a checkpoint with those that its config promises, name by name.

    :param on_disk: headers by name on disk
    :param bare: the model that the config promises
    :param plan: names the tensors that are copied unchanged; None without a plan
    """
    what = "tensor names and shapes"
    expected, merged = expected_shapes(bare.model, bare.transforms), {}
    names, parted = bare.names_in_memory(on_disk), bare.parted_in_memory(on_disk)
    sources = Counter(names.values())  # tensors on disk, by the name that they load into
    stored: dict[str, tuple[int, ...]] = {}
    for name, (shape, _) in on_disk.items():
        in_memory = names[name]
        if in_memory in parted:
            continue
        if sources[in_memory] > 1 or ("experts" in in_memory and in_memory != name):
            merged.setdefault(in_memory, {})[name] = shape
        else:
            stored[in_memory] = shape
    unbuilt = [tensor.name for tensor in plan.copied] if plan else []
    copied = {names.get(name, name) for name in unbuilt}
    lost = [name for name in unbuilt if name not in on_disk]
    unknown = [name for name in merged if name not in expected]
    missing = sorted(expected.keys() - stored.keys() - merged.keys() - parted) + sorted(lost)
    # weights that the config ties are stored where they differ: then they are not tied
    tied = bare.model.all_tied_weights_keys.keys()
    surplus = sorted((stored.keys() | {*unknown}) - expected.keys() - copied - tied)
    wrong = [name for name in expected.keys() & stored.keys() if expected[name] != stored[name]]
    if missing:
        return Finding(what, False, f"{len(missing)} missing, first {missing[0]}")
    if surplus and plan is not None:
        return Finding(what, False, f"{len(surplus)} unexpected, first {surplus[0]}")
    if wrong:
        name = min(wrong)
        detail = f"{len(wrong)} of the wrong shape, first {name}: {stored[name]} on disk, "
        return Finding(what, False, f"{detail}{expected[name]} expected")
    for name, files in merged.items():
        if name in expected and (why := _incomplete_experts(expected[name], files)):
            return Finding(what, False, f"{name}: {why}")
    more = f", {len(copied | {*surplus})} of them copied unchanged" if copied or surplus else ""
    return Finding(what, True, f"{len(on_disk)} tensors{more}")


def expected_shapes(
    model: PreTrainedModel, transforms: TransformConfig | None
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that a checkpoint must hold, by their names in the model;
    tied tensors count once.

    :param model: the compressed model, on the meta device
    :param transforms: rotations whose weights are stored
    """
    tensors = model.state_dict() | stored_transforms(transforms, model)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, module in model.named_modules():
        zeros = f"{name}.weight_zero_point"
        if zeros in shapes:  # packed along the rows, unlike those of a model on meta
            rows, groups = shapes[zeros]
            bits = module.quantization_scheme.weights.num_bits
            shapes[zeros] = (ceil(rows * bits / 32), groups)
    for tied in model.all_tied_weights_keys:
        shapes.pop(tied, None)
    return shapes


def _incomplete_experts(
    stacked: tuple[int, ...], files: Mapping[str, tuple[int, ...]]
) -> str | None:
    """Tell which experts a checkpoint lacks; None if it has all.

    :param stacked: shape of the weight that loading stacks them into, experts first
    :param files: shapes of the experts' tensors, by name on disk
    """
    numbers: dict[str, set[int]] = {}
    for name in files:
        if number := _EXPERT_NUMBER.search(name):
            kind = f"{name[: number.start()]}.*.{name[number.end() :]}"
            numbers.setdefault(kind, set()).add(int(number[1]))
    for kind, present in numbers.items():
        lost = sorted({*range(stacked[0])} - present)
        if lost:
            return f"{len(lost)} missing, first {kind.replace('*', str(lost[0]))}"
    return None


def _sizes(on_disk: Mapping[str, Header], plan: CompressionPlan | None) -> Finding:
    total = sum(
        tensor_bytes(header)
        for name, header in on_disk.items()
        if not name.endswith(_KV_CACHE_SCALES)
    )
    if plan is None:
        return Finding("bytes", None, f"{total:,} bytes of tensors; no {PLAN_NAME} to compare with")
    planned = plan.total_bytes
    if planned is None:
        return Finding("bytes", None, f"{total:,} bytes of tensors; the plan allocates no bits")
    detail = f"{total:,} on disk, {planned:,} planned"
    return Finding("bytes as planned", total == planned, detail)


def _codebooks(section: Section) -> str:
    """Return the number of codebook layers, and of those of each scheme."""
    counts = Counter(scheme.name for scheme in section.codebooks.values())
    schemes = ", ".join(f"{name}: {count}" for name, count in sorted(counts.items()))
    return f"{counts.total()} ({schemes})"


def _contents(folder: Path, record: Record) -> Finding:
    """Compare the data of all tensors with the checksums of the run."""
    if not record.checksums:
        return Finding("contents", None, f"no {PROBES_NAME} to compare with")
    stored = checksums(folder)
    changed = sorted(name for name, crc in record.checksums.items() if stored.get(name) != crc)
    if changed:
        detail = f"{len(changed)} tensors are not what was written, first {changed[0]}"
        return Finding("contents", False, detail)
    return Finding("contents", True, "all tensors are what was written")


def _kernels(quantization: dict, model: PreTrainedModel, section: Section) -> Finding:
    """Tell what vLLM on CUDA lacks for the widths, and how much it will compile.

    :param model: the compressed model, on the meta device
    """
    if not quantization.get("config_groups"):
        return Finding("kernels on vLLM CUDA", None, "no layer of integers")
    groups = QuantizationConfig.model_validate(quantization).config_groups.values()
    needs = Counter()
    for group in groups:
        needs[missing_kernel(group.weights)] += len(group.targets)
    extra = [package for package in needs if package]
    if not extra:
        return Finding("kernels on vLLM CUDA", True, "all in the box")
    count = sum(needs[package] for package in extra)
    detail = f"{count} of {needs.total()} targets need {', '.join(extra)}: pip install "
    detail += " ".join(extra)
    linears = {
        name: Linear(module.out_features, module.in_features, module.quantization_scheme.weights)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and hasattr(module, "quantization_scheme")
        and ".experts." not in name  # their kernels are of another kind
    }
    if matmuls := compiled_matmuls(linears, section):
        alone = compiled_matmuls(dense(linears, section), Section())
        detail += f"; kernels for {len(matmuls)} matmuls are compiled at the first start "
        detail += f"({len(alone)} at one width without factors)"
    return Finding("kernels on vLLM CUDA", None, detail)


def _served(architectures: list[str], quantization: dict) -> Finding:
    """Tell whether vLLM with this plugin runs the architecture."""
    if (why := refusal(architectures, quantization)) is not None:
        # a remark only: experts are most of a model, so such checkpoints are for transformers
        if why == quantized_experts(architectures, targets_of(quantization)):
            return Finding("vLLM", None, f"transformers only: {why}")
        return Finding("vLLM", False, why)
    untested = ", ".join(name for name in architectures if name not in TESTED)
    known = f"not tested with {untested}" if untested else "tested with this architecture"
    return Finding("vLLM", None, f"casp-plugin beside vLLM: {known}")


def _reload(folder: Path, record: Record, trust_remote_code: bool) -> list[Finding]:
    """Load the model, and compare its logits with those of the run that made it."""
    try:
        model = load_model(str(folder), trust_remote_code)
        measured, errors = probe(model, folder, trust_remote_code)
    except Exception as error:  # any error that a user would meet when loading
        return [Finding("reload", False, f"{type(error).__name__}: {error}")]
    expected = {logits.sample: logits for logits in record.probes}
    findings = []
    for sample, why in errors.items():  # a class that takes more than tokens failed in the run too
        worse = sample in expected or record == Record()
        findings.append(Finding("reload", False if worse else None, f"{sample}: {why}"))
    for logits in measured:
        finite = bool(np.isfinite(logits.logits).all())
        words = "finite logits" if finite else "logits hold NaN or infinity"
        findings.append(Finding("reload", finite, f"{words} for {logits.sample}"))
        if finite and logits.sample in expected:
            apart, limit = difference(logits, expected[logits.sample]), tolerance(logits)
            detail = f"{apart:.1e} apart for {logits.sample}, at most {limit:.0e}"
            findings.append(Finding("logits of the run", apart <= limit, detail))
    return findings
