"""Measure quality, memory and speed of compressed KV caches.

    python benchmarks/kv_cache.py text MODEL --heldout H [--weights NAME=FOLDER ...] --table T.md
    python benchmarks/kv_cache.py images MODEL --heldout H --table T.md
    python benchmarks/kv_cache.py speed MODEL --table T.md

Texts are joined and cut into windows. The model reads the prompt at the beginning of a window at
once and the tokens after it as decoding would, from the cache. Ratios are to the same model, and
the same tokens, with nothing compressed.
"""

import json
import math
import time
from collections.abc import Callable, Iterable
from itertools import cycle, pairwise
from pathlib import Path
from typing import Annotated

import torch
import typer
from common import command, show, write_markdown
from tqdm import tqdm
from transformers import AutoTokenizer, Cache, DynamicCache, PreTrainedModel, QuantizedCache

from casp_plugin.data.data_source import DataSource, load_processor
from casp_plugin.evaluation.answers import evaluate_answers
from casp_plugin.evaluation.text import token_scores
from casp_plugin.kv_cache import CompressedCache
from casp_plugin.model.load import load_model

app = typer.Typer(add_completion=False)
BITS = (8, 4, 3, 2)
#: schemes of LVLM-Compress-Bench; tokens and channels of a group are {g}
SCHEMES = {
    "uniform, blocks": "uniform:bits={bits},g={g}",
    "uniform, prompt": "uniform:bits={bits},residual={g}",
    "outlier reduced 1 %": "outlier_reduced:bits={bits},g={g}",
    "per channel": "per_channel:bits={bits},g={g}",
    "per channel, N": "per_channel:bits={bits},g=N,residual={g}",
    "per token": "per_token:bits={bits},g={g},residual={g}",
    "KCVT (KIVI)": "kcvt:bits={bits},g={g}",
    "KTVC": "ktvc:bits={bits},g={g}",
}
KCVT = "kcvt:k_bits={k},v_bits={v},g={g}"
Heldout = Annotated[str, typer.Option(help="Texts or questions to score on.")]


@app.command()
def text(
    model: str,
    heldout: Heldout,
    weights: Annotated[list[str] | None, typer.Option(help="NAME=FOLDER, compressed.")] = None,
    windows: int = 8,
    length: int = 1024,
    prompt: int = 256,
    group: int = 128,
    table: Path | None = None,
) -> None:
    """Tell perplexity by scheme and bits, by bits of keys and of values, and by weights."""
    texts = [json.loads(line)["text"] for line in Path(heldout).read_text().splitlines()]
    ids = AutoTokenizer.from_pretrained(model)("\n\n".join(texts), return_tensors="pt").input_ids
    places = ids[0, : windows * length].view(windows, length)
    loaded = load_model(model)

    def perplexity(
        of: PreTrainedModel, make: Callable[[], Cache] | str, steps: tuple[int, ...] = (group,)
    ) -> float:
        if isinstance(make, str):
            scheme = make
            make = lambda: CompressedCache(of.config, scheme)  # noqa: E731
        return _perplexity(of, places, prompt, steps, make)

    dense = perplexity(loaded, lambda: DynamicCache(config=loaded.config))
    rows = []
    for name, scheme in tqdm(SCHEMES.items(), desc="schemes"):
        named = [scheme.format(bits=bits, g=group) for bits in BITS]
        found = [f"{perplexity(loaded, each) / dense:.3f}" for each in named]
        rows.append([name, *found, f"{_bits(loaded, places[:1], named[1]):.2f}"])
    # 127 tokens wait in that cache and the next one has them stored: so steps of 127 and 1
    found = {bits: perplexity(loaded, _quanto(loaded, bits), (127, 1)) / dense for bits in (4, 2)}
    rows.append(
        ["transformers, quanto", *(f"{found[b]:.3f}" if b in found else "" for b in BITS), ""]
    )
    tables = [(("ratio of perplexity", *(f"{bits} bits" for bits in BITS), "4 bits take"), rows)]
    show(*tables[-1])
    widths = (16, 4, 3, 2)
    rows = []
    for k in tqdm(widths, desc="bits of keys"):
        named = [KCVT.format(k=k, v=v, g=group) for v in widths]
        rows.append([f"keys {k}", *(f"{perplexity(loaded, each) / dense:.3f}" for each in named)])
    tables.append((("KCVT", *(f"values {v}" for v in widths)), rows))
    show(*tables[-1])
    rows = []
    for name, folder in [("16 bits", model), *(each.split("=", 1) for each in weights or ())]:
        other = load_model(folder)
        named = [KCVT.format(k=bits, v=bits, g=group) for bits in widths]
        found = [perplexity(other, each) for each in tqdm(named, desc=name)]
        rows.append([name, *(f"{each:.2f} ({each / found[0]:.3f})" for each in found)])
    if weights:
        columns = ("weights: perplexity (ratio to 16-bit cache)", *(f"KCVT {v}" for v in widths))
        tables.append((columns, rows))
        show(*tables[-1])
    _write(table, tables, f"{windows} windows of {length} tokens, the first {prompt} not scored")


