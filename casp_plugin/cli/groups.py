"""Groups of options: dataclasses that several commands of typer share."""

import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import wraps

__all__ = ["with_groups"]


def with_groups(function: Callable) -> Callable:
    """Let a function that takes groups of options, which are dataclasses, be a command of typer.

    Typer reads options from a function's signature. That of the function returned has the fields
    of each group in the place of the group.
    """
    parameters = inspect.signature(function).parameters.values()
    groups = {
        parameter.name: parameter.annotation
        for parameter in parameters
        if is_dataclass(parameter.annotation)
    }
    flat = []
    for parameter in parameters:
        if parameter.name in groups:
            flat += inspect.signature(groups[parameter.name]).parameters.values()
        else:
            flat.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @wraps(function)
    def command(**values):
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        return function(**values)

    command.__signature__ = inspect.Signature(flat)
    return command
