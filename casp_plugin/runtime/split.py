"""One linear layer of vLLM run as several, for factors, unequal schemes and rotated inputs."""

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

from casp_plugin.maths.hadamard import hadamard, rotate
from casp_plugin.maths.packing import narrow_packed
from casp_plugin.model.transforms import input_block
from casp_plugin.runtime.codebook import CodebookMethod

__all__ = ["Rows", "Shard", "SplitLinearMethod", "can_join", "rows_of_rank"]


@dataclass(frozen=True)
class Shard:
    """One linear of the checkpoint inside a layer of vLLM.

    :param name: its name in the checkpoint, as vLLM maps it
    :param rank: rank of its factors; None if it is dense
    :param latent_of: the linear that holds its down factor: itself, or another one of the layer
    """

    name: str
    rank: int | None
    latent_of: str


@dataclass(frozen=True)
class Rows:
    """The rows of a linear that this tensor-parallel rank runs.

    :param start: first row
    :param length: number of rows
    :param total: number of rows on all ranks
    """

    start: int
    length: int
    total: int


@dataclass(frozen=True)
class _SubLinear:
    """One weight of the checkpoint inside a layer of vLLM: a dense shard, or a factor of a shard.

    :param shard: position of its shard in the layer
    :param suffix: suffix of its name after the shard's: "", "down" or "up"
    :param name: its name in the checkpoint
    :param rows: rows that this rank runs
    :param reads: position of the shard whose latent it reads; None for the layer's input
    :param block: size of the Hadamard blocks that rotate its input; 1 for none
    :param columns: size of its input on all ranks
    """

    shard: int
    suffix: str
    name: str
    rows: Rows
    reads: int | None
    block: int
    columns: int


