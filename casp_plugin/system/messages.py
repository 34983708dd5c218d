"""Errors told in one line."""

from pydantic import ValidationError

__all__ = ["one_line"]


def one_line(error: Exception) -> str:
    """Tell what is wrong, without line breaks; of a pydantic model, which field and why."""
    text = str(error)
    if isinstance(error, ValidationError):
        text = "; ".join(
            f"{'.'.join(map(str, (error.title, *each['loc'])))}: "
            f"{each['msg'].removeprefix('Value error, ')}"
            for each in error.errors()
        )
    return " ".join(text.split()) or type(error).__name__
