"""The model card of a checkpoint: ``README.md`` as the Hugging Face hub shows it."""

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from casp_plugin.report.facts import Facts
from casp_plugin.report.page import conditions, quality_rows, speed_rows
from casp_plugin.report.templates import render

__all__ = ["MARK", "card"]

#: line that marks the cards written here
MARK = "<!-- written by casp report -->"


def card(facts: Facts, license: str | None = None) -> ModelCard:
    """Return the model card of a checkpoint.

    :param facts: everything known of it
    :param license: the hub's identifier of the base model's licence; None leaves it open
    """
    results = [
        EvalResult(
            task_type="image-text-to-text" if facts.takes_images else "text-generation",
            dataset_type=measured.task,
            dataset_name=measured.task,
            metric_type=measured.metric,
            metric_value=measured.value,
        )
        for measured in facts.measurements
    ]
    base = {"base_model": facts.base_id, "base_model_relation": "quantized"}
    data = ModelCardData(
        **(base if facts.base_id else {}),
        license=license,
        library_name="transformers",
        pipeline_tag="image-text-to-text" if facts.takes_images else "text-generation",
        tags=["casp"] * facts.by_casp + ["compressed-tensors", "vllm", "quantized"],
        model_name=facts.name,
        eval_results=results or None,
    )
    text = render(
        "card.md.j2",
        card_data=data.to_yaml(),
        mark=MARK,
        facts=facts,
        plan=facts.plan,
        takes_images=facts.takes_images,
        quality=quality_rows(facts),
        conditions=conditions(facts),
        speed=speed_rows(facts),
    )
    return ModelCard(text)
