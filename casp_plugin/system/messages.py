"""Words for people: an error on one line, sizes in GB."""

from pydantic import ValidationError

__all__ = ["gigabytes", "one_line"]


def gigabytes(size: float) -> str:
    """Return a size in bytes as text, in GB of 1e9 bytes."""
    return f"{size / 1e9:.1f} GB"


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
