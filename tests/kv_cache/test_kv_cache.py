"""Keys and values in few bits: codes, caches, and models that run with them."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny_vlms
from support.tiers import tiered
from support.tiny_models import save_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from casp_plugin.kv_cache import CacheScheme, CompressedCache, with_kv_cache
from casp_plugin.kv_cache.cache import CompressedLayer
from casp_plugin.kv_cache.quantization import encode, pack, unpack
from casp_plugin.kv_cache.schemes import TensorScheme

SCHEMES = [
    "uniform:bits=4,g=8",
    "outlier_reduced:bits=2,g=8,s=0.05",
    "per_channel:bits=3,g=8",
    "per_token:bits=4,g=8,residual=8",
    "kcvt:bits=2,g=8",
    "kcvt:k_bits=3,v_bits=8,k_g=4,v_g=16,residual=8",
    "ktvc:k_bits=8,v_bits=16,k_g=4,v_g=8",
]


def states(tokens=24, seed=0, heads=2, channels=16, sequences=2, dtype=torch.float32):
    """Keys and values, with channels that are larger than others."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, sequences, heads, tokens, channels)
    found = torch.randn(shape, generator=generator) * torch.logspace(-2, 2, channels) + 1
    return found.to(dtype).unbind()


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    rows=st.integers(1, 3),
    count=st.integers(1, 70),
    seed=st.integers(0, 99),
)
def test_packing_is_exact_and_dense(bits, rows, count, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, count), generator=generator, dtype=torch.uint8)
    planes = pack(codes, bits)
    assert torch.equal(unpack(planes, bits, count), codes)
    if count % 8 == 0:
        assert sum(plane.nbytes for plane in planes) * 8 == rows * count * bits


