"""What the hooks collect against a plain pass over the same activations."""

import pytest
import scipy.linalg
import torch
from support import tiny_vlms
from transformers import AutoModelForImageTextToText

from casp_plugin.model.low_rank_linear import named_linears
from casp_plugin.statistics import derivatives
from casp_plugin.statistics.forward import collect
from casp_plugin.statistics.hooks import first_batches
from casp_plugin.statistics.statistics import Request

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


@pytest.mark.parametrize(("chunk", "kept"), [(1, 0.5), (7, 0.5), (1000, 0.5), (1000, 0)])
def test_gradients_against_autograd(load_tiny, batches, chunk, kept, monkeypatch):
    """Squares and second moments of the gradient for labels drawn from the predictions."""
    monkeypatch.setattr("casp_plugin.statistics.derivatives.chunk_tokens", lambda *_: chunk)
    monkeypatch.setattr("casp_plugin.statistics.derivatives.KEPT_SHARE", kept)
    monkeypatch.setattr("casp_plugin.statistics.derivatives.SAMPLES", 4)
    monkeypatch.setattr("casp_plugin.statistics.derivatives.TOKENS", 0)
    model = load_tiny()
    request = Request(gradients=frozenset({Q, DOWN}), gradient_moments=frozenset({Q, K}))
    found = collect(model, batches, request)

    gradients = {name: [] for name in (Q, K, DOWN)}
    outputs = {}
    for name in gradients:
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: outputs.__setitem__(name, out)
        )
    for batch in list(batches)[:2]:
        logits = model(**batch).logits.flatten(0, 1)
        points = torch.rand(len(logits), 1, generator=derivatives._generator(batch, None))
        labels = derivatives.draw_labels(logits.detach().softmax(-1), points)[:, 0]
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


