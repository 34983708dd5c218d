"""What the hooks collect against a plain pass over the same activations."""

import pytest
import scipy.linalg
import tiny_vlms
import torch
from transformers import AutoModelForImageTextToText

from casp_plugin.modules import named_linears
from casp_plugin.statistics import Request, collect

Q, K, V = (f"model.layers.1.self_attn.{x}_proj" for x in "qkv")
DOWN = "model.layers.0.mlp.down_proj"
LAYER = "model.layers.1"


def recorded(model, batches, name):
    """Inputs and outputs of a module over all batches, tokens in rows, float64."""
    seen = []
    hook = model.get_submodule(name).register_forward_hook(
        lambda m, args, kwargs, out: seen.append(
            (args[0] if args else kwargs["hidden_states"], out)
        ),
        with_kwargs=True,
    )
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    flat = [[t.reshape(-1, t.shape[-1]).double() for t in pair] for pair in seen]
    return tuple(torch.cat(side) for side in zip(*flat, strict=True))


def test_against_recorded_activations(load_tiny, batches):
    model = load_tiny()
    request = Request(
        second_moments=frozenset({Q, K}),
        mean_squares=frozenset({(DOWN, 1)}),
        energies=frozenset({Q}),
        influences=frozenset({LAYER}),
    )
    found = collect(model, batches, request)
    assert found.tokens == 8 * 24

    x, y = recorded(model, batches, Q)
    torch.testing.assert_close(
        found.second_moments[Q].double(), x.T @ x / len(x), rtol=1e-5, atol=1e-6
    )
    assert found.output_energies[Q] == pytest.approx(y.square().sum(1).mean().item(), rel=1e-5)
    x, _ = recorded(model, batches, DOWN)
    torch.testing.assert_close(
        found.mean_squares[DOWN].double(), x.square().mean(0), rtol=1e-5, atol=1e-8
    )
    before, after = recorded(model, batches, LAYER)
    influence = 1 - torch.nn.functional.cosine_similarity(before, after, dim=-1).mean()
    assert found.influences[LAYER] == pytest.approx(influence.item(), rel=1e-4)


def test_layers_with_one_input_share_one_tensor(load_tiny, batches):
    found = collect(
        load_tiny(), batches, Request(frozenset({Q, K}), frozenset({(Q, 1), (V, 1), (DOWN, 1)}))
    )
    assert found.second_moments[Q] is found.second_moments[K]
    assert found.mean_squares[Q] is found.mean_squares[V]
    assert set(found.mean_squares) == {Q, V, DOWN}


def test_rotated_inputs(load_tiny, batches):
    """Layers with one input, rotated or not: each gets the squares that its weight will meet."""
    model = load_tiny()
    found = collect(model, batches, Request(mean_squares=frozenset({(Q, 16), (K, 16), (V, 1)})))
    x, _ = recorded(model, batches, Q)
    matrix = torch.tensor(scipy.linalg.hadamard(16)).double() / 4
    turned = x @ torch.block_diag(*[matrix] * 4)
    for name, values in ((Q, turned), (K, turned), (V, x)):
        torch.testing.assert_close(
            found.mean_squares[name].double(), values.square().mean(0), rtol=1e-5, atol=1e-8
        )
    assert found.mean_squares[Q] is found.mean_squares[K]


def test_padding_does_not_count(load_tiny):
    model = load_tiny()
    ids = torch.randint(3, 96, (1, 12))
    padded = torch.cat([ids, torch.zeros(1, 4, dtype=torch.long)], dim=1)
    mask = torch.ones_like(padded)
    mask[:, 12:] = 0
    request = Request(
        second_moments=frozenset({Q}),
        influences=frozenset({LAYER}),
        attention_moments=frozenset({Q, K}),
    )
    plain = collect(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], request)
    found = collect(model, [{"input_ids": padded, "attention_mask": mask}], request)
    for name in (Q, K):  # the random directions are the same at the first twelve tokens
        torch.testing.assert_close(found.attention_moments[name], plain.attention_moments[name])
    assert found.tokens == plain.tokens == 12
    torch.testing.assert_close(found.second_moments[Q], plain.second_moments[Q])
    assert found.influences[LAYER] == pytest.approx(plain.influences[LAYER], rel=1e-4)


def test_bias_is_not_part_of_the_energy(load_tiny, batches):
    model = load_tiny()
    plain = collect(model, batches, Request(energies=frozenset({Q}))).output_energies[Q]
    linear = model.get_submodule(Q)
    linear.bias = torch.nn.Parameter(torch.full((linear.out_features,), 5.0))
    found = collect(model, batches, Request(energies=frozenset({Q}))).output_energies[Q]
    assert found == pytest.approx(plain, rel=1e-4)