@app.command()
def images(
    model: str,
    heldout: Heldout,
    weights: Annotated[list[str] | None, typer.Option(help="NAME=FOLDER, compressed.")] = None,
    samples: int = 32,
    group: int = 32,
    table: Path | None = None,
) -> None:
    """Tell the perplexity of right answers about images over that of the 16-bit cache."""
    source = DataSource(heldout, "test", None, "text", "image", None, "question", "answer")
    asked = source.conversations(samples, 0)

    processor = load_processor(model)

    def perplexity(loaded: PreTrainedModel, scheme: str | None) -> float:
        settings = {"max_new_tokens": 0, "kv_cache": scheme}
        return evaluate_answers(loaded, processor, asked, **settings).perplexity

    def ratios(loaded: PreTrainedModel, schemes: Iterable[str]) -> list[str]:
        dense = perplexity(loaded, None)
        return [f"{perplexity(loaded, each) / dense:.3f}" for each in schemes]

    loaded = load_model(model)
    schemes = [each.format(bits=bits, g=group) for each in SCHEMES.values() for bits in BITS]
    found = iter(ratios(loaded, tqdm(schemes, desc="caches")))
    rows = [[name, *(next(found) for _ in BITS)] for name in SCHEMES]
    columns = ("ratio of perplexity", *(f"{bits} bits" for bits in BITS))
    tables = [(columns, rows)]
    show(*tables[-1])
    if weights:
        caches = [KCVT.format(k=bits, v=bits, g=group) for bits in (16, *BITS)]
        named = [each.split("=", 1) for each in weights]
        rows = [[name, *ratios(load_model(folder), caches)] for name, folder in named]
        tables.append((("weights, KCVT", *(f"{bits} bits" for bits in (16, *BITS))), rows))
        show(*tables[-1])
    _write(table, tables, f"{len(asked)} questions, groups of {group}")


