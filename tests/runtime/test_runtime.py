"""The runtime in vLLM's own environment: layers, kernels and refusals, without a model."""

import os
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from compressed_tensors.quantization import QuantizationArgs
from vllm import config as vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
from vllm.model_executor import models
from vllm.model_executor import parameter as vllm_parameter
from vllm.model_executor.kernels.linear import (
    _POSSIBLE_KERNELS,
    CPUWNA16LinearKernel,
    MPLinearLayerConfig,
    choose_mp_linear_kernel,
)
from vllm.model_executor.kernels.linear.mixed_precision import humming as vllm_humming
from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsLinearMethod,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsWNA16,
)
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper
from vllm.platforms import PlatformEnum, current_platform
from vllm.platforms.interface import DeviceCapability

from casp_plugin.checkpoint.format import Section
from casp_plugin.checkpoint.load import CaspHfQuantizer, CompressedTensorsConfig
from casp_plugin.checkpoint.vllm_support import Linear, Matmul, compiled_matmuls, refusal
from casp_plugin.maths.packing import dequantize, pack
from casp_plugin.model.schemes import missing_kernel
from casp_plugin.runtime import config, kernels, warm_up
from casp_plugin.runtime.config import CaspConfig
from casp_plugin.runtime.kernels import WNA16, CPULinearKernel
from casp_plugin.runtime.split import SplitLinearMethod
from casp_plugin.runtime.vllm import register
from casp_plugin.runtime.warm_up import WarmUp

pytestmark = pytest.mark.vllm

GROUP = 16
CAPABILITIES = [80, 90]
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
STACKED = {
    ".q_proj": (".qkv_proj", "q"),
    ".k_proj": (".qkv_proj", "k"),
    ".v_proj": (".qkv_proj", "v"),
    ".gate_proj": (".gate_up_proj", 0),
    ".up_proj": (".gate_up_proj", 1),
}


@pytest.fixture(autouse=True)
def engine(tmp_path):
    """What vLLM sets up before it builds a model."""
    register()
    torch.manual_seed(0)
    with vllm_config.set_current_vllm_config(vllm_config.VllmConfig()):
        init_distributed_environment(1, 0, f"file://{tmp_path}/store", 0, "gloo")
        initialize_model_parallel(1, 1)
        yield
    cleanup_dist_env_and_memory()


@pytest.fixture
def on_rank(monkeypatch):
    """Pretend to be one rank of a tensor-parallel group."""

    def pretend(rank, size):
        for module in (vllm_linear, vllm_parameter):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)

    return pretend


