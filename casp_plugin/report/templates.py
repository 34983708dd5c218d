"""Rendering of the templates in this folder."""

import re

import jinja2

from casp_plugin.system.messages import size_text

__all__ = ["render"]


def render(name: str, **values) -> str:
    """Return the text of a template with its variables filled in.

    :param name: file in this folder; HTML escapes values itself, Markdown by the filter ``plain``;
        sizes in bytes pass the filter ``size_text``
    :param values: values of its variables
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("casp_plugin.report", ""),
        autoescape=".html" in name,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["plain"] = lambda text: re.sub(r"([\\`*_|<>\[\]])", r"\\\1", text)
    environment.filters["size_text"] = size_text
    return environment.get_template(name).render(**values)
