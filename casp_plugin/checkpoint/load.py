"""transformers loads our checkpoints: ``import casp_plugin`` is all it takes.

The compressed-tensors quantizer and config of transformers are replaced by subclasses that
know the ``casp`` section, and transforms, which transformers 5.17 leaves out without a word. For
checkpoints without either they do nothing else.
"""

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from compressed_tensors import TRANSFORM_CONFIG_NAME
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationStatus
from compressed_tensors.quantization.utils import is_module_quantized
from compressed_tensors.transform import TransformConfig, apply_transform_config
from compressed_tensors.utils import get_direct_state_dict
from packaging.version import Version
from transformers import CompressedTensorsConfig as _CompressedTensorsConfig
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
)
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.utils import cached_file

from casp_plugin.checkpoint.format import (
    RECIPE_NAME,
    SECTION,
    Section,
    read_section,
    save_with_plan,
)
from casp_plugin.checkpoint.probe import PROBES_NAME, Record
from casp_plugin.model.expert_weights import STACKED, read_each_expert, reads_each_expert
from casp_plugin.model.load import (
    bare_model,
    names_in_memory,
    parted_in_memory,
    read_model_config,
)
from casp_plugin.model.low_rank_linear import LowRankLinear
from casp_plugin.model.transforms import check_transforms, stored_transforms
from casp_plugin.plan.plan import PLAN_NAME, CompressionPlan

__all__ = [
    "BareCheckpoint",
    "CaspHfQuantizer",
    "CompressedTensorsConfig",
    "bare_checkpoint",
    "bare_from_config",
    "register",
]

_METHOD = "compressed-tensors"
#: the first version that packs all widths as a dense bit stream
_PACKING = Version("0.19")