class SplitLinearMethod(LinearMethodBase):
    """Runs dense shards and factors of a layer as linears with schemes and kernels of their own.

    ``first`` holds the linears that read the layer's input: dense shards and down factors;
    ``second`` holds the up factors. Linears that read the same input and have one scheme are joined
    into one matmul. All are ordinary layers of vLLM, so schemes, kernels and post-processing are
    those of any other model.

    Weights arrive under the names of the fused layer (``qkv_proj.down.weight_packed``, shard
    "q"). Empty parameters of these names stand in the layer until all weights are loaded, and pass
    on the weights that they are given, so every way in which a model of vLLM loads a fused layer
    works.

    Tensor parallelism splits up factors and dense shards by heads or columns and keeps down factors
    whole on every rank; in a row-parallel layer it splits down factors by columns and keeps up
    factors whole.

    :param config: quantization config of the checkpoint
    :param shards: linears of the checkpoint that the layer holds, in its order
    """

    def __init__(self, config: CompressedTensorsConfig, shards: list[Shard]):
        self.config = config
        self.shards = shards
        # the config of the linears, whose inputs are rotated here, once for all
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
        """Put the linears of the shards and stand-ins for their weights into a layer.

        :raises ValueError: if a shard shares the latent of a linear outside of the layer
        """
        self.expected: set[tuple[str, int]] = set()
        self.loaded: set[tuple[str, int]] = set()
        first, second = [], []
        position = {shard.name: index for index, shard in enumerate(self.shards)}
        rows_of_shards = rows_of_rank(layer, output_partition_sizes)

        def sublinear(index: int, suffix: str, rows: Rows, reads: int | None = None) -> _SubLinear:
            name = ".".join(filter(None, (self.shards[index].name, suffix)))
            columns = input_size_per_partition if reads is None else self.shards[index].rank
            block = input_block(self.config.transform_config, name, layer, columns)
            whole = input_size if reads is None else self.shards[index].rank
            return _SubLinear(index, suffix, name, rows, reads, block, whole)

        for index, (shard, rows) in enumerate(zip(self.shards, rows_of_shards, strict=True)):
            if shard.rank is None:
                first.append(sublinear(index, "", rows))
                continue
            latent = position.get(shard.latent_of)
            if latent is None:
                raise ValueError(
                    f"{shard.name} shares the latent of {shard.latent_of}, which vLLM holds in "
                    f"another layer than {layer.prefix}: serve the copy that `casp fold` writes"
                )
            if latent == index:
                first.append(sublinear(index, "down", Rows(0, shard.rank, shard.rank)))
            second.append(sublinear(index, "up", rows, latent))

        self.first = self._joined(layer, first)
        self.second = self._joined(layer, second)
        for block in {linear.block for linear in first + second} - {1}:
            matrix = hadamard(block, params_dtype)
            layer.register_buffer(f"hadamard_{block}", matrix, persistent=False)
        layer.first = nn.ModuleList()
        for group in self.first:
            layer.first.append(self._child(layer, input_size, group, params_dtype))
        layer.second = nn.ModuleList()
        for group in self.second:
            rank = self.shards[group[0].shard].rank
            layer.second.append(self._child(layer, rank, group, params_dtype))
            if layer.has_bias:
                bias = _stand_in(layer, "up.bias", params_dtype)
                bias.routes |= {linear.shard: partial(_load_bias, layer) for linear in group}

    def apply(
        self, layer: LinearBase, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the outputs of the layer, (tokens, rows of this rank).

        :param x: inputs, (tokens, columns of this rank)
        :param bias: bias of the layer, (rows of this rank,)
        """
        #: latents, then outputs of the shards
        outputs: list[torch.Tensor | None] = [None] * len(self.shards)

        def rotated(inputs: torch.Tensor, block: int) -> torch.Tensor:
            return rotate(inputs, block, getattr(layer, f"hadamard_{block}", None))

        def run(group: list[_SubLinear], child: LinearBase, inputs: torch.Tensor) -> None:
            slices = child(inputs).split([linear.rows.length for linear in group], dim=-1)
            for linear, output in zip(group, slices, strict=True):
                outputs[linear.shard] = output  # (tokens, rows or rank)

        inputs = {block: rotated(x, block) for block in {group[0].block for group in self.first}}
        for group, child in zip(self.first, layer.first, strict=True):
            run(group, child, inputs[group[0].block])
        latents = list(outputs)  # (tokens, rank); dense shards are complete
        for group, child in zip(self.second, layer.second, strict=True):
            latent = rotated(latents[group[0].reads], group[0].block)
            run(group, child, latent.contiguous())
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return output if bias is None else output + bias

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Remove the stand-ins.

        :raises ValueError: if the checkpoint held only some of the layer's weights
        """
        missing = self.expected - self.loaded
        if missing and self.loaded:  # nothing is loaded where vLLM makes dummy weights
            names = sorted(f"{self.shards[index].name}.{leaf}" for leaf, index in missing)
            raise ValueError(f"{layer.prefix}: the checkpoint lacks {', '.join(names)}")
        for name, parameter in list(layer.named_parameters()):
            if isinstance(parameter, _StandIn):
                owner, _, leaf = name.rpartition(".")
                delattr(layer.get_submodule(owner), leaf)

    def _joined(self, layer: LinearBase, linears: list[_SubLinear]) -> list[list[_SubLinear]]:
        """Return the linears grouped by the matmul that runs them."""
        groups: list[list[_SubLinear]] = []
        for linear in linears:
            for group in groups:
                if (group[0].reads, group[0].block) != (linear.reads, linear.block):
                    continue
                members = [*group, linear]
                names = [member.name for member in members]
                if self.config.codebooks.keys() & names:
                    continue
                if can_join(self.config, layer, names, [member.rows.length for member in members]):
                    group.append(linear)
                    break
            else:
                groups.append([linear])
        return groups

    def _child(
        self, layer: LinearBase, columns: int, group: list[_SubLinear], dtype: torch.dtype
    ) -> LinearBase:
        """Return the layer of vLLM that runs a group of linears on this rank, ready to load.

        :param columns: input size on all ranks
        """
        rows = [linear.rows.length for linear in group]
        scheme = self.config.codebooks.get(group[0].name)
        if scheme is not None:
            shape = group[0].rows.total, group[0].columns
            self.plain.codebook_methods[group[0].name] = CodebookMethod(scheme, shape)
        settings = {
            "bias": False,
            "params_dtype": dtype,
            "quant_config": self.plain,
            "prefix": group[0].name,
            "return_bias": False,
        }
        if isinstance(layer, RowParallelLinear) and group[0].suffix != "up":
            child = RowParallelLinear(
                columns, *rows, reduce_results=False, disable_tp=layer.disable_tp, **settings
            )
        elif len(group) == 1:
            child = ReplicatedLinear(columns, *rows, **settings)
        else:
            child = MergedColumnParallelLinear(columns, rows, disable_tp=True, **settings)
        for position, linear in enumerate(group):
            self._expect(layer, linear, child, [position] if len(group) > 1 else [])
        return child

    def _expect(
        self, layer: LinearBase, linear: _SubLinear, child: LinearBase, position: list[int]
    ) -> None:
        """Make the stand-ins for the weights of a linear, which pass them on to its child.

        :param position: position of the linear in a joined child; empty if it is alone in it
        """
        for leaf, parameter in child.named_parameters(recurse=False):
            name = f"{linear.suffix}.{leaf}" if linear.suffix else leaf

            def load(weight: torch.Tensor, shard_id=None, name=name, leaf=leaf) -> None:
                child.update_param_tp_status()  # undoes the rank that the layer gave them
                target = getattr(child, leaf)
                target.weight_loader(target, _rows_of(weight, linear.rows, target), *position)
                self.loaded.add((name, linear.shard))

            self.expected.add((name, linear.shard))
            _stand_in(layer, name, parameter.dtype).routes[linear.shard] = load


class _StandIn(nn.Parameter):
    """An empty parameter that passes the weight of a shard on to the linear that holds it."""

    def __new__(cls, dtype: torch.dtype):
        instance = super().__new__(cls, torch.empty(0, dtype=dtype), requires_grad=False)
        #: functions that load a weight and its shard id, by the position of the shard
        instance.routes = {}
        return instance

    def weight_loader(self, _, weight: torch.Tensor, shard_id: str | int | None = None) -> None:
        """Pass the weight of a shard on.

        :param shard_id: "q", "k", "v", or the position of the shard
        :raises ValueError: if no linear holds this weight
        """
        index = {"q": 0, "k": 1, "v": 2, None: 0}.get(shard_id, shard_id)
        if index not in self.routes:
            raise ValueError(
                f"unexpected weight of shape {tuple(weight.shape)} for shard {shard_id}: the "
                "checkpoint's weights and its quantization_config disagree"
            )
        self.routes[index](weight, shard_id)


def _stand_in(layer: LinearBase, name: str, dtype: torch.dtype) -> _StandIn:
    """Return the stand-in of a name inside a layer, a new one if there is none yet."""
    owner, _, leaf = name.rpartition(".")
    if owner and not hasattr(layer, owner):
        layer.add_module(owner, nn.Module())
    module = layer.get_submodule(owner)
    if not hasattr(module, leaf):
        module.register_parameter(leaf, _StandIn(dtype))
    return getattr(module, leaf)


def _load_bias(layer: LinearBase, weight: torch.Tensor, shard_id: str | int | None) -> None:
    """Load the bias of an up factor, which the layer itself holds."""
    layer.weight_loader(layer.bias, weight, *([] if shard_id is None else [shard_id]))


def _rows_of(weight: torch.Tensor, rows: Rows, target: nn.Parameter) -> torch.Tensor:
    """Return the rows of a checkpoint's tensor that this rank runs.

    :param target: the parameter that they load into
    """
    dim = getattr(target, "output_dim", None)
    if dim is None or rows.length == rows.total:
        return weight
    if each := getattr(target, "rows_each", None):
        return weight.narrow(dim, rows.start // each, rows.length // each)
    if getattr(target, "packed_dim", None) == dim:
        bits = int(32 / target.packed_factor)
        return narrow_packed(weight, bits, rows.start, rows.length, rows.total)
    return weight.narrow(dim, rows.start, rows.length)


def rows_of_rank(layer: LinearBase, sizes: list[int]) -> list[Rows]:
    """Return the rows of every shard that this rank runs; k and v heads repeat where there are
    fewer than ranks.

    :param sizes: rows of every shard on one rank
    """
    rows = []
    for index, size in enumerate(sizes):
        rank, world = 0, 1
        if isinstance(layer, ColumnParallelLinear):
            rank, world = layer.tp_rank, layer.tp_size
        if isinstance(layer, QKVParallelLinear) and index > 0:
            rank, world = rank // layer.num_kv_head_replicas, world // layer.num_kv_head_replicas
        rows.append(Rows(rank * size, size, world * size))
    return rows


def can_join(
    config: CompressedTensorsConfig, layer: LinearBase, names: list[str], rows: list[int]
) -> bool:
    """Tell whether one matmul can run some linears: they have equal schemes, and zero points that
    fill whole words.

    :param names: names of the linears in the checkpoint
    :param rows: rows of every linear on this rank
    """
    first, *others = [config.get_scheme_dict(layer, name) for name in names]
    if any(other != first for other in others):
        return False
    weights = first and first["weights"]
    if weights is None or weights.symmetric:
        return True
    return all(count * weights.num_bits % 32 == 0 for count in rows)
