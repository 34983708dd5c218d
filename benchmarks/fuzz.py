"""Fuzz configs, guided by coverage: a config is read, or refused by ValueError.

    pip install atheris
    python benchmarks/fuzz.py benchmarks/results/fuzz.md -atheris_runs=500000

Bytes become the ``config.json`` of a folder, then our section, then layers of a model on the meta
device. Any other error ends the run with the input that caused it. Options are libFuzzer's.
"""

import copy
import json
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import atheris
from transformers import AutoConfig

with atheris.instrument_imports(include=["casp_plugin.checkpoint"]):
    from casp_plugin.checkpoint.format import read_config, read_section
    from casp_plugin.checkpoint.load import install_factored_layers

from common import command, write_markdown

from casp_plugin.model.load import bare_model

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "num_hidden_layers": 2}
MODEL = bare_model(AutoConfig.for_model("llama", **SIZES))
Q, K = (f"model.layers.0.self_attn.{name}_proj" for name in "qk")
SEEDS = [
    {"low_rank": {Q: 8, K: 8}, "latent_of": {K: Q}, "format": 2},
    {"low_rank": {Q: 8}, "format": 1},
    {"low_rank": {"../../etc/passwd": 2**40, "": -1, ".": True}, "format": 2},
    {"low_rank": [], "latent_of": {Q: Q}},
]
WORDS = [
    Q,
    K,
    "..",
    "quantization_config",
    "casp",
    "low_rank",
    "latent_of",
    "format",
    "true",
    "null",
]


class Fuzz:
    """Reads one input after the other and writes a table of the outcomes after the last."""

    def __init__(self, table: Path, runs: int, folder: Path):
        self.table, self.runs, self.folder = table, runs, folder
        self.outcomes = Counter()

    def __call__(self, content: bytes) -> None:
        self.outcomes[self._outcome(content)] += 1
        if self.outcomes.total() == self.runs:
            self._write()

    def _outcome(self, content: bytes) -> str:
        (self.folder / "config.json").write_bytes(content)
        try:
            quantization = read_config(self.folder).get("quantization_config") or {}
        except ValueError:
            return "no config: refused"
        try:
            section = read_section(quantization)
        except ValueError:
            return "malformed section: refused"
        if not section.ranks:
            return "read: no layer is factored"
        try:
            install_factored_layers(copy.deepcopy(MODEL), section)
        except ValueError:
            return "layers that the model has not, or ranks too large: refused"
        return "read: layers are factored"

    def _write(self) -> None:
        rows = [[name, f"{count:,}"] for name, count in self.outcomes.most_common()]
        note = f"Made by `{command()}`; atheris {version('atheris')},"
        write_markdown(self.table, [(("outcome", "inputs"), [*rows, ["anything else", "0"]])], note)


def main() -> None:
    table, *options = sys.argv[1:]
    [runs] = [int(o.partition("=")[2]) for o in options if o.startswith("-atheris_runs=")]
    folder = Path(tempfile.mkdtemp())
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, section in enumerate(SEEDS):
        config = {"quantization_config": {"quant_method": "compressed-tensors", "casp": section}}
        (corpus / str(number)).write_text(json.dumps(config))
    words = folder / "words"
    words.write_text("".join(f'"{word}"\n' for word in WORDS))
    arguments = [sys.argv[0], f"-dict={words}", "-max_len=600", "-seed=1", *options, str(corpus)]
    atheris.Setup(arguments, Fuzz(Path(table), runs, folder))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
