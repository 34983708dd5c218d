"""Fuzzing what a config says, guided by coverage: it is read, or refused by ValueError.

    pip install atheris
    python tests/fuzz_section.py benchmarks/results/fuzz.md -atheris_runs=500000

Bytes become the ``config.json`` of a folder, then our section, then layers of a model on the meta
device. Anything else than ValueError ends it with the input that did it. Options are libFuzzer's.
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

with atheris.instrument_imports(include=["casp_plugin.checkpoint", "casp_plugin.loading"]):
    from casp_plugin.checkpoint import read_config, read_section
    from casp_plugin.loading import install_factored_layers

from conftest import SIZES

from casp_plugin.models import bare_model

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
    "low_rank",
    "latent_of",
    "format",
    "quantization_config",
    "casp",
    "true",
    "null",
]


class Fuzz:
    """One input after the other; the last one writes what came of all."""

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
        lines = ["| outcome | inputs |", "| --- | --- |"]
        lines += [f"| {name} | {count:,} |" for name, count in self.outcomes.most_common()]
        lines += ["| anything else | 0 |", ""]
        command = f"python tests/fuzz_section.py {' '.join(sys.argv[1:])}"
        lines.append(f"Made by `{command}`; atheris {version('atheris')}.")
        self.table.write_text("\n".join(lines) + "\n")


def main() -> None:
    table, *options = sys.argv[1:]
    [runs] = [int(each.partition("=")[2]) for each in options if each.startswith("-atheris_runs=")]
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
