"""Folding of low-rank layers into dense ones, so that stock transformers and vLLM load them."""

import shutil
from collections import Counter
from collections.abc import Mapping, Set
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.utils import match_name
from huggingface_hub import save_torch_state_dict
from llmcompressor.observers.helpers import FUSED_LAYER_NAMES
from loguru import logger
from safetensors import safe_open

from casp_plugin.checkpoint.bare import bare_checkpoint
from casp_plugin.checkpoint.format import SECTION, Section, read_config, read_section, write_config
from casp_plugin.checkpoint.probe import PROBES_NAME
from casp_plugin.model.codebook_schemes import SCALE
from casp_plugin.model.weights import INDEX, weight_files
from casp_plugin.plan.plan import PLAN_NAME, CompressionPlan
from casp_plugin.system.files import whole_folder

__all__ = ["fold"]


class _Tensors(Mapping):
    """Tensors of a checkpoint folder, read from its shards one at a time, by their names in the
    loaded model; tensors that loading merges (experts) by their names on disk."""

    def __init__(self, folder: Path, trust_remote_code: bool):
        shards = {}
        for path in weight_files(folder):
            shard = safe_open(path, framework="pt")
            shards |= dict.fromkeys(shard.keys(), shard)
        names = bare_checkpoint(folder, trust_remote_code).names_in_memory(shards)
        sources = Counter(names.values())  # tensors on disk, by the name that they load into
        #: name in memory -> name on disk
        self.on_disk = {
            in_memory if sources[in_memory] == 1 else name: name
            for name, in_memory in names.items()
        }
        self._shards = shards

    def __getitem__(self, name: str) -> torch.Tensor:
        stored = self.on_disk[name]
        return self._shards[stored].get_tensor(stored)

    def __iter__(self):
        return iter(self.on_disk)

    def __len__(self) -> int:
        return len(self.on_disk)

    def layer_on_disk(self, layer: str) -> str:
        """Return the name of a layer on disk."""
        tensor = next(name for name in self if name.startswith(f"{layer}."))
        return self.on_disk[tensor].removesuffix(tensor.removeprefix(layer))


#: files that describe the checkpoint with factors; the last two are of `casp report`
_NOT_COPIED = {"config.json", PLAN_NAME, PROBES_NAME, INDEX, "README.md", "report.html"}


def fold(source: Path | str, target: Path | str, trust_remote_code: bool = False) -> list[str]:
    """Write a copy of a checkpoint in which every factored layer is one dense weight again.

    Layers that stock vLLM fuses with a factored layer (v with q and k) become dense too, because
    a fused layer cannot mix quantized and dense weights, and so do layers that vLLM fuses but that
    have unequal schemes (granularity ``matrix``). All others keep their bits.

    :param source: checkpoint folder
    :param target: folder to write; must not exist
    :param trust_remote_code: whether Python code that comes with the model may run
    :return: names of the layers that became dense
    :raises ValueError: if there is nothing to fold, or the target exists
    """
    source, target = Path(source), Path(target)
    config = read_config(source)
    quantization = config.get("quantization_config") or {}
    section = read_section(quantization)
    if not quantization:
        raise ValueError(f"{source} is not quantized: config.json has no quantization_config")
    if target.exists():
        raise ValueError(f"{target} exists already: name a new folder")
    if quantization.get("transform_config"):
        raise ValueError(
            f"{source} rotates the inputs of its layers, which stock transformers does not run: "
            "serve it with this plugin"
        )
    groups = quantization.get("config_groups") or {}
    if any(".experts." in target for group in groups.values() for target in group["targets"]):
        logger.warning(
            "stock transformers reads experts under one scheme and without zero points: the copy "
            "takes import casp_plugin too"
        )
    tensors = _Tensors(source, trust_remote_code)
    schemes = _Schemes(quantization, section)
    dense = sorted(section.layers | _cannot_fuse(section.layers, tensors, schemes))
    if not dense:
        raise ValueError(
            f"{source} holds no low-rank layers, no codebooks and no unequal schemes in fused "
            "layers: nothing to fold"
        )

    copied = _copied(source)
    state = {}
    for name in tensors:
        under = any(name.startswith(f"{layer}.") for layer in dense)
        if not under or tensors.on_disk[name] in copied:
            state[tensors.on_disk[name]] = tensors[name]
    for layer in dense:
        latent = section.latent_of.get(layer, layer) if layer in section.ranks else None
        stored = tensors.layer_on_disk(layer)
        for name, tensor in _dense_layer(layer, latent, tensors, schemes).items():
            state[f"{stored}.{name}"] = tensor

    with whole_folder(target) as partial:
        save_torch_state_dict(state, str(partial), metadata={"format": "pt"})
        for path in source.iterdir():
            if ".safetensors" not in path.name and path.name not in _NOT_COPIED:
                copy = shutil.copytree if path.is_dir() else shutil.copy2
                copy(path, partial / path.name)
        config["quantization_config"] = schemes.without(dense)
        if config["quantization_config"] is None:
            del config["quantization_config"]
        write_config(partial, config)
    return dense


