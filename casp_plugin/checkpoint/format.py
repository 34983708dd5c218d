"""The format of our checkpoints, and their saving, whole or not at all.

A checkpoint has compressed-tensors' own format. We add the plan, and a section ``casp`` inside
``quantization_config`` of ``config.json``, which lists the factored layers.
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from types import MethodType

import torch
from pydantic import ValidationError
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from casp_plugin.checkpoint.probe import Probe, Record, probe
from casp_plugin.checkpoint.source import copy_files, copy_tensors, source_folder
from casp_plugin.model.codebook_linear import CodebookLinear
from casp_plugin.model.codebook_schemes import CodebookScheme, read_scheme
from casp_plugin.model.load import runs_remote_code
from casp_plugin.model.low_rank_linear import LowRankLinear
from casp_plugin.model.weights import checksums, read_headers
from casp_plugin.plan.plan import PLAN_NAME, CompressionPlan
from casp_plugin.system.distributed import is_source_process
from casp_plugin.system.files import whole_folder
from casp_plugin.system.messages import one_line

__all__ = [
    "RECIPE_NAME",
    "SECTION",
    "SECTION_FORMAT",
    "Section",
    "casp_section",
    "copy_processor",
    "read_config",
    "read_section",
    "save_with_plan",
    "unsavable_generation_config",
    "write_config",
]

#: key inside ``quantization_config``
SECTION = "casp"
#: increased when older versions cannot read the section; 2: shared latents, 3: codebooks
SECTION_FORMAT = 3
_READABLE_FORMATS = (1, 2, 3)
RECIPE_NAME = "recipe.yaml"
#: codes, scales and zero points of quantized experts
_EXPERT_CODES = re.compile(r"\.experts\.\d+\.\w+\.weight_\w+$")
_WEIGHT_FILE = re.compile(r"model(-[\w-]+)?\.safetensors(\.index\.json)?")
#: files of tokenizers and processors
_PROCESSOR = ("*token*", "vocab*", "merges.txt", "*.model", "chat_template*", "*processor*")


@dataclass(frozen=True)
class Section:
    """The contents of our section.

    :param ranks: rank of every factored layer, by module name
    :param latent_of: owner of the ``down`` that a layer uses, for layers without one of their own
    :param codebooks: scheme of every layer that is stored as codes of a codebook
    """

    ranks: dict[str, int] = field(default_factory=dict)
    latent_of: dict[str, str] = field(default_factory=dict)
    codebooks: dict[str, CodebookScheme] = field(default_factory=dict)

    @property
    def layers(self) -> set[str]:
        """Return all layers of the section, factored ones under their own name."""
        whole = (name for name in self.codebooks if name.rpartition(".")[0] not in self.ranks)
        return {*self.ranks, *whole}


def casp_section(model: nn.Module) -> dict:
    """Return the section for a model: ranks of factored layers, owners of shared latents, and
    schemes of codebook layers."""
    factored = {
        module: name for name, module in model.named_modules() if isinstance(module, LowRankLinear)
    }
    by_scheme: dict[CodebookScheme, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, CodebookLinear):
            by_scheme.setdefault(module.scheme, []).append(name)
    section = {
        "format": SECTION_FORMAT if by_scheme else 2,
        "low_rank": {name: module.rank for module, name in factored.items()},
        "latent_of": {
            name: factored[module.latent_of]
            for module, name in factored.items()
            if module.latent_of is not None
        },
    }
    if by_scheme:
        section["codebooks"] = [
            {**scheme.model_dump(mode="json"), "targets": names}
            for scheme, names in by_scheme.items()
        ]
    return section


def read_config(folder: Path | str) -> dict:
    """Return the ``config.json`` of a checkpoint folder.

    :raises ValueError: if the folder holds no readable config
    """
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder} is not a checkpoint folder: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{folder} is not a checkpoint folder: config.json holds no table")
    if not isinstance(config.get("quantization_config") or {}, dict):
        raise ValueError(f"{folder}: quantization_config in config.json is no table")
    return config


def read_section(quantization: dict) -> Section:
    """Return our section of a checkpoint; an empty section for a checkpoint without it.

    :param quantization: ``quantization_config`` of a checkpoint
    :raises ValueError: if the section is malformed or of another format
    """
    where = f"quantization_config.{SECTION}"
    section = quantization.get(SECTION)
    if section is None:
        return Section()
    ranks = section.get("low_rank") if isinstance(section, dict) else None
    if not isinstance(ranks, dict):
        raise ValueError(f"{where} is malformed: no table 'low_rank'")
    if section.get("format") not in _READABLE_FORMATS:
        raise ValueError(
            f"{where}.format is {section.get('format')!r}; this version of casp-plugin reads "
            f"formats up to {SECTION_FORMAT}: upgrade casp-plugin"
        )
    for name, rank in ranks.items():
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ValueError(f"{where}.low_rank: rank of {name} must be positive, got {rank!r}")
    latent_of = section.get("latent_of", {})
    if not isinstance(latent_of, dict):
        raise ValueError(f"{where} is malformed: 'latent_of' is no table")
    for name, owner in latent_of.items():
        known = isinstance(owner, str) and owner not in latent_of and name in ranks
        if not known or ranks.get(owner) != ranks[name]:
            raise ValueError(
                f"{where}.latent_of: {name} cannot use the latent of {owner!r}: both must be "
                "factored layers of one rank, and the other must have a latent of its own"
            )
    return Section(ranks, latent_of, _read_codebooks(section.get("codebooks", []), where))


def _read_codebooks(groups: list, where: str) -> dict[str, CodebookScheme]:
    """Return the scheme of every codebook layer.

    :param groups: fields of a scheme and the names of its layers, a list of tables
    :raises ValueError: if a group is malformed, or a layer is in two
    """
    schemes: dict[str, CodebookScheme] = {}
    for number, group in enumerate(groups if isinstance(groups, list) else [None]):
        here = f"{where}.codebooks[{number}]"
        targets = group.get("targets") if isinstance(group, dict) else None
        if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
            raise ValueError(f"{here} is malformed: no list 'targets' of names")
        try:
            scheme = read_scheme({key: group[key] for key in group.keys() - {"targets"}})
        except ValidationError as error:
            raise ValueError(f"{here} is malformed: {one_line(error)}") from None
        twice = [name for name in targets if name in schemes]
        if twice or len(set(targets)) < len(targets):
            raise ValueError(f"{here}: {(twice or targets)[0]} has two schemes")
        schemes |= dict.fromkeys(targets, scheme)
    return schemes


def write_config(folder: Path, config: dict) -> None:
    """Write the ``config.json`` of a checkpoint folder."""
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_section(folder: Path, section: dict, tied: bool = True) -> None:
    """Add our section to the ``quantization_config`` that compressed-tensors wrote.

    :param folder: checkpoint folder
    :param section: as ``casp_section`` returns it
    :param tied: False if the output head differs from the embedding that the config ties it to
    """
    config = read_config(folder)
    if not tied:
        text = config.get("text_config")
        (text if isinstance(text, dict) else config)["tie_word_embeddings"] = False
        config["tie_word_embeddings"] = False
    config.pop("transformers_weights", None)  # names a file of the source
    quantization = config.setdefault("quantization_config", {"quant_method": "compressed-tensors"})
    quantization[SECTION] = section
    write_config(folder, config)


def copy_processor(source: Path | str, folder: Path) -> None:
    """Replace the tokenizer and processor files of a checkpoint by the original model's, byte for
    byte, because transformers saves them in another form.

    :param source: the original model, a folder or Hugging Face id
    :param folder: checkpoint folder
    :raises ValueError: if the model cannot be reached
    """
    original = source_folder(str(source))
    if original is None:
        raise ValueError(f"{source} is neither a folder nor a Hugging Face id that can be reached")
    for pattern in _PROCESSOR:
        for path in folder.glob(pattern):
            if path.is_file():
                path.unlink()
        for path in original.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def save_with_plan(
    model: PreTrainedModel,
    plan: CompressionPlan | None,
    recipe: str | None = None,
    probes: list[Probe] | None = None,
    experts: bool = False,
) -> None:
    """Wrap ``model.save_pretrained``, so that it also writes our section, the plan, and all tensors
    and files of the original checkpoint that the model's class does not build; whole or not at all.

    llm-compressor rebuilds ``config.json`` from the source checkpoint on every save, so the
    section is added after it. The plan is kept as ``model.casp_plan``.

    :param model: the model whose method is wrapped
    :param plan: plan to store; None without one
    :param recipe: text of the recipe that made a reloaded checkpoint; llm-compressor itself writes
        the recipe of a new one
    :param probes: logits of a reloaded checkpoint in the run that made it; None to compute them
        when the model is saved
    :param experts: whether a reloaded checkpoint has quantized experts, which are dense in memory:
        their codes are copied from it
    """
    model.casp_plan = plan
    save = model.save_pretrained

    @wraps(save)  # keeps llm-compressor's mark that it has wrapped the method already
    def save_pretrained(self, save_directory, *args, **kwargs):
        with whole_folder(save_directory) as partial:
            source, logits = self.name_or_path, probes
            if logits is None:
                logits, _ = probe(self, source, runs_remote_code(self))
            with _savable_generation_config(self, partial):
                save(str(partial), *args, **kwargs)
            if not is_source_process():
                return
            write_section(partial, casp_section(self), tied=not _head_differs(self))
            folder = source_folder(source)
            if folder is not None:
                _complete(partial, folder, plan, experts)
            elif experts or (plan is not None and plan.copied):
                raise ValueError(
                    f"{source} is gone, which holds tensors that are copied unchanged: put it back"
                )
            Record(probes=logits, checksums=checksums(partial)).save(partial)
            _drop_stale_weights(Path(save_directory), partial)
            if plan is not None:
                plan.save(partial / PLAN_NAME)
            if recipe is not None:
                (partial / RECIPE_NAME).write_text(recipe)

    model.save_pretrained = MethodType(save_pretrained, model)


def _drop_stale_weights(target: Path, partial: Path) -> None:
    """Remove weights of an older checkpoint from a folder, which transformers would read instead of
    the new weights or beside them."""
    for path in target.glob("model*.safetensors*"):
        if _WEIGHT_FILE.fullmatch(path.name) and not (partial / path.name).exists():
            path.unlink()


def unsavable_generation_config(model: PreTrainedModel) -> str | None:
    """Tell why transformers would not save the generation settings of a model, or could not read
    those of its source; None if it can do both."""
    if not model.can_generate():
        return None
    source = source_folder(model.name_or_path)
    try:
        if source is not None and (source / "generation_config.json").exists():
            GenerationConfig.from_pretrained(source)
        model.generation_config.validate(strict=True)
    except Exception as error:  # contradictory settings, malformed JSON
        return one_line(error)
    return None


def _head_differs(model: PreTrainedModel) -> bool:
    """Tell whether the output head and the embedding of a model are two different dense matrices:
    transformers then does not tie them, whatever the config says, but vLLM would."""
    try:
        ends = model.get_input_embeddings(), model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return False
    embedding, head = (getattr(end, "weight", None) for end in ends)
    dense = embedding is not None and head is not None and embedding is not head
    alike = dense and (embedding.shape, embedding.dtype) == (head.shape, head.dtype)
    return alike and not torch.equal(embedding, head)


@contextmanager
def _savable_generation_config(model: PreTrainedModel, folder: Path) -> Iterator[None]:
    """Give a model default generation settings for a while where transformers would refuse to save
    its own, and leave their file out: the source's is copied later."""
    if unsavable_generation_config(model) is None:
        yield
        return
    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept
        (folder / "generation_config.json").unlink(missing_ok=True)


def _complete(folder: Path, source: Path, plan: CompressionPlan | None, experts: bool) -> None:
    """Copy the tensors and files of the source that ``save_pretrained`` leaves out."""
    copy_files(source, folder)
    copied = [tensor.name for tensor in plan.copied] if plan is not None else []
    codes = [name for name in read_headers(source) if _EXPERT_CODES.search(name)] if experts else []
    copy_tensors(source, copied + codes, folder)
    layers = [name.removesuffix(".weight") for name in copied if name.endswith(".weight")]
    if layers:  # runtimes that build them must load them dense
        config = read_config(folder)
        quantization = config["quantization_config"]
        ignored = quantization.get("ignore") or []
        quantization["ignore"] = ignored + [name for name in layers if name not in ignored]
        write_config(folder, config)
