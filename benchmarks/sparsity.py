"""Measure CASP's theorem 1: does sparse attention bear compressed W_q and W_k better?

    python benchmarks/sparsity.py MODEL QUESTIONS.parquet TEXTS.jsonl TABLE.md PLOT.png

W_q and W_k of one decoder layer at a time become factors that keep 25 % of their parameters,
whitened by their inputs, as in the paper. The layer gets its inputs in the whole model; its map
(total variation of a query's row) and its output (relative error) are compared with and without
factors, beside the density of the map. All prompts are about equally long, so that densities can be
compared; they differ in the number of images, and so in the share of visual tokens.
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import torch
import typer
from common import show, write_markdown
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import nn
from tqdm import tqdm
from transformers import AutoProcessor, ProcessorMixin

from casp_plugin.data.conversation_batches import conversation_loader
from casp_plugin.data.conversations import Conversation, load_conversations
from casp_plugin.data.sources import load_text
from casp_plugin.maths.attention_density import THRESHOLD, density
from casp_plugin.maths.low_rank import uniform_rank, whitened_spectrum
from casp_plugin.model.components import LANGUAGE, component_of
from casp_plugin.model.load import load_model
from casp_plugin.model.low_rank_linear import named_linears
from casp_plugin.statistics.attention_maps import visible_in
from casp_plugin.statistics.forward import collect
from casp_plugin.statistics.hooks import Hooks, image_mask
from casp_plugin.statistics.statistics import Request

KEEP = 0.25
COLUMNS = (
    "share of visual tokens",
    "density",
    "error of the map",
    "error of the output",
    "correlation of density and error of the map",
    "of density and error of the output",
)
VALUES = ("share", "density", "map_error", "error")


@dataclass(frozen=True)
class Measured:
    """One layer on one prompt.

    :param visual: number of visual tokens
    :param share: visual tokens over all tokens
    :param density: share of the map's entries above the threshold, mean over heads
    :param map_error: total variation of a query's row, 0 to 1, mean over queries and heads
    :param error: relative error of the attention output
    """

    layer: int
    visual: int
    share: float
    density: float
    map_error: float
    error: float


def factored(model: nn.Module, loader) -> dict[str, torch.Tensor]:
    """Return W_q and W_k of the language model as low-rank products, by name."""
    linears = {
        name: module
        for name, module in named_linears(model)
        if name.endswith((".q_proj", ".k_proj")) and component_of(name) == LANGUAGE
    }
    moments = collect(model, loader, Request(second_moments=frozenset(linears))).second_moments
    products = {}
    for name, linear in tqdm(linears.items(), desc="Factoring W_q, W_k"):
        rank = uniform_rank(*linear.weight.shape, KEEP, 1)
        factors = whitened_spectrum(linear.weight, moments[name]).factors(rank)
        products[name] = (factors.up @ factors.down).to(linear.weight.dtype)
    return products


class Probe:
    """Compares attention with and without factors while the model runs.

    :param products: low-rank products of the weights of linears, by name
    """

    def __init__(self, model: nn.Module, products: dict[str, torch.Tensor]):
        self.model, self.products = model, products
        self.visual, self.share, self.found = 0, 0.0, []
        self._inside = False

    def on_attention(self, index: int, name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict, output) -> None:
            if self._inside:
                return
            before = {part: module.get_submodule(part).weight for part in ("q_proj", "k_proj")}
            self._inside = True
            try:
                for part, weight in before.items():
                    weight = nn.Parameter(self.products[f"{name}.{part}"].to(weight))
                    module.get_submodule(part).weight = weight
                changed, other = module(*args, **kwargs)[:2]
            finally:
                for part, weight in before.items():
                    module.get_submodule(part).weight = weight
                self._inside = False
            dense, attention = output[0].float(), output[1]
            error = ((changed.float() - dense).norm() / dense.norm()).item()
            seen = visible_in(module, kwargs, attention)
            mean = density(attention, seen, THRESHOLD).mean().item()
            moved = (other - attention).abs().sum(-1).mean().item() / 2
            self.found.append(Measured(index, self.visual, self.share, mean, moved, error))

        return hook

    @torch.no_grad()
    def run(self, loader) -> list[Measured]:
        """
        :param loader: batches of one prompt each
        """
        self.model.set_attn_implementation("eager")
        layers = list(dict.fromkeys(name.rpartition(".")[0] for name in self.products))
        with Hooks(self.model) as hooks:
            for index, name in enumerate(layers):
                hooks.add(name, self.on_attention(index, name), with_kwargs=True)
            for batch in tqdm(loader, desc="Measuring"):
                seen = image_mask(batch, self.model)
                self.visual = 0 if seen is None else int(seen.sum())
                self.share = self.visual / batch["input_ids"].numel()
                self.model(**batch, use_cache=False)
        return self.found


def prompts(
    asked: list[Conversation], text: str, processor, images: list[int], tokens: int, each: int
) -> list[Conversation]:
    """Make prompts of about ``tokens`` tokens: a text and images, then a question.

    :param images: numbers of images, in turn
    :param each: prompts for every number of images
    :raises ValueError: if the images take more tokens, or the text is too short
    """
    ids = processor.tokenizer(text)["input_ids"]
    (one,) = batches(asked[:1], processor, 2 * tokens)
    per_image = int((one["input_ids"] == processor.image_token_id).sum())
    if not max(images) * per_image < tokens <= len(ids) + min(images) * per_image:
        raise ValueError(
            f"--tokens {tokens} must be more than {max(images)} images of {per_image} tokens take, "
            f"and no more than {min(images)} and the {len(ids)} tokens of text"
        )
    made = []
    for count in images:
        for i in range(each):
            shown = [asked[(len(made) + j) % len(asked)].images[0] for j in range(count)]
            length = tokens - count * per_image
            start = (37 * i) % max(1, len(ids) - length)  # other words in each prompt
            before = processor.tokenizer.decode(ids[start : start + length])
            question = f"{before}\n{asked[len(made) % len(asked)].question}"
            made.append(Conversation(tuple(shown), question, ""))
    return made


def by_share(found: list[Measured]) -> list[list[Measured]]:
    """Group measurements by the number of images in their prompts, rising."""
    counts = sorted({measured.visual for measured in found})
    return [[measured for measured in found if measured.visual == count] for count in counts]


def means(group: list[Measured]) -> dict[str, float]:
    return {key: fmean(getattr(measured, key) for measured in group) for key in VALUES}


def correlation(group: list[Measured], one: str, other: str) -> float:
    """Return Spearman's correlation of two fields."""
    columns = ([getattr(measured, key) for measured in group] for key in (one, other))
    return spearmanr(*columns).statistic