class Checkpoint:
    """Random linears as compressed-tensors stores them, and their weights in float64.

    :param dtype: data type of scales and unquantized weights
    """

    def __init__(self, dtype=torch.float32):
        self.dtype = dtype
        self.tensors = {}
        self.weights = {}
        self.groups = {}
        self.low_rank = {}
        self.latent_of = {}
        self.transforms = {}
        self.fused = FUSED

    def add(self, name, rows, columns, bits=None, symmetric=False, bias=False):
        """One linear; 16 bits if ``bits`` is None."""
        if bias:
            self.tensors[f"{name}.bias"] = torch.randn(rows, dtype=self.dtype)
        if bits is None:
            weight = torch.randn(rows, columns, dtype=self.dtype) / columns**0.5
            self.tensors[f"{name}.weight"] = weight
            self.weights[name] = weight.double()
            return self
        codes = torch.randint(2**bits, (rows, columns), dtype=torch.uint8)
        shape = (rows, columns // GROUP)
        scales = (torch.rand(shape) / 2**bits / columns**0.5).to(self.dtype)
        offsets = torch.full(shape, 2 ** (bits - 1), dtype=torch.uint8)
        if not symmetric:
            offsets = torch.randint(2**bits, shape, dtype=torch.uint8)
            self.tensors[f"{name}.weight_zero_point"] = pack(offsets.t(), bits).t().contiguous()
        self.tensors[f"{name}.weight_packed"] = pack(codes, bits)
        self.tensors[f"{name}.weight_scale"] = scales
        self.tensors[f"{name}.weight_shape"] = torch.tensor([rows, columns])
        self.weights[name] = dequantize(codes, offsets, scales, torch.float64)
        key = f"{bits}{symmetric}"
        weights = {"num_bits": bits, "symmetric": symmetric, "strategy": "group"}
        group = {"targets": [], "weights": {**weights, "group_size": GROUP, "type": "int"}}
        self.groups.setdefault(key, group)["targets"].append(name)
        return self

    def factor(self, name, rows, columns, rank, down=None, up=None, bias=False):
        """A factored linear; ``down`` and ``up`` are arguments of their own ``add``."""
        self.low_rank[name] = rank
        self.add(f"{name}.down", rank, columns, **(down or {}))
        self.add(f"{name}.up", rows, rank, bias=bias, **(up or {}))
        self.weights[name] = self.weights[f"{name}.up"] @ self.weights[f"{name}.down"]
        return self

    def share(self, name, rows, columns, owner, up=None, bias=False):
        """A factored linear with the latent of another."""
        self.low_rank[name] = rank = self.low_rank[owner]
        self.latent_of[name] = owner
        self.add(f"{name}.up", rows, rank, bias=bias, **(up or {}))
        self.weights[name] = self.weights[f"{name}.up"] @ self.weights[f"{owner}.down"]
        return self

    def rotate(self, block, ignore=(), kind="hadamard"):
        """Rotate the inputs of all layers, as QuIPModifier spells it."""
        places = ({"location": "input"}, {"location": "weight_input", "inverse": True})
        apply = [{"targets": ["Linear"], "ignore": list(ignore), **place} for place in places]
        self.transforms = {"config_groups": {"v": {"type": kind, "head_dim": block}}}
        self.transforms["config_groups"]["v"]["apply"] = apply
        return self

    def config(self):
        made = CaspConfig.from_config(
            {
                "transform_config": self.transforms,
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": self.groups,
                "casp": {
                    "format": 2,
                    "low_rank": self.low_rank,
                    "latent_of": self.latent_of,
                },
            }
        )
        made.packed_modules_mapping = self.fused
        return made

    def load(self, layer, name, by_hand=False):
        """Load and post-process a layer as vLLM does.

        :param name: the layer's name in vLLM
        :param by_hand: as the models do that map stacked parameters themselves
        """
        model = torch.nn.Module()
        model.add_module(name, layer)
        weights = [(f".{key}", tensor.clone()) for key, tensor in self.tensors.items()]
        if by_hand:
            parameters = {f".{key}": p for key, p in model.named_parameters()}
            for key, tensor in weights:
                member = next(m for m in STACKED if f"{m}." in key)
                fused, shard = STACKED[member]
                parameter = parameters[key.replace(member, fused)]
                parameter.weight_loader(parameter, tensor, shard)
        else:
            mapper = WeightsMapper(orig_to_new_stacked=STACKED, orig_to_new_prefix={".": ""})
            AutoWeightsLoader(model).load_weights(weights, mapper=mapper)
        for module in model.modules():
            if method := getattr(module, "quant_method", None):
                method.process_weights_after_loading(module)
        return layer


def assert_close(actual, expected, dtype=torch.float32):
    scale = expected.abs().max()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert ((actual.double() - expected).abs().max() / scale).item() < tolerance


# --- kernels -------------------------------------------------------------------------------------


def replicated(bits, symmetric, shape, dtype):
    """A layer of vLLM with random weights, and these in float64."""
    rows, columns = shape
    checkpoint = Checkpoint(dtype).add("o_proj", rows, columns, bits, symmetric)
    layer = ReplicatedLinear(
        columns, rows, False, params_dtype=dtype, quant_config=checkpoint.config(), prefix="o_proj"
    )
    return checkpoint.load(layer, "o_proj"), checkpoint.weights["o_proj"]


def cpu_route(layer):
    kernel = layer.scheme.kernel
    if isinstance(kernel, CPUWNA16LinearKernel):
        return "CPUWNA16"
    return "dequantized at load" if kernel.widened is None else "widened to CPUWNA16"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(96, 64), (40, 48)], ids=["aligned", "odd"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_cpu_kernel(bits, symmetric, shape, dtype):
    layer, weight = replicated(bits, symmetric, shape, dtype)
    x = torch.randn(5, shape[1], dtype=dtype)
    assert_close(layer(x)[0], x.double() @ weight.t(), dtype)
    if dtype == torch.bfloat16 and shape == (96, 64) and bits <= 4:
        assert cpu_route(layer) == ("CPUWNA16" if bits == 4 else "widened to CPUWNA16")
    else:
        assert cpu_route(layer) == "dequantized at load"


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3])
def test_widening_is_exact(bits, symmetric):
    """The same weight at 2 or 3 bits and at 4 bits gives the same numbers, bit by bit."""
    narrow = Checkpoint(torch.bfloat16).add("o_proj", 96, 64, bits, symmetric)
    offset = 8 - 2 ** (bits - 1) if symmetric else 0
    wide = Checkpoint(torch.bfloat16).add("o_proj", 96, 64, 4, symmetric)
    for key, tensor in narrow.tensors.items():
        if key.endswith("packed"):
            wide.tensors[key] = pack(kernels.unpack(tensor, bits, 64) + offset, 4)
        elif key.endswith("zero_point"):
            wide.tensors[key] = pack(kernels.unpack(tensor.t(), bits, 96), 4).t()
        else:
            wide.tensors[key] = tensor
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    outputs = []
    for checkpoint in (narrow, wide):
        layer = ReplicatedLinear(
            64, 96, False, params_dtype=x.dtype, quant_config=checkpoint.config(), prefix="o_proj"
        )
        outputs.append(checkpoint.load(layer, "o_proj")(x)[0])
    assert torch.equal(*outputs)