def _copied(source: Path) -> set[str]:
    """Return the names on disk of the tensors that the model's class does not build."""
    if not (source / PLAN_NAME).exists():
        return set()
    return {tensor.name for tensor in CompressionPlan.load(source).copied}


def _cannot_fuse(folded: Set[str], tensors: Mapping, schemes: "_Schemes") -> set[str]:
    """Return the quantized layers that stock vLLM would fuse with a folded layer, or with layers of
    another scheme."""
    packed = ".weight_packed"  # experts share one width, and have names of their own on disk
    names = (name for name in tensors if name.endswith(packed) and ".experts." not in name)
    quantized = {name.removesuffix(packed) for name in names}
    unfusable = set()
    for layer in quantized | folded:
        parent, _, leaf = layer.rpartition(".")
        for group in FUSED_LAYER_NAMES:
            if leaf not in group:
                continue
            members = {f"{parent}.{other}" for other in group} & quantized
            kinds = {str(schemes.scheme(member)) for member in members}
            if layer in folded or len(kinds) > 1:
                unfusable |= members
    return unfusable


def _dense_layer(
    layer: str, latent: str | None, tensors: Mapping, schemes: "_Schemes"
) -> dict[str, torch.Tensor]:
    """Return ``weight`` and ``bias`` of one layer, dequantized, factors multiplied in float32.

    :param latent: the factored layer that holds its ``down``; None for a dense layer
    """
    if latent is not None:
        up = schemes.weight(f"{layer}.up", tensors)  # (out, rank)
        down = schemes.weight(f"{latent}.down", tensors)  # (rank, in)
        state = {"weight": (up.float() @ down.float()).to(up.dtype)}
        bias = f"{layer}.up.bias"
    else:
        state = {"weight": schemes.weight(layer, tensors)}
        bias = f"{layer}.bias"
    if bias in tensors:
        state["bias"] = tensors[bias]
    return state


class _Schemes:
    """The quantization config of a checkpoint, looked up by module name."""

    def __init__(self, quantization: dict, section: Section):
        self._codebooks = section.codebooks
        self._dict = {"config_groups": {}, **quantization}  # no groups if nothing is quantized
        self._config = QuantizationConfig.model_validate(self._dict)

    def scheme(self, module: str) -> QuantizationScheme:
        """Return the scheme of a module; targets by name come before those by class.

        :raises ValueError: if there is none
        """
        for by_class in (False, True):
            for scheme in self._config.config_groups.values():
                for target in scheme.targets:
                    if target == "Linear" if by_class else match_name(module, target):
                        return scheme
        raise ValueError(f"config_groups hold no scheme for {module}")

    def weight(self, module: str, tensors: Mapping) -> torch.Tensor:
        """Return the weight of a module, dequantized where it is quantized, (out, in)."""
        if module in self._codebooks:
            prefix = f"{module}.weight_"
            names = [name for name in tensors if name.startswith(prefix)]
            stored = {name.removeprefix(f"{module}."): tensors[name] for name in names}
            scheme = self._codebooks[module]
            missing = scheme.layout(scheme.tile, torch.float32).keys() - stored.keys()
            if missing:
                raise ValueError(f"the checkpoint lacks {module}.{min(missing)}")
            return scheme.decode(stored).to(stored[SCALE].dtype)
        if f"{module}.weight_packed" not in tensors:
            return tensors[f"{module}.weight"]
        scheme = self.scheme(module)
        prefix = f"{module}.weight_"
        local = {n.removeprefix(f"{module}."): tensors[n] for n in tensors if n.startswith(prefix)}
        compressor = BaseCompressor.get_value_from_registry(scheme.format or self._dict["format"])
        return compressor.decompress(local, scheme)["weight"]

    def without(self, layers: list[str]) -> dict | None:
        """Return the config without these layers and without our section; None if that is empty."""
        gone = {f"{layer}{suffix}" for layer in layers for suffix in ("", ".down", ".up")}
        groups = {}
        for name, group in self._dict["config_groups"].items():
            targets = [target for target in group["targets"] if target not in gone]
            if targets:
                groups[name] = {**group, "targets": targets}
        if not groups:
            return None
        kept = {k: v for k, v in self._dict.items() if k != SECTION}
        ignore = [name for name in kept.get("ignore") or [] if name not in gone]
        return {**kept, "config_groups": groups, "ignore": ignore + layers}
