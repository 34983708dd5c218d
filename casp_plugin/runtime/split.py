"""One vLLM linear layer run as several: factored parts, unequal schemes, rotated inputs."""

from copy import copy
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)

from casp_plugin.model.transforms import hadamard, input_block, rotate
from casp_plugin.runtime.packing import narrow_packed

__all__ = ["Rows", "Shard", "SplitLinearMethod", "can_join", "rows_of_rank"]


@dataclass(frozen=True)
class Shard:
    """One linear of the checkpoint inside a layer of vLLM.

    :param name: its name in the checkpoint, as vLLM maps it
    :param rank: rank of its factors, None if it is dense
    :param latent_of: the linear that holds its down factor, itself or another of the layer
    """

    name: str
    rank: int | None
    latent_of: str


@dataclass(frozen=True)
class Rows:
    """The rows of a linear that this tensor-parallel rank runs."""

    start: int
    length: int
    total: int


@dataclass(frozen=True)
class _Part:
    """One weight of the checkpoint: a dense shard, or one of its factors.

    :param shard: position of its shard in the layer
    :param suffix: what its name adds to the shard's: "", "down" or "up"
    :param name: its name in the checkpoint
    :param rows: rows that this rank runs
    :param reads: position of the shard whose latent it reads; None for the layer's input
    :param block: size of the Hadamard blocks that rotate what it reads; 1 for none
    """

    shard: int
    suffix: str
    name: str
    rows: Rows
    reads: int | None
    block: int


