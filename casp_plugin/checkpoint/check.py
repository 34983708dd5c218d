"""Does a checkpoint hold what it should, and does it come back?"""

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
from transformers import PreTrainedModel

from casp_plugin.checkpoint.format import read_config, read_section
from casp_plugin.checkpoint.load import BareCheckpoint, bare_checkpoint
from casp_plugin.checkpoint.probe import PROBES_NAME, Record, difference, probe, tolerance
from casp_plugin.checkpoint.vllm_support import TESTED, quantized_experts, refusal, targets_of
from casp_plugin.model.load import load_model
from casp_plugin.model.schemes import missing_kernel
from casp_plugin.model.transforms import stored_transforms
from casp_plugin.model.weights import Header, checksums, read_headers, tensor_bytes
from casp_plugin.plan.plan import PLAN_NAME, CompressionPlan
from casp_plugin.system.messages import one_line

__all__ = ["Finding", "check", "compare_tensors", "expected_shapes"]

_EXPERT = re.compile(r"\.(\d+)\.(?=[^.]*\.[^.]*$)")

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


def check(
    folder: Path | str, reload: bool = True, trust_remote_code: bool = False
) -> list[Finding]:
    """Look at a checkpoint folder: section, tensors, sizes, kernels, reload, vLLM.

    :param folder: checkpoint folder
    :param reload: also load the model, and hold what it says against what it said in the run that
        made it
    :param trust_remote_code: whether Python code that comes with the model may run
    :return: findings, in order; the checkpoint is sound if none has ``passed`` False
    :raises ValueError: if the folder is no checkpoint at all
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
    findings = [
        Finding("low-rank layers", None, f"{len(read_section(quantization).ranks)}"),
        tensors,
        _sizes(on_disk, plan),
        _kernels(quantization),
    ]
    sound = all(finding.passed is not False for finding in findings)
    findings.append(_contents(folder, record))
    if reload and sound:
        findings += _reload(folder, record, trust_remote_code)
    return findings + last


def compare_tensors(
    on_disk: Mapping[str, Header], bare: BareCheckpoint, plan: CompressionPlan | None
) -> Finding:
    """Hold the tensors of a checkpoint against what its config promises, name by name.

    :param on_disk: headers by name on disk
    :param bare: what the config promises
    :param plan: which says what is copied unchanged; None where there is none
    """
    what = "tensor names and shapes"
    expected, merged = expected_shapes(bare.model, bare.transforms), {}
    names, parted = bare.names_in_memory(on_disk), bare.parted_in_memory(on_disk)
    parts = Counter(names.values())
    found: dict[str, tuple[int, ...]] = {}
    for name, (shape, _) in on_disk.items():
        in_memory = names[name]
        if in_memory in parted:
            continue
        if parts[in_memory] > 1 or ("experts" in in_memory and in_memory != name):
            merged.setdefault(in_memory, {})[name] = shape
        else:
            found[in_memory] = shape
    copied = {names.get(each.name, each.name) for each in plan.copied} if plan else set()
    lost = [each.name for each in plan.copied if each.name not in on_disk] if plan else []
    unknown = [name for name in merged if name not in expected]
    missing = sorted(expected.keys() - found.keys() - merged.keys() - parted) + sorted(lost)
    # weights that a config ties are there where they differ, and are not tied then
    tied = bare.model.all_tied_weights_keys.keys()
    surplus = sorted((found.keys() | {*unknown}) - expected.keys() - copied - tied)
    wrong = [name for name in expected.keys() & found.keys() if expected[name] != found[name]]
    if missing:
        return Finding(what, False, f"{len(missing)} missing, first {missing[0]}")
    if surplus and plan is not None:
        return Finding(what, False, f"{len(surplus)} unexpected, first {surplus[0]}")
    if wrong:
        name = min(wrong)
        detail = f"{len(wrong)} of the wrong shape, first {name}: {found[name]} on disk, "
        return Finding(what, False, f"{detail}{expected[name]} expected")
    for name, files in merged.items():
        if name in expected and (why := _incomplete_experts(expected[name], files)):
            return Finding(what, False, f"{name}: {why}")
    more = f", {len(copied | {*surplus})} of them copied unchanged" if copied or surplus else ""
    return Finding(what, True, f"{len(on_disk)} tensors{more}")


def expected_shapes(
    model: PreTrainedModel, transforms: TransformConfig | None
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that a checkpoint must hold, by the names that the model has
    for them; tied ones once.

    :param model: compressed, on the meta device
    :param transforms: rotations whose weights are stored
    """
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
    return shapes


def _incomplete_experts(
    stacked: tuple[int, ...], files: Mapping[str, tuple[int, ...]]
) -> str | None:
    """What is wrong with the tensors that loading stacks into one; None for nothing.

    :param stacked: shape of that, the number of experts first
    :param files: shapes by name on disk
    """
    numbers: dict[str, set[int]] = {}
    for name in files:
        if number := _EXPERT.search(name):
            kind = f"{name[: number.start()]}.*.{name[number.end() :]}"
            numbers.setdefault(kind, set()).add(int(number[1]))
    for kind, found in numbers.items():
        lost = sorted({*range(stacked[0])} - found)
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


def _contents(folder: Path, record: Record) -> Finding:
    """Whether the data of all tensors is what was written."""
    if not record.checksums:
        return Finding("contents", None, f"no {PROBES_NAME} to compare with")
    found = checksums(folder)
    changed = sorted(n for n, each in record.checksums.items() if found.get(n) != each)
    if changed:
        detail = f"{len(changed)} tensors are not what was written, first {changed[0]}"
        return Finding("contents", False, detail)
    return Finding("contents", True, "all tensors are what was written")


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
    """Tell whether vLLM with this plugin runs the architecture."""
    if (why := refusal(architectures, quantization)) is not None:
        # most of the model, and no way out
        if why == quantized_experts(architectures, targets_of(quantization)):
            return Finding("vLLM", None, f"transformers only: {why}")
        return Finding("vLLM", False, why)
    untested = ", ".join(name for name in architectures if name not in TESTED)
    known = f"not tested with {untested}" if untested else "tested with this architecture"
    return Finding("vLLM", None, f"casp-plugin beside vLLM: {known}")


def _reload(folder: Path, record: Record, trust_remote_code: bool) -> list[Finding]:
    """Load the model and ask it what it was asked in the run."""
    try:
        model = load_model(str(folder), trust_remote_code)
        said, errors = probe(model, folder, trust_remote_code)
    except Exception as error:  # whatever a user would meet when loading
        return [Finding("reload", False, f"{type(error).__name__}: {error}")]
    expected = {each.sample: each for each in record.probes}
    found = []
    for sample, why in errors.items():  # a class may want more than tokens, and did so in the run
        worse = sample in expected or record == Record()
        found.append(Finding("reload", False if worse else None, f"{sample}: {why}"))
    for one in said:
        finite = bool(np.isfinite(one.logits).all())
        words = "finite logits" if finite else "logits hold NaN or infinity"
        found.append(Finding("reload", finite, f"{words} for {one.sample}"))
        if finite and one.sample in expected:
            apart, limit = difference(one, expected[one.sample]), tolerance(one)
            detail = f"{apart:.1e} apart for {one.sample}, at most {limit:.0e}"
            found.append(Finding("logits of the run", apart <= limit, detail))
    return found