def draw(path: Path, found: list[Measured], model: str) -> None:
    figure = Figure(figsize=(11, 4.2))
    left, right = figure.subplots(1, 2)
    layers = left.scatter(
        [measured.density for measured in found],
        [measured.error for measured in found],
        c=[measured.layer for measured in found],
        s=8,
        cmap="viridis",
    )
    figure.colorbar(layers, ax=left, label="decoder layer")
    left.set_xlabel(f"attention density (entries above {THRESHOLD})")
    left.set_ylabel("relative error of the attention output")
    points = [means(group) for group in by_share(found)]
    for what, axis in (("error", right), ("density", right.twinx())):
        colour = "tab:red" if what == "error" else "tab:blue"
        axis.plot([p["share"] for p in points], [p[what] for p in points], "o-", color=colour)
        axis.set_ylabel(f"{what}, mean over layers", color=colour)
    right.set_xlabel("share of visual tokens")
    figure.suptitle(f"{model}: W_q, W_k at {KEEP:.0%} of their parameters, a layer at a time")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def batches(made: list[Conversation], processor: ProcessorMixin, max_length: int) -> list[dict]:
    """Return batches of all prompts, those without images apart, since a loader holds one kind.

    :raises ValueError: if a prompt does not fit
    """
    kinds = [[one for one in made if bool(one.images) == seen] for seen in (True, False)]
    found = [b for kind in kinds if kind for b in conversation_loader(kind, processor, max_length)]
    if len(found) < len(made):
        raise ValueError(f"{len(made) - len(found)} of {len(made)} prompts do not fit {max_length}")
    return found


def main(
    model: str,
    dataset: str,
    text: str,
    table: Path,
    plot: Path,
    each: int = 8,
    images: list[int] = (0, 1, 2, 3, 4, 5),
    tokens: int = 450,
    seed: int = 0,
) -> None:
    """Measure, and print correlations.

    :param dataset: questions about images
    :param text: text that is put before the questions; half of it and other questions make the
        prompts that W_q and W_k are whitened on
    :param images: numbers of images in a prompt
    :param each: prompts for every number of images
    :param tokens: length of the prompts, about
    """
    loaded, processor = load_model(model), AutoProcessor.from_pretrained(model)
    asked = load_conversations(dataset, 2 * each * max(images), seed=seed)
    texts = load_text(text, processor.tokenizer, 16, seed=seed)["text"]
    halves = []
    for part in (0, 1):
        words = "\n".join(texts[part::2])
        made = prompts(asked[part::2], words, processor, list(images), tokens, each)
        halves.append(batches(made, processor, 2 * tokens))
    products = factored(loaded, halves[0])
    found = Probe(loaded, products).run(halves[1])

    rows = []
    for group in (*by_share(found), found):
        share, *others = means(group).values()
        rows.append([f"{share:.2f}" if group is not found else "all"])
        rows[-1] += [f"{value:.3f}" for value in others]
        rows[-1] += [f"{correlation(group, 'density', key):.2f}" for key in ("map_error", "error")]
    layers = [[m for m in found if m.layer == i] for i in range(len(products) // 2)]
    rows.append(["inside one layer, median", "", "", ""])
    for key in ("map_error", "error"):
        inside = [correlation(layer, "density", key) for layer in layers]
        positive = sum(rho > 0 for rho in inside)
        rows[-1].append(f"{median(inside):.2f}, positive in {positive} of {len(inside)}")
    show(COLUMNS, rows)
    draw(plot, found, Path(model).name)
    note = (
        f"{model}, {len(products) // 2} layers, {len(found)} maps of about {tokens} tokens, q/k "
        f"whitened on as many other prompts; Spearman correlations over layers and prompts, of the "
        f"share of visual tokens with error {correlation(found, 'share', 'error'):.2f}, with "
        f"density {correlation(found, 'share', 'density'):.2f}; plot {plot.name};"
    )
    write_markdown(table, [(COLUMNS, rows)], note)


if __name__ == "__main__":
    typer.run(main)
