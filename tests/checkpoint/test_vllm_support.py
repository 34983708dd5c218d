"""How much vLLM on CUDA compiles for a checkpoint; tests/runtime compares with vLLM's layers."""

from casp_plugin.checkpoint.format import Section
from casp_plugin.checkpoint.vllm_support import Linear, Matmul, compiled_matmuls, dense
from casp_plugin.model.schemes import weight_args

HIDDEN, INTERMEDIATE = 4096, 11008


def llama(widths, ranks):
    """Linears of a 7B shape and the section, where q and k of a layer share a latent.

    :param widths: bits of q and k, v, o, gate, up, down, by layer
    :param ranks: rank of q and k, by layer; None for dense ones
    """
    linears, section = {}, Section()

    def add(name, rows, columns, bits):
        linears[name] = Linear(rows, columns, weight_args(bits, 128))

    for number, ((qk, v, o, gate, up, down), rank) in enumerate(zip(widths, ranks, strict=True)):
        q, k = (f"layers.{number}.self_attn.{leaf}_proj" for leaf in "qk")
        if rank is None:
            add(q, HIDDEN, HIDDEN, qk)
            add(k, HIDDEN, HIDDEN, qk)
        else:
            section.ranks.update({q: rank, k: rank})
            section.latent_of[k] = q
            add(f"{q}.down", rank, HIDDEN, qk)
            add(f"{q}.up", HIDDEN, rank, qk)
            add(f"{k}.up", HIDDEN, rank, qk)
        add(f"layers.{number}.self_attn.v_proj", HIDDEN, HIDDEN, v)
        add(f"layers.{number}.self_attn.o_proj", HIDDEN, HIDDEN, o)
        add(f"layers.{number}.mlp.gate_proj", INTERMEDIATE, HIDDEN, gate)
        add(f"layers.{number}.mlp.up_proj", INTERMEDIATE, HIDDEN, up)
        add(f"layers.{number}.mlp.down_proj", HIDDEN, INTERMEDIATE, down)
    return linears, section


def shapes(linears, section):
    return {matmul[:3] for matmul in compiled_matmuls(linears, section)}


ONE_WIDTH = {(12288, 4096, 2), (4096, 4096, 2), (22016, 4096, 2), (4096, 11008, 2)}


def test_one_width():
    """The number of layers does not matter."""
    for layers in (1, 32):
        linears, section = llama([[2] * 6] * layers, [None] * layers)
        assert shapes(linears, section) == ONE_WIDTH
    assert compiled_matmuls(linears, section) >= {Matmul(4096, 4096, 2, 128, False)}


def test_mixed_widths_and_factors():
    linears, section = llama([[2, 2, 3, 2, 2, 3], [2, 3, 3, 2, 3, 3]], [512, 1024])
    assert shapes(linears, section) == {
        (512 + 4096, 4096, 2),  # down factor and v
        (8192, 512, 2),  # up factors of q and k
        (1024, 4096, 2),  # down factor; v of another width
        (8192, 1024, 2),
        (4096, 4096, 3),  # v of the second layer, o of both
        (22016, 4096, 2),  # gate and up
        (11008, 4096, 2),  # gate alone
        (11008, 4096, 3),
        (4096, 11008, 3),
    }
    assert shapes(dense(linears, section), Section()) == ONE_WIDTH


def test_widths_with_kernels_in_the_box():
    linears, section = llama([[4, 4, 2, 4, 4, 4]], [512])
    assert shapes(linears, section) == {(4096, 4096, 2)}
    assert shapes(dense(linears, section), Section()) == ONE_WIDTH
    assert not compiled_matmuls(*llama([[4] * 6], [512]))