@pytest.fixture
def on_cuda(monkeypatch):
    """Let vLLM choose kernels as on a GPU; none runs."""

    def pretend(capability, humming):
        answers = {
            "is_cpu": False,
            "is_cuda": True,
            "is_cuda_alike": True,
            "get_device_capability": DeviceCapability(*divmod(capability, 10)),
        }
        for name, value in answers.items():
            answer = staticmethod(lambda *args, value=value, **kwargs: value)
            monkeypatch.setattr(type(current_platform), name, answer)
        monkeypatch.setattr(type(current_platform), "_enum", PlatformEnum.CUDA)
        monkeypatch.setattr(vllm_humming, "has_humming", lambda: humming)

    return pretend


def chosen_on_cuda(bits, symmetric, group_size=128, dtype=torch.bfloat16):
    """Name of the kernel that vLLM takes for a large layer, or None."""
    scheme = CompressedTensorsWNA16("group", bits, group_size, symmetric)
    layer = MPLinearLayerConfig(
        (4096, 4096), (4096, 4096), scheme.quant_type, dtype, group_size, not symmetric
    )
    try:
        return choose_mp_linear_kernel(layer).__name__
    except ValueError:
        return None


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_what_needs_humming(bits, symmetric, on_cuda):
    """Our own statement, which the plan and `casp check` print, against vLLM's choice."""
    chosen = []
    for capability in CAPABILITIES:
        on_cuda(capability, humming=False)
        chosen.append(chosen_on_cuda(bits, symmetric))
    args = QuantizationArgs(
        num_bits=bits, symmetric=symmetric, strategy="group", group_size=128, type="int"
    )
    assert missing_kernel(args) == (None if all(chosen) else "humming-kernels")


def kernel_table(on_cuda):
    """Which kernel runs which bits, in Markdown."""
    rows = [["bits", "zero points", "CPU, bfloat16 (tested)", "CPU, float32 (tested)"]]
    rows[0] += [f"CUDA, SM{capability} (inferred)" for capability in CAPABILITIES]
    rows.append(["---"] * len(rows[0]))
    for bits in range(2, 9):
        for symmetric in (False, True):
            row = [str(bits), "no" if symmetric else "yes"]
            for dtype in (torch.bfloat16, torch.float32):
                row.append(cpu_route(replicated(bits, symmetric, (96, 64), dtype)[0]))
            rows.append(row)
    on_cuda(80, humming=True)  # from here on no kernel runs
    for row in rows[2:]:
        for capability in CAPABILITIES:
            on_cuda(capability, humming=True)
            name = chosen_on_cuda(int(row[0]), row[1] == "no")
            row.append(name.removesuffix("LinearKernel"))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def test_docs_have_the_kernel_table(on_cuda):
    """CASP_UPDATE_DOCS=1 writes it."""
    page = Path(__file__).parents[2] / "docs" / "serving.md"
    before, begin, rest = page.read_text().partition("<!-- kernels -->\n")
    found, end, after = rest.partition("<!-- /kernels -->\n")
    assert begin
    assert end
    table = kernel_table(on_cuda) + "\n"
    if os.environ.get("CASP_UPDATE_DOCS"):
        page.write_text(before + begin + table + end + after)
    else:
        assert found == table


