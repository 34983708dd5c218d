"""Every family that transformers builds is compressed and comes back, or is refused before the data
runs. Some belong to `make test`, more to `make test-models`; the rest run with `-m families`, or in
processes by `benchmarks/families.py`."""

import pytest
from support.families import NOT_BUILT, RECIPES, families, has_query_and_key, outcome

#: plain with ranks, linears that are none, recurrent layers, refused
QUICK = {("llama", "R"), ("gpt2", "B"), ("mamba", "B"), ("llama4_text", "B")}
#: one of each kind: plain, linears that are none, buffers that are not stored, experts, routers,
#: layers that share, recurrent layers, vision-language models
KINDS = {
    "falcon": "B",
    "gemma3_text": "B",
    "gemma3n_text": "B",
    "gpt2": "B",
    "gpt_neo": "BR",
    "gpt_oss": "B",
    "gptj": "BR",
    "llama": "BR",
    "llama4_text": "B",
    "llava": "BR",
    "mamba": "B",
    "mixtral": "B",
    "opt": "BR",
    "phimoe": "B",
    "qwen2_vl": "B",
    "qwen3_moe": "BR",
}


def _cases():
    for family in families():
        for recipe in RECIPES:
            tier = "models" if recipe in KINDS.get(family, "") else "families"
            marks = () if (family, recipe) in QUICK else getattr(pytest.mark, tier)
            yield pytest.param(family, recipe, marks=marks)


@pytest.mark.parametrize(("family", "recipe"), _cases())
def test_compressed_or_refused(family, recipe, tmp_path):
    if recipe == "R" and not has_query_and_key(family):
        pytest.skip("no layers q_proj and k_proj")
    found = outcome(family, RECIPES[recipe], tmp_path)
    if family in NOT_BUILT and found.kind == "cannot be built":
        pytest.skip(NOT_BUILT[family])
    assert found.kind in ("compressed", "refused"), f"{found.detail}\n{found.trace}"
