"""vLLM's compressed-tensors config, for checkpoints with a ``casp`` section."""

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
from casp_plugin.model.transforms import check_transforms, input_block
from casp_plugin.runtime.kernels import WNA16
from casp_plugin.runtime.split import Shard, SplitLinearMethod, can_join

__all__ = ["METHOD", "CaspConfig"]

#: name of the quantization method in vLLM; checkpoints say ``compressed-tensors``
METHOD = "casp"
#: what fused layers hold in models that do not say so
_QKV = ["q_proj", "k_proj", "v_proj"]
_FUSED = {"qkv_proj": _QKV, "qkv": _QKV, "gate_up_proj": ["gate_proj", "up_proj"]}


class CaspConfig(CompressedTensorsConfig):
    """compressed-tensors plus factored layers and unequal schemes inside fused layers."""

    #: rank of every factored layer, by its name in the checkpoint, mapped to vLLM's names
    low_rank: dict[str, int]
    #: the layer whose down factor a layer uses, named likewise
    latent_of: dict[str, str]
    #: factored layers that no layer of the model has asked for yet
    unclaimed: set[str]
    #: parts of the model that were built: a vision tower is not where images are switched off
    parts: set[str]

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claim checkpoints that carry our section.

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
        """
        :raises ValueError: if the section is malformed or of another format
        """
        made = super().from_config(config)
        section = read_section(config)
        made.low_rank, made.latent_of = section.ranks, section.latent_of
        made.unclaimed = set(made.low_rank)
        made.parts = set()
        if made.transform_config is not None:
            check_transforms(made.transform_config)
        return made

    def apply_vllm_mapper(self, hf_to_vllm_mapper) -> None:
        super().apply_vllm_mapper(hf_to_vllm_mapper)
        self.low_rank = hf_to_vllm_mapper.apply_dict(self.low_rank)
        self.unclaimed = set(self.low_rank)
        owners = hf_to_vllm_mapper.apply_list(list(self.latent_of.values()))
        names = hf_to_vllm_mapper.apply_list(list(self.latent_of))
        self.latent_of = dict(zip(names, owners, strict=True))
        for named in (self.target_scheme_map, self.low_rank, self.latent_of):
            named |= {_in_tower(name): value for name, value in named.items()}
        self.latent_of = {
            name: _in_tower(owner) if _in_tower(name) == name else owner
            for name, owner in self.latent_of.items()
        }

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        self.parts.add(prefix.partition(".")[0])
        if isinstance(layer, LinearBase):
            shards = self._shards(layer, prefix)
            if self._must_split(layer, prefix, shards):
                claimed = {shard.name for shard in shards}
                self.unclaimed = {n for n in self.unclaimed if not {n, _in_tower(n)} & claimed}
                return SplitLinearMethod(self, shards)
        elif isinstance(layer, RoutedExperts):
            return self._experts_method(layer, prefix)
        return super().get_quant_method(layer, prefix)

    def _experts_method(self, layer: RoutedExperts, prefix: str) -> QuantizeMethodBase | None:
        """vLLM's own, which runs all experts of a layer at one width.

        :raises ValueError: if it has none for these experts on this machine
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
        """vLLM asks for it when all layers are built and the weights come next.

        :raises ValueError: if factored layers of the checkpoint are in no layer of the model
        """
        lost = sorted(name for name in self.unclaimed if name.partition(".")[0] in self.parts)
        if lost and get_pp_group().world_size == 1:
            architectures = get_current_vllm_config().model_config.architectures
            raise ValueError(
                f"{architectures} of vLLM cannot run {len(lost)} low-rank layers of this "
                f"checkpoint ({', '.join(lost[:4])}): serve the copy that `casp fold` writes"
            )
        mapper = super().get_checkpoint_weight_mapper()
        # matrices that follow from the config
        groups = self.transform_config.config_groups if self.transform_config is not None else ()
        unread = {f".{group}_input.weight": None for group in groups}
        return mapper | WeightsMapper(orig_to_new_suffix=unread)

    def _shards(self, layer: LinearBase, prefix: str) -> list[Shard]:
        """The checkpoint's linears that vLLM holds in one layer."""
        parent, _, leaf = prefix.rpartition(".")
        members = self.packed_modules_mapping.get(leaf) or _FUSED.get(leaf, [leaf])
        names = [f"{parent}.{member}" if parent else member for member in members]
        named = self.low_rank.keys() | self.target_scheme_map.keys()
        fused = leaf in self.packed_modules_mapping or not named.isdisjoint(names)
        if not fused or prefix in named or len(names) != len(layer.output_partition_sizes):
            names = [prefix]  # one linear on disk too
        return [
            Shard(name, self.low_rank.get(name), self.latent_of.get(name, name)) for name in names
        ]

    def _must_split(self, layer: LinearBase, prefix: str, shards: list[Shard]) -> bool:
        """Whether vLLM's own one matmul for all shards cannot do."""
        if any(shard.rank for shard in shards):
            return True
        columns = layer.input_size
        if any(input_block(self.transform_config, s.name, layer, columns) > 1 for s in shards):
            return True
        rows = layer.output_partition_sizes
        cut = isinstance(layer, ColumnParallelLinear) and layer.tp_size > 1
        if len(shards) != len(rows) or (len(shards) == 1 and not cut):
            return False
        if len(shards) > 1 and prefix.rpartition(".")[2] not in self.packed_modules_mapping:
            return True  # vLLM would not find the shards' schemes
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
        )


def _in_tower(name: str) -> str:
    """A module of a vision tower by vLLM's name: transformers 5 left the level ``vision_model`` out
    of CLIP's and SigLIP's, vLLM kept it, and leaves out BLIP-2's. Other names stay as they are."""
    head, tower, inside = name.partition("vision_tower.")
    if not tower:
        return name.removeprefix("vision_model")
    return name if inside.startswith("vision_model.") else f"{head}{tower}vision_model.{inside}"