def test_gradients_are_taken_from_the_first_half_of_texts(load_tiny, monkeypatch):
    """Not of batches with padding, labels or images."""
    monkeypatch.setattr("casp_plugin.statistics.derivatives.LEAST_LENGTH", 8)
    ids = torch.randint(3, 40, (2, 23), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    padded = mask.clone()
    padded[0, -1] = 0
    model, request = load_tiny(), Request(gradients=frozenset({Q}))

    def squares(**batch):
        return collect(model, [batch], request).gradient_squares[Q]

    whole = squares(input_ids=ids, attention_mask=mask)
    monkeypatch.setattr("casp_plugin.statistics.derivatives.LEAST_LENGTH", 12)
    assert torch.equal(whole, squares(input_ids=ids[:, :12], attention_mask=mask[:, :12]))
    monkeypatch.setattr("casp_plugin.statistics.derivatives.LEAST_LENGTH", 8)
    for other in ({"attention_mask": padded}, {"labels": ids}):
        other = {"input_ids": ids, "attention_mask": mask, **other}
        assert derivatives._first_half(other) is other
    assert derivatives._first_half({"input_ids": ids[:, :7]})["input_ids"].shape == (2, 7)
    assert [derivatives.derived_length(n) for n in (5, 8, 12, 23)] == [5, 8, 8, 12]


def test_drawn_as_often_as_likely():
    chances = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(20000, 1, generator=generator)
    labels = derivatives.draw_labels(chances.expand(20000, -1), points)
    often = labels.flatten().bincount(minlength=6) / 20000
    torch.testing.assert_close(often, chances, atol=0.01, rtol=0)
    assert often[chances == 0].sum() == 0
    assert labels.shape == (20000, 1)


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
    monkeypatch.setattr("casp_plugin.statistics.derivatives.SAMPLES", 2)
    monkeypatch.setattr("casp_plugin.statistics.derivatives.TOKENS", 0)
    model = load_tiny()
    names = frozenset(name.replace("layers.1", f"layers.{i}") for i in (0, 1) for name in (Q, K))
    found = collect(model, batches, Request(attention_moments=names))

    seen = {}
    for name, module in model.named_modules():
        if name.endswith(("self_attn", "q_proj", "k_proj")):
            module.register_forward_hook(lambda m, a, out, name=name: seen.__setitem__(name, out))
        if name in ("model.layers.0", "model.layers.1"):
            module.register_forward_pre_hook(lambda m, a, name=name: seen.__setitem__(name, a[0]))
    batch = next(iter(batches))
    model(**batch)
    generator = derivatives._generator(batch, None)
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


def with_image(folder, family):
    """A vision-language model, and a batch with its image."""
    tiny_vlms.save_tiny_vlm(folder, family)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([tiny_vlms.image_prompt(family, expanded=True)])
    return model, {"input_ids": ids, **tiny_vlms.image_inputs(folder, family)}


@pytest.mark.parametrize("image_weight", [None, 0.25, 0])
@pytest.mark.parametrize(
    ("family", "name", "inside"),
    [
        ("llava", "model.language_model.layers.0.self_attn.q_proj", "model.vision_tower.encoder"),
        ("blip-2", "language_model.model.decoder.layers.0.fc1", "vision_model.encoder"),
    ],
    ids=["llava", "tokens in a row"],
)
def test_tokens_of_images_count_what_they_are_told_to(tmp_path, family, name, inside, image_weight):
    model, batch = with_image(tmp_path, family)
    inside += ".layers.0.mlp.fc1"  # reads nothing but the image
    seen = {}
    for key in (name, inside):
        model.get_submodule(key).register_forward_hook(
            lambda module, args, output, key=key: seen.update({key: (args[0], output)})
        )
    found = collect(
        model,
        [batch],
        Request(
            second_moments=frozenset({name, inside}),
            mean_squares=frozenset({(name, 1)}),
            energies=frozenset({name}),
            image_weight=image_weight,
        ),
    )
    images = batch["input_ids"][0] == model.config.image_token_id
    assert images.sum() == {"llava": 16, "blip-2": 4}[family]
    weights = torch.where(images, 1 if image_weight is None else image_weight, 1.0).double()
    x, y = (values.reshape(len(images), -1).double() for values in seen[name])
    bias = model.get_submodule(name).bias
    y = y if bias is None else y - bias
    moment = sum(w * torch.outer(row, row) for w, row in zip(weights, x, strict=True))
    moment /= weights.sum()
    energy = (weights * y.square().sum(-1)).sum() / weights.sum()
    torch.testing.assert_close(found.second_moments[name].double(), moment, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        found.mean_squares[name].double(), moment.diagonal(), rtol=1e-4, atol=1e-6
    )
    assert found.output_energies[name] == pytest.approx(energy.item(), rel=1e-4)
    patches = seen[inside][0].flatten(0, 1).double()
    torch.testing.assert_close(
        found.second_moments[inside].double(), patches.T @ patches / len(patches), rtol=1e-4, atol=0
    )


def test_image_weights_are_joined():
    assert (Request(image_weight=0.0) | Request()).image_weight == 0
    assert (Request() | Request(image_weight=0.5)).image_weight == 0.5


def test_only_text_is_predicted(tmp_path):
    """The last layer's outputs before tokens of an image have no gradient."""
    model, batch = with_image(tmp_path, "llava")
    name = "model.language_model.layers.1.mlp.down_proj"
    seen = []

    def hook(module, args, output):
        if output.requires_grad:
            output.register_hook(seen.append)

    model.get_submodule(name).register_forward_hook(hook)
    before = "model.language_model.layers.0.mlp.down_proj"
    collect(model, [batch], Request(gradients=frozenset({name, before})))
    images = batch["input_ids"][0] == model.config.image_token_id
    first = int(images.nonzero()[0])
    counted = torch.ones(len(images), dtype=torch.bool)
    counted[first - 1 : first + 15] = False
    torch.testing.assert_close(seen[-1][0].norm(dim=-1) > 0, counted)


def test_labels_say_what_is_predicted(tmp_path):
    model, batch = with_image(tmp_path, "llava")
    labels = batch["input_ids"].clone()
    labels[:, :-2] = -100
    name = "model.language_model.layers.1.mlp.down_proj"
    seen = []
    model.get_submodule(name).register_forward_hook(
        lambda module, args, output: output.requires_grad and output.register_hook(seen.append)
        and None
    )  # fmt: skip
    earlier = "model.language_model.layers.0.mlp.down_proj"
    request = Request(gradients=frozenset({name, earlier}))
    collect(model, [{**batch, "labels": labels}], request)
    predicting = (seen[-1][0].norm(dim=-1) > 0).nonzero().flatten().tolist()
    tokens = labels.shape[1]
    assert predicting == [tokens - 3, tokens - 2]


def test_first_batches_counts_sequences():
    """Not the patches of the images that stand before them in a batch."""
    batch = {"pixel_values": torch.zeros(64, 3), "input_ids": torch.zeros(1, 8)}
    assert len(list(first_batches([batch] * 6, 4, "x"))) == 4
    assert len(list(first_batches([batch] * 6, 4, "x", tokens=40))) == 5


@pytest.mark.parametrize("family", ["llava", "idefics3"])
def test_gradients_count_predicted_tokens(tmp_path, family):
    """Squares are summed over the tokens of a layer, a tower's patches too, and divided by the
    number of predicted ones."""
    model, batch = with_image(tmp_path, family)
    first, tower = (
        next(name for name, _ in model.named_modules() if name.endswith(end))
        for end in ("layers.0.self_attn.q_proj", "layers.0.mlp.fc2")
    )
    language = next(n for n, _ in model.named_modules() if n.endswith("layers.0.mlp.down_proj"))
    sums = {}

    def summing(name):
        def add(gradient):
            sums[name] = gradient.flatten(0, -2).square().sum(0)

        return lambda module, args, output: output.requires_grad and output.register_hook(add)

    for name in (tower, language):
        module = model.get_submodule(name)
        hook = summing(name)
        module.register_forward_hook(lambda *args, hook=hook: hook(*args) and None)
    found = collect(model, [batch], Request(gradients=frozenset({first, tower, language})))
    images = batch["input_ids"][0] == model.config.image_token_id
    predicted = int((~images.roll(-1)).sum())
    assert 0 < predicted < len(images)
    for name in (tower, language):
        torch.testing.assert_close(found.gradient_squares[name], sums[name] / predicted)


def test_attention_densities(tmp_path):
    """Against the maps that transformers gives out; images apart where there are any."""
    model, batch = with_image(tmp_path, "llava")
    text = {"input_ids": batch["input_ids"][:, -4:]}
    layers = [f"model.language_model.layers.{i}.self_attn" for i in range(2)]
    inside = "model.vision_tower.encoder.layers.0.self_attn"
    request = Request(attention_maps=frozenset([*layers, inside]))
    before = model.config._attn_implementation
    found = collect(model, [batch, text], request).attention_densities
    assert model.config.text_config._attn_implementation == before != "eager"
    model.set_attn_implementation("eager")
    model.eval()
    images = batch["input_ids"][0] == model.config.image_token_id
    with torch.no_grad():
        shown = [model(**one, output_attentions=True).attentions for one in (batch, text)]
    for index, name in enumerate(layers):
        above, of_image = [], shown[0][index]
        for maps in (shown[0][index], shown[1][index]):
            seen = torch.ones(maps.shape[-2:], dtype=torch.bool).tril()
            above.append(torch.stack([(head[seen] > 0.01).double().mean() for head in maps[0]]))
        torch.testing.assert_close(
            torch.tensor(found[name].heads), ((above[0] + above[1]) / 2).float()
        )
        seen = torch.ones(of_image.shape[-2:], dtype=torch.bool).tril() & images
        expected = [(head[seen] > 0.01).double().mean().item() for head in of_image[0]]
        assert found[name].image == pytest.approx(expected)
    assert found[inside].image is None


def test_attention_densities_where_images_see_all_of_themselves(tmp_path):
    model, batch = with_image(tmp_path, "gemma3")
    batch["token_type_ids"] = (batch["input_ids"] == model.config.image_token_id).long()
    name = "model.language_model.layers.0.self_attn"
    found = collect(model, [batch], Request(attention_maps=frozenset({name}))).attention_densities
    model.set_attn_implementation("eager")
    model.eval()
    with torch.no_grad():
        maps = model(**batch, output_attentions=True).attentions[0][0]
    assert (maps.triu(1) > 0).any()
    expected = (maps > 0.01).sum((1, 2)) / (maps > 0).sum((1, 2))
    torch.testing.assert_close(torch.tensor(found[name].heads), expected)
    assert all(0 < share <= 1 for share in found[name].entropy)


@pytest.mark.parametrize("family", ["llava", "idefics3"])
def test_images_have_gradients_too(tmp_path, family):
    """Language model and vision tower of a vision-language model, for every importance."""
    model, batch = with_image(tmp_path, family)
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
