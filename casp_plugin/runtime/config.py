"""vLLM's compressed-tensors config, for checkpoints with a ``casp`` section."""

import re
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import ColumnParallelLinear, LinearBase
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsScheme,
    CompressedTensorsWNA16,
)
from vllm.model_executor.models.utils import WeightsMapper

from casp_plugin.checkpoint.format import SECTION, read_section
from casp_plugin.checkpoint.vllm_support import refusal
from casp_plugin.model.codebook_schemes import CodebookScheme
from casp_plugin.model.transforms import check_transforms, input_block
from casp_plugin.runtime.kernels import WNA16
from casp_plugin.runtime.split import Shard, SplitLinearMethod, can_join
from casp_plugin.runtime.warm_up import WarmUp

__all__ = ["METHOD", "CaspConfig"]

#: name of the quantization method in vLLM; checkpoints say ``compressed-tensors``
METHOD = "casp"
#: members of fused layers in models that do not list them
_QKV = ["q_proj", "k_proj", "v_proj"]
_FUSED = {"qkv_proj": _QKV, "qkv": _QKV, "gate_up_proj": ["gate_proj", "up_proj"]}


class CaspConfig(CompressedTensorsConfig):
    """compressed-tensors plus factored layers and unequal schemes inside fused layers."""

    #: rank of every factored layer, by the layer's name in vLLM
    low_rank: dict[str, int]
    #: owner of the down factor of every layer that shares one, both by their names in vLLM
    latent_of: dict[str, str]
    #: scheme of every codebook layer, a factor or a dense layer, by the layer's name in vLLM
    codebooks: dict[str, CodebookScheme]
    #: methods of codebook layers that are parts of a layer in the making, by name
    codebook_methods: dict[str, QuantizeMethodBase]
    #: layers of the section, by their names in vLLM, and those that the model has asked for
    required: set[str]
    claimed: set[str]
    #: numbered layers that vLLM has built, and top-level modules: of a vision tower not all that a
    #: checkpoint has, and none where images are switched off
    built: set[str]
    #: compiles the kernels of the model's layers
    warm_up: WarmUp

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Return ``casp`` for checkpoints with our section, else None.

        :raises ValueError: if vLLM's model would run this one wrongly
        """
        if SECTION not in hf_quant_cfg:
            return None
        why = refusal(getattr(hf_config, "architectures", None) or [], hf_quant_cfg)
        if why is not None:
            raise ValueError(why)
        return METHOD

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "CaspConfig":
        """Return the config of a checkpoint.

        :param config: its ``quantization_config``
        :raises ValueError: if our section is malformed or of another format
        """
        instance = super().from_config(config)
        section = read_section(config)
        instance.low_rank, instance.latent_of = section.ranks, section.latent_of
        instance.codebooks, instance.codebook_methods = section.codebooks, {}
        instance.required, instance.claimed = section.layers, set()
        instance.built = set()
        instance.warm_up = WarmUp()
        if instance.transform_config is not None:
            check_transforms(instance.transform_config)
        return instance

    def apply_vllm_mapper(self, hf_to_vllm_mapper) -> None:
        """Rename the layers of the section as vLLM does those of the checkpoint."""
        super().apply_vllm_mapper(hf_to_vllm_mapper)
        self.low_rank = hf_to_vllm_mapper.apply_dict(self.low_rank)
        self.codebooks = hf_to_vllm_mapper.apply_dict(self.codebooks)
        self.required = set(hf_to_vllm_mapper.apply_list(sorted(self.required)))
        owners = hf_to_vllm_mapper.apply_list(list(self.latent_of.values()))
        names = hf_to_vllm_mapper.apply_list(list(self.latent_of))
        self.latent_of = dict(zip(names, owners, strict=True))
        maps = (self.target_scheme_map, self.low_rank, self.latent_of, self.codebooks)
        for by_name in maps:
            by_name |= {_in_tower(name): value for name, value in by_name.items()}
        self.latent_of = {
            name: _in_tower(owner) if _in_tower(name) == name else owner
            for name, owner in self.latent_of.items()
        }

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return the method that runs a layer: ours where vLLM's own cannot, else vLLM's.

        :param prefix: name of the layer
        """
        self.built.add(_place(prefix))
        if prefix in self.codebook_methods:
            return self.codebook_methods[prefix]
        if isinstance(layer, LinearBase):
            shards = self._shards(layer, prefix)
            if self._must_split(layer, prefix, shards):
                self.claimed |= {shard.name for shard in shards}
                return SplitLinearMethod(self, shards)
        elif isinstance(layer, RoutedExperts):
            return self._experts_method(layer, prefix)
        return super().get_quant_method(layer, prefix)

    def _experts_method(self, layer: RoutedExperts, prefix: str) -> QuantizeMethodBase | None:
        """Return vLLM's own method, which runs all experts of a layer at one width.

        :raises ValueError: if vLLM has none for these experts on this machine
        """
        if self.transform_config is not None:
            expert = f"{prefix}.0.gate_proj"
            if input_block(self.transform_config, expert, torch.nn.Linear(1, 1), 0) != 1:
                raise ValueError(
                    f"{prefix}: the inputs of experts cannot be rotated: put them into "
                    "QuIPModifier.ignore"
                )
        try:
            return super().get_quant_method(layer, prefix)
        except NotImplementedError as error:
            raise ValueError(
                f"{prefix}: vLLM has no kernel here for experts that are quantized so. On CPU it "
                "runs them dense: put 're:.*experts.*' into BitAllocationModifier.ignore. On CUDA "
                f"widths other than 4 and 8 bits take humming-kernels ({error})"
            ) from None

    def get_checkpoint_weight_mapper(self) -> "WeightsMapper":
        """Return the renaming of weights, which vLLM asks for once all layers are built.

        :raises ValueError: if factored layers of the checkpoint are in no layer of the model
        """
        lost = sorted(
            name
            for name in self.required
            if {_place(name), _place(_in_tower(name))} & self.built
            and not {name, _in_tower(name)} & self.claimed
        )
        if lost and get_pp_group().world_size == 1:
            architectures = get_current_vllm_config().model_config.architectures
            raise ValueError(
                f"{architectures} of vLLM cannot run {len(lost)} layers of this "
                f"checkpoint ({', '.join(lost[:4])}): serve the copy that `casp fold` writes"
            )
        mapper = super().get_checkpoint_weight_mapper()
        # rotations are computed from the config
        groups = self.transform_config.config_groups if self.transform_config is not None else ()
        unread = {f".{group}_input.weight": None for group in groups}
        return mapper | WeightsMapper(orig_to_new_suffix=unread)

    def _shards(self, layer: LinearBase, prefix: str) -> list[Shard]:
        """Return the linears of the checkpoint that vLLM holds in one layer."""
        parent, _, leaf = prefix.rpartition(".")
        members = self.packed_modules_mapping.get(leaf) or _FUSED.get(leaf, [leaf])
        names = [f"{parent}.{member}" if parent else member for member in members]
        known = self.low_rank.keys() | self.codebooks.keys() | self.target_scheme_map.keys()
        fused = leaf in self.packed_modules_mapping or not known.isdisjoint(names)
        if not fused or prefix in known or len(names) != len(layer.output_partition_sizes):
            names = [prefix]  # a single linear on disk too
        return [
            Shard(name, self.low_rank.get(name), self.latent_of.get(name, name)) for name in names
        ]

    def _must_split(self, layer: LinearBase, prefix: str, shards: list[Shard]) -> bool:
        """Tell whether vLLM's own single matmul cannot run all shards."""
        if any(shard.rank or shard.name in self.codebooks for shard in shards):
            return True
        columns = layer.input_size
        blocks = (input_block(self.transform_config, s.name, layer, columns) for s in shards)
        if any(block > 1 for block in blocks):
            return True
        rows = layer.output_partition_sizes
        cut = isinstance(layer, ColumnParallelLinear) and layer.tp_size > 1
        if len(shards) != len(rows) or (len(shards) == 1 and not cut):
            return False
        if len(shards) > 1 and prefix.rpartition(".")[2] not in self.packed_modules_mapping:
            return True  # vLLM would not find the schemes of the shards
        return not can_join(self, layer, [shard.name for shard in shards], rows)

    def _get_scheme_from_parts(self, *args, **kwargs) -> CompressedTensorsScheme:
        scheme = super()._get_scheme_from_parts(*args, **kwargs)
        if type(scheme) is not CompressedTensorsWNA16:
            return scheme
        return WNA16(
            strategy=scheme.strategy,
            num_bits=scheme.num_bits,
            group_size=scheme.group_size,
            symmetric=scheme.symmetric,
            layer_name=scheme.layer_name,
            warm_up=self.warm_up,
        )


def _place(name: str) -> str:
    """Return the numbered layer that a module lies in, the top-level module where it is in none."""
    inside = re.match(r"(.*\.\d+)\.", name)
    return inside[1] if inside else name.partition(".")[0]


def _in_tower(name: str) -> str:
    """Return vLLM's name of a module in a vision tower; other names stay as they are.

    transformers 5 has no level ``vision_model`` in CLIP's and SigLIP's towers, vLLM has; in BLIP-2
    it is the other way round.
    """
    head, tower, inside = name.partition("vision_tower.")
    if not tower:
        return name.removeprefix("vision_model")
    return name if inside.startswith("vision_model.") else f"{head}{tower}vision_model.{inside}"