def slow_groups(values, scheme):
    """Places of every group's values, one group after the other."""
    sequences, heads, tokens, channels = values.shape
    size = scheme.group
    for b in range(sequences):
        if scheme.axis == "tensor":
            for t in range(0, tokens, size or tokens):
                yield [b], range(heads), range(t, t + (size or tokens)), range(channels)
            continue
        for h in range(heads):
            if scheme.axis == "channel":
                for t in range(0, tokens, size or tokens):
                    for c in range(channels):
                        yield [b], [h], range(t, t + (size or tokens)), [c]
            else:
                for t in range(tokens):
                    for c in range(0, channels, size or channels):
                        yield [b], [h], [t], range(c, c + (size or channels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("axis", ["tensor", "channel", "token"])
@pytest.mark.parametrize("group", [8, None])
def test_codes_are_those_of_the_formula(axis, group, bits, dtype):
    """Against a loop over groups in float64; the error is half a step at most."""
    scheme = TensorScheme(bits=bits, axis=axis, group=group)
    values = states(dtype=dtype)[0]
    found = encode(values, scheme).decode(torch.float64)
    for places in slow_groups(values, scheme):
        where = torch.meshgrid(*map(torch.tensor, map(list, places)), indexing="ij")
        group_values = values[where].double()
        low = group_values.min()
        delta = (group_values.max() - low) / (2**bits - 1)
        expected = low + ((group_values - low) / delta).round() * delta
        error = (found[where] - group_values).abs().max()
        assert error <= delta / 2 * 1.01 + group_values.abs().max() * 2e-3 * (
            dtype != torch.float32
        )
        if dtype == torch.float32:
            torch.testing.assert_close(found[where], expected, rtol=1e-4, atol=1e-4 * delta.item())


@settings(deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    axis=st.sampled_from(["tensor", "channel", "token"]),
    scale=st.floats(-6, 4),
    shift=st.floats(-1e4, 1e4),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_error_is_half_a_step_at_most(bits, axis, scale, shift, dtype, seed):
    """Of the step that is stored, whatever is lost in storing it."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(1, 2, 8, 16, generator=generator) * 10**scale + shift
    values = values.to(dtype)
    codes = encode(values, TensorScheme(bits=bits, axis=axis, group=8))
    step = codes.delta.float().max()
    error = (codes.decode(torch.float32) - values.float()).abs().max()
    assert error <= step / 2 * (1 + 1e-4) + values.float().abs().max() * 1e-6


def test_constant_groups_come_back():
    values = torch.full((1, 1, 8, 8), 0.5)
    codes = encode(values, TensorScheme(bits=2, axis="channel", group=8))
    torch.testing.assert_close(codes.decode(torch.float32), values)


def test_outliers_stay_and_narrow_the_range():
    values = torch.randn(2, 2, 8, 16, generator=torch.Generator().manual_seed(0))
    values[:, 0, 3, 5] = 1000
    scheme = TensorScheme(bits=4, axis="tensor", group=8)
    kept = scheme.model_copy(update={"outliers": 1 / 256})
    without, beside = encode(values, scheme), encode(values, kept)
    assert torch.equal(beside.decode(torch.float32)[:, 0, 3, 5], values[:, 0, 3, 5])
    assert beside.delta.max() < 0.01 * without.delta.max()


def layer_of(name):
    return CompressedLayer(CacheScheme.parse(name))


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(SCHEMES),
    cuts=st.lists(st.integers(1, 40), max_size=6, unique=True),
)
def test_any_chunks_give_the_same_cache(name, cuts):
    keys, values = states(tokens=41)
    whole, parts = layer_of(name), layer_of(name)
    whole.update(keys, values)
    edges = [0, *sorted(cuts), 41]
    for start, end in itertools.pairwise(edges):
        parts.update(keys[:, :, start:end], values[:, :, start:end])
    assert whole.nbytes == parts.nbytes
    for ours, theirs in zip(whole.decode(), parts.decode(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", SCHEMES)
def test_what_a_call_brings_is_seen_exactly(name):
    keys, values = states(tokens=24)
    layer = layer_of(name)
    first = layer.update(keys[:, :, :20], values[:, :, :20])
    assert torch.equal(first[0], keys[:, :, :20])
    seen = layer.update(keys[:, :, 20:], values[:, :, 20:])[0]
    assert torch.equal(seen[:, :, 16:], keys[:, :, 16:])  # waited, or new
    assert layer.scheme.keys.bits == 16 or not torch.equal(seen[:, :, :16], keys[:, :, :16])


@pytest.mark.parametrize("name", ["uniform:bits=4", "per_channel:bits=2,g=N,residual=8"])
def test_scales_of_a_whole_prompt(name):
    """The prompt is one group of any length, later tokens are groups of the residual."""
    keys, values = states(tokens=41, channels=16)
    layer = layer_of(name)
    layer.update(keys[:, :, :21], values[:, :, :21])
    [(stored, _)] = layer.stored
    assert stored.tokens == 21
    assert layer.keys.shape[2] == 0
    assert stored.low.shape[1] == (1 if name.startswith("uniform") else 2 * 16)
    for token in range(21, 41):
        layer.update(keys[:, :, token : token + 1], values[:, :, token : token + 1])
    waiting = 20 % layer.scheme.residual
    assert layer.keys.shape[2] == waiting
    assert sum(pair[0].tokens for pair in layer.stored) == 41 - waiting


def test_bytes_are_what_codes_and_scales_take():
    keys, values = states(tokens=256, channels=64, dtype=torch.float16)
    layer = layer_of("kcvt:bits=2,g=64,residual=128")
    layer.update(keys, values)
    count = keys.numel()
    codes, scales = 2 * count * 2 // 8, 2 * 4 * count // 64
    assert layer.nbytes == codes + scales
    assert layer.nbytes < 0.16 * (keys.nbytes + values.nbytes)


@pytest.mark.parametrize(
    "name", [each for each in SCHEMES if not CacheScheme.parse(each).by_prompt]
)
def test_appending_takes_no_longer_with_length(name):
    """Stored codes move once, when sixteen pieces become one, and say the same as before."""
    layer = layer_of(name)
    tokens = layer.scheme.residual
    keys, values = states(tokens=40 * tokens)
    whole = layer_of(name)
    whole.update(keys, values)
    for piece in zip(keys.split(tokens, dim=2), values.split(tokens, dim=2), strict=True):
        layer.update(*piece)
        if layer.cumulative_length == 16 * tokens:
            first = layer.stored[0]
    assert layer.stored[0] is first
    assert [pair[0].tokens for pair in layer.stored] == [16 * tokens, 16 * tokens] + 8 * [tokens]
    assert layer.nbytes == whole.nbytes
    for ours, theirs in zip(layer.decode(), whole.decode(), strict=True):
        assert torch.equal(ours, theirs)


def test_codes_that_end_inside_a_byte_stay_apart():
    keys, values = states(tokens=40, heads=1, channels=3)
    layer, whole = layer_of("kcvt:bits=3,g=1,residual=1"), layer_of("kcvt:bits=3,g=1,residual=1")
    whole.update(keys, values)
    for piece in zip(keys.split(1, dim=2), values.split(1, dim=2), strict=True):
        layer.update(*piece)
    assert len(layer.stored) == 40
    for ours, theirs in zip(layer.decode(), whole.decode(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("change", ["reorder_cache", "batch_select_indices"])
def test_beams(change):
    keys, values = states(tokens=20, sequences=3)
    order = torch.tensor([2, 0, 0])
    layer, other = layer_of("kcvt:bits=2,g=8"), layer_of("kcvt:bits=2,g=8")
    layer.update(keys, values)
    getattr(layer, change)(order)
    other.update(keys[order], values[order])
    for ours, theirs in zip(layer.decode(), other.decode(), strict=True):
        assert torch.equal(ours, theirs)
    layer.batch_repeat_interleave(2)
    for ours, theirs in zip(layer.decode(), other.decode(), strict=True):
        assert torch.equal(ours, theirs.repeat_interleave(2, dim=0))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("kivi", "'kivi' must be one of uniform"),
        ("kcvt:bits=5", "Input should be 2, 3, 4, 8 or 16"),
        ("kcvt:bits=4.5", "bits='4.5' must be a number"),
        ("kcvt:g", "g='' must be a number"),
        ("kcvt:g=inf", "g='inf' must be a number"),
        ("kcvt:group=4", "no option 'group'; there are bits, k_bits"),
        ("kcvt:s=0.1", "no option 's'"),
        ("kcvt:g=48,residual=128", "do not divide the residual of 128"),
        ("kcvt:g=0", "greater than or equal to 1"),
        ("kcvt:residual=0", "greater than or equal to 1"),
        ("outlier_reduced:s=1.5", "less than 1"),
        ("outlier_reduced:s=nan", "than"),
        ("per_channel:k_g=N,v_g=8", "both be N"),
    ],
)
def test_bad_schemes(text, why):
    with pytest.raises(ValueError, match=why):
        CacheScheme.parse(text)


FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "gemma3_text": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
}


@pytest.fixture(params=FAMILIES)
def model(request, tmp_path):
    folder = save_tiny_model(tmp_path / "in", request.param, **FAMILIES[request.param])
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def ids_of(*lengths):
    """Sequences that are padded on the left, and their mask."""
    generator = torch.Generator().manual_seed(0)
    longest = max(lengths)
    ids = torch.randint(3, 90, (len(lengths), longest), generator=generator)
    mask = torch.stack([(torch.arange(longest) >= longest - n).long() for n in lengths])
    return ids, mask


def generated(model, ids, mask, cache, **settings):
    settings = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, **settings}
    if cache is not None:
        settings["past_key_values"] = cache
    return model.generate(input_ids=ids, attention_mask=mask, **settings)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generate_at_16_bits_is_that_of_the_model(model, settings):
    """Padding, beams and windows go right: only codes are another thing."""
    ids, mask = ids_of(37, 21)
    cache = CompressedCache(model.config, "kcvt:bits=16,g=8")
    expected = generated(model, ids, mask, None, **settings)
    assert torch.equal(generated(model, ids, mask, cache, **settings), expected)


def test_generate_at_8_bits_is_near(model):
    ids, mask = ids_of(37, 21)
    cache = CompressedCache(model.config, "kcvt:bits=8,g=8")
    expected = generated(model, ids, mask, None)
    same = generated(model, ids, mask, cache) == expected
    assert same[:, ids.shape[1] :].float().mean() > 0.7
    assert cache.get_seq_length() == ids.shape[1] + 23


def test_windows_let_go(model):
    ids, mask = ids_of(60)
    cache = CompressedCache(model.config, "kcvt:bits=4,g=8")
    generated(model, ids, mask, cache)
    for layer in cache.layers:
        held = layer.cumulative_length - layer.dropped
        assert held <= 16 - 1 + 8 if layer.is_sliding else held == 60 + 23


def test_static_prompts_are_copied(model):
    ids, mask = ids_of(24)
    prompt = CompressedCache(model.config, "kcvt:bits=4,g=8")
    with torch.no_grad():
        model(ids[:, :20], past_key_values=prompt)
    expected = generated(model, ids, mask, copy.deepcopy(prompt))
    assert torch.equal(generated(model, ids, mask, copy.deepcopy(prompt)), expected)
    assert prompt.get_seq_length() == 20


def test_assisted_generation_is_refused():
    with pytest.raises(ValueError, match="cannot give tokens back"):
        layer_of("kcvt:bits=4,g=8").crop(-1)


def test_encoders_are_refused():
    with pytest.raises(ValueError, match="not for encoder-decoder"):
        CompressedCache(AutoConfig.for_model("t5"), "kcvt")


def test_layers_of_another_kind_are_refused():
    config = AutoConfig.for_model("falcon_h1")
    with pytest.raises(ValueError, match="layers of type 'hybrid' cannot take it"):
        CompressedCache(config, "kcvt")


@torch.no_grad()
@pytest.mark.parametrize("name", ["kcvt:bits=2,g=8", "per_token:bits=3,g=8,residual=4"])
def test_plain_calls_are_those_of_decoding(model, name):
    """Token by token by hand, and in one call."""
    ids, _ = ids_of(41)
    cache = CompressedCache(model.config, name)
    slow = torch.cat([model(ids[:, [t]], past_key_values=cache).logits for t in range(41)], dim=1)
    dense = model(ids).logits
    with with_kv_cache(model, name):
        fast = model(ids).logits
        padded = model(torch.cat([ids, ids], 0), attention_mask=torch.ones(2, 41)).logits
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(padded[1:], slow, rtol=1e-4, atol=1e-4)
    assert (fast - dense).abs().max() > 1e-3
    assert torch.equal(model(ids).logits, dense)  # as before


@torch.no_grad()
def test_the_first_step_shares_its_scales(model):
    """And what follows is read as decoding would."""
    name = "per_channel:bits=2,g=N,residual=8"
    ids, _ = ids_of(41)
    cache = CompressedCache(model.config, name)
    steps = [ids[:, :8], *ids[:, 8:].split(1, dim=1)]
    slow = torch.cat([model(step, past_key_values=cache).logits for step in steps], dim=1)
    with with_kv_cache(model, name):
        fast = model(ids).logits
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_padding_of_plain_calls(model):
    ids, mask = ids_of(24, 15)
    right = torch.stack([row.roll(int(seen.sum())) for row, seen in zip(ids, mask, strict=True)])
    with with_kv_cache(model, "kcvt:bits=2,g=8"):
        alone = model(ids[1:, -15:]).logits
        batch = model(right, attention_mask=mask.flip(1)).logits
        torch.testing.assert_close(batch[1:, :15], alone, rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="padding on the right only"):
            model(ids, attention_mask=mask)


@torch.no_grad()
def test_generate_inside(model):
    ids, mask = ids_of(30)
    expected = generated(model, ids, mask, CompressedCache(model.config, "kcvt:bits=2,g=8"))
    with with_kv_cache(model, "kcvt:bits=2,g=8"):
        assert torch.equal(generated(model, ids, mask, None), expected)
    with with_kv_cache(model, None):
        assert math.isfinite(model(ids).logits.sum())


@pytest.mark.parametrize(
    "more", [{"labels": torch.ones(1, 10).long()}, {"logits_to_keep": 1}, {"return_dict": False}]
)
def test_other_inputs_of_plain_calls_are_refused(model, more):
    ids, _ = ids_of(10)
    message = f"reads tokens alone, not {next(iter(more))}; generate takes them"
    with with_kv_cache(model, "kcvt"), pytest.raises(ValueError, match=message):
        model(ids, **more)


@torch.no_grad()
def test_what_says_nothing_is_taken(model):
    ids, mask = ids_of(20)
    with with_kv_cache(model, "kcvt:bits=2,g=8"):
        expected = model(ids).logits
        found = model(ids, past_key_values=None, use_cache=False, logits_to_keep=0, labels=None)
        assert torch.equal(found.logits, expected)
        by_cache = generated(model, ids, mask, None, past_key_values=None)
        with pytest.raises(ValueError, match="asked to use no cache"):
            generated(model, ids, mask, None, use_cache=False)
    cache = CompressedCache(model.config, "kcvt:bits=2,g=8")
    assert torch.equal(by_cache, generated(model, ids, mask, cache))


def test_groups_that_do_not_fit_a_head_are_refused_at_once():
    config = AutoConfig.for_model("llama", hidden_size=80, num_attention_heads=4, head_dim=20)
    CompressedCache(config, "kcvt:bits=2,g=10")
    CompressedCache(config, "kcvt:k_bits=2,v_bits=16,g=16")
    with pytest.raises(ValueError, match="groups of 16 channels do not divide the 20 of a head"):
        CompressedCache(config, "kcvt:bits=2,g=16")


def test_images_that_are_attended_to_apart_are_refused():
    with pytest.raises(ValueError, match="attend to images apart"):
        CompressedCache(AutoConfig.for_model("mllama"), "kcvt")


@torch.no_grad()
@pytest.mark.parametrize("family", tiered(tiny_vlms.FAMILIES, "llava", "qwen2_vl"))
def test_prompts_with_images(tmp_path, family):
    tiny_vlms.save_tiny_vlm(tmp_path, family)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.tensor([[*tiny_vlms.image_prompt(family, expanded=True), *range(20, 50)]])
    inputs = {"attention_mask": torch.ones_like(ids), **tiny_vlms.image_inputs(tmp_path, family)}
    inputs.pop("num_crops", None)  # of calls alone
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    settings |= {"output_logits": True, "return_dict_in_generate": True}

    def logits(cache):
        chosen = {"past_key_values": CompressedCache(model.config, cache)} if cache else {}
        return torch.cat(model.generate(input_ids=ids, **inputs, **settings, **chosen).logits)

    dense, same, rounded = map(logits, (None, "kcvt:bits=16,g=8", "kcvt:bits=2,g=8"))
    torch.testing.assert_close(same, dense, rtol=1e-3, atol=1e-3)
    assert torch.isfinite(rounded).all()
    assert torch.allclose(rounded[0], dense[0], rtol=1e-3, atol=1e-3)  # the prompt sees itself
    assert not torch.allclose(rounded[1], dense[1], atol=1e-3)
    with with_kv_cache(model, "kcvt:bits=2,g=8"):
        assert torch.equal(logits(None), rounded)
        if "pixel_values" in inputs:
            with pytest.raises(ValueError, match=r"not .*pixel_values.*; generate takes them"):
                model(input_ids=ids, **inputs)
