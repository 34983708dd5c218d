"""transformers loads our checkpoints: ``import casp_plugin`` is all it takes.

The compressed-tensors quantizer and config of transformers are replaced by subclasses that
know the ``casp`` section, and transforms, which transformers 5.17 leaves out without a word. For
checkpoints without either they do nothing else.
"""

import re
from collections import Counter
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
from transformers import AutoConfig, PreTrainedModel
from transformers import CompressedTensorsConfig as _CompressedTensorsConfig
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
)
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.utils import cached_file

from casp_plugin.checkpoint import (
    RECIPE_NAME,
    SECTION,
    Section,
    read_section,
    save_with_plan,
)
from casp_plugin.expert_weights import read_each_expert
from casp_plugin.models import bare_model
from casp_plugin.modules import LowRankLinear
from casp_plugin.plan import PLAN_NAME, CompressionPlan
from casp_plugin.transforms import check_transforms, stored_transforms

__all__ = ["CaspHfQuantizer", "CompressedTensorsConfig", "bare_checkpoint", "register"]

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
        if self.section is None:
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
            super()._process_model_before_weight_loading(model, **kwargs)
        # transformers initializes what a checkpoint may lack, in SigLIP also `weight` of compressed
        # layers, which have none by that name
        for module in model.modules() if self.section is not None else ():
            if any(map(is_module_quantized, (module, *module.children()))):
                module._is_hf_initialized = True

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs):
        super()._process_model_after_weight_loading(model, **kwargs)
        rotate_inputs(model, self.transforms)
        if self.section is not None:
            plan, recipe = _beside(model, PLAN_NAME), _beside(model, RECIPE_NAME)
            save_with_plan(
                model,
                plan and CompressionPlan.load(plan),
                recipe and recipe.read_text(),
            )

    def get_state_dict_and_metadata(self, model: PreTrainedModel):
        """The compressed state, also where a forward pass has decompressed the weights."""
        if self.section is None:
            return super().get_state_dict_and_metadata(model)
        state = model.state_dict()
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


def bare_checkpoint(folder: Path | str) -> tuple[PreTrainedModel, TransformConfig | None]:
    """The model of a checkpoint folder without its weights, on the meta device, as loading builds
    it; and its rotations.

    :raises ValueError: if our section names layers that the model has not
    """
    config = AutoConfig.from_pretrained(folder)
    quantization = CompressedTensorsConfig.from_dict(config.quantization_config)
    del config.quantization_config
    model = bare_model(config)
    quantizer = CaspHfQuantizer(quantization, pre_quantized=True)
    quantizer.validate_environment()
    quantizer.preprocess_model(model)
    return model, quantizer.transforms


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
