"""Write the recipe that AutoScheme, auto-round's own mixed precision, chooses for a budget.

    python benchmarks/autoscheme.py MODEL recipes/smollm2/autoround_2.56.yaml OUT.yaml \\
        --average-bits 2.562753 --dataset D.jsonl

AutoScheme measures what each layer's loss would be under each option and picks a mix that meets
the average, scales and zero points counted. OUT is the given AutoRound recipe with that mix in
place of its one width, so that ``compare.py`` can run both under the same settings. Layers are
chosen one by one, also within q/k/v and gate/up: stock vLLM could not serve every such mix.
"""

from pathlib import Path
from typing import Annotated

import typer
import yaml
from auto_round import AutoRound
from auto_round.auto_scheme.gen_auto_scheme import AutoScheme
from auto_round.schemes import QuantizationScheme
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed


def main(
    model: str,
    recipe: Annotated[Path, typer.Argument(help="An AutoRound recipe of one width.")],
    out: Path,
    average_bits: float = typer.Option(...),
    dataset: Annotated[str, typer.Option(help="A .jsonl file with the key text.")] = ...,
    candidates: list[int] = (2, 3, 4),
    samples: int = 32,
    max_length: int = 512,
    seed: int = 0,
) -> None:
    """Choose, and write the recipe."""
    set_seed(seed)
    content = yaml.safe_load(recipe.read_text())
    ((stage, modifiers),) = content.items()
    ((group, modifier),) = modifiers.items()
    settings = modifier["AutoRoundModifier"]
    (scheme,) = settings["config_groups"].values()
    weights = scheme["weights"]
    options = [
        QuantizationScheme(
            bits=bits,
            group_size=weights["group_size"],
            sym=weights["symmetric"],
            data_type=weights["type"],
        )
        for bits in candidates
    ]
    chosen = AutoRound(
        AutoModelForCausalLM.from_pretrained(model, dtype="auto"),
        AutoTokenizer.from_pretrained(model),
        scheme=AutoScheme(
            average_bits, options, nsamples=samples, seqlen=max_length, dataset=dataset
        ),
        dataset=dataset,
        nsamples=samples,
        seqlen=max_length,
        seed=seed,
        enable_torch_compile=False,
    )
    chosen.configure_layer_config(enable_gguf_official_mixed=False)
    names = {bits: [] for bits in candidates}
    for name, layer in chosen.layer_config.items():
        if layer["bits"] in names:
            names[layer["bits"]].append(name)
    settings["config_groups"] = {
        f"bits_{bits}": {"targets": targets, "weights": {**weights, "num_bits": bits}}
        for bits, targets in names.items()
        if targets
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    note = f"# AutoScheme's mix for {average_bits} bits, chosen on {dataset}, seed {seed}.\n"
    out.write_text(note + yaml.safe_dump({stage: {group: modifier}}, sort_keys=False))
    print({bits: len(targets) for bits, targets in names.items()})


if __name__ == "__main__":
    typer.run(main)