@app.command()
def speed(
    model: str,
    lengths: Annotated[list[int], typer.Option()] = [512, 2048, 8192],  # noqa: B006
    tokens: int = 8,
    table: Path | None = None,
) -> None:
    """Tell bytes of the cache and time of a decoded token, in turns with transformers' own caches.

    Caches are filled by a prompt; a last one by pieces, as decoding leaves it.
    """
    loaded = load_model(model)
    caches = {
        "16 bits": lambda: DynamicCache(config=loaded.config),
        **{
            f"KCVT {bits}": lambda bits=bits: CompressedCache(loaded.config, f"kcvt:bits={bits}")
            for bits in BITS
        },
        **{f"transformers, quanto {bits}": _quanto(loaded, bits) for bits in (4, 2)},
    }
    rows = []
    for length in lengths:
        filled = {name: _filled(loaded, make(), length) for name, make in caches.items()}
        filled["KCVT 2, by pieces"] = _filled(loaded, caches["KCVT 2"](), length, 128)
        spent = {name: [] for name in filled}
        for _ in range(tokens):
            for name, cache in filled.items():
                start = time.perf_counter()
                with torch.no_grad():
                    loaded(torch.tensor([[5]]), past_key_values=cache)
                spent[name].append(time.perf_counter() - start)
        first_bytes, first = _nbytes(filled["16 bits"]), _median(spent["16 bits"])
        for name, cache in filled.items():
            size, seconds = _nbytes(cache), _median(spent[name])
            sizes = f"{size / 1e6:.1f}", f"{size / first_bytes:.3f}"
            spent_on = f"{seconds * 1e3:.0f}", f"{seconds / first:.2f}"
            rows.append([str(length), name, *sizes, *spent_on])
        show(SPEED, rows)
    _write(table, [(SPEED, rows)], f"random keys and values, median of {tokens} tokens in turns")


SPEED = ("tokens", "cache", "MB", "of 16 bits", "ms a token", "ratio")


@torch.no_grad()
def _perplexity(
    model: PreTrainedModel,
    windows: torch.Tensor,
    prompt: int,
    steps: tuple[int, ...],
    make: Callable[[], Cache],
) -> float:
    """Return the perplexity of the tokens after the prompt, read from the cache of those before.

    :param steps: tokens of a call after the prompt, in turns
    """
    loss, length = 0.0, windows.shape[1]
    cuts = [0, prompt]
    for step in cycle(steps):
        if cuts[-1] == length:
            break
        cuts.append(min(cuts[-1] + step, length))
    for window in windows:
        cache, logits = make(), []
        for start, end in pairwise(cuts):
            logits.append(model(window[None, start:end], past_key_values=cache).logits[0])
        loss += token_scores(torch.cat(logits)[prompt - 1 : -1], window[prompt:])[0]
    return math.exp(loss / (len(windows) * (windows.shape[1] - prompt)))


@torch.no_grad()
def _bits(model: PreTrainedModel, ids: torch.Tensor, scheme: str) -> float:
    """Return the bits of a stored value, with scales and outliers."""
    cache, plain = CompressedCache(model.config, scheme), DynamicCache(config=model.config)
    for each in (cache, plain):
        model(ids, past_key_values=each)
    return 16 * cache.nbytes / _nbytes(plain)


def _quanto(model: PreTrainedModel, bits: int) -> Callable[[], Cache]:
    return lambda: QuantizedCache("quanto", model.config, nbits=bits)


def _filled(model: PreTrainedModel, cache, length: int, step: int | None = None):
    config = model.config
    generator = torch.Generator().manual_seed(0)
    for index in range(config.num_hidden_layers):
        shape = (2, 1, config.num_key_value_heads, length, config.head_dim)
        states = torch.randn(shape, generator=generator).to(model.dtype)
        for keys, values in states.split(step or length, dim=3):
            cache.update(keys, values, index)
    return cache


def _nbytes(cache) -> int:
    """Return the bytes of keys and values, whatever stores them."""
    if isinstance(cache, CompressedCache):
        return cache.nbytes
    total = 0
    for layer in cache.layers:
        total += layer.keys.nbytes + layer.values.nbytes
        for codes in (getattr(layer, f"_quantized_{what}", None) for what in ("keys", "values")):
            if codes is not None:  # optimum-quanto's
                inner = [getattr(codes, name) for name in ("_data", "_scale", "_shift")]
                total += sum(getattr(each, "_data", each).nbytes for each in inner)
    return total


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _write(table: Path | None, tables: list, how: str) -> None:
    if table is not None:
        write_markdown(table, tables, f"Made by `{command()}` ({how});")


if __name__ == "__main__":
    app()