def test_leaves_no_hooks_behind(load_tiny, batches):
    model = load_tiny()
    collect(model, batches, Request(frozenset({Q}), influences=frozenset({LAYER})))
    assert not any(module._forward_hooks for module in model.modules())
    assert model.lm_head.weight.device.type == "cpu"
    assert len(named_linears(model)) == 15


def test_no_data(load_tiny):
    with pytest.raises(ValueError, match="calibration dataset is empty"):
        collect(load_tiny(), [], Request(frozenset({Q})))


def test_gradients_against_autograd(load_tiny, batches, monkeypatch):
    """Squares and second moments of the gradient for labels drawn from the predictions."""
    monkeypatch.setattr("casp_plugin.derivatives.SAMPLES", 4)
    model = load_tiny()
    request = Request(gradients=frozenset({Q, DOWN}), gradient_moments=frozenset({Q, K}))
    found = collect(model, batches, request)

    generator = torch.Generator().manual_seed(torch.initial_seed())
    gradients = {name: [] for name in (Q, K, DOWN)}
    outputs = {}
    for name in gradients:
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: outputs.__setitem__(name, out)
        )
    for batch in list(batches)[:2]:
        logits = model(**batch).logits.flatten(0, 1)
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        for name, g in zip(outputs, torch.autograd.grad(loss, outputs.values()), strict=True):
            gradients[name].append(g.flatten(0, 1).double())
    g = {name: torch.cat(rows) for name, rows in gradients.items()}
    for name in (Q, DOWN):
        torch.testing.assert_close(
            found.gradient_squares[name].double(), g[name].square().mean(0), rtol=1e-4, atol=0
        )
    for name in (Q, K):
        expected = g[name].T @ g[name] / len(g[name])
        torch.testing.assert_close(
            found.gradient_moments[name].double(), expected, rtol=1e-4, atol=1e-9
        )
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_gradients_leave_the_model_as_it_was(load_tiny, batches):
    model = load_tiny()
    frozen = model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    collect(model, batches, Request(gradients=frozenset({Q})))
    assert not frozen.requires_grad
    assert model.lm_head.weight.requires_grad
    assert "forward" not in vars(model.get_submodule(LAYER))
    assert not any(module._forward_hooks for module in model.modules())


def test_attention_moments_against_autograd(load_tiny, batches, monkeypatch):
    """Backward inside one attention module, along random directions of its output."""
    monkeypatch.setattr("casp_plugin.derivatives.SAMPLES", 2)
    model = load_tiny()
    names = frozenset(name.replace("layers.1", f"layers.{i}") for i in (0, 1) for name in (Q, K))
    found = collect(model, batches, Request(attention_moments=names))

    seen = {}
    for name, module in model.named_modules():
        if name.endswith(("self_attn", "q_proj", "k_proj")):
            module.register_forward_hook(lambda m, a, out, name=name: seen.__setitem__(name, out))
        if name in ("model.layers.0", "model.layers.1"):
            module.register_forward_pre_hook(lambda m, a, name=name: seen.__setitem__(name, a[0]))
    model(**next(iter(batches)))
    generator = torch.Generator().manual_seed(torch.initial_seed())
    for index in range(2):
        attended = seen[f"model.layers.{index}.self_attn"][0]
        size = seen[f"model.layers.{index}"].norm(dim=-1, keepdim=True)
        probe = torch.randn(attended.shape, generator=generator) / size
        for name in (Q, K):
            name = name.replace("layers.1", f"layers.{index}")
            (g,) = torch.autograd.grad(attended, seen[name], probe, retain_graph=True)
            g = g.flatten(0, 1).double()
            torch.testing.assert_close(
                found.attention_moments[name].double(), g.T @ g / len(g), rtol=1e-4, atol=1e-12
            )
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("family", ["llava", "idefics3"])
def test_images_have_gradients_too(tmp_path, family):
    """Language model and vision tower of a model that sees: what every importance needs."""
    tiny_vlms.save_tiny_vlm(tmp_path, family)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.tensor([tiny_vlms.image_prompt(family, expanded=True)])
    batch = {"input_ids": ids, **tiny_vlms.image_inputs(tmp_path, family)}
    named = [name for name, _ in named_linears(model) if name.endswith("q_proj")]
    text = {name for name in named if "vision" not in name}
    request = Request(gradient_moments=frozenset(named), attention_moments=frozenset(text))
    found = collect(model, [batch], request)
    assert set(found.attention_moments) == text
    unused = (
        {"model.vision_tower.encoder.layers.1.self_attn.q_proj"} if family == "llava" else set()
    )
    assert set(found.gradient_moments) == set(named) - unused
    for moments in (found.gradient_moments, found.attention_moments):
        assert all(moment.diagonal().min() > 0 for moment in moments.values())
