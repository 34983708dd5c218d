"""A checkpoint compressed by a recipe: llm-compressor's oneshot, written whole or not at all."""

from collections.abc import Iterable
from pathlib import Path

from llmcompressor import oneshot
from llmcompressor.recipe import Recipe
from transformers import PreTrainedModel, set_seed

from casp_plugin.checkpoint.source import copy_files, source_folder
from casp_plugin.model.experts import linearize_experts
from casp_plugin.model.load import load_model
from casp_plugin.statistics.tracing import check_traceable
from casp_plugin.system.distributed import barrier
from casp_plugin.system.files import whole_folder

__all__ = ["compress"]


def compress(
    model: str,
    recipe: Recipe,
    batches: Iterable[dict],
    output: Path,
    seed: int,
    pipeline: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Compress a model by a recipe, write it to a folder and return it.

    :param model: folder or Hugging Face id
    :param batches: calibration batches
    :param output: folder that does not exist or is empty
    :param seed: seed of all that is random
    :param pipeline: of llm-compressor; None for its default
    :param trust_remote_code: whether Python code that comes with the model may run
    :raises ValueError: if the model cannot be loaded, or the recipe cannot work on it
    """
    loaded = load_model(model, trust_remote_code)
    linearize_experts(loaded)
    if pipeline is None:
        check_traceable(loaded, batches)
    set_seed(seed)
    with whole_folder(output) as partial:
        compressed = oneshot(
            model=loaded,
            processor=_OwnFiles(model),
            recipe=recipe,
            dataset=batches,
            output_dir=str(partial),
            trust_remote_code_model=trust_remote_code,
            **({"pipeline": pipeline} if pipeline else {}),
        )
        barrier()
    return compressed


class _OwnFiles:
    """Stands for the processor where oneshot saves it: transformers would write its files in
    another form, or not at all. The model's own are copied."""

    def __init__(self, model: str):
        self.model = model

    def save_pretrained(self, folder: str) -> None:
        """Copy the files that are not there yet."""
        source = source_folder(self.model)
        if source is not None:
            copy_files(source, Path(folder))