def test_missing_humming_says_what_to_install(monkeypatch):
    def no_kernel(*args, **kwargs):
        raise ValueError("Failed to find a kernel")

    monkeypatch.setattr(kernels.CompressedTensorsWNA16, "create_weights", no_kernel)
    monkeypatch.setattr(kernels, "current_platform", SimpleNamespace(is_cuda=lambda: True))
    monkeypatch.setattr(kernels, "has_humming", lambda: False)
    scheme = WNA16("group", 3, 64, False, "model.layers.0.mlp.down_proj", warm_up=WarmUp())
    with pytest.raises(ValueError, match=r"down_proj: .* 3 bits .*pip install humming-kernels"):
        scheme.create_weights(
            torch.nn.Module(), input_size=64, input_size_per_partition=64, output_size=64
        )


def test_columns_that_no_rank_can_cut(on_rank):
    on_rank(0, 2)
    checkpoint = Checkpoint().add("down_proj", 32, 2 * GROUP, 3)
    with pytest.raises(ValueError, match="smaller --tensor-parallel-size"):
        RowParallelLinear(2 * GROUP, 32, quant_config=checkpoint.config(), prefix="down_proj")


# --- layers --------------------------------------------------------------------------------------

HIDDEN, HEAD, HEADS, KV_HEADS = 64, 8, 8, 2
Q_ROWS, KV_ROWS = HEADS * HEAD, KV_HEADS * HEAD


def qkv(checkpoint, bias=False):
    return QKVParallelLinear(
        HIDDEN, HEAD, HEADS, KV_HEADS, bias, params_dtype=checkpoint.dtype,
        quant_config=checkpoint.config(), prefix="attn.qkv_proj",
    )  # fmt: skip


def add_qkv(checkpoint, q, k, v, bias=False):
    """q, k, v: arguments of ``add``, or of ``factor`` or ``share`` where they name factors."""
    for leaf, rows, how in (("q", Q_ROWS, q), ("k", KV_ROWS, k), ("v", KV_ROWS, v)):
        put = checkpoint.factor if "rank" in how else checkpoint.add
        put = checkpoint.share if "owner" in how else put
        put(f"attn.{leaf}_proj", rows, HIDDEN, bias=bias, **how)
    return checkpoint


def rename(checkpoint):
    """Names as the fused layer's parent sees them: without the parent."""
    checkpoint.tensors = {k.removeprefix("attn."): t for k, t in checkpoint.tensors.items()}
    return checkpoint


LAYOUTS = {
    "16 bits": ({"rank": 16}, {"rank": 16}, {}),
    "one scheme": (
        {"rank": 32, "down": {"bits": 4}, "up": {"bits": 4}},
        {"rank": 16, "down": {"bits": 4}, "up": {"bits": 4}},
        {"bits": 4},
    ),
    "each its own": (
        {"rank": 32, "down": {"bits": 3}, "up": {"bits": 2, "symmetric": True}},
        {"rank": 16, "down": {"bits": 5}, "up": {"bits": 8}},
        {"bits": 7},
    ),
    "only k": ({"bits": 3}, {"rank": 16, "down": {"bits": 3}}, {"bits": 3}),
    "shared": (
        {"rank": 32, "down": {"bits": 4}, "up": {"bits": 4}},
        {"owner": "attn.q_proj", "up": {"bits": 4}},
        {"bits": 4},
    ),
    "shared, each its own": (
        {"rank": 32, "down": {"bits": 3}, "up": {"bits": 2, "symmetric": True}},
        {"owner": "attn.q_proj", "up": {"bits": 5}},
        {"bits": 7},
    ),
    "shared, 16 bits": ({"rank": 16}, {"owner": "attn.q_proj"}, {"bits": 2}),
    "dense, unequal": ({"bits": 2}, {"bits": 3}, {"bits": 4, "symmetric": True}),
    "dense, one of 16 bits": ({"bits": 2}, {"bits": 2}, {}),
}


