"""Units: the smallest sets of linear layers that one bit width is chosen for.

vLLM fuses q, k, v and gate, up into one matmul, so the members of a fused layer have one scheme,
unless the plugin runs them apart: with granularity ``matrix``, and always for factored members (a
low-rank q/k leaves v a unit of its own).
"""

import re
from collections.abc import Container, Iterable
from dataclasses import dataclass

from compressed_tensors.utils import is_match
from llmcompressor.observers.helpers import FUSED_LAYER_NAMES
from llmcompressor.utils.pytorch import infer_sequential_targets
from llmcompressor.utils.transformers import get_embeddings
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from casp_plugin.model.low_rank_linear import LowRankLinear, named_linears

__all__ = [
    "OUTPUT_HEAD",
    "Unit",
    "decoder_layers",
    "find_units",
    "matched_linears",
    "output_head",
    "reading_together",
]

#: the output head, ignored by default
OUTPUT_HEAD = "re:(.*[.])?lm_head$"
#: least number of columns of a linear, unless a target is its name
FEWEST_COLUMNS = 16
_ROUTER = re.compile(r"gate|router|.*_router|router_.*|shared_experts?_gate|weights_proj")
_EXPERT = re.compile(r"^(.*\.experts)\.\d+\.")


@dataclass(frozen=True)
class Unit:
    """The smallest set of linears that one bit width is chosen for.

    :param name: layer and members, for instance ``model.layers.3.mlp.gate_proj+up_proj``
    :param modules: names of its linears; a factored layer counts as one
    """

    name: str
    modules: tuple[str, ...]


def matched_linears(
    model: nn.Module, targets: list[str], ignore: list[str], field: str
) -> dict[str, nn.Linear | LowRankLinear]:
    """Return the linears that match targets in llm-compressor's syntax, in module order.

    Names match exactly or, with the prefix ``re:``, as a regular expression; class names
    such as ``Linear`` match too. A factored layer matches by the name of the layer it replaced.
    Routers and gates of experts match only targets that contain their name: a choice of experts is
    worth more than the few bytes, and vLLM builds some in 16 bits only. Layers of fewer than
    ``FEWEST_COLUMNS`` columns (Gemma 3n's `correction_coefs`) match only their full name.

    :param targets: what to match
    :param ignore: what to leave out again
    :param field: the field that holds the targets, named in errors
    :raises ValueError: if a target matches no layer, a pattern is no regular expression, all
        matches are ignored, or a matched layer is already quantized
    """
    for pattern in (*targets, *ignore):
        try:
            re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
        except re.error as error:
            where = field if pattern in targets else field.replace("targets", "ignore")
            raise ValueError(f"{where}: {pattern!r} is no regular expression: {error}") from None
    linears = named_linears(model)
    if OUTPUT_HEAD in ignore:  # under the name of any family
        ignore = [*ignore, *output_head(model)]

    def matches(name: str, module: nn.Module, pattern: str) -> bool:
        dense = module.up if isinstance(module, LowRankLinear) else module
        return is_match(name, dense, pattern)

    for target in targets:
        if not any(matches(name, module, target) for name, module in linears):
            known = ", ".join(name for name, _ in linears[:4])
            raise ValueError(
                f"{field}: target {target!r} matches no linear layer of "
                f"{type(model).__name__}; its linear layers are {known}, ... "
                "(prefix a regular expression with 're:')"
            )
    matched = {
        name: module
        for name, module in linears
        if any(
            matches(name, module, target) and _asked_for(name, module, target) for target in targets
        )
        and not any(matches(name, module, pattern) for pattern in ignore)
    }
    if not matched:
        others = any(isinstance(module, Conv1D) for module in model.modules())
        why = " (its matrices are Conv1D, which llm-compressor leaves alone)" if others else ""
        raise ValueError(f"{field}: every matching layer is excluded by ignore {ignore}{why}")
    for name, module in matched.items():
        parts = module.children() if isinstance(module, LowRankLinear) else [module]
        for part in parts:
            quantized = getattr(part, "quantization_scheme", None) is not None
            if quantized or not part.weight.is_floating_point():
                raise ValueError(
                    f"{field}: {name} is already quantized; start from the full-precision model"
                )
    return matched


def output_head(model: nn.Module) -> list[str]:
    """Return the name of the layer that puts out logits, in a list; an empty list without one."""
    head = get_embeddings(model)[1] if isinstance(model, PreTrainedModel) else None
    return [name for name, module in model.named_modules() if module is head and head is not None]