class CompressedTensorsConfig(_CompressedTensorsConfig):
    """transformers' config plus our section, which survives ``to_dict``.

    It bears the name of its base because transformers compares names where a user passes a
    config of their own to ``from_pretrained``.

    :param casp: the section, None for checkpoints that are not ours
    :param transform_config: rotations of inputs, which transformers itself leaves out
    """

    def __init__(
        self,
        *args,
        casp: dict | None = None,
        transform_config: dict | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.casp = casp
        self.transform_config = None
        if transform_config:
            self.transform_config = TransformConfig.model_validate(transform_config)

    def to_dict(self) -> dict:
        transforms, self.transform_config = self.transform_config, None
        config = super().to_dict()
        self.transform_config = transforms
        if transforms is not None:
            config["transform_config"] = transforms.model_dump(mode="json")
        if self.casp is not None:
            config[SECTION] = self.casp
            if self.is_quantized:  # what is saved is compressed, also after a forward pass
                config["quantization_status"] = QuantizationStatus.COMPRESSED.value
        return config


class CaspHfQuantizer(CompressedTensorsHfQuantizer):
    """Puts the factored layers in place before the weights load."""

    def __init__(self, quantization_config, **kwargs):
        super().__init__(quantization_config, **kwargs)
        # a user may pass transformers' own config, which has no such attribute
        self.section = getattr(quantization_config, SECTION, None)
        self.transforms = getattr(quantization_config, "transform_config", None)
        if self.transforms is not None:
            check_transforms(self.transforms)

    def validate_environment(self, *args, **kwargs):
        super().validate_environment(*args, **kwargs)
        installed = version("compressed-tensors")
        if self.section is not None and Version(installed) < _PACKING:
            raise ImportError(
                f"transformers needs compressed-tensors>={_PACKING} to read this checkpoint, "
                f"found {installed}: pip install 'casp-plugin[compress]' in an environment of its "
                "own (vLLM reads it as it is)"
            )

    def update_weight_conversions(self, weight_conversions: list) -> list:
        """transformers takes all experts for quantized, under one scheme; ours have one each, and
        dense ones load as they always do."""
        if self.compressor.quantization_config is None:  # nothing is
            return weight_conversions
        updated = super().update_weight_conversions(weight_conversions)
        if self.section is None and not self._names_all_layers:
            return updated
        dense = [known for known in weight_conversions if known not in updated]
        return [*map(read_each_expert, updated), *dense]

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs):
        if self.section is not None:
            install_factored_layers(model, read_section({SECTION: self.section}))
        # made again from the config below
        ignored = {re.escape(name) for name in stored_transforms(self.transforms, model)}
        known = model._keys_to_ignore_on_load_unexpected or set()
        model._keys_to_ignore_on_load_unexpected = {*known, *ignored}
        if self.compressor.quantization_config is not None:
            with self._without_experts(model):
                super()._process_model_before_weight_loading(model, **kwargs)
        _stand_in_for_weights(model)
        tied, coded = getattr(model, "all_tied_weights_keys", {}), _coded(model)
        model.all_tied_weights_keys = {  # each has codes of its own
            one: other for one, other in tied.items() if not {one, other} & coded
        }

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs):
        _drop_stand_ins(model)
        # nothing turns dense experts into codes again: they are saved as they are on disk
        known = getattr(model, "_weight_conversions", None)
        if known is not None:
            model._weight_conversions = [each for each in known if not reads_each_expert(each)]
        super()._process_model_after_weight_loading(model, **kwargs)
        rotate_inputs(model, self.transforms)
        if self.section is not None:
            plan, recipe = _beside(model, PLAN_NAME), _beside(model, RECIPE_NAME)
            said = _beside(model, PROBES_NAME)
            save_with_plan(
                model,
                plan and CompressionPlan.load(plan),
                recipe and recipe.read_text(),
                Record.load(said).probes if said else [],
                bool(self._quantized_experts(model)),
            )

    @property
    def _targets(self) -> set[str]:
        config = self.compressor.quantization_config
        groups = config.config_groups.values() if config is not None else ()
        return {target for group in groups for target in group.targets}

    @property
    def _names_all_layers(self) -> bool:
        """Whether the config names the layers one by one, as ours and folded ones do."""
        return all("." in each and not each.startswith("re:") for each in self._targets)

    @property
    def _expert_targets(self) -> set[str]:
        """Layers of experts that the config names, one by one."""
        return {each for each in self._targets if re.search(r"^(?!re:).*\.experts\.\d+\.", each)}

    @contextmanager
    def _without_experts(self, model: PreTrainedModel) -> Iterator[None]:
        """The config without targets that are stacked weights in memory, of each of which
        compressed-tensors would say that it finds no layer."""
        config = self.compressor.quantization_config
        known = {name for name, _ in model.named_modules()}
        groups = {}
        for name, group in config.config_groups.items():
            gone = self._expert_targets - known
            kept = [each for each in group.targets if each not in gone]
            if len(kept) == len(group.targets):
                groups[name] = group
            elif kept:
                groups[name] = group.model_copy(update={"targets": kept})
        self.compressor.quantization_config = config.model_copy(update={"config_groups": groups})
        try:
            yield
        finally:
            self.compressor.quantization_config = config

    def _quantized_experts(self, model: PreTrainedModel) -> set[str]:
        """Stacked weights, dense in memory, of experts that are quantized on disk."""
        known, found = model.state_dict(), set()
        for target in self._expert_targets:
            experts, _, layer = target.rpartition(".experts.")
            leaf = layer.partition(".")[2]
            found |= {f"{experts}.experts.{name}" for name in STACKED if leaf in STACKED[name]}
        return found & known.keys()

    def get_state_dict_and_metadata(self, model: PreTrainedModel):
        """The compressed state, also where a forward pass has decompressed the weights."""
        if self.section is None:
            return super().get_state_dict_and_metadata(model)
        state = model.state_dict()
        for name in self._quantized_experts(model):
            del state[name]
        for name, module in model.named_modules():
            if (
                is_module_quantized(module)
                and module.quantization_status == QuantizationStatus.DECOMPRESSED
            ):
                scheme = module.quantization_scheme
                compressor = BaseCompressor.get_value_from_registry(scheme.format.value)
                local = {k: v for k, v in get_direct_state_dict(module).items() if v is not None}
                for key in local:
                    del state[f"{name}.{key}"]
                for key, value in compressor.compress(local, scheme).items():
                    state[f"{name}.{key}"] = value
        return state, {}


@dataclass(frozen=True)
class BareCheckpoint:
    """The model of a checkpoint without its weights, as loading builds it.

    :param model: on the meta device
    :param quantizer: that would load it
    """

    model: PreTrainedModel
    quantizer: CaspHfQuantizer

    @property
    def transforms(self) -> TransformConfig | None:
        """Rotations of inputs."""
        return self.quantizer.transforms

    def names_in_memory(self, names: Iterable[str]) -> dict[str, str]:
        """Return what tensors are called once they are loaded, by their name on disk; all that
        merges into the stacked weights of experts has one name."""
        return names_in_memory(names, self.model, self.quantizer)

    def parted_in_memory(self, names: Iterable[str]) -> set[str]:
        """Return the tensors of the model that loading cuts out of larger ones (q, k and v of one
        matrix).

        :param names: of tensors on disk
        """
        return parted_in_memory(names, self.model, self.quantizer)