@pytest.mark.parametrize("by_hand", [False, True], ids=["auto", "by hand"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("ranks", [1, 2, 8])  # 8 ranks share 2 kv heads
@pytest.mark.parametrize("layout", LAYOUTS)
def test_qkv(layout, ranks, bias, by_hand, on_rank):
    checkpoint = rename(add_qkv(Checkpoint(), *LAYOUTS[layout], bias=bias))
    x = torch.randn(3, HIDDEN)
    for rank in range(ranks):
        on_rank(rank, ranks)
        layer = checkpoint.load(qkv(checkpoint, bias), "qkv_proj", by_hand)
        assert isinstance(layer.quant_method, SplitLinearMethod)
        expected = []
        for leaf, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            y = x.double() @ checkpoint.weights[f"attn.{leaf}_proj"].t()
            if bias:
                key = f"{leaf}_proj.up.bias"
                key = key if key in checkpoint.tensors else f"{leaf}_proj.bias"
                y += checkpoint.tensors[key]
            here = max(1, heads // ranks)
            first = rank * heads // ranks
            expected.append(y[:, first * HEAD : (first + here) * HEAD])
        assert_close(layer(x)[0], torch.cat(expected, -1))


@pytest.mark.parametrize("ranks", [1, 2])
def test_gate_and_up_of_unequal_schemes(ranks, on_rank):
    checkpoint = Checkpoint().add("gate_proj", 96, HIDDEN, 3).add("up_proj", 96, HIDDEN, 2)
    x = torch.randn(3, HIDDEN)
    for rank in range(ranks):
        on_rank(rank, ranks)
        layer = MergedColumnParallelLinear(
            HIDDEN, [96, 96], False, quant_config=checkpoint.config(), prefix="gate_up_proj"
        )
        checkpoint.load(layer, "gate_up_proj")
        rows = slice(rank * 96 // ranks, (rank + 1) * 96 // ranks)
        halves = [x.double() @ checkpoint.weights[n].t() for n in ("gate_proj", "up_proj")]
        assert_close(layer(x)[0], torch.cat([half[:, rows] for half in halves], -1))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("rank_of_factors", [None, 16])
def test_column_parallel(rank_of_factors, ranks, on_rank):
    """40 rows of 3 bits: the zero points of a rank do not begin at a word."""
    checkpoint = Checkpoint()
    if rank_of_factors:
        parts = {"down": {"bits": 3}, "up": {"bits": 3}}
        checkpoint.factor("fc", 40, HIDDEN, rank_of_factors, bias=True, **parts)
    else:
        checkpoint.add("fc", 40, HIDDEN, 3, bias=True)
    x = torch.randn(3, HIDDEN)
    bias = next(t for k, t in checkpoint.tensors.items() if k.endswith("bias"))
    for rank in range(ranks):
        on_rank(rank, ranks)
        layer = ColumnParallelLinear(HIDDEN, 40, quant_config=checkpoint.config(), prefix="fc")
        checkpoint.load(layer, "fc")
        expected = x.double() @ checkpoint.weights["fc"].t() + bias
        assert_close(layer(x)[0], expected.chunk(ranks, -1)[rank])


def row_parallel(checkpoint):
    config = checkpoint.config()
    return RowParallelLinear(
        HIDDEN, 32, False, reduce_results=False, quant_config=config, prefix="o_proj"
    )


def summed_over_ranks(checkpoint, x, ranks, on_rank):
    """What a row-parallel layer gives before the ranks' sums are exchanged, added up."""
    total = 0
    for rank in range(ranks):
        on_rank(rank, ranks)
        layer = checkpoint.load(row_parallel(checkpoint), "o_proj")
        total += layer(x.chunk(ranks, -1)[rank])[0]
    return total


@pytest.mark.parametrize("ranks", [1, 2])
def test_row_parallel_factors(ranks, on_rank):
    parts = {"down": {"bits": 4}, "up": {"bits": 3}}
    checkpoint = Checkpoint().factor("o_proj", 32, HIDDEN, 16, **parts)
    x = torch.randn(3, HIDDEN)
    total = summed_over_ranks(checkpoint, x, ranks, on_rank)
    assert_close(total, x.double() @ checkpoint.weights["o_proj"].t())


def hadamard(x, block):
    """Slow and obvious: one block after the other, entries (-1)^popcount(i & j)."""
    signs = [[(-1) ** (i & j).bit_count() for j in range(block)] for i in range(block)]
    matrix = torch.tensor(signs, dtype=torch.float64) / block**0.5
    return torch.cat([part @ matrix for part in x.double().split(block, -1)], -1)


@pytest.mark.parametrize("up", [True, False], ids=["up as well", "not up"])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rotated_inputs_of_qkv(layout, ranks, up, on_rank):
    checkpoint = rename(add_qkv(Checkpoint(), *LAYOUTS[layout]))
    checkpoint.rotate(16, [] if up else ["re:.*proj[.]up$"])
    x = torch.randn(3, HIDDEN)
    for rank in range(ranks):
        on_rank(rank, ranks)
        layer = checkpoint.load(qkv(checkpoint), "qkv_proj")
        expected = []
        for leaf, rows in (("q", Q_ROWS), ("k", KV_ROWS), ("v", KV_ROWS)):
            name = f"attn.{leaf}_proj"
            if name in checkpoint.low_rank:
                owner = checkpoint.latent_of.get(name, name)
                latent = hadamard(x, 16) @ checkpoint.weights[f"{owner}.down"].t()
                latent = hadamard(latent, 16) if up else latent
                y = latent @ checkpoint.weights[f"{name}.up"].t()
            else:
                y = hadamard(x, 16) @ checkpoint.weights[name].t()
            expected.append(y[:, rank * rows // ranks : (rank + 1) * rows // ranks])
        assert_close(layer(x)[0], torch.cat(expected, -1))


@pytest.mark.parametrize("ranks", [1, 2])
def test_rotated_input_of_a_row_parallel_layer(ranks, on_rank):
    checkpoint = Checkpoint().add("o_proj", 32, HIDDEN, 4).rotate(16)
    x = torch.randn(3, HIDDEN)
    total = summed_over_ranks(checkpoint, x, ranks, on_rank)
    assert_close(total, hadamard(x, 16) @ checkpoint.weights["o_proj"].t())


def test_rotations_that_cannot_run(on_rank):
    with pytest.raises(ValueError, match=r"'v' is of type 'random-matrix': use transform_type"):
        Checkpoint().rotate(16, kind="random-matrix").config()
    checkpoint = Checkpoint().add("o_proj", 32, HIDDEN, 4).rotate(64)
    on_rank(0, 2)
    with pytest.raises(ValueError, match=r"32 columns cannot be rotated in blocks of 64"):
        row_parallel(checkpoint)


def test_equal_schemes_share_the_first_matmul():
    layers = {}
    for layout in LAYOUTS:
        layers[layout] = qkv(add_qkv(Checkpoint(), *LAYOUTS[layout]))
    matmuls = {layout: (len(each.first), len(each.second)) for layout, each in layers.items()}
    # "one scheme": KV_ROWS and ranks of 16 at 4 bits fill whole words; at 3 bits they do not
    assert matmuls == {
        "16 bits": (1, 2),
        "one scheme": (1, 2),
        "each its own": (3, 2),
        "only k": (3, 1),
        "shared": (1, 1),
        "shared, each its own": (2, 2),
        "shared, 16 bits": (2, 1),
        "dense, unequal": (3, 0),
        "dense, one of 16 bits": (2, 0),
    }


LAYOUTS_OF_ONE_SCHEME = {"dense, equal": ({"bits": 3}, {"bits": 3}, {"bits": 3})}


@pytest.mark.parametrize("layout", [*LAYOUTS, *LAYOUTS_OF_ONE_SCHEME])
def test_matmuls_that_kernels_are_compiled_for(layout):
    """Our own count, which `casp check` prints, against the layers. Groups of 16 need humming."""
    checkpoint = add_qkv(Checkpoint(), *(LAYOUTS | LAYOUTS_OF_ONE_SCHEME)[layout])
    schemes = [module.scheme for module in qkv(checkpoint).modules() if hasattr(module, "scheme")]
    made = set()
    for scheme in schemes:
        if isinstance(scheme, WNA16):
            columns, rows = scheme.kernel.config.partition_weight_shape
            made.add(Matmul(rows, columns, scheme.num_bits, GROUP, scheme.symmetric))
    linears = {}
    for group in checkpoint.groups.values():
        args = QuantizationArgs(**group["weights"])
        for name in group["targets"]:
            linears[name] = Linear(*checkpoint.tensors[f"{name}.weight_shape"].tolist(), args)
    section = Section(checkpoint.low_rank, checkpoint.latent_of)
    assert compiled_matmuls(linears, section) == made


def test_a_latent_from_another_layer_is_refused():
    checkpoint = Checkpoint().factor("other.q_proj", Q_ROWS, HIDDEN, 16)
    checkpoint.share("attn.k_proj", KV_ROWS, HIDDEN, "other.q_proj")
    with pytest.raises(ValueError, match=r"shares the latent of other\.q_proj.*casp fold"):
        qkv(checkpoint.add("attn.q_proj", Q_ROWS, HIDDEN).add("attn.v_proj", KV_ROWS, HIDDEN))


def test_stock_layers_stay_stock():
    checkpoint = add_qkv(Checkpoint(), {"bits": 4}, {"bits": 4}, {"bits": 4})
    assert type(qkv(checkpoint).quant_method) is CompressedTensorsLinearMethod


def test_nothing_of_the_loading_stays():
    checkpoint = rename(add_qkv(Checkpoint(), *LAYOUTS["each its own"]))
    layer = checkpoint.load(qkv(checkpoint), "qkv_proj")
    assert {name.split(".")[0] for name, _ in layer.named_parameters()} <= {"first", "second"}


def test_kernels_are_compiled_after_the_last_layer(on_cuda, monkeypatch):
    """Factors and dense shards alike, once. Their weights are loaded again without it."""
    on_cuda(90, humming=True)
    steps = []
    monkeypatch.setattr(
        vllm_humming.HummingLinearKernel,
        "process_weights_after_loading",
        lambda self, layer: steps.append("loaded"),
    )
    monkeypatch.setattr(warm_up, "_compile", lambda layers: steps.append(len(layers)))
    checkpoint = rename(add_qkv(Checkpoint(), *LAYOUTS["each its own"]))
    layer = checkpoint.load(qkv(checkpoint), "qkv_proj")
    assert steps == ["loaded"] * 5 + [5]
    layer.first[0].scheme.process_weights_after_loading(layer.first[0])
    assert steps == ["loaded"] * 5 + [5, "loaded"]


def test_incomplete_checkpoint():
    checkpoint = rename(add_qkv(Checkpoint(), *LAYOUTS["one scheme"]))
    del checkpoint.tensors["k_proj.up.weight_scale"]
    with pytest.raises(ValueError, match=r"lacks attn.k_proj.up.weight_scale"):
        checkpoint.load(qkv(checkpoint), "qkv_proj")


def test_dummy_weights():
    """vLLM's load format dummy loads nothing."""
    checkpoint = Checkpoint()
    add_qkv(checkpoint, *LAYOUTS["one scheme"])
    layer = qkv(checkpoint)
    checkpoint.tensors = {}
    checkpoint.load(layer, "qkv_proj")


def test_benchmark_script():
    """Tries it on a CPU with small layers; without --cpu it skips."""
    script = Path(__file__).parents[2] / "benchmarks" / "vllm_linear.py"
    small = ["--cpu", "--hidden", "128", "--intermediate", "256", "--heads", "4"]
    small += ["--group-size", "32", "--bits", "3", "--tokens", "1"]
    run = partial(subprocess.run, capture_output=True, text=True)
    done = run([sys.executable, script, *small])
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| gate_up_proj, 3 bits |" in done.stdout
    if not torch.cuda.is_available():
        assert "nothing measured" in run([sys.executable, script]).stderr


# --- config --------------------------------------------------------------------------------------


def test_register_is_idempotent():
    register()
    register()
    assert _POSSIBLE_KERNELS[PlatformEnum.CPU].count(CPULinearKernel) == 1
    assert _POSSIBLE_KERNELS[PlatformEnum.CPU].index(CPUWNA16LinearKernel) < _POSSIBLE_KERNELS[
        PlatformEnum.CPU
    ].index(CPULinearKernel)
    assert get_quantization_config("casp") is CaspConfig


def test_serving_needs_no_llm_compressor():
    assert find_spec("llmcompressor") is None


def test_commands_say_what_they_need(tmp_path):
    command = [Path(sys.executable).parent / "casp", "fold", tmp_path, tmp_path / "folded"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "casp-plugin[compress" in done.stderr.replace("\n", "")


def test_transformers_says_that_it_needs_another_version():
    """vLLM's compressed-tensors unpacks 3, 5, 6 and 7 bits in another way."""
    section = {"format": 1, "low_rank": {}}
    ours = CompressedTensorsConfig.from_dict(
        {"quant_method": "compressed-tensors", "casp": section}
    )
    with pytest.raises(ImportError, match=r"compressed-tensors>=0.19.*found 0.17"):
        CaspHfQuantizer(ours, pre_quantized=True).validate_environment()


def test_claims_only_its_own():
    stock = {"quant_method": "compressed-tensors", "config_groups": {}}
    assert CaspConfig.override_quantization_method(stock, None) is None
    ours = {**stock, "casp": {"format": 1, "low_rank": {}}}
    assert CaspConfig.override_quantization_method(ours, None) == "casp"


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("low_rank", [{}, {"model.layers.0.self_attn.q_proj": 16}])
def test_models_that_reorder_rows_are_refused(low_rank, symmetric):
    groups = {"g": {"targets": ["Linear"], "weights": {"symmetric": symmetric}}}
    section = {"format": 1, "low_rank": low_rank}
    ours = {"quant_method": "compressed-tensors", "config_groups": groups, "casp": section}
    claim = partial(CaspConfig.override_quantization_method, ours, None)
    assert claim(SimpleNamespace(architectures=["LlamaForCausalLM"])) == "casp"
    llama4 = SimpleNamespace(architectures=["Llama4ForCausalLM"])
    if symmetric and not low_rank:
        assert claim(llama4) == "casp"
    else:
        with pytest.raises(ValueError, match="Llama4ForCausalLM cannot be served with"):
            claim(llama4)


def test_connectors_that_vllm_keeps_dense_are_refused():
    name = "LlavaNextVideoForConditionalGeneration"
    for target, refused in (("multi_modal_projector.linear_1", True), ("language_model.x", False)):
        group = {"targets": [f"model.{target}"], "weights": {"symmetric": True}}
        why = refusal([name], {"config_groups": {"g": group}})
        assert (why is not None) == refused
        assert not refused or "leave it out of the modifiers' components" in why


def test_all_models_that_reorder_rows_are_known():
    """Search vLLM's sources for the function that does it."""
    folder = Path(models.__file__).parent
    found = {f.stem for f in folder.glob("*.py") if "permute_qk_weight_for" in f.read_text()}
    registered = models.ModelRegistry.models.items()
    names = {a for a, model in registered if model.module_name.rpartition(".")[2] in found}
    assert len(names) >= 2
    factored = {"casp": {"format": 1, "low_rank": {"model.layers.0.self_attn.q_proj": 16}}}
    assert all(refusal([name], factored) for name in names)


@pytest.mark.parametrize(
    ("section", "message"),
    [("oops", "malformed"), ({"format": 9, "low_rank": {}}, "upgrade casp-plugin")],
)
def test_malformed_section(section, message):
    with pytest.raises(ValueError, match=message):
        CaspConfig.from_config({"quant_method": "compressed-tensors", "casp": section})


def test_layers_that_no_model_layer_takes(monkeypatch):
    """Layers that vLLM fuses in a way of its own, say. A part that it did not build is no error."""
    checkpoint = rename(add_qkv(Checkpoint(), *LAYOUTS["one scheme"]))
    checkpoint.low_rank |= {"attn.z_proj": 16, "vision_tower.fc1": 16}
    current = SimpleNamespace(model_config=SimpleNamespace(architectures=["SomeForCausalLM"]))
    layer = qkv(checkpoint)
    monkeypatch.setattr(config, "get_current_vllm_config", lambda: current)
    with pytest.raises(ValueError, match=r"SomeForCausalLM.* 1 layers .*\(attn.z_proj\)"):
        checkpoint.load(layer, "qkv_proj")


@pytest.mark.parametrize("layout", ["one scheme", "each its own", "dense, equal"])
def test_model_that_does_not_say_what_it_fuses(layout):
    layouts = {**LAYOUTS, "dense, equal": ({"bits": 4}, {"bits": 4}, {"bits": 4})}
    checkpoint = rename(add_qkv(Checkpoint(), *layouts[layout]))
    checkpoint.fused = {}
    layer = checkpoint.load(qkv(checkpoint), "qkv_proj")
    x = torch.randn(3, HIDDEN)
    weights = [checkpoint.weights[f"attn.{leaf}_proj"] for leaf in "qkv"]
    assert_close(layer(x)[0], x.double() @ torch.cat(weights).t())
