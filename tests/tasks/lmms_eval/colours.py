"""Pictures of one colour, drawn when they are asked for."""

from PIL import Image


def visual(doc: dict) -> list[Image.Image]:
    return [Image.new("RGB", (96, 96), doc["colour"])]


def text(doc: dict, lmms_eval_specific_kwargs: dict | None = None) -> str:
    return "What color is the background?"


def right(doc: dict, said: list[str]) -> dict[str, float]:
    return {"exact_match": float(said[0].strip().lower() == doc["colour"])}