def _asked_for(name: str, module: nn.Linear | LowRankLinear, target: str) -> bool:
    """Tell whether a target that matches a linear is meant for it.

    A linear of few columns, where scales cost more than codes save, must be named in full. A
    router of experts or tokens, or the gate of a shared expert, is known by its name and by having
    fewer outputs than inputs; the target must contain that part of its name.
    """
    if module.in_features < FEWEST_COLUMNS:
        return target == name
    words = [part for part in name.split(".") if _ROUTER.fullmatch(part)]
    if not words or module.out_features >= module.in_features:
        return True
    return any(word in target for word in words)


def decoder_layers(model: nn.Module) -> list[str]:
    """Return the names of the decoder layers, which llm-compressor calibrates in this order."""
    classes = infer_sequential_targets(model)
    classes = [classes] if isinstance(classes, str) else list(classes)
    return [
        name
        for name, module in model.named_modules()
        if type(module).__name__ in classes and re.search(r"\.\d+$", name)
    ]


def find_units(
    linears: dict[str, nn.Linear | LowRankLinear],
    layers: list[str],
    granularity: str,
    share_layers: int,
    together: Iterable[Iterable[str]] = (),
) -> list[Unit]:
    """Group linears into units.

    :param linears: the linears that get a bit width, by name
    :param layers: decoder layers, in order
    :param granularity: ``unit``: one width per fused layer; ``layer``: one per decoder layer;
        ``matrix``: one per linear, while the experts of a layer share theirs
    :param share_layers: number of adjacent layers of a stack that share their widths
    :param together: groups of linears that are one unit each, at any granularity
    """
    position = {}  # (stack, index in the stack) by layer: a vision tower has its own stack
    for layer in layers:
        stack = layer.rpartition(".")[0]
        position[layer] = stack, sum(other == stack for other, _ in position.values())
    owners = {name: tuple(names) for names in map(tuple, together) for name in names}
    members: dict[tuple, list[str]] = {}
    for name, module in linears.items():
        layer, local = _layer_and_rest(name, position)
        key = _fused_key(local, module, granularity == "matrix")
        if name in owners:
            members.setdefault(owners[name], []).append(name)
        elif layer is None:
            members.setdefault((None, key), []).append(name)
        else:
            stack, index = position[layer]
            key = () if granularity == "layer" else key
            members.setdefault((stack, index // share_layers, key), []).append(name)
    return [Unit(_unit_name(names, position), tuple(names)) for names in members.values()]


def reading_together(names: Iterable[str]) -> list[list[str]]:
    """Group linears by fused layer, whose members read the same input; experts stay alone."""
    groups: dict[tuple, list[str]] = {}
    for name in names:
        key = (name,) if _EXPERT.match(f".{name}") else _fused_key(name, None, False)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _layer_and_rest(name: str, position: Container[str]) -> tuple[str | None, str]:
    """Return the decoder layer that holds a module, None if none does, and the rest of the name."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        layer = ".".join(parts[:cut])
        if layer in position:
            return layer, ".".join(parts[cut:])
    return None, name


def _fused_key(local: str, module: nn.Module | None, apart: bool) -> tuple:
    """Return a key that is equal for modules which the runtime holds in one fused layer.

    :param local: name of the linear inside its decoder layer
    :param module: the linear; factored members are held apart from dense ones
    :param apart: whether the runtime holds the members of fused layers apart, except experts and
        factored layers with one latent
    """
    if expert := _EXPERT.match(f".{local}"):
        return (expert[1],)
    factored = isinstance(module, LowRankLinear)
    if apart:
        return (id(module.latent),) if factored else (local,)
    parent, _, leaf = local.rpartition(".")
    for group in FUSED_LAYER_NAMES:
        if leaf in group:
            return (parent, group, factored)
    return (local,)


def _unit_name(names: list[str], position: Container[str]) -> str:
    """Return a readable name, for instance ``model.layers.0-1.self_attn.q_proj+k_proj``."""
    split = [_layer_and_rest(name, position) for name in names]
    layers = list(dict.fromkeys(layer for layer, _ in split))
    locals_ = list(dict.fromkeys(local for _, local in split))
    prefix = layers[0]
    if prefix is not None and len(layers) > 1:
        prefix += f"-{layers[-1].rpartition('.')[2]}"
    parents = {local.rpartition(".")[0] for local in locals_}
    if len(parents) == 1:
        parent = parents.pop()
        body = "+".join(local.rpartition(".")[2] for local in locals_)
        body = f"{parent}.{body}" if parent else body
    elif all(_EXPERT.match(f".{local}") for local in locals_):
        body = _EXPERT.match(f".{locals_[0]}")[1].lstrip(".")
    else:
        return prefix or "+".join(locals_)
    return f"{prefix}.{body}" if prefix else body
