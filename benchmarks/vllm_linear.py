"""Time the linear layers of one decoder layer as vLLM with this plugin runs them, against bf16.

Runs where vLLM and casp-plugin are installed, on a GPU with `humming-kernels` for 2 and 3 bits:

    python benchmarks/vllm_linear.py --table benchmarks/results/vllm_linear.md

The default shapes are those of LLaVA-1.5-7B. Weights are random: no download. Layers are captured
in a CUDA graph, as in vLLM, and both sides are timed in one process.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from torch.utils.benchmark import Timer


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--keep", type=float, default=0.25, help="share of q/k parameters kept")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 1024])
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--cpu", action="store_true", help="run on a CPU: tries the script only")
    parser.add_argument("--table", type=Path, help="write a Markdown table here")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    if not torch.cuda.is_available() and not given.cpu:
        sys.exit("no CUDA device: nothing measured")
    rows = measure(given)
    lines = [described(given), "", header(given), "|---" * (1 + len(given.tokens)) + "|", *rows]
    print("\n".join(lines))
    if given.table:
        given.table.write_text("\n".join(lines) + "\n")


def measure(given: argparse.Namespace) -> list[str]:
    """Return a table row for every layer and width: time of bf16 over time at that width."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    from casp_plugin.runtime.vllm import register

    register()
    device = torch.device("cpu" if given.cpu else "cuda")
    rows = []
    with set_current_vllm_config(VllmConfig()), tempfile.TemporaryDirectory() as folder:
        backend = "gloo" if given.cpu else "nccl"
        init_distributed_environment(1, 0, f"file://{folder}/store", 0, backend)
        initialize_model_parallel(1, 1)
        for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
            times = {}
            for bits in (None, *given.bits):
                linear = layer(name, bits, given, device)
                for tokens in given.tokens:
                    x = torch.randn(tokens, linear.input_size, dtype=torch.bfloat16, device=device)
                    times[bits, tokens] = seconds(linear, x)
                del linear
            for bits in given.bits:
                ratios = [times[None, n] / times[bits, n] for n in given.tokens]
                cells = " | ".join(f"{ratio:.2f}" for ratio in ratios)
                rows.append(f"| {name}, {bits} bits | {cells} |")
            cells = " | ".join(f"{times[None, n] * 1e6:.1f} us" for n in given.tokens)
            rows.append(f"| {name}, bf16 | {cells} |")
    return rows


def layer(name: str, bits: int | None, given: argparse.Namespace, device: torch.device):
    """Return a linear of vLLM with random weights, ready to run; ``bits`` None for 16."""
    from vllm.model_executor.layers.linear import (
        MergedColumnParallelLinear,
        QKVParallelLinear,
        RowParallelLinear,
    )

    hidden, wide, heads = given.hidden, given.intermediate, given.heads
    settings = {"bias": False, "params_dtype": torch.bfloat16, "prefix": name}
    settings["quant_config"] = None if bits is None else config(bits, given)
    with device:
        if name == "qkv_proj":
            made = QKVParallelLinear(hidden, hidden // heads, heads, **settings)
        elif name == "gate_up_proj":
            made = MergedColumnParallelLinear(hidden, [wide, wide], **settings)
        else:
            made = RowParallelLinear(hidden if name == "o_proj" else wide, hidden, **settings)
    for module in made.modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dtype == torch.int32:
                parameter.data.random_()
            elif parameter.is_floating_point():
                parameter.data.normal_(std=0.01)
            elif key == "weight_shape" and parameter.numel():
                parameter.data.copy_(torch.tensor([module.output_size, module.input_size]))
        if method := getattr(module, "quant_method", None):
            method.process_weights_after_loading(module)
    return made


def config(bits: int, given: argparse.Namespace):
    """Return a config of one width everywhere, with q and k as two factors."""
    from casp_plugin.maths.low_rank import uniform_rank
    from casp_plugin.runtime.config import CaspConfig

    weights = {"num_bits": bits, "type": "int", "symmetric": given.symmetric}
    weights |= {"strategy": "group", "group_size": given.group_size}
    rank = uniform_rank(given.hidden, given.hidden, given.keep, given.group_size)
    made = CaspConfig.from_config(
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
            "casp": {"format": 1, "low_rank": {"q_proj": rank, "k_proj": rank}},
        }
    )
    made.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    return made


@torch.no_grad()
def seconds(linear: torch.nn.Module, x: torch.Tensor) -> float:
    """Return the median time of a call."""
    for _ in range(3):  # the first call compiles
        linear(x)
    run = linear
    if x.is_cuda:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            linear(x)

        def run(_):
            graph.replay()

    timer = Timer("run(x)", globals={"run": run, "x": x})
    return timer.blocked_autorange(min_run_time=0.5).median


def header(given: argparse.Namespace) -> str:
    return "| layer | " + " | ".join(f"{n} tokens" for n in given.tokens) + " |"


def described(given: argparse.Namespace) -> str:
    import vllm

    where = "CPU" if given.cpu else torch.cuda.get_device_name()
    zeros = "symmetric" if given.symmetric else "asymmetric"
    return (
        f"Time of bf16 over time of the packed layer (above 1: faster), and bf16's own. {where}, "
        f"vLLM {vllm.__version__}, torch {torch.__version__}; hidden {given.hidden}, intermediate "
        f"{given.intermediate}, {given.heads} heads, keep {given.keep}, groups of "
        f"{given.group_size}, {zeros}, random weights."
    )


if __name__ == "__main__":
    main()
