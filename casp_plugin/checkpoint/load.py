"""Loading of our checkpoints by transformers; importing this module registers it.

Subclasses replace the compressed-tensors quantizer and config of transformers. They read the
``casp`` section, and transforms, which transformers 5.17 drops silently; other checkpoints load as
they do without them.
"""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
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
from transformers import PreTrainedModel
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
from casp_plugin.model.codebook_linear import CodebookLinear
from casp_plugin.model.expert_weights import STACKED, read_each_expert, reads_each_expert
from casp_plugin.model.low_rank_linear import LowRankLinear
from casp_plugin.model.transforms import check_transforms, stored_transforms
from casp_plugin.plan.plan import PLAN_NAME, CompressionPlan

__all__ = ["CaspHfQuantizer", "CompressedTensorsConfig", "drop_stand_ins"]

_QUANT_METHOD = "compressed-tensors"
#: the first version of compressed-tensors that packs all widths as a dense bit stream
_DENSE_PACKING = Version("0.19")


class CompressedTensorsConfig(_CompressedTensorsConfig):
    """transformers' config plus our section and transforms, which survive ``to_dict``.

    It bears the name of its base because transformers compares names where a user passes a
    config to ``from_pretrained``.

    :param casp: our section; None for checkpoints of others
    :param transform_config: rotations of inputs, which transformers itself drops
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

    def post_init(self) -> None:
        """Leave ``dequantize`` as it was asked for where all that is compressed are codebooks: to
        transformers that is a dense model."""
        coded = isinstance(self.casp, dict) and self.casp.get("codebooks")
        if self.quantization_config is not None or not coded:
            super().post_init()

    def to_dict(self) -> dict:
        """Return the config as it is saved."""
        transforms, self.transform_config = self.transform_config, None
        config = super().to_dict()
        self.transform_config = transforms
        if transforms is not None:
            config["transform_config"] = transforms.model_dump(mode="json")
        if self.casp is not None:
            config[SECTION] = self.casp
            if self.is_quantized:  # weights are saved compressed, also after a forward pass
                config["quantization_status"] = QuantizationStatus.COMPRESSED.value
        return config


class CaspHfQuantizer(CompressedTensorsHfQuantizer):
    """transformers' quantizer, which also puts factored layers in place before weights load, and
    rotations of inputs and the saving of our files after."""

    def __init__(self, quantization_config, **kwargs):
        super().__init__(quantization_config, **kwargs)
        # a user may pass transformers' own config, which has no such attribute
        self.section = getattr(quantization_config, SECTION, None)
        self.transforms = getattr(quantization_config, "transform_config", None)
        if self.transforms is not None:
            check_transforms(self.transforms)

    def validate_environment(self, *args, **kwargs):
        """Check that the installed compressed-tensors reads our packing.

        :raises ImportError: if it does not
        """
        super().validate_environment(*args, **kwargs)
        installed = version("compressed-tensors")
        if self.section is not None and Version(installed) < _DENSE_PACKING:
            raise ImportError(
                f"transformers needs compressed-tensors>={_DENSE_PACKING} to read this checkpoint, "
                f"found {installed}: pip install 'casp-plugin[compress]' in an environment of its "
                "own (vLLM reads it as it is)"
            )

    def update_weight_conversions(self, weight_conversions: list) -> list:
        """Return the conversions for experts that each have a scheme of their own; transformers
        itself takes all experts for quantized under one scheme. Dense experts load as always."""
        if self.compressor.quantization_config is None:  # nothing is quantized
            return weight_conversions
        updated = super().update_weight_conversions(weight_conversions)
        if self.section is None and not self._names_all_layers:
            return updated
        dense = [known for known in weight_conversions if known not in updated]
        return [*map(read_each_expert, updated), *dense]

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs):
        if self.section is not None:
            section = read_section({SECTION: self.section})
            install_factored_layers(model, section)
            install_codebook_layers(model, section)
        # rotations are made from the config once the weights are loaded
        ignored = {re.escape(name) for name in stored_transforms(self.transforms, model)}
        known = model._keys_to_ignore_on_load_unexpected or set()
        model._keys_to_ignore_on_load_unexpected = {*known, *ignored}
        if self.compressor.quantization_config is not None:
            with self._without_experts(model):
                super()._process_model_before_weight_loading(model, **kwargs)
        _stand_in_for_weights(model)
        tied, coded = getattr(model, "all_tied_weights_keys", {}), _coded(model)
        # quantized weights have codes of their own and are not tied
        model.all_tied_weights_keys = {
            name: source for name, source in tied.items() if not {name, source} & coded
        }

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs):
        drop_stand_ins(model)
        # experts that load dense are saved from their codes on disk, not converted back
        known = getattr(model, "_weight_conversions", None)
        if known is not None:
            model._weight_conversions = [
                conversion for conversion in known if not reads_each_expert(conversion)
            ]
        super()._process_model_after_weight_loading(model, **kwargs)
        rotate_inputs(model, self.transforms)
        if getattr(self.quantization_config, "dequantize", False):
            for module in model.modules():
                if isinstance(module, CodebookLinear):
                    module.weight  # noqa: B018, decodes it
        if self.section is not None:
            plan, recipe = _checkpoint_file(model, PLAN_NAME), _checkpoint_file(model, RECIPE_NAME)
            record = _checkpoint_file(model, PROBES_NAME)
            save_with_plan(
                model,
                plan and CompressionPlan.load(plan),
                recipe and recipe.read_text(),
                Record.load(record).probes if record else [],
                bool(self._quantized_experts(model)),
            )

    @property
    def _targets(self) -> set[str]:
        config = self.compressor.quantization_config
        groups = config.config_groups.values() if config is not None else ()
        return {target for group in groups for target in group.targets}

    @property
    def _names_all_layers(self) -> bool:
        """Tell whether the config names layers one by one, as our and folded checkpoints do."""
        return all("." in name and not name.startswith("re:") for name in self._targets)

    @property
    def _expert_targets(self) -> set[str]:
        """Return the layers of experts that the config names one by one."""
        return {name for name in self._targets if re.search(r"^(?!re:).*\.experts\.\d+\.", name)}

    @contextmanager
    def _without_experts(self, model: PreTrainedModel) -> Iterator[None]:
        """Take the experts out of the config for a while: in memory they are stacked weights, and
        compressed-tensors would warn of every one that it finds no such layer."""
        config = self.compressor.quantization_config
        known = {name for name, _ in model.named_modules()}
        groups = {}
        for name, group in config.config_groups.items():
            gone = self._expert_targets - known
            kept = [target for target in group.targets if target not in gone]
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
        """Return the stacked weights, dense in memory, of experts that are quantized on disk."""
        known, stacked = model.state_dict(), set()
        for target in self._expert_targets:
            experts, _, layer = target.rpartition(".experts.")
            leaf = layer.partition(".")[2]
            stacked |= {f"{experts}.experts.{name}" for name in STACKED if leaf in STACKED[name]}
        return stacked & known.keys()

    def get_state_dict_and_metadata(self, model: PreTrainedModel):
        """Return the compressed state, also where a forward pass has decompressed the weights."""
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


def install_factored_layers(model: torch.nn.Module, section: Section) -> None:
    """Replace linear layers by empty factored ones.

    :param model: the dense model, usually on the meta device
    :param section: ranks of the factored layers
    :raises ValueError: if a layer is missing or too small for its rank
    """
    where = f"quantization_config.{SECTION}.low_rank"
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    for name in section.ranks:
        if name not in linears:
            raise ValueError(f"{where}: no linear layer {name!r}")
    rows = Counter()  # of all layers that share a latent, by its owner
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


def install_codebook_layers(model: torch.nn.Module, section: Section) -> None:
    """Replace linear layers by empty codebook layers.

    :param model: the model with its factored layers, usually on the meta device
    :param section: schemes of the codebook layers
    :raises ValueError: if a layer is missing, or cannot be coded so
    """
    where = f"quantization_config.{SECTION}.codebooks"
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    for name, scheme in section.codebooks.items():
        if name not in linears:
            raise ValueError(f"{where}: no linear layer {name!r}")
        linear = linears[name]
        try:
            scheme.check(name, (linear.out_features, linear.in_features))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        model.set_submodule(name, CodebookLinear.like(linear, scheme))


def _stand_in_for_weights(model: torch.nn.Module) -> None:
    """Give compressed and factored layers the ``weight`` and ``bias`` that a model's
    ``_init_weights`` asks for: empty tensors that count as loaded, outside of the state dict."""
    for module in model.modules():
        if isinstance(module, LowRankLinear):
            vars(module)["bias"] = module.up.bias
        if isinstance(module, torch.nn.Linear | LowRankLinear | CodebookLinear):
            shape = module.out_features, module.in_features
        elif isinstance(module, torch.nn.Embedding):
            shape = module.num_embeddings, module.embedding_dim
        else:
            continue
        # what a model writes into a decoded weight would stay there
        if isinstance(module, CodebookLinear) or not hasattr(module, "weight"):
            stand_in = torch.empty(shape, device="meta")
            stand_in._is_hf_initialized = True
            vars(module)["weight"] = stand_in


def _coded(model: torch.nn.Module) -> set[str]:
    """Return the names of the weights that a compressed model has codes for."""
    modules = model.named_modules()
    return {f"{name}.weight" for name, module in modules if "weight" in vars(module)}


def drop_stand_ins(model: torch.nn.Module) -> None:
    """Remove the empty weights and biases that stood in while a compressed model was built."""
    for module in model.modules():
        if isinstance(
            module, torch.nn.Linear | torch.nn.Embedding | LowRankLinear | CodebookLinear
        ):
            vars(module).pop("weight", None)
        if isinstance(module, LowRankLinear):
            vars(module).pop("bias", None)


def rotate_inputs(model: torch.nn.Module, transforms: TransformConfig | None) -> None:
    """Put in place the rotations of inputs; those of weights are in the stored weights."""
    if transforms is None:
        return
    online = transforms.model_copy(deep=True)
    for scheme in online.config_groups.values():
        scheme.apply = [args for args in scheme.apply if args.is_online()]
    apply_transform_config(model, online)
    setattr(model, TRANSFORM_CONFIG_NAME, transforms)  # for saving


def _checkpoint_file(model: PreTrainedModel, name: str) -> Path | None:
    """Return a file of the checkpoint that a model came from, local or on the hub; None if the
    checkpoint has none of this name."""
    path = cached_file(
        model.name_or_path,
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if path is None else Path(path)


# the Auto classes of transformers use them for compressed-tensors
AUTO_QUANTIZER_MAPPING[_QUANT_METHOD] = CaspHfQuantizer
AUTO_QUANTIZATION_CONFIG_MAPPING[_QUANT_METHOD] = CompressedTensorsConfig