def bare_checkpoint(folder: Path | str, trust_remote_code: bool = False) -> BareCheckpoint:
    """Return the model of a checkpoint folder without its weights.

    :param trust_remote_code: whether Python code that comes with the model may run
    :raises ValueError: if our section names layers that the model has not, or the class that
        ``architectures`` names is neither a causal language nor an image-text model
    """
    return bare_from_config(read_model_config(folder, trust_remote_code), trust_remote_code)


def bare_from_config(config: PreTrainedConfig, trust_remote_code: bool = False) -> BareCheckpoint:
    """Return the model that a config with a ``quantization_config`` promises, without weights; the
    config is used up.

    :raises ValueError: as ``bare_checkpoint``
    """
    quantization = CompressedTensorsConfig.from_dict(config.quantization_config)
    del config.quantization_config
    model = bare_model(config, trust_remote_code)
    quantizer = CaspHfQuantizer(quantization, pre_quantized=True)
    quantizer.validate_environment()
    with redirect_stderr(io.StringIO()):  # progress bars of what takes no time
        quantizer.preprocess_model(model)
    _drop_stand_ins(model)
    return BareCheckpoint(model, quantizer)


def install_factored_layers(model: torch.nn.Module, section: Section) -> None:
    """Replace linears by empty factored ones.

    :param model: the dense model, usually on the meta device
    :param section: which layers are factored
    :raises ValueError: if a layer is missing or too small for its rank
    """
    where = f"quantization_config.{SECTION}.low_rank"
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    for name in section.ranks:
        if name not in linears:
            raise ValueError(f"{where}: no linear layer {name!r}")
    rows = Counter()  # of all that share a latent
    for name in section.ranks:
        rows[section.latent_of.get(name, name)] += linears[name].out_features
    # owners of a latent come before the layers that share it
    for name in sorted(section.ranks, key=section.latent_of.__contains__):
        linear, rank, owner = linears[name], section.ranks[name], section.latent_of.get(name)
        limit = min(rows[owner or name], linear.in_features)
        if rank > limit:
            raise ValueError(f"{where}: rank of {name} must lie in [1, {limit}], got {rank}")
        owner = None if owner is None else model.get_submodule(owner)
        model.set_submodule(name, LowRankLinear.like(linear, rank, owner))


def _stand_in_for_weights(model: torch.nn.Module) -> None:
    """Let ``_init_weights`` of a family meet the ``weight`` and ``bias`` that it asks of its
    layers, which compressed and factored ones lack: some that count as loaded, outside the state.
    """
    for module in model.modules():
        if isinstance(module, LowRankLinear):
            vars(module)["bias"] = module.up.bias
        if isinstance(module, torch.nn.Linear | LowRankLinear):
            shape = module.out_features, module.in_features
        elif isinstance(module, torch.nn.Embedding):
            shape = module.num_embeddings, module.embedding_dim
        else:
            continue
        if not hasattr(module, "weight"):
            stand_in = torch.empty(shape, device="meta")
            stand_in._is_hf_initialized = True
            vars(module)["weight"] = stand_in


def _coded(model: torch.nn.Module) -> set[str]:
    """Names of the weights that a compressed model has codes for."""
    modules = model.named_modules()
    return {f"{name}.weight" for name, module in modules if "weight" in vars(module)}


def _drop_stand_ins(model: torch.nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding | LowRankLinear):
            vars(module).pop("weight", None)
        if isinstance(module, LowRankLinear):
            vars(module).pop("bias", None)


def rotate_inputs(model: torch.nn.Module, transforms: TransformConfig | None) -> None:
    """Put in place the transforms of a checkpoint that run each time; its weights are rotated."""
    if transforms is None:
        return
    online = transforms.model_copy(deep=True)
    for scheme in online.config_groups.values():
        scheme.apply = [args for args in scheme.apply if args.is_online()]
    apply_transform_config(model, online)
    setattr(model, TRANSFORM_CONFIG_NAME, transforms)  # what is saved again


def register() -> None:
    """Let transformers' Auto classes use the classes above for compressed-tensors."""
    AUTO_QUANTIZER_MAPPING[_METHOD] = CaspHfQuantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING[_METHOD] = CompressedTensorsConfig


def _beside(model: PreTrainedModel, name: str) -> Path | None:
    """A file stored beside the checkpoint that a model came from, local or on the hub."""
    path = cached_file(
        model.name_or_path,
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if path is None else Path(path)
