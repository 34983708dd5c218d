"""Texts and images for tiny models."""

import json
from io import BytesIO
from pathlib import Path

import numpy
from PIL import Image


def save_texts(path: Path) -> None:
    """Write eight texts of words that the tiny models know, as JSON lines."""
    rows = [{"text": " ".join(f"w{(i * 7 + j) % 90 + 3}" for j in range(24))} for i in range(8)]
    path.write_text("\n".join(map(json.dumps, rows)))


def png(width=32, height=32, seed=0) -> bytes:
    """Return a PNG file of random pixels."""
    pixels = numpy.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=numpy.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()
