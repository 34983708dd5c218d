"""Words for people: an error on one line, sizes in MB and GB."""

from pydantic import ValidationError

__all__ = ["one_line", "size_text"]


def one_line(error: Exception) -> str:
    """Return an error's message without line breaks; of a pydantic model, which field and why."""
    text = str(error)
    if isinstance(error, ValidationError):
        text = "; ".join(
            f"{'.'.join(map(str, (error.title, *problem['loc'])))}: "
            f"{problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors()
        )
    return " ".join(text.split()) or type(error).__name__


def size_text(size: float) -> str:
    """Return a size in bytes as text: in MB of 1e6 bytes, from 1e9 bytes on in GB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