class SplitLinearMethod(LinearMethodBase):
    """Runs each part of a layer as a linear of its own, with its own scheme and kernel.

    ``first`` holds the linears that read the layer's input: dense shards and down factors,
    ``second`` the up factors. Parts that read the same and have one scheme are joined into one
    matmul. All are ordinary layers of vLLM, so schemes, kernels and post-processing are those of
    any other model.

    Weights arrive under the names of the fused layer (``qkv_proj.down.weight_packed``, shard
    "q"). Empty parameters of these names stand in the layer until all is loaded and pass on
    what they get, so any way in which a model of vLLM loads a fused layer works.

    Tensor parallel: up factors and dense shards by heads or columns, down factors whole on
    every rank; in a row-parallel layer down by columns, up whole on every rank.
    """

    def __init__(self, config: CompressedTensorsConfig, shards: list[Shard]):
        self.config = config
        self.shards = shards
        # the parts' own config: what they read is rotated here, once for all
        self.plain = copy(config)
        self.plain.transform_config = None

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs,
    ) -> None:
        self.expected: set[tuple[str, int]] = set()
        self.loaded: set[tuple[str, int]] = set()
        first, second = [], []
        position = {shard.name: index for index, shard in enumerate(self.shards)}
        rows_of_shards = rows_of_rank(layer, output_partition_sizes)

        def part(index: int, suffix: str, rows: Rows, reads: int | None = None) -> _Part:
            name = ".".join(filter(None, (self.shards[index].name, suffix)))
            columns = input_size_per_partition if reads is None else self.shards[index].rank
            block = input_block(self.config.transform_config, name, layer, columns)
            return _Part(index, suffix, name, rows, reads, block)

        for index, (shard, rows) in enumerate(zip(self.shards, rows_of_shards, strict=True)):
            if shard.rank is None:
                first.append(part(index, "", rows))
                continue
            latent = position.get(shard.latent_of)
            if latent is None:
                raise ValueError(
                    f"{shard.name} shares the latent of {shard.latent_of}, which vLLM holds in "
                    f"another layer than {layer.prefix}: serve the copy that `casp fold` writes"
                )
            if latent == index:
                first.append(part(index, "down", Rows(0, shard.rank, shard.rank)))
            second.append(part(index, "up", rows, latent))

        self.first = self._joined(layer, first)
        self.second = self._joined(layer, second)
        for block in {part.block for part in first + second} - {1}:
            matrix = hadamard(block, params_dtype)
            layer.register_buffer(f"hadamard_{block}", matrix, persistent=False)
        layer.first = nn.ModuleList()
        for parts in self.first:
            layer.first.append(self._linear(layer, input_size, parts, params_dtype))
        layer.second = nn.ModuleList()
        for parts in self.second:
            rank = self.shards[parts[0].shard].rank
            layer.second.append(self._linear(layer, rank, parts, params_dtype))
            if layer.has_bias:
                bias = _stand_in(layer, "up.bias", params_dtype)
                bias.routes |= {part.shard: partial(_load_bias, layer) for part in parts}

    def apply(
        self, layer: LinearBase, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        outputs: list[torch.Tensor | None] = [None] * len(self.shards)

        def turned(inputs: torch.Tensor, block: int) -> torch.Tensor:
            return rotate(inputs, block, getattr(layer, f"hadamard_{block}", None))

        def run(parts: list[_Part], child: LinearBase, inputs: torch.Tensor) -> None:
            pieces = child(inputs).split([part.rows.length for part in parts], dim=-1)
            for part, piece in zip(parts, pieces, strict=True):
                outputs[part.shard] = piece

        inputs = {block: turned(x, block) for block in {parts[0].block for parts in self.first}}
        for parts, child in zip(self.first, layer.first, strict=True):
            run(parts, child, inputs[parts[0].block])
        latents = list(outputs)
        for parts, child in zip(self.second, layer.second, strict=True):
            latent = turned(latents[parts[0].reads], parts[0].block)
            run(parts, child, latent.contiguous())
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return output if bias is None else output + bias

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Drop the stand-ins.

        :raises ValueError: if the checkpoint held only some of the layer's weights
        """
        missing = self.expected - self.loaded
        if missing and self.loaded:  # none at all: vLLM was asked for dummy weights
            names = sorted(f"{self.shards[index].name}.{leaf}" for leaf, index in missing)
            raise ValueError(f"{layer.prefix}: the checkpoint lacks {', '.join(names)}")
        for name, parameter in list(layer.named_parameters()):
            if isinstance(parameter, _StandIn):
                owner, _, leaf = name.rpartition(".")
                delattr(layer.get_submodule(owner), leaf)

    def _joined(self, layer: LinearBase, parts: list[_Part]) -> list[list[_Part]]:
        """Parts by the matmul that runs them."""
        groups: list[list[_Part]] = []
        for part in parts:
            for group in groups:
                if (group[0].reads, group[0].block) != (part.reads, part.block):
                    continue
                together = [*group, part]
                names = [p.name for p in together]
                if can_join(self.config, layer, names, [p.rows.length for p in together]):
                    group.append(part)
                    break
            else:
                groups.append([part])
        return groups

    def _linear(
        self, layer: LinearBase, columns: int, parts: list[_Part], dtype: torch.dtype
    ) -> LinearBase:
        """The layer of vLLM that runs some parts on this rank, ready to load."""
        rows = [part.rows.length for part in parts]
        settings = {
            "bias": False,
            "params_dtype": dtype,
            "quant_config": self.plain,
            "prefix": parts[0].name,
            "return_bias": False,
        }
        if isinstance(layer, RowParallelLinear) and parts[0].suffix != "up":
            child = RowParallelLinear(
                columns, *rows, reduce_results=False, disable_tp=layer.disable_tp, **settings
            )
        elif len(parts) == 1:
            child = ReplicatedLinear(columns, *rows, **settings)
        else:
            child = MergedColumnParallelLinear(columns, rows, disable_tp=True, **settings)
        for position, part in enumerate(parts):
            self._expect(layer, part, child, [position] if len(parts) > 1 else [])
        return child

    def _expect(
        self, layer: LinearBase, part: _Part, child: LinearBase, position: list[int]
    ) -> None:
        """Let stand-ins pass on the weights of a part.

        :param position: the part's position in a joined child, empty if it has the child alone
        """
        for leaf, parameter in child.named_parameters(recurse=False):
            name = f"{part.suffix}.{leaf}" if part.suffix else leaf

            def load(weight: torch.Tensor, shard_id=None, name=name, leaf=leaf) -> None:
                child.update_param_tp_status()  # the layer has stamped its own rank on them
                target = getattr(child, leaf)
                target.weight_loader(target, _cut(weight, part.rows, target), *position)
                self.loaded.add((name, part.shard))

            self.expected.add((name, part.shard))
            _stand_in(layer, name, parameter.dtype).routes[part.shard] = load


class _StandIn(nn.Parameter):
    """An empty parameter that hands each shard's weight to the linear that holds it."""

    def __new__(cls, dtype: torch.dtype):
        made = super().__new__(cls, torch.empty(0, dtype=dtype), requires_grad=False)
        made.routes = {}
        return made

    def weight_loader(self, _, weight: torch.Tensor, shard_id: str | int | None = None) -> None:
        index = {"q": 0, "k": 1, "v": 2, None: 0}.get(shard_id, shard_id)
        if index not in self.routes:
            raise ValueError(
                f"unexpected weight of shape {tuple(weight.shape)} for shard {shard_id}: the "
                "checkpoint's weights and its quantization_config disagree"
            )
        self.routes[index](weight, shard_id)


def _stand_in(layer: LinearBase, name: str, dtype: torch.dtype) -> _StandIn:
    """The stand-in of this name inside a layer, made if there is none yet."""
    owner, _, leaf = name.rpartition(".")
    if owner and not hasattr(layer, owner):
        layer.add_module(owner, nn.Module())
    module = layer.get_submodule(owner)
    if not hasattr(module, leaf):
        module.register_parameter(leaf, _StandIn(dtype))
    return getattr(module, leaf)


def _load_bias(layer: LinearBase, weight: torch.Tensor, shard_id: str | int | None) -> None:
    """The bias of up is the layer's own."""
    layer.weight_loader(layer.bias, weight, *([] if shard_id is None else [shard_id]))


def _cut(weight: torch.Tensor, rows: Rows, target: nn.Parameter) -> torch.Tensor:
    """A checkpoint tensor's part for this rank."""
    dim = getattr(target, "output_dim", None)
    if dim is None or rows.length == rows.total:
        return weight
    if getattr(target, "packed_dim", None) == dim:
        bits = int(32 / target.packed_factor)
        return narrow_packed(weight, bits, rows.start, rows.length, rows.total)
    return weight.narrow(dim, rows.start, rows.length)


def rows_of_rank(layer: LinearBase, sizes: list[int]) -> list[Rows]:
    """The rows of each shard that this rank runs; k and v heads repeat where ranks outnumber
    them.

    :param sizes: rows of each shard on one rank
    """
    made = []
    for index, size in enumerate(sizes):
        rank, world = 0, 1
        if isinstance(layer, ColumnParallelLinear):
            rank, world = layer.tp_rank, layer.tp_size
        if isinstance(layer, QKVParallelLinear) and index > 0:
            rank, world = rank // layer.num_kv_head_replicas, world // layer.num_kv_head_replicas
        made.append(Rows(rank * size, size, world * size))
    return made


def can_join(
    config: CompressedTensorsConfig, layer: LinearBase, names: list[str], rows: list[int]
) -> bool:
    """Whether linears can be one matmul: equal schemes, and zero points that fill whole words.

    :param names: the linears' names in the checkpoint
    :param rows: rows that each has on this rank
    """
    first, *others = [config.get_scheme_dict(layer, name) for name in names]
    if any(other != first for other in others):
        return False
    weights = first and first["weights"]
    if weights is None or weights.symmetric:
        return True
    return all(count * weights.num_bits % 32 == 0 for count in rows)
