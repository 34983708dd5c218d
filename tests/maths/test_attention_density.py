"""Densities of attention maps against loops over their entries."""

import math

import pytest
import torch

from casp_plugin.maths.attention_density import density, entropy_density, visible


def maps(batch=2, heads=3, tokens=6, mask=None):
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(batch, heads, tokens, tokens, generator=generator)
    seen = visible(scores, mask)
    attention = scores.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0)
    return attention.double(), seen


PADDED = torch.tensor([[True] * 6, [False, False, True, True, True, True]])


@pytest.mark.parametrize("mask", [None, PADDED])
def test_against_loops(mask):
    attention, seen = maps(mask=mask)
    for head in range(3):
        above, count, shares = 0, 0, []
        for b in range(2):
            for i in range(6):
                keys = [j for j in range(i + 1) if mask is None or (mask[b, i] and mask[b, j])]
                if not keys:
                    continue
                row = [attention[b, head, i, j].item() for j in keys]
                above += sum(value > 0.05 for value in row)
                count += len(row)
                entropy = -sum(value * math.log(value) for value in row if value > 0)
                shares.append(math.exp(entropy) / len(row))
        assert density(attention, seen, 0.05)[head].item() == pytest.approx(above / count)
        found = entropy_density(attention, seen)[head].item()
        assert found == pytest.approx(sum(shares) / len(shares))


def test_extremes():
    """A query that looks at one key, and one that looks at all alike."""
    tokens = 4
    seen = visible(torch.zeros(1, 1, tokens, tokens))
    one = torch.zeros(1, 1, tokens, tokens)
    one[..., 0] = 1
    even = seen / seen.sum(-1, keepdim=True)
    expected = sum(1 / (i + 1) for i in range(tokens)) / tokens
    assert entropy_density(one, seen).item() == pytest.approx(expected)
    assert entropy_density(even, seen).item() == pytest.approx(1)
    assert density(one, seen, 0.01).item() == pytest.approx(tokens / (tokens * (tokens + 1) / 2))
    assert density(even, seen, 0.01).item() == 1


def test_queries_of_a_step_see_all_keys_before():
    steps = torch.zeros(1, 1, 2, 5)
    assert visible(steps)[0, 0].sum(-1).tolist() == [4, 5]
    assert visible(steps, allowed=False)[0, 0].sum(-1).tolist() == [5, 5]


def test_masks_that_attention_ran_with():
    """A window of two keys, as bool and as what is added to the scores."""
    window = torch.tensor([[i - 2 < j <= i for j in range(5)] for i in range(5)])[None, None]
    added = torch.zeros(1, 1, 5, 5).masked_fill(~window, torch.finfo(torch.float32).min)
    for allowed in (window, added):
        seen = visible(torch.zeros(2, 3, 5, 5), allowed=allowed)
        assert seen.shape == (2, 1, 5, 5)
        assert torch.equal(seen, window.expand(2, 1, 5, 5))
