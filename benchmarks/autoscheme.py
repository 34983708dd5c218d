"""Write the recipe that AutoScheme, auto-round's own mixed precision, chooses at equal bytes.

    python benchmarks/autoscheme.py MODEL RECIPE.yaml OUT.yaml D.jsonl --average-bits 2.56

AutoScheme measures the loss of the model with every layer under every option and picks a mix that
meets an average, scales and zero points counted. OUT is the given AutoRound recipe with such a mix
in place of its one width, of the same average: ``compare.py`` can run both under the same settings.
Layers are chosen one by one, also within q/k/v and gate/up: stock vLLM could not serve every mix.
"""

from pathlib import Path

import typer
import yaml
from auto_round import AutoRound
from auto_round.auto_scheme.gen_auto_scheme import AutoScheme
from auto_round.schemes import QuantizationScheme
from budgets import at_budget
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

SCALE_BITS = 16


def main(
    model: str,
    recipe: Path,
    out: Path,
    dataset: str,
    average_bits: float | None = None,
    candidates: list[int] = (2, 3, 4),
    group_size: int = 64,
    samples: int = 32,
    max_length: int = 512,
    seed: int = 0,
) -> None:
    """Choose, and write the recipe.

    :param recipe: an AutoRound recipe of one integer width, asymmetric
    :param dataset: a .json or .jsonl file with the key text
    """
    set_seed(seed)
    text = recipe.read_text() if average_bits is None else at_budget(recipe, average_bits, model)
    content = yaml.safe_load(text)
    (modifiers,) = content.values()
    (modifier,) = modifiers.values()
    settings = modifier["AutoRoundModifier"]
    (scheme,) = settings["config_groups"].values()
    weights = scheme["weights"]
    # as AutoScheme counts: codes, scales and zero points, not what a file format adds
    average = weights["num_bits"] + (SCALE_BITS + weights["num_bits"]) / weights["group_size"]
    options = [
        QuantizationScheme(bits=bits, group_size=group_size, sym=False, data_type="int")
        for bits in candidates
    ]
    calibration = {"dataset": dataset, "nsamples": samples, "seqlen": max_length}
    chosen = AutoRound(
        AutoModelForCausalLM.from_pretrained(model, dtype="auto"),
        AutoTokenizer.from_pretrained(model),
        scheme=AutoScheme(average, options, **calibration),
        seed=seed,
        enable_torch_compile=False,
        **calibration,
    )
    chosen.configure_layer_config(enable_gguf_official_mixed=False)
    names = {bits: [] for bits in candidates}
    for name, layer in chosen.layer_config.items():
        if layer["bits"] in names:
            names[layer["bits"]].append(name)
    settings["config_groups"] = {
        f"w{bits}": {
            "targets": targets,
            "weights": {**weights, "num_bits": bits, "group_size": group_size},
        }
        for bits, targets in names.items()
        if targets
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    note = f"# AutoScheme's mix for {average} bits, chosen on {dataset}, seed {seed}.\n"
    out.write_text(note + yaml.safe_dump(content, sort_keys=False))
    print({bits: len(targets) for bits, targets in names.items()})


if __name__ == "__main__":
    typer.run(main)
