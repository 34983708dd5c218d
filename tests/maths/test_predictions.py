"""Divergence from predictions of which few entries are kept, against all of them in float64."""

import pytest
import torch

from casp_plugin.maths.predictions import divergence, top_predictions


def logits(seed, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(7, 50, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("kept", [50, 80])
def test_all_entries_give_the_divergence_itself(kept):
    wanted, found = logits(0), logits(1)
    exact = torch.nn.functional.kl_div(
        found.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    found = divergence(top_predictions(wanted, kept), found)
    assert found.item() == pytest.approx(exact.item(), rel=1e-4)


def test_the_rest_counts_as_one_event():
    wanted, found, kept = logits(0).softmax(-1), logits(1).softmax(-1), 5
    exact = 0.0
    for p, q in zip(wanted, found, strict=True):
        top = p.argsort(descending=True)[:kept]
        events = [(p[top], q[top]), (1 - p[top].sum(), 1 - q[top].sum())]
        exact += sum((a * (a / b).log()).sum().item() for a, b in events) / len(wanted)
    measured = divergence(top_predictions(wanted.log(), kept), found.log())
    assert measured.item() == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("scale", [3.0, 300.0])
def test_the_same_predictions_do_not_diverge(scale):
    same = logits(0, scale).float().requires_grad_(True)
    found = divergence(top_predictions(same.detach(), 4), same)
    found.backward()
    assert abs(found.item()) < 1e-5
    assert same.grad.abs().max() < 1e-5
